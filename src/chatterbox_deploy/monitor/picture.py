"""A fleet at one moment, as the monitor shows it: GPUs, instances, front, and what goes on. Decides nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

WINDOW_S = 60.0
"""Of which is told whatever happens in time; of less, where less was seen."""

Severity = Literal["critical", "warning", "note"]
Phase = Literal["begins", "ends", "happens"]

FRONT = "front"
"""What an event is about, and a row, where it is no instance."""


@dataclass(frozen=True, slots=True)
class GpuRow:
    """One GPU now. ``None`` is unknown, never 0."""

    gpu: str
    """Its index, as nvidia-smi counts."""

    uuid: str | None
    name: str
    """Of one that does not answer: the reason."""

    memory_used_bytes: int | None
    memory_total_bytes: int | None
    utilisation_percent: float | None
    sm_active_percent: float | None
    temperature_c: float | None
    power_w: float | None
    power_limit_w: float | None
    p_state: str | None
    throttled_by: tuple[str, ...] | None

    @property
    def memory_percent(self) -> float | None:
        if self.memory_used_bytes is None or not self.memory_total_bytes:
            return None
        return 100 * self.memory_used_bytes / self.memory_total_bytes


@dataclass(frozen=True, slots=True)
class InstanceRow:
    """One instance now, and in the window. ``None`` is unknown, never 0."""

    instance: str
    gpus: tuple[str, ...]
    port: int
    unit: str | None
    """``ActiveState/SubState``; ``None`` where systemd knows no such unit, as below ``up``."""

    ready: str | None
    """``ready``, ``draining``, ``not ready``, ``no answer``; ``None`` for a server that does not tell."""

    waiting: int | None
    running: int | None
    restarts: int | None
    window_s: float | None
    """How long was seen of what follows."""

    requests_per_s: float | None
    """To speak."""

    wait_s: float | None
    """Mean from admission until the engine began; ``None``, as all that follow, where there was nothing to measure."""

    first_byte_s: float | None
    """Mean from arrival until the first sound was sent."""

    first_byte_p95_s: float | None
    rtf: float | None
    audio_s_per_s: float | None
    tokens_per_s: float | None
    """Of speech, while the engine worked; ``None`` too where the engine counts none."""

    busy_percent: float | None
    """Share of time in which the engine spoke; above 100 where it speaks several at a time."""

    outcomes: Mapping[str, int] | None
    """Requests to speak by outcome since the process started."""

    gpu_memory_bytes: int | None

    @property
    def lost(self) -> bool:
        """Whether it can speak for nobody, as far as is known."""
        down = self.unit is not None and not self.unit.startswith("active/")
        return self.ready == "no answer" or (self.ready is None and down)


@dataclass(frozen=True, slots=True)
class FrontRow:
    """What the front's log tells of one instance in the window, or of what nginx answered by itself (``front``)."""

    instance: str
    requests: int
    """That it answered last, well or not."""

    share_percent: float | None
    errors: int
    """Of these, 5xx without 503."""

    refused: int
    """Of these, 503: nobody had room, and this one was asked last."""

    passed_on: int
    """Requests that it was asked for in vain, and another one after it."""

    p50_s: float | None
    p95_s: float | None


@dataclass(frozen=True, slots=True)
class Front:
    """The front, and what it answered in the window."""

    listen: str
    answers: bool | None
    nginx: str | None
    """ActiveState of the host's nginx; ``None`` where systemd knows none."""

    requests: int | None
    errors: int | None
    """5xx without 503."""

    refused: int | None
    """503: nobody had room."""

    retried: int | None
    """Requests for which more than one instance was asked."""

    rows: tuple[FrontRow, ...] | None


@dataclass(frozen=True, slots=True)
class Event:
    """Something that begins, ends, or happens once."""

    time: datetime
    phase: Phase
    severity: Severity
    about: str
    """An instance, ``GPU 0``, or ``front``."""

    text: str
    do: str | None
    """What to type."""

    lasted_s: float | None = None
    """Of one that ends."""


@dataclass(frozen=True, slots=True)
class Picture:
    """All that is shown of one moment."""

    time: datetime
    monotonic_s: float
    window_s: float | None
    """Seconds between the first and the last look of the window; ``None`` at the first look."""

    gpus: tuple[GpuRow, ...] | None
    instances: tuple[InstanceRow, ...]
    front: Front
    audio_s_per_s: float | None
    """Of all instances that told."""

    now: tuple[Event, ...]
    """What has begun and not ended, the gravest first."""

    new: tuple[Event, ...]
    """What began, ended or happened since the last look."""

    notes: tuple[str, ...]

    @property
    def well(self) -> bool:
        """Whether nothing critical goes on."""
        return not any(event.severity == "critical" for event in self.now)

    def as_json(self) -> dict[str, Any]:
        """The same for programs: bytes, seconds, percent; ``null`` is unknown."""

        def told(event: Event) -> dict[str, Any]:
            return {**asdict(event), "time": event.time.isoformat(timespec="milliseconds")}

        said: dict[str, Any] = rounded(
            {
                "time": self.time.isoformat(timespec="milliseconds"),
                "well": self.well,
                "window_s": self.window_s,
                "audio_s_per_s": self.audio_s_per_s,
                "gpus": None if self.gpus is None else [asdict(row) for row in self.gpus],
                "instances": [asdict(row) for row in self.instances],
                "front": asdict(self.front),
                "now": [told(event) for event in self.now],
                "events": [told(event) for event in self.new],
                "notes": list(self.notes),
            }
        )
        return said


def rounded(value: Any) -> Any:
    """Four places are more than was measured."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list | tuple) else value
