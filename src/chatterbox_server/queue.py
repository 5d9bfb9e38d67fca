"""Admission, deadlines, cancellation, and the one thread that owns the engine. Knows no HTTP.

A request is a list of utterances. The engine is asked for one at a time, and between any two of them ``order``
decides anew whose is next: a short request slips in between the pieces of a book.
"""

import asyncio
import contextlib
import math
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from chatterbox_server.engine import Engine, EngineBroken, EngineError, Failure, GpuMemory, Refused, Utterance
from chatterbox_server.order import Claim, Order
from chatterbox_server.speaker import Sound

RECENT: Final = 32
"""Utterances whose pace foretells the next one's."""

AHEAD: Final = 2
"""Spoken utterances that may wait for a slow reader; the engine goes on with others until one is taken."""

PATIENT_S: Final = 60.0
"""A listener who has taken nothing for so long has gone away for good, as far as a stop is concerned."""

IDLE_S: Final = 5.0
"""Without work for so long, the engine gives back the memory that it only caches (scripts/gpu/idle_cache.txt)."""

FAR_BEYOND: Final = 10
"""An utterance that takes so many times what its length foretells is stuck …"""

SHORTEST_PATIENCE_S: Final = 30.0
"""… but not before this: a voice that is heard first, or shapes new to cuDNN, take seconds."""


STUCK: Final = "the engine is stuck"


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
    """This process begins nothing more."""


@dataclass(frozen=True, slots=True)
class Spoken:
    """One utterance of a request."""

    samples: NDArray[np.float32]
    synthesis_s: float
    remarks: tuple[Failure, ...]


@dataclass(eq=False, slots=True)
class _Job:
    utterances: deque[Utterance]
    chars: int
    """Of all utterances that are not spoken yet."""
    client: str
    position: int
    admitted_s: float
    waiting_since_s: float
    begun_s: float = math.nan
    heard_s: float = -math.inf
    """When its reader last took a sound."""
    spoken: deque[Spoken] = field(default_factory=deque)
    error: Exception | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)
    expiry: asyncio.TimerHandle | None = None

    @property
    def begun(self) -> bool:
        return not math.isnan(self.begun_s)

    @property
    def wants_the_engine(self) -> bool:
        return bool(self.utterances) and self.error is None and len(self.spoken) < AHEAD


class Place:
    """A request's place in the queue; leaving it gives the place up, and what is still spoken is dropped."""

    def __init__(self, queue: "EngineQueue", job: _Job) -> None:
        self._queue = queue
        self._job = job

    @property
    def position(self) -> int:
        """Requests that were before this one when it came; 0: none."""
        return self._job.position

    @property
    def begun(self) -> bool:
        """The engine has spoken of it, or speaks."""
        return self._job.begun

    @property
    def queue_wait_s(self) -> float:
        """From admission until the engine began; so far, while it has not."""
        until_s = self._job.begun_s if self._job.begun else time.monotonic()
        return until_s - self._job.admitted_s

    async def __aiter__(self) -> AsyncIterator[Spoken]:
        """Each utterance's sound, in order.

        Raises:
            WaitedTooLong, Closed: ask again later.
            Refused, EngineError: what the engine raised; anything else it raises becomes an ``EngineError``.
        """
        job = self._job
        while True:
            while job.spoken:
                if len(job.spoken) == AHEAD:
                    # Until now it was its reader who let it wait, not the engine.
                    job.waiting_since_s = time.monotonic()
                spoken = job.spoken.popleft()
                job.heard_s = time.monotonic()
                self._queue.go_on()
                yield spoken
            if job.error is not None:
                raise job.error
            if not job.utterances and not self._queue.speaks(job):
                return
            job.news.clear()
            await job.news.wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.leave(self._job)


