"""T3's backbone, Llama or GPT-2, over a cache of keys and values that never moves. Plain torch; owns no cache.

The weights are the package's own, in another order: the three projections of attention in one matrix, the two of the
gated unit in one, and a norm's gain multiplied into the matrix that follows it. ``kernels`` beside this does the same
arithmetic for one position a row, in fewer launches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Layer:
    """Matrices are (out, in), as ``functional.linear`` takes them."""

    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    out: torch.Tensor
    out_bias: torch.Tensor | None
    up: torch.Tensor
    """Gated: the gate's rows, then those of what it lets through."""
    up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Cache:
    """Keys and values, each ``(layers, rows, heads, positions, head_dim)``."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def positions(self) -> int:
        return int(self.keys.shape[3])


Look = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Of a layer: its number; queries, ``(rows, heads, length, head_dim)``; keys of the whole cache; what each row sees."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """Everything between T3's embeddings and its logits."""

    layers: tuple[Layer, ...]
    head: torch.Tensor
    """To logits, the last norm's gain in it; ``(tokens, dim)``."""
    head_bias: torch.Tensor | None
    heads: int
    head_dim: int
    eps: float
    gated: bool
    """Llama: no mean is taken off in a norm, SiLU gates, positions turn; else GPT-2."""
    cos: torch.Tensor | None
    sin: torch.Tensor | None
    """``(positions, head_dim)``, float32."""
    positions: torch.Tensor | None
    """GPT-2's embedding of positions, float32."""

    @property
    def dtype(self) -> torch.dtype:
        return self.head.dtype

    @property
    def dim(self) -> int:
        return int(self.head.shape[1])

    def cache(self, rows: int, positions: int) -> Cache:
        shape = (len(self.layers), rows, self.heads, positions, self.head_dim)
        # Zeros, for what is masked is still multiplied, and not every bit pattern is a number.
        keys, values = (torch.zeros(shape, dtype=self.dtype, device=self.head.device) for _ in range(2))
        return Cache(keys, values)

    def forward(
        self,
        x: torch.Tensor,
        cache: Cache,
        rows: torch.Tensor,
        begins: torch.Tensor,
        reach: int | None = None,
        *,
        look: Look | None = None,
    ) -> torch.Tensor:
        """Hidden states behind the last norm (less its gain) of ``x``, ``(rows, length, dim)`` in float32.

        ``rows`` are the cache's; ``begins`` is each one's first position here, whose keys and values are written.
        ``reach``: no row's position lies beyond it; a smaller one is less work. ``look`` is told of each layer's
        attention.
        """
        length = x.shape[1]
        reach = reach or cache.positions
        at = begins[:, None] + torch.arange(length, device=x.device)
        if self.positions is not None:
            x = x + self.positions[at]
        # A position sees itself and whatever is before it; of a row's cache the rest is of others.
        seen = torch.arange(reach, device=x.device) <= at[:, None, :, None]
        for number, layer in enumerate(self.layers):
            normed = self._norm(x).to(self.dtype)
            query, key, value = (
                functional.linear(normed, layer.qkv, layer.qkv_bias)
                .unflatten(-1, (3, self.heads, self.head_dim))
                .permute(2, 0, 3, 1, 4)
            )
            if self.cos is not None and self.sin is not None:
                query, key = (_turned(one, self.cos[at], self.sin[at]) for one in (query, key))
            keys, values = cache.keys[number], cache.values[number]
            keys[rows[:, None], :, at] = key.transpose(1, 2)
            values[rows[:, None], :, at] = value.transpose(1, 2)
            if look is not None:
                look(number, query, keys[:, :, :reach], seen)
            mixed = functional.scaled_dot_product_attention(
                query, keys[rows, :, :reach], values[rows, :, :reach], attn_mask=seen
            )
            mixed = mixed.transpose(1, 2).flatten(2)
            x = x + functional.linear(mixed, layer.out, layer.out_bias)
            raised = functional.linear(self._norm(x).to(self.dtype), layer.up, layer.up_bias)
            if self.gated:
                gate, through = raised.chunk(2, dim=-1)
                raised = functional.silu(gate) * through
            else:
                raised = functional.gelu(raised, approximate="tanh")
            x = x + functional.linear(raised, layer.down, layer.down_bias)
        return self._norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """In float32, of ``(…, dim)``."""
        return functional.linear(hidden.to(self.dtype), self.head, self.head_bias).float()

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        if not self.gated:
            return functional.layer_norm(x, x.shape[-1:], eps=self.eps)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """By each position's angle: ``x`` is (rows, heads, length, head_dim), the others are without heads."""
    left, right = x.float().chunk(2, dim=-1)
    turned = x.float() * cos[:, None] + torch.cat((-right, left), dim=-1) * sin[:, None]
    return turned.to(x.dtype)


