"""S3Gen's encoder: speech tokens to two frames each, by the package's weights, rows of different lengths at once."""

import math
from typing import Any

import torch
from torch.nn import functional

from chatterbox_server.engine import EngineError
from chatterbox_server.engines.fast.s3gen.layers import NEVER, Kernels, Linear, Norm, windows


class Encoder:
    """Of the package's ``UpsampleConformerEncoder`` as S3Gen configures it: no convolution module, no macaron."""

    def __init__(self, encoder: Any, *, dtype: Any, device: Any, kernels: Kernels = "torch") -> None:
        """``device`` is where the weights already are."""
        layers = [*encoder.encoders, *encoder.up_encoders]
        if any(layer.conv_module is not None or layer.feed_forward_macaron is not None for layer in layers):
            msg = 'cannot run an encoder with convolution modules or macaron layers: set server.engine = "stock"'
            raise EngineError(msg)
        self._dtype = dtype
        self._ahead = encoder.pre_lookahead_layer.pre_lookahead_len
        self._look, self._settle = (
            Linear.over_time(encoder.pre_lookahead_layer.conv1, dtype),
            Linear.over_time(encoder.pre_lookahead_layer.conv2, dtype),
        )
        self._up = Linear.over_time(encoder.up_layer.conv, dtype)
        self._stride = encoder.up_layer.stride
        self._enter = _Entrance(encoder.embed, dtype, device)
        self._enter_up = _Entrance(encoder.up_embed, dtype, device)
        self._layers = [_Layer(layer, dtype, kernels) for layer in encoder.encoders]
        self._up_layers = [_Layer(layer, dtype, kernels) for layer in encoder.up_encoders]
        self._after = Norm.of(encoder.after_norm, dtype)

    def __call__(self, embedded: Any, lengths: Any) -> Any:
        """(batch, tokens, channels), whatever is beyond ``lengths`` → (batch, 2 * tokens, channels)."""
        width = embedded.shape[1]
        valid = torch.arange(width, device=lengths.device) < lengths[:, None]
        x, positions = self._enter(embedded.to(self._dtype))
        # Looking ahead, a row must see nothing behind its end.
        x = x * valid[..., None]
        ahead = functional.leaky_relu(self._look(windows(x, 0, self._ahead)))
        x = self._settle(windows(ahead, 2)) + x
        for layer in self._layers:
            x = layer(x, positions, lengths)
        x = self._up(windows(x.repeat_interleave(self._stride, dim=1), 2 * self._stride))
        x, positions = self._enter_up(x)
        for layer in self._up_layers:
            x = layer(x, positions, lengths * self._stride)
        return self._after(x)


class _Entrance:
    """Projection, norm, scale, and what relative positions look like."""

    def __init__(self, embed: Any, dtype: Any, device: Any) -> None:
        self._project = Linear.of(embed.out[0], dtype)
        self._norm = Norm.of(embed.out[1], dtype)
        self._scale = embed.pos_enc.xscale
        self._positions = embed.pos_enc.pe[0].to(device=device, dtype=dtype)

    def __call__(self, x: Any) -> tuple[Any, Any]:
        width, middle = x.shape[1], len(self._positions) // 2
        if width > middle + 1:
            msg = f"cannot encode {width} positions: the encoder knows {middle + 1}"
            raise ValueError(msg)
        # One more than there are, so that what is made of them lies well in memory.
        positions = functional.pad(self._positions[middle - width + 1 : middle + width], (0, 0, 0, 1))
        return self._norm(self._project(x)) * self._scale, positions


class _Layer:
    """Attention with relative positions, then a feed-forward, each over its input's norm."""

    def __init__(self, layer: Any, dtype: Any, kernels: Kernels) -> None:
        attention = layer.self_attn
        self._attend = _attend_in_triton if kernels == "triton" else _attend
        self._heads = attention.h
        self._scale = 1 / math.sqrt(attention.d_k)
        self._norm_1, self._norm_2 = Norm.of(layer.norm_mha, dtype), Norm.of(layer.norm_ff, dtype)
        self._into = Linear.stacked([attention.linear_q, attention.linear_k, attention.linear_v], dtype)
        self._places = Linear.of(attention.linear_pos, dtype)
        self._content, self._place = (
            attention.pos_bias_u.detach().to(dtype),
            attention.pos_bias_v.detach().to(dtype),
        )
        self._out = Linear.of(attention.linear_out, dtype)
        self._widen, self._narrow = Linear.of(layer.feed_forward.w_1, dtype), Linear.of(layer.feed_forward.w_2, dtype)
        self._activation = layer.feed_forward.activation

    def __call__(self, x: Any, positions: Any, lengths: Any) -> Any:
        made = self._into(self._norm_1(x))
        queries = made[..., : made.shape[-1] // 3].unflatten(-1, (self._heads, -1))
        places = self._places(positions).unflatten(-1, (self._heads, -1)).permute(1, 2, 0)
        scores = torch.matmul(((queries + self._place) * self._scale).transpose(1, 2), places)
        x = x + self._out(self._attend(made, self._content, scores, lengths))
        return x + self._narrow(self._activation(self._widen(self._norm_2(x))))


def _attend(made: Any, content: Any, scores: Any, lengths: Any) -> Any:
    """Queries, keys and values; what is added to the queries; scores by distance; where rows end."""
    width = made.shape[1]
    queries, keys, values = made.unflatten(-1, (3, *content.shape)).transpose(1, 3).unbind(2)
    inside = torch.arange(width, device=lengths.device) < lengths[:, None]
    # Nothing can come from beyond a row's end.
    bias = torch.zeros_like(inside, dtype=made.dtype).masked_fill(~inside, NEVER)[:, None, None, :]
    attended = functional.scaled_dot_product_attention(
        queries + content[:, None], keys, values, attn_mask=_shifted(scores) + bias
    )
    return attended.transpose(1, 2).flatten(2)


def _attend_in_triton(made: Any, content: Any, scores: Any, lengths: Any) -> Any:
    from chatterbox_server.engines.fast.s3gen import attention

    return attention.attend(made, len(content), lengths, content, scores)


def _shifted(scores: Any) -> Any:
    """(…, width, 2 * width) by distance → (…, width, width) by position: a view, each row begins one earlier."""
    width = scores.shape[-2]
    flat = scores.flatten(-2)[..., width - 1 : width - 1 + width * (2 * width - 1)]
    return flat.unflatten(-1, (width, 2 * width - 1))[..., :width]
