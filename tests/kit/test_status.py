"""What `status` makes of what a host told. Rows and words; no host is asked."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from chatterbox_deploy import fleet, nginx, render, systemd
from chatterbox_deploy.cli.status import show
from chatterbox_deploy.config import reading
from chatterbox_deploy.status import rows
from chatterbox_deploy.status.found import Found, Readiness, Unit, read_readiness, read_unit
from chatterbox_deploy.status.table import duration, size
from chatterbox_deploy.templates import Templates

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatterbox_deploy.fleet import Upstream
    from chatterbox_deploy.status.rows import Report, Row

SOURCE = "/etc/chatterbox-tts/fleet.toml"
TWO = "[gpus]\n0 = 6093\n1 = [6094]\n"
SHOWN = (Path(__file__).parents[1] / "recorded/systemctl-show.systemd-252.txt").read_text()

ACTIVE = Unit(
    load="loaded",
    active="active",
    sub="running",
    file_state="static",
    restarts=0,
    main_pid=7,
    exit_status=0,
    memory_bytes=3_100_000_000,
    active_at_s=1000.0,
    invocation_id="life",
)
READY = Readiness(
    ready=True,
    draining=False,
    waiting=2,
    running=1,
    spoken=340,
    gpu_memory_bytes=4_060_000_000,
    invocation_id="life",
)
TARGET = Unit(load="loaded", active="active", sub="active", file_state="enabled")
NGINX = Unit(load="loaded", active="active", sub="running", memory_bytes=4_000_000)


def resolve(text: str) -> fleet.Fleet:
    return fleet.resolve(reading.load(text, source="fleet.toml"))


def rendered(text: str) -> tuple[render.RenderedFile, ...]:
    return render.render(resolve(text), Templates(), source=SOURCE)


def as_it_should_be(text: str = TWO) -> Found:
    """A host on which all is well."""
    resolved, files = resolve(text), rendered(text)
    units = {systemd.unit_name(instance.name): ACTIVE for instance in resolved.instances}
    marks = {file.path.name: systemd.find_mark(file.text) for file in files if file.path.name in units}
    return Found(
        units={**units, systemd.TARGET: TARGET, systemd.NGINX_UNIT: NGINX, systemd.RECYCLE_TIMER: TARGET},
        texts={file.path: file.text for file in files},
        running=marks,
        readiness={instance.name: READY for instance in resolved.instances},
        front_answers=True,
        monotonic_s=1300.0,
    )


def report(found: Found, text: str = TWO) -> Report:
    resolved = resolve(text)

    def front(upstreams: Sequence[Upstream]) -> str:
        return render.front(resolved, Templates(), source=SOURCE, upstreams=upstreams)

    return rows.report(resolved, rendered(text), found, front=front)


def row(found: Found, name: str = "gpu1", text: str = TWO) -> Row:
    (only,) = [row for row in report(found, text).rows if row.instance == name]
    return only


def with_unit(unit: Unit | None, *, ready: Readiness | None = None) -> Found:
    """All is well, but for gpu1."""
    found = as_it_should_be()
    units = {**(found.units or {})}
    if unit is None:
        del units["chatterbox-tts-gpu1.service"]
    else:
        units["chatterbox-tts-gpu1.service"] = unit
    return replace(found, units=units, running={}, readiness={**found.readiness, "gpu1": ready})


def with_front(*upstreams: Upstream) -> Found:
    found = as_it_should_be()
    text = render.front(resolve(TWO), Templates(), source=SOURCE, upstreams=upstreams)
    return replace(found, texts={**found.texts, render.FRONT_PATH: text})


def printed(told: Report, width: int | None) -> str:
    out = io.StringIO()
    show(told, Console(file=out, width=width, color_system=None), width=width)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def test_a_fleet_that_is_as_its_file_says_is_well() -> None:
    told = report(as_it_should_be())

    assert told.well
    assert (
        printed(told, None)
        == """
