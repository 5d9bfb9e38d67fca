"""Look for the highest rate that holds a target: trials, one rate after another, until enough is known."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from chatterbox_deploy.bench import rate_search, results
from chatterbox_deploy.bench.loads import Search, Tried
from chatterbox_deploy.errors import CommandFailed

if TYPE_CHECKING:
    from chatterbox_deploy.bench.aims import Aim
    from chatterbox_deploy.bench.loads import Load, Target, Trial
    from chatterbox_deploy.bench.measuring import Bench


class Teller(Protocol):
    """Is told what became of each rate."""

    def __call__(self, tried: Tried, target: Target) -> None: ...


async def highest_rate(
    bench: Bench, aim: Aim, load: Load, target: Target, *, tolerance: float, tell: Teller
) -> tuple[tuple[Trial, ...], Search]:
    """Every trial, the closed loop first from whose pace the search starts, and what they say of ``target``.

    ``load`` is that closed loop. A trial that somebody stopped is left out: what it says is worth less than it looks.

    Raises:
        CommandFailed: the fleet answers nothing.
    """
    # Its pace only bounds the search: one repetition.
    pace = await bench.trial(aim, replace(load, repetitions=1))
    search = Search(target=target, tried=())
    trials = [pace] if pace.repetitions else []
    pace_per_s = max((results.requests_per_s(repetition) for repetition in pace.repetitions), default=0.0)
    if pace.repetitions and pace_per_s == 0:
        msg = f"cannot look for a rate: no request was answered: {results.failures(pace)}"
        raise CommandFailed(msg)
    while pace.repetitions:
        rate = rate_search.next_rate(search, pace_per_s=pace_per_s, tolerance=tolerance, repetitions=load.repetitions)
        if rate is None:
            break
        # Other arrivals when a rate is tried again.
        done = sum(len(tried.of) for tried in search.tried)
        trial = await bench.trial(aim, replace(load, concurrency=None, rate_per_s=rate, seed=load.seed + done))
        if len(trial.repetitions) < load.repetitions:
            break
        trials = _merged(trials, replace(trial, label=f"{rate:.3g} requests/s"))
        search = replace(search, tried=rate_search.merge(search.tried, _tried(trial, rate, target)))
        tell(search.tried[-1], target)
    return tuple(trials), search


def _merged(trials: list[Trial], new: Trial) -> list[Trial]:
    """With ``new`` behind; of the same rate as the last one, as more repetitions of it."""
    if trials[-1].label != new.label:
        return [*trials, new]
    return [*trials[:-1], replace(trials[-1], repetitions=(*trials[-1].repetitions, *new.repetitions))]


def _tried(trial: Trial, rate_per_s: float, target: Target) -> Tried:
    measured = [repetition.measured for repetition in trial.repetitions]
    return Tried(
        rate_per_s=rate_per_s,
        late=tuple(sum(not target.met_by(sample) for sample in samples) for samples in measured),
        of=tuple(len(samples) for samples in measured),
    )
