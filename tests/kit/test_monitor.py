"""What `monitor` makes of one look after the other: rows, events, curves. No host is asked."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_deploy import exposition, fleet, nginx, systemd
from chatterbox_deploy.cli import monitor_view
from chatterbox_deploy.config import reading
from chatterbox_deploy.gpu.cards import Card
from chatterbox_deploy.monitor import conditions, curves, following, gauges
from chatterbox_deploy.monitor.conditions import Limits
from chatterbox_deploy.monitor.story import Look, Story
from chatterbox_deploy.nginx import Request
from chatterbox_deploy.status.found import Found, Readiness, Unit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatterbox_deploy.exposition import Exposition
    from chatterbox_deploy.monitor.picture import Picture

FLEET = fleet.resolve(reading.load("[gpus]\n0 = 6093\n1 = 6094\n[server]\nqueue_size = 4\n", source="f"))
BEGIN = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
ACTIVE = Unit(load="loaded", active="active", sub="running", restarts=0)
READY = Readiness(
    ready=True, draining=False, waiting=0, running=1, spoken=0, gpu_memory_bytes=None, invocation_id="life"
)
CARD = Card(
    index="0",
    uuid="GPU-1",
    name="NVIDIA GeForce RTX 3090",
    memory_used_bytes=9_126 * 2**20,
    memory_total_bytes=24_576 * 2**20,
    utilisation_percent=60.0,
    temperature_c=61.0,
    power_w=212.0,
    power_limit_w=350.0,
    p_state="P2",
    throttled_by=(),
)


def counted(
    *, audio: float = 0, synthesis: float = 0, answered: int = 0, started: int = 1000, **failures: int
) -> Exposition:
    """What an instance would tell that has spoken so much; each request waited 0.5 s."""
    text = f"""
