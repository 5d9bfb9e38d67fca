"""``chatterbox-deploy speak``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from chatterbox_deploy import client, fleet
from chatterbox_deploy.cli import arguments, mistakes, outputs, speaking, telling
from chatterbox_deploy.cli.outputs import Output
from chatterbox_deploy.errors import CommandFailed, CommandLineError, FleetFileError, ManuscriptError
from chatterbox_deploy.speak import narration
from chatterbox_deploy.speak.formats import FORMATS
from chatterbox_deploy.speak.narration import Manner
from chatterbox_deploy.speak.parts import Parts

if TYPE_CHECKING:
    from chatterbox_deploy.speak.sending import Front, InFlight

_SUFFIXES = ", ".join(FORMATS)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """The options, as the command line gives them."""

    output: Path | None
    voice: str | None
    language: str | None
    speed: float | None
    exaggeration: float | None
    cfg_weight: float | None
    temperature: float | None
    seed: int
    model: str | None
    subtitles_file: Path | None
    title: str | None
    author: str | None
    markdown: bool | None
    paragraph_pause_s: float
    chapter_pause_s: float
    piece_chars: int
    loudness_lufs: float | None
    fleet_file: Path
    url: str | None
    api_key_file: TextIO | None
    concurrency: int | None
    parts_dir: Path | None
    keep_parts: bool
    overwrite: bool
    dry_run: bool
    as_json: bool


@click.command("speak", cls=mistakes.Command)
@click.argument("book", metavar="BOOK", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help=f"{_SUFFIXES}.")
@click.option("--voice", help="Name of a voice.  [default: the server's]")
@click.option("--language", help="Language code, such as de.  [default: the server's]")
@click.option("--speed", type=click.FloatRange(0.25, 4.0), help="Where the engine can.")
@click.option("--exaggeration", type=click.FloatRange(0.0, 2.0), help="How vivid; 0.5 is neutral.")
@click.option("--cfg-weight", type=click.FloatRange(0.0, 1.0), help="How closely the voice's pace is kept.")
@click.option("--temperature", type=click.FloatRange(0.0, 5.0, min_open=True), help="How varied.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The same seed, the same sound.")
@click.option("--model", help="Sent as it is, for a front that knows several.")
@click.option(
    "--subtitles", "subtitles_file", type=click.Path(dir_okay=False, path_type=Path), help="Write an .srt, too."
)
@click.option("--title", help="[default: the text's own, or the file's name]")
@click.option("--author", help="[default: as the text's front matter says]")
@click.option("--markdown/--plain", default=None, help="What BOOK is.  [default: by its name: .md is Markdown]")
@click.option("--paragraph-pause-s", type=click.FloatRange(0, 60), default=0.7, show_default=True)
@click.option("--chapter-pause-s", type=click.FloatRange(0, 60), default=2.5, show_default=True)
@click.option("--piece-chars", type=click.IntRange(20, 4000), default=280, show_default=True, help="Longest request.")
@click.option(
    "--loudness", "loudness_lufs", type=click.FloatRange(-40, -5), help="Even it out to so many LUFS, e.g. -19."
)
@arguments.FLEET_OPTION
@click.option("--url", help="A front elsewhere, such as https://tts.example.com, instead of a fleet file.")
@arguments.API_KEY
@click.option(
    "--concurrency", type=click.IntRange(1, 1000), help="Requests in flight.  [default: what the fleet can use]"
)
@click.option("--parts", "parts_dir", type=click.Path(file_okay=False, path_type=Path), help="[default: OUTPUT.parts]")
@click.option("--keep-parts", is_flag=True, help="Do not remove them at the end: a changed text is then done soon.")
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT and the subtitles where they are there already.")
@click.option("--dry-run", is_flag=True, help="Print chapters and pieces, and ask nobody.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print a JSON object: the summary, or with --dry-run the chapters."
)
def speak_command(book: str, **options: Any) -> None:
    """Speak BOOK, a plain text or Markdown file (- is standard input), into one file with chapters.

    \b
        chatterbox-deploy speak book.txt -o book.m4b --voice anna
        chatterbox-deploy speak book.md -o book.mp3 --subtitles book.srt
        chatterbox-deploy speak book.txt --dry-run | less

    All GPUs of the fleet speak at once. What is spoken is kept in OUTPUT.parts until all is: interrupted, or failed
    halfway? Type the same again. A changed text has only its changes spoken.
    """
    asked = _Asked(**options)
    try:
        from chatterbox_deploy.speak import manuscript, production  # noqa: PLC0415  an extra: only who speaks needs it
    except ImportError as error:
        msg = (
            f"cannot speak without the packages of the extra `speak` ({error.name}): "
            f"{sys.executable} -m pip install 'av>=14.2' 'sentencex>=1.0'"
        )
        raise CommandFailed(msg) from None
    source = "standard input" if book == "-" else book
    text = manuscript.read(
        manuscript.decode(_content(book, source), source),
        source=source,
        markdown=_is_markdown(book) if asked.markdown is None else asked.markdown,
        language=asked.language or "en",
        longest=asked.piece_chars,
        pauses=manuscript.Pauses(paragraph_s=asked.paragraph_pause_s, chapter_s=asked.chapter_pause_s),
    )
    title = asked.title or text.title or ("Text" if book == "-" else Path(book).stem)
    if asked.dry_run:
        told = json.dumps(asdict(text), indent=2, ensure_ascii=False)
        click.echo(told if asked.as_json else speaking.outline(text, title))
        return
    output, front, in_flight = _settled(book, asked)
    goal = production.Goal(
        output=output,
        subtitles=asked.subtitles_file,
        title=title,
        author=asked.author or text.author,
        loudness_lufs=asked.loudness_lufs,
        keep_parts=asked.keep_parts,
    )
    parts = Parts(asked.parts_dir or output.with_name(f"{output.name}.parts"))
    manner = Manner(**{field.name: getattr(asked, field.name) for field in fields(Manner)})
    with telling.saying_when_interrupted(lambda: production.how_to_go_on(parts)), parts.held(telling.author().command):
        summary = production.make(
            goal, text, manner, front=front, in_flight=in_flight, parts=parts, show=speaking.Show()
        )
    click.echo(summary.line(), err=True)
    if asked.as_json:
        click.echo(json.dumps(summary.as_json(), indent=2))


def _content(book: str, source: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if book == "-" else Path(book).read_bytes()
    except OSError as error:
        msg = f"cannot read {source}: {(error.strerror or str(error)).lower()}"
        raise ManuscriptError(msg) from None


def _is_markdown(book: str) -> bool:
    return Path(book).suffix.lower() in {".md", ".markdown"}


def _settled(book: str, asked: _Asked) -> tuple[Path, Front, InFlight]:
    """Where to, whom to ask, and how much at once; nothing that is there is in the way, or would be lost.

    Raises:
        CommandLineError: with every problem of the command line and the fleet file.
    """
    stays = not asked.overwrite
    found = outputs.problems(
        [Output("--output", asked.output, stays), Output("--subtitles", asked.subtitles_file, stays)],
        {
            "BOOK": None if book == "-" else book,
            "the fleet file": asked.fleet_file,
            "the key file": None if asked.api_key_file is None else asked.api_key_file.name,
        },
    )
    if asked.output is None:
        found.append(f"say where to: -o {'book' if book == '-' else Path(book).stem}.m4b")
    elif asked.output.suffix.lower() not in FORMATS:
        found.append(f"--output: {asked.output.name} should end in {_SUFFIXES}: that says the format")
    front: tuple[Front, InFlight] | None = None
    try:
        front = _front(asked)
    except click.UsageError as error:
        found.append(mistakes.text(error))
    except FleetFileError as error:
        found += [f"{asked.fleet_file}: {problem}" for problem in error.problems]
    if found or asked.output is None or front is None:
        raise CommandLineError(found)
    return asked.output, *front


def _front(asked: _Asked) -> tuple[Front, InFlight]:
    """Where to ask, and how much at once."""
    from chatterbox_deploy.speak import sending  # noqa: PLC0415  its HTTP client takes a tenth of a second to import

    key = arguments.read_key(asked.api_key_file)
    told = None if asked.concurrency is None else sending.InFlight(asked.concurrency, more=False, unknown=False)
    if asked.url is not None:
        if (url := client.base_url(asked.url)) is None:
            msg = f"should be like http://127.0.0.1:6095 or https://tts.example.com, got {asked.url!r}"
            raise click.BadParameter(msg, param_hint="--url")
        return sending.Front(url, client.authorization(key)), told or sending.InFlight()
    if not asked.fleet_file.exists():
        msg = (
            f"there is no {asked.fleet_file}: name the fleet's file (--fleet /etc/chatterbox-tts/fleet.toml) "
            "or its front (--url http://127.0.0.1:6095)"
        )
        raise click.UsageError(msg)
    written = arguments.read_fleet(asked.fleet_file)
    known = sending.InFlight(narration.in_flight(written), unknown=False)
    return sending.local_front(fleet.resolve(written), key), told or known
