"""``chatterbox-deploy rollback`` and ``chatterbox-deploy history``: go back, and where to."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import PurePosixPath

import click

from chatterbox_deploy.change import blueprint, deploy, ledger
from chatterbox_deploy.cli import mistakes, telling
from chatterbox_deploy.cli.plan import AS_JSON, UNAVAILABLE, change
from chatterbox_deploy.host import LocalHost


@click.command("rollback", cls=mistakes.Command)
@click.argument("number", metavar="[REVISION]", type=int, required=False)
@UNAVAILABLE
def rollback_command(*, number: int | None, max_unavailable: int) -> None:
    """Go back to what was applied before, or to REVISION: settings, rendered files and the server's version.

    \b
        sudo chatterbox-deploy rollback
        chatterbox-deploy history
        sudo chatterbox-deploy rollback 7

    Before is what served when this revision was first applied. After an `apply` that was interrupted it
    undoes what was begun. fleet.toml itself is yours: the next `apply` does again what it says.
    """
    host = LocalHost()
    with ledger.lock(host, telling.author().command):
        asked = (
            blueprint.previous(host) if number is None else blueprint.of_revision(host, ledger.revision(host, number))
        )
        change(host, deploy.propose(host, asked, max_unavailable=max_unavailable))
    now = host.read_bytes(PurePosixPath(asked.source)) if asked.source.startswith("/") else None
    if now is not None and now.decode(errors="replace") != asked.fleet_toml:
        click.echo(f"note: {asked.source} says something else, and the next `apply` does it", err=True)


@click.command("history", cls=mistakes.Command)
@AS_JSON
def history_command(*, as_json: bool) -> None:
    """List the revisions that were applied here; * is the one that serves.

    \b
        chatterbox-deploy history
        chatterbox-deploy history --json | jq -r '.[-1].fleet_toml'
    """
    host = LocalHost()
    current = ledger.read(host).current
    kept = ledger.revisions(host)
    if as_json:
        click.echo(json.dumps([{**asdict(each), "current": each.number == current} for each in kept], indent=2))
        return
    width = max((len(_version(each)) for each in kept), default=0)
    for each in kept:
        mark = "*" if each.number == current else " "
        version = f"{_version(each):<{width}}  " if width else ""
        click.echo(f"{mark} {each.number:>4}  {each.when}  {each.who}  {version}{each.command}")
    for path in ledger.unreadable_revisions(host):
        click.echo(f"cannot read {path}: it is no revision any more", err=True)
    telling.show_unfinished(host)
    if not kept:
        click.echo("nothing was applied here yet: `chatterbox-deploy apply`", err=True)


def _version(kept: ledger.Revision) -> str:
    return PurePosixPath(kept.version).name if kept.version else ""
