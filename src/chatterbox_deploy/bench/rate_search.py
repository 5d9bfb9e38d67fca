"""The highest rate that holds a target, by bisection: which rate to try next, how sure the answer is. Sends nothing.

A target is a share: "p95 of the first byte <= 2 s" holds where at most 5 % of all requests are later. Whether a rate
holds it is uncertain in two ways, and the wider interval counts: requests are few (Wilson's interval of the share), and
repetitions differ (Student's, of their shares).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from chatterbox_deploy.bench import stats
from chatterbox_deploy.bench.loads import Target
from chatterbox_deploy.errors import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatterbox_deploy.bench.loads import Search, Tried
    from chatterbox_deploy.bench.stats import Estimate

UNSURE_TRIES = 3
"""How often a rate is tried, each time with all repetitions, before its mean has to do."""

STEP_UP = 1.25
MOST = 4.0
"""Times the pace of a closed loop: a rate that holds there holds because the windows are too short to tell."""
LEAST = 1 / 32

_TARGET = re.compile(r"p(\d{1,2}(?:\.\d+)?) +(first-byte|latency) *<= *(\d+(?:\.\d+)?) *s?")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known of one rate."""

    says: Literal["held", "missed", "unsure"]
    late: Estimate
    """Share of the requests that were late, or failed."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The highest rate that holds a target, as far as it is known."""

    held_per_s: float | None
    """The highest rate that held, below any that did not; ``None``: none did."""
    missed_per_s: float | None
    """The lowest rate that missed; ``None``: none did."""
    low_per_s: float | None
    """The highest rate that held with 95 % confidence: the true answer is hardly lower; ``None``: none did."""
    high_per_s: float | None
    """The lowest rate that missed with 95 % confidence: it is hardly higher; ``None``: none did."""


def parse_target(text: str) -> Target:
    """``p95 first-byte <= 2``, in seconds; ``latency`` is to the last byte.

    Raises:
        BenchmarkError: it reads otherwise.
    """
    found = _TARGET.fullmatch(text.strip())
    if found is None or not 0 < float(found[1]) < 100 or float(found[3]) <= 0:
        raise BenchmarkError(
            [f"--find-rate: cannot read {text!r}; write it as 'p95 first-byte <= 2' or 'p99 latency <= 10'"]
        )
    return Target(
        what="first-byte" if found[2] == "first-byte" else "latency",
        quantile=float(found[1]) / 100,
        limit_s=float(found[3]),
    )


def verdict(tried: Tried, target: Target) -> Verdict:
    """Whether at most a share ``1 - quantile`` of the requests were late."""
    allowed = 1 - target.quantile
    of_all = stats.share(sum(tried.late), sum(tried.of)) or stats.Estimate(0.0, 0.0, 1.0)
    low, high = of_all.low or 0.0, 1.0 if of_all.high is None else of_all.high
    between = stats.mean([late / of for late, of in zip(tried.late, tried.of, strict=True) if of])
    if between is not None and between.low is not None and between.high is not None:
        low, high = min(low, max(0.0, between.low)), max(high, min(1.0, between.high))
    late = stats.Estimate(of_all.value, low, high)
    return Verdict("held" if high <= allowed else "missed" if low > allowed else "unsure", late)


def next_rate(search: Search, *, pace_per_s: float, tolerance: float, repetitions: int) -> float | None:
    """The rate to try now, with so many ``repetitions``; ``None`` when enough is known.

    ``pace_per_s`` is what a closed loop answered: no higher rate can hold for long. A rate that stays unsure counts as
    what it was on the average. ``tolerance``: largest gap between held and missed, as a share of the latter.
    """
    if not search.tried:
        return pace_per_s * 0.8
    last = search.tried[-1]
    if verdict(last, search.target).says == "unsure" and len(last.of) < UNSURE_TRIES * repetitions:
        return last.rate_per_s
    low, high = _bracket(search)
    if high is None:
        assert low is not None  # noqa: S101  something was tried
        return low * STEP_UP if low < pace_per_s * MOST else None
    if low is None:
        return high / 2 if high > pace_per_s * LEAST else None
    return (low + high) / 2 if (high - low) / high > tolerance else None


def answer(search: Search) -> Answer:
    """What is known so far."""
    low, high = _bracket(search)
    says = {tried.rate_per_s: verdict(tried, search.target).says for tried in search.tried}
    sure_high = min((rate for rate, said in says.items() if said == "missed"), default=None)
    ceiling = high if sure_high is None else sure_high
    held = [rate for rate, said in says.items() if said == "held" and (ceiling is None or rate < ceiling)]
    return Answer(low, high, max(held, default=None), sure_high)


def sentence(search: Search) -> str:
    """The answer in one line."""
    found = answer(search)
    if found.held_per_s is None:
        lowest = min((tried.rate_per_s for tried in search.tried), default=None)
        tried = (
            "nothing was tried" if lowest is None else f"not even at {lowest:.3g} requests/s, the lowest that was tried"
        )
        return f"no rate is known that holds {search.target}: {tried}"
    if found.missed_per_s is None:
        return (
            f"{search.target} holds at {found.held_per_s:.3g} requests/s, the highest that was tried and more than the"
            " fleet answers for long: give a longer --window, or a stricter target"
        )
    between = f"{_rate(found.low_per_s, 'unknown')} to {_rate(found.high_per_s, 'unknown')}"
    return (
        f"{search.target} holds up to {found.held_per_s:.3g} requests/s (95 %: {between}); missed at"
        f" {found.missed_per_s:.3g}"
    )


def _rate(rate_per_s: float | None, otherwise: str) -> str:
    return otherwise if rate_per_s is None else f"{rate_per_s:.3g}"


def merge(tried: Sequence[Tried], new: Tried) -> tuple[Tried, ...]:
    """``tried`` with ``new`` behind; of the same rate as the last one, as more repetitions of it."""
    if tried and tried[-1].rate_per_s == new.rate_per_s:
        last = tried[-1]
        both = type(new)(rate_per_s=new.rate_per_s, late=(*last.late, *new.late), of=(*last.of, *new.of))
        return (*tried[:-1], both)
    return (*tried, new)


def _bracket(search: Search) -> tuple[float | None, float | None]:
    """The highest rate that held below the lowest that missed, and that one."""
    allowed = 1 - search.target.quantile
    held: list[float] = []
    missed: list[float] = []
    for tried in search.tried:
        found = verdict(tried, search.target)
        holds = found.says == "held" or (found.says == "unsure" and found.late.value <= allowed)
        (held if holds else missed).append(tried.rate_per_s)
    high = min(missed, default=None)
    return max((rate for rate in held if high is None or rate < high), default=None), high
