"""The voices that a request may name: list, upload, rename, remove."""

import asyncio
from typing import Final, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict
from starlette.datastructures import UploadFile

from chatterbox_server.problems import BadRequest, documented
from chatterbox_server.service import Shared
from chatterbox_server.voices import Voice

router = APIRouter(prefix="/v1/audio", tags=["audio"])


UPLOADS: Final = "/v1/audio/voices"
"""The path that takes recordings."""


class VoiceRow(BaseModel):
    """A voice as a client sees it."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    name: str
    kind: Literal["built-in", "alias", "recording"]
    means: str | None
    """The voice that an alias stands for."""
    available: bool
    """False for an alias of a voice that does not exist."""
    duration_s: float | None
    """Length of the recording, where it can be told without decoding."""
    created: int | None
    """Unix time of the recording."""


class VoiceList(BaseModel):
    """Every voice."""

    object: Literal["list"]
    voices: list[VoiceRow]


class NewName(BaseModel):
    """What a voice shall be called."""

    model_config = ConfigDict(strict=True, json_schema_extra={"examples": [{"name": "anna"}]})

    name: str


_UPLOAD: Final = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {
                        "name": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"},
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "5 to 30 s of speech: wav, flac, ogg, mp3, m4a, webm …",
                        },
                        "audio_sample": {
                            "type": "string",
                            "format": "binary",
                            "description": "OpenAI's name for `file`",
                        },
                        "replace": {"type": "string", "enum": ["true", "false"], "default": "false"},
                    },
                },
                "example": {"name": "anna", "file": "(the bytes of anna.wav)"},
            }
        },
    }
}


@router.get("/voices", summary="List voices")
async def voices(service: Shared) -> VoiceList:
    """Built-in, recorded, and the names that OpenAI's clients send."""

    def rows() -> list[VoiceRow]:
        return [_row(voice) for voice in service.voices.voices().values()]

    return VoiceList(object="list", voices=await asyncio.to_thread(rows))


@router.post(
    "/voices",
    summary="Add a voice",
    status_code=201,
    responses=documented(400, 403, 409),
    openapi_extra=_UPLOAD,
)
async def upload(request: Request, service: Shared) -> VoiceRow:
    """Keep a recording as a voice, for every server of this host at once.

    It is trimmed of silence, brought to one loudness and to 24 kHz; `replace` overwrites a voice of that name.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise BadRequest("the body must be multipart/form-data, with name and file", param="file")
    async with request.form(max_files=2, max_fields=8) as form:
        name = form.get("name")
        if not isinstance(name, str):
            raise BadRequest("name: field required", param="name")
        sample = form.get("file", form.get("audio_sample"))
        if not isinstance(sample, UploadFile):
            raise BadRequest("file: a file is required", param="file")
        replace = form.get("replace", "false")
        if replace not in {"true", "false"}:
            raise BadRequest("replace: input should be 'true' or 'false'", param="replace")
        async with service.decoding:
            voice = await asyncio.to_thread(service.voices.add, name, sample.file, replace=replace == "true")
    return await asyncio.to_thread(_row, voice)


@router.get("/voices/{name}", summary="Show a voice", responses=documented(404))
async def voice(name: str, service: Shared) -> VoiceRow:
    """One voice."""
    return await asyncio.to_thread(lambda: _row(service.voices.find(name)))


@router.patch("/voices/{name}", summary="Rename a voice", responses=documented(400, 403, 404, 409))
async def rename(name: str, wanted: NewName, service: Shared) -> VoiceRow:
    """Call a recording something else."""
    return await asyncio.to_thread(lambda: _row(service.voices.rename(name, wanted.name)))


@router.delete(
    "/voices/{name}",
    summary="Remove a voice",
    status_code=204,
    response_class=Response,
    responses=documented(400, 403, 404),
)
async def remove(name: str, service: Shared) -> None:
    """Forget a recording."""
    await asyncio.to_thread(service.voices.remove, name)


def _row(voice: Voice) -> VoiceRow:
    return VoiceRow(
        id=voice.name,
        name=voice.name,
        kind=voice.kind,
        means=voice.meant if voice.kind == "alias" else None,
        available=voice.there,
        duration_s=voice.duration_s,
        created=voice.created,
    )
