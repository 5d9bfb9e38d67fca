"""Quantiles, and intervals that hold what they promise."""

from __future__ import annotations

import math
import random
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatterbox_deploy.bench import stats

positive = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [
        ([3.0, 1.0, 2.0], 0.5, 2.0),
        (list(range(1, 101)), 0.95, 95),
        (list(range(1, 101)), 0.99, 99),
        (list(range(1, 21)), 0.95, 19),
        # Too few for a p95 to be anything but the largest.
        (list(range(1, 20)), 0.95, None),
        ([1.0], 0.5, None),
        ([], 0.5, None),
        # Whoever never got an answer is slower than all the others.
        ([1.0, math.inf, math.inf], 0.5, None),
        ([1.0, 2.0, math.inf], 0.5, 2.0),
    ],
)
def test_a_quantile_is_a_value_that_was_seen(values: list[float], q: float, expected: float | None) -> None:
    assert stats.quantile(values, q) == expected


@given(values=st.lists(st.floats(0, 1e6), min_size=20), q=st.sampled_from((0.5, 0.9, 0.95)))
def test_at_least_that_share_is_no_slower(values: list[float], q: float) -> None:
    found = stats.quantile(values, q)

    assert found is not None
    assert sum(value <= found for value in values) >= q * len(values) - 1e-6
    assert sum(value < found for value in values) < q * len(values) + 1e-6


def test_a_mean_of_one_has_no_interval() -> None:
    assert stats.mean([2.0]) == stats.Estimate(2.0)
    assert stats.mean([]) is None


def test_students_interval_is_that_of_the_textbook() -> None:
    # 5.0 ± 2.776 x 1.5811 / √5
    found = stats.mean([3.0, 4.0, 5.0, 6.0, 7.0])

    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((5.0, 3.0368, 6.9632), abs=1e-3)


# scipy.stats.t.ppf(0.975, df)
@pytest.mark.parametrize(
    ("freedom", "t"),
    [(1, 12.7062), (1.5, 6.0167), (2.5, 3.5747), (5.5, 2.5019), (30, 2.0423), (31, 2.0395), (60, 2.0003), (1e6, 1.96)],
)
def test_students_t_also_of_a_fraction_of_a_degree(freedom: float, t: float) -> None:
    assert stats.student(freedom) == pytest.approx(t, rel=0.03)


def test_95_of_100_intervals_hold_the_truth() -> None:
    dice = random.Random(1)  # noqa: S311
    means, ratios, shares = 0, 0, 0
    for _ in range(2000):
        mean = stats.mean([dice.gauss(10, 3) for _ in range(5)])
        one, other = ([dice.lognormvariate(*shape) for _ in range(5)] for shape in ((0.7, 0.1), (0, 0.3)))
        ratio = stats.ratio(one, other)
        share = stats.share(sum(dice.random() < 0.05 for _ in range(200)), 200)
        for found in (mean, ratio, share):
            assert found is not None
            assert found.low is not None
            assert found.high is not None
            assert found.low <= found.value <= found.high
        means += mean.low <= 10 <= mean.high  # type: ignore[union-attr, operator]
        ratios += ratio.low <= math.exp(0.7) <= ratio.high  # type: ignore[union-attr, operator]
        shares += share.low <= 0.05 <= share.high  # type: ignore[union-attr, operator]

    assert means / 2000 == pytest.approx(0.95, abs=0.02)
    assert ratios / 2000 == pytest.approx(0.95, abs=0.02)
    assert shares / 2000 == pytest.approx(0.95, abs=0.03)


@given(one=positive, other=positive)
def test_a_over_b_is_one_over_b_over_a(one: list[float], other: list[float]) -> None:
    there, back = stats.ratio(one, other), stats.ratio(other, one)

    assert there is not None
    assert back is not None
    assert there.value * back.value == pytest.approx(1)
    assert there.value == pytest.approx(math.exp(fmean(map(math.log, one)) - fmean(map(math.log, other))))
    if there.low is not None:
        assert back.high is not None
        assert there.low * back.high == pytest.approx(1, rel=1e-6) or back.high > 1e200


def test_nothing_is_times_zero() -> None:
    assert stats.ratio([1.0, 2.0], [0.0, 1.0]) is None
    assert stats.ratio([], [1.0]) is None


def test_no_failure_among_few_does_not_prove_that_there_are_none() -> None:
    # 3.84 / (n + 3.84): it takes 73 requests to show that at most one in twenty fails.
    few, enough = stats.share(0, 72), stats.share(0, 73)

    assert few is not None
    assert enough is not None
    assert few.high is not None
    assert enough.high is not None
    assert few.high > 0.05 > enough.high
    assert stats.share(0, 0) is None
