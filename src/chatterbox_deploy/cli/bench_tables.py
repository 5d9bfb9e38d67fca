"""How benchmarks read: tables, and the same as JSON. Prints nothing; measures nothing."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from chatterbox_deploy.bench import comparison, rate_search, results
from chatterbox_deploy.bench.results import FIGURES, interval, number
from chatterbox_deploy.sizing.capacity import gigabytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatterbox_deploy.bench.comparison import Compared
    from chatterbox_deploy.bench.loads import CardUse, Load, Run, Search, Trial
    from chatterbox_deploy.bench.stats import Estimate

SIDE_BY_SIDE = (
    "audio_s_per_s", "latency_p95_s", "first_byte_p95_s", "failed_share", "requests_per_s", "latency_p50_s",
    "wait_mean_s", "first_byte_p50_s",
)  # fmt: skip
"""Figures of several trials in one table, the most telling first."""


def heading(trial: Trial) -> str:
    """Who was asked, and how."""
    who = trial.label
    count, gpus = len(trial.instances), trial.gpus
    if count > 1 and not who.endswith("instances"):
        on = "" if gpus is None or who.endswith("GPUs") else f" on {gpus} GPU{'' if gpus == 1 else 's'}"
        who += f": {count} instances{on}"
    return f"{who}; {_load(trial.load)}; {_windows(trial)}"


def _windows(trial: Trial) -> str:
    windows_s = [repetition.window_s for repetition in trial.repetitions]
    planned_s = trial.load.window_s
    whole = all(window_s > 0.99 * planned_s for window_s in windows_s)
    measured = f"{len(windows_s)} x {planned_s:g} s" if whole else f"{sum(windows_s):.1f} s in {len(windows_s)} windows"
    return f"{measured}, each after {trial.load.warmup_s:g} s"


def _load(load: Load) -> str:
    if load.rate_per_s is not None:
        how = f"open loop, {load.rate_per_s:.3g} requests/s at random"
    else:
        how = f"closed loop, {load.concurrency} client{'' if load.concurrency == 1 else 's'}"
    return f"{how}; texts {load.texts}, {load.audio_format}{', as a stream' if load.stream else ''}; seed {load.seed}"


def figures(trial: Trial) -> Table:
    """Every figure that is known of one trial."""
    table = _table("<", ">mean", ">95 %", "<")
    for figure in results.shown(trial):
        found = results.estimate(trial, figure)
        table.add_row(figure.title, _value(found, figure.unit), interval(found, figure.unit), figure.unit)
    return table


def shares(trial: Trial) -> Table:
    """What each instance had of a trial."""
    table = _table(
        "<instance", ">requests", ">share", ">failed", ">sound s",
        ">tokens/s", ">RTF", ">cores",
    )  # fmt: skip
    for each in results.shares(trial):
        table.add_row(
            each.instance, str(each.requests), f"{each.share * 100:.1f} %", str(each.failed), number(each.audio_s),
            number(each.tokens_per_s), number(each.real_time_factor), number(each.cores),
        )  # fmt: skip
    return table


def cards(trial: Trial) -> Table | None:
    """GPUs of this machine, over all repetitions; ``None`` where no driver answered."""
    seen = [repetition.use.cards for repetition in trial.repetitions if repetition.use.cards is not None]
    if not seen:
        return None
    table = _table("<GPU", "<name", ">busy", ">SMs", ">memory", ">power")
    for number_, first in enumerate(seen[0]):
        over = [each[number_] for each in seen if len(each) == len(seen[0])]
        memory = _mean(over, "memory_used_bytes")
        table.add_row(
            first.index, first.name,
            _with(_mean(over, "utilisation_percent"), " %"), _with(_mean(over, "sm_active_percent"), " %"),
            "-" if memory is None else gigabytes(round(memory)), _with(_mean(over, "power_w"), " W"),
        )  # fmt: skip
    return table


def _mean(cards: Sequence[CardUse], what: str) -> float | None:
    known = [value for card in cards if (value := getattr(card, what)) is not None]
    return sum(known) / len(known) if known else None


def _with(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.0f}{unit}"


def side_by_side(trials: Sequence[Trial], *, scaled: bool, count: int) -> Table:
    """Trials as rows, with the first ``count`` of SIDE_BY_SIDE; ``scaled``: also how many times the first each is."""
    chosen = [figure for figure in FIGURES if figure.name in SIDE_BY_SIDE[:count]]
    scaling = comparison.scaling(trials) if scaled else ()
    titles = [
        f">{figure.title.replace(' ', chr(10), 1)}{f', {figure.unit}' if figure.unit else ''}" for figure in chosen
    ]
    table = _table("<", *titles, *([">times", ">efficiency"] if scaling else []))
    for place, trial in enumerate(trials):
        cells = [_give_or_take(results.estimate(trial, figure), figure.unit) for figure in chosen]
        row = scaling[place] if scaling else None
        times = [] if row is None else [_give_or_take(row.times), f"{row.efficiency * 100:.0f} %"]
        table.add_row(trial.label, *cells, *times)
    return table


def _give_or_take(estimate: Estimate | None, unit: str = "") -> str:
    reach = None if estimate is None else estimate.half_width
    return _value(estimate, unit) + ("" if reach is None else f" ±{number(reach, unit)}")


def compared(rows: Sequence[Compared]) -> Table:
    """Figures of one trial in two runs."""
    table = _table("<", ">A", ">B", "<", ">B / A", ">95 %", "<")
    for row in rows:
        unit = row.figure.unit
        table.add_row(
            row.figure.title, _value(row.before, unit), _value(row.after, unit), unit,
            _value(row.ratio), interval(row.ratio), row.says,
        )  # fmt: skip
    return table


def searched(search: Search) -> Table:
    """Every rate that was tried, the lowest first."""
    table = _table(">requests/s", ">late", ">95 %", ">of", "<")
    for tried in sorted(search.tried, key=lambda each: each.rate_per_s):
        found = rate_search.verdict(tried, search.target)
        table.add_row(
            number(tried.rate_per_s),
            f"{found.late.value * 100:.1f} %",
            _percents(found.late),
            str(sum(tried.of)),
            found.says,
        )
    return table


def _percents(late: Estimate) -> str:
    return "-" if late.low is None or late.high is None else f"{late.low * 100:.1f} to {late.high * 100:.1f} %"


def as_json(run: Run) -> dict[str, Any]:
    """What the tables were made from."""
    speed_up = comparison.speed_up(run.trials)
    return {
        "version": run.version,
        "command": run.command,
        "began": run.began,
        "machine": run.machine,
        "cores": run.cores,
        "partial": run.partial,
        "probes": run.probes,
        "trials": [_trial(trial) for trial in run.trials],
        "speed_up": speed_up,
        "scaling": [asdict(row) | {"efficiency": row.efficiency} for row in comparison.scaling(run.trials)]
        if speed_up
        else [],
        "search": None if run.search is None else _search(run.search),
    }


def _trial(trial: Trial) -> dict[str, Any]:
    return {
        "label": trial.label,
        "instances": list(trial.instances),
        "gpus": trial.gpus,
        "load": asdict(trial.load),
        "repetitions": len(trial.repetitions),
        "requests": sum(len(repetition.measured) for repetition in trial.repetitions),
        "requests_with_warm_up": sum(len(repetition.samples) for repetition in trial.repetitions),
        "figures": {
            figure.name: {
                "unit": "share" if figure.unit == "%" else figure.unit,
                "value": found and found.value,
                "low": found and found.low,
                "high": found and found.high,
                "repetitions": list(results.values(trial, figure)),
            }
            for figure in FIGURES
            for found in (results.estimate(trial, figure),)
        },
        "shares": [asdict(each) for each in results.shares(trial)],
        "cards": [
            None if each.use.cards is None else [asdict(card) for card in each.use.cards] for each in trial.repetitions
        ],
        "failures": results.failures(trial),
        "notes": list(results.notes(trial)),
    }


def _search(search: Search) -> dict[str, Any]:
    found = rate_search.answer(search)
    return {
        "target": str(search.target),
        **asdict(found),
        "says": rate_search.sentence(search),
        "tried": [asdict(tried) | asdict(rate_search.verdict(tried, search.target)) for tried in search.tried],
    }


def compared_as_json(rows: Sequence[Compared]) -> list[dict[str, Any]]:
    return [
        {
            "label": row.label,
            "figure": row.figure.name,
            "unit": "share" if row.figure.unit == "%" else row.figure.unit,
            "a": row.before and asdict(row.before),
            "b": row.after and asdict(row.after),
            "ratio": row.ratio and asdict(row.ratio),
            "says": row.says,
        }
        for row in rows
    ]


def _value(estimate: Estimate | None, unit: str = "") -> str:
    return number(None if estimate is None else estimate.value, unit)


def _table(*columns: str) -> Table:
    """Each column's title, after ``<`` or ``>`` for its side; only the last may be folded."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for place, column in enumerate(columns):
        last = place == len(columns) - 1
        table.add_column(column[1:], justify="left" if column[0] == "<" else "right", no_wrap=not last)
    return table
