"""The estimator's and the vocoder's layers, each as one Triton kernel: from norm to residual, a row stays in registers.

Where torch writes a row's channels to memory after each step and reads them back, these read and write them once. Sums
are float32. What they compute ``flow`` and ``vocoder`` also compute in torch; tests/server/test_fast_tiles.py compares.
"""

from typing import Any

import torch
import triton
import triton.language as tl

# ruff: noqa: PLR0917 (kernels take pointers and numbers, untyped and many)
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,unused-ignore"


def _tried(configs: list[Any]) -> list[Any]:
    """Where kernels are interpreted, there is nothing to measure."""
    return configs[:1] if triton.knobs.runtime.interpret else configs


# A row of channels is a tile's width. Few choices, for each is compiled; autotune leaves out what does not fit a card.
def _choices(*choices: tuple[dict[str, int], int, int]) -> list[Any]:
    return _tried([triton.Config(sizes, num_warps=warps, num_stages=stages) for sizes, warps, stages in choices])


@triton.jit
def _normed(x, weight, bias, eps, channels: tl.constexpr):
    mean = tl.sum(x, axis=1) / channels
    centred = x - mean[:, None]
    scale = 1 / tl.sqrt(tl.sum(centred * centred, axis=1) / channels + eps)
    # Not from ``centred``, which would stay in registers for it beside ``x``, and spill.
    return (x * scale[:, None] - (mean * scale)[:, None]) * weight[None, :] + bias[None, :]


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


