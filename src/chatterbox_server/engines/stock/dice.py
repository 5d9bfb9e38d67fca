"""Random numbers that go from stage to stage: those that ``generate`` draws, whoever else draws meanwhile.

``generate`` draws from torch's default generators: T3 first, then S3Gen. Those are the whole process's, and two
utterances at once would take each other's numbers. So only T3's stage draws from them. When it is done it hands their
state over, and S3Gen's stage draws on from generators of its own that begin there.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode

State = Mapping[str, torch.Tensor]
"""Of a generator, by the sort of its device: a second card goes on where the first one stopped."""


def taken(device: str) -> State:
    """As the default generators of the CPU and of ``device`` are now."""
    sort = device.partition(":")[0]
    return {"cpu": torch.get_rng_state()} | ({sort: torch.cuda.get_rng_state(device)} if sort == "cuda" else {})


class Drawing(TorchFunctionMode):  # type: ignore[misc,unused-ignore]
    """Within it this thread goes on from ``state``, and touches no default generator."""

    def __init__(self, state: State, device: str) -> None:
        """``device`` is where the work is done; the package draws some numbers on the CPU all the same."""
        super().__init__()
        devices = {"cpu": "cpu", device.partition(":")[0]: device}
        self._generators = {
            sort: torch.Generator(devices[sort]).set_state(reached)
            for sort, reached in state.items()
            if sort in devices
        }

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LIKE:
            # Not every torch lets these be given a generator; this is what they do (ATen's TensorFactories).
            empty = torch.empty_like(*args, **kwargs)
            return _LIKE[func](empty, generator=self._generators[empty.device.type])
        if func in _DRAWS:
            where = args[0].device if isinstance(args[0], torch.Tensor) else torch.device(kwargs.get("device") or "cpu")
            kwargs = {"generator": self._generators[where.type]} | kwargs
        return func(*args, **kwargs)


_LIKE: Final = {torch.randn_like: torch.Tensor.normal_, torch.rand_like: torch.Tensor.uniform_}

_DRAWS: Final = frozenset(
    {torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, torch.bernoulli, torch.multinomial}
    | {torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.random_, torch.Tensor.exponential_}
    | {torch.Tensor.bernoulli, torch.Tensor.bernoulli_, torch.Tensor.multinomial}
)
"""Of these S3Gen uses ``rand`` and ``randn``; the others are for a release that uses more."""
