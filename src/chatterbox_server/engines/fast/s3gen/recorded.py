"""Functions of tensors of fixed shapes, replayed as CUDA graphs: one launch where there were thousands."""

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, TypeVar

import torch

from chatterbox_server.engines.stock import cards

T = TypeVar("T")

log = logging.getLogger(__name__)


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
        self._kept_most = kept
        self._kept: OrderedDict[Hashable, Recording[Any]] = OrderedDict()
        self._studio = _Studio(self._device) if record and self._device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def refused(self) -> int:
        """Functions that could not be recorded, and are called."""
        return sum(recording.refused for recording in self._kept.values())

    def find(self, key: Hashable, function: Callable[[T], Any], blank: Callable[[], T]) -> "Recording[T]":
        """That of ``function`` under ``key``; ``blank`` makes an input for it, which is kept."""
        if key not in self._kept:
            self._kept[key] = Recording(key, function, blank(), self._studio)
            while len(self._kept) > self._kept_most:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


class _Studio:
    """A stream to record on and the memory that recordings share."""

    def __init__(self, device: Any) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        # One for all of them, for cuBLAS keeps a workspace for each.
        self.stream = torch.cuda.Stream(device)


class Recording(Generic[T]):
    """One of them: called the first time, when kernels are compiled and chosen, and recorded the second.

    So who comes with a shape that nobody came with before waits a few times as long, and nobody for a recording that is
    played once.
    """

    def __init__(self, key: Hashable, function: Callable[[T], Any], inputs: T, studio: _Studio | None) -> None:
        self._key, self._function, self._studio = key, function, studio
        self.inputs = inputs
        """To be written to before each ``play``."""
        self.graph: Any = None
        self.refused = False
        self._called = False
        self._outputs: Any = None

    def play(self) -> Any:
        """What the function makes of ``inputs``: good until any recording of the pool is played."""
        if self.graph is None and self._called and self._studio is not None and not self.refused:
            self._record(self._studio)
        if self.graph is None:
            self._called = True
            with settings():
                return self._function(self.inputs)
        self.graph.replay()
        return self._outputs

    def _record(self, studio: _Studio) -> None:
        graph = torch.cuda.CUDAGraph()
        studio.stream.wait_stream(torch.cuda.current_stream())
        try:
            # Other threads may be at work on the same card: only what this one does may not disturb the recording.
            with (
                cards.undisturbed,
                settings(),
                torch.cuda.graph(graph, pool=studio.pool, stream=studio.stream, capture_error_mode="thread_local"),
            ):
                self._outputs = self._function(self.inputs)
        except RuntimeError as error:
            self.refused = True
            log.warning("cannot record %s as a CUDA graph, and calls it: %s", self._key, str(error).splitlines()[0])
        else:
            self.graph = graph