@triton.autotune(
    configs=_choices(
        ({"block_m": 32, "block_n": 64}, 4, 2),
        ({"block_m": 64, "block_n": 128}, 4, 2),
        ({"block_m": 128, "block_n": 128}, 8, 2),
    ),
    key=["size"],
)
@triton.jit
def _norm_linear(
    x_at,
    out_at,
    norm_weight_at,
    norm_bias_at,
    weight_at,
    counts_at,
    rows,
    width,
    eps,
    size,  # noqa: ARG001
    channels: tl.constexpr,
    outputs: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
):
    row = tl.program_id(0) * block_m + tl.arange(0, block_m)
    column = tl.program_id(1) * block_n + tl.arange(0, block_n)
    channel = tl.arange(0, channels)
    inside = (row < rows)[:, None]
    at = row[:, None].to(tl.int64)
    x = tl.load(x_at + at * channels + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    norm_weight = tl.load(norm_weight_at + channel).to(tl.float32)
    norm_bias = tl.load(norm_bias_at + channel).to(tl.float32)
    normed = _normed(x, norm_weight, norm_bias, eps, channels)
    # Padding comes out as nothing, which attention can take off its sums again.
    count = tl.load(counts_at + row // width, mask=row < rows, other=0)
    normed = tl.where((row % width < count)[:, None], normed, 0.0).to(out_at.dtype.element_ty)
    weight = tl.load(weight_at + column[None, :] * channels + channel[:, None])
    out = tl.dot(normed, weight, input_precision="ieee")
    tl.store(out_at + at * outputs + column[None, :], out.to(out_at.dtype.element_ty), mask=inside)


@triton.autotune(
    configs=_choices(
        ({"block_m": 16, "block_k": 64}, 4, 3),
        ({"block_m": 64, "block_k": 64}, 8, 2),
        ({"block_m": 64, "block_k": 64}, 8, 3),
        ({"block_m": 128, "block_k": 64}, 8, 2),
        ({"block_m": 128, "block_k": 64}, 8, 3),
        ({"block_m": 128, "block_k": 64}, 16, 2),
    ),
    key=["size"],
)
@triton.jit
def _after_attention(
    x_at,
    attended_at,
    result_at,
    out_at,
    out_bias_at,
    norm_weight_at,
    norm_bias_at,
    widen_at,
    widen_bias_at,
    narrow_at,
    narrow_bias_at,
    counts_at,
    sums_at,
    rows,
    width,
    eps,
    size,  # noqa: ARG001
    channels: tl.constexpr,
    heads: tl.constexpr,
    head: tl.constexpr,
    corrected: tl.constexpr,
    hidden: tl.constexpr,
    block_m: tl.constexpr,
    block_k: tl.constexpr,
):
    row = tl.program_id(0) * block_m + tl.arange(0, block_m)
    channel = tl.arange(0, channels)
    inside = (row < rows)[:, None]
    at = row[:, None].to(tl.int64)
    kind = result_at.dtype.element_ty
    padded = (width - tl.load(counts_at + row // width, mask=row < rows, other=0)).to(tl.float32)
    sums = tl.zeros((block_m, channels), dtype=tl.float32)
    for begin in range(0, heads, block_k):
        some = begin + tl.arange(0, block_k)
        attended = tl.load(attended_at + at * heads + some[None, :], mask=inside, other=0.0)
        if corrected:
            # Of one head: a step is never wider than it.
            summed = tl.load(
                sums_at + ((row // width) * (heads // head) + begin // head) * width + row % width,
                mask=row < rows,
                other=0,
            )
            attended = (attended.to(tl.float32) / (1 - padded * tl.exp(-summed))[:, None]).to(kind)
        weight = tl.load(out_at + channel[None, :] * heads + some[:, None])
        sums = tl.dot(attended, weight, sums, input_precision="ieee")
    sums += tl.load(x_at + at * channels + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    sums += tl.load(out_bias_at + channel).to(tl.float32)[None, :]
    norm_weight = tl.load(norm_weight_at + channel).to(tl.float32)
    norm_bias = tl.load(norm_bias_at + channel).to(tl.float32)
    normed = _normed(sums, norm_weight, norm_bias, eps, channels).to(kind)
    sums += tl.load(narrow_bias_at + channel).to(tl.float32)[None, :]
    for begin in range(0, hidden, block_k):
        some = begin + tl.arange(0, block_k)
        widen = tl.load(widen_at + some[None, :] * channels + channel[:, None])
        wide = tl.dot(normed, widen, input_precision="ieee") + tl.load(widen_bias_at + some).to(tl.float32)[None, :]
        wide = 0.5 * wide * (1 + tl.erf(wide * 0.7071067811865476))
        narrow = tl.load(narrow_at + channel[None, :] * hidden + some[:, None])
        sums = tl.dot(wide.to(kind), narrow, sums, input_precision="ieee")
    tl.store(result_at + at * channels + channel[None, :], sums.to(kind), mask=inside)


@triton.autotune(
    configs=_choices(
        ({"block_m": 16, "block_k": 64}, 4, 3),
        ({"block_m": 64, "block_k": 64}, 8, 2),
        ({"block_m": 64, "block_k": 64}, 8, 3),
        ({"block_m": 128, "block_k": 64}, 8, 2),
        ({"block_m": 128, "block_k": 64}, 16, 2),
    ),
    key=["size", "inputs"],
)
@triton.jit
def _convolution(
    x_at,
    beside_at,
    result_at,
    weight_at,
    bias_at,
    norm_weight_at,
    norm_bias_at,
    time_at,
    beside_weight_at,
    rows,
    width,
    eps,
    inputs,
    besides,
    size,  # noqa: ARG001
    channels: tl.constexpr,
    block_m: tl.constexpr,
    block_k: tl.constexpr,
):
    row = tl.program_id(0) * block_m + tl.arange(0, block_m)
    channel = tl.arange(0, channels)
    inside = row < rows
    step = row % width
    at = row.to(tl.int64)
    kind = result_at.dtype.element_ty
    sums = tl.zeros((block_m, channels), dtype=tl.float32)
    for begin in range(0, 3 * inputs, block_k):
        back = 2 - begin // inputs
        some = begin % inputs + tl.arange(0, block_k)
        # Before a row's first frame there is nothing.
        heard = (inside & (step >= back))[:, None]
        x = tl.load(x_at + (at - back)[:, None] * inputs + some[None, :], mask=heard, other=0.0)
        weight = tl.load(weight_at + channel[None, :] * (3 * inputs) + begin + tl.arange(0, block_k)[:, None])
        sums = tl.dot(x, weight, sums, input_precision="ieee")
    sums += tl.load(bias_at + channel).to(tl.float32)[None, :]
    norm_weight = tl.load(norm_weight_at + channel).to(tl.float32)
    norm_bias = tl.load(norm_bias_at + channel).to(tl.float32)
    normed = _normed(sums, norm_weight, norm_bias, eps, channels)
    # Mish: x * tanh(log(1 + exp(x))), without the logarithm.
    grown = tl.exp(tl.minimum(normed, 20.0))
    grown = grown * (grown + 2)
    sums = normed * (grown / (grown + 2))
    sums += tl.load(time_at + channel).to(tl.float32)[None, :]
    for begin in range(0, besides, block_k):
        some = begin + tl.arange(0, block_k)
        x = tl.load(beside_at + at[:, None] * besides + some[None, :], mask=inside[:, None], other=0.0)
        weight = tl.load(beside_weight_at + channel[None, :] * besides + some[:, None])
        sums = tl.dot(x, weight, sums, input_precision="ieee")
    tl.store(result_at + at[:, None] * channels + channel[None, :], sums.to(kind), mask=inside[:, None])


@triton.autotune(
    configs=_choices(
        ({"block_m": 64, "block_k": 64}, 4, 3),
        ({"block_m": 64, "block_k": 64}, 8, 3),
        ({"block_m": 128, "block_k": 64}, 8, 3),
    ),
    key=["size", "channels"],
)
@triton.jit
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
    size,  # noqa: ARG001
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


@triton.jit
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
    _around[_rows_of(rows)](
        x, x if beside is None else beside, x if summed is None else summed, x if result is None else result,
        x if bent is None else bent, weight, bias, alpha, inverse, counts, rows, width, len(weight), dilation,
        _size(rows), channels=channels, has_beside=beside is not None,
        has_summed=summed is not None, has_result=keep, has_bent=bent is not None,
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


def _size(rows: int) -> int:
    """What autotune tells apart: a batch, or a single chunk."""
    return min(rows, 2**18).bit_length()


def chosen() -> list[str]:
    """What autotune has found so far: kernel, what it tells apart, tile."""
    tuned = (_norm_linear, _after_attention, _convolution, _around)
    return [f"{kernel.fn.__name__} {key[:3]}: {config}" for kernel in tuned for key, config in kernel.cache.items()]


def norm_linear(x: Any, weights: tuple[Any, ...], counts: Any) -> Any:
    """As ``flow._into_heads``; ``x`` (batch, width, channels) is nothing beyond its ``counts``."""
    weight, bias, into, eps = weights
    rows, channels = x.shape[:-1].numel(), x.shape[-1]
    out = x.new_empty((*x.shape[:-1], len(into)))

    def grid(chosen: Any) -> tuple[int, int]:
        return triton.cdiv(rows, chosen["block_m"]), len(into) // chosen["block_n"]

    _norm_linear[grid](
        x, out, weight, bias, into, counts, rows, x.shape[1], eps, _size(rows), channels=channels, outputs=len(into)
    )
    return out


def after_attention(x: Any, attended: Any, weights: tuple[Any, ...], counts: Any, sums: Any = None) -> Any:
    """As ``flow._after_attention``.

    With ``sums``, the logarithms (batch, heads, width) of what attention has divided by, of which the padding is taken
    off: each position that was nothing has added one to it, and nothing else.
    """
    heads = attended.shape[-1]
    head = heads if sums is None else heads // sums.shape[1]
    *pointers, eps = weights
    rows, channels = x.shape[:-1].numel(), x.shape[-1]
    result = torch.empty_like(x)
    _after_attention[_rows_of(rows)](
        x, attended, result, *pointers, counts, x if sums is None else sums, rows, x.shape[1], eps, _size(rows),
        channels=channels, heads=heads, head=head, hidden=len(weights[4]), corrected=sums is not None,
    )  # fmt: skip
    return result


def convolution(x: Any, first: tuple[Any, ...], norm: tuple[Any, ...], *, time: Any = None, beside: Any = None) -> Any:
    """A causal convolution of three, its norm and Mish; then ``time`` is added, or a projection of something beside it.

    Args:
        x: (batch, width, inputs), contiguous.
        first: weight as ``windows`` want it, (channels, 3 * inputs), and bias.
        norm: weight, bias, eps.
        time: (channels,).
        beside: (batch, width, besides), its weight and bias.
    """
    batch, width, inputs = x.shape
    weight, bias = first
    result = x.new_empty((batch, width, len(weight)))
    # The projection's bias is added as the time is.
    other, other_weight, added = beside or (x, weight, time)
    _convolution[_rows_of(batch * width)](
        x, other, result, weight, bias, *norm[:2], added, other_weight, batch * width, width, norm[2],
        inputs, 0 if beside is None else other.shape[-1], _size(batch * width), channels=len(weight),
    )  # fmt: skip
    return result


def _rows_of(rows: int) -> Any:
    return lambda chosen: (triton.cdiv(rows, chosen["block_m"]),)
