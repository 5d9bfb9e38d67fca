"""What an instance counts, from text to sums."""

from __future__ import annotations

import pytest

from chatterbox_deploy import exposition
from chatterbox_deploy.exposition import Gauge

BEFORE = """
# TYPE process_start_time_seconds gauge
process_start_time_seconds 1000
# TYPE requests_total counter
requests_total{route="/a",outcome="answered"} 10
requests_total{route="/b",outcome="answered"} 5
# TYPE waits histogram
waits_bucket{le="1.0"} 1
waits_bucket{le="2.0"} 1
waits_bucket{le="+Inf"} 1
waits_count 1
waits_sum 0.5
# TYPE waiting gauge
waiting 3
# TYPE unknown gauge
unknown NaN
"""
AFTER = (
    BEFORE.replace("} 10", "} 14")
    .replace('waits_bucket{le="1.0"} 1', 'waits_bucket{le="1.0"} 2')
    .replace('waits_bucket{le="2.0"} 1', 'waits_bucket{le="2.0"} 4')
    .replace('waits_bucket{le="+Inf"} 1', 'waits_bucket{le="+Inf"} 5')
    .replace("waits_count 1", "waits_count 5")
    .replace("waits_sum 0.5", "waits_sum 8.5")
)


def parsed(text: str) -> exposition.Exposition:
    found = exposition.parse(text)
    assert found is not None
    return found


def test_samples_are_summed_over_what_is_not_asked_for() -> None:
    told = parsed(BEFORE)

    assert told.total("requests_total") == 15
    assert told.total("requests_total", route="/a") == 10
    assert told.by("requests_total", "route") == {"/a": 10, "/b": 5}
    assert told.only("requests_total", "route", ["/b"]).by("requests_total", "outcome") == {"answered": 5}
    assert told.value("waiting") == 3


def test_what_is_not_told_is_unknown_and_not_0() -> None:
    told = parsed(BEFORE)

    assert told.total("other_total") is None
    assert told.value("other") is None
    assert told.value("unknown") is None
    assert exposition.mean(parsed(BEFORE), "other") is None
    assert exposition.quantile(parsed(BEFORE), "other", 0.5) is None


@pytest.mark.parametrize("text", ["", "<h1>Not Found</h1>", "requests_total{", "requests_total many", "\0"])
def test_another_answer_is_no_exposition(text: str) -> None:
    assert exposition.parse(text) is None


def test_an_increase_is_of_what_only_grows() -> None:
    grown = exposition.increase(parsed(BEFORE), parsed(AFTER))

    assert grown.total("requests_total") == 4
    assert grown.value("waiting") is None
    assert exposition.mean(grown, "waits") == 2.0


def test_a_process_that_restarted_has_counted_from_0() -> None:
    after = AFTER.replace("process_start_time_seconds 1000", "process_start_time_seconds 2000")

    assert exposition.increase(parsed(BEFORE), parsed(after)).total("requests_total") == 19


def test_a_count_that_fell_began_anew_though_no_start_is_told() -> None:
    before, after = (text.replace("process_start_time_seconds 1000", "") for text in (AFTER, BEFORE))

    assert exposition.increase(parsed(before), parsed(after)).total("requests_total") == 10


def test_increases_add_up() -> None:
    once = exposition.increase(parsed(BEFORE), parsed(AFTER))

    assert exposition.add([once, once]).total("requests_total") == 8
    assert exposition.add([]).total("requests_total") is None


@pytest.mark.parametrize(("share", "expected"), [(0.25, 1.0), (0.5, 1 + 1 / 2), (0.75, 2.0), (0.99, 2.0)])
def test_a_quantile_is_linear_within_a_bucket_as_prometheus_has_it(share: float, expected: float) -> None:
    # Of four new ones: one up to 1 s, two up to 2 s, one beyond every finite bound.
    assert exposition.quantile(exposition.increase(parsed(BEFORE), parsed(AFTER)), "waits", share) == expected


def test_what_is_written_can_be_read_and_leaves_out_what_is_unknown() -> None:
    text = exposition.write(
        [
            Gauge("power_watts", "Power.", ("gpu", "name"), [(("0", 'H"200\n'), 71.5), (("1", "x"), None)]),
            Gauge("nobody_knows", "Nothing.", (), [((), None)]),
        ]
    )

    assert exposition.parse(text) == exposition.Exposition(
        {"power_watts": {(("gpu", "0"), ("name", 'H"200\n')): 71.5}}, frozenset()
    )
    assert "nobody_knows" not in text
