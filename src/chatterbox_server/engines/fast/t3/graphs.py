"""T3's work in the sizes in which it is done: captured as CUDA graphs where there is a GPU, else done as it comes.

A size is a number of slots that step together, or of prompts that are read together; what is fewer is filled up with
the slot that is nobody's. Results come back behind an event, so that the next work is on its way before the last is
known.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from chatterbox_server.engines.fast.pinned import Fetched, sent
from chatterbox_server.engines.fast.t3.slots import CHUNK, Bite, Chosen, Slots
from chatterbox_server.engines.stock import cards

READERS: Final = (1, 4, 8)
"""Prompts that are read together."""


@dataclass(slots=True)
class Work:
    """Something that was begun: for which slots, and what came of it once ``wait`` is back."""

    slots: tuple[int, ...]
    heard: tuple[bool, ...]
    """Whether that slot's token is one that was chosen now."""
    _chosen: Fetched

    @property
    def there(self) -> bool:
        return self._chosen.there

    def wait(self) -> list[tuple[int, int, bool]]:
        """Slot, token, and whether it was the last, of each slot that chose one."""
        tokens, ended = self._chosen.wait()
        # What was filled up is at the end.
        told = zip(self.slots, self.heard, tokens.tolist(), ended.tolist(), strict=False)
        return [(slot, token, ended) for slot, heard, token, ended in told if heard]


@dataclass(slots=True)
class _Size:
    """Inputs and outputs of one size, which never move, and the graphs that work on them, by whether they sort."""

    inputs: tuple[torch.Tensor, ...]
    work: Callable[[bool], Chosen]
    graphs: dict[bool, tuple[Any, Chosen]] = field(default_factory=dict)
    told: Any = None
    """What the inputs hold now."""
    alone: bool = False
    """Nothing else computes meanwhile."""


class T3:
    """Of some slots. For one thread, and on a GPU for one stream."""

    def __init__(
        self,
        slots: Slots,
        *,
        by_kernels: bool = False,
        early: bool = False,
        at_once: bool = False,
        capture: bool = True,
    ) -> None:
        """``by_kernels``: steps are Triton's, else torch's. ``capture`` is heeded on a GPU alone.

        ``early``, ``at_once``: see ``Stepper``.
        """
        self.slots = slots
        self._on_gpu = slots.device.type == "cuda"
        self._capture = capture and self._on_gpu
        self._pool = torch.cuda.graph_pool_handle() if self._capture else None
        sizes = sorted({min(2**power, slots.slots) for power in range(slots.slots.bit_length() + 1)})
        self._steps = {
            size: self._stepping(size, by_kernels=by_kernels, early=early, at_once=at_once) for size in sizes
        }
        self._reads = {size: self._reading(size, by_kernels=by_kernels) for size in READERS}

    def warm_up(self) -> None:
        """Capture every size, so that nobody waits for it later."""
        for size in (*self._steps.values(), *self._reads.values()):
            for sort in (False, True):
                self._run(size, sort=sort)

    def alone(self, count: int) -> bool:
        """Whether a step for so many takes all of the GPU, beside which nothing else computes."""
        return self._size(count).alone

    def step(self, slots: Sequence[int], *, sort: bool) -> Work:
        """A token more in each of ``slots``, no more than there are."""
        size = self._size(len(slots))
        filled = (*slots, *[self.slots.spare] * (size.inputs[0].numel() - len(slots)))
        if size.told != filled:
            # Last: what fails has told nothing.
            self._tell(size.inputs[0], filled)
            size.told = filled
        return Work(tuple(slots), (True,) * len(slots), Fetched(*self._run(size, sort=sort)))

    def read(self, bites: Sequence[Bite], *, sort: bool) -> Work:
        """Bites of prompts of different slots, no more than the last of ``READERS``."""
        size = self._reads[min(size for size in self._reads if size >= len(bites))]
        x, *rest = size.inputs
        for tensor, numbers in zip(rest, self.slots.fill(x, bites), strict=True):
            self._tell(tensor, numbers)
        heard = tuple(bite.last for bite in bites)
        return Work(tuple(bite.slot for bite in bites), heard, Fetched(*self._run(size, sort=sort)))

    def _size(self, count: int) -> _Size:
        return self._steps[min(size for size in self._steps if size >= count)]

    def _stepping(self, size: int, *, by_kernels: bool, early: bool, at_once: bool) -> _Size:
        slots = torch.full((size,), self.slots.spare, device=self.slots.device)
        if by_kernels:
            from chatterbox_server.engines.fast.t3.stepper import Stepper

            stepper = Stepper(self.slots, size, early=early, at_once=at_once)
            return _Size((slots,), lambda sort: stepper.step(slots, sort=sort), alone=stepper.at_once)
        return _Size((slots,), lambda sort: self.slots.step(slots, sort=sort))

    def _reading(self, size: int, *, by_kernels: bool) -> _Size:
        of = self.slots
        x = torch.zeros(size, of.rows, CHUNK, of.backbone.dim, device=of.device)
        slots = torch.full((size,), of.spare, device=of.device)
        begins, lasts = torch.zeros_like(slots), torch.full_like(slots, -1)
        inputs = (x, slots, begins, lasts)
        if by_kernels:
            from chatterbox_server.engines.fast.t3.stepper import Stepper

            stepper = Stepper(self.slots, size, reads=True)
            return _Size(inputs, lambda sort: stepper.read(*inputs, sort=sort))
        return _Size(inputs, lambda sort: of.read(*inputs, sort=sort))

    def _run(self, size: _Size, *, sort: bool) -> Chosen:
        if not self._capture:
            return size.work(sort)
        if sort not in size.graphs:
            size.graphs[sort] = self._captured(size, sort=sort)
        graph, chosen = size.graphs[sort]
        graph.replay()
        return chosen

    def _captured(self, size: _Size, *, sort: bool) -> tuple[Any, Chosen]:
        # What the inputs hold would be done again and again: the spare slot may.
        held = tuple(tensor.clone() for tensor in size.inputs)
        size.inputs[-3 if len(size.inputs) > 1 else 0].fill_(self.slots.spare)
        stream = torch.cuda.current_stream()
        try:
            for _ in range(2):
                size.work(sort)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with (
                cards.undisturbed,
                torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"),
            ):
                chosen = size.work(sort)
        finally:
            for tensor, before in zip(size.inputs, held, strict=True):
                tensor.copy_(before)
        return graph, chosen

    def _tell(self, tensor: torch.Tensor, numbers: Sequence[int]) -> None:
        tensor.copy_(sent(torch.tensor(numbers), tensor.device))
