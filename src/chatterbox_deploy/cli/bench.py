"""``chatterbox-deploy bench``."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click
from rich.console import Console

from chatterbox_deploy.bench import comparison, heard, loads, rate_search, results
from chatterbox_deploy.cli import arguments, bench_asked, bench_tables, mistakes, outputs, telling
from chatterbox_deploy.errors import BenchmarkError, CommandFailed
from chatterbox_deploy.host import save

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.table import Table

    from chatterbox_deploy.bench.loads import Run


class _RunByDefault(click.Group):
    """``bench fleet.toml`` is ``bench run fleet.toml``."""

    command_class = mistakes.Command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            near = difflib.get_close_matches(args[0], self.commands, n=1, cutoff=0.7) if args else []
            if near and not Path(args[0]).exists():
                msg = f"there is no {args[0]!r}, neither a file nor a command (did you mean {near[0]!r}?)"
                raise click.UsageError(msg, ctx)
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click passes it
        return list(self.commands)


@click.group("bench", cls=_RunByDefault)
def bench_command() -> None:
    """Measure how fast the fleet speaks, and how sure that is; compare two measurements.

    \b
        chatterbox-deploy bench                                   # the front, one client per instance
        chatterbox-deploy bench --rate 2 -o before.json           # 2 requests a second, at random
        chatterbox-deploy bench --scale gpus                      # 1, 2, 4 … GPUs: speed-up, efficiency
        chatterbox-deploy bench --find-rate 'p95 first-byte <= 2' # the highest rate that holds it
        chatterbox-deploy bench --url http://127.0.0.1:8000       # any server, no fleet file
        chatterbox-deploy bench compare before.json after.json

    `bench [FLEET]` is `bench run [FLEET]`: `bench run --help` has its options. docs/bench.md says what each
    number means. It puts a load on a fleet that serves: whoever else asks it meanwhile waits longer.
    """


class _Run(mistakes.Command):
    def further(self, given: Mapping[str, Any]) -> list[str]:
        """What we say of the command line, as far as click took it."""
        return bench_asked.problems({**given, "key_file": None})


@bench_command.command("run", cls=_Run)
@arguments.FLEET
@click.option("--url", "urls", multiple=True, help="Ask this server, which is in no fleet file; several: together.")
@click.option(
    "--instance", "instances", multiple=True, metavar="N", help="Ask this one itself, not the front; several: together."
)
@click.option("--each", is_flag=True, help="Ask one instance after the other.")
@click.option("--scale", type=click.Choice(["gpus", "instances"]), help="Ask 1, 2, 4 … up to all of them.")
@click.option(
    "--concurrency",
    type=click.IntRange(1, 10_000),
    help="Closed loop: clients that ask again once answered; with --scale, per instance. A fast engine speaks up to 64 "
    "at once.  [default: 1 per instance]",
)
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    help="Open loop: requests per second, at random; with --scale, for each instance.",
)
@click.option(
    "--find-rate",
    metavar="TARGET",
    help="The highest rate that holds 'p95 first-byte <= 2' or 'p99 latency <= 10' (seconds).",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0.005, 0.5),
    default=0.05,
    show_default=True,
    help="How near --find-rate comes.",
)
@click.option(
    "--texts",
    default="mixed",
    show_default=True,
    metavar="SET",
    help="short, mixed, book, or a file with one text a line.",
)
@click.option(
    "--window",
    type=click.FloatRange(0.2, 86_400),
    default=20.0,
    show_default=True,
    help="Seconds that a repetition measures.",
)
@click.option(
    "--warmup",
    type=click.FloatRange(0, 3_600),
    default=5.0,
    show_default=True,
    help="Seconds under the same load before it.",
)
@click.option(
    "--repeat",
    type=click.IntRange(1, 1_000),
    default=5,
    show_default=True,
    help="Repetitions, from which the intervals are.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 10**6),
    default=1,
    show_default=True,
    help="The same seed sends the same texts at the same moments.",
)
@click.option("--format", "audio_format", type=click.Choice(heard.FORMATS), help="Of the sound.  [default: wav]")
@click.option("--voice", help="Whose voice.  [default: the server's]")
@click.option(
    "--stream", is_flag=True, help="Ask for a stream, and count how often a listener would have heard it stall."
)
@click.option(
    "--timeout",
    type=click.FloatRange(0.1, 86_400),
    default=120.0,
    show_default=True,
    help="Seconds after which a request has failed.",
)
@arguments.API_KEY
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Keep every sample in this file (JSON), for compare and show; one that is there is not replaced.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT.")
@click.option(
    "--plot",
    "plots",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw to FILE.svg, .png or .html, replacing it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object with what the tables were made from.")
def run_command(
    *,
    tolerance: float,
    window: float,
    warmup: float,
    repeat: int,
    seed: int,
    voice: str | None,
    timeout: float,
    api_key_file: TextIO | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Put a load on FLEET (default: fleet.toml) or on --url, and show what came of it.

    \b
        chatterbox-deploy bench --window 60 -o now.json --plot now.html
        chatterbox-deploy bench --instance gpu1 --texts book --stream
        chatterbox-deploy bench --json | jq '.trials[0].figures.audio_s_per_s'

    Ctrl-C sends nothing more, waits for what is out, and shows what was measured so far; again: at once.
    Exits 1 when a request failed, 130 when it was stopped.
    """
    key = arguments.read_key(api_key_file)
    asked = bench_asked.Asked(**given, key_file=None if api_key_file is None else api_key_file.name)
    wanted, target, texts = bench_asked.read(asked)
    load = loads.Load(
        concurrency=None, rate_per_s=None, window_s=window, warmup_s=warmup, repetitions=repeat, seed=seed,
        texts=asked.texts, audio_format=asked.audio_format or "wav", voice=voice, stream=asked.stream,
        timeout_s=timeout,
    )  # fmt: skip
    # Every other command would wait a tenth of a second for aiohttp.
    from chatterbox_deploy.cli import benching  # noqa: PLC0415

    run = benching.run(
        [(aim, bench_asked.loaded(load, aim, asked)) for aim in wanted],
        texts, api_key=key, target=target, tolerance=tolerance,
    )  # fmt: skip
    if not run.trials:
        click.echo("stopped before anything was measured", err=True)
        raise SystemExit(telling.INTERRUPTED)
    lost = _keep(run, output=asked.output, plots=asked.plots)
    _show(run, as_json=as_json)
    if lost is not None:
        raise lost
    if run.partial:
        raise SystemExit(telling.INTERRUPTED)
    if target is None and any(results.failures(trial) for trial in run.trials):
        raise SystemExit(1)


