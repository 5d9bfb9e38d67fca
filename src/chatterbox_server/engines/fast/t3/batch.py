"""Continuous batching of T3: whoever asks gets a slot between two steps, and leaves it when all is said.

One thread launches; results are heard a few steps later, so that the GPU never waits for them. Knows tokens, no sound.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Final

import torch

from chatterbox_server.engine import LOOK_UP_S, EngineBroken, EngineError, Errand, OutOfMemory, Sampling
from chatterbox_server.engines.fast.t3 import sampling as rules
from chatterbox_server.engines.fast.t3.graphs import READERS, T3, Work
from chatterbox_server.engines.fast.t3.slots import CHUNK, Bite, Prompt
from chatterbox_server.engines.stock import failures

THREAD: Final = "fast-t3"

AHEAD: Final = 3
"""Works that are on their way before the first of them has been heard."""

STEPS_IN_A_ROW: Final = 16
"""Steps that take all of the GPU, before it is left to what else is wanted of it."""
PATIENCE_S: Final = 0.1
"""For how long it is."""
LOOKS_S: Final = 0.002
"""How often somebody is looked for meanwhile who wants T3 more."""

READS_IN_A_ROW: Final = 3
"""Bites of prompts before those who speak already take their next step."""


@dataclass(eq=False)
class Line:
    """One utterance: what is asked of T3, and what it has said so far. Any thread may ask it."""

    prompt: Prompt
    seed: int
    sampling: Sampling
    limit: int
    tokens: list[int] = field(default_factory=list)
    over: bool = False
    """Nothing more comes."""
    error: Exception | None = None
    left: bool = False
    """Nobody listens any more."""
    # Of the thread that launches: its slot, how far its prompt is read, tokens that were launched.
    slot: int = -1
    read: int = 0
    launched: int = 0
    _enough: int = 0
    _news: threading.Event = field(default_factory=threading.Event)

    @property
    def hurried(self) -> bool:
        """Somebody waits for the next tokens, not for all of them."""
        return not self.over and len(self.tokens) < self._enough < self.limit

    def wait(self, errand: Errand, *, enough: int) -> list[int]:
        """All tokens so far, once there are ``enough`` or no more will come.

        Raises:
            Dropped: nobody wants them any more.
            Exception: whatever ended T3's work.
        """
        while True:
            # In this order: whoever tells of news looks at what is enough first.
            self._news.clear()
            self._enough = enough
            if self.over or len(self.tokens) >= enough:
                break
            self._news.wait(LOOK_UP_S)
            errand.check()
        if isinstance(self.error, OutOfMemory):
            # One of its own: what is kept would keep the frames that it is raised through, and they hold memory.
            raise OutOfMemory(str(self.error), freed=self.error.freed)
        if self.error is not None:
            raise self.error
        return list(self.tokens)

    def hear(self, token: int, *, ended: bool) -> None:
        self.tokens.append(token)
        self.over = self.over or ended
        if self.over or len(self.tokens) >= self._enough:
            self._news.set()

    def end(self, error: Exception | None = None) -> None:
        """What is over stays as it is."""
        if not self.over:
            self.error, self.over = error, True
            self._news.set()


class Batch:
    """Of one T3, on a thread of its own."""

    def __init__(
        self,
        t3: T3,
        *,
        by_count: bool,
        around: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
        told: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
        free: Callable[[], None] = lambda: None,
        gone_before: Callable[[float], bool] = lambda _: True,
    ) -> None:
        """``by_count``: top_k is heeded. ``around`` is entered by the thread for good, ``told`` for half a turn.

        ``free`` gives memory back; it is called where that half ran out of it, before anybody is told. ``gone_before``
        waits for others who want the GPU at once, for so many seconds, and says whether there is nobody left.
        """
        self._t3 = t3
        self._gone_before = gone_before
        self._alone = 0
        """Steps that took all of the GPU since others were let go before."""
        self._by_count = by_count
        self._around, self._told, self._free_memory = around, told, free
        self._changed = threading.Condition()
        self._asked: deque[Line] = deque()
        self._over: EngineError | None = None
        self._free = list(reversed(range(t3.slots.slots)))
        self._in_hand: list[Line] = []
        self._on_way: deque[tuple[Work, tuple[Line, ...]]] = deque()
        self._concerned: Sequence[Line] = ()
        """Those whom a failure of what is done now would concern."""
        threading.Thread(target=self._work, name=THREAD, daemon=True).start()

    @property
    def broken(self) -> EngineBroken | None:
        """Why the thread is no more, if nobody closed it."""
        return self._over if isinstance(self._over, EngineBroken) else None

    def ask(self, prompt: Prompt, seed: int, sampling: Sampling, *, limit: int) -> Line:
        """Begin an utterance of at most ``limit`` tokens, the one that ends it among them."""
        line = Line(prompt, seed, sampling, limit)
        with self._changed:
            if self._over is not None:
                raise self._over
            self._asked.append(line)
            self._changed.notify()
        return line

    def leave(self, line: Line) -> None:
        """Nobody listens to ``line`` any more; its slot is given to another."""
        line.left = True
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """End the thread; what is in hand fails."""
        with self._changed:
            self._over = self._over or EngineError("the engine is closed")
            self._changed.notify()

    # -- on the thread ------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            with self._around(), torch.inference_mode():
                while self._wait():
                    # By themselves: while no prompt can be read, whoever speaks goes on.
                    self._tell(self._failure(self._read_on))
                    self._tell(self._failure(self._speak_on))
        except BaseException as error:  # noqa: BLE001 (a thread has nobody above it: it tells who waits)
            with self._changed:
                self._over = failures.ended(THREAD, error)
        for line in (*self._in_hand, *self._asked):
            line.end(self._over)

    def _wait(self) -> bool:
        """Until there is something to do; whether there ever will be."""
        with self._changed:
            self._changed.wait_for(lambda: self._asked or self._in_hand or self._on_way or self._over)
            return self._over is None

    def _failure(self, half: Callable[[], None]) -> Exception | None:
        """Of that ``half`` of a turn."""
        try:
            with self._told():
                half()
        except EngineBroken:
            raise
        except OutOfMemory as error:
            # Another, that holds no frames: what they hold is the memory that has to come back.
            return OutOfMemory(str(error), freed=True)
        except Exception as error:  # noqa: BLE001 (as above)
            return error
        return None

    def _read_on(self) -> None:
        """Slots change hands, and prompts are read."""
        self._let_go()
        self._let_in()
        for _ in range(READS_IN_A_ROW):
            reading = [line for line in self._in_hand if line.read < line.prompt.length][: READERS[-1]]
            if not reading:
                break
            self._read(reading)

    def _speak_on(self) -> None:
        """Whoever speaks takes a step, and what is there is heard."""
        self._let_go_before()
        speaking = [line for line in self._in_hand if line.launched and line.launched < line.limit and not line.over]
        if speaking:
            self._concerned = speaking
            work = self._t3.step([line.slot for line in speaking], sort=self._sorts(speaking))
            for line in speaking:
                line.launched += 1
            self._on_way.append((work, tuple(speaking)))
        # With nothing to launch, what is on its way is all there is to wait for.
        self._hear_but(AHEAD if speaking else 0)

    def _let_go_before(self) -> None:
        """Others who want the GPU, once a few steps have taken all of it, unless somebody waits for the next."""
        if not self._in_hand or not self._t3.alone(len(self._in_hand)):
            self._alone = 0
            return
        self._alone += 1
        if self._alone <= STEPS_IN_A_ROW or self._hurried or self._gone_before(0):
            return
        # What is known by then may be what somebody waited for, who now waits for more.
        self._hear_but(0)
        until_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < until_s and not self._hurried and not self._asked:
            if self._gone_before(LOOKS_S):
                break
        self._alone = 0

    @property
    def _hurried(self) -> bool:
        return any(line.hurried for line in self._in_hand)

    def _hear_but(self, most: int) -> None:
        """What is there, and what is not until no more than so many are on their way."""
        while self._on_way:
            work, self._concerned = self._on_way[0]
            if len(self._on_way) <= most and not work.there:
                break
            self._hear(*self._on_way.popleft())

    def _let_in(self) -> None:
        newcomers: list[Line] = []
        with self._changed:
            while self._free and self._asked:
                line = self._asked.popleft()
                if not line.left:
                    line.slot = self._free.pop()
                    newcomers.append(line)
        if newcomers:
            self._concerned = newcomers
            self._in_hand += newcomers
            self._t3.slots.begin([(line.slot, line.prompt, line.seed, line.sampling, line.limit) for line in newcomers])

    def _let_go(self) -> None:
        """Slots of those who are done, or whom nobody listens to. What is on its way for them does no harm."""
        left = [line for line in self._in_hand if line.left and not line.over]
        if left:
            self._concerned = left
            self._t3.slots.end([line.slot for line in left])
        for line in left:
            line.end()
        for line in [line for line in self._in_hand if line.over]:
            self._in_hand.remove(line)
            self._free.append(line.slot)

    def _read(self, reading: Sequence[Line]) -> None:
        self._concerned = reading
        bites = [Bite(line.slot, line.prompt, line.read) for line in reading]
        work = self._t3.read(bites, sort=self._sorts(reading))
        for line in reading:
            line.read += CHUNK
            line.launched = int(line.read >= line.prompt.length)
        self._on_way.append((work, tuple(reading)))

    def _sorts(self, lines: Sequence[Line]) -> bool:
        return any(rules.sorts(line.sampling, by_count=self._by_count) for line in lines)

    def _hear(self, work: Work, lines: Sequence[Line]) -> None:
        by_slot = {line.slot: line for line in lines}
        for slot, token, ended in work.wait():
            # A slot says its last token again until its owner has heard that it was the last.
            if not by_slot[slot].over:
                by_slot[slot].hear(token, ended=ended)

    def _tell(self, failure: Exception | None) -> None:
        """Whom a ``failure`` concerns; the others go on, and those who come are served."""
        if isinstance(failure, OutOfMemory):
            # Once for all of them, and before the first asks again.
            with contextlib.suppress(Exception):
                self._free_memory()
        if failure is not None:
            for line in self._concerned:
                line.end(failure)
            self._on_way = deque((work, lines) for work, lines in self._on_way if not all(line.over for line in lines))
        self._concerned = ()
