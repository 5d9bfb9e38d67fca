"""``chatterbox-deploy plan`` and ``chatterbox-deploy apply``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from chatterbox_deploy.change import deploy, image, ledger
from chatterbox_deploy.cli import arguments, mistakes, telling
from chatterbox_deploy.host import LocalHost

if TYPE_CHECKING:
    from chatterbox_deploy.change.plan import Plan

AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
UNAVAILABLE = click.option(
    "--max-unavailable",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Restart so many instances at a time; more is quicker on a box with many GPUs.",
)


@click.command("plan", cls=mistakes.Command)
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
    asked = arguments.read_blueprint(host, fleet_file, own_templates)
    telling.show_unfinished(host)
    show(deploy.propose(host, asked, max_unavailable=max_unavailable).plan, as_json=as_json)


@click.command("apply", cls=mistakes.Command)
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
def apply_command(
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
    if root is not None and root.resolve() == Path("/"):
        msg = "this machine is no image; leave --root away to apply to it"
        raise click.BadParameter(msg, param_hint="--root")
    host = LocalHost(root or Path("/"))

    def propose() -> deploy.Proposal:
        asked = arguments.read_blueprint(host, fleet_file, own_templates)
        if root is not None:
            return image.propose(host, root, asked)
        return deploy.propose(host, asked, max_unavailable=max_unavailable)

    if dry_run:
        show(propose().plan, as_json=as_json)
        return
    with ledger.lock(host, telling.author().command):
        change(host, propose(), as_json=as_json, goes_back=root is None and not no_rollback)


def show(made: Plan, *, as_json: bool) -> None:
    """Print a plan, and exit as `plan` does.

    Raises:
        CommandFailed: it cannot be carried out.
    """
    if as_json:
        click.echo(json.dumps(telling.as_json(made), indent=2))
        telling.refuse(made)
    else:
        telling.show(made)
    if made:
        raise SystemExit(1)


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
    with telling.interruptible(host):
        number = deploy.carry_out(host, proposal, telling.author(), telling.progress, goes_back=goes_back)
    click.echo(f"{'done' if made.steps else 'nothing to do'}: revision {number}", err=True)
