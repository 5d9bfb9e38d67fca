"""A request's place in the queue: its pieces, what became of them, and what there is to hear. Decides no order."""

import asyncio
import math
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from chatterbox_server.engine import Errand, Failure, Utterance
from chatterbox_server.order import Claim

AHEAD: Final = 2
"""Pieces of a request that may be spoken at once, or wait for a slow reader; the engine goes on with others."""


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
    """One utterance of a request, or the part of it that is ready."""

    samples: NDArray[np.float32]
    synthesis_s: float
    """Of the engine's time; what several have at once is shared evenly."""
    remarks: tuple[Failure, ...]
    given: int = 0
    """Samples of it that were heard before these."""
    last: bool = True
    """Nothing of this utterance comes after it."""


@dataclass(eq=False, slots=True)
class Piece:
    """One utterance that the engine has in hand."""

    job: "Job"
    number: int
    """Of the request's, from 0."""
    utterance: Utterance
    claim: Claim
    """By which it was chosen."""
    errand: Errand
    began_s: float
    shared: float
    """What ``SharedTime`` gave it."""


@dataclass(eq=False, slots=True)
class Job:
    """One request, from its admission until its reader has heard all of it, or is gone."""

    utterances: deque[Utterance]
    """Not begun yet."""
    chars: int
    """Of all utterances that are not spoken yet."""
    client: str
    position: int
    admitted_s: float
    waiting_since_s: float
    listens: bool = False
    """It wants to hear the beginning of an utterance before its end is there."""
    begun_s: float = math.nan
    heard_s: float = -math.inf
    """When its reader last took a sound."""
    begun_count: int = 0
    heard_count: int = 0
    in_hand: list[Piece] = field(default_factory=list)
    ended: dict[int, Spoken | Exception] = field(default_factory=dict)
    """What became of the pieces that nobody has heard of yet, by their number."""
    given: dict[int, deque[NDArray[np.float32]]] = field(default_factory=lambda: defaultdict(deque))
    """Of pieces in hand, what is ready and nobody has heard of yet, by their number."""
    error: Exception | None = None
    """Why nothing more comes of it, whatever its pieces become."""
    news: asyncio.Event = field(default_factory=asyncio.Event)
    expiry: asyncio.TimerHandle | None = None

    @property
    def begun(self) -> bool:
        return not math.isnan(self.begun_s)

    @property
    def wants_the_engine(self) -> bool:
        return bool(self.utterances) and self.error is None and self.begun_count - self.heard_count < AHEAD

    def end(self, number: int, outcome: Spoken | Exception) -> None:
        """A piece is over. Of a failure is told in its turn; what would come behind it is not spoken."""
        if isinstance(outcome, Exception):
            self.utterances.clear()
            for piece in self.in_hand:
                if piece.number > number:
                    piece.errand.drop()
        self.ended[number] = outcome
        self.news.set()

    def give(self, number: int, samples: NDArray[np.float32]) -> None:
        """Part of a piece is ready."""
        self.given[number].append(samples)
        self.news.set()

    def drop(self) -> None:
        """Nobody listens any more."""
        self.utterances.clear()
        for piece in self.in_hand:
            piece.errand.drop()


class Queue(Protocol):
    """What a place asks of the queue that it is in."""

    def go_on(self) -> None: ...

    def leave(self, job: Job) -> None: ...


class Place:
    """A request's place in the queue; leaving it gives the place up, and what is still spoken is dropped."""

    def __init__(self, queue: Queue, job: Job) -> None:
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
        """Each utterance's sound, in order; of one that is given in parts, each as soon as it is there.

        Raises:
            WaitedTooLong, Closed: ask again later.
            Refused, EngineError: what the engine raised; anything else it raises becomes an ``EngineError``.
        """
        job = self._job
        while True:
            while parts := job.given[job.heard_count]:
                job.heard_s = time.monotonic()
                yield Spoken(parts.popleft(), 0.0, (), last=False)
            while not job.given[job.heard_count] and (outcome := job.ended.get(job.heard_count)) is not None:
                if isinstance(outcome, Exception):
                    raise outcome
                if len(job.ended) == AHEAD:
                    # Until now it was its reader who let it wait, not the engine.
                    job.waiting_since_s = time.monotonic()
                del job.ended[job.heard_count]
                del job.given[job.heard_count]
                job.heard_count += 1
                job.heard_s = time.monotonic()
                self._queue.go_on()
                yield outcome
            if job.given[job.heard_count]:
                continue
            if job.error is not None:
                raise job.error
            if not job.utterances and not job.in_hand:
                return
            job.news.clear()
            await job.news.wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.leave(self._job)
