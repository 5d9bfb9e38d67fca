"""What torch would do to a row of channels in several kernels, each of which reads and writes it anew: Triton in one.

Products stay with cuBLAS, which was faster than ours at these sizes. Convolutions over many rows are ours: of the
vocoder, for cuDNN's took nearly three times as long, and of the flow, whose windows cuBLAS wants side by side in memory
(scripts/gpu/NOTES.md). Sums are float32. What these compute ``flow`` and ``vocoder`` compute in torch too, and
tests/server/test_fast_tiles.py compares them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn import functional

# ruff: noqa: PLR0917 (kernels take pointers and numbers, untyped and many)
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,unused-ignore"

# Numbers are not specialised (to multiples of 16, to 1): each of their sorts would be compiled anew.

AT_ONCE = 8
"""Rows of a program that has no product."""
MANY_ROWS = 8192
"""From which on a convolution is one kernel of ours; with fewer, cuBLAS's product and two kernels around it win."""


# -- the flow's ------------------------------------------------------------------------------------------------


@triton.jit
def _normed(x, weight_at, bias_at, eps, channels: tl.constexpr):
    channel = tl.arange(0, channels)
    x = x - (tl.sum(x, axis=1) / channels)[:, None]
    scale = 1 / tl.sqrt(tl.sum(x * x, axis=1) / channels + eps)
    weight, bias = tl.load(weight_at + channel).to(tl.float32), tl.load(bias_at + channel).to(tl.float32)
    return x * scale[:, None] * weight[None, :] + bias[None, :]


