"""What the samples of a benchmark come down to: figures with their uncertainty, shares, warnings. Pure.

docs/bench.md defines each figure; the two change together.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from chatterbox_deploy.bench import stats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from chatterbox_deploy.bench.loads import Repetition, Sample, Trial
    from chatterbox_deploy.bench.stats import Estimate

LAG_S = 0.01
"""Later than this, and later than a hundredth of the latency, our own lateness is part of what we report."""

CORE = 0.8
"""Of one core: a generator busier than this measures itself."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of a repetition."""

    name: str
    title: str
    unit: str
    better: Literal["more", "less", ""]
    of: Callable[[Repetition], float | None]
    """``None``: nobody knows."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one instance had of a trial, within the windows of all repetitions."""

    instance: str
    requests: int
    share: float
    """Of the requests that somebody answered, whole or not."""
    failed: int
    audio_s: float | None
    tokens_per_s: float | None
    real_time_factor: float | None
    cores: float | None


def credit(sample: Sample, window_s: float) -> float:
    """The part of an answer that belongs to the window: of the time from due to done, the share within it.

    Who was half done when the window began, or ended, counts half. As there is as much in flight at both ends, this
    is the throughput without the grain of whole requests.
    """
    if sample.failure is not None:
        return 0.0
    within_s = min(sample.done_s, window_s) - max(sample.due_s, 0.0)
    return max(0.0, within_s) / max(sample.latency_s, 1e-9)


def requests_per_s(repetition: Repetition) -> float:
    return sum(credit(sample, repetition.window_s) for sample in repetition.samples) / repetition.window_s


def audio_s_per_s(repetition: Repetition) -> float | None:
    total = 0.0
    for sample in repetition.samples:
        part = credit(sample, repetition.window_s)
        if part and sample.audio_s is None:
            return None
        total += part * (sample.audio_s or 0.0)
    return total / repetition.window_s


def tokens_per_s(repetition: Repetition) -> float | None:
    if not repetition.counted or any(each.tokens is None for each in repetition.counted.values()):
        return None
    return sum((each.tokens or 0.0) / each.over_s for each in repetition.counted.values())


def real_time_factor(repetition: Repetition) -> float | None:
    spent_s = [each.synthesis_s for each in repetition.counted.values()]
    made_s = [each.audio_s for each in repetition.counted.values()]
    if None in spent_s or None in made_s or not sum(filter(None, made_s)):
        return None
    return sum(filter(None, spent_s)) / sum(filter(None, made_s))


def failed_share(repetition: Repetition) -> float | None:
    measured = repetition.measured
    return sum(sample.failure is not None for sample in measured) / len(measured) if measured else None


def stalled_share(repetition: Repetition) -> float | None:
    known = [sample.stalls for sample in repetition.measured if sample.failure is None and sample.stalls is not None]
    return sum(stalls > 0 for stalls in known) / len(known) if known else None


def stalled_s(repetition: Repetition) -> float | None:
    return _mean(sample.stalled_s for sample in repetition.measured if sample.failure is None)


def longest_gap_s(repetition: Repetition) -> float | None:
    gaps = [s.longest_gap_s for s in repetition.measured if s.failure is None and s.longest_gap_s is not None]
    return max(gaps, default=None)


def server_cores(repetition: Repetition) -> float | None:
    if not repetition.counted or any(each.cpu_s is None for each in repetition.counted.values()):
        return None
    return sum((each.cpu_s or 0.0) / each.over_s for each in repetition.counted.values())


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _latency(q: float) -> Callable[[Repetition], float | None]:
    return lambda repetition: stats.quantile([sample.latency_s for sample in repetition.measured], q)


def _first_byte(q: float) -> Callable[[Repetition], float | None]:
    return lambda repetition: stats.quantile([sample.to_first_byte_s for sample in repetition.measured], q)


