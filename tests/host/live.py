"""A fleet that serves while it changes: each change is made under a steady load, whose requests are counted."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from support.sandbox import PYTHON, TESTS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from support.sandbox import Sandbox

FLEET_TOML = "/etc/chatterbox-tts/fleet.toml"
FRONT = "http://127.0.0.1:6095/v1/audio/speech"
APPLY = f"chatterbox-deploy apply {FLEET_TOML}"
VERSIONS = "/opt/chatterbox-tts/versions"
RATE_PER_S = 25
FRONT_LOG = "/var/log/nginx/chatterbox-tts.access.log"
RETRIED = """'"tries":"[0-9]* : '"""
DONE = "/run/load-done"
KEY = "/run/client-key"

# A process in the control group of gpu0 makes that unit hold 400 MB more, until it was recycled.
BALLAST = f"""
unit=chatterbox-tts-gpu0.service
group=$(systemctl show --value --property=ControlGroup $unit)
[ -d /sys/fs/cgroup/memory ] && group=/memory$group
echo $$ > /sys/fs/cgroup$group/cgroup.procs
{PYTHON} -c 'import time; held = bytearray(400_000_000); time.sleep(100)' & ballast=$!
until [ "$(systemctl show --value --property=MemoryCurrent $unit)" -gt 300000000 ]; do sleep 0.1; done
cgroup=/sys/fs/cgroup$([ -d /sys/fs/cgroup/memory ] && echo /memory)/cgroup.procs
echo $$ > $cgroup
chatterbox-deploy recycle; status=$?
kill $ballast
exit $status
"""

# Ends apply with a signal as it says that it begins a step; ends well if there was something to end.
CUT_SHORT = f"""
: > /run/apply.log
env --default-signal=INT {APPLY} 2> /run/apply.log & applying=$!
while kill -0 $applying 2>/dev/null && ! grep -q '^\\[{{step}}/' /run/apply.log; do sleep 0.01; done
kill -{{signal}} $applying; wait $applying; status=$?
tail -1 /run/apply.log
[ $status = {{status}} ]
"""

TWO = {"0": "6093", "1": "6094"}


def fleet_toml(gpus: Mapping[str, str] = TWO, *, nginx: str = "", server: str = "", unit: str = "") -> str:
    """Room and time enough for all who ask: on a machine that is busy with something else, they wait."""
    table = "\n".join(f'"{gpu}" = {port}' for gpu, port in gpus.items())
    return f"""
[gpus]
{table}
[nginx]
{nginx}
[server]
engine = "espeak"
queue_size = 1000
max_wait_s = 100
{server}
[unit]
restart_delay_s = 1
{unit}
"""


@dataclass(frozen=True, slots=True)
class Change:
    """What came of one change under load."""

    name: str
    status: int
    said: str
    seconds: float
    outcomes: Mapping[str, int]
    retried: int
    """Requests that the front asked a second instance for, by its log."""

    @property
    def requests(self) -> int:
        return sum(self.outcomes.values())

    @property
    def lost(self) -> int:
        return self.requests - self.outcomes.get("ok", 0)


@dataclass
class LiveFleet:
    """Two instances, or more, of two versions of the server, behind the host's nginx."""

    sandbox: Sandbox
    changes: list[Change] = field(default_factory=list)
    rate_per_s: int = RATE_PER_S

    def install(self) -> None:
        """Version ``first`` serves; ``second`` is there; ``hangs``, ``crashes`` and ``silent`` are broken."""
        self.write(fleet_toml())
        self.sandbox.run(
            "bash",
            "-euc",
            f"""
            mkdir -p {VERSIONS} /opt/silent
            mv /opt/chatterbox-tts/venv {VERSIONS}/first
            touch {VERSIONS}/first/.complete
            cp -a {VERSIONS}/first {VERSIONS}/second
            ln -s versions/first /opt/chatterbox-tts/venv
            for gpu in gpu0 gpu1; do echo silent 1 > /opt/silent/$gpu; done
            broken() {{
              mkdir -p {VERSIONS}/$1/bin
              printf '#!/bin/sh\\n[ "$1" = -m ] && %s\\nexec {VERSIONS}/first/bin/python "$@"\\n' "$2" \\
                > {VERSIONS}/$1/bin/python
              chmod +x {VERSIONS}/$1/bin/python
              touch {VERSIONS}/$1/.complete
            }}
            broken hangs 'exec sleep 1000'
            broken crashes 'exit 1'
            broken silent 'FAULTS=/opt/silent exec {VERSIONS}/first/bin/python {TESTS}/faulty_server.py'
            echo a-first-and-long-key > {KEY}
            """,
        )
        self.sandbox.run("chatterbox-deploy", "apply", FLEET_TOML)

    def write(self, text: str) -> None:
        self.sandbox.write(FLEET_TOML, text)

    def change(self, name: str, *commands: str) -> Change:
        """Type commands, one after the other while all goes well, under load; half a second before and after."""
        seen = self.sandbox.run("sh", "-c", f"rm -f {DONE}; cat {FRONT_LOG} | wc -l")
        load = self.sandbox.start(
            "env", f"API_KEY_FILE={KEY}", PYTHON, f"{TESTS}/load.py", FRONT, str(self.rate_per_s), DONE
        )
        script = f"sleep 0.5; begun=$(date +%s%N); {{ {' && '.join(commands)}; }} 2>&1; rc=$?"
        script += '; echo; echo "$(( ($(date +%s%N) - begun) / 1000000 )) $rc"; sleep 0.5'
        try:
            said = self.sandbox.run("bash", "-c", script, limit_s=200)
        finally:
            self.sandbox.run("touch", DONE)
            load.wait(timeout=100)
        outcomes = json.loads(load.communicate()[0])["outcomes"]
        *lines, last = said.splitlines()
        took_ms, status = map(int, last.split())
        retried = self.sandbox.run("sh", "-c", f"tail -n +{int(seen) + 1} {FRONT_LOG} | grep -c {RETRIED} || true")
        made = Change(name, status, "\n".join(lines), took_ms / 1000, Counter(outcomes), int(retried))
        self.changes.append(made)
        return made

    def plan_status(self) -> int:
        """Exit status of ``plan``: 0 if the host is as the fleet file says."""
        said = self.sandbox.run("bash", "-c", f"chatterbox-deploy plan {FLEET_TOML} 2>&1; echo $?")
        # Seen only when a test fails, and then what one wants to see.
        print(said)
        return int(said.splitlines()[-1])

    def cut_short(self, step: int, signal: str = "KILL", status: int = 137) -> Change:
        """``apply``, ended as its step of that number begins; its status is 0 if it ended with ``status``."""
        self.sandbox.write("/run/cut-short", CUT_SHORT.format(step=step, signal=signal, status=status))
        return self.change(f"kill -{signal} at step {step}", "bash /run/cut-short")

    def killed_at(self, step: int) -> tuple[Change, Change]:
        """``apply``, killed as its step of that number begins, and ``apply`` again."""
        return self.cut_short(step), self.change("apply again", APPLY)


