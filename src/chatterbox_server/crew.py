"""The threads that call the engine, as many as it has places. Knows no request, and not whose turn it is."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Final

from chatterbox_server.engine import Dropped, Engine, EngineError, Errand, GpuMemory, Refused, Utterance
from chatterbox_server.speaker import Sound, Speak

NAME: Final = "engine"
"""What the names of these threads begin with."""


@dataclass(frozen=True, slots=True)
class End:
    """What became of one utterance."""

    outcome: Sound | Exception
    """``Dropped``, ``Refused`` or an ``EngineError`` where it is no sound."""
    work_s: float
    """How long it was worked on."""


class Crew:
    """Takes orders on the event loop, and answers there."""

    def __init__(self, load: Callable[[], Engine], speak: Speak) -> None:
        self._load = load
        self._speak = speak
        self._room = _Room()
        # What a thread does next, given the engine; None: nothing any more.
        self._handed: SimpleQueue[Callable[[Engine], None] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self.memory: GpuMemory | None = None
        """What the engine held after its last utterance: to ask a stuck GPU now would hang whoever asks."""

    @property
    def complete(self) -> bool:
        """Every thread is there."""
        return bool(self._threads) and all(thread.is_alive() for thread in self._threads)

    async def start(self) -> Engine:
        """Load the engine on the first thread, then start the others; raises what loading raised."""
        self._loop = asyncio.get_running_loop()
        loaded: asyncio.Future[Engine] = self._loop.create_future()
        self._begin(self._load_and_work, loaded)
        engine = await loaded
        for _ in range(1, engine.places):
            self._begin(self._work, engine)
        return engine

    async def close(self, *, patience_s: float) -> None:
        """Let the threads end; after ``patience_s`` leave those behind that are still inside the engine."""
        for _ in self._threads:
            self._handed.put(None)
        until_s = time.monotonic() + patience_s
        for thread in self._threads:
            await asyncio.to_thread(thread.join, max(0.0, until_s - time.monotonic()))

    def hand(self, utterance: Utterance, errand: Errand, on_end: Callable[[End], None]) -> None:
        """Have ``utterance`` spoken on a thread that is free, or else on the next that is."""
        handed_s = time.monotonic()

        def do(engine: Engine) -> None:
            with self._room.inside():
                outcome = self._outcome(engine, utterance, errand)
            now_s = time.monotonic()
            # An engine of one step need not tell how long it took.
            end = End(outcome, errand.worked_s(now_s) or now_s - handed_s)
            self._ask_memory(engine)
            self._tell(on_end, end)

        self._handed.put(do)

    def rest(self) -> None:
        """Have the engine give back what it caches, once it has nothing in hand."""

        def do(engine: Engine) -> None:
            # What fails here fails again at the next utterance, where it can be told to somebody.
            with contextlib.suppress(Exception), self._apart(engine):
                engine.free()
            self._ask_memory(engine)

        self._handed.put(do)

    # -- on a thread of the crew --------------------------------------------------------------------------

    def _begin(self, work: Callable[..., None], *given: Any) -> None:
        name = f"{NAME}-{len(self._threads) + 1}"
        # A daemon, for a thread stuck inside a CUDA call must not keep the process from ending.
        self._threads.append(threading.Thread(target=work, args=given, name=name, daemon=True))
        self._threads[-1].start()

    def _load_and_work(self, loaded: asyncio.Future[Engine]) -> None:
        try:
            engine = self._load()
        except BaseException as error:  # noqa: BLE001 (a thread has nobody above it: it tells the loop)
            self._tell(_reject, loaded, _told(error, "load"))
            return
        self._tell(_resolve, loaded, engine)
        self._work(engine)

    def _work(self, engine: Engine) -> None:
        while (do := self._handed.get()) is not None:
            do(engine)

    def _outcome(self, engine: Engine, utterance: Utterance, errand: Errand) -> Sound | Exception:
        def free() -> None:
            with self._room.outside(), self._apart(engine):
                engine.free()

        try:
            return self._speak(engine, utterance, errand, free)
        except BaseException as error:  # noqa: BLE001 (as above)
            return _told(error, "speak")

    def _apart(self, engine: Engine) -> contextlib.AbstractContextManager[None]:
        """Around ``engine.free``: what others hold is waited for, where it comes back."""
        return contextlib.nullcontext() if engine.frees_beside else self._room.alone()

    def _ask_memory(self, engine: Engine) -> None:
        try:
            self.memory = engine.memory()
        except Exception:  # noqa: BLE001 (a broken driver may raise anything, and nobody waits for this number)
            self.memory = None

    def _tell(self, what: Callable[..., None], *about: Any) -> None:
        # The loop closes before a stuck engine returns: then nobody is left to tell.
        with contextlib.suppress(RuntimeError):
            if self._loop is not None:
                self._loop.call_soon_threadsafe(what, *about)


class _Room:
    """Where utterances are; who wants to be alone waits until all are out, and those who come wait outside."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._in = 0
        self._want_to_be_alone = 0

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._want_to_be_alone)
            self._in += 1
        try:
            yield
        finally:
            self._go_out()

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """For one who is inside; coming back in, it waits for nobody."""
        self._go_out()
        try:
            yield
        finally:
            with self._changed:
                self._in += 1

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """For one who is outside. Nobody is inside, or comes in, meanwhile."""
        with self._changed:
            self._want_to_be_alone += 1
            try:
                self._changed.wait_for(lambda: not self._in)
                yield
            finally:
                self._want_to_be_alone -= 1
                self._changed.notify_all()

    def _go_out(self) -> None:
        with self._changed:
            self._in -= 1
            self._changed.notify_all()


def _told(error: BaseException, verb: str) -> Exception:
    """``error`` itself where it belongs to the engine's words; else an EngineError caused by it."""
    if isinstance(error, EngineError | Refused | Dropped):
        return error
    first_line = (str(error).splitlines() or ["no message"])[0]
    wrapped = EngineError(f"cannot {verb}: {type(error).__name__}: {first_line}")
    wrapped.__cause__ = error
    return wrapped


def _reject(future: asyncio.Future[Engine], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _resolve(future: asyncio.Future[Engine], engine: Engine) -> None:
    if not future.done():
        future.set_result(engine)
