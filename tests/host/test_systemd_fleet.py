"""The main job on a real systemd and a real nginx: render, enable, speak, and stay up."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from support import golden
from support.sandbox import PYTHON, TESTS

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.sandbox import Sandbox

pytestmark = pytest.mark.systemd

FLEET_TOML = "/etc/chatterbox-tts/fleet.toml"
FRONT = "http://127.0.0.1:6095"
GPU0, GPU1 = "chatterbox-tts-gpu0.service", "chatterbox-tts-gpu1.service"
KEY = "open-sesame-open-sesame"
ENABLE = ("systemctl", "enable", "--now", "chatterbox-tts.target")

# Written to fleet.toml as JSON strings, which TOML reads the same; each must reach the process unchanged.
NASTY = {
    "A": "two words",
    "B": 'a "quote"',
    "C": "100% %h",
    "D": "$HOME ${X}",
    "E": "back\\slash \\x41",
    "F": "ä → 語",
    "G": "",
}


def install(sandbox: Sandbox, fleet_toml: str) -> None:
    sandbox.write(FLEET_TOML, fleet_toml)
    sandbox.run(PYTHON, "-m", "chatterbox_deploy", "render", FLEET_TOML, "--output", "/")
    sandbox.run(*ENABLE)


def both_ready(sandbox: Sandbox) -> None:
    # Asked about several units, is-active is content with one.
    sandbox.wait_until(f'test "$(systemctl is-active {GPU0} {GPU1} nginx.service | uniq)" = active')


@pytest.fixture(scope="module")
def fleet(boot: Callable[[], Sandbox]) -> Sandbox:
    """Two espeak instances behind the host's nginx, installed as README says."""
    sandbox = boot()
    variables = "\n".join(f"{name} = {json.dumps(value)}" for name, value in NASTY.items())
    install(sandbox, (golden.FOLDER / "espeak/fleet.toml").read_text() + f"\n[server.environment]\n{variables}\n")
    both_ready(sandbox)
    return sandbox


def load(sandbox: Sandbox, rate_per_s: int, seconds: int) -> tuple[dict[str, int], dict[str, int]]:
    """Counts of outcomes and of instances."""
    said = json.loads(
        sandbox.run(PYTHON, f"{TESTS}/load.py", f"{FRONT}/v1/audio/speech", str(rate_per_s), str(seconds))
    )
    return said["outcomes"], said["instances"]


def disturbed(sandbox: Sandbox, rate_per_s: int, seconds: int, *script: str) -> dict[str, int]:
    """Outcomes of a load during which a shell script runs inside."""
    running = sandbox.start(PYTHON, f"{TESTS}/load.py", f"{FRONT}/v1/audio/speech", str(rate_per_s), str(seconds))
    sandbox.run("bash", "-euc", "\n".join(script))
    printed, _ = running.communicate(timeout=300)
    outcomes: dict[str, int] = json.loads(printed)["outcomes"]
    return outcomes


def restarts(sandbox: Sandbox, unit: str) -> int:
    return int(sandbox.show(unit, "NRestarts"))


def test_forty_requests_are_spoken_whole_and_spread_over_both(fleet: Sandbox) -> None:
    outcomes, instances = load(fleet, 20, 2)

    assert outcomes == {"ok": 40}
    assert set(instances) == {"gpu0", "gpu1"}
    assert min(instances.values()) >= 10


def test_ready_names_the_life_that_systemd_started(fleet: Sandbox) -> None:
    said = json.loads(fleet.run("curl", "-sS", "http://127.0.0.1:6093/readyz"))

    assert said["ready"]
    assert said["instance"] == "gpu0"
    assert said["invocation_id"] == fleet.show(GPU0, "InvocationID")


def test_every_variable_reaches_the_process_as_it_was_written(fleet: Sandbox) -> None:
    found = fleet.run("cat", f"/proc/{fleet.show(GPU0, 'MainPID')}/environ").split("\0")

    variables = dict(entry.split("=", 1) for entry in found if entry)
    assert {name: variables.get(name) for name in NASTY} == NASTY
    assert variables["CUDA_VISIBLE_DEVICES"] == "0"


def test_logs_are_in_the_journal_under_the_units_name(fleet: Sandbox) -> None:
    load(fleet, 10, 1)

    said = fleet.run("journalctl", "--no-pager", "--output=cat", f"--unit={GPU1}")

    assert "method=POST path=/v1/audio/speech status=200" in said


