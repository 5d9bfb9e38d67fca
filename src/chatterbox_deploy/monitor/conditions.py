"""What ought to be known of a fleet while it is so, and beyond which limits: GPUs, instances, front. Asks nobody."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from chatterbox_deploy import systemd
from chatterbox_deploy.monitor.picture import FRONT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chatterbox_deploy.fleet import Fleet, Instance
    from chatterbox_deploy.monitor.picture import Front, GpuRow, InstanceRow, Severity

ADVISE = "chatterbox-deploy advise"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Beyond which something is an event."""

    temperature_c: float = 85.0
    """Of a GPU. NVIDIA's data center cards slow themselves down from 83 to 90 °C on, by model."""

    gpu_memory_percent: float = 95.0
    rtf: float = 1.0
    """Seconds of synthesis per second of sound; above 1 a listener waits."""

    wait_s: float = 10.0
    """Mean wait for the engine, of one instance."""

    error_percent: float = 1.0
    """Of the front's answers, 5xx other than 503, which only says that all queues are full."""

    refused_percent: float = 5.0
    """Of the front's answers, 503."""


def limits(given: Mapping[str, str]) -> Limits:
    """The defaults, but for those that are given, as an operator types them.

    Raises:
        ValueError: there is no such limit, or it is no number.
    """
    names = [each.name for each in fields(Limits)]
    numbers: dict[str, float] = {}
    for name, text in given.items():
        if name not in names:
            msg = f"there is no limit {name!r}; there are {', '.join(names)}"
            raise ValueError(msg)
        try:
            numbers[name] = float(text)
        except ValueError:
            msg = f"{name} should be a number, got {text!r}; write it like temperature_c=80"
            raise ValueError(msg) from None
    return Limits(**numbers)


@dataclass(frozen=True, slots=True)
class Condition:
    severity: Severity
    about: str
    text: str
    do: str | None = None
    lingers_s: float = 0.0
    """For how long it may be absent and still goes on: what comes and goes with every look is one event."""


LINGERS_S = 10.0

# What is so now, by a key that stays the same while it lasts.
_Conditions = Iterator[tuple[str, Condition]]


def of_gpus(
    gpus: Sequence[GpuRow], seen: Sequence[str], going_on: Mapping[str, object], allowed: Limits
) -> _Conditions:
    for gpu in seen:
        if gpu not in {row.gpu for row in gpus if row.uuid is not None}:
            yield f"gpu {gpu} lost", Condition("critical", f"GPU {gpu}", "does not answer any more", "dmesg")
    for row in gpus:
        about = f"GPU {row.gpu}"
        hot = f"gpu {row.gpu} hot"
        # Some degrees lower at the end than at the beginning, or it would begin and end all the time.
        limit_c = allowed.temperature_c - (3 if hot in going_on else 0)
        if row.temperature_c is not None and row.temperature_c >= limit_c:
            yield (
                hot,
                Condition("warning", about, f"is hot: {row.temperature_c:.0f} °C", "nvidia-smi -q -d TEMPERATURE"),
            )
        for reason in row.throttled_by or ():
            # At its power limit a busy card is where it should be: worth knowing, and no alarm.
            grave: Severity = "note" if reason == "sw_power_cap" else "warning"
            text = f"is slowed down: {reason}"
            yield f"gpu {row.gpu} {reason}", Condition(grave, about, text, "nvidia-smi -q -d PERFORMANCE", LINGERS_S)
        if row.memory_percent is not None and row.memory_percent >= allowed.gpu_memory_percent:
            text = f"is full: {row.memory_percent:.0f} % of its memory is used"
            yield f"gpu {row.gpu} full", Condition("warning", about, text, "nvidia-smi")


def of_instances(fleet: Fleet, rows: Sequence[InstanceRow], allowed: Limits) -> _Conditions:
    for instance, row in zip(fleet.instances, rows, strict=True):
        name = row.instance
        log = f"chatterbox-deploy logs {name}"
        if row.lost:
            state = "" if row.unit is None else f", its unit is {row.unit}"
            yield f"{name} lost", Condition("critical", name, f"does not answer{state}", log)
        if row.ready == "not ready":
            yield f"{name} not ready", Condition("critical", name, "not ready: its engine is dead or stuck", log)
        if row.ready == "draining":
            yield f"{name} draining", Condition("note", name, "ends, and finishes what it began")
        room = _queue_size(instance)
        if row.waiting is not None and room and row.waiting >= room:
            text = f"its queue is full: {row.waiting} wait"
            yield f"{name} full", Condition("warning", name, text, ADVISE, LINGERS_S)
        if row.wait_s is not None and row.wait_s > allowed.wait_s:
            yield f"{name} waits", Condition("warning", name, f"requests wait {row.wait_s:.1f} s for it", ADVISE)
        if row.rtf is not None and row.rtf > allowed.rtf:
            text = f"slower than the listener: {row.rtf:.2f} s for 1 s of sound"
            yield f"{name} slow", Condition("warning", name, text, ADVISE)


def _queue_size(instance: Instance) -> int | None:
    told = instance.environment.get("CHATTERBOX_QUEUE_SIZE", "")
    return int(told) if told.isdigit() else None


def of_front(front: Front, allowed: Limits) -> _Conditions:
    log = f"journalctl -u {systemd.NGINX_UNIT}"
    if front.answers is False:
        yield "front lost", Condition("critical", FRONT, f"does not answer on {front.listen}", log)
    if not front.requests or front.errors is None or front.refused is None:
        return
    if (percent := 100 * front.errors / front.requests) >= allowed.error_percent:
        text = f"{percent:.1f} % of its answers are errors"
        yield "front errors", Condition("critical", FRONT, text, "chatterbox-deploy status")
    if (percent := 100 * front.refused / front.requests) >= allowed.refused_percent:
        text = f"{percent:.1f} % of requests find every queue full"
        yield "front refuses", Condition("warning", FRONT, text, ADVISE)
