"""What S3Gen's parts are made of, over the package's weights, batched: (batch, time, channels), all of it graph-safe.

No random numbers, no shape that depends on a value, nothing read back from the device.
"""

from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch.nn import functional

Attention = Literal["mask", "flash", "triton"]
"""How padding is kept out of attention: a boolean mask, on CUDA in 16 bits FlashAttention's variable lengths, or ours
(``attention``)."""

Kernels = Literal["torch", "triton"]
"""Whose the steps between products are, and the vocoder's convolutions: torch's, or ours (``tiles``), on CUDA."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer's weights; ``bias`` may be ``None``."""

    weight: Any
    bias: Any

    @classmethod
    def of(cls, module: Any, dtype: Any) -> "Linear":
        """Of ``torch.nn.Linear`` or a convolution of kernel 1."""
        weight = module.weight.detach().flatten(1).to(dtype)
        return cls(weight.contiguous(), None if module.bias is None else module.bias.detach().to(dtype))

    @classmethod
    def stacked(cls, modules: "list[Any]", dtype: Any) -> "Linear":
        """Several over the same input as one product."""
        parts = [cls.of(module, torch.float32) for module in modules]
        biases = [part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in parts]
        bias = None if all(part.bias is None for part in parts) else torch.cat(biases).to(dtype)
        return cls(torch.cat([part.weight for part in parts]).to(dtype).contiguous(), bias)

    @classmethod
    def over_time(cls, convolution: Any, dtype: Any) -> "Linear":
        """A convolution as a product over ``windows`` of its input."""
        weight = convolution.weight.detach().to(dtype).permute(0, 2, 1).flatten(1)
        return cls(weight.contiguous(), convolution.bias.detach().to(dtype))

    def __call__(self, x: Any) -> Any:
        return functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Norm:
    """A layer norm's weights."""

    weight: Any
    bias: Any
    eps: float

    @classmethod
    def of(cls, module: Any, dtype: Any) -> "Norm":
        return cls(module.weight.detach().to(dtype), module.bias.detach().to(dtype), module.eps)

    def __call__(self, x: Any) -> Any:
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def windows(x: Any, before: int, after: int = 0) -> Any:
    """Each position with those around it, oldest first; beyond the ends there is nothing."""
    length = x.shape[1]
    padded = functional.pad(x, (0, 0, before, after))
    return torch.cat([padded[:, shift : shift + length] for shift in range(before + 1 + after)], dim=-1)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of the rows of a batch that is padded to ``width``, in every form that attention asks for."""

    counts: Any
    """(batch,)."""
    valid: Any
    """(batch, width), True where a row is."""
    segments: Any
    """Ends of rows and of the padding after each, cumulated; int32, (2 * batch + 1,). The padding is a sequence of its
    own, so that variable lengths need no packing."""

    @classmethod
    def of(cls, lengths: Any, width: int) -> "Lengths":
        steps = torch.arange(width, device=lengths.device)
        rows = torch.arange(lengths.shape[0] + 1, device=lengths.device) * width
        ends = torch.stack((rows[:-1], rows[:-1] + lengths), dim=1).flatten()
        return cls(lengths, steps < lengths[:, None], torch.cat((ends, rows[-1:])).to(torch.int32))

    def twice(self) -> "Lengths":
        """For the same batch with and without guidance, one after the other."""
        shifted = self.segments[1:] + self.segments[-1]
        return Lengths(
            torch.cat((self.counts, self.counts)),
            torch.cat((self.valid, self.valid)),
            torch.cat((self.segments, shifted)),
        )


def attend(made: Any, heads: int, lengths: Lengths, how: Attention) -> Any:
    """Softmax attention over each row's own positions.

    ``made`` holds queries, keys and values beside each other, (batch, time, 3 * heads * channels); what comes of them
    is (batch, time, heads * channels).
    """
    if how == "triton":
        from chatterbox_server.engines.fast.s3gen import attention

        return attention.attend(made, heads, lengths.counts)
    queries, keys, values = made.unflatten(-1, (3, heads, -1)).unbind(2)
    if how == "flash" and made.is_cuda and made.dtype != torch.float32:
        return _packed(queries, keys, values, lengths).flatten(2)
    across = (queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2))
    attended = functional.scaled_dot_product_attention(*across, attn_mask=lengths.valid[:, None, None, :])
    return attended.transpose(1, 2).flatten(2)


def _packed(queries: Any, keys: Any, values: Any, lengths: Lengths) -> Any:
    """Rows and padding as so many sequences one after another; (batch, time, heads, channels) in and out."""
    batch, width = queries.shape[:2]
    packed = (queries.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1))
    ends = lengths.segments
    attended = torch.ops.aten._flash_attention_forward(  # noqa: SLF001 (the public name came with torch 2.10)
        *packed, ends, ends, width, width, 0.0, False, False
    )[0]
    return attended.unflatten(0, (batch, width))


NEVER: Final = float("-inf")
