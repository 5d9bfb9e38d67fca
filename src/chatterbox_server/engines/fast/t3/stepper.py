"""T3's work by ``kernels``, or ``whole``, and ``choosing``: blocks of each, and buffers between. Captures nothing."""

import logging
from typing import Any, Final

import torch
import triton
from torch.nn import functional

from chatterbox_server.engines.fast.t3 import choosing, kernels, whole
from chatterbox_server.engines.fast.t3.slots import CHUNK, Chosen, Slots

log = logging.getLogger(__name__)

FEW: Final = 2
"""Rows up to which each matrix has a kernel of ours; with more, cuBLAS reads it faster."""


class Stepper:
    """For so many slots at once, each with one position, or CHUNK of its prompt."""

    def __init__(
        self,
        slots: Slots,
        batch: int,
        *,
        reads: bool = False,
        early: bool = False,
        few: int = FEW,
        at_once: bool = False,
        bounded: bool = False,
    ) -> None:
        """``reads``: prompts, not steps. ``early``: launched before those in front have ended (Hopper and later).

        ``at_once``: all layers in one launch, where ``whole`` can; ``bounded``: as there.
        """
        backbone, device = slots.backbone, slots.device
        self._of, self._backbone = slots, backbone
        self._batch, self._reads = batch, reads
        self._length = CHUNK if reads else 1
        self._m = m = batch * slots.rows * self._length
        self._few = m <= few and not reads
        self._d, self._hd, self._f = backbone.dim, backbone.head_dim, backbone.layers[0].down.shape[1]
        # Attention's splits: enough programs for the whole GPU.
        self._splits = 1 if reads else max(1, min(8, 512 // (m * backbone.heads)))
        self._share = min(1024, self._f)
        self._parts = self._f // self._share if self._few else 0

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.x, self._next_x = empty(m, self._d), empty(m if self._few else 1, self._d)
        self.rows, self.at = (torch.zeros(m, dtype=torch.int32, device=device) for _ in range(2))
        self._in_parts = empty(max(1, self._parts), m if self._few else 1, self._d)
        self._query = empty(m, self._d)
        self._in_splits = empty(m if self._splits > 1 else 1, self._splits, self._d)
        self._tops, self._sums = (empty(m, backbone.heads, self._splits) for _ in range(2))
        self._arrived = torch.zeros(m, backbone.heads, dtype=torch.int32, device=device)
        self._mixed, self._normed = (empty(m, self._d, dtype=backbone.dtype) for _ in range(2))
        self._raised = empty(m, self._f, dtype=backbone.dtype)
        self.logits = empty(batch, slots.rows, slots.vocabulary)
        self._watches = slots.alignment if not reads else None
        self.scores = empty(batch, len(self._watches.heads) if self._watches else 0, slots.cache.positions)
        self._tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self._ended = torch.zeros(batch, dtype=torch.bool, device=device)
        self.whole = self._at_once(bounded=bounded) if at_once and not reads else None
        """Or, in words, why it cannot."""
        if isinstance(self.whole, str) and batch == 1:
            log.info("fast engine: a step of T3 is many launches: %s", self.whole)
        # Each waits for the one in front of it alone, so all of them have to do it, or none.
        self._early = early and self._few and not isinstance(self.whole, whole.Whole)
        self._launch: dict[str, Any] = {"launch_pdl": True} if self._early else {}

    @property
    def at_once(self) -> bool:
        return isinstance(self.whole, whole.Whole)

    def step(self, slots: torch.Tensor, *, sort: bool) -> Chosen:
        """As ``Slots.step``."""
        of, backbone = self._of, self._backbone
        learned, wpe = of.speech_positions, backbone.positions
        kernels.embed[(self._batch,)](
            self.x, slots, of.last, of.count, of.position, of.speech,
            of.speech if learned is None else learned, of.speech if wpe is None else wpe, self.rows, self.at,
            ROWS=of.rows, D=self._d, LEARNED=learned is not None, GATED=backbone.gated, EARLY=self._early,
            num_warps=4, **self._launch,
        )  # fmt: skip
        if not self._through_all():
            if self._few:
                self._through_few()
            else:
                self._logits_of(self._through_many())
        self._judge(slots)
        if sort:
            alive = ~of.done[slots]
            of.position[slots] += alive
            return of.choose(self.logits, slots, alive, sort=True)
        return self._choose(slots, slots)

    def read(
        self, x: torch.Tensor, slots: torch.Tensor, begins: torch.Tensor, lasts: torch.Tensor, *, sort: bool
    ) -> Chosen:
        """As ``Slots.read``."""
        of, shape = self._of, (self._batch, of_rows := self._of.rows, self._length)
        at = (begins[:, None, None] + torch.arange(self._length, device=x.device)).expand(shape)
        rows = slots[:, None, None] * of_rows + torch.arange(of_rows, device=x.device)[:, None]
        self.at.copy_(at.reshape(-1))
        self.rows.copy_(rows.expand(shape).reshape(-1))
        self.x.copy_(x.reshape(self.x.shape))
        if self._backbone.positions is not None:
            self.x += self._backbone.positions[self.at]
        normed = self._through_many().view(*shape, self._d)
        last = lasts.clamp(min=0)[:, None, None, None].expand(-1, of_rows, 1, self._d)
        self._logits_of(normed.gather(2, last))
        if sort:
            return of.choose(self.logits, slots, lasts >= 0, sort=True)
        return self._choose(slots, lasts)

    def _through_all(self) -> bool:
        """In one launch, where that can be: what the driver refuses it refuses for good."""
        if not isinstance(self.whole, whole.Whole):
            return False
        try:
            self.whole()
        except whole.LaunchRefused as error:
            self.whole = f"one launch for all layers is refused: {error}"
            log.warning("fast engine: a step of T3 is many launches: %s", self.whole)
            return False
        return True

    def _at_once(self, *, bounded: bool) -> whole.Whole | str:
        heads = self._watches.heads if self._watches else ()
        told = {"x": self.x, "rows": self.rows, "at": self.at, "logits": self.logits, "scores": self.scores}
        return whole.of(self._of, bounded=bounded, heads=heads, **told)

    def _through_few(self) -> None:
        backbone = self._backbone
        shape = {"M": self._m, "D": self._d, "EARLY": self._early} | self._launch
        normed = {"EPS": backbone.eps, "GATED": backbone.gated}
        x, next_x, parts = self.x, self._next_x, 0
        for number, layer in enumerate(backbone.layers):
            keys, values = self._of.cache.keys[number], self._of.cache.values[number]
            block = min(8, self._hd // 2)
            kernels.qkv[(3 * self._d // (2 * block),)](
                x, self._in_parts, next_x, layer.qkv, _or(layer.qkv_bias, layer.qkv), *self._angles(),
                self.rows, self.at, self._query, keys, values, keys.stride(0), keys.stride(1),
                HD=self._hd, PARTS=parts, BLOCK=block, BIAS=layer.qkv_bias is not None, num_warps=8,
                **shape, **normed,
            )  # fmt: skip
            if parts:
                x, next_x = next_x, x
            self._watch(number, keys)
            self._attend(keys, values)
            block = min(4, self._d)
            kernels.project[(self._d // block,)](
                x, self._mixed, layer.out, _or(layer.out_bias, layer.out),
                BLOCK=block, BIAS=layer.out_bias is not None, num_warps=8, **shape,
            )  # fmt: skip
            block = min(4, self._f)
            kernels.raise_[(self._f // block,)](
                x, self._raised, layer.up, _or(layer.up_bias, layer.up),
                F=self._f, BLOCK=block, BIAS=layer.up_bias is not None, num_warps=4, **shape, **normed,
            )  # fmt: skip
            block = min(8, self._d)
            kernels.lower[(self._d // block, self._parts)](
                self._raised, self._in_parts, layer.down, _or(layer.down_bias, layer.down),
                F=self._f, SHARE=self._share, BLOCK=block, BIAS=layer.down_bias is not None, num_warps=4,
                **shape,
            )  # fmt: skip
            parts = self._parts
        block = max(8, 8192 // self._d)
        kernels.head[(triton.cdiv(self._of.vocabulary, block),)](
            x, self._in_parts, self.logits, backbone.head, _or(backbone.head_bias, backbone.head),
            V=self._of.vocabulary, PARTS=parts, BLOCK=block, BIAS=backbone.head_bias is not None, num_warps=4,
            **shape, **normed,
        )  # fmt: skip

    def _through_many(self) -> torch.Tensor:
        """Behind the last norm."""
        backbone, add = self._backbone, None
        for number, layer in enumerate(backbone.layers):
            keys, values = self._of.cache.keys[number], self._of.cache.values[number]
            self._add_norm(add)
            kernels.turn[(self._m,)](
                functional.linear(self._normed, layer.qkv, layer.qkv_bias), *self._angles(),
                self.rows, self.at, self._query, keys, values, keys.stride(0), keys.stride(1),
                D=self._d, HD=self._hd, TURNS=backbone.cos is not None, num_warps=4,
            )  # fmt: skip
            if self._reads:
                self._attend_back(keys, values)
            else:
                self._watch(number, keys)
                self._attend(keys, values)
            self._add_norm(functional.linear(self._mixed, layer.out, layer.out_bias))
            raised = functional.linear(self._normed, layer.up, layer.up_bias)
            block = min(1024, self._f)
            kernels.gate[(self._m, self._f // block)](
                raised, self._raised, F=self._f, GATED=backbone.gated, BLOCK=block, num_warps=4
            )
            add = functional.linear(self._raised, layer.down, layer.down_bias)
        self._add_norm(add)
        return self._normed

    def _add_norm(self, add: torch.Tensor | None) -> None:
        kernels.add_norm[(self._m,)](
            self.x, self.x if add is None else add, self._normed,
            D=self._d, ADD=add is not None, EPS=self._backbone.eps, GATED=self._backbone.gated, num_warps=4,
        )  # fmt: skip

    def _attend(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        kernels.attend[(self._m * self._backbone.heads, self._splits)](
            self._query, keys, values, self.rows, self.at, self._mixed,
            self._in_splits, self._tops, self._sums, self._arrived,
            keys.stride(0), keys.stride(1),
            D=self._d, HD=self._hd, SPLITS=self._splits, BLOCK=64, EARLY=self._early, num_warps=4, **self._launch,
        )  # fmt: skip

    def _attend_back(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        block = min(64, self._length)
        kernels.attend_back[(self._m // self._length * self._backbone.heads, self._length // block)](
            self._query, keys, values, self.rows, self.at, self._mixed, keys.stride(0), keys.stride(1),
            LENGTH=self._length, D=self._d, HD=self._hd, BLOCK=block, num_warps=4,
        )  # fmt: skip

    def _watch(self, number: int, keys: torch.Tensor) -> None:
        """The heads of this layer that the alignment wants to hear of."""
        positions = self._of.cache.positions
        for which, (layer, head) in enumerate(self._watches.heads if self._watches else ()):
            if layer == number:
                kernels.watch[(self._batch, triton.cdiv(positions, 64))](
                    self._query, keys, self.rows, self.at, self.scores, which, keys.stride(0), keys.stride(1),
                    HEAD=head, HEADS=self.scores.shape[1], ROWS=self._of.rows, D=self._d, HD=self._hd,
                    POSITIONS=positions, BLOCK=64, EARLY=self._early, num_warps=4, **self._launch,
                )  # fmt: skip

    def _judge(self, slots: torch.Tensor) -> None:
        of, alignment = self._of, self._watches
        if alignment is None:
            return
        positions = of.cache.positions
        choosing.judge[(self._batch,)](
            self.scores, slots, self.at, of.last, of.count, of.done, alignment.begins, alignment.lengths,
            alignment.reached, alignment.complete, alignment.lingered, alignment.again, alignment.before,
            alignment.verdicts, HEADS=self.scores.shape[1], ROWS=of.rows, POSITIONS=positions,
            WIDTH=triton.next_power_of_2(positions), EARLY=self._early, num_warps=8, **self._launch,
        )  # fmt: skip

    def _logits_of(self, normed: torch.Tensor) -> None:
        logits = functional.linear(normed, self._backbone.head, self._backbone.head_bias)
        self.logits.copy_(logits.view(self.logits.shape))

    def _choose(self, slots: torch.Tensor, wanted: torch.Tensor) -> Chosen:
        of, knobs = self._of, self._of.knobs
        choosing.choose[(self._batch,)](
            self.logits, slots, wanted, knobs.seed, knobs.cfg_weight, knobs.temperature, knobs.min_p, knobs.penalty,
            of.seen, of.last, of.count, of.position, of.limit, of.done,
            of.done if of.alignment is None else of.alignment.verdicts, self._tokens, self._ended,
            WATCHED=of.alignment is not None, READ=self._reads, STOP=of.stop, START=of.start, V=of.vocabulary,
            ROWS=of.rows, QUADS=triton.next_power_of_2(triton.cdiv(of.vocabulary, 4)), EARLY=self._early,
            num_warps=16, **self._launch,
        )  # fmt: skip
        return self._tokens, self._ended

    def _angles(self) -> tuple[torch.Tensor, torch.Tensor]:
        backbone = self._backbone
        if backbone.cos is None or backbone.sin is None:
            return self.x, self.x
        return backbone.cos, backbone.sin


def _or(bias: torch.Tensor | None, anything: torch.Tensor) -> torch.Tensor:
    """A kernel wants a tensor, also where it is told not to look at it."""
    return anything if bias is None else bias
