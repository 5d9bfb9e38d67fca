"""From a request's place in the queue to the bytes of its answer: whole, as a stream, or as server-sent events.

What is short comes whole, with its length and what it cost in the headers. What has several pieces, or is asked for as
a stream, leaves part by part, the first as soon as it is spoken.
"""

import asyncio
import base64
import contextlib
import functools
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import numpy as np
from fastapi import Request
from fastapi.responses import Response
from numpy.typing import NDArray
from starlette.types import Receive, Scope, Send

from chatterbox_server import audio
from chatterbox_server.engine import EngineError, OutOfMemory, Refused, Utterance
from chatterbox_server.joints import InParts, Joints
from chatterbox_server.metrics import Outcome
from chatterbox_server.place import Busy, Place, Spoken
from chatterbox_server.service import Service

T = TypeVar("T")

log = logging.getLogger(__name__)

CLIENT_LEFT: Final = 499
"""nginx's word for a client that closed the connection; nobody reads it but the log."""

SERVER_SENT_EVENTS: Final = "text/event-stream"

LEFT: Final[Outcome] = "left"
CUT_SHORT: Final[Outcome] = "cut"

FAILURES: Final = (EngineError, Refused, Busy, audio.NotSound)
"""What may yet go wrong when the first byte has left; anything else is a bug."""


class ClientLeft(Exception):
    """Nobody listens any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What a request comes down to."""

    utterances: Sequence[Utterance]
    pauses_s: Sequence[float]
    """Silence after each utterance."""
    audio_format: audio.Format
    as_events: bool
    streamed: bool
    """Sound leaves as soon as it is there; otherwise all of it at once, with its length."""
    max_wait_s: float | None

    @property
    def chars(self) -> int:
        return sum(len(utterance.text) for utterance in self.utterances)


@dataclass(slots=True)
class Speech:
    """The sound of one request as it comes, and what it cost so far."""

    script: Script
    place: Place
    request: Request
    service: Service
    synthesis_s: float = 0.0
    """Of the pieces that are spoken to their end."""
    spoken: int = 0
    """Pieces that are."""
    samples: int = 0
    _joints: Joints = field(init=False)
    _piece: InParts = field(init=False)
    _left: Iterator[float] = field(init=False)
    _spoken: AsyncIterator[Any] = field(init=False)

    def __post_init__(self) -> None:
        self._joints = Joints(self.sample_rate_hz)
        self._piece = InParts(self._joints)
        self._left = iter(self.script.pauses_s)
        self._spoken = aiter(self.place)

    @property
    def sample_rate_hz(self) -> int:
        return self.service.queue.engine.sample_rate_hz

    @property
    def audio_s(self) -> float:
        return self.samples / self.sample_rate_hz

    @property
    def real_time_factor(self) -> float:
        """Seconds of computing per second of sound."""
        return self.synthesis_s / self.audio_s if self.samples else 0.0

    async def next_part(self, use: Callable[[NDArray[np.float32]], T]) -> T | None:
        """What ``use`` makes of what comes next, a piece or a part of one; ``None`` after the last.

        It is ready to be put behind the one before. ``use`` is called on the thread that made it so.
        """
        while True:
            try:
                spoken = await anext(self._spoken)
            except StopAsyncIteration:
                return None
            except OutOfMemory:
                self.service.metrics.engine_failed("out_of_memory")
                raise
            pause_s = next(self._left) if spoken.last else 0.0
            # One way there and back for both: they cost more than some of what is done there.
            used = await asyncio.to_thread(self._used, spoken, pause_s, use)
            if used is not None:
                return used

    def _used(self, spoken: Spoken, pause_s: float, use: Callable[[NDArray[np.float32]], T]) -> T | None:
        piece, begun = self._piece, self._piece.begun
        joined = piece.join(spoken.samples, last=spoken.last, pause_s=pause_s)
        if spoken.last:
            self._piece = InParts(self._joints)
        self.synthesis_s += spoken.synthesis_s
        self.spoken += spoken.last
        self.samples += joined.size
        # A piece of which nothing was heard is for the encoder to refuse; an end of silence is nothing to send.
        return use(joined) if joined.size or (spoken.last and not begun) else None


