"""What the command line of ``bench`` asks for, and every contradiction in it. Measures nothing."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_deploy.bench import aims, heard, loads, rate_search
from chatterbox_deploy.cli import arguments, outputs
from chatterbox_deploy.cli.outputs import Output
from chatterbox_deploy.errors import BenchmarkError, FleetFileError, UnknownInstance
from chatterbox_deploy.fleet import resolve
from chatterbox_deploy.report import charts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chatterbox_deploy.bench.aims import Aim
    from chatterbox_deploy.bench.loads import Load, Run, Target
    from chatterbox_deploy.fleet import Fleet

PLOTS = (".svg", ".png", ".html")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The command line of ``bench run``."""

    fleet_file: Path
    urls: tuple[str, ...]
    instances: tuple[str, ...]
    each: bool
    scale: str | None
    concurrency: int | None
    rate: float | None
    find_rate: str | None
    texts: str
    audio_format: heard.Format | None
    stream: bool
    output: Path | None
    overwrite: bool
    plots: tuple[Path, ...]
    key_file: str | None


def read(asked: Asked) -> tuple[tuple[Aim, ...], Target | None, tuple[str, ...]]:
    """Whom to ask, for what target, and with which texts.

    Raises:
        BenchmarkError: with every problem of the command line and its files.
    """
    problems: list[str] = []
    found: tuple[Aim, ...] = ()
    target: Target | None = None
    texts: tuple[str, ...] = ()
    try:
        found = _aims(asked)
    except FleetFileError as error:
        problems += [f"{asked.fleet_file}: {problem}" for problem in error.problems]
    except BenchmarkError as error:
        problems += error.problems
    except UnknownInstance as error:
        problems.append(f"--instance: {error}")
    try:
        target = None if asked.find_rate is None else rate_search.parse_target(asked.find_rate)
    except BenchmarkError as error:
        problems += error.problems
    try:
        texts = _texts(asked.texts)
    except BenchmarkError as error:
        problems += error.problems
    problems += _contradictions(asked) + plot_problems(asked.plots) + _output_problems(asked)
    if problems:
        raise BenchmarkError(problems)
    return found, target, texts


def problems(given: Mapping[str, Any]) -> list[str]:
    """What ``read`` has against a command line of which only some values are good."""
    values: dict[str, Any] = {field.name: given.get(field.name) for field in fields(Asked)}
    try:
        read(Asked(**values))
    except BenchmarkError as error:
        return list(error.problems)
    return []


def _contradictions(asked: Asked) -> list[str]:
    """Options that cannot be together."""
    problems = []
    ways = {
        "--concurrency": asked.concurrency is not None,
        "--rate": asked.rate is not None,
    }
    if all(ways.values()):
        problems.append("--concurrency and --rate: a loop is closed or open; give one")
    if asked.find_rate is not None:
        problems += [f"{name} and --find-rate: it tries rates of its own" for name in ("--rate",) if ways[name]]
        problems += [
            f"{name} and --find-rate: it asks one thing at a time"
            for name, given in (("--each", asked.each), ("--scale", asked.scale is not None))
            if given
        ]
    if asked.each and asked.scale is not None:
        problems.append("--each and --scale: give one")
    if asked.urls and asked.instances:
        problems.append("--url and --instance: a server of no fleet file has no instance names; give one")
    if asked.stream and asked.audio_format not in (None, *heard.STEADY):
        problems.append(f"--stream and --format {asked.audio_format}: what has come when is known of wav and pcm")
    return problems


def _output_problems(asked: Asked) -> list[str]:
    # A run cannot be had again; a drawing can, by `bench show`.
    written = [Output("--output", asked.output, stays=not asked.overwrite), *to_draw(asked.plots)]
    texts = None if asked.texts in loads.TEXT_SETS else asked.texts
    return outputs.problems(written, {"FLEET": asked.fleet_file, "--texts": texts, "--api-key-file": asked.key_file})


def to_draw(plots: Sequence[Path]) -> list[Output]:
    """What ``--plot`` names; a drawing that is there is replaced."""
    return [Output("--plot", path) for path in plots]


def plot_problems(plots: Sequence[Path]) -> list[str]:
    """Names that say no format, and a package that is not there."""
    problems = [f"--plot: {path} ends in none of {', '.join(PLOTS)}" for path in plots if path.suffix not in PLOTS]
    if plots and not charts.available():
        problems.append(f"--plot: there is no matplotlib: {sys.executable} -m pip install 'matplotlib>=3.9'")
    return problems


def _aims(asked: Asked) -> tuple[Aim, ...]:
    by = "each" if asked.each else None if asked.scale is None else "instances"
    if asked.urls:
        return aims.of_doors(aims.at(asked.urls), by)
    fleet: Fleet = resolve(arguments.read_fleet(asked.fleet_file))
    chosen = arguments.find_instances(fleet, asked.instances)
    if asked.each:
        return aims.each(chosen)
    if asked.scale is not None:
        return aims.growing(chosen, asked.scale)
    return (aims.together(chosen),) if asked.instances else (aims.front(fleet),)


def loaded(load: Load, aim: Aim, asked: Asked) -> Load:
    """``load`` as it is for ``aim``: as much for each instance, where there are more and more of them."""
    count = max(1, len(aim.instances))
    times = count if asked.scale is not None else 1
    if asked.rate is not None:
        return replace(load, rate_per_s=asked.rate * times)
    return replace(load, concurrency=count if asked.concurrency is None else asked.concurrency * times)


def _texts(name: str) -> tuple[str, ...]:
    if name in loads.TEXT_SETS:
        return loads.read_texts(name)
    try:
        texts = loads.read_texts(name, Path(name).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise BenchmarkError(
            [f"--texts: cannot read {name}: {(reason or str(error)).lower()}; sets are {', '.join(loads.TEXT_SETS)}"]
        ) from None
    if not texts:
        raise BenchmarkError([f"--texts: there is no text in {name}"])
    return texts


def saved(path: Path, problems: list[str]) -> Run | None:
    try:
        return loads.from_json(path.read_text(encoding="utf-8"), source=str(path))
    except BenchmarkError as error:
        problems += error.problems
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        problems.append(f"cannot read {path}: {(reason or str(error)).lower()}")
    return None
