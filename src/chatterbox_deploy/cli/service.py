"""``chatterbox-deploy start``, ``stop`` and ``restart``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from chatterbox_deploy import fleet, render, systemd
from chatterbox_deploy.change import apply
from chatterbox_deploy.cli import arguments, mistakes
from chatterbox_deploy.errors import CommandFailed
from chatterbox_deploy.host import LocalHost

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from chatterbox_deploy.fleet import Fleet, Instance
    from chatterbox_deploy.host import Host

_MARGIN_S = 120
"""For what systemd does beside starting an instance: device nodes, nginx."""


@click.command("start", cls=mistakes.Command)
@arguments.INSTANCES
@arguments.FLEET_OPTION
def start_command(*, who: tuple[str, ...], fleet_file: Path) -> None:
    """Start the fleet, or instances N: 0, gpu0, gpu1-a; 1 is all on GPU 1. Returns when they can speak.

    \b
        chatterbox-deploy start
        chatterbox-deploy start 0

    Also what systemd had given up after a crash loop.
    """
    resolved, chosen = _choose(fleet_file, who)
    _start(LocalHost(), "start", resolved, chosen, whole=not who)


@click.command("stop", cls=mistakes.Command)
@arguments.INSTANCES
@arguments.FLEET_OPTION
def stop_command(*, who: tuple[str, ...], fleet_file: Path) -> None:
    """Stop the fleet, or instances N: 0, gpu0, gpu1-a; 1 is all on GPU 1. Returns when they have stopped.

    \b
        chatterbox-deploy stop
        chatterbox-deploy stop gpu1-a

    Each finishes what it began. At the next boot the fleet starts again.
    """
    resolved, chosen = _choose(fleet_file, who)
    host = LocalHost()
    units = [systemd.unit_name(instance.name) for instance in chosen]
    if not who:
        # By name: stopping the target returns before the units that are part of it have stopped.
        daemons = (systemd.unit_name(daemon.name) for daemon in resolved.mps_daemons)
        others = (systemd.TARGET, systemd.RECYCLE_TIMER, systemd.RECYCLE_UNIT, *daemons)
        units += [unit for unit in others if _is_installed(host, unit)]
    _refuse_missing(host, "stop", chosen)
    click.echo(f"stopping {_listed(chosen)}; what was begun is finished first", err=True)
    _systemctl(host, ("stop", *units), timeout_s=apply.LONGEST_STOP_S)
    click.echo(f"stopped {_listed(chosen)}", err=True)


@click.command("restart", cls=mistakes.Command)
@arguments.INSTANCES
@arguments.FLEET_OPTION
def restart_command(*, who: tuple[str, ...], fleet_file: Path) -> None:
    """Restart the fleet, or instances N: 0, gpu0, gpu1-a; 1 is all on GPU 1. All of them at once.

    \b
        chatterbox-deploy restart 0

    Meanwhile they answer nobody; `chatterbox-deploy rollout` restarts one at a time and loses no request.
    """
    resolved, chosen = _choose(fleet_file, who)
    click.echo("restarting at once; `chatterbox-deploy rollout` does it without losing a request", err=True)
    _start(LocalHost(), "restart", resolved, chosen, whole=not who)


def _choose(fleet_file: Path, who: Sequence[str]) -> tuple[Fleet, tuple[Instance, ...]]:
    resolved = fleet.resolve(arguments.read_fleet(fleet_file))
    return resolved, arguments.find_instances(resolved, who)


def _start(host: Host, verb: str, resolved: Fleet, chosen: Sequence[Instance], *, whole: bool) -> None:
    _refuse_missing(host, verb, chosen)
    units = [systemd.unit_name(instance.name) for instance in chosen]
    # After a crash loop systemd refuses to start a unit; there is nothing to forget about one it has not loaded.
    daemons = [systemd.unit_name(each.name) for each in resolved.mps_daemons if any(i.mps == each for i in chosen)]
    host.run(("systemctl", "reset-failed", *units, *daemons), timeout_s=_MARGIN_S, check=False)
    service = resolved.service
    _systemctl(
        host,
        (verb, *([systemd.TARGET] if whole else []), *units),
        timeout_s=service.start_timeout_s + _MARGIN_S + (apply.LONGEST_STOP_S if verb == "restart" else 0),
    )
    click.echo(f"{verb}ed {_listed(chosen)}", err=True)


def _is_installed(host: Host, unit: str) -> bool:
    return host.read_bytes(render.UNIT_DIR / unit) is not None


def _refuse_missing(host: Host, verb: str, chosen: Sequence[Instance]) -> None:
    missing = [instance for instance in chosen if not _is_installed(host, systemd.unit_name(instance.name))]
    if missing:
        msg = f"cannot {verb} {_listed(missing)}: not installed; chatterbox-deploy apply"
        raise CommandFailed(msg)


def _listed(instances: Sequence[Instance]) -> str:
    return ", ".join(instance.name for instance in instances)


def _systemctl(host: Host, words: Sequence[str], *, timeout_s: float) -> None:
    try:
        host.run(("systemctl", *words), timeout_s=timeout_s)
    except CommandFailed as error:
        # "Interactive authentication required": there is nobody to ask.
        hint = "\nrun it as root" if "uthentication required" in str(error) else ""
        msg = f"{error}{hint}"
        raise CommandFailed(msg) from None
