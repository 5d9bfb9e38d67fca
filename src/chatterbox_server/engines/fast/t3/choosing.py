# mypy: ignore-errors
"""The next token in Triton: the rules of ``sampling`` and ``alignment``, a program for each utterance."""

import triton
import triton.language as tl

from chatterbox_server.engines.fast import noise
from chatterbox_server.engines.fast.t3 import alignment
from chatterbox_server.engines.fast.t3.kernels import ready

HELD, OVER, LOUD = tl.constexpr(alignment.HELD), tl.constexpr(alignment.OVER), tl.constexpr(alignment.LOUD)
LAST, SPOKEN, ENOUGH = tl.constexpr(alignment.LAST), tl.constexpr(alignment.SPOKEN), tl.constexpr(alignment.ENOUGH)
GRAIN = tl.constexpr(noise.GRAIN)
BACK, FORTH = tl.constexpr(alignment.BACK), tl.constexpr(alignment.FORTH)


@triton.jit
def judge(
    scores, slots, at, last, count, done, begins, lengths, reached, complete, lingered, again, before, verdicts,
    HEADS: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr, WIDTH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """As ``Alignment.look``: a program has one utterance; WIDTH is no less than POSITIONS."""
    # Its sums of the last tokens have a name each.
    tl.static_assert(LAST == 3)
    ready(EARLY)
    b = tl.program_id(0)
    slot = tl.load(slots + b)
    alive = tl.load(done + slot) == 0
    begin, text = tl.load(begins + slot), tl.load(lengths + slot)
    where = tl.load(reached + slot)
    said = tl.load(complete + slot) != 0
    newest, former = tl.load(last + slot), tl.load(before + slot)
    sum_0, sum_1 = tl.load(lingered + slot * LAST), tl.load(lingered + slot * LAST + 1)
    sum_2, repeated = tl.load(lingered + slot * LAST + 2), tl.load(again + slot)
    place = tl.arange(0, WIDTH)
    there = place <= tl.load(at + b * ROWS)
    attended = tl.zeros([WIDTH], tl.float32)
    for which in tl.static_range(HEADS):
        score = tl.load(scores + (b * HEADS + which) * POSITIONS + place, mask=there, other=-float("inf"))
        part = tl.exp(score - tl.max(score, 0))
        attended += part / tl.sum(part, 0)
    attended = attended / HEADS
    column = place - begin
    inside = (column >= 0) & (column < text) & (column <= tl.load(count + slot))
    highest = tl.max(tl.where(inside, attended, -1.0), 0)
    here = tl.min(tl.where(inside & (attended == highest), column, WIDTH), 0)
    attended = tl.where(inside, attended, 0.0)
    moved = here - where
    where = tl.where((moved > -BACK) & (moved < FORTH), here, where)
    if said:
        sum_0 += tl.sum(tl.where(column == text - LAST, attended, 0.0), 0)
        sum_1 += tl.sum(tl.where(column == text - LAST + 1, attended, 0.0), 0)
        sum_2 += tl.sum(tl.where(column == text - LAST + 2, attended, 0.0), 0)
        repeated += tl.max(tl.where(column < text - SPOKEN, attended, 0.0), 0)
    lingers = tl.maximum(sum_0, tl.maximum(sum_1, sum_2)) >= ENOUGH
    over = lingers | (repeated > ENOUGH) | (newest == former)
    held = (here < text - LAST) & (text > SPOKEN)
    if alive:
        tl.store(reached + slot, where)
        tl.store(complete + slot, said | (where >= text - LAST))
        tl.store(lingered + slot * LAST, sum_0)
        tl.store(lingered + slot * LAST + 1, sum_1)
        tl.store(lingered + slot * LAST + 2, sum_2)
        tl.store(again + slot, repeated)
        tl.store(before + slot, newest)
        tl.store(verdicts + slot, tl.where(over, OVER, tl.where(held, HELD, 0)))


@triton.jit
def _lane(logits, b, lane, there, cfg, V: tl.constexpr, ROWS: tl.constexpr):
    if ROWS == 2:
        with_text = tl.load(logits + b * 2 * V + lane, mask=there, other=0.0).to(tl.float32)
        without = tl.load(logits + (b * 2 + 1) * V + lane, mask=there, other=0.0).to(tl.float32)
        return with_text + cfg * (with_text - without)
    return tl.load(logits + b * V + lane, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _score(
    logits, seen, slot, b, lane, cfg, temperature, penalty, verdict,
    V: tl.constexpr, ROWS: tl.constexpr, STOP: tl.constexpr, WATCHED: tl.constexpr,
):  # fmt: skip
    """Verdict, penalty and temperature, in the order of each model's own loop."""
    there = lane < V
    score = _lane(logits, b, lane, there, cfg, V, ROWS)
    if WATCHED:
        score = tl.where((verdict == HELD) & (lane == STOP), -LOUD, score)
        score = tl.where(verdict == OVER, tl.where(lane == STOP, LOUD, -LOUD), score)
    if ROWS == 1:
        score = score / temperature
    before = tl.load(seen + slot * V + lane, mask=there, other=0) != 0
    score = tl.where(before, tl.where(score < 0, score * penalty, score / penalty), score)
    if ROWS == 2:
        score = score / temperature
    return tl.where(there, score, -float("inf"))


@triton.jit
def _clock(score, top, min_p, bits):
    """How soon a token's clock rings: the larger, the sooner. Unlikely ones have none."""
    likely = tl.exp(score - top)
    likely = tl.where(likely < min_p, 0.0, likely)
    u = ((bits >> 9).to(tl.float32) + 0.5) * GRAIN
    # What rings first has a u close to 1, where the GPU's own logarithm keeps few digits: there by its series.
    v = ((8388607 - (bits >> 9)).to(tl.float32) + 0.5) * GRAIN
    series = v * (1 + v * (1 / 2 + v * (1 / 3 + v * (1 / 4 + v * (1 / 5 + v * (1 / 6 + v / 7))))))
    return likely / tl.where(v < 0.0625, series, -tl.log(u))


@triton.jit
def choose(
    logits, slots, wanted, seeds, cfgs, temperatures, min_ps, penalties, seen, last, count, position, limit, done,
    verdicts, tokens, ended, READ: tl.constexpr, STOP: tl.constexpr, START: tl.constexpr, V: tl.constexpr,
    ROWS: tl.constexpr, WATCHED: tl.constexpr, QUADS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The next token of a slot, and all that is to be remembered of it; for those of whom nobody needs a sorted list.

    While prompts are READ only those are ``wanted``, by a number that is not negative, whose last place was.
    Four lanes for each counter of ``noise``: lane 4 q + w has word w of counter q.
    """
    ready(EARLY)
    b = tl.program_id(0)
    slot = tl.load(slots + b)
    cfg, temperature = tl.load(cfgs + slot), tl.load(temperatures + slot)
    min_p, penalty = tl.load(min_ps + slot), tl.load(penalties + slot)
    verdict = 0
    if WATCHED:
        verdict = tl.load(verdicts + slot)
    if ROWS == 1:
        min_p = 0.0
    chosen_so_far = tl.load(count + slot)
    if READ:
        alive = tl.load(wanted + b) >= 0
    else:
        alive = tl.load(done + slot) == 0
    quad = tl.arange(0, QUADS)
    zero = tl.zeros([QUADS], tl.int32)
    w0, w1, w2, w3 = tl.philox(tl.load(seeds + slot), quad, zero + chosen_so_far.to(tl.int32), zero, zero)
    s0 = _score(logits, seen, slot, b, quad * 4, cfg, temperature, penalty, verdict, V, ROWS, STOP, WATCHED)
    s1 = _score(logits, seen, slot, b, quad * 4 + 1, cfg, temperature, penalty, verdict, V, ROWS, STOP, WATCHED)
    s2 = _score(logits, seen, slot, b, quad * 4 + 2, cfg, temperature, penalty, verdict, V, ROWS, STOP, WATCHED)
    s3 = _score(logits, seen, slot, b, quad * 4 + 3, cfg, temperature, penalty, verdict, V, ROWS, STOP, WATCHED)
    top = tl.maximum(tl.maximum(tl.max(s0, 0), tl.max(s1, 0)), tl.maximum(tl.max(s2, 0), tl.max(s3, 0)))
    c0 = _clock(s0, top, min_p, w0)
    c1 = _clock(s1, top, min_p, w1)
    c2 = _clock(s2, top, min_p, w2)
    c3 = _clock(s3, top, min_p, w3)
    best = tl.maximum(tl.maximum(c0, c1), tl.maximum(c2, c3))
    lane = quad * 4 + tl.where(c0 == best, 0, tl.where(c1 == best, 1, tl.where(c2 == best, 2, 3)))
    highest = tl.max(best, 0)
    token = tl.min(tl.where(best == highest, lane, 4 * QUADS), 0).to(tl.int64)
    before = tl.load(last + slot)
    token = tl.where(alive, tl.minimum(token, V - 1), before)
    if ROWS == 1:
        if alive:
            tl.store(seen + slot * V + START, False)
        tl.debug_barrier()
    if alive:
        tl.store(seen + slot * V + token, True)
        tl.store(last + slot, token)
        tl.store(count + slot, chosen_so_far + 1)
        if not READ:
            tl.store(position + slot, tl.load(position + slot) + 1)
    over = (token == STOP) | (chosen_so_far + 1 >= tl.load(limit + slot))
    if alive:
        tl.store(done + slot, over)
    tl.store(tokens + b, token)
    tl.store(ended + b, over | (alive == 0))
