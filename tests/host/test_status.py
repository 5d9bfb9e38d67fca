"""status, logs, start, stop and restart on a real systemd and a real nginx, with what goes wrong there."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from support.sandbox import PYTHON

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.sandbox import Sandbox

pytestmark = pytest.mark.systemd

FLEET_TOML = "/etc/chatterbox-tts/fleet.toml"
FRONT = "/etc/nginx/conf.d/chatterbox-tts.conf"
SHIP = f"{PYTHON} -m chatterbox_deploy"
FOUR = """
[gpus]
0 = 6093
1 = 6094
2 = 6096
3 = 6097
[server]
engine = "espeak"
[unit]
restart_delay_s = 1
restart_limit = 3
recycle_after_h = 24
"""


def unit(name: str) -> str:
    return f"chatterbox-tts-{name}.service"


@pytest.fixture(scope="module")
def fleet(boot: Callable[[], Sandbox]) -> Sandbox:
    """Four espeak instances behind the host's nginx."""
    sandbox = boot()
    sandbox.write(FLEET_TOML, FOUR)
    sandbox.run(PYTHON, "-m", "chatterbox_deploy", "render", FLEET_TOML, "--output", "/")
    sandbox.run("systemctl", "enable", "--now", "chatterbox-tts.target")
    return sandbox


def asked(sandbox: Sandbox) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(sandbox.run("sh", "-c", f"{SHIP} status {FLEET_TOML} --json || test $? = 1"))
    return said


def typed(sandbox: Sandbox, line: str) -> str:
    """What a command wrote to both streams, and its exit status."""
    return sandbox.run("sh", "-c", f"cd /etc/chatterbox-tts; {SHIP} {line} 2>&1; echo exit status $?")


def wrong(sandbox: Sandbox) -> dict[str, list[str]]:
    return {row["instance"]: row["wrong"] for row in asked(sandbox)["instances"]}


ALL_WELL: dict[str, list[str]] = {f"gpu{number}": [] for number in range(4)}


def test_a_fleet_as_its_file_says_is_well_and_exits_0(fleet: Sandbox) -> None:
    said = asked(fleet)

    assert (said["well"], said["wrong"], said["nginx"], said["front_answers"]) == (True, [], "active", True)
    assert wrong(fleet) == ALL_WELL
    for row in said["instances"]:
        assert (row["unit"], row["ready"], row["front"]) == ("active/running", "ready", "serving")
        assert (row["waiting"], row["running"], row["restarts"]) == (0, 0, 0)
        assert row["memory_bytes"] > 10_000_000
        assert row["active_s"] > 0
    printed = typed(fleet, "status")
    assert "4 of 4 instances serve behind 127.0.0.1:6095; nginx is active, the front answers\n" in printed
    assert printed.endswith("exit status 0\n")


def test_the_monitor_has_units_from_systemd_and_says_what_a_stranger_may_not_read(fleet: Sandbox) -> None:
    told = json.loads(fleet.run("sh", "-c", f"{SHIP} monitor {FLEET_TOML} --once --json --interval 0.2"))

    assert [(row["unit"], row["ready"], row["restarts"]) for row in told["instances"]] == [
        ("active/running", "ready", 0)
    ] * 4
    assert (told["front"]["nginx"], told["front"]["answers"], told["front"]["requests"]) == ("active", True, 0)
    assert told["notes"] == []

    # As logrotate makes it.
    fleet.run("chmod", "640", "/var/log/nginx/chatterbox-tts.access.log")
    nobody = "env -u COLUMNS setpriv --reuid 65534 --regid 65534 --clear-groups"
    printed = fleet.run("sh", "-c", f"cd /; {nobody} {SHIP} monitor {FLEET_TOML} --once --interval 0.2")
    assert printed.count("active/running  ready") == 4
    assert "nothing is known of the front's requests: cannot read /var/log/nginx/" in printed
    assert "permission denied; run it as root (sudo)" in printed


def test_anybody_may_ask(fleet: Sandbox) -> None:
    said = fleet.run("setpriv", "--reuid=1000", "--clear-groups", *SHIP.split(), "status", FLEET_TOML, "--json")

    assert json.loads(said)["well"]


