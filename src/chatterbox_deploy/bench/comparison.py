"""Trials beside each other: speed-up and efficiency, and two runs as ratios. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatterbox_deploy.bench import stats
from chatterbox_deploy.bench.results import AUDIO, REQUESTS, Figure, shown, values

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatterbox_deploy.bench.loads import Run, Trial
    from chatterbox_deploy.bench.stats import Estimate


@dataclass(frozen=True, slots=True)
class Scaled:
    """A trial beside the first, smallest one."""

    label: str
    times: Estimate
    """Of its sound per second, or of its requests where the sound is unknown. Of the first itself exactly 1."""
    units: float
    """How many times as many GPUs, or instances, it has."""

    @property
    def efficiency(self) -> float:
        return self.times.value / self.units


@dataclass(frozen=True, slots=True)
class Compared:
    """One figure of two runs."""

    label: str
    figure: Figure
    before: Estimate | None
    after: Estimate | None
    ratio: Estimate | None
    """After over before; ``None`` where one of them is unknown, or not positive, or they are of different loops."""
    same_loop: bool = True
    """Whether both are of a closed loop, or both of an open one: else each finds what the other is told."""

    @property
    def says(self) -> str:
        """Whether the two differ by more than their spread explains; "unclear" where the interval holds 1."""
        ratio = self.ratio
        if not self.same_loop:
            return "not comparable"
        if self.before is not None and self.after is not None and self.before.value == self.after.value == 0:
            return "both 0"
        if ratio is None or ratio.low is None or ratio.high is None:
            return "unknown"
        if ratio.low <= 1 <= ratio.high:
            return "unclear"
        if not self.figure.better:
            return "more" if ratio.value > 1 else "less"
        return "better" if (ratio.value > 1) == (self.figure.better == "more") else "worse"


def scaling(trials: Sequence[Trial]) -> tuple[Scaled, ...]:
    """Each trial over the first; empty with fewer than two, or where the first answered nothing."""
    if len(trials) < 2:
        return ()
    first = trials[0]
    figure = AUDIO if all(values(trial, AUDIO) for trial in trials) else REQUESTS
    rows = []
    for trial in trials:
        times = stats.ratio(values(trial, figure), values(first, figure))
        if times is None:
            return ()
        times = stats.Estimate(1.0) if trial is first else times
        rows.append(Scaled(trial.label, times, units(trial) / units(first)))
    return tuple(rows)


def units(trial: Trial) -> int:
    """What a speed-up is counted in: GPUs where they are known, else instances."""
    return trial.gpus or len(trial.instances) or 1


def speed_up(trials: Sequence[Trial]) -> str | None:
    """The last trial over the first, in one line."""
    rows = scaling(trials)
    if not rows or units(trials[-1]) == units(trials[0]):
        return None
    last = rows[-1]
    sure = "" if last.times.low is None else f" (95 %: {last.times.low:.2f} to {last.times.high:.2f})"
    what, one = _named(trials[-1]), _named(trials[0])
    return f"{what} speak {last.times.value:.2f} times as much as {one}{sure}: efficiency {last.efficiency * 100:.0f} %"


def _named(trial: Trial) -> str:
    count, what = units(trial), "instance" if trial.gpus is None else "GPU"
    return f"{count} {what}{'' if count == 1 else 's'}"


def compare(before: Run, after: Run) -> tuple[Compared, ...]:
    """Every figure that either of them knows, of each trial that both have."""
    rows = []
    for one, other in matched(before, after):
        label = one.label if one.label == other.label else f"{one.label} → {other.label}"
        alike = _same_loop(one, other)
        for figure in shown(one, other):
            first, second = values(one, figure), values(other, figure)
            if first or second:
                ratio = stats.ratio(second, first) if alike else None
                rows.append(Compared(label, figure, stats.mean(first), stats.mean(second), ratio, alike))
    return tuple(rows)


def _same_loop(one: Trial, other: Trial) -> bool:
    return (one.load.rate_per_s is None) == (other.load.rate_per_s is None)


def matched(before: Run, after: Run) -> tuple[tuple[Trial, Trial], ...]:
    """Trials of the same label; where each run has but one, those two, whatever they are called."""
    if len(before.trials) == len(after.trials) == 1:
        return ((before.trials[0], after.trials[0]),)
    others = {trial.label: trial for trial in after.trials}
    return tuple((trial, others[trial.label]) for trial in before.trials if trial.label in others)


def differences(before: Run, after: Run) -> tuple[str, ...]:
    """What else differs between two runs, and so may explain what their ratios show."""
    notes = []
    if before.machine != after.machine:
        notes.append(f"the machines differ: {before.machine} / {after.machine}")
    for one, other in matched(before, after):
        if not _same_loop(one, other):
            notes.append(
                f"{one.label}: one is a closed loop and one an open one: the first finds the throughput, which the "
                "second is told; give both --concurrency, or both --rate"
            )
        for name in one.load.__dataclass_fields__:
            a, b = getattr(one.load, name), getattr(other.load, name)
            if a != b and name != "repetitions":
                notes.append(f"{one.label}: the loads differ: {name} {_plain(a)} / {_plain(b)}")
    return tuple(notes)


def _plain(value: object) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def gain(before: Run, after: Run) -> str | None:
    """What B has over A in sound, or in requests where the sound is unknown, in one line.

    ``None``: several trials, or a closed loop and an open one.
    """
    pairs = matched(before, after)
    if len(pairs) != 1 or not _same_loop(*pairs[0]):
        return None
    one, other = pairs[0]
    figure = AUDIO if values(one, AUDIO) and values(other, AUDIO) else REQUESTS
    times = stats.ratio(values(other, figure), values(one, figure))
    if times is None:
        return None
    sure = "" if times.low is None else f" (95 %: {times.low:.2f} to {times.high:.2f})"
    more = units(other) / units(one)
    efficiency = (
        ""
        if more == 1
        else f", on {more:g} times as many GPUs or instances: efficiency {times.value / more * 100:.0f} %"
    )
    return f"B speaks {times.value:.2f} times as much as A{sure}{efficiency}"
