"""``chatterbox-deploy report``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from chatterbox_deploy import fleet
from chatterbox_deploy.cli import arguments, mistakes, outputs
from chatterbox_deploy.cli.outputs import Output
from chatterbox_deploy.config import reading
from chatterbox_deploy.errors import CaptureError
from chatterbox_deploy.gpu import smi
from chatterbox_deploy.host import LocalHost, save
from chatterbox_deploy.report import markdown, page, situation, summary
from chatterbox_deploy.report.investigate import investigate
from chatterbox_deploy.report.situation import FleetFile

if TYPE_CHECKING:
    from chatterbox_deploy.report.situation import Situation
    from chatterbox_deploy.report.summary import Report

_DEFAULT = Path("fleet.toml")


@click.command("report", cls=mistakes.Command)
@click.argument("fleet_file", metavar="[FLEET]", type=click.Path(path_type=Path), required=False)
@click.option(
    "--format", "style", type=click.Choice(["md", "html", "json"]),
    help="Markdown; a page with charts, in one file; or JSON.  [default: as OUTPUT's name ends, else md]",
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="A file, instead of standard output."
)
@click.option(
    "--from-nvidia-smi", "capture", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path),
    help="What `nvidia-smi -q -x` printed, on whatever machine; this one is not looked at.",
)  # fmt: skip
@arguments.PROFILE
def report_command(
    *, fleet_file: Path | None, style: str | None, output: Path | None, capture: Path | None, profile_file: Path | None
) -> None:
    """Show what each GPU does, what is wrong, what to change in FLEET, and what that brings.

    \b
        sudo chatterbox-deploy report
        sudo chatterbox-deploy report -o report.html
        nvidia-smi -q -x > gpus.xml; chatterbox-deploy report --from-nvidia-smi gpus.xml
        chatterbox-deploy report --format json | jq -r '.findings[] | "\\(.severity)  \\(.what)"'

    FLEET is fleet.toml where there is one; without one, the report proposes a first. Only root sees all: the
    environment of processes, and who listens where. Changes nothing. Exits 1 when a finding is of severity high.
    """
    read = {"FLEET": fleet_file or _DEFAULT, "--from-nvidia-smi": capture, "--profile": profile_file}
    outputs.refuse([Output("--output", output)], read)
    chosen = arguments.read_profile(profile_file)
    file = _read_fleet(fleet_file, by_default=capture is None)
    seen = investigate(LocalHost(), file) if capture is None else _read_capture(capture, file)
    made = summary.make(seen, chosen)
    text = _written(made, style or _style_of(output))
    if output is None:
        click.echo(text, nl=False)
    else:
        save(output, text)
    if made.grave:
        raise SystemExit(1)


def _read_fleet(path: Path | None, *, by_default: bool) -> FleetFile | None:
    """The file that is named; the one that lies here, where none is; ``None`` where there is none."""
    if path is None and not (by_default and _DEFAULT.exists()):
        return None
    named = path or _DEFAULT
    text = arguments.read_text(named)
    loaded = reading.load(text, source=str(named))
    return FleetFile(str(named), text, loaded, fleet.resolve(loaded))


def _read_capture(path: Path, file: FleetFile | None) -> Situation:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CaptureError(str(path), (error.strerror or str(error)).lower()) from None
    capture = smi.parse(content, source=str(path))
    return situation.of_capture(capture, source=str(path), file=file)


def _style_of(output: Path | None) -> str:
    return {".html": "html", ".htm": "html", ".json": "json"}.get("" if output is None else output.suffix.lower(), "md")


def _written(made: Report, style: str) -> str:
    if style == "json":
        return json.dumps(made.as_json(), indent=2, ensure_ascii=False) + "\n"
    return page.html(made) if style == "html" else markdown.markdown(made)