instance  GPU  port  unit            ready  front    waiting  in flight  spoken  restarts  since  memory  GPU memory
gpu0      0    6093  active/running  ready  serving        2          1     340         0     5m  3.1 GB      4.1 GB
gpu1      1    6094  active/running  ready  serving        2          1     340         0     5m  3.1 GB      4.1 GB
2 of 2 instances serve behind 127.0.0.1:6095; nginx is active, the front answers
""".strip()
    )


def test_what_systemd_252_shows_is_told_row_by_row() -> None:
    text = "[gpus]\n0 = 6093\n1 = 6094\n2 = 6096\n3 = 6097\n4 = 6098\n5 = 6099\n[unit]\nrecycle_after_h = 24\n"
    found = as_it_should_be(text)
    units = {unit["Id"]: read_unit(unit) for unit in systemd.parse_show(SHOWN)}
    asked = {name: units[systemd.unit_name(name)] for name in found.readiness}
    texts = {path: None if path.name == "chatterbox-tts-gpu4.service" else text for path, text in found.texts.items()}
    found = replace(
        found,
        units=units,
        texts=texts,
        running={},
        readiness={
            name: replace(READY, invocation_id=unit.invocation_id) if unit.active == "active" else None
            for name, unit in asked.items()
        },
        monotonic_s=26_798.94,
    )

    assert (
        printed(report(found, text), 100)
        == """
