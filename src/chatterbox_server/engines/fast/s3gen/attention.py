"""Softmax attention over rows of different lengths, in Triton: its inputs are read where their product lies.

FlashAttention's way (Dao, 2023): a program has some queries of one head, goes through keys and values block by block,
and keeps the highest score and the sum so far. Of padding nothing is read.
"""

from typing import Any

import triton
import triton.language as tl

# ruff: noqa: PLR0917 (kernels take pointers and numbers, untyped and many)
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,unused-ignore"

QUERIES = 64
"""Of a program."""
KEYS = 64
"""At a time."""


@triton.jit
def _more(
    found, total, top, query, key_at, value_at, place_at, inside, begin, length, scale,
    stride: tl.constexpr, channels: tl.constexpr, keys: tl.constexpr, placed: tl.constexpr, whole: tl.constexpr,
):  # fmt: skip
    """With the keys from ``begin`` on; all of them are there if ``whole``."""
    step = begin + tl.arange(0, keys)
    channel = tl.arange(0, channels)
    there = step < length
    key_at = key_at + step[None, :] * stride + channel[:, None]
    value_at = value_at + step[:, None] * stride + channel[None, :]
    key = tl.load(key_at) if whole else tl.load(key_at, mask=there[None, :], other=0.0)
    score = tl.dot(query, key, input_precision="ieee")
    if placed:
        known = inside if whole else inside & there[None, :]
        place = tl.load(place_at[:, None] + step[None, :], mask=known, other=0.0)
        score = score * scale + place.to(tl.float32) * 1.4426950408889634
    if not whole:
        score = tl.where(there[None, :], score, float("-inf"))
    if placed:
        higher = tl.maximum(top, tl.max(score, axis=1))
        weight = tl.exp2(score - higher[:, None])
    else:
        higher = tl.maximum(top, tl.max(score, axis=1) * scale)
        weight = tl.exp2(score * scale - higher[:, None])
    fade = tl.exp2(top - higher)
    value = tl.load(value_at) if whole else tl.load(value_at, mask=there[:, None], other=0.0)
    found = tl.dot(weight.to(value.dtype), value, found * fade[:, None], input_precision="ieee")
    return found, total * fade + tl.sum(weight, axis=1), higher


@triton.jit(do_not_specialize=["width"])
def _attend(
    made_at, out_at, counts_at, more_at, places_at, width, scale,
    heads: tl.constexpr, channels: tl.constexpr, queries: tl.constexpr, keys: tl.constexpr, placed: tl.constexpr,
):  # fmt: skip
    inner: tl.constexpr = heads * channels
    stride: tl.constexpr = 3 * inner
    row, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    length = tl.load(counts_at + row).to(tl.int32)
    first = tl.program_id(0) * queries
    step, channel = first + tl.arange(0, queries), tl.arange(0, channels)
    inside = (step < width)[:, None]
    begin = row.to(tl.int64) * width
    query_at = made_at + begin * stride + head * channels
    query = tl.load(query_at + step[:, None] * stride + channel[None, :], mask=inside, other=0.0)
    place_at = places_at
    if placed:
        more = tl.load(more_at + head * channels + channel).to(tl.float32)
        query = (query.to(tl.float32) + more[None, :]).to(query.dtype)
        # Of a query those by distance begin one earlier than of the one before it.
        place_at += ((row * heads + head).to(tl.int64) * width + step) * (2 * width) + width - 1 - step
    found = tl.zeros((queries, channels), tl.float32)
    # Of padding that asks there comes nothing.
    if first < length:
        key_at, value_at = query_at + inner, query_at + 2 * inner
        top = tl.full((queries,), float("-inf"), tl.float32)
        total = tl.zeros((queries,), tl.float32)
        whole = length // keys * keys
        for some in range(0, whole, keys):
            found, total, top = _more(
                found, total, top, query, key_at, value_at, place_at, inside, some, length, scale,
                stride, channels, keys, placed, True,
            )  # fmt: skip
        if whole < length:
            found, total, top = _more(
                found, total, top, query, key_at, value_at, place_at, inside, whole, length, scale,
                stride, channels, keys, placed, False,
            )  # fmt: skip
        found = found / total[:, None]
    out_at += (begin + step)[:, None] * inner + head * channels + channel[None, :]
    tl.store(out_at, found.to(out_at.dtype.element_ty), mask=inside)


def attend(made: Any, heads: int, counts: Any, more: Any = None, places: Any = None) -> Any:
    """As ``layers.attend``, with nothing where whole blocks of queries are beyond a row's end.

    With ``places``, (batch, heads, width, 2 * width), contiguous, scores have what these say of a key's distance from
    its query, as ``encoder`` shifts them; ``more``, (heads, channels), is added to the queries of ``made``.
    """
    batch, width, stacked = made.shape
    inner = stacked // 3
    channels = inner // heads
    out = made.new_empty((batch, width, inner))
    scale = 1.4426950408889634 / channels**0.5
    placed = places is not None
    _attend[(triton.cdiv(width, QUERIES), batch * heads)](
        made, out, counts, more if placed else made, places if placed else made, width, scale,
        heads=heads, channels=channels, queries=QUERIES, keys=KEYS, placed=placed, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out
