"""Where a stage is worked on: on whichever thread asks, or in a lane of its own."""

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

Work = tuple[Callable[[], Any], "Future[Any]"]


class Lane(Protocol):
    def do(self, work: Callable[[], T]) -> T:
        """What ``work`` returns, or raises; who asks waits for it."""
        ...


class Here:
    """At once, on the thread that asks."""

    def do(self, work: Callable[[], T]) -> T:
        return work()


class Apart:
    """One after another in order of asking, on a thread that lasts as long as this object.

    One thread and not whichever asks: cuDNN's choice of algorithms, cuBLAS' workspace are kept for each.
    """

    def __init__(self, name: str, stream: Any = None) -> None:
        """``stream`` of CUDA, if any, on which the thread works."""
        self._asked: SimpleQueue[Work | None] = SimpleQueue()
        # It must not refer to this object, which would then never be forgotten.
        threading.Thread(target=_work, args=(self._asked, stream), name=name, daemon=True).start()

    def do(self, work: Callable[[], T]) -> T:
        done: Future[T] = Future()
        self._asked.put((work, done))
        try:
            return done.result()
        finally:
            # What it raised knows this frame, and this frame would know what it raised: a cycle that holds memory.
            del done

    def __del__(self) -> None:
        self._asked.put(None)


def _work(asked: "SimpleQueue[Work | None]", stream: Any) -> None:
    with _on(stream):
        while (one := asked.get()) is not None:
            work, done = one
            try:
                done.set_result(work())
            except BaseException as error:  # noqa: BLE001 (a thread has nobody above it: it tells who asked)
                done.set_exception(error)
            # While it waits, nothing may hold what the last work held: that is the GPU's memory.
            del one, work, done


def _on(stream: Any) -> contextlib.AbstractContextManager[Any]:
    if stream is None:
        return contextlib.nullcontext()
    import torch

    on: contextlib.AbstractContextManager[Any] = torch.cuda.stream(stream)
    return on