# TYPE process_start_time_seconds gauge
process_start_time_seconds {started}
# TYPE chatterbox_audio_seconds_total counter
chatterbox_audio_seconds_total {audio}
# TYPE chatterbox_synthesis_seconds_total counter
chatterbox_synthesis_seconds_total {synthesis}
# TYPE chatterbox_requests_total counter
chatterbox_requests_total{{route="/v1/audio/speech",outcome="answered"}} {answered}
chatterbox_requests_total{{route="/metrics",outcome="answered"}} 977
# TYPE chatterbox_queue_wait_seconds histogram
chatterbox_queue_wait_seconds_bucket{{le="+Inf"}} {answered}
chatterbox_queue_wait_seconds_count {answered}
chatterbox_queue_wait_seconds_sum {answered / 2}
# TYPE chatterbox_engine_failures_total counter
"""
    text += "".join(f'chatterbox_engine_failures_total{{kind="{kind}"}} {n}\n' for kind, n in failures.items())
    found = exposition.parse(text)
    assert found is not None
    return found


def look(at_s: float = 0, **changes: Any) -> Look:
    """Both instances are well and have done nothing yet; but for these changes, of the look or of what it found."""
    units = {systemd.unit_name(name): ACTIVE for name in ("gpu0", "gpu1")} | {systemd.NGINX_UNIT: ACTIVE}
    found = Found(units=units, texts={}, readiness={"gpu0": READY, "gpu1": READY}, front_answers=True)
    names = Found.__dataclass_fields__
    found = replace(found, monotonic_s=at_s, **{name: changes.pop(name) for name in sorted(changes) if name in names})
    told = {"gpu0": counted(), "gpu1": counted()}
    made = Look(time=BEGIN + timedelta(seconds=at_s), found=found, counts=told, cards=(CARD,), requests=())
    return replace(made, **changes)


def follow(*looks: Look, allowed: Limits | None = None) -> Story:
    story = Story()
    for each in looks:
        story = following.follow(story, each, FLEET, allowed or Limits())
    return story


def picture(*looks: Look) -> Picture:
    seen = follow(*looks).picture
    assert seen is not None
    return seen


def told(*looks: Look, allowed: Limits | None = None) -> list[list[str]]:
    """What each look says that the one before did not."""
    story, said = Story(), []
    for each in looks:
        story = following.follow(story, each, FLEET, allowed or Limits())
        assert story.picture is not None
        said.append([f"{event.phase} {event.severity} {event.about}: {event.text}" for event in story.picture.new])
    return said


def gpu0(**changes: Any) -> dict[str, Readiness | None]:
    return {"gpu0": replace(READY, **changes), "gpu1": READY}


# Rates


def test_rates_are_of_the_time_between_the_looks() -> None:
    after = {"gpu0": counted(audio=20, synthesis=5, answered=4), "gpu1": counted()}

    row, idle = picture(look(0), look(10, counts=after)).instances

    assert (row.window_s, row.audio_s_per_s, row.rtf, row.busy_percent) == (10, 2.0, 0.25, 50.0)
    assert (row.requests_per_s, row.wait_s) == (0.4, 0.5)
    assert (idle.audio_s_per_s, idle.rtf, idle.wait_s) == (0.0, None, None)
    assert row.outcomes == {"answered": 4, "refused": 0, "busy": 0, "failed": 0, "left": 0, "cut": 0}


def test_after_one_look_no_rate_is_known() -> None:
    row = picture(look(0)).instances[0]

    assert (row.window_s, row.audio_s_per_s, row.requests_per_s, row.rtf) == (None, None, None, None)
    assert row.outcomes is not None


def test_the_window_is_the_last_minute() -> None:
    looks = [look(10 * n, counts={"gpu0": counted(audio=100 if n else 0)}) for n in range(8)]

    assert picture(*looks[:2]).instances[0].audio_s_per_s == 10
    assert picture(*looks[:7]).instances[0].audio_s_per_s == pytest.approx(100 / 60)
    assert picture(*looks).instances[0].audio_s_per_s == 0


def test_a_restart_neither_loses_nor_invents_sound() -> None:
    row = picture(
        look(0, counts={"gpu0": counted(audio=1000)}),
        look(2, counts={"gpu0": counted(audio=1002)}),
        look(4, counts={"gpu0": counted(audio=6, started=2000)}),
    ).instances[0]

    assert row.audio_s_per_s == 2.0


def test_whoever_did_not_answer_once_is_counted_over_the_gap() -> None:
    away = look(2, counts={"gpu1": counted()}, readiness={"gpu0": None, "gpu1": READY})
    looks = [look(0), away, look(4, counts={"gpu0": counted(audio=8), "gpu1": counted()})]

    assert picture(*looks[:2]).instances[0].audio_s_per_s is None
    assert picture(*looks).instances[0].audio_s_per_s == 2.0
    assert picture(*looks).audio_s_per_s == 2.0


def test_a_server_of_the_operators_own_tells_nothing_and_that_is_no_0() -> None:
    row = picture(look(0, readiness={}, counts={}), look(2, readiness={}, counts={})).instances[0]

    assert (row.unit, row.ready, row.waiting, row.audio_s_per_s, row.outcomes) == ("active/running", *[None] * 4)
    assert not row.lost


# The front


def request(at_s: float, status: int = 200, *asked: tuple[int, int | None], duration_s: float = 1.0) -> Request:
    passes = tuple((f"127.0.0.1:{port}", answer) for port, answer in asked)
    last = {6093: "gpu0", 6094: "gpu1"}[asked[-1][0]] if asked else None
    return Request(BEGIN + timedelta(seconds=at_s), status, last, duration_s, passes)


def test_the_front_says_who_answered_who_was_asked_in_vain_and_what_went_wrong() -> None:
    requests = (
        request(0, 200, (6093, 200), duration_s=1),
        request(0, 200, (6093, 502), (6094, 200), duration_s=3),
        request(0, 503, (6093, 503), (6094, 503)),
        request(0, 502, (6094, 502), (6093, 502)),
        request(0, 401),
    )

    front = picture(look(0, requests=requests)).front

    assert (front.requests, front.errors, front.refused, front.retried) == (5, 1, 1, 3)
    assert [(row.instance, row.requests, row.errors, row.refused, row.passed_on) for row in front.rows or ()] == [
        ("gpu0", 2, 1, 0, 2),
        ("gpu1", 2, 0, 1, 1),
        ("front", 1, 0, 0, 0),
    ]


def test_requests_leave_the_window_after_a_minute() -> None:
    looks = [look(0, requests=(request(0, 200, (6093, 200)),)), look(50), look(70)]

    assert picture(*looks[:2]).front.requests == 1
    assert picture(*looks).front.requests == 0


def test_a_log_that_cannot_be_read_leaves_the_requests_unknown() -> None:
    front = picture(look(0, requests=None)).front

    assert (front.requests, front.errors, front.rows) == (None, None, None)


@pytest.mark.parametrize(
    ("tries", "tried", "asked"),
    [
        ("200", "127.0.0.1:6093", (("127.0.0.1:6093", 200),)),
        ("502 : 200", "127.0.0.1:6093 : 127.0.0.1:6094", (("127.0.0.1:6093", 502), ("127.0.0.1:6094", 200))),
        ("502, 200", "127.0.0.1:6093, 127.0.0.1:6094", (("127.0.0.1:6093", 502), ("127.0.0.1:6094", 200))),
        ("-", "127.0.0.1:6093", (("127.0.0.1:6093", None),)),
        ("502 : -", "127.0.0.1:6093 : 127.0.0.1:6094", (("127.0.0.1:6093", 502), ("127.0.0.1:6094", None))),
        ("", "", ()),
    ],
)
def test_a_line_of_the_log_tells_every_pass(tries: str, tried: str, asked: Sequence[tuple[str, int | None]]) -> None:
    line = {"time": "2026-01-01T12:00:00+00:00", "status": 200, "instance": "gpu0", "duration_s": 0.053, "uri": "/a?b"}

    parsed = nginx.parse_request(json.dumps({**line, "tries": tries, "tried": tried}).encode())

    assert parsed == Request(BEGIN, 200, "gpu0", 0.053, tuple(asked), "/a")


@pytest.mark.parametrize(
    "line", [b"", b"[]", b"null", b'{"time":"2026-01-01T12:00:00+00:00","status":2', b'{"time": "now"}', b"\xff"]
)
def test_half_a_line_or_somebody_elses_tells_nothing(line: bytes) -> None:
    assert nginx.parse_request(line) is None


# Events


def test_what_goes_wrong_is_said_once_when_it_begins_and_once_when_it_ends() -> None:
    away: dict[str, Any] = {"readiness": {"gpu0": None, "gpu1": READY}, "counts": {"gpu1": counted()}}

    assert told(look(0), look(2, **away), look(4, **away), look(6)) == [
        [],
        ["begins critical gpu0: does not answer, its unit is active/running"],
        [],
        ["ends critical gpu0: does not answer, its unit is active/running"],
    ]
    story = follow(look(0), look(2, **away), look(4, **away), look(6))
    assert [event.lasted_s for event in story.events] == [None, 4.0]
    assert story.picture is not None
    assert story.picture.now == ()


TABLE: list[tuple[dict[str, Any], list[str]]] = [
    ({"readiness": gpu0(waiting=4)}, ["begins warning gpu0: its queue is full: 4 wait"]),
    ({"readiness": gpu0(ready=False)}, ["begins critical gpu0: not ready: its engine is dead or stuck"]),
    ({"readiness": gpu0(ready=False, draining=True)}, ["begins note gpu0: ends, and finishes what it began"]),
    ({"front_answers": False}, ["begins critical front: does not answer on 127.0.0.1:6095"]),
    ({"cards": (replace(CARD, temperature_c=85.0),)}, ["begins warning GPU 0: is hot: 85 °C"]),
    ({"cards": (replace(CARD, temperature_c=84.9),)}, []),
    ({"cards": (replace(CARD, temperature_c=None),)}, []),
    (
        {"cards": (replace(CARD, throttled_by=("hw_thermal_slowdown", "sw_power_cap")),)},
        [
            "begins warning GPU 0: is slowed down: hw_thermal_slowdown",
            "begins note GPU 0: is slowed down: sw_power_cap",
        ],
    ),
    (
        {"cards": (replace(CARD, memory_used_bytes=24_000 * 2**20),)},
        ["begins warning GPU 0: is full: 98 % of its memory is used"],
    ),
    ({"cards": None}, ["begins critical GPU 0: does not answer any more"]),
    (
        {"cards": (Card(index="0", uuid="", name="a GPU that does not answer (GPU is lost)"),)},
        ["begins critical GPU 0: does not answer any more"],
    ),
    (
        {"requests": tuple(request(2, status, (6093, status)) for status in [200] * 95 + [502] * 5)},
        ["begins critical front: 5.0 % of its answers are errors"],
    ),
    (
        {"requests": tuple(request(2, status, (6093, status)) for status in [200] * 9 + [503])},
        ["begins warning front: 10.0 % of requests find every queue full"],
    ),
    (
        {"counts": {"gpu0": counted(audio=10, synthesis=13)}},
        ["begins warning gpu0: slower than the listener: 1.30 s for 1 s of sound"],
    ),
    ({"counts": {"gpu0": counted(started=2000)}}, ["happens warning gpu0: has restarted"]),
    ({"counts": {"gpu0": counted(out_of_memory=1)}}, ["happens warning gpu0: ran out of GPU memory"]),
    (
        {"counts": {"gpu0": counted(odd_piece=3)}},
        ["happens note gpu0: spoke a piece again whose length did not fit its text (3 times)"],
    ),
]


@pytest.mark.parametrize(("changes", "expected"), TABLE)
def test_events_read_like_this(changes: dict[str, Any], expected: list[str]) -> None:
    assert told(look(0), look(2, **changes)) == [[], expected]


def test_every_event_that_begins_says_what_to_type_but_for_a_drain() -> None:
    for changes, _ in TABLE:
        for event in follow(look(0), look(2, **changes)).events:
            assert event.do or "ends, and finishes" in event.text


def test_a_dead_unit_of_any_server_is_lost_and_its_restart_is_told() -> None:
    dead = Unit(load="loaded", active="failed", sub="failed", restarts=3)
    again = replace(ACTIVE, restarts=4)

    def seen(at_s: float, unit: Unit) -> Look:
        return look(at_s, readiness={}, counts={}, units={systemd.unit_name("gpu0"): unit})

    assert told(seen(0, ACTIVE), seen(2, dead), seen(4, again)) == [
        [],
        ["happens warning gpu0: has restarted", "begins critical gpu0: does not answer, its unit is failed/failed"],
        ["happens warning gpu0: has restarted", "ends critical gpu0: does not answer, its unit is failed/failed"],
    ]


def test_a_temperature_at_its_limit_does_not_begin_and_end_all_the_time() -> None:
    degrees = [85.0, 84.0, 85.0, 83.0, 82.0, 81.9, 84.0]
    looks = [look(2 * n, cards=(replace(CARD, temperature_c=each),)) for n, each in enumerate(degrees)]

    assert [event.phase for event in follow(*looks).events] == ["begins", "ends"]


def test_what_comes_and_goes_with_every_look_is_one_event() -> None:
    full = {"readiness": gpu0(waiting=4)}
    looks = [look(2 * n, **(full if n in (1, 3, 5) else {})) for n in range(12)]

    story = follow(*looks)

    assert [(event.phase, event.lasted_s) for event in story.events] == [("begins", None), ("ends", 8.0)]
    assert [len(follow(*looks[: n + 1]).going_on) for n in range(12)] == [0, *[1] * 9, 0, 0]


def test_limits_can_be_moved() -> None:
    assert told(look(0), allowed=conditions.limits({"temperature_c": "60"})) == [
        ["begins warning GPU 0: is hot: 61 °C"]
    ]
    with pytest.raises(ValueError, match="there is no limit 'heat'; there are temperature_c, gpu_memory_percent"):
        conditions.limits({"heat": "60"})


def test_somebody_critical_is_not_well() -> None:
    assert picture(look(0)).well
    assert picture(look(0, cards=(replace(CARD, temperature_c=99.0),))).well
    assert not picture(look(0, front_answers=False)).well


# Curves


def test_a_curve_has_the_mean_of_each_part_and_gaps_where_nothing_is_known() -> None:
    values = [10.0, 30.0, None, 50.0]
    looks = [look(10 * n, cards=(replace(CARD, utilisation_percent=each),)) for n, each in enumerate(values)]

    assert curves.curve(follow(*looks), "gpu 0", cells=4, span_s=40) == (10, 30, None, 50)
    assert curves.curve(follow(*looks), "gpu 0", cells=3, span_s=60) == (None, 20, 50)
    assert curves.curve(follow(*looks), "gpu 7", cells=2, span_s=60) == (None, None)


# For other programs


def test_json_has_null_for_what_is_unknown() -> None:
    told = json.loads(json.dumps(picture(look(0, cards=None, requests=None, units=None)).as_json()))

    assert told["gpus"] is None
    assert told["front"]["requests"] is None
    assert told["instances"][0]["rtf"] is None
    assert told["window_s"] is None
    assert told["time"] == "2026-01-01T12:00:00.000+00:00"


def test_the_textfile_holds_what_is_known_and_no_more() -> None:
    text = exposition.write(gauges.of(picture(look(0, requests=(request(0, 502, (6093, 502)),) * 6))))
    read = exposition.parse(text)
    assert read is not None

    assert read.total("chatterbox_monitor_gpu_temperature_celsius", gpu="0") == 61
    assert read.total("chatterbox_monitor_gpu_utilisation_ratio", gpu="0") == 0.6
    assert read.total("chatterbox_monitor_gpu_sm_active_ratio") is None
    assert read.total("chatterbox_monitor_instance_up", instance_name="gpu1") == 1
    assert read.total("chatterbox_monitor_front_errors_per_second", instance_name="gpu0") == 0.1
    assert read.value("chatterbox_monitor_last_look_timestamp_seconds") == BEGIN.timestamp()


def test_a_line_of_csv_is_one_quantity_and_empty_if_unknown() -> None:
    lines = set(gauges.cells(picture(look(0))))

    assert ("gpu", "0", "power_w", 212.0) in lines
    assert ("gpu", "0", "sm_active_percent", None) in lines
    assert ("instance", "gpu1", "ready", "ready") in lines
    assert ("front", "", "requests", 0) in lines


# The view


def seen_in(story: Story, **options: Any) -> str:
    return "\n".join(line.plain.rstrip() for line in monitor_view.lines(story, **options))


def busy(at_s: float, **changes: Any) -> Look:
    after = {
        "gpu0": counted(audio=at_s, synthesis=at_s / 2, answered=round(at_s)),
        "gpu1": counted(audio=2 * at_s, synthesis=at_s / 2, answered=round(2 * at_s)),
    }
    return look(at_s, counts=after, requests=(request(at_s, 200, (6093, 200)),), **changes)


def test_in_a_wide_terminal_everything_is_shown() -> None:
    story = follow(busy(0), busy(10), busy(20, readiness=gpu0(waiting=4)))

    assert (
        seen_in(story, width=160)
        == (
            """
