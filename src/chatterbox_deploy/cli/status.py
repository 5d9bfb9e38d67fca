"""``chatterbox-deploy status``."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from chatterbox_deploy.change.blueprint import want
from chatterbox_deploy.cli import arguments, mistakes
from chatterbox_deploy.host import LocalHost
from chatterbox_deploy.status import rows
from chatterbox_deploy.status.survey import survey
from chatterbox_deploy.status.table import GAP, WRONG, fitting, table_width

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from chatterbox_deploy.status.rows import Report
    from chatterbox_deploy.status.table import Column

_COLOURS = {
    "ready": "green", "serving": "green", "active/running": "green",
    "draining": "yellow", "drained": "yellow", "leaving": "yellow", "activating": "yellow", "deactivating": "yellow",
    "not ready": "red", "no answer": "red", "not listed": "red", "not installed": "red", "failed": "red",
}  # fmt: skip

_WRONG_WIDTH = 40
"""Cells below which what is wrong has no column of its own, but lines below the table."""


@click.command("status", cls=mistakes.Command)
@arguments.FLEET
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object with what the table was made from.")
@arguments.TEMPLATES
def status_command(*, fleet_file: Path, as_json: bool, own_templates: Path | None) -> None:
    """Show how each instance of FLEET (default: fleet.toml) is, and what is wrong, with what to type.

    \b
        chatterbox-deploy status
        watch chatterbox-deploy status
        chatterbox-deploy status --json | jq '.instances[] | select(.wrong != [])'

    Exits 1 when something is not as the fleet file says. A dash is what is not known: as root more is, such
    as whether a process still runs an older unit.
    """
    host = LocalHost()
    asked = want(arguments.read_blueprint(host, fleet_file, own_templates))
    report = rows.report(asked.fleet, asked.files, survey(host, asked.fleet, asked.files), front=asked.front)
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))
    else:
        console = Console()
        # watch(1) is a pipe that says how wide it is.
        narrow = console.is_terminal or "COLUMNS" in os.environ
        show(report, console, width=console.width if narrow else None)
    if not report.well:
        raise SystemExit(1)


def show(report: Report, console: Console, *, width: int | None) -> None:
    """Print the table and the last line; ``None`` for a pipe, whose lines may be as long as they need."""
    columns = fitting(report.rows, width)
    used = table_width(columns, report.rows)
    wrong = [*report.wrong]
    beside = any(row.wrong for row in report.rows) and (width is None or width - used - GAP >= _WRONG_WIDTH)
    if beside:
        columns = (*columns, WRONG)
    else:
        wrong = [*(f"{row.instance}: {said}" for row in report.rows for said in row.wrong), *wrong]
    if width is None:
        console.width = max(table_width(columns, report.rows), 1)
    console.print(_table(columns, report))
    for line in wrong:
        console.print(Text(line), soft_wrap=True)
    console.print(Text(report.sentence()), soft_wrap=True)


def _table(columns: Sequence[Column], report: Report) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
    for column in columns:
        last = column is WRONG
        table.add_column(
            column.title,
            justify="right" if column.is_number else "left",
            no_wrap=not last,
            overflow="fold" if last else "crop",
        )
    for row in report.rows:
        table.add_row(*(Text(text, style=_colour(text)) for text in (column.cell(row) for column in columns)))
    return table


def _colour(text: str) -> str:
    return _COLOURS.get(text) or _COLOURS.get(text.partition("/")[0], "")