def of(t3: Any, *, dtype: torch.dtype, positions: int) -> Backbone:
    """The backbone of the package's ``T3``, in ``dtype``, for up to so many positions."""
    backbone = t3.tfmr
    device = t3.speech_head.weight.device
    if t3.is_gpt:
        layers = tuple(_of_gpt2(layer, dtype) for layer in backbone.h)
        return Backbone(
            layers=layers,
            **_folded_head(t3.speech_head, backbone.ln_f, dtype),
            heads=backbone.config.n_head,
            head_dim=backbone.config.n_embd // backbone.config.n_head,
            eps=backbone.config.layer_norm_epsilon,
            gated=False,
            cos=None,
            sin=None,
            positions=backbone.wpe.weight[:positions].detach().float(),
        )
    config = backbone.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    at = torch.arange(positions, device=device)[None]
    cos, sin = backbone.rotary_emb(torch.zeros((), device=device), at)
    return Backbone(
        layers=tuple(_of_llama(layer, dtype) for layer in backbone.layers),
        **_folded_head(t3.speech_head, backbone.norm, dtype),
        heads=config.num_attention_heads,
        head_dim=head_dim,
        eps=config.rms_norm_eps,
        gated=True,
        cos=cos[0].float().contiguous(),
        sin=sin[0].float().contiguous(),
        positions=None,
    )


def _of_llama(layer: Any, dtype: torch.dtype) -> Layer:
    attention, gated = layer.self_attn, layer.mlp
    qkv = torch.cat([one.weight for one in (attention.q_proj, attention.k_proj, attention.v_proj)])
    up = torch.cat((gated.gate_proj.weight, gated.up_proj.weight))
    return Layer(
        *_folded(qkv, None, layer.input_layernorm, dtype),
        *_plain(attention.o_proj.weight, None, dtype),
        *_folded(up, None, layer.post_attention_layernorm, dtype),
        *_plain(gated.down_proj.weight, None, dtype),
    )


def _of_gpt2(layer: Any, dtype: torch.dtype) -> Layer:
    # Its Conv1D keeps weights as (in, out).
    attention, raised = layer.attn, layer.mlp
    return Layer(
        *_folded(attention.c_attn.weight.T, attention.c_attn.bias, layer.ln_1, dtype),
        *_plain(attention.c_proj.weight.T, attention.c_proj.bias, dtype),
        *_folded(raised.c_fc.weight.T, raised.c_fc.bias, layer.ln_2, dtype),
        *_plain(raised.c_proj.weight.T, raised.c_proj.bias, dtype),
    )


def _folded_head(head: Any, norm: Any, dtype: torch.dtype) -> dict[str, Any]:
    weight, bias = _folded(head.weight, head.bias, norm, dtype)
    return {"head": weight, "head_bias": bias}


def _folded(
    weight: torch.Tensor, bias: torch.Tensor | None, norm: Any, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """W (g x + b) + c = (W g) x + (W b + c)."""
    shift = getattr(norm, "bias", None)
    if shift is not None:
        bias = weight @ shift if bias is None else bias + weight @ shift
    return _plain(weight * norm.weight, bias, dtype)


def _plain(
    weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    kept = None if bias is None else bias.detach().to(dtype)
    return weight.detach().to(dtype).contiguous(), kept