@triton.jit(do_not_specialize=["rows"])
def _norm(
    x_at,
    more_at,
    out_at,
    weight_at,
    bias_at,
    rows,
    eps,
    channels: tl.constexpr,
    at_once: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * at_once + tl.arange(0, at_once)
    channel = tl.arange(0, channels)
    inside = (row < rows)[:, None]
    at = row[:, None] * channels + channel[None, :]
    x = tl.load(x_at + at, mask=inside, other=0.0).to(tl.float32) + tl.load(more_at + channel).to(tl.float32)[None, :]
    normed = _normed(x, weight_at, bias_at, eps, channels)
    tl.store(out_at + at, normed.to(out_at.dtype.element_ty), mask=inside)


@triton.jit
def _mish(x):
    # x * tanh(log(1 + exp(x))), without the logarithm.
    grown = tl.exp(tl.minimum(x, 20.0))
    grown = grown * (grown + 2)
    return x * (grown / (grown + 2))


@triton.jit(do_not_specialize=["rows"])
def _norm_mish(
    x_at,
    added_at,
    out_at,
    weight_at,
    bias_at,
    rows,
    eps,
    channels: tl.constexpr,
    for_all: tl.constexpr,
    at_once: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * at_once + tl.arange(0, at_once)
    channel = tl.arange(0, channels)
    inside = (row < rows)[:, None]
    at = row[:, None] * channels + channel[None, :]
    normed = _normed(tl.load(x_at + at, mask=inside, other=0.0).to(tl.float32), weight_at, bias_at, eps, channels)
    out = _mish(normed)
    if for_all:
        out += tl.load(added_at + channel).to(tl.float32)[None, :]
    else:
        out += tl.load(added_at + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_at + at, out.to(out_at.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "width"])
def _windows(x_at, out_at, rows, width, channels: tl.constexpr, block: tl.constexpr, at_once: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * at_once + tl.arange(0, at_once)
    channel = tl.arange(0, block)
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    for tap in tl.static_range(3):
        heard = inside & (row % width >= 2 - tap)[:, None]
        x = tl.load(x_at + (row - (2 - tap))[:, None] * channels + channel[None, :], mask=heard, other=0.0)
        tl.store(out_at + row[:, None] * (3 * channels) + tap * channels + channel[None, :], x, mask=inside)


@triton.jit(do_not_specialize=["rows", "width"])
def _convolved(
    x_at,
    taps_at,
    taps_bias_at,
    added_at,
    out_at,
    weight_at,
    bias_at,
    rows,
    width,
    eps,
    inputs: tl.constexpr,
    channels: tl.constexpr,
    for_all: tl.constexpr,
    block_m: tl.constexpr,
    block_k: tl.constexpr,
):
    row = tl.program_id(0) * block_m + tl.arange(0, block_m)
    channel = tl.arange(0, channels)
    inside = row < rows
    step, at = row % width, row.to(tl.int64)
    each: tl.constexpr = inputs // block_k
    sums = tl.zeros((block_m, channels), tl.float32)
    for turn in range(3 * each):
        tap = turn // each
        some = (turn % each) * block_k + tl.arange(0, block_k)
        heard = inside & (step + tap >= 2)
        x = tl.load(x_at + (at + tap - 2)[:, None] * inputs + some[None, :], mask=heard[:, None], other=0.0)
        taps = tl.load(taps_at + channel[None, :] * (3 * inputs) + (tap * inputs + some)[:, None])
        sums = tl.dot(x, taps, sums, input_precision="ieee")
    sums += tl.load(taps_bias_at + channel).to(tl.float32)[None, :]
    out = _mish(_normed(sums, weight_at, bias_at, eps, channels))
    where = at[:, None] * channels + channel[None, :]
    if for_all:
        out += tl.load(added_at + channel).to(tl.float32)[None, :]
    else:
        out += tl.load(added_at + where, mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(out_at + where, out.to(out_at.dtype.element_ty), mask=inside[:, None])


def norm(x: Any, norm: tuple[Any, ...], more: Any) -> Any:
    """torch's ``layer_norm`` of ``x + more``, the same (channels,) for all; ``norm`` is weight, bias, eps."""
    out, rows = torch.empty_like(x), x.shape[:-1].numel()
    weight, bias, eps = norm
    _norm[(triton.cdiv(rows, AT_ONCE),)](x, more, out, weight, bias, rows, eps, channels=x.shape[-1], at_once=AT_ONCE)
    return out


def norm_mish(x: Any, norm: tuple[Any, ...], added: Any) -> Any:
    """Mish of the norm of ``x``, plus ``added``: of one row for all, or of as many as ``x``."""
    out, rows = torch.empty_like(x), x.shape[:-1].numel()
    weight, bias, eps = norm
    _norm_mish[(triton.cdiv(rows, AT_ONCE),)](
        x, added, out, weight, bias, rows, eps, channels=x.shape[-1], for_all=added.dim() == 1, at_once=AT_ONCE
    )
    return out


def convolution(x: Any, first: tuple[Any, Any], norm: tuple[Any, ...], added: Any) -> Any:
    """``norm_mish`` of a product with ``windows(x)``; ``first`` is its weight and bias."""
    batch, width, inputs = x.shape
    rows = batch * width
    if rows < MANY_ROWS or inputs % 64:
        return norm_mish(functional.linear(windows(x), *first), norm, added)
    (taps, taps_bias), (weight, bias, eps) = first, norm
    out = x.new_empty((batch, width, len(taps)))
    _convolved[(triton.cdiv(rows, 64),)](
        x, taps, taps_bias, added, out, weight, bias, rows, width, eps,
        inputs=inputs, channels=len(taps), for_all=added.dim() == 1, block_m=64, block_k=64, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


def windows(x: Any) -> Any:
    """Each frame of (batch, width, channels) after the two before it, as ``layers.windows(x, 2)``."""
    batch, width, channels = x.shape
    out, rows = x.new_empty((batch, width, 3 * channels)), batch * width
    _windows[(triton.cdiv(rows, AT_ONCE),)](
        x, out, rows, width, channels=channels, block=triton.next_power_of_2(channels), at_once=AT_ONCE
    )
    return out


# -- the vocoder's ---------------------------------------------------------------------------------------------


@triton.jit
def _snake(x, alpha, inverse):
    # sin²(y) has a period of π: within half of one either side of nothing five terms are exact to 4e-6, and CUDA's own
    # sine brings a path for large numbers that spills registers.
    turns = x * alpha * 0.3183098861837907
    turns -= tl.floor(turns + 0.5)
    square = turns * turns
    sine = 0.0821458866 * square - 0.599264529
    sine = sine * square + 2.55016404
    sine = sine * square - 5.16771278
    sine = (sine * square + 3.14159265) * turns
    return x + inverse * sine * sine


@triton.jit(do_not_specialize=["rows", "width", "taps", "dilation"])
def _around(
    x_at,
    beside_at,
    summed_at,
    result_at,
    bent_at,
    weight_at,
    bias_at,
    alpha_at,
    inverse_at,
    counts_at,
    rows,
    width,
    taps,
    dilation,
    channels: tl.constexpr,
    has_beside: tl.constexpr,
    has_summed: tl.constexpr,
    has_result: tl.constexpr,
    has_bent: tl.constexpr,
    block_m: tl.constexpr,
    block_k: tl.constexpr,
):
    row = tl.program_id(0) * block_m + tl.arange(0, block_m)
    channel = tl.arange(0, channels)
    inside = row < rows
    step = row % width
    at = row.to(tl.int64)
    kind = x_at.dtype.element_ty
    sums = tl.zeros((block_m, channels), dtype=tl.float32)
    for turn in range(taps * (channels // block_k)):
        tap = turn // (channels // block_k)
        some = (turn % (channels // block_k)) * block_k + tl.arange(0, block_k)
        shift = (tap - taps // 2) * dilation
        heard = inside & (step + shift >= 0) & (step + shift < width)
        x = tl.load(x_at + (at + shift)[:, None] * channels + some[None, :], mask=heard[:, None], other=0.0)
        weight = tl.load(weight_at + tap * channels * channels + channel[None, :] * channels + some[:, None])
        sums = tl.dot(x, weight, sums, input_precision="ieee")
    sums += tl.load(bias_at + channel).to(tl.float32)[None, :]
    where = at[:, None] * channels + channel[None, :]
    if has_beside:
        sums += tl.load(beside_at + where, mask=inside[:, None], other=0.0).to(tl.float32)
    if has_summed:
        sums += tl.load(summed_at + where, mask=inside[:, None], other=0.0).to(tl.float32)
    if has_result:
        tl.store(result_at + where, sums.to(kind), mask=inside[:, None])
    if has_bent:
        alpha = tl.load(alpha_at + channel).to(tl.float32)
        inverse = tl.load(inverse_at + channel).to(tl.float32)
        bent = _snake(sums, alpha[None, :], inverse[None, :])
        count = tl.load(counts_at + row // width, mask=inside, other=0)
        bent = tl.where((step < count)[:, None], bent, 0.0)
        tl.store(bent_at + where, bent.to(kind), mask=inside[:, None])


@triton.jit(do_not_specialize=["total", "width"])
def _bent(
    x_at,
    bent_at,
    alpha_at,
    inverse_at,
    counts_at,
    total,
    width,
    scale,
    slope,
    channels: tl.constexpr,
    snake: tl.constexpr,
    block: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < total
    row = at // channels
    x = tl.load(x_at + at, mask=inside, other=0.0).to(tl.float32) * scale
    if snake:
        alpha = tl.load(alpha_at + at % channels).to(tl.float32)
        x = _snake(x, alpha, tl.load(inverse_at + at % channels).to(tl.float32))
    else:
        x = tl.where(x >= 0, x, x * slope)
    count = tl.load(counts_at + row // width, mask=inside, other=0)
    x = tl.where(row % width < count, x, 0.0)
    tl.store(bent_at + at, x.to(bent_at.dtype.element_ty), mask=inside)


def _tile(rows: int, channels: int) -> dict[str, int]:
    """Few rows are shared out among more programs; 64 rows of 256 channels already fill the registers."""
    if rows < 4096:
        return {"block_m": 16, "block_k": 64, "num_warps": 4, "num_stages": 3}
    return {"block_m": 64 if channels > 128 else 128, "block_k": 64, "num_warps": 8, "num_stages": 3}


def around(
    x: Any,
    weights: tuple[Any, Any, int],
    counts: Any,
    *,
    beside: Any = None,
    summed: Any = None,
    bend: Any = None,
    keep: bool = False,
) -> tuple[Any, Any]:
    """A convolution that looks both ways; what is ``beside`` it and ``summed`` are added.

    Args:
        x: (batch, width, channels), contiguous, nothing beyond its end.
        weights: (taps, channels, channels), bias, dilation.
        counts: where each row ends, (batch,).
        bend: alpha and its inverse of Snake.
        keep: whether the sum is wanted as it is.

    Returns:
        The sum as it is, and bent by Snake with nothing beyond each row's end, each of them if it is asked for.
    """
    weight, bias, dilation = weights
    batch, width, channels = x.shape
    rows = batch * width
    result = torch.empty_like(x) if keep else None
    bent = None if bend is None else torch.empty_like(x)
    alpha, inverse = bend or (bias, bias)
    tile = _tile(rows, channels)
    _around[(triton.cdiv(rows, tile["block_m"]),)](
        x, x if beside is None else beside, x if summed is None else summed, x if result is None else result,
        x if bent is None else bent, weight, bias, alpha, inverse, counts, rows, width, len(weight), dilation,
        channels=channels, has_beside=beside is not None, has_summed=summed is not None, has_result=keep,
        has_bent=bent is not None, **tile,
    )  # fmt: skip
    return result, bent


def bent(x: Any, counts: Any, *, bend: Any = None, scale: float = 1.0, slope: float = 0.0) -> Any:
    """``x`` times ``scale`` through Snake, or without ``bend`` through a leaky ReLU; nothing beyond each end."""
    batch, width, channels = x.shape
    made, total, block = torch.empty_like(x), batch * width * channels, 2048
    alpha, inverse = bend or (x, x)
    _bent[(triton.cdiv(total, block),)](
        x, made, alpha, inverse, counts, total, width, scale, slope,
        channels=channels, snake=bend is not None, block=block,
    )  # fmt: skip
    return made
