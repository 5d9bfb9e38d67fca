"""POST /v1/audio/speech: OpenAI's request in, sound out."""

import asyncio
import dataclasses
import secrets
from collections.abc import Coroutine
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, field_validator

from chatterbox_server import audio
from chatterbox_server.engine import Engine, Sampling, Utterance
from chatterbox_server.problems import BadRequest
from chatterbox_server.queue import Spoken
from chatterbox_server.service import Service, Shared
from chatterbox_server.voices import DEFAULT

router = APIRouter(prefix="/v1/audio", tags=["audio"])

T = TypeVar("T")

CLIENT_LEFT = 499
"""nginx's word for a client that closed the connection; nobody reads it but the log."""


class SpeechRequest(BaseModel):
    """OpenAI's fields, and below them Chatterbox's own. Fields that are not listed are ignored."""

    model_config = ConfigDict(
        strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )

    model: str = "tts-1"
    """Any name: one model is loaded, and it speaks (see /v1/models)."""
    input: Annotated[str, Field(min_length=1)]
    """What to say; how long it may be depends on the engine."""
    voice: str = DEFAULT
    """A name from /v1/audio/voices."""
    response_format: audio.Format = "mp3"
    """pcm is 16 bit, little-endian, mono, 24 kHz."""
    speed: Annotated[float, Field(ge=0.25, le=4.0)] = 1.0
    """Other than 1.0 only where the engine can."""
    instructions: str | None = None
    """Accepted and ignored: Chatterbox takes its manner from the voice and from exaggeration."""
    stream_format: Literal["audio"] = "audio"
    """The sound itself; server-sent events are not offered."""

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


@router.post(
    "/speech",
    response_class=Response,
    responses={200: {"content": {media: {} for media in audio.MEDIA_TYPES.values()}}},
)
async def speech(asked: SpeechRequest, request: Request, service: Shared) -> Response:
    """Say ``input``. 400 says what to change; 503 says in Retry-After when to come back."""
    queue = service.queue
    utterance = await asyncio.to_thread(complete, asked, service)
    spoken = await unless_client_leaves(request, queue.speak(utterance))
    if spoken is None:
        request.state.outcome = "client left"
        return Response(status_code=CLIENT_LEFT)
    # In a thread: a minute of mp3 takes long enough to delay a health check.
    sound = await asyncio.to_thread(audio.encode, spoken.samples, queue.engine.sample_rate_hz, asked.response_format)
    headers = measured(spoken, queue.engine.sample_rate_hz) | {"X-Seed": str(utterance.seed)}
    request.state.outcome = f"spoke {headers['X-Audio-Duration']} s of {asked.response_format}"
    return Response(sound, media_type=audio.MEDIA_TYPES[asked.response_format], headers=headers)


def complete(asked: SpeechRequest, service: Service) -> Utterance:
    """Decide everything that the client left open.

    Raises:
        BadRequest, UnknownVoice: this engine cannot do what was asked.
    """
    engine = service.queue.engine
    _check(asked, engine)
    given = {
        field.name: value for field in dataclasses.fields(Sampling) if (value := getattr(asked, field.name)) is not None
    }
    return Utterance(
        text=asked.input,
        voice=service.voices.find(asked.voice).recording,
        language=engine.languages[0] if asked.language is None else asked.language.lower(),
        speed=asked.speed,
        sampling=dataclasses.replace(engine.defaults, **given),
        seed=secrets.randbelow(2**32) if asked.seed is None else asked.seed,
    )


def measured(spoken: Spoken, sample_rate_hz: int) -> dict[str, str]:
    """Headers that tell how it went; the real-time factor is compute per second of sound."""
    audio_s = spoken.samples.size / sample_rate_hz
    return {
        "X-Queue-Wait": f"{spoken.queue_wait_s:.3f}",
        "X-Real-Time-Factor": f"{spoken.synthesis_s / audio_s:.3f}",
        "X-Audio-Duration": f"{audio_s:.3f}",
    }


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of ``work``; ``None``, with ``work`` cancelled, as soon as the client hangs up.

    Once the body has been read, the next thing the connection can say is that it is gone.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _check(asked: SpeechRequest, engine: Engine) -> None:
    if len(asked.input) > engine.max_chars:
        message = (
            f"input has {len(asked.input)} characters, and {engine.model} accepts {engine.max_chars}"
            f" in one request: {engine.max_chars_reason}"
        )
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
