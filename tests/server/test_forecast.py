"""What the last utterances foretell: how long the next one takes, when it is stuck, and whose time it was."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatterbox_server.forecast import RECENT, Forecast, SharedTime


def a_forecast(recent: list[tuple[int, float]]) -> Forecast:
    forecast = Forecast()
    for chars, work_s in recent:
        forecast.measured(chars, work_s=work_s, share_s=work_s / 2)
    return forecast


@pytest.mark.parametrize(
    ("recent", "expected_s"),
    [
        ([], 120.0),
        ([(100, 1.0)] * (RECENT - 1), 120.0),
        ([(100, 1.0)] * RECENT, 30.0),
        ([(100, 8.0)] * RECENT, 80.0),
        ([(100, 20.0)] * RECENT, 120.0),
        # What was long ago is forgotten.
        ([(100, 20.0)] * RECENT + [(100, 8.0)] * RECENT, 80.0),
    ],
)
def test_patience_follows_the_measured_pace_within_bounds(recent: list[tuple[int, float]], expected_s: float) -> None:
    assert a_forecast(recent).patience_s(100, longest_s=120.0) == pytest.approx(expected_s)


@pytest.mark.parametrize(
    ("recent", "expected_s"),
    [([], 1.0), ([(100, 4.0)], 2.0), ([(100, 4.0), (300, 4.0)], 1.0), ([(0, 0.0)], 1.0)],
)
def test_the_time_of_fifty_characters_follows_the_measured_pace(
    recent: list[tuple[int, float]], expected_s: float
) -> None:
    forecast = a_forecast(recent)
    assert forecast.work_s(50) == pytest.approx(expected_s)
    if expected_s != 1.0:
        assert forecast.share_s(50) == pytest.approx(expected_s / 2)


def test_two_at_once_share_the_time() -> None:
    time = SharedTime()
    alone = time.come(0.0)
    joins = time.come(4.0)
    assert time.leave(alone, 10.0) == pytest.approx(4.0 + 6.0 / 2)
    assert time.leave(joins, 11.0) == pytest.approx(6.0 / 2 + 1.0)
    # Nobody had what lay between.
    assert time.leave(time.come(100.0), 103.0) == pytest.approx(3.0)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0.001, 50)), min_size=1, max_size=20))
def test_the_shares_add_up_to_the_time_in_which_there_was_any(utterances: list[tuple[float, float]]) -> None:
    events = sorted(
        [(began_s, 1, number) for number, (began_s, _) in enumerate(utterances)]
        + [(began_s + lasts_s, 0, number) for number, (began_s, lasts_s) in enumerate(utterances)]
    )
    time, came, shares_s, busy_s, before_s, in_hand = SharedTime(), {}, 0.0, 0.0, 0.0, 0
    for now_s, comes, number in events:
        busy_s += (now_s - before_s) * bool(in_hand)
        before_s = now_s
        in_hand += 1 if comes else -1
        if comes:
            came[number] = time.come(now_s)
        else:
            shares_s += time.leave(came[number], now_s)
    assert shares_s == pytest.approx(busy_s)
