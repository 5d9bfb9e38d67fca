"""Whatever befalls an engine, nobody who asks the front loses a request: each fault on purpose, under a steady load.

A request here is one short sentence, whose answer comes whole: one that had begun to stream when its instance died
cannot be asked again.
"""

from __future__ import annotations

import collections
import json
from typing import TYPE_CHECKING

import pytest

from support.sandbox import PYTHON, TESTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.sandbox import Sandbox

pytestmark = pytest.mark.systemd

PORTS = {"gpu0": 6093, "gpu1": 6094, "gpu2": 6096}
FLEET_TOML = f"""
[gpus]
0 = {PORTS["gpu0"]}
1 = {PORTS["gpu1"]}
2 = {PORTS["gpu2"]}

[server]
engine = "espeak"  # its unit needs no GPU
queue_size = 100
longest_utterance_s = 3
recycle_host_mb = 256

[unit]
watchdog_s = 5
restart_delay_s = 1
"""
SPEECH = "v1/audio/speech"
FRONT = f"http://127.0.0.1:6095/{SPEECH}"
RATE_PER_S = 30
"""An engine can speak up to 50: two of three may be away at a time."""

FAULTS = "/etc/chatterbox-tts/faults"
ENDS = "/run/ends"

# The unit as rendered, but for its program; and at each end, what systemctl shows just then.
DROP_IN = f"""[Service]
ExecStart=
ExecStart={PYTHON} {TESTS}/faulty_server.py
ExecStopPost=+/bin/sh -c 'systemctl show --property=Result --property=ExecMainStatus %n | sort | xargs >> {ENDS}/%n'
"""
BROKEN = "ExecMainStatus=70 Result=exit-code"
RECYCLED = "ExecMainStatus=75 Result=exit-code"
STOPPED = "ExecMainStatus=0 Result=success"
KILLED = "ExecMainStatus=9 Result=signal"
HUNG = "ExecMainStatus=6 Result=watchdog"


def unit(name: str) -> str:
    return f"chatterbox-tts-{name}.service"


