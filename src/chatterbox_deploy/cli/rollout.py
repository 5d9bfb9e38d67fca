"""``chatterbox-deploy rollout``, ``rollback``, ``history`` and ``recycle``: change what runs, and go back."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath

import click

from chatterbox_deploy import blueprint, config, deploy, fleet, ledger, recycling
from chatterbox_deploy.cli import arguments, telling
from chatterbox_deploy.cli.plan import AS_JSON, UNAVAILABLE, change
from chatterbox_deploy.errors import CommandFailed
from chatterbox_deploy.host import LocalHost


@click.command("rollout")
@arguments.FLEET
@click.option("--gpu", "only", metavar="N", help="Only the instances on this GPU, or this instance (gpu1-a).")
@click.option("--version", "version", metavar="NAME", help=f"First turn to this version below {config.VERSIONS_DIR}.")
@UNAVAILABLE
@click.option("--no-rollback", is_flag=True, help="When an instance fails, stop there instead of going back.")
@arguments.TEMPLATES
def rollout_command(
    *,
    fleet_file: Path,
    only: str | None,
    version: str | None,
    max_unavailable: int,
    no_rollback: bool,
    own_templates: Path | None,
) -> None:
    """Restart every instance, one after the other, without losing a request.

    \b
        sudo chatterbox-deploy rollout                       # fresh processes for all
        sudo chatterbox-deploy rollout --gpu 1
        sudo chatterbox-deploy rollout --version 0.2.0       # upgrade: scripts/install-version made it

    Whatever else the fleet file asks for is applied, too. An instance that does not become ready, or that
    is not heard when it is asked to speak, ends it: the fleet goes back to what it was before.
    """
    if only is not None and version is not None:
        msg = "a version is for all instances, for they share one link to it; leave --gpu away"
        raise click.UsageError(msg)
    host = LocalHost()
    with ledger.lock(host, telling.author().command):
        asked = arguments.read_blueprint(host, fleet_file, own_templates)
        if version is not None:
            asked = replace(asked, version=str(_directory(host, version)))
        resolved = blueprint.want(asked).fleet
        chosen = resolved.instances if only is None else fleet.find(resolved, only)
        restart = {instance.name: "you asked for it" for instance in chosen}
        proposal = deploy.propose(host, asked, restart=restart, max_unavailable=max_unavailable)
        change(host, proposal, goes_back=not no_rollback)


def _directory(host: LocalHost, version: str) -> PurePosixPath:
    """Where a version lies, once it is known to be whole."""
    directory = PurePosixPath(config.VERSIONS_DIR) / version
    if host.read_bytes(directory / _COMPLETE) is None:
        whole = [path.parent.name for path in host.glob(directory.parent, f"*/{_COMPLETE}")]
        msg = (
            f"cannot find version {version!r} at {directory}; there are: {', '.join(whole) or 'none'}; "
            f"`scripts/install-version {version}` in a checkout of it makes one"
        )
        raise CommandFailed(msg)
    host.run((str(directory / "bin/python"), "-c", "import chatterbox_server"), timeout_s=120)
    return directory


_COMPLETE = ".complete"
"""``scripts/install-version`` writes it last."""


@click.command("rollback")
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


@click.command("history")
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
    for each in kept:
        version = f"  {PurePosixPath(each.version).name}" if each.version else ""
        mark = "*" if each.number == current else " "
        click.echo(f"{mark} {each.number:>4}  {each.when}  {each.who}{version}  {each.command}")
    if not kept:
        click.echo("nothing was applied here yet: `chatterbox-deploy apply`", err=True)


@click.command("recycle")
def recycle_command() -> None:
    """Restart, without losing a request, each instance past the age or memory that the fleet file sets.

    \b
        sudo chatterbox-deploy recycle      # chatterbox-tts-recycle.timer does it every few minutes

    The limits are unit.recycle_after_h and unit.recycle_memory_mb of the fleet that was applied.
    """
    host = LocalHost()
    with ledger.lock(host, telling.author().command):
        asked = blueprint.current(host)
        begun = ledger.read(host).begun
        if begun is not None and begun.goal == asked.number:
            # An earlier one, cut short: it may have left somebody out.
            change(host, deploy.propose(host, asked))
            return
        if begun is not None:
            msg = f"cannot recycle: a change did not end; {deploy.advice(host)}"
            raise CommandFailed(msg)
        due = recycling.due(host, blueprint.want(asked).fleet)
        if not due:
            click.echo("nothing to recycle", err=True)
            return
        change(host, deploy.propose(host, asked, restart=due, only=due))
