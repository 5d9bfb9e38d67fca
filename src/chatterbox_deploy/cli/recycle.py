"""``chatterbox-deploy recycle``."""

from __future__ import annotations

import click

from chatterbox_deploy.change import blueprint, deploy, ledger, recycling
from chatterbox_deploy.cli import mistakes, telling
from chatterbox_deploy.cli.plan import change
from chatterbox_deploy.errors import CommandFailed
from chatterbox_deploy.host import LocalHost


@click.command("recycle", cls=mistakes.Command)
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