@bench_command.command("compare")
@click.argument("before", metavar="A", type=click.Path(path_type=Path))
@click.argument("after", metavar="B", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def compare_command(*, before: Path, after: Path, as_json: bool) -> None:
    """Show B over A, two files of `bench -o`, as ratios with their 95 % intervals.

    \b
        chatterbox-deploy bench compare stock.json fast.json
    """
    problems: list[str] = []
    runs = [bench_asked.saved(path, problems) for path in (before, after)]
    if runs[0] is None or runs[1] is None:
        raise BenchmarkError(problems)
    rows = comparison.compare(runs[0], runs[1])
    if not rows:
        labels = [", ".join(trial.label for trial in run.trials) or "nothing" for run in runs if run is not None]
        raise BenchmarkError([f"cannot compare {before} ({labels[0]}) with {after} ({labels[1]}): no trial is in both"])
    for difference in comparison.differences(runs[0], runs[1]):
        click.echo(f"note: {difference}", err=True)
    if as_json:
        click.echo(json.dumps(bench_tables.compared_as_json(rows), indent=2))
        return
    click.echo(f"A: {before}, {runs[0].began}, {runs[0].machine}\nB: {after}, {runs[1].began}, {runs[1].machine}")
    for label in dict.fromkeys(row.label for row in rows):
        click.echo(f"\n{label}")
        _print(bench_tables.compared([row for row in rows if row.label == label]))
    if (told := comparison.gain(runs[0], runs[1])) is not None:
        click.echo(f"\n{told}")


@bench_command.command("show")
@click.argument("saved", metavar="RUN", type=click.Path(path_type=Path))
@click.option(
    "--plot",
    "plots",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw to FILE.svg, .png or .html, replacing it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object with what the tables were made from.")
def show_command(*, saved: Path, plots: tuple[Path, ...], as_json: bool) -> None:
    """Show RUN, a file of `bench -o`, once more.

    \b
        chatterbox-deploy bench show now.json --plot now.svg
    """
    problems = bench_asked.plot_problems(plots) + outputs.problems(bench_asked.to_draw(plots), {"RUN": saved})
    run = bench_asked.saved(saved, problems)
    if problems or run is None:
        raise BenchmarkError(problems)
    if not run.trials:
        raise BenchmarkError([f"{saved}: there is no trial in it"])
    if (lost := _keep(run, output=None, plots=plots)) is not None:
        raise lost
    _show(run, as_json=as_json)


def _keep(run: Run, *, output: Path | None, plots: Sequence[Path]) -> CommandFailed | None:
    """Write what is asked for; what could not be written must not take the tables with it."""
    try:
        if output is not None:
            save(output, loads.to_json(run))
        for path in plots:
            # Takes a second to import, and is an extra.
            from chatterbox_deploy.bench import charts  # noqa: PLC0415

            save(path, charts.draw(run, path.suffix))
    except CommandFailed as error:
        return error
    return None


def _show(run: Run, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(bench_tables.as_json(run), indent=2))
        return
    if run.partial:
        click.echo("partial: it was stopped; this is what was measured before\n")
    if run.search is not None:
        click.echo(bench_tables.heading(run.trials[0]))
        _print(bench_tables.searched(run.search))
        click.echo(f"\n{rate_search.sentence(run.search)}")
        return
    if len(run.trials) > 1:
        click.echo(f"{bench_tables.heading(run.trials[-1])}\n")
        scaled = comparison.speed_up(run.trials) is not None
        _print(
            *(
                bench_tables.side_by_side(run.trials, scaled=scaled, count=count)
                for count in range(len(bench_tables.SIDE_BY_SIDE), 0, -1)
            )
        )
        for trial in run.trials:
            _notes(trial.label, results.notes(trial))
    else:
        _show_one(run)
    if (told := comparison.speed_up(run.trials)) is not None:
        click.echo(f"\n{told}")


def _show_one(run: Run) -> None:
    (trial,) = run.trials
    click.echo(f"{bench_tables.heading(trial)}\n")
    _print(bench_tables.figures(trial))
    click.echo()
    _print(bench_tables.shares(trial))
    if (cards := bench_tables.cards(trial)) is not None:
        click.echo()
        _print(cards)
    _notes(None, results.notes(trial))


def _notes(label: str | None, notes: Sequence[str]) -> None:
    for note in notes:
        click.echo(f"note: {'' if label is None else f'{label}: '}{note}", err=True)


def _print(*tables: Table) -> None:
    """The first that fits, or the last."""
    console = Console()
    if not console.is_terminal:
        # A pipe: lines may be as long as they need.
        console.width = max(200, console.width)
    # Else it would be told that everything fits, by being cut.
    unbounded = console.options.update_width(10_000)
    fitting = (table for table in tables if console.measure(table, options=unbounded).maximum <= console.width)
    console.print(next(fitting, tables[-1]))