def test_one_killed_one_drained_and_one_failed_instance_are_told_in_words(fleet: Sandbox) -> None:
    drop_in = f"/etc/systemd/system/{unit('gpu2')}.d/broken.conf"
    fleet.run("sed", "-i", "s/:6094 .*;/:6094 down;/", FRONT)
    fleet.run("systemctl", "reload", "nginx")
    fleet.write(drop_in, "[Service]\nExecStart=\nExecStart=/bin/false\n")
    fleet.run("systemctl", "daemon-reload")
    fleet.run("systemctl", "restart", unit("gpu2"), check=False)
    fleet.run("systemctl", "kill", "--signal=KILL", unit("gpu0"))
    fleet.wait_until(f'test "$(systemctl show --value --property=NRestarts {unit("gpu0")})" = 1')
    fleet.wait_until("curl -sSf -o /dev/null http://127.0.0.1:6093/readyz")
    fleet.wait_until(f"systemctl is-failed --quiet {unit('gpu2')}")
    try:
        said = asked(fleet)
        rows = {row["instance"]: row for row in said["instances"]}

        assert not said["well"]
        assert (rows["gpu0"]["ready"], rows["gpu0"]["restarts"], rows["gpu0"]["wrong"]) == ("ready", 1, [])
        assert (rows["gpu1"]["ready"], rows["gpu1"]["front"]) == ("ready", "drained")
        assert rows["gpu1"]["wrong"] == ["drained: chatterbox-deploy undrain gpu1"]
        assert (rows["gpu2"]["unit"], rows["gpu2"]["ready"]) == ("failed/failed", "no answer")
        (told,) = rows["gpu2"]["wrong"]
        assert told.startswith("crash loop, left down after ")
        assert told.endswith(f" restarts: `journalctl -u {unit('gpu2')}`")
        assert rows["gpu3"]["wrong"] == []
        printed = typed(fleet, "status")
        assert "2 of 4 instances serve behind" in printed
        assert printed.endswith("exit status 1\n")
    finally:
        fleet.run("rm", "-r", f"/etc/systemd/system/{unit('gpu2')}.d")
        fleet.run(PYTHON, "-m", "chatterbox_deploy", "render", FLEET_TOML, "--output", "/")
        fleet.run("systemctl", "daemon-reload")
        fleet.run("systemctl", "reload", "nginx")
    # What systemd had given up starts again.
    assert typed(fleet, "start 2") == "started gpu2\nexit status 0\n"
    assert wrong(fleet) == ALL_WELL


def test_an_older_unit_is_told_until_the_instance_runs_the_new_one(fleet: Sandbox) -> None:
    fleet.write(FLEET_TOML, FOUR.replace("[server]", "[server]\nqueue_size = 7"))
    try:
        before = wrong(fleet)
        fleet.run(PYTHON, "-m", "chatterbox_deploy", "render", FLEET_TOML, "--output", "/")
        fleet.run("systemctl", "daemon-reload")
        fleet.run("systemctl", "restart", unit("gpu0"))
        after = wrong(fleet)
    finally:
        fleet.write(FLEET_TOML, FOUR)
        fleet.run(PYTHON, "-m", "chatterbox_deploy", "render", FLEET_TOML, "--output", "/")
        fleet.run("systemctl", "daemon-reload")
        fleet.run("systemctl", "restart", unit("gpu0"))

    older = ["runs another unit than the fleet file asks for: chatterbox-deploy plan"]
    assert before == dict.fromkeys(ALL_WELL, older)
    assert after == {"gpu0": [], "gpu1": older, "gpu2": older, "gpu3": older}
    assert wrong(fleet) == ALL_WELL


