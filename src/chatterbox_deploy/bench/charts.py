"""Draw a benchmark: SVG, PNG, or an HTML page that needs nothing else. Needs the ``plots`` extra; writes no file."""

from __future__ import annotations

import html
import io
from typing import TYPE_CHECKING

from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import PercentFormatter

from chatterbox_deploy.bench import comparison, rate_search, results
from chatterbox_deploy.bench.results import AUDIO, REQUESTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from chatterbox_deploy.bench.loads import Run, Search, Trial
    from chatterbox_deploy.bench.stats import Estimate

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
th, td {{ padding: .15rem 1rem .15rem 0; text-align: right; border-bottom: 1px solid #ddd; }}
th:first-child, td:first-child {{ text-align: left; }}
svg {{ max-width: 100%; height: auto; }}
code {{ background: #f3f3f3; padding: .1rem .3rem; }}
</style>
<h1>{title}</h1>
<p><code>{command}</code><br>{began}, {machine}</p>
{sentence}
{drawing}
{body}
</html>
"""


def draw(run: Run, suffix: str) -> bytes:
    """The bytes of a file whose name ends in ``suffix``: .svg, .png or .html."""
    if suffix == ".html":
        return _page(run).encode()
    return _drawn(run, suffix[1:])


def _drawn(run: Run, kind: str) -> bytes:
    """The same bytes for the same run: no date, no random names."""
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "bench"}):
        _canvas(run).savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _canvas(run: Run) -> Canvas:
    canvas = Canvas(figsize=(11, 7.5), layout="constrained")
    (top_left, top_right), (low_left, low_right) = canvas.subplots(2, 2)
    trials = run.trials
    if run.search is not None:
        _search(top_left, run.search)
        trials = _ends(run.search, trials)
    elif comparison.scaling(trials):
        _scaling(top_left, trials)
    else:
        _moments(top_left, trials[-1])
    _distribution(top_right, trials)
    _throughput(low_left, trials)
    _shares(low_right, trials[-1])
    canvas.suptitle(f"{run.machine}; {run.began}{'; partial' if run.partial else ''}", fontsize=9)
    return canvas


def _ends(search: Search, trials: tuple[Trial, ...]) -> tuple[Trial, ...]:
    """What a search ended with, the rate that held and the one that missed; else the closed loop that it began with."""
    found = rate_search.answer(search)
    rates = [rate for rate in (found.held_per_s, found.missed_per_s) if rate is not None]
    ends = [trial for trial in trials if trial.load.rate_per_s in rates]
    return tuple(sorted(ends, key=lambda trial: trial.load.rate_per_s or 0.0)) or trials[:1]


def _reach(found: Estimate) -> list[list[float]]:
    """Matplotlib's error bar: below, above."""
    low, high = (found.value if end is None else end for end in (found.low, found.high))
    return [[max(0.0, found.value - low)], [max(0.0, high - found.value)]]


def _moments(axes: Axes, trial: Trial) -> None:
    """Every request of every repetition: when it was due, and how long it took."""
    for number, repetition in enumerate(trial.repetitions):
        good = [sample for sample in repetition.samples if sample.failure is None]
        axes.plot(
            [sample.due_s for sample in good], [sample.latency_s for sample in good], ".",
            markersize=3, color=f"C{number}",
        )  # fmt: skip
        bad = [sample for sample in repetition.samples if sample.failure is not None]
        axes.plot([sample.due_s for sample in bad], [sample.done_s - sample.due_s for sample in bad], "x", color="red")
    axes.axvspan(-trial.load.warmup_s, 0, color="0.93")
    axes.set(title="Latency of each request (x: failed; grey: warm-up)", xlabel="due, s", ylabel="s")
    axes.set_ylim(bottom=0)


def _distribution(axes: Axes, trials: tuple[Trial, ...]) -> None:
    """Share of all requests that had their last byte, or their first, by a time; failures never have."""
    for number, trial in enumerate(trials):
        measured = [sample for repetition in trial.repetitions for sample in repetition.measured]
        for times, style in (
            (sorted(sample.latency_s for sample in measured), "-"),
            (sorted(sample.to_first_byte_s for sample in measured), ":"),
        ):
            known = [time_s for time_s in times if time_s != float("inf")]
            share = [(place + 1) / len(times) for place in range(len(known))]
            axes.step(
                known, share, style, color=f"C{number}", where="post", label=trial.label if style == "-" else None
            )
    axes.set(title="Answered by then (dotted: first byte)", xlabel="s since due", ylim=(0, 1.02))
    axes.legend(fontsize=8)


def _throughput(axes: Axes, trials: tuple[Trial, ...]) -> None:
    figure = AUDIO if all(results.values(trial, AUDIO) for trial in trials) else REQUESTS
    for number, trial in enumerate(trials):
        found = results.estimate(trial, figure)
        if found is not None:
            axes.bar(trial.label, found.value, yerr=_reach(found), capsize=4, color=f"C{number}")
    axes.set(title="Sound made, s per s" if figure is AUDIO else "Requests answered, per s")
    axes.tick_params(axis="x", rotation=20, labelsize=8)


def _shares(axes: Axes, trial: Trial) -> None:
    rows = results.shares(trial)
    axes.bar([row.instance for row in rows], [row.share * 100 for row in rows])
    axes.set(title=f"Share of requests, {trial.label}", ylabel="%")
    axes.tick_params(axis="x", rotation=20, labelsize=8)


def _scaling(axes: Axes, trials: tuple[Trial, ...]) -> None:
    rows = comparison.scaling(trials)
    many = [row.units for row in rows]
    axes.plot(many, many, "--", color="0.6", label="ideal")
    for row in rows:
        axes.errorbar(row.units, row.times.value, yerr=_reach(row.times), marker="o", capsize=4, color="C0")
    axes.set(title="Times the first", xlabel="times as many", xticks=many)
    axes.legend(fontsize=8)


def _search(axes: Axes, search: Search) -> None:
    for tried in search.tried:
        late = rate_search.verdict(tried, search.target).late
        axes.errorbar(tried.rate_per_s, late.value, yerr=_reach(late), marker="o", capsize=4, color="C0")
    axes.axhline(1 - search.target.quantile, linestyle="--", color="red")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(title=str(search.target), xlabel="requests/s", ylabel="late")


def _page(run: Run) -> str:
    drawing = _drawn(run, "svg").decode()
    said = [] if run.search is None else [rate_search.sentence(run.search)]
    said += [told] if (told := comparison.speed_up(run.trials)) is not None and run.search is None else []
    said += ["Partial: it was stopped."] if run.partial else []
    parts = []
    for trial in run.trials:
        parts += [f"<h2>{html.escape(trial.label)}</h2>", _table(trial)]
        parts += [f"<p>Note: {html.escape(note)}.</p>" for note in results.notes(trial)]
    return _PAGE.format(
        title="chatterbox-deploy bench",
        command=html.escape(run.command),
        began=html.escape(run.began),
        machine=html.escape(run.machine),
        sentence="".join(f"<p><strong>{html.escape(each)}</strong></p>" for each in said),
        body="\n".join(parts),
        drawing=drawing[drawing.index("<svg") :],
    )


def _table(trial: Trial) -> str:
    rows = ["<table><tr><th>figure<th>mean<th>95 %<th>unit"]
    for figure in results.shown(trial):
        found = results.estimate(trial, figure)
        if found is None:
            continue
        value = results.number(found.value, figure.unit)
        rows.append(f"<tr><td>{figure.title}<td>{value}<td>{results.interval(found, figure.unit)}<td>{figure.unit}")
    return "".join([*rows, "</table>"])
