"""``chatterbox-deploy plan`` and ``chatterbox-deploy apply``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from chatterbox_deploy import deploy, ledger
from chatterbox_deploy.cli import arguments, telling
from chatterbox_deploy.host import LocalHost

AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
UNAVAILABLE = click.option(
    "--max-unavailable",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Restart so many instances at a time; more is quicker on a box with many GPUs.",
)


@click.command("plan")
@arguments.FLEET
@AS_JSON
@UNAVAILABLE
@arguments.TEMPLATES
def plan_command(*, fleet_file: Path, as_json: bool, max_unavailable: int, own_templates: Path | None) -> None:
    """Show what `apply` would do to this machine, in order and with the reason for every restart.

    \b
        chatterbox-deploy plan
        chatterbox-deploy plan --json | jq -r '.steps[].says'

    Changes nothing. Exit status: 0 nothing to do, 1 changes.
    """
    host = LocalHost()
    proposal = deploy.propose(
        host, arguments.blueprint(host, fleet_file, own_templates), max_unavailable=max_unavailable
    )
    if as_json:
        click.echo(json.dumps(telling.as_json(proposal.plan), indent=2))
    else:
        telling.show(proposal.plan)
    if proposal.plan:
        raise SystemExit(1)


@click.command("apply")
@arguments.FLEET
@click.option("--dry-run", is_flag=True, help="Only show the plan, as `plan` does.")
@UNAVAILABLE
@click.option("--no-rollback", is_flag=True, help="When a step fails, stop there instead of going back.")
@click.option(
    "--root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Install into this directory tree, for images: files and what starts at boot, nothing is run.",
)
@AS_JSON
@arguments.TEMPLATES
@click.pass_context
def apply_command(
    ctx: click.Context,
    *,
    fleet_file: Path,
    dry_run: bool,
    max_unavailable: int,
    no_rollback: bool,
    root: Path | None,
    as_json: bool,
    own_templates: Path | None,
) -> None:
    """Make this machine what FLEET (default: fleet.toml) says, without losing a request.

    \b
        sudo chatterbox-deploy apply
        sudo chatterbox-deploy apply --max-unavailable 2    # eight GPUs: two at a time
        chatterbox-deploy apply --dry-run                   # what would it do?
        chatterbox-deploy apply --root ./image              # for an image that boots elsewhere

    systemd and nginx check every file first. Then each instance that changes leaves the front, finishes
    what it began, restarts, becomes ready, is heard, and returns; then the next. If one of them does not
    speak, the fleet goes back to what it was. Interrupted? Type it again.
    """
    if dry_run:
        ctx.invoke(
            plan_command,
            fleet_file=fleet_file,
            as_json=as_json,
            max_unavailable=max_unavailable,
            own_templates=own_templates,
        )
        return
    host = LocalHost(root or Path("/"))
    asked = arguments.blueprint(host, fleet_file, own_templates)
    if root is not None:
        for line in deploy.install(host, root, asked, telling.author()):
            click.echo(line, err=True)
        return
    with ledger.lock(host):
        proposal = deploy.propose(host, asked, max_unavailable=max_unavailable)
        change(host, proposal, as_json=as_json, goes_back=not no_rollback)


def change(host: LocalHost, proposal: deploy.Proposal, *, as_json: bool = False, goes_back: bool = True) -> None:
    """Carry a proposal out and tell of it; the lock is held.

    Raises:
        CommandFailed: a step failed.
    """
    made = proposal.plan
    if as_json:
        click.echo(json.dumps(telling.as_json(made), indent=2))
    telling.refuse(made)
    for line in telling.why(made):
        click.echo(line, err=True)
    try:
        number = deploy.carry_out(host, proposal, telling.author(), telling.progress, goes_back=goes_back)
    except KeyboardInterrupt:
        click.echo(
            "interrupted; `chatterbox-deploy apply` finishes it, `chatterbox-deploy rollback` undoes it", err=True
        )
        raise SystemExit(130) from None
    click.echo(f"done: revision {number}", err=True)
