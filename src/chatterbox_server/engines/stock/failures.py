"""What torch raises, in the engine's words: what ends an utterance is told from what ends the process."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Final

from chatterbox_server.engine import Dropped, EngineBroken, EngineError, OutOfMemory, Refused
from chatterbox_server.engines.stock import cards

FATAL: Final = (
    "CUBLAS_STATUS",
    "CUDNN_STATUS",
    "CUFFT",
    "device-side assert",
    "illegal memory access",
    "unspecified launch",
)
"""Words of errors after which no later call can be trusted, wherever they were noticed."""

NO_MEMORY: Final = ("STATUS_ALLOC_FAILED", "CUDA error: out of memory", "Triton Error [CUDA]: out of memory")
"""What cuBLAS and cuDNN, CUDA (a graph, pinned memory) and Triton call what torch has an exception of its own for."""


@contextlib.contextmanager
def told(used: Sequence[str]) -> Iterator[None]:
    """Around work on the cards in ``used``, none for work on the CPU alone.

    Raises:
        OutOfMemory, EngineBroken: for what was raised; anything else passes as it is, the engine's own words too.
    """
    import torch

    try:
        yield
    except (EngineError, Refused, Dropped):
        raise
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in NO_MEMORY):
            msg = f"the GPU is out of memory: {one_line(error)}"
            raise OutOfMemory(msg) from error
        check(used, error)
        raise


def check(used: Sequence[str], error: Exception) -> None:
    """Whether the cards in use still work after ``error``: a device-side assert fails every later call, too.

    cuBLAS and cuDNN may fail for good (a lost handle) while the context lives: those are known by their words.

    Raises:
        EngineBroken: they do not.
    """
    import torch

    try:
        for card in used:
            with cards.undisturbed:
                torch.cuda.synchronize(card)
    except RuntimeError:
        raise EngineBroken(one_line(error)) from error
    if used and any(fatal in str(error) for fatal in FATAL):
        raise EngineBroken(one_line(error)) from error


def ended(thread: str, error: BaseException) -> EngineBroken:
    """What to tell when an engine's own ``thread`` ends of ``error``: only a new process has it again."""
    if isinstance(error, EngineBroken):
        return error
    broken = EngineBroken(f"thread {thread} has ended: {one_line(error)}")
    broken.__cause__ = error
    return broken


def of_the_gpu(error: Exception) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in ("CUDA", *FATAL))


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
