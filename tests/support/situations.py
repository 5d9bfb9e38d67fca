"""Machines for reports, in a few words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chatterbox_deploy import fleet
from chatterbox_deploy.config import reading
from chatterbox_deploy.gpu import smi
from chatterbox_deploy.gpu.cards import Card, Process
from chatterbox_deploy.nginx import Block, Traffic
from chatterbox_deploy.report import situation
from chatterbox_deploy.report.pins import Line
from chatterbox_deploy.report.situation import FleetFile, Pin, Program, Situation

MIB = 2**20
SEED = Path(__file__).parents[2] / "docs/report/two-rtx-3090.xml"


def seed() -> Situation:
    """Two RTX 3090 of which one does all the work, known by a capture."""
    name = "docs/report/two-rtx-3090.xml"
    return situation.of_capture(smi.parse(SEED.read_bytes(), source=name), source=name)


def card(index: int, *processes: Process, **more: Any) -> Card:
    """An H200; with 500 MiB of its own in use, and what the processes hold."""
    held = sum(process.memory_bytes or 0 for process in processes)
    known: dict[str, Any] = {
        "uuid": f"GPU-{index:08d}-0000-0000-0000-000000000000",
        "memory_total_bytes": 143_771 * MIB,
        "memory_used_bytes": 500 * MIB + held,
        "memory_free_bytes": 143_771 * MIB - 500 * MIB - held,
        "utilisation_percent": 40 if processes else 0,
        "power_w": 210.0,
        "power_limit_w": 700.0,
        "processes": processes,
        "throttled_by": (),
        "compute_mode": "Default",
        "mig": False,
    }
    return Card(**{"index": str(index), "name": "NVIDIA H200", **known, **more})


def process(pid: int, mib: int | None = 4_200, kind: str = "C", name: str = "python") -> Process:
    """On a GPU."""
    return Process(pid=pid, name=name, kind=kind, memory_bytes=None if mib is None else mib * MIB)


def program(pid: int, kind: Any = "speech", **more: Any) -> Program:
    """A process of the host."""
    known: dict[str, Any] = {"name": "python", "command": ("python", "tts.py"), "environment_read": True}
    return Program(pid=pid, kind=kind, **{**known, **more})


def fleet_file(text: str) -> FleetFile:
    """That reads so."""
    loaded = reading.load(text, source="fleet.toml")
    return FleetFile("fleet.toml", text, loaded, fleet.resolve(loaded))


def machine(*cards: Card, programs: tuple[Program, ...] = (), **more: Any) -> Situation:
    """With 16 cores."""
    known: dict[str, Any] = {"told_by": "NVML", "taken": "2026-11-27 10:00 UTC", "cores": 16}
    return Situation(cards=cards, programs={each.pid: each for each in programs}, **{**known, **more})


def everything() -> Situation:
    """A machine with something of each kind."""
    return machine(
        card(0, process(1), process(2, kind="G"), process(3, None), process(9, 30, name="nvidia-cuda-mps-server"),
             throttled_by=("sw_power_cap",), sm_active_percent=31.0, temperature_c=61.0),
        card(1, processes=None, utilisation_percent=0),
        card(2, memory_total_bytes=None, memory_used_bytes=None, memory_free_bytes=None, processes=()),
        programs=(program(1, "instance", unit="chatterbox-tts-gpu0.service", cpu_cores=1.0),
                  program(2, "display", name="Xorg"), program(3, "other", name="<b>|`x`"), program(9, "mps"),
                  program(4, cpu_cores=2.5)),
        code=(Line("/srv/tts/api.py", 7, 'model.to("cuda:1")  # <script>', "cuda:1"),),
        pins=(Pin("a.service", "0"),),
        upstreams=(Block("/etc/nginx/conf.d/a.conf", "tts", (6093,), least_conn=True, zone=False),),
        traffic=Traffic({"gpu0": 900, "gpu1": 100}, "09:00", "10:00"),
        in_service=("gpu0", "gpu1"),
        tf32={"gpu0": False},
        fleet_file=fleet_file("[gpus]\n0 = 6093\n[server]\ntf32 = false\n"),
        unseen=("the moon: it is too far away",),
    )  # fmt: skip