12:00:20 UTC · rates of the last 20 s · 3.00 s of sound per second
warning for 0s: gpu0 its queue is full: 4 wait: chatterbox-deploy advise

GPU  name                             memory  util  SM   temp         power  state  slowed by  last 5 min
0    NVIDIA GeForce RTX 3090  9.6 of 25.8 GB  60 %   -  61 °C  212 of 350 W     P2  no                           ▅▅

instance  GPU  unit            ready  queue  in flight    wait  first byte   RTF  audio s/s  tokens/s  req/s  busy  restarts  last 5 min
gpu0      0    active/running  ready      4          1  0.50 s           -  0.50       1.00         -   1.00  50 %         0                     █
gpu1      1    active/running  ready      0          1  0.50 s           -  0.25       2.00         -   2.00  50 %         0                     █

front 127.0.0.1:6095 answers, nginx is active; in the last 60 s 3 requests, 0 errors, 0 refused, 0 retried
requests per second, last 5 min:                    █
front  requests  share  errors  refused  passed on     p50     p95
gpu0          3  100 %       0        0          0  1.00 s  1.00 s
gpu1          0    0 %       0        0          0       -       -

12:00:20 warning: gpu0 its queue is full: 4 wait
"""[1:-1]  # noqa: E501  as wide as it is
        )
    )


def test_in_a_narrow_terminal_the_rest_goes_first() -> None:
    story = follow(busy(0), busy(10, readiness={"gpu0": None, "gpu1": READY}))

    assert (
        seen_in(story, width=40)
        == (
            """
