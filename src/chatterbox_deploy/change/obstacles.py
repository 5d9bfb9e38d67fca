"""What would stop a plan halfway, found before it begins, each with its cure. Decides; asks nobody."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatterbox_deploy import nginx, render, systemd
from chatterbox_deploy.config.values import split_listen
from chatterbox_deploy.fleet import MPS_PROGRAM
from chatterbox_deploy.sizing import capacity

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import PurePosixPath

    from chatterbox_deploy.change.facts import HostState, Wanted


def foreign(path: PurePosixPath) -> str:
    """Why a file that others wrote stops a plan."""
    return f"{path}: chatterbox-deploy did not write it, and writes over nothing of others; move it away"


def find(wanted: Wanted, state: HostState, foreign_files: Iterable[PurePosixPath]) -> list[str]:
    """Everything that would stop a plan halfway, found before it begins."""
    # By instances of ours, which make way.
    held = {
        unit.running.port
        for name, unit in state.instances.items()
        if unit.running is not None
        and render.is_ours(state.files.get(render.UNIT_DIR / systemd.unit_name(name), render.header("")))
    }
    found = [foreign(path) for path in foreign_files]
    found += [
        f"{instance.name}: something else listens on its port {instance.port}; "
        f"`ss -tlnp sport = :{instance.port}` names it"
        for instance in wanted.fleet.instances
        if instance.port in state.listening - held
    ]
    front_port = split_listen(wanted.fleet.front.listen)[1]
    found += [
        f"nginx.listen: {name} still listens on port {front_port}; apply its new port first, and then the new listen"
        for name, unit in state.instances.items()
        if unit.running is not None and unit.running.port == front_port
    ]
    found += [
        f"nginx.listen: {program} already listens on port {port}; `ss -tlnp sport = :{port}` shows it"
        for port, program in sorted(state.strangers.items())
    ]
    found += [f"{name}: missing; {_CURES.get(name, 'the fleet needs it')}" for name in sorted(state.missing)]
    return found + capacity.problems(wanted.fleet, state.gpus, state.cpus)


_CURES = {
    nginx.PROGRAM: "apt-get install nginx",
    MPS_PROGRAM: "instances that share a GPU need it: on Ubuntu it is in nvidia-compute-utils-VERSION, on Debian in "
    "nvidia-cuda-mps; or have them take turns, with mps = false below [unit]",
}
