"""Functions of tensors of fixed shapes, replayed as CUDA graphs: one launch where there were thousands."""

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Final, Generic, TypeVar

import torch

T = TypeVar("T")

log = logging.getLogger(__name__)

REHEARSALS: Final = 1
"""Times that a function runs before it is recorded: kernels are compiled and chosen, workspaces reserved."""


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """What is float32 is so because it has to be; cuDNN tries what is fastest, for it guesses badly at some sizes."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = False, False, True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


class Recordings:
    """As many as ``kept``, the least recently played forgotten first; all of them share one pool of memory.

    For one thread, and one stream at a time: a recording writes where the one before it did.
    """

    def __init__(self, *, device: str, kept: int, record: bool = True) -> None:
        """Without ``record``, or without CUDA, functions are merely called."""
        self._device = torch.device(device)
        self._record = record and self._device.type == "cuda"
        self._kept_most = kept
        self._kept: OrderedDict[Hashable, Recording[Any]] = OrderedDict()
        self._pool: Any = None
        self._stream: Any = None
        self.refused = 0
        """Functions that could not be recorded, and are called."""

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, key: Hashable, function: Callable[[T], Any], blank: Callable[[], T]) -> "Recording[T]":
        """That of ``function`` under ``key``, made now if need be; ``blank`` makes an input that it can run on."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        made = Recording(function, blank())
        if self._record:
            if self._stream is None:
                self._pool = torch.cuda.graph_pool_handle()
                # One for all of them, for cuBLAS keeps a workspace for each.
                self._stream = torch.cuda.Stream(self._device)
            try:
                made.record(self._pool, self._stream)
            except RuntimeError as error:
                self.refused += 1
                log.warning("cannot record %s as a CUDA graph, and calls it: %s", key, str(error).splitlines()[0])
                made.graph = None
        self._kept[key] = made
        while len(self._kept) > self._kept_most:
            self._kept.popitem(last=False)
        return made


class Recording(Generic[T]):
    """One of them."""

    def __init__(self, function: Callable[[T], Any], inputs: T) -> None:
        self._function = function
        self.inputs = inputs
        """To be written to before each ``play``."""
        self.graph: Any = None
        self._outputs: Any = None

    def record(self, pool: Any, stream: Any) -> None:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), settings():
            for _ in range(REHEARSALS):
                self._function(self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads may be at work on the same card: only what this one does may not disturb the recording.
        with settings(), torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._outputs = self._function(self.inputs)

    def play(self) -> Any:
        """What the function makes of ``inputs``: good until any recording of the pool is played."""
        if self.graph is None:
            with settings():
                return self._function(self.inputs)
        self.graph.replay()
        return self._outputs
