"""``chatterbox-deploy uninstall``."""

from __future__ import annotations

import click

from chatterbox_deploy.change import ledger, removal
from chatterbox_deploy.cli import mistakes, telling
from chatterbox_deploy.errors import CommandFailed
from chatterbox_deploy.host import LocalHost


@click.command("uninstall", cls=mistakes.Command)
@click.option("--purge", is_flag=True, help="Also remove voices, weights, logs, versions and the history.")
@click.option("--force", is_flag=True, help="Also remove files of ours that were edited by hand.")
@click.option("--yes", is_flag=True, help="Do not ask before --purge.")
@click.option("--dry-run", is_flag=True, help="Only show what would be done.")
def uninstall_command(*, purge: bool, force: bool, yes: bool, dry_run: bool) -> None:
    """Take the fleet off this machine: units, front, and nothing that others wrote.

    \b
        sudo chatterbox-deploy uninstall              # voices, weights and the history stay
        sudo chatterbox-deploy uninstall --purge      # nothing of ours stays

    A file of ours that was edited by hand is shown and kept, unless --force.
    """
    host = LocalHost()
    author = telling.author()
    proposed = removal.propose(host, purge=purge, force=force)
    for change in proposed.kept:
        if change.before is not None:
            click.echo(change.diff(), nl=False)
        click.echo(f"kept: {change.file.path} was edited by hand; --force removes it, too", err=True)
    telling.show(proposed.plan, nothing="nothing of ours is installed here")
    if dry_run or not proposed.plan:
        return
    if purge and not yes:
        click.confirm("Remove all of this for good?", abort=True, err=True)
    with ledger.lock(host, author.command), telling.interruptible(host):
        if removal.propose(host, purge=purge, force=force) != proposed:
            msg = "cannot go on: the host is no longer as shown above; type it again"
            raise CommandFailed(msg)
        removal.carry_out(host, proposed, author, telling.progress)
    click.echo("done: the fleet is uninstalled", err=True)
