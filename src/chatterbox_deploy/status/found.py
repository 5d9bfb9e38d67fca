"""What a host tells of a fleet: systemd of its units, each instance of itself. Reads answers; asks nobody."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import PurePosixPath

    from chatterbox_deploy.systemd import Mark


PROPERTIES = (
    "Id", "LoadState", "ActiveState", "SubState", "Result", "NRestarts", "MainPID", "InvocationID", "ExecMainStatus",
    "MemoryCurrent", "ActiveEnterTimestampMonotonic", "NeedDaemonReload", "UnitFileState",
)  # fmt: skip
"""What to ask ``systemctl show`` for (org.freedesktop.systemd1(5))."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What systemd tells of a unit."""

    load: str = "not-found"
    active: str = "inactive"
    sub: str = "dead"
    result: str = "success"
    file_state: str = ""
    """``enabled``, ``static``, …; empty where there is no file."""

    restarts: int | None = None
    main_pid: int | None = None
    exit_status: int | None = None
    """Of the last process that ended."""

    memory_bytes: int | None = None
    active_at_s: float | None = None
    """On the host's monotonic clock (CLOCK_MONOTONIC)."""

    invocation_id: str = ""
    needs_reload: bool = False
    """Whether its file changed after systemd had read it."""

    @property
    def state(self) -> str | None:
        """As ``active/running``; ``None`` where there is no such unit, or no more than its name."""
        return None if self.load == "not-found" and self.active == "inactive" else f"{self.active}/{self.sub}"


def read_unit(properties: Mapping[str, str]) -> Unit:
    """One unit as ``systemctl show`` printed it; a number that is ``[not set]``, or 0 where 0 means none, is None."""

    def number(name: str) -> int | None:
        text = properties.get(name, "")
        return int(text) if text.isdigit() else None

    entered_us = number("ActiveEnterTimestampMonotonic")
    return Unit(
        load=properties.get("LoadState", ""),
        active=properties.get("ActiveState", ""),
        sub=properties.get("SubState", ""),
        result=properties.get("Result", ""),
        file_state=properties.get("UnitFileState", ""),
        restarts=number("NRestarts"),
        main_pid=number("MainPID") or None,
        exit_status=number("ExecMainStatus"),
        memory_bytes=number("MemoryCurrent"),
        active_at_s=entered_us / 1e6 if entered_us else None,
        invocation_id=properties.get("InvocationID", ""),
        needs_reload=properties.get("NeedDaemonReload") == "yes",
    )


@dataclass(frozen=True, slots=True)
class Readiness:
    """What a server of ours says of itself at ``/readyz``."""

    ready: bool
    draining: bool
    waiting: int | None
    running: int | None
    spoken: int | None
    gpu_memory_bytes: int | None
    """Held by its process, as of its last utterance."""

    invocation_id: str | None


def read_readiness(body: bytes) -> Readiness | None:
    """What ``/readyz`` answered; ``None`` if no server of ours speaks so."""
    try:
        said = json.loads(body)
    except ValueError:
        return None
    if not isinstance(said, dict) or not isinstance(said.get("ready"), bool):
        return None

    def number(value: object) -> int | None:
        return value if isinstance(value, int) else None

    memory = said.get("gpu_memory")
    life = said.get("invocation_id")
    return Readiness(
        ready=said["ready"],
        draining=said.get("draining") is True,
        waiting=number(said.get("waiting")),
        running=number(said.get("running")),
        spoken=number(said.get("spoken")),
        gpu_memory_bytes=number(memory.get("reserved_bytes")) if isinstance(memory, dict) else None,
        invocation_id=life if isinstance(life, str) else None,
    )


def readiness_word(readiness: Readiness | None) -> str:
    """``ready``, ``draining``, ``not ready``; ``no answer`` of one that was asked and told nothing."""
    if readiness is None:
        return "no answer"
    if readiness.draining:
        return "draining"
    return "ready" if readiness.ready else "not ready"


@dataclass(frozen=True, slots=True)
class Found:
    """What a host told when it was asked."""

    units: Mapping[str, Unit] | None
    """By name; ``None`` where no systemd answers."""

    texts: Mapping[PurePosixPath, str | None]
    """Of files that are wanted or have a name that we give to files; ``None`` is not there, and a path that is
    missing here could not be read."""

    running: Mapping[str, Mark | None] = field(default_factory=dict)
    """By unit: the mark in its process's environment, where that could be read; ``None`` where it has none."""

    places: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """Address and port by instance that tells how it is."""

    readiness: Mapping[str, Readiness | None] = field(default_factory=dict)
    """By instance that was asked; ``None`` where nobody of ours answered."""

    front_answers: bool | None = None
    """Whether the front's address answers; ``None`` if it was not asked."""

    monotonic_s: float = 0.0
