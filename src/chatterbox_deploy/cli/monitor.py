"""``chatterbox-deploy monitor``."""

from __future__ import annotations

import csv
import json
import os
import select
import signal
import sys
import termios
import time
import tty
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console, ConsoleDimensions, Group
from rich.live import Live

from chatterbox_deploy import exposition
from chatterbox_deploy.change.blueprint import want
from chatterbox_deploy.cli import arguments, mistakes, monitor_view, outputs, telling
from chatterbox_deploy.cli.outputs import Output
from chatterbox_deploy.errors import CommandFailed, DeployError
from chatterbox_deploy.gpu import nvml
from chatterbox_deploy.host import LocalHost
from chatterbox_deploy.monitor import conditions, following, gauges
from chatterbox_deploy.monitor.story import Story
from chatterbox_deploy.monitor.watch import Watch
from chatterbox_deploy.render import RenderedFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from chatterbox_deploy.change.facts import Wanted
    from chatterbox_deploy.fleet import Fleet
    from chatterbox_deploy.monitor.conditions import Limits
    from chatterbox_deploy.monitor.picture import Picture

CSV_HEADER = ("time", "about", "name", "quantity", "value")


def _read_limits(context: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> Limits:  # noqa: ARG001
    try:
        return conditions.limits({name: text for name, _, text in (one.partition("=") for one in given)})
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command("monitor", cls=mistakes.Command)
@arguments.FLEET
@click.option("--once", is_flag=True, help="Look twice, one interval apart, print what there is, and end.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object, or one a line for each look.")
@click.option(
    "--csv", "csv_file", type=click.Path(dir_okay=False, path_type=Path), help="Append each look to this file."
)
@click.option(
    "--prometheus",
    "textfile",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write each look to this file, NAME.prom, for node_exporter's textfile collector.",
)
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(min=0.2, max=3600),
    default=2.0,
    show_default=True,
    help="Seconds from one look to the next.",
)
@click.option(
    "--limit",
    "allowed",
    metavar="NAME=NUMBER",
    multiple=True,
    callback=_read_limits,
    help="What to make an event of, such as temperature_c=80; may be given several times.",
)
@click.option("--access-log", help="The front's access log, where it is not the installed one's (`up` says its own).")
@arguments.TEMPLATES
def monitor_command(
    *,
    fleet_file: Path,
    once: bool,
    as_json: bool,
    csv_file: Path | None,
    textfile: Path | None,
    interval_s: float,
    allowed: Limits,
    access_log: str | None,
    own_templates: Path | None,
) -> None:
    """Show what FLEET (default: fleet.toml) does: its GPUs, its instances, its front, and what changes.

    \b
        chatterbox-deploy monitor                                   # q or Ctrl-C leaves
        chatterbox-deploy monitor --once --json | jq '.instances[].rtf'
        chatterbox-deploy monitor --json | jq -c '.events[]'
        chatterbox-deploy monitor --csv today.csv --interval 10

    A dash is what is not known: without root, the front's log; without an NVIDIA driver, the GPUs. Changes
    nothing. With --once it exits 1 if something critical goes on.
    """
    outputs.refuse(
        [Output("--csv", csv_file), Output("--prometheus", textfile)],
        {"FLEET": fleet_file, "--access-log": access_log},
    )
    host = LocalHost()
    file = _FleetFile(host, fleet_file, own_templates)
    wanted = file.read()
    log = str(Path(access_log).absolute()) if access_log else wanted.fleet.front.access_log
    watch = Watch(host, wanted, access_log=log, read_cards=nvml.read)
    session = _Session(file, wanted.fleet, watch, allowed, _outputs(host, csv_file, textfile), interval_s)
    console = Console()
    try:
        if once:
            picture = session.once()
            _print(session.story, console, as_json=as_json, live=False)
            if not picture.well:
                raise SystemExit(1)
        elif as_json or not sys.stdout.isatty():  # which FORCE_COLOR makes no pipe
            quiet = not as_json and bool(session.outputs)
            for _ in session.steadily(time.sleep):
                if quiet:
                    _print_events(session.story)
                else:
                    _print(session.story, console, as_json=as_json, live=True)
        else:
            _live(session, console)
    except KeyboardInterrupt:
        # How one leaves it.
        return
    except BrokenPipeError:
        # As Ctrl-C.
        telling.close_output()


@dataclass
class _FleetFile:
    """The fleet file, which may change while one looks on."""

    host: LocalHost
    path: Path
    own_templates: Path | None
    text: str = ""

    def read(self) -> Wanted:
        """What it asks for now.

        Raises:
            DeployError: it is wrong, or not there.
        """
        text = arguments.read_text(self.path)
        wanted = want(arguments.read_blueprint(self.host, self.path, self.own_templates))
        self.text = text
        return wanted

    @property
    def changed(self) -> bool:
        return arguments.read_text(self.path) != self.text


