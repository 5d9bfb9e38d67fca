"""A fleet in a directory tree that will boot elsewhere: files and what starts at boot. Runs nothing of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatterbox_deploy import systemd
from chatterbox_deploy.change import difference, observe, obstacles
from chatterbox_deploy.change.blueprint import want
from chatterbox_deploy.change.deploy import Proposal
from chatterbox_deploy.change.facts import HostState
from chatterbox_deploy.change.plan import Plan
from chatterbox_deploy.change.steps import RemoveFile, Run, WriteFiles

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_deploy.change.blueprint import Blueprint
    from chatterbox_deploy.change.steps import Step
    from chatterbox_deploy.host import LocalHost


def propose(host: LocalHost, root: Path, asked: Blueprint) -> Proposal:
    """What to write below ``root``, which ``host`` stands for.

    Raises:
        DeployError: the tree or the fleet file cannot be read.
    """
    wanted = want(asked)
    on_disk = observe.files(host, wanted.files)
    found = difference.compare(wanted.files, on_disk)
    steps: list[Step] = [WriteFiles(found.to_write)] if found.to_write else []
    steps += [RemoveFile(path, on_disk[path]) for path in found.stale]
    if host.read_link(systemd.STARTS_AT_BOOT) is None:
        steps.append(Run(("systemctl", f"--root={root}", "enable", systemd.TARGET), "the fleet starts at boot"))
    notes = [
        f"{path} is not in the image yet; the fleet needs it"
        for path in observe.needs(wanted.fleet)
        if not observe.exists(host, path)
    ]
    made = Plan(tuple(steps), notes=tuple(notes), problems=tuple(obstacles.foreign(path) for path in found.foreign))
    return Proposal(asked, wanted, HostState(files=on_disk), made)
