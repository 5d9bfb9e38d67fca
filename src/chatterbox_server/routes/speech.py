"""POST /v1/audio/speech: OpenAI's request in, sound out."""

import asyncio
import dataclasses
import secrets
from typing import Annotated, Final, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, field_validator

from chatterbox_server import audio, delivery, text
from chatterbox_server.delivery import Script
from chatterbox_server.engine import Engine, Sampling, Utterance
from chatterbox_server.problems import BadRequest, documented
from chatterbox_server.service import Service, Shared
from chatterbox_server.voices import DEFAULT

router = APIRouter(prefix="/v1/audio", tags=["audio"])

FIRST_PIECE: Final = 80
"""Characters of the first piece of a longer text, so that the first sound leaves early."""

SOON_SPLIT: Final = 1000
"""Characters that are split in less time than it takes to have another thread do so."""


def _named(voice: object) -> object:
    """OpenAI's newer clients may send a voice of one's own as an object."""
    return voice["id"] if isinstance(voice, dict) and voice.keys() == {"id"} else voice


VoiceName = Annotated[
    str,
    BeforeValidator(_named),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "object",
                    "properties": {"id": {"type": "string"}},
                    "required": ["id"],
                    "additionalProperties": False,
                },
            ]
        }
    ),
]


class SpeechRequest(BaseModel):
    """OpenAI's fields, and below them Chatterbox's own. Fields that are not listed are ignored."""

    model_config = ConfigDict(
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        json_schema_extra={
            "examples": [
                {"input": "Hello.", "response_format": "wav"},
                {
                    "input": "The quick brown fox.",
                    "voice": "nova",
                    "stream_format": "sse",
                    "exaggeration": 0.7,
                    "seed": 1,
                },
            ]
        },
    )

    model: str = "tts-1"
    """Any name: one model is loaded, and it speaks (see /v1/models)."""
    input: Annotated[str, Field(min_length=1)]
    """What to say. Long text is split into sentences and streamed; /readyz says how long it may be."""
    voice: VoiceName = DEFAULT
    """A name from /v1/audio/voices; also as `{"id": NAME}`."""
    response_format: audio.Format = "mp3"
    """pcm is 16 bit, little-endian, mono, 24 kHz."""
    speed: Annotated[float, Field(ge=0.25, le=4.0)] = 1.0
    """Other than 1.0 only where the engine can."""
    instructions: str | None = None
    """Accepted and ignored: Chatterbox takes its manner from the voice and from exaggeration."""
    stream_format: Literal["audio", "sse"] | None = None
    """Have the sound leave as soon as it is there: as it is, or as OpenAI's server-sent events in base64. Without it a
    long text is streamed, and a short one comes whole, with its length."""

    language: str | None = None
    """Language code; without it the engine's own (English)."""
    exaggeration: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    """How vivid; 0.5 is neutral. Turbo ignores it."""
    cfg_weight: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """How closely the voice's pace is kept. Turbo ignores it."""
    temperature: Annotated[float, Field(gt=0.0, le=5.0)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """Turbo ignores it."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=0, le=100_000)] | None = None
    """Turbo alone uses it; 0 turns it off."""
    repetition_penalty: Annotated[float, Field(ge=1.0, le=10.0)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**53)] | None = None
    """The same request with the same seed sounds the same; the answer's X-Seed says which was used."""
    max_wait_s: Annotated[float, Field(gt=0.0, le=3600.0)] | None = None
    """Give up (503) when not begun after so many seconds; never longer than the server's own limit."""

    @field_validator("input")
    @classmethod
    def _says_something(cls, text: str) -> str:
        if not text.strip():
            msg = "there is nothing to say"
            raise ValueError(msg)
        if "\0" in text:
            msg = "a zero byte cannot be spoken"
            raise ValueError(msg)
        return text


_SOUND: Final = {
    "description": "The sound, or events with its parts in base64. What has one piece has a Content-Length too.",
    "content": {media_type: {} for media_type in audio.MEDIA_TYPES.values()}
    | {
        delivery.SERVER_SENT_EVENTS: {
            "example": 'data: {"type":"speech.audio.delta","audio":"SUQz…"}\n\n'
            'data: {"type":"speech.audio.done","usage":{"input_tokens":6,"output_tokens":25,"total_tokens":31}}\n\n'
        }
    },
    "headers": {
        name: {"description": description, "schema": {"type": kind, "minimum": 0}}
        for name, kind, description in (
            ("X-Seed", "integer", "What to send as `seed` to hear the same again"),
            ("X-Queue-Wait", "number", "Seconds in the queue"),
            ("X-Queue-Position", "integer", "How many requests were before this one when it came"),
            ("X-Time-To-First-Byte", "number", "Seconds from the request to the first sound"),
            ("X-Places", "integer", "Pieces that this instance speaks at once"),
            (
                "X-Real-Time-Factor",
                "number",
                "Seconds of computing per second of sound, of the pieces spoken so far; not there before the first is",
            ),
            ("X-Audio-Duration", "number", "Seconds of sound; only where it is known, in an answer of one piece"),
        )
    },
}


@router.post("/speech", summary="Speak", response_class=Response, responses={200: _SOUND, **documented(400, 500, 503)})
async def speech(asked: SpeechRequest, request: Request, service: Shared) -> Response:
    """Say ``input``. 400 says what to change; 503 says in Retry-After when to come back."""
    script = await completed(asked, service)
    return await delivery.deliver(request, service, script, {"X-Seed": str(script.utterances[0].seed)})


async def completed(asked: SpeechRequest, service: Service) -> Script:
    """As ``complete``, on a thread where it takes long enough to delay a health check, or asks a disk."""
    if asked.voice == DEFAULT and len(asked.input) <= SOON_SPLIT:
        return complete(asked, service)
    return await asyncio.to_thread(complete, asked, service)


def complete(asked: SpeechRequest, service: Service) -> Script:
    """Decide everything that the client left open.

    Raises:
        BadRequest, UnknownVoice: this engine cannot do what was asked.
    """
    engine = service.queue.engine
    _check(asked, engine, service.settings.max_input_chars)
    given = {
        field.name: value for field in dataclasses.fields(Sampling) if (value := getattr(asked, field.name)) is not None
    }
    whole = Utterance(
        text=asked.input,
        voice=service.voices.find(asked.voice).recording,
        language=engine.languages[0] if asked.language is None else asked.language.lower(),
        speed=asked.speed,
        sampling=dataclasses.replace(engine.defaults, **given),
        seed=secrets.randbelow(2**32) if asked.seed is None else asked.seed,
    )
    # What is short anyway sounds best in one breath.
    first = FIRST_PIECE if len(asked.input) > 2 * FIRST_PIECE else None
    pieces = text.split(asked.input, language=whole.language, longest=engine.longest_piece, first=first)
    if not pieces:
        message = "input: there is nothing to say in it, only signs"
        raise BadRequest(message, param="input")
    return Script(
        utterances=[dataclasses.replace(whole, text=piece.text) for piece in pieces],
        pauses_s=[piece.pause_s for piece in pieces],
        audio_format=asked.response_format,
        as_events=asked.stream_format == "sse",
        streamed=asked.stream_format is not None or len(pieces) > 1,
        max_wait_s=asked.max_wait_s,
    )


def _check(asked: SpeechRequest, engine: Engine, max_input_chars: int) -> None:
    if len(asked.input) > max_input_chars:
        message = f"input has {len(asked.input)} characters, and this server accepts {max_input_chars}"
        raise BadRequest(message, param="input")
    slowest, fastest = engine.speeds
    if not slowest <= asked.speed <= fastest:
        able = f"{slowest:g}" if slowest == fastest else f"{slowest:g} to {fastest:g}"
        message = f"{engine.model} speaks at speed {able}, not {asked.speed:g}"
        raise BadRequest(message, param="speed")
    if asked.language is not None and asked.language.lower() not in engine.languages:
        known = ", ".join(engine.languages)
        message = f"{engine.model} does not speak language {asked.language[:64]!r}; it speaks: {known}"
        raise BadRequest(message, param="language")
