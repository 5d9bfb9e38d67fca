"""The routes of home-made Chatterbox servers, so that scripts written for them go on working. Adds nothing of its own.

`/synthesize`, `/synthesize-json`, `/audio/NAME`, `/health` and `/models/info` come from one family of servers, and what
they answer here is what its clients read: `success`, `message`, `audio_url`, `duration`, `sample_rate`, `parameters`.
"""

import asyncio
import dataclasses
import json
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.routing import APIRoute
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.datastructures import FormData, UploadFile

from chatterbox_server import audio, delivery, problems
from chatterbox_server.delivery import Script
from chatterbox_server.limits import longest_json
from chatterbox_server.problems import BadRequest, Problem, documented
from chatterbox_server.recordings import NotARecording
from chatterbox_server.routes import speech
from chatterbox_server.routes.speech import SpeechRequest
from chatterbox_server.service import Service, Shared
from chatterbox_server.voices import DEFAULT

REFERENCES: Final = ("audio_prompt", "reference_audio", "ref_audio", "audio_file", "voice_file")
"""What a form may call the recording to imitate."""

UPLOADS: Final = "/synthesize"
"""The path that takes recordings."""

GIGABYTE: Final = 1e9

_FORMS: Final = ("multipart/form-data", "application/x-www-form-urlencoded")
_MOST_FIELDS: Final = 64