@dataclass
class _Session:
    """Looks, one after the other, and where each of them goes."""

    file: _FleetFile
    fleet: Fleet
    watch: Watch
    allowed: Limits
    outputs: list[Callable[[Picture], None]]
    interval_s: float
    story: Story = Story()  # noqa: RUF009  frozen

    def look(self, *, show: bool = True) -> Picture:
        """One more; what it saw goes to the files unless it is not to ``show``."""
        notes: list[str] = []
        try:
            if self.file.changed:
                wanted = self.file.read()
                self.watch.turn_to(wanted)
                self.fleet = wanted.fleet
        except DeployError as error:
            notes.append(f"shown as the fleet file was before: {' '.join(str(error).split())}")
        look = self.watch.look()
        look = replace(look, notes=(*look.notes, *notes))
        self.story = following.follow(self.story, look, self.fleet, self.allowed)
        assert self.story.picture is not None  # noqa: S101  there is one after every look
        for write in self.outputs if show else ():
            write(self.story.picture)
        return self.story.picture

    def once(self) -> Picture:
        """Two looks; only the second one goes anywhere."""
        self.look(show=False)
        time.sleep(self.interval_s)
        return self.look()

    def steadily(self, wait: Callable[[float], object]) -> Iterator[Picture]:
        """At a steady pace, however long a look takes; ``wait`` may raise to end it."""
        due_s = time.monotonic()
        while True:
            yield self.look()
            due_s = max(due_s + self.interval_s, time.monotonic())
            wait(due_s - time.monotonic())


def _outputs(host: LocalHost, csv_file: Path | None, textfile: Path | None) -> list[Callable[[Picture], None]]:
    outputs: list[Callable[[Picture], None]] = []
    if csv_file is not None:
        outputs.append(_CsvFile(csv_file).write)
    if textfile is not None:
        if textfile.suffix != ".prom":
            msg = f"--prometheus: node_exporter reads files whose name ends in .prom only, got {str(textfile)!r}"
            raise click.UsageError(msg)
        place = PurePosixPath(textfile.absolute())
        outputs.append(lambda picture: host.write_files([RenderedFile(place, exposition.write(gauges.of(picture)))]))
    return outputs


@dataclass(frozen=True)
class _CsvFile:
    """A line for each quantity of each look; what is unknown is empty."""

    path: Path

    def write(self, picture: Picture) -> None:
        try:
            with self.path.open("a", encoding="utf-8", newline="") as stream:
                writer = csv.writer(stream, lineterminator="\n")
                if stream.tell() == 0:
                    writer.writerow(CSV_HEADER)
                when = picture.time.isoformat(timespec="milliseconds")
                writer.writerows((when, *cells) for cells in gauges.cells(picture))
        except OSError as error:
            msg = f"cannot write {self.path}: {(error.strerror or str(error)).lower()}"
            raise CommandFailed(msg) from None


def _print(story: Story, console: Console, *, as_json: bool, live: bool) -> None:
    if as_json and story.picture is not None:
        click.echo(json.dumps(story.picture.as_json(), indent=None if live else 2))
        return
    # watch(1) is a pipe that says how wide it is.
    narrow = console.is_terminal or "COLUMNS" in os.environ
    for line in monitor_view.lines(story, width=console.width if narrow else None, plain=_is_plain(console)):
        console.print(line, soft_wrap=True)
    if live:
        console.print()


def _print_events(story: Story) -> None:
    for event in story.picture.new if story.picture is not None else ():
        click.echo(monitor_view.event_line(event))


def _is_plain(console: Console) -> bool:
    return not console.encoding.lower().startswith("utf")


def _live(session: _Session, console: Console) -> None:
    """On the whole screen, until somebody types q; drawn anew as the terminal's size changes."""

    def drawn() -> Group:
        # As it is now: where a shell exports COLUMNS and LINES (resize(1) does), rich would believe them for ever.
        console.size = size = ConsoleDimensions(*os.get_terminal_size(console.file.fileno()))
        return Group(*monitor_view.lines(session.story, width=size.width, height=size.height, plain=_is_plain(console)))

    with (
        _terminated_like_interrupted(),
        _Keys() as keys,
        ThreadPoolExecutor(1) as looker,
        Live(get_renderable=drawn, console=console, screen=True, refresh_per_second=4, transient=True) as live,
    ):
        due_s = time.monotonic()
        while True:
            # Who hangs is waited for over there; here, keys count at once.
            looking = looker.submit(session.look)
            while not looking.done():
                if keys.left(0.05):
                    return
            looking.result()
            live.refresh()
            due_s = max(due_s + session.interval_s, time.monotonic())
            while (left_s := due_s - time.monotonic()) > 0:
                if keys.left(left_s):
                    return


class _Keys:
    """The keyboard, a key at a time, as long as it is a terminal; put back as it was."""

    def __enter__(self) -> _Keys:
        self._terminal = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
        self._before: list[Any] = []
        if self._terminal is not None:
            self._before = termios.tcgetattr(self._terminal)
            tty.setcbreak(self._terminal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal is not None:
            termios.tcsetattr(self._terminal, termios.TCSAFLUSH, self._before)

    def left(self, wait_s: float) -> bool:
        """Whether somebody typed q within that time."""
        if self._terminal is None:
            time.sleep(wait_s)
            return False
        if not select.select([self._terminal], [], [], wait_s)[0]:
            return False
        typed = os.read(self._terminal, 64)
        # Nothing: the terminal is gone.
        return not typed or b"q" in typed.lower()


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM leaves the terminal as sane as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