class EngineQueue:
    """Everything but the engine lives on the event loop, so nothing here needs a lock.

    The loop hands the thread one utterance, the thread hands the loop one outcome.
    """

    def __init__(
        self,
        load: Callable[[], Engine],
        speak: Callable[[Engine, Utterance], Sound],
        *,
        order: Order,
        size: int,
        max_wait_s: float,
        longest_utterance_s: float,
        on_spoken: Callable[[Spoken], None] = lambda _: None,
    ) -> None:
        """``on_spoken`` hears of every utterance, also of one that nobody waits for any more."""
        self._load = load
        self._speak = speak
        self._order = order
        self._size = size
        self._max_wait_s = max_wait_s
        self._longest_utterance_s = longest_utterance_s
        self._on_spoken = on_spoken
        self._jobs: list[_Job] = []
        self._running: tuple[_Job, Utterance, float] | None = None
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT)
        self._handed: SimpleQueue[Utterance | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._engine: Engine | None = None
        self._closed: str | None = None
        self.broken: EngineBroken | None = None
        """Why the engine will never speak again."""
        self.spoken = 0
        """Utterances so far."""
        self.memory: GpuMemory | None = None
        """What the engine held after its last utterance: to ask a stuck GPU now would hang whoever asks."""

    # -- what others may ask ------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            msg = "the engine is not loaded"
            raise RuntimeError(msg)
        return self._engine

    @property
    def waiting(self) -> int:
        """Requests that want the engine and do not have it."""
        return sum(job.wants_the_engine and not self.speaks(job) for job in self._jobs)

    @property
    def running(self) -> int:
        return 0 if self._running is None else 1

    @property
    def at_work(self) -> bool:
        """Something is spoken, or will be as soon as a listener who is still there has heard what is."""
        heard_s = time.monotonic() - PATIENT_S
        return self._running is not None or any(
            job.wants_the_engine or (job.utterances and job.heard_s > heard_s) for job in self._jobs
        )

    @property
    def draining(self) -> bool:
        """Begins nothing more; what was begun goes on."""
        return self._closed is not None

    @property
    def overdue(self) -> bool:
        """The running utterance takes far longer than its length foretells: the engine is stuck."""
        if self._running is None:
            return False
        _, utterance, began_s = self._running
        return time.monotonic() - began_s > patience_s(
            len(utterance.text), self._recent, longest_s=self._longest_utterance_s
        )

    @property
    def healthy(self) -> bool:
        """The engine is loaded, its thread runs, and it is neither broken nor stuck."""
        running = self._thread is not None and self._thread.is_alive()
        return running and self._engine is not None and self.broken is None and not self.overdue

    def retry_after_s(self) -> int:
        """Seconds until the request nearest to its end ought to leave: at least 1, for a header."""
        now_s = time.monotonic()
        ends_s = [self._remaining_s(job, now_s) for job in self._jobs if job.utterances or self.speaks(job)]
        return max(1, math.ceil(min(ends_s, default=1.0)))

    def speaks(self, job: _Job) -> bool:
        return self._running is not None and self._running[0] is job

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

    def drain(self, reason: str = "the server is stopping") -> None:
        """Begin nothing more: hand back whoever was not begun and whoever comes; finish what was begun."""
        self._closed = self._closed or reason
        self.hand_back(self._closed)

    def hand_back(self, reason: str) -> None:
        """Refuse whoever waits to be begun, so that they ask elsewhere."""
        for job in tuple(self._jobs):
            if not job.begun:
                self._fail(job, Closed(reason, retry_after_s=1))

    async def close(self, *, patience_s: float = 1.0) -> None:
        """Refuse everybody, let the thread end; after ``patience_s`` leave it behind."""
        self.drain()
        self._refuse_all(self._closed or "")
        self._handed.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, patience_s)

    # -- admission ----------------------------------------------------------------------------------------

    def admit(
        self,
        utterances: Sequence[Utterance],
        *,
        client: str = "",
        max_wait_s: float | None = None,
        waited_s: float = 0.0,
    ) -> Place:
        """A place for a request of one or more ``utterances``, to be entered with ``async with``.

        ``client`` shares the engine fairly with other clients. ``max_wait_s`` may be shorter than the queue's
        own. ``waited_s`` was spent in other queues, and shortens the wait here.

        Raises:
            QueueFull, Closed: ask again later.
        """
        if self._closed is not None:
            raise Closed(self._closed, retry_after_s=1)
        if self.overdue:
            raise Closed(STUCK, retry_after_s=1)
        waiting = self.waiting
        if self._running is not None and waiting >= self._size and not self._made_room(client):
            raise self._full(waiting)
        waiting = self.waiting
        now_s = time.monotonic()
        job = _Job(
            deque(utterances),
            sum(len(utterance.text) for utterance in utterances),
            client,
            position=waiting + self.running,
            admitted_s=now_s,
            waiting_since_s=now_s,
        )
        self._jobs.append(job)
        self.go_on()
        if not job.begun:
            longest_s = min(self._max_wait_s, max_wait_s or self._max_wait_s)
            left_s = max(0.0, longest_s - waited_s)
            job.expiry = asyncio.get_running_loop().call_later(left_s, self._expire, job, longest_s)
        return Place(self, job)

    def measured(self, chars: int, synthesis_s: float) -> None:
        """What an utterance took, for the next one's estimate."""
        self._recent.append((chars, synthesis_s))

    def _made_room(self, client: str) -> bool:
        """Whether whoever holds most places had to give up its newest, because ``client`` holds far fewer.

        Else a client that floods the queue would keep everybody else out, however fairly the engine is shared behind.
        """
        jobs = [job for job in self._jobs if job.wants_the_engine and not self.speaks(job)]
        places = Counter(job.client for job in jobs)
        fullest, most = max(places.items(), key=lambda held: held[1], default=(client, 0))
        # Less than that, and two clients would push each other out in turn.
        if places[client] + 1 >= most:
            return False
        unbegun = [job for job in jobs if job.client == fullest and not job.begun]
        if not unbegun:
            return False
        self._fail(max(unbegun, key=lambda job: job.admitted_s), self._full(len(jobs)))
        return True

    def _full(self, waiting: int) -> QueueFull:
        reason = f"{waiting} requests wait already, and no more may"
        return QueueFull(reason, retry_after_s=self.retry_after_s())

    def leave(self, job: _Job) -> None:
        """Forget ``job``; the utterance that is being spoken for it ends unheard."""
        if job.expiry is not None:
            job.expiry.cancel()
        job.utterances.clear()
        with contextlib.suppress(ValueError):
            self._jobs.remove(job)

    def go_on(self) -> None:
        """Give the engine its next utterance, if it is free and somebody wants it."""
        if self._running is not None or self.broken is not None:
            return
        wanting = [job for job in self._jobs if job.wants_the_engine]
        if not wanting:
            return
        now_s = time.monotonic()
        job = wanting[self._order.choose([self._claim(job, now_s) for job in wanting], now_s)]
        if job.expiry is not None:
            job.expiry.cancel()
        if not job.begun:
            job.begun_s = now_s
        utterance = job.utterances.popleft()
        self._running = (job, utterance, now_s)
        self._handed.put(utterance)

    # -- on the event loop --------------------------------------------------------------------------------

    def _claim(self, job: _Job, now_s: float) -> Claim:
        return Claim(
            client=job.client,
            admitted_s=job.admitted_s,
            waiting_since_s=job.waiting_since_s,
            remaining_s=self._remaining_s(job, now_s),
            begun=job.begun,
        )

    def _remaining_s(self, job: _Job, now_s: float) -> float:
        whole_s = expected_s(job.chars, self._recent)
        if self._running is not None and self._running[0] is job:
            _, utterance, began_s = self._running
            # Its part counts down to nothing, however late it is.
            part_s = expected_s(len(utterance.text), self._recent)
            return whole_s - min(now_s - began_s, part_s)
        return whole_s

    def _expire(self, job: _Job, longest_s: float) -> None:
        reason = f"not begun after {longest_s:g} s of waiting"
        self._fail(job, WaitedTooLong(reason, retry_after_s=self.retry_after_s()))

    def _fail(self, job: _Job, error: Exception) -> None:
        job.error = job.error or error
        self.leave(job)
        job.news.set()

    def _finish(self, outcome: Sound | Exception, synthesis_s: float) -> None:
        if self._running is None:  # pragma: no cover
            msg = "the engine answered what nobody asked"
            raise RuntimeError(msg)
        now_s = time.monotonic()
        job, utterance, _ = self._running
        claim = self._claim(job, now_s)
        self._running = None
        self._order.served(claim, synthesis_s)
        job.chars -= len(utterance.text)
        job.waiting_since_s = now_s
        if isinstance(outcome, Sound):
            self.measured(len(utterance.text), synthesis_s)
            self.spoken += 1
            spoken = Spoken(outcome.samples, synthesis_s, outcome.remarks)
            job.spoken.append(spoken)
            self._on_spoken(spoken)
            job.news.set()
        else:
            self._fail(job, outcome)
        if isinstance(outcome, EngineBroken):
            self.broken = outcome
            self._refuse_all("the engine is broken")
        self.go_on()

    def _refuse_all(self, reason: str) -> None:
        self._closed = self._closed or reason
        for job in tuple(self._jobs):
            self._fail(job, Closed(reason, retry_after_s=1))

    # -- on the engine's thread ---------------------------------------------------------------------------

    def _work(self, loop: asyncio.AbstractEventLoop, loaded: asyncio.Future[Engine]) -> None:
        def tell(*what: Any) -> None:
            # The loop closes before a stuck engine returns: then nobody is left to tell.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(*what)

        try:
            engine = self._load()
        except BaseException as error:  # noqa: BLE001 (a thread has nobody above it: it tells the loop)
            tell(_reject, loaded, _told(error, "load"))
            return
        tell(_resolve, loaded, engine)
        while (utterance := self._next(engine)) is not None:
            began_s = time.monotonic()
            outcome = self._outcome(engine, utterance)
            synthesis_s = time.monotonic() - began_s
            self._ask_memory(engine)
            tell(self._finish, outcome, synthesis_s)

    def _next(self, engine: Engine) -> Utterance | None:
        try:
            return self._handed.get(timeout=IDLE_S)
        except Empty:
            with contextlib.suppress(Exception):
                # What fails here fails again at the next utterance, where it can be told to somebody.
                engine.free()
            self._ask_memory(engine)
            return self._handed.get()

    def _ask_memory(self, engine: Engine) -> None:
        try:
            self.memory = engine.memory()
        except Exception:  # noqa: BLE001 (a broken driver may raise anything, and nobody waits for this number)
            self.memory = None

    def _outcome(self, engine: Engine, utterance: Utterance) -> Sound | Exception:
        try:
            return self._speak(engine, utterance)
        except BaseException as error:  # noqa: BLE001 (as above)
            return _told(error, "speak")


def expected_s(chars: int, recent: Sequence[tuple[int, float]]) -> float:
    """Seconds that ``chars`` characters ought to take at the pace of the ``recent`` (characters, seconds)."""
    known_chars = sum(known for known, _ in recent)
    if not known_chars:
        return 1.0
    return chars * sum(seconds for _, seconds in recent) / known_chars


def patience_s(chars: int, recent: Sequence[tuple[int, float]], *, longest_s: float) -> float:
    """Seconds after which an utterance of ``chars`` characters counts as stuck; at most ``longest_s``.

    Until a full set of ``recent`` ones is known, the pace is a guess, and only ``longest_s`` counts.
    """
    if len(recent) < RECENT:
        return longest_s
    return min(longest_s, max(SHORTEST_PATIENCE_S, FAR_BEYOND * expected_s(chars, recent)))


def _told(error: BaseException, verb: str) -> Exception:
    """``error`` itself where it belongs to the engine's words; else an EngineError caused by it."""
    if isinstance(error, EngineError | Refused):
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
