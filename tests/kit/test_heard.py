"""How it was to listen; and bodies that are no sound."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatterbox_deploy.bench import heard
from chatterbox_deploy.bench.heard import Playback


@pytest.mark.parametrize(
    ("arrivals", "expected"),
    [
        pytest.param([], Playback(0, 0.0, 0.0), id="nothing came"),
        pytest.param([(1.0, 5.0)], Playback(0, 0.0, 0.0), id="all at once"),
        pytest.param([(1.0, 2.0), (2.5, 4.0), (4.5, 6.0)], Playback(0, 0.0, 2.0), id="always a second ahead"),
        # 1 s came at 10; the next after 3: silence from 11 to 13.
        pytest.param([(10.0, 1.0), (13.0, 2.0)], Playback(1, 2.0, 3.0), id="one stall"),
        # After it the listener is behind: 2 s last from 10 to 11 and from 13 to 14.
        pytest.param([(10.0, 1.0), (13.0, 2.0), (13.9, 3.0)], Playback(1, 2.0, 3.0), id="and then in time"),
        pytest.param([(10.0, 1.0), (13.0, 2.0), (15.0, 3.0)], Playback(2, 3.0, 3.0), id="and again"),
        pytest.param([(0.0, 1.0), (1.005, 2.0)], Playback(0, 0.0, 1.005), id="what the sound card covers"),
    ],
)
def test_a_listener_hears_a_stall_when_nothing_is_left_to_play(
    arrivals: list[tuple[float, float]], expected: Playback
) -> None:
    found = heard.playback(arrivals)

    assert found.stalls == expected.stalls
    assert (found.stalled_s, found.longest_gap_s) == pytest.approx((expected.stalled_s, expected.longest_gap_s))


@given(gaps=st.lists(st.tuples(st.floats(0, 5), st.floats(0.01, 5)), min_size=1, max_size=20))
def test_whoever_begins_later_by_all_stalls_hears_none(gaps: list[tuple[float, float]]) -> None:
    arrivals, at_s, had_s = [], 0.0, 0.0
    for gap_s, more_s in gaps:
        at_s, had_s = at_s + gap_s, had_s + more_s
        arrivals.append((at_s, had_s))
    first = heard.playback(arrivals)

    # As if the first sound had come so much later.
    later = [(arrivals[0][0] + first.stalled_s, arrivals[0][1])]
    later += [(max(at_s, later[0][0]), had_s) for at_s, had_s in arrivals[1:]]

    assert heard.playback(later).stalled_s <= 0.011 * len(gaps)


@given(body=st.binary(max_size=300), audio_format=st.sampled_from(heard.FORMATS))
def test_no_bytes_make_it_stumble(body: bytes, audio_format: heard.Format) -> None:
    found = heard.audio_s(body, audio_format)

    assert found is None or found >= 0


def test_an_error_in_json_is_no_wav() -> None:
    assert heard.audio_s(b'{"error": {"message": "the queue is full"}}', "wav") is None