def test_the_front_logs_one_json_object_a_request(fleet: Sandbox) -> None:
    load(fleet, 10, 1)

    last = json.loads(fleet.run("tail", "-n", "1", "/var/log/nginx/chatterbox-tts.access.log"))

    assert last["status"] == 200
    assert last["instance"] in {"gpu0", "gpu1"}
    assert last["queue_wait_s"] is not None
    assert last["duration_s"] >= 0
    assert last["request_id"]


def test_kill_9_under_a_steady_load_loses_nothing(fleet: Sandbox) -> None:
    before = restarts(fleet, GPU0)

    outcomes = disturbed(
        fleet, 20, 8, "sleep 1", *[f"systemctl kill --signal=KILL {GPU0}; sleep 2.5" for _ in range(2)]
    )

    assert outcomes == {"ok": 160}
    assert restarts(fleet, GPU0) == before + 2


def test_a_restart_under_a_steady_load_loses_nothing(fleet: Sandbox) -> None:
    outcomes = disturbed(fleet, 20, 8, "sleep 1", f"systemctl restart {GPU0}", "sleep 1", f"systemctl restart {GPU1}")

    assert outcomes == {"ok": 160}


def test_what_render_says_to_type_next_changes_a_running_fleet_without_losing_a_request(fleet: Sandbox) -> None:
    before = fleet.run("cat", FLEET_TOML)
    fleet.write(FLEET_TOML, before.replace("queue_size = 100", "queue_size = 101"))
    said = fleet.run("bash", "-c", f"{PYTHON} -m chatterbox_deploy render {FLEET_TOML} --output / 2>&1")
    *_, next_line = said.splitlines()

    outcomes = disturbed(fleet, 15, 8, "sleep 1", next_line.removeprefix("next: "))

    assert next_line == f"next: chatterbox-deploy apply {FLEET_TOML}"
    assert outcomes == {"ok": 120}
    for unit in (GPU0, GPU1):
        assert "CHATTERBOX_QUEUE_SIZE=101" in fleet.run("cat", f"/proc/{fleet.show(unit, 'MainPID')}/environ")


def test_a_hung_instance_is_killed_by_the_watchdog_and_returns(fleet: Sandbox) -> None:
    before = restarts(fleet, GPU1)

    fleet.run("systemctl", "kill", "--signal=STOP", "--kill-who=main", GPU1)

    fleet.wait_until(f'test "$(systemctl show --value --property=NRestarts {GPU1})" -gt {before}')
    fleet.wait_until("curl -sSf -o /dev/null http://127.0.0.1:6094/readyz")
    assert "Watchdog timeout" in fleet.run("journalctl", "--no-pager", f"--unit={GPU1}")


def test_one_dead_gpu_stops_nothing_else(fleet: Sandbox) -> None:
    fleet.run("systemctl", "stop", GPU0)
    try:
        outcomes, instances = load(fleet, 20, 2)

        assert outcomes == {"ok": 40}
        assert set(instances) == {"gpu1"}
        assert fleet.show("chatterbox-tts.target", "ActiveState") == "active"
    finally:
        fleet.run("systemctl", "start", GPU0)


def test_wrong_settings_stop_the_unit_once_with_a_clear_line(fleet: Sandbox) -> None:
    drop_in = f"/etc/systemd/system/{GPU0}.d/typo.conf"
    fleet.write(drop_in, "[Service]\nEnvironment=CHATTERBOX_QUEUE_SIZ=3\n")
    try:
        fleet.run("systemctl", "daemon-reload")
        before = restarts(fleet, GPU0)
        fleet.run("systemctl", "restart", GPU0, check=False)

        assert fleet.show(GPU0, "ActiveState") == "failed"
        assert fleet.show(GPU0, "ExecMainStatus") == "2"
        assert restarts(fleet, GPU0) <= before
        assert "CHATTERBOX_QUEUE_SIZ" in fleet.run("journalctl", "--no-pager", "--lines=20", f"--unit={GPU0}")
    finally:
        fleet.run("rm", "-r", f"/etc/systemd/system/{GPU0}.d")
        fleet.run("systemctl", "daemon-reload")
        fleet.run("systemctl", "restart", GPU0)


def test_stopping_the_target_stops_every_instance_and_starting_it_brings_them_back(fleet: Sandbox) -> None:
    fleet.run("systemctl", "stop", "chatterbox-tts.target")
    fleet.wait_until(f"test $(systemctl is-active {GPU0} {GPU1} | uniq) = inactive")
    assert fleet.show("nginx.service", "ActiveState") == "active"

    fleet.run("systemctl", "start", "chatterbox-tts.target")
    both_ready(fleet)