class Fleet:
    """Three instances behind the host's nginx; an engine fails once ``faulty_server.py`` is told how."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.asked = 0
        self.outcomes: collections.Counter[str] = collections.Counter()

    def fault(self, name: str, words: str) -> None:
        self.sandbox.write(f"{FAULTS}/{name}", words)

    def forget(self) -> None:
        """Every engine sound, every instance ready, and nothing told yet."""
        self.sandbox.run("sh", "-c", f"rm -f {FAULTS}/*")
        self.wait_ready()
        # A moment, not a cursor: journalctl 252 leaves out the first match after one.
        self.sandbox.run("sh", "-c", f"rm -f {ENDS}/*; date '+%F %T.%6N' > /run/since")

    def wait_ready(self) -> None:
        for name, port in PORTS.items():
            # A unit may still be active with a process that is about to end.
            self.sandbox.wait_until(
                f"systemctl is-active -q {unit(name)} && curl -sf -o /dev/null http://127.0.0.1:{port}/readyz"
            )

    def load(self, seconds: int, *script: str) -> tuple[dict[str, int], dict[str, int]]:
        """Counts of outcomes and of instances under a steady load, during which a shell script runs inside."""
        running = self.sandbox.start(PYTHON, f"{TESTS}/load.py", FRONT, str(RATE_PER_S), str(seconds), "spelt")
        self.sandbox.run("bash", "-euc", "\n".join(script))
        printed, _ = running.communicate(timeout=200)
        said = json.loads(printed)
        self.asked += RATE_PER_S * seconds
        self.outcomes.update(said["outcomes"])
        return said["outcomes"], said["instances"]

    def ends(self, name: str) -> list[str]:
        """How each life of the instance ended."""
        return self.sandbox.run("sh", "-c", f"cat {ENDS}/{unit(name)} 2>/dev/null || true").splitlines()

    def complaints(self, name: str) -> list[str]:
        """What the instance itself logged as a warning or worse."""
        return self.journal("--priority=warning", f"_SYSTEMD_UNIT={unit(name)}")

    def journal(self, *matches: str) -> list[str]:
        script = 'journalctl --sync; journalctl --since="$(cat /run/since)" --quiet --output=cat "$@"'
        return self.sandbox.run("bash", "-euc", script, "bash", *matches).splitlines()

    def out_of_memory(self, name: str) -> int:
        """How often, as the instance itself counts."""
        said = self.sandbox.run("curl", "-sSf", f"http://127.0.0.1:{PORTS[name]}/metrics")
        prefix = 'chatterbox_engine_failures_total{kind="out_of_memory"} '
        return next(int(float(line.removeprefix(prefix))) for line in said.splitlines() if line.startswith(prefix))


def wait_for_ends(count: int, name: str) -> str:
    """Shell: until so many lives of the instance ended."""
    return f'until [ "$(cat {ENDS}/{unit(name)} 2>/dev/null | wc -l)" -ge {count} ]; do sleep 0.1; done'


def post(url: str, text: str, place: str) -> str:
    """Shell: ask once; the body comes to ``place``, the status beside it."""
    body = json.dumps({"input": text, "response_format": "wav"})
    return f"curl -sS --output {place} --write-out '%{{http_code}}' --json '{body}' {url} > {place}.status"


@pytest.fixture(scope="module")
def installed(boot: Callable[[], Sandbox]) -> Iterator[Fleet]:
    sandbox = boot()
    sandbox.write("/etc/chatterbox-tts/fleet.toml", FLEET_TOML)
    sandbox.run(PYTHON, "-m", "chatterbox_deploy", "render", "/etc/chatterbox-tts/fleet.toml", "--output", "/")
    for name in PORTS:
        sandbox.write(f"/etc/systemd/system/{unit(name)}.d/faulty.conf", DROP_IN)
    sandbox.run("mkdir", "-p", FAULTS, ENDS)
    sandbox.run("systemctl", "enable", "--now", "chatterbox-tts.target")
    fleet = Fleet(sandbox)
    yield fleet
    print(f"\nin all: {fleet.asked} requests, {dict(fleet.outcomes)}")


@pytest.fixture
def fleet(installed: Fleet) -> Fleet:
    installed.forget()
    return installed


def report(fault: str, outcomes: dict[str, int], instances: dict[str, int], *ends: list[str]) -> None:
    """One line: what a fault cost."""
    ended = [end for of_one in ends for end in of_one]
    print(f"\n{fault}: {outcomes}, answered by {dict(sorted(instances.items()))}; ended: {ended or 'nobody'}")


def test_an_engine_that_breaks_now_and_then_is_replaced(fleet: Fleet) -> None:
    fleet.fault("gpu0", "broken 20")

    outcomes, instances = fleet.load(10)

    fleet.fault("gpu0", "none 0")
    fleet.wait_ready()
    ends = fleet.ends("gpu0")
    report("poisoned context", outcomes, instances, ends)
    assert outcomes == {"ok": 300}
    assert set(ends) == {BROKEN}
    why = "CUDA error: device-side assert triggered"
    assert fleet.complaints("gpu0") == [f"the engine is broken, ending the process: {why}"] * len(ends)
    assert fleet.ends("gpu1") + fleet.ends("gpu2") == []


def test_memory_that_is_short_once_is_freed(fleet: Fleet) -> None:
    before = fleet.out_of_memory("gpu0")
    fleet.fault("gpu0", "fragmented 10")

    outcomes, instances = fleet.load(8)

    report("out of memory, once and again", outcomes, instances, fleet.ends("gpu0"))
    assert outcomes == {"ok": 240}
    assert fleet.out_of_memory("gpu0") > before
    assert fleet.complaints("gpu0") == fleet.ends("gpu0") == []


def test_who_is_out_of_memory_for_good_hands_on_what_comes(fleet: Fleet) -> None:
    before = fleet.out_of_memory("gpu0")
    fleet.fault("gpu0", "full 0")

    outcomes, instances = fleet.load(8)

    report("out of memory, for good", outcomes, instances, fleet.ends("gpu0"))
    assert outcomes == {"ok": 240}
    assert set(instances) == {"gpu1", "gpu2"}
    times = fleet.out_of_memory("gpu0") - before
    assert times > 0
    assert fleet.complaints("gpu0") == ["cannot speak: CUDA out of memory, and nothing to free"] * times
    assert fleet.ends("gpu0") == []


def test_a_stuck_engine_hands_back_who_waits_and_is_killed_by_the_watchdog(fleet: Fleet) -> None:
    url = f"http://127.0.0.1:{PORTS['gpu0']}/{SPEECH}"
    outcomes, instances = fleet.load(
        12,
        "sleep 1; rm -f /run/chatterbox-tts-gpu0/hung",
        f"echo hung 0 > {FAULTS}/gpu0",
        "until [ -e /run/chatterbox-tts-gpu0/hung ]; do sleep 0.1; done",
        f"rm {FAULTS}/gpu0",
        # Waits behind the one that hangs.
        post(url, "Half a second: 500 milliseconds.", "/run/waited"),
        wait_for_ends(1, "gpu0"),
    )

    fleet.wait_ready()
    ends = fleet.ends("gpu0")
    report("hang", outcomes, instances, ends)
    assert outcomes == {"ok": 360}
    assert ends == [HUNG]
    assert fleet.sandbox.run("cat", "/run/waited.status") == "503"
    assert "the engine is stuck" in fleet.sandbox.run("cat", "/run/waited")
    stuck = "the engine is stuck: an utterance takes far longer than its length foretells"
    assert fleet.complaints("gpu0") == [stuck]
    assert len([line for line in fleet.journal(f"--unit={unit('gpu0')}") if "Watchdog timeout" in line]) == 1


def test_an_engine_that_leaks_is_replaced_before_memory_runs_out(fleet: Fleet) -> None:
    fleet.fault("gpu0", "leaking 8")

    outcomes, instances = fleet.load(10, wait_for_ends(1, "gpu0"), f"rm {FAULTS}/gpu0")

    fleet.wait_ready()
    ends = fleet.ends("gpu0")
    report("leak", outcomes, instances, ends)
    assert outcomes == {"ok": 300}
    assert ends == [RECYCLED]
    (complaint,) = fleet.complaints("gpu0")
    assert complaint.startswith("starting afresh: the process holds ")
    assert fleet.ends("gpu1") + fleet.ends("gpu2") == []


def test_restarts_by_hand_and_sigterm_lose_nothing(fleet: Fleet) -> None:
    outcomes, instances = fleet.load(
        12,
        "sleep 1",
        f"systemctl restart {unit('gpu0')}",
        f"systemctl kill --kill-who=main --signal=TERM {unit('gpu1')}",
        wait_for_ends(1, "gpu1"),
        f"systemctl restart {unit('gpu2')}",
    )

    ends = [fleet.ends(name) for name in PORTS]
    report("SIGTERM", outcomes, instances, *ends)
    assert outcomes == {"ok": 360}
    assert ends == [[STOPPED]] * 3


def test_a_stop_finishes_what_was_begun_and_hands_back_what_waits(fleet: Fleet) -> None:
    fleet.fault("gpu0", "slow 2000")
    at_gpu0 = f"http://127.0.0.1:{PORTS['gpu0']}"

    said = fleet.sandbox.run(
        "bash",
        "-euc",
        f"""
        for n in 1 2 3; do {post(f"{at_gpu0}/{SPEECH}", "About 1000 milliseconds.", "/run/answer-$n")} & done
        until curl -s {at_gpu0}/readyz | grep -q '"waiting":2,"running":1'; do sleep 0.1; done
        systemctl stop {unit("gpu0")}
        wait
        for n in 1 2 3; do cat /run/answer-$n.status; echo; done
        """,
    )
    fleet.sandbox.run("systemctl", "start", unit("gpu0"))

    assert sorted(said.split()) == ["200", "503", "503"]
    assert fleet.ends("gpu0") == [STOPPED]


def test_kill_9_loses_nothing_but_an_answer_that_was_on_its_way(fleet: Fleet) -> None:
    outcomes, instances = fleet.load(
        10,
        "sleep 1",
        *[f"systemctl kill --signal=KILL {unit(name)}; {wait_for_ends(1, name)}; sleep 1" for name in ("gpu0", "gpu1")],
    )

    fleet.wait_ready()
    ends = fleet.ends("gpu0") + fleet.ends("gpu1")
    report("kill -9", outcomes, instances, ends)
    # The header leaves before the sound; an instance that is killed between the two takes its answer with it.
    assert outcomes["ok"] + outcomes.get("cut short", 0) == 300
    assert outcomes["ok"] >= 300 - len(ends)
    assert ends == [KILLED] * 2


def test_a_request_that_breaks_engines_meets_two_and_nobody_else_suffers(fleet: Fleet) -> None:
    outcomes, instances = fleet.load(8, "sleep 1", post(FRONT, "Drink this poison.", "/run/poisoned"))

    fleet.wait_ready()
    ends = [fleet.ends(name) for name in PORTS]
    report("poison", outcomes, instances, *ends)
    assert outcomes == {"ok": 240}
    assert fleet.sandbox.run("cat", "/run/poisoned.status") == "502"
    assert "two failed with this request" in fleet.sandbox.run("cat", "/run/poisoned")
    broken = "the engine is broken, ending the process: CUDA error: device-side assert triggered, by this text"
    assert sorted(ends) == [[], [BROKEN], [BROKEN]]
    assert sorted(fleet.complaints(name) for name in PORTS) == [[], [broken], [broken]]
