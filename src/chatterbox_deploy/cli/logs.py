"""``chatterbox-deploy logs``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from chatterbox_deploy import fleet, process, systemd
from chatterbox_deploy.cli import arguments, mistakes

if TYPE_CHECKING:
    from pathlib import Path

_FLEET_UNITS = (systemd.TARGET, systemd.FRONT_UNIT, systemd.NODES_UNIT, systemd.RECYCLE_UNIT, systemd.MONITOR_UNIT)


@click.command("logs", cls=mistakes.Command)
@arguments.INSTANCES
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@click.option("-n", "--lines", type=click.IntRange(min=0), help="The last so many lines.  [default: 100, or all since]")
@click.option(
    "--since", metavar="TIME", help="From then on, as journalctl takes it: 'today', '-10min', '2026-01-31 12:00'."
)
@arguments.FLEET_OPTION
def logs_command(*, who: tuple[str, ...], follow: bool, lines: int | None, since: str | None, fleet_file: Path) -> None:
    """Print what the fleet wrote to the journal, or instances N: 0, gpu0, gpu1-a; 1 is all on GPU 1.

    \b
        chatterbox-deploy logs -f
        chatterbox-deploy logs 0 --since -10min
    """
    resolved = fleet.resolve(arguments.read_fleet(fleet_file))
    chosen = arguments.find_instances(resolved, who)
    units = [systemd.unit_name(instance.name) for instance in chosen]
    units += [systemd.unit_name(each.name) for each in resolved.mps_daemons if any(i.mps == each for i in chosen)]
    if lines is None and since is None:
        lines = 100
    process.hand_over(
        systemd.journal_argv(units if who else [*units, *_FLEET_UNITS], lines=lines, since=since, follow=follow)
    )