class Listener:
    """The other end of a request, for as long as it is there.

    Once the body has been read, the next thing the connection can say is that it is gone.
    """

    def __init__(self, request: Request) -> None:
        self._leaving = asyncio.ensure_future(_gone(request))

    async def waits_for(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``, which is cancelled as soon as nobody listens.

        Raises:
            ClientLeft: before it was done.
        """
        working = asyncio.ensure_future(work)
        try:
            await asyncio.wait((working, self._leaving), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise ClientLeft
            return await working
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)

    def __enter__(self) -> "Listener":
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@contextlib.asynccontextmanager
async def speak(request: Request, service: Service, script: Script) -> AsyncIterator[tuple[Speech, Listener]]:
    """A place in the queue for ``script``, held while the client listens.

    Raises:
        Busy: as ``EngineQueue.admit``.
    """
    state = request.state
    place = service.queue.admit(
        script.utterances,
        # The name of the key; else what the front says, which lets no client say it for itself.
        client=getattr(state, "client", "") or request.headers.get("x-client", ""),
        max_wait_s=script.max_wait_s,
        waited_s=_seconds(request.headers.get("x-waited", "")),
        listens=script.streamed,
    )
    async with place:
        speech = Speech(script, place, request, service)
        try:
            with Listener(request) as listener:
                yield speech, listener
        finally:
            if place.begun:
                service.metrics.waited(place.queue_wait_s)
            state.log |= {
                "chars": script.chars,
                "pieces": len(script.utterances),
                "format": script.audio_format,
                "queue_wait_s": place.queue_wait_s,
                "audio_s": speech.audio_s,
                "real_time_factor": speech.real_time_factor,
            }


async def deliver(
    request: Request,
    service: Service,
    script: Script,
    headers: Mapping[str, str],
    resources: AsyncExitStack | None = None,
) -> Response:
    """Answer ``request`` with the sound of ``script``; a failure before its first byte is raised, not sent.

    ``resources``, if any, are what the script needs: released with the last byte, or when there is none.
    """
    async with resources or AsyncExitStack() as stack:
        try:
            speech, listener = await stack.enter_async_context(speak(request, service, script))
            if not script.streamed:
                return await _whole(speech, listener, headers)
            encoder, chunk = _something(await listener.waits_for(speech.next_part(functools.partial(_begun, speech))))
        except ClientLeft:
            return left(request)
        chunks = _chunks(speech, listener, encoder, chunk)
        media_type = SERVER_SENT_EVENTS if script.as_events else audio.MEDIA_TYPES[script.audio_format]
        if script.as_events:
            chunks = _events(speech, chunks)
        return Stream(request, chunks, stack.pop_all(), media_type, {**headers, **measured(speech)})


async def _whole(speech: Speech, listener: Listener, headers: Mapping[str, str]) -> Response:
    encode = functools.partial(
        audio.encode, sample_rate_hz=speech.sample_rate_hz, audio_format=speech.script.audio_format
    )
    sound = await listener.waits_for(speech.next_part(encode))
    return Response(
        _something(sound),
        media_type=audio.MEDIA_TYPES[speech.script.audio_format],
        headers={**headers, **measured(speech), "X-Audio-Duration": f"{speech.audio_s:.3f}"},
    )


def left(request: Request) -> Response:
    """What is answered to nobody."""
    request.state.outcome = LEFT
    return Response(status_code=CLIENT_LEFT)


def measured(speech: Speech) -> dict[str, str]:
    """How it went until the first byte leaves; the real-time factor is that of what was spoken so far."""
    first_byte_s = time.monotonic() - speech.request.state.began_s
    speech.service.metrics.first_byte(first_byte_s)
    speech.request.state.log["first_byte_s"] = first_byte_s
    headers = {
        "X-Queue-Wait": f"{speech.place.queue_wait_s:.3f}",
        "X-Queue-Position": str(speech.place.position),
        "X-Time-To-First-Byte": f"{first_byte_s:.3f}",
        "X-Places": str(speech.service.queue.engine.places),
    }
    # What a piece costs is known once all of it is spoken.
    if speech.spoken:
        headers["X-Real-Time-Factor"] = f"{speech.real_time_factor:.3f}"
    return headers


async def _chunks(speech: Speech, listener: Listener, encoder: audio.Encoder, chunk: bytes) -> AsyncIterator[bytes]:
    yield chunk
    while (encoded := await listener.waits_for(speech.next_part(encoder.encode))) is not None:
        yield encoded
    yield await asyncio.to_thread(encoder.finish)


async def _events(speech: Speech, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """OpenAI's events: sound in ``speech.audio.delta``, then one ``speech.audio.done``.

    A failure after the first byte is an event of its own, since the status has long been sent.
    """
    try:
        async for chunk in chunks:
            if chunk:
                yield _event({"type": "speech.audio.delta", "audio": base64.b64encode(chunk).decode()})
    except FAILURES as error:
        speech.request.state.outcome = CUT_SHORT
        problem = {"message": str(error), "type": "server_error", "param": None, "code": "cut_short"}
        yield _event({"type": "error", "error": problem})
        return
    tokens = round(speech.audio_s * (speech.service.queue.engine.tokens_per_audio_s or 0))
    spent = {"input_tokens": speech.script.chars, "output_tokens": tokens}
    yield _event({"type": "speech.audio.done", "usage": spent | {"total_tokens": sum(spent.values())}})


def _event(body: Mapping[str, object]) -> bytes:
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n".encode()


class Stream(Response):
    """A body of unknown length, whose ``resources`` are released when it ends, however it ends."""

    def __init__(
        self,
        request: Request,
        chunks: AsyncIterator[bytes],
        resources: AsyncExitStack,
        media_type: str,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(media_type=media_type, headers=headers)
        del self.headers["content-length"]
        self._request = request
        self._chunks = chunks
        self._resources = resources

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 (ASGI's signature)
        """Without a last chunk, whoever listens knows that something is missing."""
        async with self._resources:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async for chunk in self._chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except ClientLeft:
                self._request.state.outcome = LEFT
                return
            except FAILURES as error:
                self._request.state.outcome = CUT_SHORT
                log.error("cut short, request %s: %s", self._request.state.request_id, error)  # noqa: TRY400 (one line)
                return
            await send({"type": "http.response.body", "body": b""})


def _begun(speech: Speech, samples: NDArray[np.float32]) -> tuple[audio.Encoder, bytes]:
    """Not before there is something to encode: whoever waits for it holds no codec."""
    encoder = audio.Encoder(speech.script.audio_format, speech.sample_rate_hz)
    return encoder, encoder.encode(samples)


def _something(made: T | None) -> T:
    if made is None:
        msg = "the engine returned no sound"
        raise audio.NotSound(msg)
    return made


def _seconds(header: str) -> float:
    try:
        seconds = float(header)
    except ValueError:
        return 0.0
    return seconds if 0.0 <= seconds < 86_400.0 else 0.0
