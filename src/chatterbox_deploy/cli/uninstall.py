"""``chatterbox-deploy uninstall``."""

from __future__ import annotations

import click

from chatterbox_deploy import deploy, ledger
from chatterbox_deploy.cli import telling
from chatterbox_deploy.host import LocalHost


@click.command("uninstall")
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
    with ledger.lock(host):
        removal = deploy.removal(host, purge=purge, force=force)
        for change in removal.kept:
            click.echo(change.diff(), nl=False)
            click.echo(f"kept: {change.file.path} was edited by hand; --force removes it, too", err=True)
        telling.show(removal.plan)
        if dry_run or not removal.plan:
            return
        if purge and not yes:
            click.confirm("Remove all of this for good?", abort=True, err=True)
        deploy.remove(host, removal, telling.author(), telling.progress, purge=purge)
    click.echo("done: the fleet is uninstalled", err=True)
