"""``chatterbox-deploy drain`` and ``chatterbox-deploy undrain``."""

from __future__ import annotations

import click

from chatterbox_deploy import fleet
from chatterbox_deploy.change import blueprint, draining, ledger
from chatterbox_deploy.cli import mistakes, telling
from chatterbox_deploy.host import LocalHost


@click.command("drain", cls=mistakes.Command)
@click.argument("instance", metavar="N")
@click.option("--force", is_flag=True, help="Also when nobody else is in service.")
def drain_command(*, instance: str, force: bool) -> None:
    """Take N out of the front, and wait until it has finished: a GPU (1) or an instance (gpu1-a).

    \b
        sudo chatterbox-deploy drain 1
        sudo chatterbox-deploy undrain 1

    It runs on and answers on its own port; `apply` and `rollout` leave it out of the front.
    """
    _set(instance, drained=True, force=force)


@click.command("undrain", cls=mistakes.Command)
@click.argument("instance", metavar="N")
def undrain_command(*, instance: str) -> None:
    """Put N back into the front.

    \b
        sudo chatterbox-deploy undrain 1
    """
    _set(instance, drained=False)


def _set(instance: str, *, drained: bool, force: bool = False) -> None:
    host = LocalHost()
    author = telling.author()
    with ledger.lock(host, author.command), telling.interruptible(host):
        chosen = [found.name for found in fleet.find(blueprint.want(blueprint.current(host)).fleet, instance)]
        draining.drain(host, chosen, author, telling.progress, drained=drained, force=force)
    click.echo(f"{', '.join(chosen)}: {'drained' if drained else 'back in service'}", err=True)