def test_a_reboot_brings_the_fleet_back(fleet: Sandbox) -> None:
    first_boot = fleet.run("systemctl", "show", "--value", "--property=UserspaceTimestamp")
    fleet.reboot()
    assert fleet.run("systemctl", "show", "--value", "--property=UserspaceTimestamp") != first_boot
    both_ready(fleet)

    outcomes, instances = load(fleet, 20, 2)

    assert outcomes == {"ok": 40}
    assert set(instances) == {"gpu0", "gpu1"}


def test_a_server_of_ones_own_runs_unchanged_on_each_gpu(boot: Callable[[], Sandbox]) -> None:
    sandbox = boot()
    sandbox.write("/srv/tts/answer.txt", "unchanged")
    install(
        sandbox,
        "[gpus]\n0 = 6093\n1 = 6094\n[server]\n"
        f"command = ['{PYTHON}', '-m', 'http.server', '--bind', '{{host}}', '{{port}}']\ndirectory = '/srv/tts'\n",
    )
    both_ready(sandbox)
    sandbox.wait_until("curl -sSf -o /dev/null http://127.0.0.1:6093/ && curl -sSf -o /dev/null http://127.0.0.1:6094/")

    said = sandbox.run(
        "bash", "-euc", f'for i in 1 2 3 4; do curl -sSf -w "%header{{x-instance}}\\n" {FRONT}/answer.txt; done'
    )

    assert sorted(said.split()) == ["unchangedgpu0", "unchangedgpu0", "unchangedgpu1", "unchangedgpu1"]
    assert sandbox.show(GPU0, "Type") == "exec"


def test_each_instance_has_a_copy_of_the_keys_and_a_place_that_outlives_its_restarts(
    boot: Callable[[], Sandbox],
) -> None:
    sandbox = boot()
    copy, place, file = f"/run/credentials/{GPU0}/api-keys", "/run/chatterbox-tts-gpu0", "/etc/chatterbox-tts/api-keys"
    sandbox.run("bash", "-euc", f"mkdir /etc/chatterbox-tts; umask 077; echo ada {KEY} > {file}")
    install(
        sandbox,
        (golden.FOLDER / "espeak/fleet.toml").read_text().replace("[server]", f"[server]\napi_keys_file = '{file}'"),
    )
    both_ready(sandbox)

    def as_the_instance(script: str, unit: str = GPU0) -> str:
        process = sandbox.show(unit, "MainPID")
        user = sandbox.run("stat", "--format=%u", f"/proc/{process}").strip()
        inside = ("nsenter", f"--target={process}", "--mount", "--wd=/", "setpriv", f"--reuid={user}", "--clear-groups")
        return sandbox.run(*inside, "sh", "-euc", script).strip()

    variables = sandbox.run("cat", f"/proc/{sandbox.show(GPU0, 'MainPID')}/environ").split("\0")
    assert f"CHATTERBOX_API_KEYS_FILE={copy}" in variables
    assert f"RUNTIME_DIRECTORY={place}" in variables
    assert as_the_instance(f"cat {copy}; test -r {file} || echo only the copy") == f"ada {KEY}\nonly the copy"
    results = "/var/cache/chatterbox-tts/results"
    as_the_instance(f"echo 1 > {place}/mark; echo sound > {results}/from-gpu0")
    assert as_the_instance(f"cat {results}/from-gpu0", GPU1) == "sound"

    # A changed file comes with the next start; what the instance wrote in its place is still there.
    sandbox.run("sh", "-c", f"echo bob {KEY} > {file}")
    sandbox.run("systemctl", "kill", "--signal=KILL", GPU0)
    sandbox.wait_until(f'test "$(systemctl show --value --property=NRestarts {GPU0})" -gt 0')
    sandbox.wait_until(f"systemctl is-active --quiet {GPU0}")
    assert as_the_instance(f"cat {copy} {place}/mark") == f"bob {KEY}\n1"
    sandbox.run("systemctl", "restart", GPU0)
    assert as_the_instance(f"cat {place}/mark") == "1"

    sandbox.run("systemctl", "stop", GPU0)
    assert sandbox.run("sh", "-c", f"test -e {place}/mark || echo gone") == "gone\n"
    sandbox.run("systemctl", "start", GPU0)
    assert as_the_instance(f"test -e {place}/mark || echo gone") == "gone"