instance  GPU  port  unit                     ready      front    waiting  in flight  restarts
gpu0      0    6093  active/running           ready      serving        2          1         0
gpu1      1    6094  failed/failed            no answer  serving        -          -         3
gpu2      2    6096  activating/auto-restart  no answer  serving        -          -         0
gpu3      3    6097  inactive/dead            no answer  serving        -          -         0
gpu4      4    6098  not installed            no answer  serving        -          -         -
gpu5      5    6099  active/running           ready      serving        2          1         0
gpu1: crash loop, left down after 3 restarts: `journalctl -u chatterbox-tts-gpu1.service`
gpu2: it ended, and starts again soon: `journalctl -u chatterbox-tts-gpu2.service`
gpu3: stopped: chatterbox-deploy start gpu3
gpu4: not installed: chatterbox-deploy apply
gpu5: systemd has not read its changed unit: systemctl daemon-reload
2 of 6 instances serve behind 127.0.0.1:6095; nginx is active, the front answers
""".strip()
    )


def test_what_is_not_set_is_unknown_and_not_0() -> None:
    shown = {unit["Id"]: read_unit(unit) for unit in systemd.parse_show(SHOWN)}

    running, absent = shown["chatterbox-tts-gpu0.service"], shown["chatterbox-tts-gpu4.service"]
    assert (running.memory_bytes, running.active_at_s, running.main_pid) == (53_264_384, 26_793.032563, 475)
    assert (absent.memory_bytes, absent.active_at_s, absent.main_pid, absent.load) == (None, None, None, "not-found")
    assert shown["chatterbox-tts.target"].restarts is None
    assert shown["chatterbox-tts-gpu5.service"].needs_reload


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_a_table_fits_its_terminal_and_keeps_what_matters_most(width: int) -> None:
    lines = printed(report(with_unit(replace(ACTIVE, active="failed", sub="failed"))), width).splitlines()

    assert {"instance", "port", "unit", "ready"} <= set(lines[0].split())
    table = [line for line in lines if line.startswith(("instance", "gpu0 ", "gpu1 "))]
    assert len(table) == 3
    assert all(len(line) <= width for line in table)
    assert "journalctl -u chatterbox-tts-gpu1.service" in " ".join(" ".join(lines).split())


def test_colours_are_for_terminals_alone() -> None:
    told, pipe, terminal = report(as_it_should_be()), io.StringIO(), io.StringIO()

    show(told, Console(file=pipe), width=None)
    show(told, Console(file=terminal, force_terminal=True, color_system="standard", width=150), width=150)

    assert "\x1b" not in pipe.getvalue()
    assert "\x1b[32mready" in terminal.getvalue()


LOG = "`journalctl -u chatterbox-tts-gpu1.service`"
FAILED = replace(ACTIVE, active="failed", sub="failed", result="exit-code", exit_status=1, main_pid=None)
STATES = [
    (None, "not installed: chatterbox-deploy apply"),
    (replace(FAILED, result="timeout"), f"its unit is failed (timeout): {LOG}"),
    (replace(FAILED, restarts=1), f"crash loop, left down after 1 restart: {LOG}"),
    (replace(FAILED, restarts=9), f"crash loop, left down after 9 restarts: {LOG}"),
    (replace(FAILED, exit_status=2), f"its settings are wrong, or something is not installed: {LOG}"),
    (replace(ACTIVE, active="activating", sub="start"), "it is starting"),
    (replace(ACTIVE, active="activating", sub="start", restarts=1), "it is starting"),
    (replace(ACTIVE, active="activating", sub="start", restarts=5), f"crash loop, 5 restarts so far: {LOG}"),
    (replace(ACTIVE, active="activating", sub="auto-restart"), f"it ended, and starts again soon: {LOG}"),
    (replace(ACTIVE, active="deactivating", sub="stop-sigterm"), "it is stopping"),
    (replace(ACTIVE, active="inactive", sub="dead"), "stopped: chatterbox-deploy start gpu1"),
    (ACTIVE, f"it does not answer: {LOG}"),
    (replace(ACTIVE, load="masked", active="inactive"), "masked: systemctl unmask chatterbox-tts-gpu1.service"),
]


@pytest.mark.parametrize(("unit", "said"), STATES)
def test_each_state_of_a_unit_is_told_in_words(unit: Unit | None, said: str) -> None:
    found = with_unit(unit)
    if unit is None:
        path = render.UNIT_DIR / "chatterbox-tts-gpu1.service"
        found = replace(found, texts={**found.texts, path: None})

    assert row(found).wrong[0] == said
    assert not row(found).serves
    assert row(found, "gpu0").wrong == ()
    assert not report(found).well


ANSWERS = [
    (replace(READY, ready=False), "not ready", f"not ready, its engine is dead or stuck: {LOG}"),
    (replace(READY, ready=False, draining=True), "draining", "it ends, and finishes what it began"),
    (
        replace(READY, invocation_id="another"),
        "no answer",
        f"another process answers on its port: `ss -ltnp` shows which, {LOG}",
    ),
]


@pytest.mark.parametrize(("readiness", "ready", "said"), ANSWERS)
def test_what_an_instance_answers_is_told_in_words(readiness: Readiness, ready: str, said: str) -> None:
    told = row(with_unit(ACTIVE, ready=readiness))

    assert (told.ready, told.wrong) == (ready, (said,))
    assert not told.serves


def test_the_numbers_of_another_process_are_not_taken_for_the_instances_own() -> None:
    told = row(with_unit(ACTIVE, ready=replace(READY, invocation_id="another")))

    assert (told.waiting, told.running, told.spoken, told.gpu_memory_bytes) == (None, None, None, None)


def test_a_drained_instance_is_told_with_the_way_back() -> None:
    told = row(
        with_front(fleet.Upstream("gpu0", "127.0.0.1", 6093), fleet.Upstream("gpu1", "127.0.0.1", 6094, drained=True))
    )

    assert (told.front, told.wrong) == ("drained", ("drained: chatterbox-deploy undrain gpu1",))
    assert not told.serves


def test_one_that_a_change_left_out_of_the_front_is_told() -> None:
    told = row(
        with_front(fleet.Upstream("gpu0", "127.0.0.1", 6093), fleet.Upstream("gpu1", "127.0.0.1", 6094, leaving=True))
    )

    said = "out of the front while it restarts; if nobody changes the fleet now: chatterbox-deploy apply"
    assert (told.front, told.wrong) == ("leaving", (said,))


def test_an_instance_that_nginx_does_not_list_or_asks_for_elsewhere_is_told() -> None:
    unlisted = report(with_front(fleet.Upstream("gpu0", "127.0.0.1", 6093)))
    elsewhere = row(with_front(fleet.Upstream("gpu0", "127.0.0.1", 6093), fleet.Upstream("gpu1", "127.0.0.1", 7000)))

    assert unlisted.rows[1].front == "not listed"
    assert unlisted.rows[1].wrong == ("nginx does not list it: chatterbox-deploy apply",)
    assert unlisted.wrong == ()
    assert elsewhere.wrong == ("nginx asks for it on port 7000: chatterbox-deploy apply",)


def test_who_stands_in_a_front_is_read_back_as_it_was_written() -> None:
    upstreams = (
        fleet.Upstream("gpu0", "127.0.0.1", 6093),
        fleet.Upstream("gpu1-a", "127.0.0.1", 6094, drained=True),
        fleet.Upstream("gpu-8f3c2a1b", "127.0.0.1", 6096),
    )

    assert (
        nginx.find_upstreams(render.front(resolve(TWO), Templates(), source=SOURCE, upstreams=upstreams)) == upstreams
    )
    assert nginx.find_upstreams("") == ()


def test_an_older_unit_is_told_whether_it_lies_on_the_disk_or_still_runs() -> None:
    well, older = as_it_should_be(), rendered(TWO.replace("6094", "7000"))
    path = render.UNIT_DIR / "chatterbox-tts-gpu1.service"
    text = next(file.text for file in older if file.path == path)
    mark = systemd.find_mark(text)

    on_disk = replace(well, texts={**well.texts, path: text}, running={**well.running, path.name: mark})
    only_running = replace(well, running={**well.running, path.name: mark})
    unmarked = replace(well, running={**well.running, path.name: None})
    # Only root sees what runs.
    unknown = replace(well, running={})

    for found in (on_disk, only_running):
        assert row(found).wrong == ("runs another unit than the fleet file asks for: chatterbox-deploy plan",)
        assert row(found).port == 7000
    assert row(unmarked).wrong == ("runs another unit than the fleet file asks for: chatterbox-deploy plan",)
    assert report(unknown).well


def test_a_comment_more_or_less_is_no_difference() -> None:
    found = as_it_should_be()

    assert report(
        replace(found, texts={path: f"{text}# mine\n" for path, text in found.texts.items() if text is not None})
    ).well


def test_an_instance_that_left_the_fleet_file_has_a_row_until_it_is_gone() -> None:
    before = "[gpus]\n0 = 6093\n1 = 6094\n2 = 6096\n"
    found = as_it_should_be(before)
    front = next(file.text for file in rendered(TWO) if file.path == render.FRONT_PATH)
    found = replace(found, texts={**found.texts, render.FRONT_PATH: front})
    path = render.UNIT_DIR / "chatterbox-tts-gpu2.service"
    file_gone = replace(found, texts={known: text for known, text in found.texts.items() if known != path})

    for still_there in (found, file_gone):
        told = row(still_there, "gpu2")
        assert (told.gpus, told.port, told.front) == (None, 6096, "not listed")
        assert told.wrong == ("the fleet file no longer names it: chatterbox-deploy apply",)


def test_a_unit_of_somebody_else_is_no_instance_of_ours() -> None:
    found = as_it_should_be()
    path = render.UNIT_DIR / "chatterbox-tts-gpu7.service"

    told = report(replace(found, texts={**found.texts, path: "[Service]\nExecStart=/bin/true\n"}))

    assert [row.instance for row in told.rows] == ["gpu0", "gpu1"]


def test_a_server_of_ones_own_does_not_tell_so_its_columns_are_empty() -> None:
    text = TWO + "[server]\ncommand = ['/srv/serve', '{port}']\n"
    told = report(replace(as_it_should_be(text), readiness={}), text)

    assert told.well
    assert printed(told, None).splitlines()[1] == (
        "gpu0      0    6093  active/running  -      serving        -          -       -         0     5m  3.1 GB"
        "           -"
    )


def test_without_systemd_or_the_right_to_read_the_rest_is_told() -> None:
    found = replace(as_it_should_be(), units=None, running={})
    texts = {path: text for path, text in found.texts.items() if path != render.FRONT_PATH}
    told = report(replace(found, texts=texts))

    assert told.wrong == ("no systemd answers here, so nothing is known of the units",)
    assert [(row.unit, row.ready, row.front, row.restarts) for row in told.rows] == [(None, "ready", None, None)] * 2
    assert told.sentence() == ("2 of 2 instances serve behind 127.0.0.1:6095; nginx is unknown, the front answers")


@pytest.mark.parametrize("units", [None, {systemd.NGINX_UNIT: replace(NGINX, active="inactive")}])
def test_a_fleet_that_runs_by_up_is_told_from_one_that_does_not_run(units: dict[str, Unit] | None) -> None:
    by_hand = replace(READY, invocation_id=None)
    found = replace(
        as_it_should_be(),
        units=units,
        running={},
        texts=dict.fromkeys(as_it_should_be().texts),
        readiness={"gpu0": by_hand, "gpu1": by_hand},
    )
    told = report(found)

    assert [(row.unit, row.ready, row.front, row.spoken, row.wrong) for row in told.rows] == [
        ("not installed", "ready", None, 340, ())
    ] * 2
    assert told.wrong == (
        "nothing is installed: it runs by `chatterbox-deploy up`, or by hand, until that ends; "
        "to install it: chatterbox-deploy apply",
    )
    assert told.sentence().startswith("2 of 2 instances serve behind 127.0.0.1:6095; nginx is ")
    one_is_away = report(replace(found, readiness={"gpu0": by_hand, "gpu1": None}))
    assert one_is_away.rows[1].wrong == ("no answer: look where it was started",)
    assert one_is_away.sentence().startswith("1 of 2 instances serves ")
    nobody = report(replace(found, readiness={"gpu0": None, "gpu1": None}))
    assert nobody.rows[0].wrong == ("not installed: chatterbox-deploy apply",)


def test_what_is_wrong_with_no_instance_in_particular_stands_below() -> None:
    text = TWO + "[unit]\nrecycle_after_h = 24\n"
    found = as_it_should_be(text)
    target = render.UNIT_DIR / systemd.TARGET
    units = {
        **(found.units or {}),
        systemd.TARGET: replace(TARGET, file_state="disabled"),
        systemd.RECYCLE_TIMER: replace(TARGET, active="inactive"),
        systemd.NGINX_UNIT: replace(NGINX, active="failed"),
    }
    front = rendered(text + "[nginx]\nlisten = '127.0.0.1:7000'\n")
    texts = {
        **found.texts,
        target: None,
        render.FRONT_PATH: next(file.text for file in front if file.path == render.FRONT_PATH),
    }
    told = report(replace(found, units=units, texts=texts, front_answers=False), text)

    assert told.wrong == (
        "/etc/nginx/conf.d/chatterbox-tts.conf is not as the fleet file asks: chatterbox-deploy plan",
        "/etc/systemd/system/chatterbox-tts.target is missing: chatterbox-deploy apply",
        "nothing starts the fleet at boot: systemctl enable chatterbox-tts.target",
        "nginx is failed: `journalctl -u nginx.service`",
        "nothing recycles the instances: systemctl start chatterbox-tts-recycle.timer",
        "the front does not answer on 127.0.0.1:6095: `journalctl -u nginx.service`",
    )
    assert all(not row.wrong for row in told.rows)


def test_an_mps_daemon_that_does_not_run_is_told_with_where_to_look() -> None:
    text = "[gpus]\n0 = 6093\n1 = [6094, 6096]\n"
    found = as_it_should_be(text)
    daemon = "chatterbox-tts-mps-gpu1.service"

    failed = report(replace(found, units={**(found.units or {}), daemon: replace(TARGET, active="failed")}), text)

    assert report(found, text).wrong == ()
    assert failed.wrong == (
        "the MPS daemon of GPU 1 is failed, and its clients wait: `journalctl -u chatterbox-tts-mps-gpu1.service`",
    )


def test_json_has_every_row_and_null_where_nothing_is_known() -> None:
    told = json.loads(json.dumps(report(with_unit(FAILED)).as_json()))

    assert told["well"] is False
    assert told["nginx"] == "active"
    assert told["instances"][0]["memory_bytes"] == 3_100_000_000
    assert told["instances"][1]["waiting"] is None
    assert told["instances"][1]["wrong"]


@pytest.mark.parametrize(
    ("body", "ready"),
    [
        (b'{"ready": true, "draining": false, "waiting": 1, "running": 0, "spoken": 3, "invocation_id": null}', True),
        (b'{"ready": false}', False),
    ],
)
def test_readiness_is_read_from_what_a_server_of_any_version_tells(body: bytes, ready: bool) -> None:
    said = read_readiness(body)

    assert said is not None
    assert said.ready is ready
    assert said.gpu_memory_bytes is None


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"status": "ok"}', b'{"ready": "yes"}', b"\xff"])
def test_what_is_no_answer_of_ours_is_no_readiness(body: bytes) -> None:
    assert read_readiness(body) is None


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (None, "-"),
        (0, "0s"),
        (119, "119s"),
        (120, "2m"),
        (7199, "119m"),
        (7200, "2h"),
        (86_400, "24h"),
        (172_800, "2d"),
    ],
)
def test_a_duration_is_short_and_says_enough(seconds: float | None, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("count", "said"), [(None, "-"), (0, "0 MB"), (126_000_000, "126 MB"), (4_060_000_000, "4.1 GB")]
)
def test_a_size_is_short_and_says_enough(count: int | None, said: str) -> None:
    assert size(count) == said