def _waits(repetition: Repetition) -> list[float]:
    return [s.queue_wait_s for s in repetition.measured if s.failure is None and s.queue_wait_s is not None]


AUDIO = Figure("audio_s_per_s", "sound", "s/s", "more", audio_s_per_s)
REQUESTS = Figure("requests_per_s", "requests answered", "1/s", "more", requests_per_s)
LATENCY = Figure("latency_p50_s", "latency p50", "s", "less", _latency(0.5))
FIRST_BYTE = Figure("first_byte_p50_s", "first byte p50", "s", "less", _first_byte(0.5))
STALLED = Figure("stalled_share", "answers that stalled", "%", "less", stalled_share)
FAILED = Figure("failed_share", "requests failed", "%", "less", failed_share)
LAG = Figure(
    "lag_p99_s", "sent late p99", "s", "",
    lambda repetition: stats.quantile([sample.lag_s for sample in repetition.measured], 0.99),
)  # fmt: skip

FIGURES = (
    REQUESTS,
    AUDIO,
    Figure("tokens_per_s", "speech tokens", "1/s", "more", tokens_per_s),
    Figure("real_time_factor", "real-time factor", "", "less", real_time_factor),
    Figure(
        "latency_mean_s", "latency mean", "s", "less",
        lambda repetition: _mean(sample.latency_s for sample in repetition.measured if sample.failure is None),
    ),
    LATENCY,
    Figure("latency_p95_s", "latency p95", "s", "less", _latency(0.95)),
    Figure("latency_p99_s", "latency p99", "s", "less", _latency(0.99)),
    FIRST_BYTE,
    Figure("first_byte_p95_s", "first byte p95", "s", "less", _first_byte(0.95)),
    Figure("first_byte_p99_s", "first byte p99", "s", "less", _first_byte(0.99)),
    Figure("wait_mean_s", "queue wait mean", "s", "less", lambda repetition: _mean(_waits(repetition))),
    Figure(
        "wait_p95_s", "queue wait p95", "s", "less", lambda repetition: stats.quantile(_waits(repetition), 0.95)
    ),
    STALLED,
    Figure("stalled_mean_s", "stalled, mean of answers", "s", "less", stalled_s),
    Figure("longest_gap_s", "longest gap in a stream", "s", "less", longest_gap_s),
    FAILED,
    Figure("server_cores", "cores, the instances", "", "", server_cores),
    Figure("machine_cores", "cores, the whole machine", "", "", lambda repetition: repetition.use.machine_cores),
    Figure("generator_cores", "cores, this benchmark", "", "", lambda repetition: repetition.use.generator_cores),
    LAG,
)  # fmt: skip
"""In the order of the table."""


STREAMED = ("stalled_share", "stalled_mean_s", "longest_gap_s")
"""Asked about only where the sound was meant to stream."""


def shown(*trials: Trial) -> tuple[Figure, ...]:
    """Those of FIGURES that are worth a line."""
    streams = any(trial.load.stream for trial in trials)
    return tuple(figure for figure in FIGURES if streams or figure.name not in STREAMED)


def values(trial: Trial, figure: Figure) -> tuple[float, ...]:
    """``figure`` of each repetition; empty where it is unknown of one."""
    found = [figure.of(repetition) for repetition in trial.repetitions]
    return () if None in found else tuple(value for value in found if value is not None)


def estimate(trial: Trial, figure: Figure) -> Estimate | None:
    """Over the repetitions; no figure is below 0, so neither is its interval."""
    found = stats.mean(values(trial, figure))
    if found is None or found.low is None:
        return found
    return replace(found, low=max(0.0, found.low))


