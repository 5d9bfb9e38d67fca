"""Instances that share a GPU through an MPS daemon, on a real systemd; NVIDIA's programs are stood in for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from support.sandbox import PYTHON, TESTS

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.sandbox import Sandbox

pytestmark = pytest.mark.systemd

FLEET_TOML = "/etc/chatterbox-tts/fleet.toml"
APPLY = ("chatterbox-deploy", "apply", FLEET_TOML)
MPS, FIRST, SECOND, ALONE = (f"chatterbox-tts-{name}.service" for name in ("mps-gpu0", "gpu0-a", "gpu0-b", "gpu1"))
UUID = "GPU-8f3c2a1b-5d6e-4f70-8a9b-0c1d2e3f4a5b"
ALL_READY = " && ".join(f"curl -sSf -o /dev/null http://127.0.0.1:{port}/readyz" for port in (6093, 6094, 6096))

# Answers commands on its standard input, and in the foreground (-f) has a server that outlives a kill. As NVIDIA's, it
# becomes the user that it is before it starts that.
CONTROL = f"""#!/bin/bash
control=$CUDA_MPS_PIPE_DIRECTORY/control
if [ "$1" = -f ]; then
  mkfifo "$control" && echo $$ > "$control.pid" && touch "$CUDA_MPS_LOG_DIRECTORY/control.log" || exit 1
  echo "Starting control daemon using socket $control, GPU $CUDA_VISIBLE_DEVICES"
  {PYTHON} -c "import os; os.setuid(os.getuid())" || exit 1
  sleep 1000 &
  while read -r command < "$control"; do [ "$command" != quit ] || exit 0; done
fi
read -r command
kill -0 "$(cat "$control.pid" 2>/dev/null)" 2>/dev/null || {{ echo "Cannot find MPS control daemon process"; exit 1; }}
[ "$command" != quit ] || echo quit > "$control"
"""

SMI = f"""#!/bin/sh
case "$*" in
  *--query-gpu=uuid*) echo {UUID} ;;
  *memory*) printf '%s, %s, NVIDIA H200, 143771, 0\\n' 0 {UUID} 1 GPU-other ;;
esac
"""


def fleet_toml(gpu0: str, unit: str = "") -> str:
    return (
        f"[gpus]\n0 = {gpu0}\n1 = 6096\n[unit]\nrestart_delay_s = 1\n{unit}\n[server]\npython = '/opt/faulty/python'\n"
    )


def place(sandbox: Sandbox, path: str, text: str) -> None:
    sandbox.write(path, text)
    sandbox.run("chmod", "+x", path)


@pytest.fixture(scope="module")
def fleet(boot: Callable[[], Sandbox]) -> Sandbox:
    """Two instances on GPU 0 and one on GPU 1, none of which computes anything."""
    sandbox = boot()
    server = f'#!/bin/sh\n[ "$1" = -m ] && exec {PYTHON} {TESTS}/faulty_server.py\nexec {PYTHON} "$@"\n'
    place(sandbox, "/opt/faulty/python", server)
    place(sandbox, "/usr/local/bin/nvidia-smi", SMI)
    sandbox.write(FLEET_TOML, fleet_toml("[6093, 6094]"))
    refused = sandbox.run("sh", "-c", f"{' '.join(APPLY)} 2>&1; echo $?")
    assert "nvidia-cuda-mps-control: missing; instances that share a GPU need it: " in refused
    assert refused.endswith("or have them take turns, with mps = false below [unit]\n3\n")
    place(sandbox, "/usr/local/bin/nvidia-cuda-mps-control", CONTROL)
    sandbox.run(*APPLY)
    return sandbox


def lives(sandbox: Sandbox) -> dict[str, str]:
    return {unit: sandbox.show(unit, "InvocationID") for unit in (MPS, FIRST, SECOND, ALONE)}


def since_us(sandbox: Sandbox, unit: str, what: str) -> int:
    return int(sandbox.show(unit, f"{what}TimestampMonotonic"))


def wait_for_new_lives(sandbox: Sandbox, before: dict[str, str], *units: str) -> None:
    for unit in units:
        sandbox.wait_until(f'test "$(systemctl show --value --property=InvocationID {unit})" != {before[unit]}')
    sandbox.wait_until(ALL_READY)


def test_the_daemon_is_there_before_its_clients_who_are_told_their_gpu_by_uuid(fleet: Sandbox) -> None:
    process = fleet.show(FIRST, "MainPID")
    told = dict(entry.split("=", 1) for entry in fleet.run("cat", f"/proc/{process}/environ").split("\0") if entry)

    assert told["CUDA_VISIBLE_DEVICES"] == UUID
    assert told["CUDA_MPS_PIPE_DIRECTORY"] == "/run/chatterbox-tts-mps-gpu0"
    for client in (FIRST, SECOND):
        assert since_us(fleet, MPS, "ActiveEnter") < since_us(fleet, client, "ExecMainStart")
    users = {fleet.run("stat", "-c", "%u", f"/proc/{fleet.show(unit, 'MainPID')}") for unit in (MPS, FIRST)}
    users.add(fleet.run("stat", "-c", "%u", "/run/chatterbox-tts-mps-gpu0/control"))
    assert len(users) == 1
    assert "using socket /run/chatterbox-tts-mps-gpu0/control, GPU 0\n" in fleet.run(
        "chatterbox-deploy", "logs", "gpu0-a", "--fleet", FLEET_TOML
    )


def test_a_daemon_that_dies_comes_back_and_its_clients_with_it(fleet: Sandbox) -> None:
    before = lives(fleet)

    fleet.run("kill", "-9", fleet.show(MPS, "MainPID"))
    wait_for_new_lives(fleet, before, MPS, FIRST, SECOND)

    assert fleet.show(MPS, "NRestarts") == "1"
    assert fleet.show(ALONE, "InvocationID") == before[ALONE]
    for client in (FIRST, SECOND):
        assert since_us(fleet, MPS, "ActiveEnter") < since_us(fleet, client, "ExecMainStart")
    # Not the server that the dead daemon left, either.
    assert len(fleet.run("pgrep", "-x", "sleep").split()) == 1


def test_an_engine_that_breaks_takes_daemon_and_neighbours_along_for_they_share_its_context(fleet: Sandbox) -> None:
    before = lives(fleet)

    fleet.run("curl", "-s", "--json", '{"input": "poison"}', "http://127.0.0.1:6093/v1/audio/speech", check=False)
    wait_for_new_lives(fleet, before, MPS, FIRST, SECOND)

    assert "status=70" in fleet.run("journalctl", "--no-pager", f"--unit={FIRST}")
    assert fleet.show(ALONE, "InvocationID") == before[ALONE]


def test_the_daemon_stops_after_its_clients_and_a_gpu_shared_no_longer_has_none(fleet: Sandbox) -> None:
    fleet.run("chatterbox-deploy", "stop", "--fleet", FLEET_TOML)

    for client in (FIRST, SECOND):
        assert since_us(fleet, client, "InactiveEnter") <= since_us(fleet, MPS, "InactiveEnter")
    fleet.write(FLEET_TOML, fleet_toml("6093"))
    fleet.run(*APPLY)
    assert fleet.show(MPS, "LoadState") == "not-found"
    assert fleet.run("sh", "-c", "ls -d /run/chatterbox-tts-mps* || true") == ""
