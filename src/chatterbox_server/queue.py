"""Admission, deadlines, cancellation, and whose piece the engine is handed next. Knows no HTTP, starts no thread.

A request is a list of utterances. The engine is handed one whenever it can begin one, and each time ``order`` decides
anew whose it is: a short request slips in between the pieces of a book.
"""

import asyncio
import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from chatterbox_server import crew
from chatterbox_server.engine import Engine, EngineBroken, Errand, GpuMemory, Utterance
from chatterbox_server.forecast import Forecast, SharedTime
from chatterbox_server.order import Claim, Order
from chatterbox_server.place import Closed, Job, Piece, Place, QueueFull, Spoken, WaitedTooLong
from chatterbox_server.speaker import Speak

PATIENT_S: Final = 60.0
"""A listener who has taken nothing for so long has gone away for good, as far as a stop is concerned."""

IDLE_S: Final = 5.0
"""Without work for so long, the engine gives back the memory that it only caches (scripts/gpu/idle_cache.txt)."""

STUCK: Final = "the engine is stuck"
BROKEN: Final = "the engine is broken"


class EngineQueue:
    """All of it lives on the event loop, so nothing here needs a lock."""

    def __init__(
        self,
        load: Callable[[], Engine],
        speak: Speak,
        *,
        order: Order,
        size: int,
        max_wait_s: float,
        longest_utterance_s: float,
        on_spoken: Callable[[Spoken], None] = lambda _: None,
    ) -> None:
        """``on_spoken`` hears of every utterance, also of one that nobody waits for any more."""
        self._crew = crew.Crew(load, speak)
        self._order = order
        self._size = size
        self._max_wait_s = max_wait_s
        self._longest_utterance_s = longest_utterance_s
        self._on_spoken = on_spoken
        self._jobs: list[Job] = []
        self._in_hand: list[Piece] = []
        self._time = SharedTime()
        self._forecast = Forecast()
        self._rest: asyncio.TimerHandle | None = None
        self._engine: Engine | None = None
        self._closed: str | None = None
        self._broken: EngineBroken | None = None
        self.spoken = 0
        """Utterances so far."""

    # -- what others may ask ------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            msg = "the engine is not loaded"
            raise RuntimeError(msg)
        return self._engine

    @property
    def memory(self) -> GpuMemory | None:
        """What the engine held after its last utterance."""
        return self._crew.memory

    @property
    def waiting(self) -> int:
        """Requests that want the engine and do not have it."""
        return sum(job.wants_the_engine and not job.in_hand for job in self._jobs)

    @property
    def running(self) -> int:
        """Utterances that the engine has in hand."""
        return len(self._in_hand)

    @property
    def at_work(self) -> bool:
        """Something is spoken, or will be as soon as a listener who is still there has heard what is."""
        heard_s = time.monotonic() - PATIENT_S
        return bool(self._in_hand) or any(
            job.wants_the_engine or (job.utterances and job.heard_s > heard_s) for job in self._jobs
        )

    @property
    def draining(self) -> bool:
        """Begins nothing more; what was begun goes on."""
        return self._closed is not None

    @property
    def overdue(self) -> bool:
        """The engine is stuck: an utterance takes far longer than its length foretells, or none is worked on."""
        now_s = time.monotonic()
        longest_s = self._longest_utterance_s
        return any(
            piece.errand.worked_s(now_s) > self._forecast.patience_s(len(piece.utterance.text), longest_s=longest_s)
            for piece in self._in_hand
        ) or longest_s < min((piece.errand.idle_s(now_s) for piece in self._in_hand), default=0.0)

    @property
    def broken(self) -> EngineBroken | None:
        """Why the engine will never speak again: as an utterance was told, or as the engine knows by itself."""
        return self._broken or (None if self._engine is None else self._engine.broken)

    @property
    def healthy(self) -> bool:
        """The engine is loaded, its threads run, and it is neither broken nor stuck."""
        return self._crew.complete and self._engine is not None and self.broken is None and not self.overdue

    def retry_after_s(self) -> int:
        """Seconds until the request nearest to its end ought to leave: at least 1, for a header."""
        now_s = time.monotonic()
        ends_s = [self._leaves_s(job, now_s) for job in self._jobs if job.utterances or job.in_hand]
        return max(1, math.ceil(min(ends_s, default=1.0)))

    # -- life ---------------------------------------------------------------------------------------------

    async def start(self) -> Engine:
        """Load the engine on a thread; raises what loading raised."""
        self._engine = await self._crew.start()
        return self._engine

    def drain(self, reason: str = "the server is stopping") -> None:
        """Begin nothing more: hand back whoever was not begun and whoever comes; finish what was begun."""
        self._closed = self._closed or reason
        if self.broken is not None:
            # Nothing that was begun will be finished, either.
            self._refuse_all(BROKEN)
        self.hand_back(self._closed)

    def hand_back(self, reason: str) -> None:
        """Refuse whoever waits to be begun, so that they ask elsewhere."""
        for job in tuple(self._jobs):
            if not job.begun:
                self._fail(job, Closed(reason, retry_after_s=1))

    async def close(self, *, patience_s: float = 1.0) -> None:
        """Refuse everybody, let the threads end; after ``patience_s`` leave them behind."""
        self.drain()
        self._refuse_all(self._closed or "")
        if self._rest is not None:
            self._rest.cancel()
        await self._crew.close(patience_s=patience_s)

    # -- admission ----------------------------------------------------------------------------------------

    def admit(
        self,
        utterances: Sequence[Utterance],
        *,
        client: str = "",
        max_wait_s: float | None = None,
        waited_s: float = 0.0,
        listens: bool = False,
    ) -> Place:
        """A place for a request of one or more ``utterances``, to be entered with ``async with``.

        ``client`` shares the engine fairly with other clients. ``max_wait_s`` may be shorter than the queue's
        own. ``waited_s`` was spent in other queues, and shortens the wait here. One that ``listens`` is given the
        beginning of an utterance before its end is there, by an engine that can.

        Raises:
            QueueFull, Closed: ask again later.
        """
        if self._closed is not None:
            raise Closed(self._closed, retry_after_s=1)
        if self.broken is not None:
            raise Closed(BROKEN, retry_after_s=1)
        if self.overdue:
            raise Closed(STUCK, retry_after_s=1)
        # For a free place nobody waits long, even if the engine begins them one by one.
        waiting, free = self.waiting, self.engine.places - len(self._in_hand)
        if not self._takes_one and waiting >= self._size + free and not self._made_room(client):
            raise self._full(waiting)
        waiting = self.waiting
        now_s = time.monotonic()
        job = Job(
            deque(utterances),
            sum(len(utterance.text) for utterance in utterances),
            client,
            position=waiting + len({id(piece.job) for piece in self._in_hand}),
            admitted_s=now_s,
            waiting_since_s=now_s,
            listens=listens,
        )
        self._jobs.append(job)
        self.go_on()
        if not job.begun:
            longest_s = min(self._max_wait_s, max_wait_s or self._max_wait_s)
            left_s = max(0.0, longest_s - waited_s)
            job.expiry = asyncio.get_running_loop().call_later(left_s, self._expire, job, longest_s)
        return Place(self, job)

    def measured(self, chars: int, *, work_s: float, share_s: float) -> None:
        """What an utterance took, for the next one's estimate."""
        self._forecast.measured(chars, work_s=work_s, share_s=share_s)

    def leave(self, job: Job) -> None:
        """Forget ``job``; what is being spoken for it is dropped as soon as the engine can."""
        if job.expiry is not None:
            job.expiry.cancel()
        job.drop()
        with contextlib.suppress(ValueError):
            self._jobs.remove(job)

    def _made_room(self, client: str) -> bool:
        """Whether whoever holds most places had to give up its newest, because ``client`` holds far fewer.

        Else a client that floods the queue would keep everybody else out, however fairly the engine is shared behind.
        """
        jobs = [job for job in self._jobs if job.wants_the_engine and not job.in_hand]
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

    def _expire(self, job: Job, longest_s: float) -> None:
        reason = f"not begun after {longest_s:g} s of waiting"
        self._fail(job, WaitedTooLong(reason, retry_after_s=self.retry_after_s()))

    def _fail(self, job: Job, error: Exception) -> None:
        job.error = job.error or error
        self.leave(job)
        job.news.set()

    def _refuse_all(self, reason: str) -> None:
        self._closed = self._closed or reason
        for job in tuple(self._jobs):
            self._fail(job, Closed(reason, retry_after_s=1))

    # -- the engine's next, and its last ------------------------------------------------------------------

    @property
    def _takes_one(self) -> bool:
        """The engine could begin an utterance now."""
        free = self._engine is not None and len(self._in_hand) < self._engine.places
        return free and self.broken is None and not any(piece.errand.in_the_way for piece in self._in_hand)

    def go_on(self) -> None:
        """Hand the engine what it can begin, if somebody wants it."""
        while self._takes_one:
            wanting = [job for job in self._jobs if job.wants_the_engine]
            if not wanting:
                return
            now_s = time.monotonic()
            claims = [self._claim(job, now_s) for job in wanting]
            chosen = self._order.choose(claims, now_s)
            self._hand(wanting[chosen], claims[chosen], now_s)

    def _hand(self, job: Job, claim: Claim, now_s: float) -> None:
        if job.expiry is not None:
            job.expiry.cancel()
        if self._rest is not None:
            self._rest.cancel()
        if not job.begun:
            job.begun_s = now_s
        loop = asyncio.get_running_loop()
        number, utterance = job.begun_count, job.utterances.popleft()
        errand = Errand(
            lambda: _tell(loop, self.go_on),
            # What follows is spoken while the first is heard.
            (lambda samples: _tell(loop, job.give, number, samples)) if job.listens and number == 0 else None,
        )
        piece = Piece(job, number, utterance, claim, errand, now_s, self._time.come(now_s))
        job.begun_count += 1
        job.in_hand.append(piece)
        self._in_hand.append(piece)
        self._crew.hand(utterance, errand, lambda end: self._finish(piece, end))

    def _finish(self, piece: Piece, end: crew.End) -> None:
        now_s = time.monotonic()
        job, chars, outcome = piece.job, len(piece.utterance.text), end.outcome
        self._in_hand.remove(piece)
        job.in_hand.remove(piece)
        share_s = self._time.leave(piece.shared, now_s)
        self._order.served(piece.claim, share_s, now_s)
        job.chars -= chars
        job.waiting_since_s = now_s
        if not isinstance(outcome, Exception):
            self.measured(chars, work_s=end.work_s, share_s=share_s)
            self.spoken += 1
            spoken = Spoken(outcome.samples, share_s, outcome.remarks, given=piece.errand.given)
            job.end(piece.number, spoken)
            self._on_spoken(spoken)
        elif isinstance(outcome, EngineBroken):
            self._fail(job, outcome)
            self._broken = self._broken or outcome
            self._refuse_all(BROKEN)
        else:
            job.end(piece.number, outcome)
        self.go_on()
        if not self._in_hand:
            self._rest = asyncio.get_running_loop().call_later(IDLE_S, self._crew.rest)

    # -- estimates ----------------------------------------------------------------------------------------

    def _claim(self, job: Job, now_s: float) -> Claim:
        return Claim(
            client=job.client,
            admitted_s=job.admitted_s,
            # Somebody who is being spoken for does not wait.
            waiting_since_s=now_s if job.in_hand else job.waiting_since_s,
            remaining_s=self._remaining_s(job, now_s),
            begun=job.begun,
            piece_s=self._forecast.share_s(len(job.utterances[0].text)),
        )

    def _remaining_s(self, job: Job, now_s: float) -> float:
        """Of the engine's time."""
        done_s = 0.0
        for piece in job.in_hand:
            chars = len(piece.utterance.text)
            # Its part counts down to nothing, however late it is.
            done = min(1.0, (now_s - piece.began_s) / max(1e-9, self._forecast.work_s(chars)))
            done_s += self._forecast.share_s(chars) * done
        return self._forecast.share_s(job.chars) - done_s

    def _leaves_s(self, job: Job, now_s: float) -> float:
        """From now on, if nobody else came in between; no piece is spoken faster than when it is alone."""
        to_come_s = [self._forecast.work_s(len(utterance.text)) for utterance in job.utterances]
        in_hand_s = [
            self._forecast.work_s(len(piece.utterance.text)) - (now_s - piece.began_s) for piece in job.in_hand
        ]
        return max(self._remaining_s(job, now_s), *to_come_s, *in_hand_s)


def _tell(loop: asyncio.AbstractEventLoop, what: Callable[..., None], *about: Any) -> None:
    # The loop closes before a stuck engine returns: then nobody is left to tell.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(what, *about)
