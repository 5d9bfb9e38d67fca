"""``chatterbox-deploy rollout``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePosixPath

import click

from chatterbox_deploy import fleet
from chatterbox_deploy.change import blueprint, deploy, ledger
from chatterbox_deploy.cli import arguments, mistakes, telling
from chatterbox_deploy.cli.plan import UNAVAILABLE, change
from chatterbox_deploy.config import tables
from chatterbox_deploy.errors import CommandFailed
from chatterbox_deploy.host import LocalHost


@click.command("rollout", cls=mistakes.Command)
@arguments.FLEET
@click.option("--gpu", "only", metavar="N", help="Only the instances on this GPU, or this instance (gpu1-a).")
@click.option("--version", "version", metavar="NAME", help=f"First turn to this version below {tables.VERSIONS_DIR}.")
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
    directory = PurePosixPath(tables.VERSIONS_DIR) / version
    if directory.name != version or version in {".", ".."}:
        msg = (
            f"cannot use version {version!r}: name a directory in {directory.parent}, as `scripts/install-version` does"
        )
        raise CommandFailed(msg)
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
