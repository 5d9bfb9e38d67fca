"""From the host to the device and back without a wait.

Between the device and memory that is not pinned, a copy begins with a wait for all that the stream still has to do.
"""

from typing import Any

import torch


def sent(values: torch.Tensor, device: Any) -> torch.Tensor:
    """``values`` on the device; torch keeps pinned memory until it is copied."""
    if values.device.type == "cpu" and torch.device(device).type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


class Fetched:
    """Tensors on their way to the host, as they are now."""

    def __init__(self, *made: torch.Tensor) -> None:
        self._event: Any = None
        if not made[0].is_cuda:
            self._there = [one.clone() for one in made]
            return
        self._there = [torch.empty(one.shape, dtype=one.dtype, pin_memory=True) for one in made]
        for there, one in zip(self._there, made, strict=True):
            there.copy_(one, non_blocking=True)
        # Who waits for it leaves the CPU to others.
        self._event = torch.cuda.Event(blocking=True)
        self._event.record()

    @property
    def there(self) -> bool:
        return self._event is None or bool(self._event.query())

    def wait(self) -> list[torch.Tensor]:
        if self._event is not None:
            self._event.synchronize()
        return self._there
