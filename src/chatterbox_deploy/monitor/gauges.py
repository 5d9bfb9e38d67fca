"""A picture of the fleet for other programs: cells of a CSV file, gauges for node_exporter. Writes nothing."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from chatterbox_deploy.exposition import Gauge
from chatterbox_deploy.monitor.picture import WINDOW_S, rounded

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from chatterbox_deploy.monitor.picture import InstanceRow, Picture


def cells(picture: Picture) -> Iterator[tuple[str, str, str, float | str | None]]:
    """(what it is about, its name, quantity, value) of all that is shown: a line each of a CSV file."""
    about: list[tuple[str, str, object]] = [
        *(("gpu", row.gpu, row) for row in picture.gpus or ()),
        *(("instance", row.instance, row) for row in picture.instances),
        *(("front", row.instance, row) for row in picture.front.rows or ()),
    ]
    yield "fleet", "", "audio_s_per_s", rounded(picture.audio_s_per_s)
    for quantity in ("requests", "errors", "refused", "retried"):
        yield "front", "", quantity, getattr(picture.front, quantity)
    for what, name, row in about:
        for each in fields(row):  # type: ignore[arg-type]  # the rows are dataclasses
            value = getattr(row, each.name)
            if each.name in ("gpu", "uuid", "instance", "gpus", "name", "outcomes"):
                continue
            yield what, name, each.name, "+".join(value) if isinstance(value, tuple) else rounded(value)


PREFIX = "chatterbox_monitor_"


def of(picture: Picture) -> tuple[Gauge, ...]:
    """What node_exporter's textfile collector is given: that which no instance can tell of itself."""
    cards, rows = picture.gpus or (), picture.front.rows or ()

    def of_gpus(name: str, documentation: str, values: Iterable[float | None]) -> Gauge:
        series = [((row.gpu, row.name), value) for row, value in zip(cards, values, strict=True)]
        return Gauge(f"{PREFIX}gpu_{name}", documentation, ("gpu", "name"), series)

    def of_front(name: str, documentation: str, values: Iterable[int]) -> Gauge:
        series = [((row.instance,), value / WINDOW_S) for row, value in zip(rows, values, strict=True)]
        return Gauge(f"{PREFIX}front_{name}_per_second", documentation, ("instance_name",), series)

    window = f"over the last {WINDOW_S:.0f} s of the front's log"
    return (
        Gauge(
            f"{PREFIX}last_look_timestamp_seconds",
            "When the monitor last looked; when that is long ago, nothing below is true any more.",
            (),
            [((), picture.time.timestamp())],
        ),
        of_gpus("memory_used_bytes", "GPU memory in use, by whomever.", (row.memory_used_bytes for row in cards)),
        of_gpus("memory_total_bytes", "GPU memory there is.", (row.memory_total_bytes for row in cards)),
        of_gpus(
            "utilisation_ratio",
            "Share of time in which any kernel ran; a GPU of tiny kernels reads 1 and is nearly idle.",
            (_ratio(row.utilisation_percent) for row in cards),
        ),
        of_gpus(
            "sm_active_ratio", "Share of multiprocessors at work.", (_ratio(row.sm_active_percent) for row in cards)
        ),
        of_gpus("temperature_celsius", "Temperature of the GPU.", (row.temperature_c for row in cards)),
        of_gpus("power_watts", "Power it draws.", (row.power_w for row in cards)),
        of_gpus("power_limit_watts", "Power it may draw.", (row.power_limit_w for row in cards)),
        Gauge(
            f"{PREFIX}gpu_throttled",
            "1 for each reason that slows the GPU down now, as nvidia-smi names it (-q -d PERFORMANCE).",
            ("gpu", "name", "reason"),
            [((row.gpu, row.name, reason), 1) for row in cards for reason in row.throttled_by or ()],
        ),
        Gauge(
            f"{PREFIX}instance_up",
            "1 while the instance answers, or of a server that does not tell, while its unit is active; else 0.",
            ("instance_name",),
            [((row.instance,), _up(row)) for row in picture.instances],
        ),
        Gauge(
            f"{PREFIX}instance_restarts",
            "Restarts that nobody asked for, as systemd counts them.",
            ("instance_name",),
            [((row.instance,), row.restarts) for row in picture.instances],
        ),
        Gauge(
            f"{PREFIX}front_up",
            "1 while the front answers; else 0.",
            (),
            [((), None if picture.front.answers is None else float(picture.front.answers))],
        ),
        of_front("requests", f"Requests by who answered, {window}.", (row.requests for row in rows)),
        of_front("errors", f"Of these, those answered with 5xx but 503, {window}.", (row.errors for row in rows)),
        of_front("refused", f"Of these, those answered with 503, {window}.", (row.refused for row in rows)),
        of_front(
            "passed_on", f"Requests that this one was asked for in vain, {window}.", (row.passed_on for row in rows)
        ),
    )


def _ratio(percent: float | None) -> float | None:
    return None if percent is None else percent / 100


def _up(row: InstanceRow) -> float | None:
    if row.ready is None and row.unit is None:
        return None
    return float(not row.lost)
