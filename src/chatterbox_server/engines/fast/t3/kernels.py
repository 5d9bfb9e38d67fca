# mypy: ignore-errors
"""T3's step in Triton: the arithmetic of ``backbone`` for one position a row, in few launches.

A step moves every weight once and computes next to nothing, so what counts is bytes and launches. For a few rows each
matrix is read by one kernel that also does what comes before it (norm, sum of parts) and after it (turning, gating,
storing in the cache); five kernels a layer. With programmatic dependent launch a kernel asks for its weights before the
one in front of it has ended. Many rows go through cuBLAS, with kernels in between.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def ready(EARLY: tl.constexpr):
    """From here on, what the kernels in front have written may be read; the next may begin to load its weights."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def _normed(x, D: tl.constexpr, EPS: tl.constexpr, GATED: tl.constexpr):
    """Llama takes no mean off."""
    if not GATED:
        x = x - tl.sum(x, 0) / D
    return x * tl.rsqrt(tl.sum(x * x, 0) / D + EPS)


@triton.jit
def _row(x, parts, m, M: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr):
    """A row of the residual stream, with what the last matrix has left in parts."""
    d = tl.arange(0, D)
    row = tl.load(x + m * D + d)
    for part in tl.static_range(PARTS):
        row += tl.load(parts + (part * M + m) * D + d)
    return row


