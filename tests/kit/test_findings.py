"""Each finding of a report: a situation that has it, and one that comes near and has it not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_deploy.nginx import Block, Traffic
from chatterbox_deploy.report import findings
from chatterbox_deploy.report.pins import Line
from chatterbox_deploy.report.situation import Pin, Situation
from support.situations import MIB, card, fleet_file, machine, process, program, seed

if TYPE_CHECKING:
    from chatterbox_deploy.gpu.cards import Card
    from chatterbox_deploy.report.findings import Finding

DOCS = Path(__file__).parents[2] / "docs/report.md"
AT_WORK = card(0, process(812))
IDLE = card(1, utilisation_percent=0)
SERVER = program(812)
TWO = fleet_file("[gpus]\n0 = 6093\n1 = 6094\n")


MIG = "MIG-00000000-0000-0000-0000-000000000000"


def block(ports: tuple[int, ...] = (6093, 6094), *, least_conn: bool = True, zone: bool = False) -> Block:
    return Block("/etc/nginx/conf.d/tts.conf", "tts", ports, least_conn, zone)


def traffic(**answered: int) -> dict[str, Any]:
    return {"traffic": Traffic(answered, "09:00", "10:00"), "in_service": tuple(answered)}


def lines(*devices: str) -> tuple[Line, ...]:
    return tuple(Line("/srv/tts/api.py", number, f'model.to("{each}")', each) for number, each in enumerate(devices, 1))


FOUND: list[tuple[str, str, Situation]] = [
    ("gpu-idle", "high", machine(AT_WORK, IDLE)),
    ("gpu-idle", "high", machine(AT_WORK, card(1, process(7, 60, "G", "Xorg"), utilisation_percent=2))),
    ("gpu-not-here", "high", machine(AT_WORK, fleet_file=TWO)),
    ("gpu-not-here", "high", machine(fleet_file=TWO)),
    # Nobody works: worth knowing, no more.
    ("gpu-idle", "low", machine(IDLE)),
    # All that is known of it is that it does nothing.
    ("gpu-idle", "high", machine(AT_WORK, card(1, processes=None, memory_used_bytes=None, utilisation_percent=0))),
    ("one-gpu-takes-all", "high", machine(AT_WORK, IDLE, card(2))),
    ("pinned-to-one-gpu", "high", machine(AT_WORK, IDLE, pins=(Pin("a.service", "0"), Pin("b.service", "0")))),
    ("pinned-to-one-gpu", "high", machine(AT_WORK, IDLE, pins=(Pin("a.service", "0"), Pin("b.service", AT_WORK.uuid)))),
    ("pinned-to-one-gpu", "high", machine(AT_WORK, IDLE, pins=(Pin("a.service", "GPU-00000001"),))),
    ("hard-coded-gpu", "medium", machine(AT_WORK, code=lines("cuda:0"))),
    ("hard-coded-gpu", "high", machine(AT_WORK, code=lines("cuda:1"))),
    ("hard-coded-gpu", "high", machine(AT_WORK, code=lines("cuda:0", "cuda:{gpu}"))),
    ("hard-coded-gpu", "high", machine(AT_WORK, code=lines("CUDA_VISIBLE_DEVICES=0"))),
    ("cpu-bound-beside-idle-gpu", "high", machine(IDLE, programs=(program(9, cpu_cores=3.9),))),
    ("unbalanced-upstream", "medium", machine(AT_WORK, **traffic(gpu0=180, gpu1=60))),
    ("unbalanced-upstream", "medium", machine(AT_WORK, **traffic(gpu0=300, gpu1=0))),
    ("unbalanced-upstream", "medium", machine(AT_WORK, **traffic(gpu0=150, gpu1=150, gpu2=150, gpu3=15))),
    ("least-conn-without-zone", "medium", machine(AT_WORK, fleet_file=TWO, upstreams=(block(),))),
    ("least-conn-without-zone", "medium",
     machine(AT_WORK, programs=(program(812, ports=(8001,)),), upstreams=(block((8001, 8002)),))),
    ("throttling", "high", machine(card(0, throttled_by=("hw_thermal_slowdown",)))),
    ("throttling", "high", machine(card(0, throttled_by=("sw_power_cap", "sw_thermal_slowdown")))),
    ("throttling", "low", machine(card(0, throttled_by=("sw_power_cap",)))),
    ("memory-held-by-strangers", "medium", machine(card(0, process(5, 9_000)), programs=(program(5, "other"),))),
    ("memory-held-by-strangers", "medium",
     machine(card(0, process(5, 300), process(6, 300, "G")), programs=(program(5, "other"), program(6, "display")))),
    ("no-mps", "medium", machine(card(0, process(1), process(2)), programs=(program(1), program(2, "instance")))),
    ("tf32-off", "low", machine(AT_WORK, tf32={"gpu0": False, "gpu1": True})),
]  # fmt: skip

NOT_FOUND: list[tuple[str, Situation]] = [
    ("gpu-idle", machine(AT_WORK, card(1, process(813)))),
    # In a container: nobody to be seen, but their memory.
    ("gpu-idle", machine(card(0, memory_used_bytes=4_700 * MIB))),
    ("gpu-idle", machine(card(0, processes=None, memory_used_bytes=4_700 * MIB))),
    ("gpu-idle", machine(card(0, utilisation_percent=50))),
    # Nothing is known of it; it is lost.
    ("gpu-idle", machine(card(0, processes=None, memory_used_bytes=None, utilisation_percent=None))),
    ("gpu-idle", machine(card(0, uuid=""))),
    ("one-gpu-takes-all", machine(AT_WORK)),
    ("one-gpu-takes-all", machine(AT_WORK, card(1, process(813)), IDLE)),
    ("one-gpu-takes-all", machine(card(0), card(1))),
    ("one-gpu-takes-all", machine(AT_WORK, card(1, processes=None, memory_used_bytes=None, utilisation_percent=None))),
    ("pinned-to-one-gpu", machine(AT_WORK, pins=(Pin("a.service", "0"),))),
    ("pinned-to-one-gpu", machine(AT_WORK, IDLE, pins=(Pin("a.service", "0"), Pin("b.service", "1")))),
    ("pinned-to-one-gpu", machine(AT_WORK, IDLE, pins=(Pin("a.service", "0,1"),))),
    ("pinned-to-one-gpu", machine(AT_WORK, IDLE, pins=(Pin("a.service", "7"),))),
    ("pinned-to-one-gpu", machine(AT_WORK, IDLE)),
    # Another server is told nothing, and sees both.
    ("pinned-to-one-gpu", machine(AT_WORK, IDLE, programs=(SERVER,), pins=(Pin("a.service", "0"),))),
    ("hard-coded-gpu", machine(AT_WORK)),
    ("cpu-bound-beside-idle-gpu", machine(AT_WORK, programs=(program(9, cpu_cores=3.9),))),
    ("cpu-bound-beside-idle-gpu", machine(IDLE, programs=(program(9, cpu_cores=0.1), program(10, cpu_cores=None)))),
    ("cpu-bound-beside-idle-gpu", machine(IDLE, programs=(program(9, "other", cpu_cores=3.9),))),
    # It holds memory of a GPU, and launches kernels.
    ("cpu-bound-beside-idle-gpu", machine(AT_WORK, IDLE, programs=(program(812, cpu_cores=1.0),))),
    # espeak is meant to.
    ("cpu-bound-beside-idle-gpu",
     machine(IDLE, programs=(program(9, cpu_cores=3.9),),
             fleet_file=fleet_file("[gpus]\n0 = 6093\n[server]\nengine = 'espeak'\n"))),
    ("gpu-not-here", machine(AT_WORK, IDLE, fleet_file=TWO)),
    ("gpu-not-here", machine(AT_WORK, fleet_file=TWO, captured=True)),
    ("gpu-not-here", machine(fleet_file=fleet_file("[gpus]\n0 = 6093\n[server]\nengine = 'espeak'\n"))),
    ("gpu-not-here", machine(AT_WORK, fleet_file=fleet_file(f"[gpus]\n{AT_WORK.uuid} = 6093\n"))),
    ("gpu-not-here", machine(AT_WORK, fleet_file=fleet_file(f"[gpus]\n{MIG} = 6093\n"))),
    ("unbalanced-upstream", machine(AT_WORK, **traffic(gpu0=140, gpu1=100))),
    ("unbalanced-upstream", machine(AT_WORK, **traffic(gpu0=160, gpu1=10))),
    ("unbalanced-upstream", machine(AT_WORK, **traffic(gpu0=600))),
    # Somebody who has left the fleet answered most.
    ("unbalanced-upstream",
     machine(AT_WORK, traffic=Traffic({"gpu7": 900, "gpu0": 180, "gpu1": 180}, "", ""), in_service=("gpu0", "gpu1"))),
    ("least-conn-without-zone", machine(AT_WORK, fleet_file=TWO, upstreams=(block(zone=True),))),
    ("least-conn-without-zone", machine(AT_WORK, fleet_file=TWO, upstreams=(block(least_conn=False),))),
    # Somebody else's site.
    ("least-conn-without-zone", machine(AT_WORK, fleet_file=TWO, upstreams=(block((3000,)),))),
    ("throttling", machine(card(0), card(1, throttled_by=None))),
    ("memory-held-by-strangers", machine(card(0, process(7, 60, "G")), programs=(program(7, "display"),))),
    ("memory-held-by-strangers",
     machine(card(0, process(1), process(2), process(3)),
             programs=(program(1), program(2, "instance"), program(3, "mps")))),
    # How much is not known, nor what it is.
    ("memory-held-by-strangers", machine(card(0, process(5, None)), programs=(program(5, "other"),))),
    ("memory-held-by-strangers", machine(card(0, process(5)))),
    ("no-mps", machine(card(0, process(1)), card(1, process(2)), programs=(program(1), program(2)))),
    ("no-mps", machine(card(0, process(1, kind="M+C"), process(2, kind="M+C")), programs=(program(1), program(2)))),
    ("no-mps",
     machine(card(0, process(1), process(2), process(3, 30, name="/usr/bin/nvidia-cuda-mps-server")),
             programs=(program(1), program(2)))),
    ("no-mps", machine(card(0, process(1), process(2)), programs=(program(1), program(2, "other")))),
    ("tf32-off", machine(AT_WORK, tf32={"gpu0": True})),
    ("tf32-off", machine(AT_WORK)),
]  # fmt: skip


def named(situation: Situation, name: str) -> list[Finding]:
    return [finding for finding in findings.find(situation) if finding.name == name]


@pytest.mark.parametrize(("name", "severity", "situation"), FOUND)
def test_a_situation_that_has_it_is_found_out_with_evidence(name: str, severity: str, situation: Situation) -> None:
    found = named(situation, name)

    assert {each.severity for each in found} == {severity}
    for finding in found:
        assert finding.evidence
        assert finding.remedy
        assert set(finding.gpus) <= {each.index for each in situation.cards}


@pytest.mark.parametrize(("name", "situation"), NOT_FOUND)
def test_a_situation_that_comes_near_is_not(name: str, situation: Situation) -> None:
    assert named(situation, name) == []


def test_every_rule_has_a_situation_with_and_one_without() -> None:
    names = {name for name, _, _ in FOUND}

    assert len(findings.RULES) == len(names)
    assert names == {name for name, _ in NOT_FOUND}


def test_the_documentation_names_every_finding_with_its_severities() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| ([^|]+) \|", DOCS.read_text(), re.MULTILINE)
    documented = {(name, word) for name, words in rows for word in re.findall(r"\b(high|medium|low)\b", words)}

    assert documented == {(name, severity) for name, severity, _ in FOUND}


def test_the_two_cards_of_which_one_does_all_the_work_yield_what_was_found_of_them() -> None:
    first, second = findings.find(seed())

    assert (first.name, first.severity, first.gpus) == ("one-gpu-takes-all", "high", ("0",))
    assert first.evidence == (
        "9,126 MiB of the 9,190 MiB in use are on it (99.3 %)",
        "GPU 0: 9,126 of 24,576 MiB used, utilisation 71 %, P2, 171 W, 1 computing process",
        "GPU 1: 64 of 24,576 MiB used, utilisation 0 %, P8, 18 W, no computing process",
    )
    assert (second.name, second.what) == (
        "gpu-idle",
        "GPU 1 (NVIDIA GeForce RTX 3090) is idle while another computes",
    )


def test_two_servers_of_one_name_in_a_capture_are_taken_for_copies_of_one() -> None:
    def captured(*names: str) -> Situation:
        there = card(0, *(process(pid, name=name) for pid, name in enumerate(names, 1)))
        return machine(there, programs=tuple(program(pid, None) for pid in range(1, len(names) + 1)), captured=True)

    assert named(captured("python", "python"), "no-mps")
    assert not named(captured("python", "blender"), "no-mps")


@pytest.mark.parametrize(
    ("there", "says"),
    [
        (IDLE, "`chatterbox-deploy status`"),
        (card(2), "an instance of its own"),
        (card(2, mig=True), "MIG"),
    ],
)
def test_what_to_do_about_an_idle_gpu_depends_on_why_it_is(there: Card, says: str) -> None:
    (finding,) = named(machine(AT_WORK, there, fleet_file=TWO), "gpu-idle")

    assert says in finding.remedy


def test_the_gravest_come_first() -> None:
    mixed = machine(AT_WORK, card(1, throttled_by=("sw_power_cap",)), card(2), tf32={"gpu0": False})

    assert [each.severity for each in findings.find(mixed)] == ["high", "high", "high", "low", "low"]