class CompatRequest(SpeechRequest):
    """The fields of /v1/audio/speech, also by the names that other servers gave them.

    Numbers may be text, as in a form; what is null or empty counts as left out; fields that are not listed are ignored.
    """

    model_config = ConfigDict(
        strict=False, json_schema_extra={"examples": [{"text": "Hello.", "temperature": 0.8, "exaggeration": 0.5}]}
    )

    input: Annotated[str, Field(min_length=1, validation_alias=AliasChoices("text", "input"))]
    """What to say; also called `input`."""
    voice: Annotated[str, Field(validation_alias=AliasChoices("voice", "voice_id"))] = DEFAULT
    """A name from /v1/audio/voices; also called `voice_id`."""
    response_format: Annotated[
        audio.Format, Field(validation_alias=AliasChoices("format", "output_format", "response_format"))
    ] = "wav"
    """Also called `output_format` and `response_format`."""
    speed: Annotated[float, Field(ge=0.25, le=4.0, validation_alias=AliasChoices("speed", "speech_rate"))] = 1.0
    """Other than 1.0 only where the engine can; also called `speech_rate`."""
    language: Annotated[str | None, Field(validation_alias=AliasChoices("language", "language_id"))] = None
    """Language code; also called `language_id`."""

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_empty(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        # Of an empty text more can be said than that it is missing.
        return {name: value for name, value in given.items() if value is not None and (value != "" or name in _TEXT)}


_TEXT: Final = frozenset(("text", "input"))


class Synthesized(BaseModel):
    """Where the sound is, and what it cost."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    success: Literal[True] = True
    message: str
    audio_url: str
    """Path of the sound on this host, whichever of its servers is asked; kept for an hour."""
    filename: str
    duration: float
    """Seconds of sound."""
    sample_rate: int
    parameters: dict[str, str | int | float | None]
    """What was used, also of what was left out."""


class Failed(Problem):
    """OpenAI's shape of an error, with what these clients read beside it (absent where no route was reached)."""

    success: Literal[False] = False
    message: str | None = None
    detail: str | None = None


class Health(BaseModel):
    """Whether a request sent now would be spoken."""

    model_config = ConfigDict(use_attribute_docstrings=True, protected_namespaces=())

    status: Literal["healthy", "unhealthy"]
    model_loaded: bool
    gpu_available: bool
    gpu_name: str | None
    gpu_memory_total: float | None
    """GB."""
    gpu_memory_allocated: float | None
    """GB."""
    gpus: list[str]


class ModelInfo(BaseModel):
    """The one model that is loaded."""

    model_config = ConfigDict(protected_namespaces=())

    model_type: str
    device: str
    sample_rate: int
    loaded: bool
    languages: list[str]


class CompatRoute(APIRoute):
    """Refusals in OpenAI's shape, with ``success``, ``message`` and ``detail`` beside it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own, and what it raises put into words here rather than by the app."""
        answer = super().get_route_handler()

        async def answered(request: Request) -> Response:
            try:
                return await answer(request)
            except Exception as error:
                handlers = request.app.exception_handlers
                refusing = next((handlers[kind] for kind in type(error).__mro__ if kind in handlers), None)
                if refusing is None:
                    raise
                return _for_scripts(await refusing(request, error))

        return answered


def _for_scripts(refusal: JSONResponse) -> Response:
    body = json.loads(bytes(refusal.body))
    said = body["error"]["message"]
    answer = JSONResponse({"success": False, "message": said, "detail": said, **body}, refusal.status_code)
    answer.headers.update({name: value for name, value in refusal.headers.items() if name not in answer.headers})
    return answer


_NOT_SPOKEN: Final = documented(400, 500, 501, 503, 507, model=Failed)
_SOUND: Final[dict[str, Any]] = {media_type: {} for media_type in audio.MEDIA_TYPES.values()}

router = APIRouter(tags=["compatibility"], route_class=CompatRoute)


def _body_of_synthesize() -> dict[str, Any]:
    asked = CompatRequest.model_json_schema()
    recording = {"type": "string", "format": "binary", "description": "5 to 30 s of speech, whose voice is imitated"}
    form = {**asked, "properties": {**asked["properties"], **dict.fromkeys(REFERENCES, recording)}}
    content = {
        "multipart/form-data": {"schema": form},
        "application/x-www-form-urlencoded": {"schema": asked},
        "application/json": {"schema": asked},
    }
    return {"requestBody": {"required": True, "content": content}}


@router.post(
    "/synthesize",
    deprecated=True,
    response_class=Response,
    responses={200: {"model": Synthesized, "content": _SOUND}, **_NOT_SPOKEN},
    openapi_extra=_body_of_synthesize(),
)
async def synthesize(request: Request, service: Shared) -> Response:
    """Say `text`, in the voice of a recording sent along with it. In its place: `POST /v1/audio/speech`.

    The answer is JSON with an `audio_url`, as the family of servers that had this route beside `/synthesize-json`
    answers: its web page and its scripts read JSON, whatever they accept. Other servers answered with the sound itself;
    so does this one where the request accepts `audio/…`, as in `curl -H 'Accept: audio/wav' -F text=Hello. …`.
    """
    async with AsyncExitStack() as stack:
        script = await _script(request, service, stack)
        if _accepts_sound(request):
            return await delivery.deliver(request, service, script, _seed(script), stack.pop_all())
        return await _kept(request, service, script)


@router.post("/synthesize-json", deprecated=True, response_model=Synthesized, responses=_NOT_SPOKEN)
async def synthesize_json(asked: CompatRequest, request: Request, service: Shared) -> Response:
    """Say `text`, and answer where the sound is kept. In its place: `POST /v1/audio/speech`, which streams it."""
    return await _kept(request, service, await speech.completed(asked, service))


@router.get(
    "/audio/{name}",
    deprecated=True,
    response_class=Response,
    responses={200: {"content": _SOUND}, 206: {"content": _SOUND}, **documented(404, model=Failed)},
)
async def result(name: str, service: Shared) -> Response:
    """The sound of an `audio_url`, whole or by Range. In its place: `POST /v1/audio/speech`, in one step.

    Any server of the host has it, for an hour.
    """
    path = await asyncio.to_thread(service.results.find, name)
    media_type = next(media for known, media in audio.MEDIA_TYPES.items() if path.suffix == f".{known}")
    return FileResponse(path, media_type=media_type)


@router.get("/health", deprecated=True, response_model=Health, responses=documented(503, model=Health))
async def health(service: Shared) -> Response:
    """200 while a request would be spoken, else 503; answers at once. In its place: `GET /readyz`."""
    gpus, memory = _gpus(service), service.queue.memory
    body = Health(
        status="healthy" if service.ready else "unhealthy",
        model_loaded=service.queue.healthy,
        gpu_available=memory is not None,
        gpu_name=gpus[0] if gpus else None,
        gpu_memory_total=None if memory is None else memory.total_bytes / GIGABYTE,
        gpu_memory_allocated=None if memory is None else memory.allocated_bytes / GIGABYTE,
        gpus=gpus,
    )
    if service.ready:
        return JSONResponse(body.model_dump())
    return JSONResponse(body.model_dump(), 503, {"Retry-After": str(service.queue.retry_after_s())})


@router.get("/models/info", deprecated=True)
async def model_info(service: Shared) -> ModelInfo:
    """What speaks here. In its place: `GET /v1/models` and `GET /readyz`."""
    engine = service.queue.engine
    return ModelInfo(
        model_type=engine.model,
        device="cpu" if service.queue.memory is None else "cuda",
        sample_rate=engine.sample_rate_hz,
        loaded=service.queue.healthy,
        languages=list(engine.languages),
    )


def _gpus(service: Service) -> list[str]:
    names = service.queue.engine.facts().get("gpus", [])
    return [str(name) for name in names] if isinstance(names, list) else []


async def _script(request: Request, service: Service, stack: AsyncExitStack) -> Script:
    """What a form or JSON asks for; ``stack`` holds the recording that came with it."""
    if problems.is_json(request):
        body = await request.body()
        asked = _valid(lambda: CompatRequest.model_validate_json(body))
        return await speech.completed(asked, service)
    if not request.headers.get("content-type", "").lower().startswith(_FORMS):
        raise BadRequest("the body must be a form or JSON, with text", param="text")
    longest = longest_json(service.settings.max_input_chars)
    async with request.form(max_files=1, max_fields=_MOST_FIELDS, max_part_size=longest) as form:
        said: dict[str, object] = {name: value for name, value in form.items() if isinstance(value, str)}
        reference = _reference(form)
        if reference is not None:
            # Whatever else is named: who sends a recording wants to hear it.
            said |= {"voice": DEFAULT}
        script = await speech.completed(_valid(lambda: CompatRequest.model_validate(said)), service)
        if reference is None:
            return script
        field, sent = reference
        try:
            async with service.decoding:
                voice = await asyncio.to_thread(stack.enter_context, service.results.voice(sent.file))
        except NotARecording as error:
            message = f"{field}: {error}"
            raise BadRequest(message, param=field) from error
    spoken = [dataclasses.replace(utterance, voice=voice) for utterance in script.utterances]
    return dataclasses.replace(script, utterances=spoken)


def _valid(read: Callable[[], CompatRequest]) -> CompatRequest:
    try:
        return read()
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


def _reference(form: FormData) -> tuple[str, UploadFile] | None:
    """The recording and the field it came in."""
    for field in REFERENCES:
        sent = form.get(field)
        # Without a name: of a web page's field nobody filled in.
        if isinstance(sent, UploadFile) and sent.filename:
            return field, sent
        if isinstance(sent, str) and sent:
            message = f"{field}: a file is required, not its name"
            raise BadRequest(message, param=field)
    return None


def _accepts_sound(request: Request) -> bool:
    ranges = request.headers.get("accept", "").lower().split(",")
    return any(accepted.strip().startswith("audio/") for accepted in ranges)


async def _kept(request: Request, service: Service, script: Script) -> Response:
    """Speak all of ``script`` into a file, piece by piece, and say where it is."""
    rate_hz = service.queue.engine.sample_rate_hz
    script = dataclasses.replace(script, streamed=False)
    with await asyncio.to_thread(service.results.begin, script.audio_format, rate_hz) as unfinished:
        try:
            async with delivery.speak(request, service, script) as (spoken, listener):
                while (samples := await listener.waits_for(spoken.next_part(lambda joined: joined))) is not None:
                    await asyncio.to_thread(unfinished.write, samples)
        except delivery.ClientLeft:
            return delivery.left(request)
        name = await asyncio.to_thread(service.results.keep, unfinished, script.audio_format)
    first = script.utterances[0]
    body = Synthesized(
        message=f"spoke {script.chars} characters in {spoken.synthesis_s:.2f} s",
        audio_url=f"/audio/{name}",
        filename=name,
        duration=round(spoken.audio_s, 3),
        sample_rate=rate_hz,
        parameters={
            **dataclasses.asdict(first.sampling),
            "seed": first.seed,
            "speed": first.speed,
            "language": first.language,
            "format": script.audio_format,
        },
    )
    return JSONResponse(body.model_dump(), headers=_seed(script) | delivery.measured(spoken))


def _seed(script: Script) -> dict[str, str]:
    return {"X-Seed": str(script.utterances[0].seed)}
