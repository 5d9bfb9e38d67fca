"""Prometheus' text format: what an instance counts, read; what the monitor sees, written. Asks nobody."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from prometheus_client.metrics_core import Metric

Labels = tuple[tuple[str, str], ...]
"""Sorted by name."""

STARTED = "process_start_time_seconds"
"""Tells one life of a process from the next."""

_CUMULATIVE = frozenset({"counter", "histogram"})


@dataclass(frozen=True, slots=True)
class Exposition:
    """Every sample of one scrape."""

    samples: Mapping[str, Mapping[Labels, float]] = field(default_factory=dict)
    counted: frozenset[str] = frozenset()
    """Names of samples that only grow while the process lives."""

    def value(self, name: str) -> float | None:
        """Of a metric without labels; ``None`` where it is not told."""
        return self.samples.get(name, {}).get(())

    def total(self, name: str, **labels: str) -> float | None:
        """Sum over all series with these labels; ``None`` where there is none."""
        wanted = labels.items()
        found = [value for having, value in self.samples.get(name, {}).items() if wanted <= dict(having).items()]
        return sum(found) if found else None

    def by(self, name: str, label: str) -> dict[str, float]:
        """Sums by the value of one label."""
        sums: dict[str, float] = defaultdict(float)
        for having, value in self.samples.get(name, {}).items():
            sums[dict(having).get(label, "")] += value
        return dict(sums)

    def only(self, name: str, label: str, values: Collection[str]) -> Exposition:
        """Of one metric, the series whose label has one of these values."""
        kept = {
            having: value for having, value in self.samples.get(name, {}).items() if dict(having).get(label) in values
        }
        return Exposition({name: kept}, self.counted)


def parse(text: str) -> Exposition | None:
    """What a scrape answered; ``None`` if that is not Prometheus' format.

    Samples that are no number are left out: they would make every sum unknown.
    """
    samples: dict[str, dict[Labels, float]] = defaultdict(dict)
    counted: set[str] = set()
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if not math.isnan(sample.value):
                    samples[sample.name][tuple(sorted(sample.labels.items()))] = sample.value
                if family.type in _CUMULATIVE:
                    counted.add(sample.name)
    except (ValueError, KeyError, IndexError):
        return None
    return Exposition(dict(samples), frozenset(counted)) if samples else None


def increase(before: Exposition, after: Exposition) -> Exposition:
    """What was counted between two scrapes of one address.

    A process that started meanwhile counts from 0: all of what it has counted is new. So is a series that was not
    there before, or that fell.
    """
    restarted = before.value(STARTED) != after.value(STARTED)
    grown: dict[str, dict[Labels, float]] = {}
    for name in after.counted:
        old = {} if restarted else before.samples.get(name, {})
        grown[name] = {
            labels: value - old[labels] if old.get(labels, math.inf) <= value else value
            for labels, value in after.samples.get(name, {}).items()
        }
    return Exposition(grown, after.counted)


def add(parts: Iterable[Exposition]) -> Exposition:
    """Increases one after the other, as one."""
    sums: dict[str, dict[Labels, float]] = defaultdict(dict)
    counted: frozenset[str] = frozenset()
    for part in parts:
        counted |= part.counted
        for name, series in part.samples.items():
            for labels, value in series.items():
                sums[name][labels] = sums[name].get(labels, 0.0) + value
    return Exposition(dict(sums), counted)


def mean(grown: Exposition, histogram: str) -> float | None:
    """Of what a histogram observed; ``None`` if that is nothing."""
    count, total = grown.total(f"{histogram}_count"), grown.total(f"{histogram}_sum")
    return total / count if count and total is not None else None


def quantile(grown: Exposition, histogram: str, share: float) -> float | None:
    """Of what a histogram observed, as Prometheus' ``histogram_quantile``: linear within a bucket, and never above the
    highest bound that is finite. ``None`` if it observed nothing.
    """
    buckets = sorted((float(bound), count) for bound, count in grown.by(f"{histogram}_bucket", "le").items())
    if not buckets or not buckets[-1][1]:
        return None
    rank = share * buckets[-1][1]
    lower_bound, lower_count = 0.0, 0.0
    for bound, count in buckets:
        if count >= rank and count > lower_count:
            if math.isinf(bound):
                return lower_bound
            return lower_bound + (bound - lower_bound) * (rank - lower_count) / (count - lower_count)
        lower_bound, lower_count = bound, count
    return lower_bound


@dataclass(frozen=True, slots=True)
class Gauge:
    """One quantity with its series; ``None`` is unknown, and not written."""

    name: str
    documentation: str
    labels: tuple[str, ...]
    series: Sequence[tuple[tuple[str, ...], float | None]]


def write(gauges: Iterable[Gauge]) -> str:
    """Text for node_exporter's textfile collector; a quantity of which nothing is known is absent."""
    registry = CollectorRegistry()
    registry.register(_Families(gauges))
    return generate_latest(registry).decode()


class _Families(Collector):
    def __init__(self, gauges: Iterable[Gauge]) -> None:
        self._gauges = tuple(gauges)

    def collect(self) -> Iterator[Metric]:
        for gauge in self._gauges:
            family = GaugeMetricFamily(gauge.name, gauge.documentation, labels=gauge.labels)
            for labels, value in gauge.series:
                if value is not None:
                    family.add_metric(labels, float(value))
            if family.samples:
                yield family
