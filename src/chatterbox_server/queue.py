"""Admission, order, deadlines and cancellation before the one thread that owns the engine. Knows no HTTP."""

import asyncio
import contextlib
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Final

import numpy as np
from numpy.typing import NDArray

from chatterbox_server.engine import Engine, EngineBroken, EngineError, Refused, Utterance

RECENT: Final = 32
"""Utterances whose mean time foretells the next one."""


class Busy(Exception):
    """Not now: worth asking again, here or elsewhere."""

    def __init__(self, reason: str, *, retry_after_s: int) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s
        """Whole seconds until asking again may help; at least 1."""


class QueueFull(Busy):
    """As many requests wait as may wait."""


class WaitedTooLong(Busy):
    """The request waited its longest time and was not begun."""


class Closed(Busy):
    """This process speaks no more."""


@dataclass(frozen=True, slots=True)
class Spoken:
    samples: NDArray[np.float32]
    queue_wait_s: float
    """From admission until the engine began."""
    synthesis_s: float


@dataclass(eq=False, slots=True)
class _Job:
    utterance: Utterance
    answer: asyncio.Future[Spoken]
    admitted_s: float
    begun_s: float = math.nan
    expiry: asyncio.TimerHandle | None = None


class EngineQueue:
    """First come, first served, one at a time.

    Everything but the engine lives on the event loop, so nothing here needs a lock: the loop hands the thread
    one utterance, the thread hands the loop one outcome.
    """

    def __init__(
        self,
        load: Callable[[], Engine],
        *,
        size: int,
        max_wait_s: float,
        on_broken: Callable[[EngineBroken], None] | None = None,
    ) -> None:
        self._load = load
        self._size = size
        self._max_wait_s = max_wait_s
        self._on_broken = on_broken
        self._waiting: deque[_Job] = deque()
        self._running: _Job | None = None
        self._recent_s: deque[float] = deque(maxlen=RECENT)
        self._handed: SimpleQueue[Utterance | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._engine: Engine | None = None
        self._closed: str | None = None
        self.draining = False
        """Told to stop: readiness says no, yet whoever still comes is served, for a refusal would be a loss."""
        self.spoken = 0

    # -- what others may ask ------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            msg = "the engine is not loaded"
            raise RuntimeError(msg)
        return self._engine

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return 0 if self._running is None else 1

    @property
    def busy_since(self) -> float | None:
        """``time.monotonic()`` at which the running utterance began; ``None`` while idle."""
        return None if self._running is None else self._running.begun_s

    @property
    def alive(self) -> bool:
        """The engine is loaded, its thread runs, and it may speak again."""
        running = self._thread is not None and self._thread.is_alive()
        return running and self._engine is not None and self._closed is None

    def sound(self, longest_utterance_s: float) -> bool:
        """Alive, and not stuck in an utterance older than ``longest_utterance_s``."""
        return self.alive and (self.busy_since is None or time.monotonic() - self.busy_since < longest_utterance_s)

    def retry_after_s(self) -> int:
        """When asking again may help; see the function of the same name."""
        elapsed_s = 0.0 if self.busy_since is None else time.monotonic() - self.busy_since
        return retry_after_s(tuple(self._recent_s), elapsed_s=elapsed_s)

    # -- life ---------------------------------------------------------------------------------------------

    async def start(self) -> Engine:
        """Load the engine on its thread; raises what loading raised."""
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[Engine] = loop.create_future()
        # A daemon, for a thread stuck inside a CUDA call must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, args=(loop, loaded), name="engine", daemon=True)
        self._thread.start()
        self._engine = await loaded
        return self._engine

    async def close(self, *, patience_s: float = 1.0) -> None:
        """Refuse whoever waits, let the thread end; after ``patience_s`` leave it behind."""
        self._refuse_all("the server is stopping")
        self._handed.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, patience_s)

    async def speak(self, utterance: Utterance) -> Spoken:
        """Wait for the turn of ``utterance`` and for its sound.

        Cancelled while it waits, it gives its place up; cancelled while it is spoken, its sound is dropped.

        Raises:
            QueueFull, WaitedTooLong, Closed: ask again later.
            Refused, EngineError: what the engine raised; anything else it raises becomes an ``EngineError``.
        """
        if self._closed is not None:
            raise Closed(self._closed, retry_after_s=1)
        if self._running is not None and len(self._waiting) >= self._size:
            reason = f"{len(self._waiting)} requests wait already, and no more may"
            raise QueueFull(reason, retry_after_s=self.retry_after_s())
        loop = asyncio.get_running_loop()
        job = _Job(utterance, loop.create_future(), admitted_s=time.monotonic())
        self._waiting.append(job)
        self._begin_next()
        if job is not self._running:
            job.expiry = loop.call_later(self._max_wait_s, self._expire, job)
        try:
            return await job.answer
        finally:
            self._leave(job)

    # -- on the event loop --------------------------------------------------------------------------------

    def _begin_next(self) -> None:
        if self._running is not None or not self._waiting:
            return
        job = self._waiting.popleft()
        if job.expiry is not None:
            job.expiry.cancel()
        job.begun_s = time.monotonic()
        self._running = job
        self._handed.put(job.utterance)

    def _leave(self, job: _Job) -> None:
        if job.expiry is not None:
            job.expiry.cancel()
        with contextlib.suppress(ValueError):
            self._waiting.remove(job)

    def _expire(self, job: _Job) -> None:
        self._leave(job)
        if not job.answer.done():
            reason = f"not begun after {self._max_wait_s:g} s of waiting"
            job.answer.set_exception(WaitedTooLong(reason, retry_after_s=self.retry_after_s()))

    def _finish(self, outcome: NDArray[np.float32] | Exception, synthesis_s: float) -> None:
        job = self._running
        if job is None:  # pragma: no cover
            msg = "the engine answered what nobody asked"
            raise RuntimeError(msg)
        self._running = None
        if isinstance(outcome, EngineBroken):
            self._refuse_all(f"the engine is broken: {outcome}")
            if self._on_broken is not None:
                self._on_broken(outcome)
        if not isinstance(outcome, Exception):
            self._recent_s.append(synthesis_s)
            self.spoken += 1
        # Done already: whoever asked has left.
        if not job.answer.done():
            if isinstance(outcome, Exception):
                job.answer.set_exception(outcome)
            else:
                job.answer.set_result(Spoken(outcome, job.begun_s - job.admitted_s, synthesis_s))
        self._begin_next()

    def _refuse_all(self, reason: str) -> None:
        self._closed = self._closed or reason
        while self._waiting:
            job = self._waiting.popleft()
            if not job.answer.done():
                job.answer.set_exception(Closed(reason, retry_after_s=1))

    # -- on the engine's thread ---------------------------------------------------------------------------

    def _work(self, loop: asyncio.AbstractEventLoop, loaded: asyncio.Future[Engine]) -> None:
        # The loop closes before a stuck engine returns: then nobody is left to tell.
        with contextlib.suppress(RuntimeError):
            try:
                engine = self._load()
            except BaseException as error:  # noqa: BLE001 (a thread has nobody above it: it tells the loop)
                loop.call_soon_threadsafe(_fail, loaded, _told(error, "load"))
                return
            loop.call_soon_threadsafe(_succeed, loaded, engine)
            while (utterance := self._handed.get()) is not None:
                began_s = time.monotonic()
                outcome = _synthesize(engine, utterance)
                loop.call_soon_threadsafe(self._finish, outcome, time.monotonic() - began_s)


def retry_after_s(recent_s: Sequence[float], *, elapsed_s: float) -> int:
    """Seconds until the running utterance ought to end, and with it free a place: at least 1, for a header.

    It is taken to last as long as the ``recent_s`` did on average, and has run for ``elapsed_s``.
    """
    mean_s = statistics.fmean(recent_s) if recent_s else 1.0
    return max(1, math.ceil(mean_s - elapsed_s))


def _synthesize(engine: Engine, utterance: Utterance) -> NDArray[np.float32] | Exception:
    try:
        return engine.synthesize(utterance)
    except BaseException as error:  # noqa: BLE001 (as above)
        return _told(error, "speak")


def _told(error: BaseException, verb: str) -> Exception:
    """``error`` itself where it belongs to the engine's words; else an EngineError caused by it."""
    if isinstance(error, EngineError | Refused):
        return error
    first_line = (str(error).splitlines() or ["no message"])[0]
    wrapped = EngineError(f"cannot {verb}: {type(error).__name__}: {first_line}")
    wrapped.__cause__ = error
    return wrapped


def _fail(future: asyncio.Future[Engine], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _succeed(future: asyncio.Future[Engine], engine: Engine) -> None:
    if not future.done():
        future.set_result(engine)