12:00:10 · 10 s · 3.00x
critical for 0s: gpu0 does not answer,
  its unit is active/running:
  chatterbox-deploy logs gpu0

GPU          memory  util   temp
0    9.6 of 25.8 GB  60 %  61 °C

instance  ready      queue  audio s/s
gpu0      no answer      -       1.00
gpu1      ready          0       2.00

front 127.0.0.1:6095 answers, nginx is
  active; in the last 60 s 2 requests, 0
  errors, 0 refused, 0 retried
front  requests  errors  passed on
gpu0          2       0          0
gpu1          0       0          0

12:00:10 critical: gpu0 does not answer,
  its unit is active/running
"""[1:-1]
        )
    )


@pytest.mark.parametrize("width", [8, 20, 40, 80, 120])
@pytest.mark.parametrize("height", [1, 5, 24])
def test_whatever_the_terminal_nothing_is_wider_or_higher(width: int, height: int) -> None:
    away = {"readiness": {"gpu0": None, "gpu1": None}, "front_answers": False, "cards": None, "requests": None}
    for story in (Story(), follow(busy(0)), follow(busy(0), look(10, notes=("it is as it is. " * 20,), **away))):
        lines = monitor_view.lines(story, width=width, height=height)

        assert len(lines) <= height
        assert max(line.cell_len for line in lines) <= width


def test_a_terminal_that_knows_only_ascii_gets_no_more() -> None:
    story = follow(busy(0), busy(10), busy(20, readiness=gpu0(waiting=4)))

    shown = seen_in(story, width=None, plain=True)

    assert shown.isascii()
    assert "?" not in shown


def test_without_a_gpu_and_with_nobody_there_the_rest_is_shown() -> None:
    nobody = {"units": None, "readiness": {"gpu0": None, "gpu1": None}, "counts": {}, "cards": None, "requests": None}

    shown = seen_in(follow(look(0, **nobody, front_answers=False)), width=None)

    assert "gpu0      0    -     no answer      -" in shown
    assert "front 127.0.0.1:6095 does not answer\n" in shown
    assert "\nGPU  name" not in shown
