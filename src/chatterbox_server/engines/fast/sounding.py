"""S3Gen for many utterances: who has tokens asks, and all who wait are spoken together. Chooses no shape."""

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from chatterbox_server.engine import EngineError
from chatterbox_server.engines.fast.sound import Sound, Take

TOGETHER: Final = 16
"""Takes of one batch: more of them save little and make the first of them wait."""

Waiting = tuple[bool, int, Take, "Future[NDArray[np.float32]]"]


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
        self._closed = False
        threading.Thread(target=self._work, name="fast-s3gen", daemon=True).start()

    def ask(self, take: Take, *, urgent: bool = False) -> "Future[NDArray[np.float32]]":
        """The samples of ``take``; an ``urgent`` one is before all that are not."""
        future: Future[NDArray[np.float32]] = Future()
        with self._changed:
            if self._closed:
                msg = "the engine is closed"
                raise EngineError(msg)
            self._asked += 1
            self._waiting.append((not urgent, self._asked, take, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    # -- on the thread ------------------------------------------------------------------------------------

    def _work(self) -> None:
        with self._around(), torch.inference_mode():
            while batch := self._next():
                try:
                    with self._told():
                        sounds = self._spoken([take for _, _, take, _ in batch])
                except Exception as error:  # noqa: BLE001 (a thread has nobody above it: it tells who asked)
                    for _, _, _, future in batch:
                        future.set_exception(error)
                    continue
                for (_, _, _, future), samples in zip(batch, sounds, strict=True):
                    future.set_result(samples)

    def _next(self) -> list[Waiting]:
        """Those who wait, urgent ones first, then in order of asking; empty once all is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                for _, _, _, future in self._waiting:
                    future.set_exception(EngineError("the engine is closed"))
                self._waiting.clear()
                return []
            self._waiting.sort(key=lambda one: one[:2])
            batch, self._waiting = self._waiting[:TOGETHER], self._waiting[TOGETHER:]
            return batch

    def _spoken(self, takes: list[Take]) -> list[NDArray[np.float32]]:
        samples = self._sound.speak(takes)
        sizes = [one.numel() for one in samples]
        # One copy to the host for all of them.
        whole = torch.cat(samples).cpu().numpy()
        return np.split(whole, np.cumsum(sizes)[:-1])
