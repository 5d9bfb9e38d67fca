"""Pieces become one sound: no click, no long silence, the pause that was asked for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from chatterbox_server.joints import MARGIN_S, Joints

RATE_HZ = 24_000


def silence(seconds: float) -> NDArray[np.float32]:
    return np.zeros(round(seconds * RATE_HZ), np.float32)


def a_tone(seconds: float, *, level: float = 0.5) -> NDArray[np.float32]:
    time_s = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    tone: NDArray[np.float32] = (level * np.cos(2 * np.pi * 200 * time_s)).astype(np.float32)
    return tone


def test_pieces_at_full_level_join_without_a_click() -> None:
    joints = Joints(RATE_HZ)
    high, low = np.ones(RATE_HZ, np.float32), -np.ones(RATE_HZ, np.float32)

    joined = np.concatenate([joints.join(piece, pause_s) for piece, pause_s in ((high, 0.0), (low, 0.3), (high, 0.0))])

    assert np.abs(np.diff(np.concatenate((silence(0.1), joined, silence(0.1))))).max() < 0.02
    assert joined.size == round(3.3 * RATE_HZ)


def test_long_silence_goes_and_a_margin_stays() -> None:
    joined = Joints(RATE_HZ).join(np.concatenate((silence(0.5), a_tone(1.0), silence(2.0))), 0.25)

    assert joined.size / RATE_HZ == pytest.approx(1.0 + 2 * MARGIN_S + 0.25, abs=0.021)
    np.testing.assert_array_equal(joined[-round(0.25 * RATE_HZ) :], 0.0)


def test_hiss_below_the_threshold_is_silence_and_a_quiet_consonant_is_not() -> None:
    dice = np.random.default_rng(0)
    hiss = dice.normal(0, 0.0005, RATE_HZ).astype(np.float32)
    consonant = dice.normal(0, 0.005, RATE_HZ // 5).astype(np.float32)

    joined = Joints(RATE_HZ).join(np.concatenate((hiss, consonant, a_tone(1.0), consonant, hiss)), 0.0)

    assert joined.size / RATE_HZ == pytest.approx(1.4 + 2 * MARGIN_S, abs=0.021)


def test_what_lies_within_the_edges_is_left_alone() -> None:
    sound = np.concatenate((a_tone(0.5), silence(1.0), a_tone(0.5)))
    joined = Joints(RATE_HZ).join(sound, 0.0)
    np.testing.assert_array_equal(joined[200:-200], sound[200:-200])


def test_a_piece_that_is_all_silence_leaves_a_little() -> None:
    assert Joints(RATE_HZ).join(silence(5.0), 0.0).size == round(2 * MARGIN_S * RATE_HZ)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_sound_passes_as_it_is(bad: float) -> None:
    samples = np.array([0.5, bad, 0.5], np.float32)
    np.testing.assert_array_equal(Joints(RATE_HZ).join(samples, 0.5), samples)
    assert Joints(RATE_HZ).join(np.zeros(0, np.float32), 0.5).size == 0
    assert Joints(RATE_HZ).join(np.zeros((2, 2), np.float32), 0.5).shape == (2, 2)


finite = arrays.arrays(np.float32, st.integers(1, 3000), elements=st.floats(-1, 1, width=32))


@given(samples=finite, pause_s=st.floats(0, 2), rate_hz=st.sampled_from([8_000, 22_050, 24_000, 48_000]))
def test_no_sound_becomes_longer_louder_or_nothing(samples: NDArray[np.float32], pause_s: float, rate_hz: int) -> None:
    before = samples.copy()
    pause = round(pause_s * rate_hz)

    joined = Joints(rate_hz).join(samples, pause_s)

    assert joined.dtype == np.float32
    assert 1 <= joined.size - pause <= samples.size
    assert np.abs(joined).max() <= np.abs(samples).max()
    np.testing.assert_array_equal(samples, before)
