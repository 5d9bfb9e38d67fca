"""S3Gen for many utterances: who has tokens asks, and those who wait are spoken together, the most urgent first."""

import contextlib
import copy
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from chatterbox_server.engine import EngineBroken, EngineError
from chatterbox_server.engines.fast.s3gen.sound import BATCHES, UNEVEN, Sound, Take
from chatterbox_server.engines.stock import failures

THREAD: Final = "fast-s3gen"

PATIENCE_S: Final = 1.0
"""For how long one who wants all at once lets streams go before it."""


@dataclass(frozen=True, slots=True, order=True)
class Waiting:
    due_s: float
    """On ``time.monotonic``'s clock: when its listener has nothing left to hear."""
    number: int
    length: int = field(compare=False)
    """Tokens, with those of its voice."""
    take: Take = field(compare=False)
    future: "Future[NDArray[np.float32]]" = field(compare=False)


class Sounding:
    """Of one ``Sound``, on a thread of its own."""

    def __init__(
        self,
        sound: Sound,
        *,
        around: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
        told: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        """``around`` is entered by the thread for good, ``told`` for each batch."""
        self._sound = sound
        self._around, self._told = around, told
        self._changed = threading.Condition()
        self._waiting: list[Waiting] = []
        self._asked = 0
        self._in_hand: list[Waiting] = []
        self._over: EngineError | None = None
        threading.Thread(target=self._work, name=THREAD, daemon=True).start()

    @property
    def broken(self) -> EngineBroken | None:
        """Why the thread is no more, if nobody closed it."""
        return self._over if isinstance(self._over, EngineBroken) else None

    def ask(self, take: Take, *, due_s: float | None = None) -> "Future[NDArray[np.float32]]":
        """The samples of ``take``, wanted at ``due_s`` by ``time.monotonic``; soon, if it is not said.

        Who wants them no more cancels the future.
        """
        future: Future[NDArray[np.float32]] = Future()
        length = take.voice["prompt_token"].shape[-1] + len(take.tokens)
        with self._changed:
            if self._over is not None:
                raise self._over
            self._asked += 1
            due_s = time.monotonic() + PATIENCE_S if due_s is None else due_s
            self._waiting.append(Waiting(due_s, self._asked, length, take, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """End the thread; what waits fails."""
        with self._changed:
            self._over = self._over or EngineError("the engine is closed")
            self._changed.notify()

    # -- on the thread ------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            with self._around(), torch.inference_mode():
                while self._next():
                    for one, outcome in zip(self._in_hand, self._outcomes(self._in_hand), strict=True):
                        if isinstance(outcome, Exception):
                            one.future.set_exception(outcome)
                        else:
                            one.future.set_result(outcome)
                    # While it waits, nothing may hold what the last batch held: that is the GPU's memory.
                    del one, outcome
                    self._in_hand = []
        except BaseException as error:  # noqa: BLE001 (a thread has nobody above it: it tells who asked)
            with self._changed:
                self._over = failures.ended(THREAD, error)
        for one in self._in_hand:
            if not one.future.done():
                one.future.set_exception(self._over)
        for one in self._waiting:
            if one.future.set_running_or_notify_cancel():
                one.future.set_exception(self._over)
        self._in_hand, self._waiting = [], []

    def _outcomes(self, batch: list[Waiting]) -> list[NDArray[np.float32] | Exception]:
        """Together; where that fails each alone, so that nobody suffers for another."""
        streams = [(one.take.stream, copy.copy(one.take.stream)) for one in batch]
        try:
            with self._told():
                return list(self._spoken([one.take for one in batch]))
        except EngineBroken:
            raise
        except Exception as error:  # noqa: BLE001 (as above)
            if len(batch) == 1:
                return [error]
        for stream, before in streams:
            if stream is not None and before is not None:
                for part in fields(stream):
                    setattr(stream, part.name, getattr(before, part.name))
        return [self._outcomes([one])[0] for one in batch]

    def _next(self) -> bool:
        """Take in hand whoever is most urgent, with others of like length; whether all is not over."""
        with self._changed:
            while self._over is None:
                self._waiting.sort()
                first = self._waiting[0].length if self._waiting else 0
                # Others would only make it wait: ``Sound`` would speak them in a batch of their own.
                alike = [one for one in self._waiting if first / UNEVEN <= one.length <= first * UNEVEN][: BATCHES[-1]]
                taken = {one.number for one in alike}
                self._waiting = [one for one in self._waiting if one.number not in taken]
                self._in_hand = [one for one in alike if one.future.set_running_or_notify_cancel()]
                if self._in_hand:
                    return True
                # Else those were given up, and others may wait behind them.
                self._changed.wait_for(lambda: self._waiting or self._over)
            return False

    def _spoken(self, takes: list[Take]) -> list[NDArray[np.float32]]:
        samples = self._sound.speak(takes)
        sizes = [one.numel() for one in samples]
        # One copy to the host for all of them.
        whole = torch.cat(samples).cpu().numpy()
        # Each by itself, for who reads slowly would keep everybody's.
        return [part.copy() for part in np.split(whole, np.cumsum(sizes)[:-1])]
