"""What a report is made from: a machine's GPUs, who is on them, and who speaks. Asks nobody, decides nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from chatterbox_deploy.report import proc

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from chatterbox_deploy.config.tables import FleetConfig
    from chatterbox_deploy.fleet import Fleet
    from chatterbox_deploy.gpu.cards import Card
    from chatterbox_deploy.gpu.smi import Capture
    from chatterbox_deploy.nginx import Block, Traffic
    from chatterbox_deploy.report.pins import Line
    from chatterbox_deploy.report.proc import Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A process that holds memory of a GPU, or that speaks without one."""

    pid: int
    name: str | None = None
    """As short as it can be: ``python``, ``Xorg``."""

    command: tuple[str, ...] = ()
    """Empty where nobody may know."""

    directory: str | None = None
    unit: str | None = None
    """Of systemd; ``None`` where it has none, or nobody knows."""

    kind: Kind | None = None
    """``None`` where nobody knows."""

    visible: str | None = None
    """Its ``CUDA_VISIBLE_DEVICES``; ``None`` where it has none, or nobody may know."""

    environment_read: bool = False
    """Whether it was ours to read."""

    cpu_cores: float | None = None
    """CPU seconds per second over a moment."""

    ports: tuple[int, ...] = ()
    """On which it listens."""


@dataclass(frozen=True, slots=True)
class Pin:
    """Somebody whom ``CUDA_VISIBLE_DEVICES`` tells which GPUs there are."""

    who: str
    """A unit, or a process."""

    visible: str


@dataclass(frozen=True, slots=True)
class FleetFile:
    """A fleet file, read."""

    path: str
    text: str
    config: FleetConfig
    fleet: Fleet


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """A machine at one moment."""

    cards: tuple[Card, ...]
    told_by: str
    """``NVML``, ``nvidia-smi -q -x``, or the name of a capture."""

    taken: str | None
    """When, in words."""

    captured: bool = False
    """Whether only a capture was read: then nothing is known of the host."""

    programs: Mapping[int, Program] = field(default_factory=dict)
    """By process id."""

    code: tuple[Line, ...] = ()
    """Lines of speech servers that name a GPU."""

    pins: tuple[Pin, ...] = ()
    """Of everybody who speaks."""

    upstreams: tuple[Block, ...] = ()
    """Every one that nginx's configuration has."""

    traffic: Traffic | None = None
    """What our front's log tells; ``None`` where there is none."""

    in_service: tuple[str, ...] = ()
    """Instances that our front lists, and that it asks."""

    tf32: Mapping[str, bool] = field(default_factory=dict)
    """By instance of ours that answered: whether its matrix products are in TF32."""

    fleet_file: FleetFile | None = None
    cores: int | None = None
    """CPUs that are online."""

    listening: frozenset[int] = frozenset()
    """TCP ports that somebody listens on."""

    unseen: tuple[str, ...] = ()
    """What was not looked at, each with the reason."""

    def program(self, pid: int) -> Program:
        """Whoever that is."""
        return self.programs.get(pid) or Program(pid=pid)


def unanswering(cards: Iterable[Card]) -> tuple[str, ...]:
    """GPUs that are there and tell nothing, in words."""
    return tuple(f"GPU {card.index}: {card.name}; dmesg(1) may say why" for card in cards if not card.uuid)


def of_capture(capture: Capture, *, source: str, file: FleetFile | None = None) -> Situation:
    """Of a machine that is known by a capture of ``nvidia-smi -q -x`` alone, and perhaps by its fleet file."""
    cards, attached = capture.cards, capture.attached
    partly = attached is not None and attached > len(cards)
    return Situation(
        cards=cards,
        told_by=source,
        taken=capture.taken,
        captured=True,
        fleet_file=file,
        programs={
            process.pid: _by_name(process.pid, process.name, process.kind)
            for card in cards
            for process in card.processes or ()
        },
        unseen=(
            *unanswering(cards),
            *((f"{attached} GPUs are in that machine, and the capture tells of {len(cards)} (-i)",) if partly else ()),
            "units, environments and code of the processes: a capture has their names only",
            "CPU use, nginx and its log, the servers' own answers: a capture has the GPUs only",
            "the number of CPU cores, by which instances on one GPU are reckoned",
        ),
    )


def _by_name(pid: int, name: str | None, kind: str | None) -> Program:
    what = proc.recognise((), unit=None, marked=False, gpu_kind=kind, name=name)
    return Program(pid=pid, name=short_name(name), kind=what)


def short_name(command: str | None) -> str | None:
    """``python`` of ``/opt/venv/bin/python -m chatterbox_server``."""
    return PurePosixPath(command.split(maxsplit=1)[0]).name if command and command.strip() else None
