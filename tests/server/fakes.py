"""An engine that tests steer, and the two ways to reach a server around it. Starts no process."""

import asyncio
import functools
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, Literal, TypeVar

import httpx
import numpy as np
import uvicorn
from fastapi import FastAPI
from numpy.typing import NDArray

from chatterbox_server import speaker
from chatterbox_server.app import WARM_UP, create_app, lifetime
from chatterbox_server.engine import (
    Engine,
    EngineBroken,
    EngineError,
    Errand,
    GpuMemory,
    OutOfMemory,
    Refused,
    Sampling,
    Utterance,
)
from chatterbox_server.order import order as order_of
from chatterbox_server.place import Spoken
from chatterbox_server.queue import EngineQueue
from chatterbox_server.settings import Settings

T = TypeVar("T")

PATIENCE_S = 30.0
"""Only ever waited for by a test that is about to fail."""


class FakeEngine:
    """Says a noise that belongs to the utterance; what goes wrong is written in the text.

    With several places it takes the next utterance as soon as it has begun one.
    """

    name = "fake"
    model = "fake-1"
    sample_rate_hz = 24_000
    longest_piece = 100
    tokens_per_audio_s: float | None = 25.0
    speeds = (1.0, 1.0)
    languages: tuple[str, ...] = ("en", "de")
    defaults = Sampling()
    frees_beside = False
    broken: EngineBroken | None = None

    def __init__(self, *, held: bool = False, places: int = 1, in_parts: bool = False) -> None:
        self.places = places
        self.in_parts = in_parts
        """To those who listen each third is given as soon as it is there."""
        self.heard: list[Utterance] = []
        self.freed = 0
        self.held = held
        """Each utterance but the warm-up waits for ``let_go``."""
        self._go = threading.Semaphore(0)

    def let_go(self, count: int = 1) -> None:
        self._go.release(count)

    def facts(self) -> Mapping[str, object]:
        return {"devices": []}

    def memory(self) -> GpuMemory | None:
        return GpuMemory(allocated_bytes=1, reserved_bytes=2, free_bytes=6, total_bytes=8)

    def free(self) -> None:
        self.freed += 1

    def synthesize(self, utterance: Utterance, errand: Errand) -> NDArray[np.float32]:
        self.heard.append(utterance)
        errand.make_way()
        with errand.at_work():
            if self.held and utterance.text != WARM_UP:
                assert self._go.acquire(timeout=PATIENCE_S), "nobody let the engine go on"
        match utterance.text:
            case "refuse":
                raise Refused("that recording is silent", param="voice")
            case "fail":
                raise EngineError("the fan is stuck")
            case "memory":
                raise OutOfMemory("the GPU is out of memory")
            case "break":
                raise EngineBroken("device-side assert")
            case "bug":
                raise ZeroDivisionError("division by zero")
            case "stop":
                raise StopIteration
            case "nan":
                return np.array([0.0, np.nan], np.float32)
            case "nothing":
                return np.zeros(0, np.float32)
        return self._in_parts(utterance, errand) if self.in_parts and errand.listens else noise(utterance)

    def _in_parts(self, utterance: Utterance, errand: Errand) -> NDArray[np.float32]:
        first, second, third = np.split(noise(utterance), 3)
        for part in (first, second):
            errand.give(part)
            if self.held:
                assert self._go.acquire(timeout=PATIENCE_S), "nobody let the engine go on"
            if utterance.text == "break off":
                raise EngineError("the fan is stuck")
        return third


def noise(utterance: Utterance) -> NDArray[np.float32]:
    """A tenth of a second that no other utterance has."""
    dice = np.random.default_rng(zlib.crc32(repr(utterance).encode()))
    return dice.uniform(-0.5, 0.5, 2400).astype(np.float32)


def an_utterance(text: str, **changed: Any) -> Utterance:
    whole: dict[str, Any] = {"voice": None, "language": "en", "speed": 1.0, "sampling": Sampling(), "seed": 0}
    return Utterance(text=text, **(whole | changed))


def run(scenario: Coroutine[Any, Any, T]) -> T:
    """Run ``scenario``, which may not hang."""

    async def bounded() -> T:
        async with asyncio.timeout(2 * PATIENCE_S):
            return await scenario

    return asyncio.run(bounded())


async def until(true: Callable[[], bool]) -> None:
    """Let everything else run until ``true``."""
    async with asyncio.timeout(PATIENCE_S):
        while not true():
            await asyncio.sleep(0.001)


def queue_of(
    load: Callable[[], Engine],
    *,
    order: Literal["size", "fifo"] = "fifo",
    size: int = 8,
    max_wait_s: float = 60.0,
    longest_utterance_s: float = 60.0,
    on_spoken: Callable[[Spoken], None] = lambda _: None,
) -> EngineQueue:
    return EngineQueue(
        load,
        functools.partial(speaker.speak, check_duration=False),
        order=order_of(order, max_wait_s=max_wait_s),
        size=size,
        max_wait_s=max_wait_s,
        longest_utterance_s=longest_utterance_s,
        on_spoken=on_spoken,
    )


@asynccontextmanager
async def a_queue(engine: Engine, **changed: Any) -> AsyncIterator[EngineQueue]:
    queue = queue_of(lambda: engine, **changed)
    await queue.start()
    try:
        yield queue
    finally:
        if isinstance(engine, FakeEngine):
            engine.held = False
            engine.let_go(1000)
        await queue.close(patience_s=PATIENCE_S)


@asynccontextmanager
async def a_client(engine: Engine, settings: Settings | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the whole app, without a socket."""
    # A fake's sound lasts as long for every text.
    app = create_app(lambda: engine, settings or Settings(check_duration=False))
    async with lifetime(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=PATIENCE_S) as client:
            yield client


@asynccontextmanager
async def a_port(app: FastAPI) -> AsyncIterator[int]:
    """A real port on which uvicorn serves ``app``."""
    config = uvicorn.Config(app, port=0, lifespan="off", log_config=None, timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    async with lifetime(app):
        serving = asyncio.create_task(server.serve())
        await until(lambda: server.started)
        try:
            yield server.servers[0].sockets[0].getsockname()[1]
        finally:
            server.should_exit = True
            await serving
