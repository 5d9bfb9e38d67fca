"""How sure a measured number is: quantiles, means and ratios with 95 % intervals. Knows nothing of what was measured.

The unit of repetition is a whole repetition of a benchmark, never a single request: requests wait for each other, so
that thousands of them may be worth only a few independent ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist, fmean, variance
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# Student's t for 95 % (two-sided), by degrees of freedom from 1 (Fisher and Yates; scipy.stats.t.ppf(0.975, df)).
_T = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip

_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number, and where the true one lies with 95 % confidence."""

    value: float
    low: float | None = None
    """``None`` with ``high``: a single repetition tells nothing about the next one."""
    high: float | None = None

    @property
    def half_width(self) -> float | None:
        """The larger distance from the value to an end of the interval."""
        if self.low is None or self.high is None:
            return None
        return max(self.value - self.low, self.high - self.value)


def quantile(values: Sequence[float], q: float) -> float | None:
    """The smallest value that a share ``q`` of all ``values`` does not exceed (nearest rank); 0 < q < 1.

    ``None`` with fewer than 1 / (1 - q) values, where it would only be another name for the largest, and where it
    is infinite: whoever never got an answer counts as infinitely slow.
    """
    # Rounded, since 1 / (1 - 0.95) is a little more than 20.
    if not values or len(values) < round(1 / (1 - q), 6):
        return None
    found = sorted(values)[max(0, math.ceil(round(q * len(values), 6)) - 1)]
    return found if math.isfinite(found) else None


def mean(values: Sequence[float]) -> Estimate | None:
    """Mean of independent repetitions, with Student's interval; ``None`` of nothing."""
    if not values:
        return None
    middle = fmean(values)
    if len(values) < 2:
        return Estimate(middle)
    reach = student(len(values) - 1) * math.sqrt(variance(values) / len(values))
    return Estimate(middle, middle - reach, middle + reach)


def ratio(over: Sequence[float], under: Sequence[float]) -> Estimate | None:
    """How many times ``under`` is ``over``: the ratio of geometric means of two independent sets of repetitions.

    The interval is Welch's, of the difference of logarithms: the spread of the two may differ, and A over B is
    exactly one over B over A. ``None`` where a value is not positive.
    """
    if not over or not under or min(*over, *under) <= 0:
        return None
    logs = [[math.log(value) for value in values] for values in (over, under)]
    middle = fmean(logs[0]) - fmean(logs[1])
    if min(len(over), len(under)) < 2:
        return Estimate(math.exp(middle))
    errors = [variance(values) / len(values) for values in logs]
    total = sum(errors)
    if total == 0:
        return Estimate(math.exp(middle), math.exp(middle), math.exp(middle))
    freedom = total**2 / sum(error**2 / (len(values) - 1) for error, values in zip(errors, logs, strict=True))
    reach = student(freedom) * math.sqrt(total)
    return Estimate(math.exp(middle), math.exp(middle - reach), math.exp(middle + reach))


def share(hits: int, of: int) -> Estimate | None:
    """A share of independent trials, 0 to 1, with Wilson's interval, which is right also where there was no hit."""
    if of == 0:
        return None
    observed = hits / of
    scale = 1 + _Z**2 / of
    centre = (observed + _Z**2 / (2 * of)) / scale
    reach = _Z / scale * math.sqrt(observed * (1 - observed) / of + _Z**2 / (4 * of**2))
    return Estimate(observed, max(0.0, min(observed, centre - reach)), min(1.0, max(observed, centre + reach)))


def student(freedom: float) -> float:
    """Student's t for 95 %, two-sided; ``freedom`` may be a fraction, at least 1."""
    if freedom >= len(_T):
        # Cornish and Fisher's series in 1 / freedom; off by less than 0.0001 from here on.
        z = _Z
        return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    # Between whole numbers log t is nearly linear in 1 / freedom: at most 3 % too wide, at 1.5.
    below = max(1, math.floor(freedom))
    if below == len(_T) or freedom <= below:
        return _T[below - 1]
    part = (1 / freedom - 1 / below) / (1 / (below + 1) - 1 / below)
    return _T[below - 1] * math.pow(_T[below] / _T[below - 1], part)