@triton.jit
def embed(
    x, slots, last, count, position, speech, speech_positions, wpe, rows, at,
    ROWS: tl.constexpr, D: tl.constexpr, LEARNED: tl.constexpr, GATED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The token that was chosen last, for each row of its slot; and where in the cache those rows are."""
    ready(EARLY)
    b = tl.program_id(0)
    d = tl.arange(0, D)
    slot = tl.load(slots + b)
    here = tl.load(position + slot)
    row = tl.load(speech + tl.load(last + slot) * D + d)
    if LEARNED:
        row += tl.load(speech_positions + tl.load(count + slot) * D + d)
    if not GATED:
        row += tl.load(wpe + here * D + d)
    for r in tl.static_range(ROWS):
        tl.store(x + (b * ROWS + r) * D + d, row)
        tl.store(rows + b * ROWS + r, slot * ROWS + r)
        tl.store(at + b * ROWS + r, here)


@triton.jit
def qkv(
    x, parts, x_out, weight, bias, cos, sin, rows, at, query, keys, values, row_stride, head_stride,
    M: tl.constexpr, D: tl.constexpr, HD: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    EPS: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Sum of parts, norm, projections, turning, and into the cache. Each program has a slice of a head, both halves."""
    SLICES: tl.constexpr = HD // 2 // BLOCK
    HEADS: tl.constexpr = D // HD
    pid = tl.program_id(0)
    which = pid // (HEADS * SLICES)
    head = (pid // SLICES) % HEADS
    inside = (pid % SLICES) * BLOCK + tl.arange(0, BLOCK)
    left = which * D + head * HD + inside
    right = left + HD // 2
    d = tl.arange(0, D)
    w_left = tl.load(weight + left[:, None] * D + d[None, :])
    w_right = tl.load(weight + right[:, None] * D + d[None, :])
    ready(EARLY)
    for m in tl.static_range(M):
        here = tl.load(at + m)
        kept = tl.load(rows + m).to(tl.int64) * row_stride + head * head_stride + here * HD + inside
        row = _row(x, parts, m, M, D, PARTS)
        if PARTS > 0:
            if pid == 0:
                tl.store(x_out + m * D + d, row)
        row = _normed(row, D, EPS, GATED)
        one = tl.sum(w_left.to(tl.float32) * row[None, :], 1)
        two = tl.sum(w_right.to(tl.float32) * row[None, :], 1)
        if BIAS:
            one += tl.load(bias + left).to(tl.float32)
            two += tl.load(bias + right).to(tl.float32)
        if GATED:
            if which < 2:
                c = tl.load(cos + here * HD + inside)
                s = tl.load(sin + here * HD + inside)
                one, two = one * c - two * s, two * c + one * s
        if which == 0:
            tl.store(query + m * D + head * HD + inside, one)
            tl.store(query + m * D + head * HD + inside + HD // 2, two)
        elif which == 1:
            tl.store(keys + kept, one.to(keys.dtype.element_ty))
            tl.store(keys + kept + HD // 2, two.to(keys.dtype.element_ty))
        else:
            tl.store(values + kept, one.to(values.dtype.element_ty))
            tl.store(values + kept + HD // 2, two.to(values.dtype.element_ty))


@triton.jit
def attend(
    query, keys, values, rows, at, mixed, in_splits, tops, sums, arrived, row_stride, head_stride,
    D: tl.constexpr, HD: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row's head over its part of the cache; the last program of a head to arrive merges what all have found."""
    ready(EARLY)
    HEADS: tl.constexpr = D // HD
    SCALE: tl.constexpr = 1.4426950408889634 / HD**0.5
    m = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    split = tl.program_id(1)
    length = tl.load(at + m) + 1
    base = tl.load(rows + m).to(tl.int64) * row_stride + head * head_stride
    share = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
    begin = split * share
    end = tl.minimum(begin + share, length)
    d = tl.arange(0, HD)
    q = tl.load(query + m * D + head * HD + d).to(tl.float32) * SCALE
    top = -float("inf")
    total = 0.0
    acc = tl.zeros([HD], tl.float32)
    for l0 in range(begin, end, BLOCK):
        place = l0 + tl.arange(0, BLOCK)
        there = place < end
        k = tl.load(keys + base + place[:, None] * HD + d[None, :], mask=there[:, None], other=0.0)
        v = tl.load(values + base + place[:, None] * HD + d[None, :], mask=there[:, None], other=0.0)
        score = tl.where(there, tl.sum(k.to(tl.float32) * q[None, :], 1), -float("inf"))
        higher = tl.maximum(top, tl.max(score, 0))
        weight = tl.exp2(score - higher)
        fade = tl.exp2(top - higher)
        acc = acc * fade + tl.sum(weight[:, None] * v.to(tl.float32), 0)
        total = total * fade + tl.sum(weight, 0)
        top = higher
    out = mixed + m * D + head * HD + d
    if SPLITS == 1:
        tl.store(out, (acc / total).to(mixed.dtype.element_ty))
    else:
        place = (m * HEADS + head) * SPLITS
        tl.store(in_splits + (place + split) * HD + d, acc)
        tl.store(tops + place + split, top)
        tl.store(sums + place + split, total)
        # All threads have stored before one of them says so.
        tl.debug_barrier()
        if tl.atomic_add(arrived + m * HEADS + head, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
            s = tl.arange(0, SPLITS)
            # Not from a cache that is this multiprocessor's alone.
            all_tops = tl.load(tops + place + s, cache_modifier=".cg")
            # A split that had no position has a top of minus infinity, and counts for nothing.
            part = tl.exp2(all_tops - tl.max(all_tops, 0))
            total = tl.sum(part * tl.load(sums + place + s, cache_modifier=".cg"), 0)
            found = tl.load(in_splits + (place + s[:, None]) * HD + d[None, :], cache_modifier=".cg")
            tl.store(out, (tl.sum(part[:, None] * found, 0) / total).to(mixed.dtype.element_ty))
            tl.store(arrived + m * HEADS + head, 0)


@triton.jit
def watch(
    query, keys, rows, at, scores, which, row_stride, head_stride,
    HEAD: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, HD: tl.constexpr,
    POSITIONS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """What one head of an utterance's first row makes of BLOCK positions; ``judge`` makes probabilities of them."""
    ready(EARLY)
    b = tl.program_id(0)
    m = b * ROWS
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = place <= tl.load(at + m)
    base = tl.load(rows + m).to(tl.int64) * row_stride + HEAD * head_stride
    d = tl.arange(0, HD)
    q = tl.load(query + m * D + HEAD * HD + d).to(tl.float32) / HD**0.5
    k = tl.load(keys + base + place[:, None] * HD + d[None, :], mask=there[:, None], other=0.0)
    score = tl.sum(k.to(tl.float32) * q[None, :], 1)
    tl.store(scores + (b * HEADS + which) * POSITIONS + place, score, mask=there)


@triton.jit
def attend_back(
    query, keys, values, rows, at, mixed, row_stride, head_stride,
    LENGTH: tl.constexpr, D: tl.constexpr, HD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As ``attend``, for LENGTH positions of a row that follow each other; a program has BLOCK of them."""
    HEADS: tl.constexpr = D // HD
    SCALE: tl.constexpr = 1.4426950408889634 / HD**0.5
    m0 = tl.program_id(0) // HEADS * LENGTH + tl.program_id(1) * BLOCK
    head = tl.program_id(0) % HEADS
    m = m0 + tl.arange(0, BLOCK)
    d = tl.arange(0, HD)
    here = tl.load(at + m)
    base = tl.load(rows + m0).to(tl.int64) * row_stride + head * head_stride
    q = (tl.load(query + m[:, None] * D + head * HD + d[None, :]).to(tl.float32) * SCALE).to(keys.dtype.element_ty)
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, HD], tl.float32)
    for l0 in range(0, tl.load(at + m0) + BLOCK, BLOCK):
        place = l0 + tl.arange(0, BLOCK)
        k = tl.load(keys + base + place[None, :] * HD + d[:, None])
        v = tl.load(values + base + place[:, None] * HD + d[None, :])
        score = tl.dot(q, k, input_precision="ieee")
        score = tl.where(place[None, :] <= here[:, None], score, -float("inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        fade = tl.exp2(top - higher)
        acc = acc * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        total = total * fade + tl.sum(weight, 1)
        top = higher
    out = (acc / total[:, None]).to(mixed.dtype.element_ty)
    tl.store(mixed + m[:, None] * D + head * HD + d[None, :], out)


@triton.jit
def project(
    x, mixed, weight, bias,
    M: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """What attention has found, projected, and added to the residual stream."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    w = tl.load(weight + n[:, None] * D + d[None, :])
    ready(EARLY)
    for m in tl.static_range(M):
        row = tl.load(mixed + m * D + d).to(tl.float32)
        out = tl.sum(w.to(tl.float32) * row[None, :], 1)
        if BIAS:
            out += tl.load(bias + n).to(tl.float32)
        tl.store(x + m * D + n, tl.load(x + m * D + n) + out)


@triton.jit
def _gelu(x):
    """GPT-2's, by tanh."""
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x * tl.sigmoid(2.0 * inner)


@triton.jit
def raise_(
    x, raised, weight, bias,
    M: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
    EPS: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Norm, the first matrix of the feed-forward net, and its activation."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    w = tl.load(weight + n[:, None] * D + d[None, :])
    if GATED:
        w_through = tl.load(weight + (n + F)[:, None] * D + d[None, :])
    ready(EARLY)
    for m in tl.static_range(M):
        row = _normed(tl.load(x + m * D + d), D, EPS, GATED)
        out = tl.sum(w.to(tl.float32) * row[None, :], 1)
        if GATED:
            out = out * tl.sigmoid(out) * tl.sum(w_through.to(tl.float32) * row[None, :], 1)
        else:
            if BIAS:
                out += tl.load(bias + n).to(tl.float32)
            out = _gelu(out)
        tl.store(raised + m * F + n, out.to(raised.dtype.element_ty))


@triton.jit
def lower(
    raised, parts, weight, bias,
    M: tl.constexpr, D: tl.constexpr, F: tl.constexpr, SHARE: tl.constexpr, BLOCK: tl.constexpr,
    BIAS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The last matrix of the feed-forward net in parts, each over a share of its inputs, for the next kernel to sum."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(1)
    f = part * SHARE + tl.arange(0, SHARE)
    w = tl.load(weight + n[:, None] * F + f[None, :])
    ready(EARLY)
    for m in tl.static_range(M):
        row = tl.load(raised + m * F + f)
        out = tl.sum(w.to(tl.float32) * row[None, :], 1)
        if BIAS:
            if part == 0:
                out += tl.load(bias + n).to(tl.float32)
        tl.store(parts + (part * M + m) * D + n, out)


@triton.jit
def head(
    x, parts, logits, weight, bias,
    M: tl.constexpr, D: tl.constexpr, V: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    EPS: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Sum of parts, norm, logits."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    w = tl.load(weight + n[:, None] * D + d[None, :], mask=n[:, None] < V, other=0.0)
    ready(EARLY)
    for m in tl.static_range(M):
        row = _normed(_row(x, parts, m, M, D, PARTS), D, EPS, GATED)
        out = tl.sum(w.to(tl.float32) * row[None, :], 1)
        if BIAS:
            out += tl.load(bias + n, mask=n < V, other=0.0).to(tl.float32)
        tl.store(logits + m * V + n, out, mask=n < V)


# -- for many rows, around cuBLAS -------------------------------------------------------------------------


@triton.jit
def add_norm(x, add, normed, D: tl.constexpr, ADD: tl.constexpr, EPS: tl.constexpr, GATED: tl.constexpr):
    """The residual stream with what is to be added; and its norm."""
    m = tl.program_id(0)
    d = tl.arange(0, D)
    row = tl.load(x + m * D + d)
    if ADD:
        row += tl.load(add + m * D + d).to(tl.float32)
        tl.store(x + m * D + d, row)
    tl.store(normed + m * D + d, _normed(row, D, EPS, GATED).to(normed.dtype.element_ty))


@triton.jit
def turn(
    qkv, cos, sin, rows, at, query, keys, values, row_stride, head_stride,
    D: tl.constexpr, HD: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """Queries turned; keys turned and values as they are, into the cache. A program has one row."""
    m = tl.program_id(0)
    HEADS: tl.constexpr = D // HD
    HALF: tl.constexpr = HD // 2
    here = tl.load(at + m)
    h = tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, HALF)[None, :]
    place = m * 3 * D + h * HD + i
    kept = tl.load(rows + m).to(tl.int64) * row_stride + h * head_stride + here * HD + i
    q_left = tl.load(qkv + place).to(tl.float32)
    q_right = tl.load(qkv + place + HALF).to(tl.float32)
    k_left = tl.load(qkv + place + D).to(tl.float32)
    k_right = tl.load(qkv + place + D + HALF).to(tl.float32)
    if TURNS:
        c = tl.load(cos + here * HD + i)
        s = tl.load(sin + here * HD + i)
        q_left, q_right = q_left * c - q_right * s, q_right * c + q_left * s
        k_left, k_right = k_left * c - k_right * s, k_right * c + k_left * s
    tl.store(query + m * D + h * HD + i, q_left)
    tl.store(query + m * D + h * HD + i + HALF, q_right)
    tl.store(keys + kept, k_left.to(keys.dtype.element_ty))
    tl.store(keys + kept + HALF, k_right.to(keys.dtype.element_ty))
    tl.store(values + kept, tl.load(qkv + place + 2 * D))
    tl.store(values + kept + HALF, tl.load(qkv + place + 2 * D + HALF))


@triton.jit
def gate(raised, out, F: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    """The activation of the feed-forward net."""
    m = tl.program_id(0)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if GATED:
        g = tl.load(raised + m * 2 * F + f).to(tl.float32)
        through = tl.load(raised + m * 2 * F + F + f).to(tl.float32)
        result = g * tl.sigmoid(g) * through
    else:
        result = _gelu(tl.load(raised + m * F + f).to(tl.float32))
    tl.store(out + m * F + f, result.to(out.dtype.element_ty))
