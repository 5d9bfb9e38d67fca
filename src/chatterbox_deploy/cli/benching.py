"""Carry out a benchmark for the command line: the loop, its signals, its progress bar."""

from __future__ import annotations

import asyncio
import os
import platform
import shlex
import signal
import sys
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from chatterbox_deploy import __version__
from chatterbox_deploy.bench import asking, loads, measuring, rate_search, seeking
from chatterbox_deploy.bench.measuring import Bench, Stop
from chatterbox_deploy.bench.results import number
from chatterbox_deploy.gpu import nvml

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator, Sequence

    import aiohttp

    from chatterbox_deploy.bench.aims import Aim
    from chatterbox_deploy.bench.loads import Load, Run, Sample, Search, Target, Tried

T = TypeVar("T")


def run(
    trials: Sequence[tuple[Aim, Load]],
    texts: Sequence[str],
    *,
    api_key: str | None,
    target: Target | None,
    tolerance: float,
) -> Run:
    """Measure; what somebody stopped is marked so.

    Raises:
        CommandFailed: not everybody speaks, or the fleet answers nothing.
    """
    measuring.allow_many_connections()
    return asyncio.run(_run(trials, texts, api_key=api_key, target=target, tolerance=tolerance))


async def _run(
    trials: Sequence[tuple[Aim, Load]],
    texts: Sequence[str],
    *,
    api_key: str | None,
    target: Target | None,
    tolerance: float,
) -> Run:
    began = datetime.now(UTC)
    done: list[loads.Trial] = []
    search: Search | None = None
    with _stopped_by_signals() as stop, _Bar() as bar:
        async with asking.open_session(api_key) as session:
            ready = await _unless(stop, _begin(session, trials))
            settled, probes = ready or ([], 0)
            bench = Bench(session, texts, bar, stop)
            if target is not None and settled:
                aim, load = settled[0]
                found, search = await seeking.highest_rate(
                    bench, aim, load, target, tolerance=tolerance, tell=bar.tried
                )
                done += found
            else:
                for aim, load in settled:
                    trial = await bench.trial(aim, load)
                    done += [trial] if trial.repetitions else []
        partial = stop.asked.is_set()
    return loads.Run(
        format=1,
        version=__version__,
        command=shlex.join(["chatterbox-deploy", *sys.argv[1:]]),
        began=began.isoformat(timespec="seconds"),
        machine=_machine(),
        cores=os.cpu_count() or 1,
        probes=probes,
        partial=partial,
        trials=tuple(done),
        search=search,
    )


async def _begin(
    session: aiohttp.ClientSession, trials: Sequence[tuple[Aim, Load]]
) -> tuple[list[tuple[Aim, Load]], int]:
    """Everybody speaks: the trials with what is known of their doors, and how many requests that took."""
    settled = [(await measuring.settle(session, aim), load) for aim, load in trials]
    doors = dict.fromkeys(door for aim, _ in settled for door in aim.doors)
    return settled, await measuring.probe(session, doors, trials[0][1])


async def _unless(stop: Stop, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of ``work``; ``None`` if somebody stopped it."""
    working, stopped = asyncio.ensure_future(work), asyncio.ensure_future(stop.asked.wait())
    await asyncio.wait((working, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if working.done():
        return working.result()
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    return None


def _machine() -> str:
    model = next(
        (line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine()
    )
    names = [card.name for card in nvml.read(watch_s=0.0) or ()]
    gpus = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return f"{model}, {os.cpu_count()} cores{f', {gpus}' if gpus else ', no GPU'}"


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


@contextmanager
def _stopped_by_signals() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM: once asks, twice insists."""
    stop = Stop(asyncio.Event(), asyncio.Event())
    loop = asyncio.get_running_loop()

    def signalled() -> None:
        if stop.asked.is_set():
            stop.insisted.set()
        else:
            stop.asked.set()
            click.echo("stopping: waiting for what was sent; Ctrl-C again drops it", err=True)

    numbers = (signal.SIGINT, signal.SIGTERM)
    for each in numbers:
        loop.add_signal_handler(each, signalled)
    try:
        yield stop
    finally:
        for each in numbers:
            loop.remove_signal_handler(each)


class _Bar:
    """Progress on standard error: a bar on a terminal, else a line for each repetition."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[said]}"),
            console=self._console, refresh_per_second=4, transient=True,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=1.0, said="")

    def __enter__(self) -> _Bar:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def begins(self, label: str, number: int, of: int, length_s: float) -> None:
        title = f"{label}, {number} of {of}"
        if self._console.is_terminal:
            self._progress.reset(self._task, total=length_s, description=title, said="")
        else:
            click.echo(f"{title}: {length_s:g} s", err=True)

    def ticks(self, passed_s: float, samples: Sequence[Sample], in_flight: int) -> None:
        if not self._console.is_terminal:
            return
        failed = sum(sample.failure is not None for sample in samples)
        audio_s = sum(sample.audio_s or 0.0 for sample in samples)
        said = f"{len(samples) - failed} answered, {failed} failed, {in_flight} out, {number(audio_s)} s of sound"
        self._progress.update(self._task, completed=passed_s, said=said)

    def tried(self, tried: Tried, target: Target) -> None:
        found = rate_search.verdict(tried, target)
        self._console.print(
            f"{tried.rate_per_s:.3g} requests/s: {found.late.value * 100:.1f} % late of {sum(tried.of)}: {found.says}"
        )
