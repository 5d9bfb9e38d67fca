"""What torch says of the GPUs that an engine uses, and what it gives back to them."""

import gc
import threading
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Final

from chatterbox_server.engine import GpuMemory

undisturbed: Final = threading.RLock()
"""Held while a CUDA graph is recorded, and while a whole card is waited for or its cache emptied: CUDA and torch fail
the one for the other, on whichever threads and streams they are."""


def memory(cards: Sequence[str]) -> GpuMemory | None:
    """Of all ``cards`` together; ``None`` without any, or with a context that is poisoned."""
    import torch

    if not cards:
        return None
    try:
        free_and_total = [torch.cuda.mem_get_info(card) for card in cards]
    except RuntimeError:
        # The utterance that did it will say so.
        return None
    return GpuMemory(
        allocated_bytes=sum(torch.cuda.memory_allocated(card) for card in cards),
        reserved_bytes=sum(torch.cuda.memory_reserved(card) for card in cards),
        free_bytes=sum(free for free, _ in free_and_total),
        total_bytes=sum(total for _, total in free_and_total),
    )


def let_go(cards: Sequence[str]) -> None:
    """Of what is cached; and of the cycles that an exception leaves, whose frames hold tensors."""
    import torch

    gc.collect()
    if cards:
        with undisturbed:
            torch.cuda.empty_cache()


def facts(cards: Sequence[str]) -> Mapping[str, object]:
    """Read back from torch, not from what it was told."""
    import torch

    return {
        "gpus": [torch.cuda.get_device_name(card) for card in cards],
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "chatterbox_tts": metadata.version("chatterbox-tts"),
    }
