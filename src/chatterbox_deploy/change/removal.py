"""A fleet taken off a host. Prints nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from chatterbox_deploy import render, systemd
from chatterbox_deploy.change import apply, deploy, ledger, observe, plan
from chatterbox_deploy.change.blueprint import LINK
from chatterbox_deploy.change.difference import Change
from chatterbox_deploy.change.steps import Purge, Run
from chatterbox_deploy.config import tables
from chatterbox_deploy.errors import CommandFailed
from chatterbox_deploy.fleet import SYSTEM

if TYPE_CHECKING:
    from collections.abc import Collection

    from chatterbox_deploy.change.deploy import Author, Progress
    from chatterbox_deploy.change.plan import Plan
    from chatterbox_deploy.host import Host

COMMAND_LINK = PurePosixPath("/usr/local/bin/chatterbox-deploy")
"""As ``scripts/install-version`` makes it."""


_LEAVE_OTHERS = Run(("rmdir", "--ignore-fail-on-non-empty", str(LINK.parent)), "what others put there stays")


@dataclass(frozen=True, slots=True)
class Removal:
    """What an uninstallation takes away, and what it leaves."""

    plan: Plan
    kept: tuple[Change, ...]
    """Files of ours that were edited by hand; each differs from what we wrote."""


def propose(host: Host, *, purge: bool, force: bool) -> Removal:
    """How to take the fleet off the host.

    Raises:
        CommandFailed: the host cannot be read.
    """
    remembered = ledger.read(host)
    state = observe.state(host, remembered)
    revision = ledger.find_revision(host, remembered.current)
    written = {} if revision is None else revision.files
    edited = [] if force else sorted(state.edited)
    made = plan.plan_removal(state, keep=edited, edited=state.edited)
    kept = tuple(Change(render.RenderedFile(path, state.files[path]), written.get(str(path))) for path in edited)
    if purge:
        steps = [*made.steps, *(Purge(path) for path in _written_by_fleets(host, kept) if _is_there(host, path))]
        if steps or _is_there(host, ledger.DIR):
            if _is_there(host, LINK.parent):
                steps.append(_LEAVE_OTHERS)
            # What is remembered goes last: until then, whoever types it again knows what to do.
            steps.append(Purge(ledger.DIR))
        made = replace(made, steps=tuple(steps))
    return Removal(made, kept)


def carry_out(host: Host, removal: Removal, author: Author, progress: Progress) -> None:
    """Do it. ``ledger.lock`` is held.

    Raises:
        CommandFailed: a step failed; typed again, it goes on.
    """
    if not removal.plan:
        return
    deploy.begin(host, author, removal.plan.steps)
    try:
        apply.carry_out(removal.plan.steps, host, progress(len(removal.plan.steps)))
    except CommandFailed as error:
        deploy.log(host, author, f"failed: {error}")
        raise
    if Purge(ledger.DIR) in removal.plan.steps:
        return
    remembered = ledger.read(host)
    # What is kept is known for an edited file of ours next time, too.
    kept = {str(change.file.path) for change in removal.kept}
    ledger.end(host, ledger.Ledger(files={path: known for path, known in remembered.files.items() if path in kept}))
    deploy.log(host, author, "done: uninstalled")


def _written_by_fleets(host: Host, kept: Collection[Change]) -> list[PurePosixPath]:
    """Voices, weights, logs, versions: what no fleet file lists."""
    places = [
        PurePosixPath(place)
        for name in (SYSTEM.state_dir, SYSTEM.cache_dir)
        # Where the user is made up by systemd, the directory itself is private and the name a link to it.
        for place in (name, name.replace("/chatterbox-tts", "/private/chatterbox-tts"))
    ]
    versions = PurePosixPath(tables.VERSIONS_DIR)
    # A directory in the link's place is an environment that somebody made for himself.
    links = [link for link in (LINK, COMMAND_LINK) if (to := host.read_link(link)) and to.is_relative_to(LINK.parent)]
    links += host.glob(LINK.parent, f".{LINK.name}.*")
    logs = host.glob(PurePosixPath(SYSTEM.log_dir), "chatterbox-tts.access.log*")
    return [*places, *_runtime_dirs(host, kept), *logs, *links, versions, apply.STAGING_DIR]


def _runtime_dirs(host: Host, kept: Collection[Change]) -> list[PurePosixPath]:
    """Of every instance that there ever was: where the user is made up, systemd leaves a link behind at each stop."""
    units = {PurePosixPath(path).name for revision in ledger.revisions(host) for path in revision.files}
    names = {systemd.instance_name(unit) for unit in units - {change.file.path.name for change in kept}}
    return [PurePosixPath(f"/run/chatterbox-tts-{name}") for name in sorted(filter(None, names))]


def _is_there(host: Host, path: PurePosixPath) -> bool:
    return host.run(("test", "-e", str(path), "-o", "-L", str(path)), timeout_s=10, check=False).status == 0
