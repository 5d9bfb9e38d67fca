"""S3Gen for many utterances: who has tokens asks, and those who wait are spoken together, the most urgent first."""

import contextlib
import copy
import functools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from chatterbox_server.engine import EngineBroken, EngineError, OutOfMemory
from chatterbox_server.engines.fast.pinned import Fetched
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
            self._changed.notify_all()
        return future

    def no_stream(self, patience_s: float) -> bool:
        """Wait, for no longer, until no stream's chunk is in hand or waits to be; whether that is so."""
        with self._changed:
            return self._changed.wait_for(
                lambda: all(one.take.stream is None for one in (*self._in_hand, *self._waiting)), patience_s
            )

    def close(self) -> None:
        """End the thread; what waits fails."""
        with self._changed:
            self._over = self._over or EngineError("the engine is closed")
            self._changed.notify_all()

    # -- on the thread ------------------------------------------------------------------------------------

    def _work(self) -> None:
        """While one batch ends the next begins, so that the GPU has work while the CPU hands out what is done.

        To begin one takes the CPU as long as the GPU has work, and longer where a shape is new: a stream's chunk, for
        which somebody waits, is handed out before.
        """
        try:
            with self._around(), torch.inference_mode():
                before: _Batch | None = None
                while (batch := self._next(wait=before is None)) or before:
                    if batch is not None:
                        self._begin(batch)
                    if before is not None:
                        self._end(before)
                    # While ``_next`` waits, nothing may hold what a batch held: that is the GPU's memory.
                    before, batch = batch, None
                    if before is not None and before.flowed is not None and not before.streams:
                        # Until then somebody more urgent may come.
                        before.flowed.synchronize()
                    elif before is not None:
                        self._end(before)
                        before = None
        except BaseException as error:  # noqa: BLE001 (a thread has nobody above it: it tells who asked)
            with self._changed:
                self._over = failures.ended(THREAD, error)
        for one in self._in_hand:
            if not one.future.done():
                one.future.set_exception(self._over)
        for one in self._waiting:
            if one.future.set_running_or_notify_cancel():
                one.future.set_exception(self._over)
        with self._changed:
            self._in_hand, self._waiting = [], []
            self._changed.notify_all()

    def _next(self, *, wait: bool) -> "_Batch | None":
        """Whoever is most urgent, with others of like length; ``None``: nobody is there, or all is over."""
        with self._changed:
            while self._over is None:
                self._waiting.sort()
                alike = _alike(self._waiting)
                taken = {one.number for one in alike}
                self._waiting = [one for one in self._waiting if one.number not in taken]
                asked = [one for one in alike if one.future.set_running_or_notify_cancel()]
                if asked:
                    self._in_hand += asked
                    return _Batch(asked)
                # Else those were given up, and others may wait behind them.
                if not self._waiting and not wait:
                    return None
                self._changed.wait_for(lambda: self._waiting or self._over)
            return None

    def _begin(self, batch: "_Batch") -> None:
        try:
            with self._told():
                samples = self._sound.speak([one.take for one in batch.asked])
                # One copy to the host for all of them.
                batch.sounds = functools.partial(_apart, Fetched(torch.cat(samples)), [one.numel() for one in samples])
                batch.flowed = self._sound.flowed
        except EngineBroken:
            raise
        except OutOfMemory as error:
            # Another, that holds no frames: what they hold is the memory that each needs alone.
            batch.error = OutOfMemory(str(error))
        except Exception as error:  # noqa: BLE001 (as above)
            batch.error = error

    def _end(self, batch: "_Batch") -> None:
        for one, outcome in zip(batch.asked, self._outcomes(batch), strict=True):
            if isinstance(outcome, Exception):
                one.future.set_exception(outcome)
            else:
                one.future.set_result(outcome)
        with self._changed:
            self._in_hand = [one for one in self._in_hand if not one.future.done()]
            self._changed.notify_all()

    def _outcomes(self, batch: "_Batch") -> list[NDArray[np.float32] | Exception]:
        """Where a batch failed each is spoken alone, so that nobody suffers for another."""
        if batch.error is None:
            try:
                with self._told():
                    return [*batch.sounds()]
            except EngineBroken:
                raise
            except OutOfMemory as error:
                batch.error = OutOfMemory(str(error))
            except Exception as error:  # noqa: BLE001 (as above)
                batch.error = error
        if len(batch.asked) == 1:
            return [batch.error]
        batch.take_back()
        outcomes = list[NDArray[np.float32] | Exception]()
        for one in batch.asked:
            alone = _Batch([one])
            self._begin(alone)
            outcomes += self._outcomes(alone)
        return outcomes


class _Batch:
    """Who is spoken together, and what has come of it."""

    def __init__(self, asked: list[Waiting]) -> None:
        self.asked = asked
        self.sounds: Callable[[], list[NDArray[np.float32]]] = list
        """Waits for them."""
        self.flowed: Any = None
        """See ``Sound``."""
        self.error: Exception | None = None
        self._streams = [(one.take.stream, copy.copy(one.take.stream)) for one in asked]

    @property
    def streams(self) -> bool:
        return any(one.take.stream is not None for one in self.asked)

    def take_back(self) -> None:
        """As if nothing had been said."""
        for stream, before in self._streams:
            if stream is not None and before is not None:
                for part in fields(stream):
                    setattr(stream, part.name, getattr(before, part.name))


def _alike(waiting: Sequence[Waiting]) -> list[Waiting]:
    """The first, and with it those that ``Sound`` would not speak in a batch of their own: they would make it wait."""
    alike: list[Waiting] = []
    for one in waiting:
        lengths = [one.length, *(other.length for other in alike)]
        if max(lengths) <= UNEVEN * min(lengths) and len(alike) < BATCHES[-1]:
            alike.append(one)
    return alike


def _apart(whole: Fetched, sizes: list[int]) -> list[NDArray[np.float32]]:
    """Each by itself, for who reads slowly would keep everybody's."""
    (samples,) = whole.wait()
    return [part.copy() for part in np.split(samples.numpy(), np.cumsum(sizes)[:-1])]