def every_change(fleet: LiveFleet) -> None:
    """Each kind of change once; in the end the fleet is as it was."""
    fleet.write(fleet_toml({**TWO, "2": "6096"}))
    fleet.change("add a GPU", APPLY)
    fleet.write(fleet_toml())
    fleet.change("remove a GPU", APPLY)
    fleet.write(fleet_toml({"0": "6094", "1": "6093"}))
    fleet.change("swap two GPUs' ports", APPLY)
    fleet.write(fleet_toml({"0": "6094", "1": "[6093, 6097]"}, server='model = "turbo"'))
    fleet.change("change the model, and share a GPU", APPLY)
    fleet.write(fleet_toml())
    fleet.change("back", APPLY)
    fleet.change("upgrade the venv", f"chatterbox-deploy rollout {FLEET_TOML} --version second")
    fleet.change("rollback", "chatterbox-deploy rollback")
    rotate_keys(fleet, "nginx", '"~^Bearer {key}$" {name};')
    rotate_keys(fleet, "server", "{name} {key}")
    fleet.write(fleet_toml(unit="recycle_memory_mb = 256"))
    fleet.change("a limit of memory", APPLY)
    fleet.sandbox.write("/run/ballast", BALLAST)
    fleet.change("recycle", "bash /run/ballast")
    fleet.write(fleet_toml())
    fleet.change("rollout", f"chatterbox-deploy rollout {FLEET_TOML}")


def rotate_keys(fleet: LiveFleet, who: str, line: str) -> None:
    """Ask for keys where none was asked for; then a new key beside the old one; then without the old one."""
    first, second = "a-first-and-long-key", "a-second-and-long-key"
    file = f"/etc/chatterbox-tts/{who}-keys"
    old, new = line.format(name="old", key=first), line.format(name="new", key=second)

    asked = f"api_keys_file = '{file}'"

    def place(*lines: str) -> str:
        return f"printf '%s\\n' {' '.join(map(repr, lines))} > {file}"

    fleet.sandbox.run("bash", "-c", f"echo {first} > {KEY}; {place(old)}; chmod 600 {file}")
    fleet.write(fleet_toml(nginx=asked if who == "nginx" else "", server=asked if who == "server" else ""))
    fleet.change(f"keys at {who}", APPLY)
    fleet.change("a new key", place(old, new), APPLY)
    fleet.sandbox.run("bash", "-c", f"echo {second} > {KEY}")
    time.sleep(0.5)
    fleet.change("the old key goes", place(new), APPLY)
    fleet.write(fleet_toml())
    fleet.change("no keys", APPLY)