def shares(trial: Trial) -> tuple[Share, ...]:
    """Of each instance, in the trial's order; then of whoever else answered."""
    measured = [sample for repetition in trial.repetitions for sample in repetition.measured]
    told = [sample.instance for sample in measured if sample.instance is not None]
    others = sorted(set(told) - set(trial.instances))
    rows = []
    for name in (*trial.instances, *others):
        own = [sample for sample in measured if sample.instance == name]
        good = [sample.audio_s for sample in own if sample.failure is None]
        rows.append(
            Share(
                instance=name,
                requests=len(own),
                share=len(own) / len(told) if told else 0.0,
                failed=len(own) - len(good),
                audio_s=None if None in good else sum(filter(None, good)),
                **_counted(trial, name),
            )
        )
    return tuple(rows)


def _counted(trial: Trial, name: str) -> dict[str, float | None]:
    """What one instance counted, over all windows."""
    found = [each for repetition in trial.repetitions if (each := repetition.counted.get(name)) is not None]
    over_s = sum(each.over_s for each in found)

    def total(which: str) -> float | None:
        counts = [getattr(each, which) for each in found]
        return None if not counts or None in counts else sum(counts)

    tokens, cpu_s, synthesis_s, audio_s = (total(which) for which in ("tokens", "cpu_s", "synthesis_s", "audio_s"))
    return {
        "tokens_per_s": None if tokens is None else tokens / over_s,
        "cores": None if cpu_s is None else cpu_s / over_s,
        "real_time_factor": synthesis_s / audio_s if synthesis_s is not None and audio_s else None,
    }


def failures(trial: Trial) -> dict[str, int]:
    """How many requests failed how, the most frequent first."""
    found = Counter(s.failure for r in trial.repetitions for s in r.measured if s.failure is not None)
    return dict(found.most_common())


def notes(trial: Trial) -> tuple[str, ...]:
    """What whoever reads the figures of ``trial`` has to know."""
    found = []
    median = estimate(trial, LATENCY)
    latency_s = median.value if median is not None else 0.0
    lag = estimate(trial, LAG) or stats.mean(
        [max((s.lag_s for s in r.measured), default=0.0) for r in trial.repetitions]
    )
    if lag is not None and lag.value > max(LAG_S, latency_s / 100):
        found.append(
            f"this benchmark fell behind: requests left up to {lag.value:.3f} s after they were due (which their"
            " latencies include); ask from another machine, or for less"
        )
    busiest = max((repetition.use.generator_cores for repetition in trial.repetitions), default=0.0)
    if busiest > CORE:
        found.append(f"this benchmark used {busiest:.2f} of the one core it can use: latencies are partly its own")
    if trial.repetitions and latency_s * 5 > min(repetition.window_s for repetition in trial.repetitions):
        found.append(
            f"the window is short for answers that take {latency_s:.1f} s: --window {latency_s * 10:.0f} or more"
        )
    if latency_s > trial.load.warmup_s:
        found.append(
            f"the warm-up is shorter than an answer takes: --warmup {max(1.0, latency_s * 1.5):.0f} or more, or the"
            " window begins before the load is what it will be"
        )
    if len(trial.repetitions) == 1:
        found.append("a single repetition has no interval: nobody knows how far the next one would be off")
    silent = [name for name in trial.instances if any(name not in each.counted for each in trial.repetitions)]
    if silent:
        found.append(f"no /metrics of {', '.join(silent)}: what the servers count themselves is unknown")
    failed = failures(trial)
    if failed:
        found.append("failed: " + ", ".join(f"{count} x {why}" for why, count in failed.items()))
    return tuple(found)


def number(value: float | None, unit: str = "") -> str:
    """Three digits that count, or four places, in the unit of a figure; a dash for the unknown."""
    if value is None:
        return "-"
    if unit == "%":
        value *= 100
    size = abs(value)
    places = 0 if size >= 100 or size == 0 else 1 if size >= 10 else 2 if size >= 1 else 3 if size >= 0.1 else 4
    return f"{value:,.{places}f}"


def interval(estimate: Estimate | None, unit: str = "") -> str:
    if estimate is None or estimate.low is None:
        return "-"
    return f"{number(estimate.low, unit)} to {number(estimate.high, unit)}"