def test_stop_returns_when_all_have_stopped_and_start_when_all_can_speak(fleet: Sandbox) -> None:
    names = "gpu0, gpu1, gpu2, gpu3"
    # One takes its time, which stopping the target alone would not wait for.
    fleet.write(f"/run/systemd/system/{unit('gpu3')}.d/slow.conf", "[Service]\nExecStop=/bin/sleep 3\n")
    fleet.run("systemctl", "daemon-reload")
    said = typed(fleet, "stop")
    states = {name: fleet.show(unit(name), "ActiveState") for name in ALL_WELL}

    assert said == f"stopping {names}; what was begun is finished first\nstopped {names}\nexit status 0\n"
    assert set(states.values()) == {"inactive"}
    assert fleet.show("chatterbox-tts-recycle.timer", "ActiveState") == "inactive"
    assert wrong(fleet) == {name: [f"stopped: chatterbox-deploy start {name}"] for name in ALL_WELL}

    fleet.run("rm", "-r", f"/run/systemd/system/{unit('gpu3')}.d")
    fleet.run("systemctl", "daemon-reload")
    assert typed(fleet, "start") == f"started {names}\nexit status 0\n"
    assert asked(fleet)["well"]
    assert fleet.show("chatterbox-tts-recycle.timer", "ActiveState") == "active"


def test_one_instance_is_stopped_started_and_restarted_alone(fleet: Sandbox) -> None:
    lives = {name: fleet.show(unit(name), "InvocationID") for name in ALL_WELL}

    typed(fleet, "stop 1")
    assert wrong(fleet) == {**ALL_WELL, "gpu1": ["stopped: chatterbox-deploy start gpu1"]}
    assert typed(fleet, "start gpu1") == "started gpu1\nexit status 0\n"
    assert "rollout" in typed(fleet, "restart 2 gpu3")

    changed = {name for name, life in lives.items() if fleet.show(unit(name), "InvocationID") != life}
    assert changed == {"gpu1", "gpu2", "gpu3"}
    assert wrong(fleet) == ALL_WELL


def test_whoever_is_not_root_is_told_to_be(fleet: Sandbox) -> None:
    said = fleet.run(
        "sh", "-c", f"setpriv --reuid=1000 --clear-groups {SHIP} stop 0 --fleet {FLEET_TOML} 2>&1; echo exit status $?"
    )

    assert said.endswith("run it as root\nexit status 3\n")
    assert fleet.show(unit("gpu0"), "ActiveState") == "active"


def test_logs_are_of_one_instance_or_of_all_with_their_names(fleet: Sandbox) -> None:
    one, every = typed(fleet, "logs 1 -n 1000"), typed(fleet, "logs --since -1d")

    assert "http://127.0.0.1:6094" in one
    assert "http://127.0.0.1:6093" not in one
    assert f"{unit('gpu0')}[" in every
    assert f"{unit('gpu3')}[" in every
    assert len(typed(fleet, "logs gpu0 -n 3").splitlines()) == 4


def test_a_textfile_is_written_by_a_service_of_the_fleet_until_it_is_asked_for_no_longer(fleet: Sandbox) -> None:
    directory = "/var/lib/prometheus/node-exporter"
    watched = FOUR + f'[monitoring]\ntextfile = "{directory}/chatterbox-tts.prom"\n'
    fleet.run("mkdir", "-p", directory)
    fleet.write(FLEET_TOML, watched)
    assert typed(fleet, "apply").endswith("exit status 0\n")

    fleet.wait_until(f"[ -e {directory}/chatterbox-tts.prom ]")
    told = fleet.run("cat", f"{directory}/chatterbox-tts.prom")
    assert told.count("chatterbox_monitor_instance_up{") == 4
    assert 'chatterbox_monitor_instance_up{instance_name="gpu3"} 1.0\n' in told
    assert "chatterbox_monitor_front_up 1.0\n" in told
    assert "chatterbox_monitor_front_requests_per_second" in told
    assert asked(fleet)["wrong"] == []

    fleet.run("systemctl", "stop", "chatterbox-tts-monitor.service")
    assert "nobody looks at GPUs and front for Prometheus" in asked(fleet)["wrong"][0]
    fleet.write(FLEET_TOML, FOUR)
    assert typed(fleet, "apply").endswith("exit status 0\n")
    assert fleet.show("chatterbox-tts-monitor.service", "LoadState") == "not-found"
    assert asked(fleet)["wrong"] == []
