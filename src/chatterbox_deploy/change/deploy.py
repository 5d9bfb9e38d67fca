"""One change of a host as a transaction: planned, carried out and remembered, or gone back on. Prints nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from chatterbox_deploy import render
from chatterbox_deploy.change import apply, ledger, observe, plan
from chatterbox_deploy.change.blueprint import LINK, of_revision, want
from chatterbox_deploy.change.ledger import Begun, Ledger, Revision
from chatterbox_deploy.change.steps import PointLink, ShowFront, WriteFiles
from chatterbox_deploy.errors import CommandFailed, DeployError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from chatterbox_deploy.change.blueprint import Blueprint
    from chatterbox_deploy.change.facts import HostState, Wanted
    from chatterbox_deploy.change.plan import Plan
    from chatterbox_deploy.change.steps import Step
    from chatterbox_deploy.host import Host


@dataclass(frozen=True, slots=True)
class Author:
    """Who changes the host, and by which command."""

    who: str
    command: str


@dataclass(frozen=True, slots=True)
class Proposal:
    """A plan, and what it was made from."""

    blueprint: Blueprint
    wanted: Wanted
    state: HostState
    plan: Plan


class Progress(Protocol):
    """Told what is about to happen: a name where it is not what was asked for, and how many steps it has."""

    def __call__(self, total: int, title: str | None = None) -> Callable[[int, Step], None]:
        """What to tell of each step before it is taken."""
        ...


class WentBack(CommandFailed):
    """A change failed and was undone: the host serves as it did before."""


def propose(
    host: Host,
    asked: Blueprint,
    *,
    restart: Mapping[str, str] | None = None,
    only: Collection[str] | None = None,
    max_unavailable: int = 1,
) -> Proposal:
    """Look at the host, and plan; see ``plan.plan``.

    Raises:
        DeployError: the host or the fleet file cannot be read.
    """
    return _propose(host, asked, ledger.read(host), restart=restart, only=only, max_unavailable=max_unavailable)


def _propose(host: Host, asked: Blueprint, remembered: Ledger, **how: Any) -> Proposal:
    wanted = want(asked)
    state = observe.state(host, remembered, wanted=wanted.files, fleet=wanted.fleet)
    link = None
    if asked.version is not None and str(host.read_link(LINK)) != asked.version:
        link = PointLink(LINK, PurePosixPath(asked.version))
    return Proposal(asked, wanted, state, plan.plan(wanted, state, link=link, **how))


def carry_out(host: Host, proposal: Proposal, author: Author, progress: Progress, *, goes_back: bool = True) -> int:
    """Do what was proposed; the number of the revision that is then on the host. ``ledger.lock`` is held.

    Raises:
        WentBack: a step failed, and the host is again what it was.
        CommandFailed: a step failed, and there was nothing to go back to, or going back failed, too.
    """
    if any(isinstance(step, ShowFront) for step in proposal.plan.steps):
        _refuse_where_nginx_does(host)
    begin(host, author, proposal.plan.steps, goal=proposal.blueprint.number)
    try:
        apply.carry_out(proposal.plan.steps, host, progress(len(proposal.plan.steps)))
    except KeyboardInterrupt:
        log(host, author, "interrupted")
        raise
    except CommandFailed as error:
        log(host, author, f"failed: {error}")
        raise _gone_back(host, proposal.state, author, error, progress) if goes_back else error from None
    number = _remember(host, proposal, author, proposal.state.keys)
    log(host, author, f"done: revision {number}")
    return number


def begin(
    host: Host,
    author: Author,
    steps: Sequence[Step],
    *,
    goal: int | None = None,
    drained: Sequence[str] | None = None,
) -> None:
    """Before the first step: should we die, the next one knows what was to be done."""
    written: dict[str, list[str]] = {}
    for step in steps:
        for change in step.changes if isinstance(step, WriteFiles | ShowFront) else ():
            written.setdefault(str(change.file.path), []).append(ledger.digest(change.file.text))
    link = host.read_link(LINK)
    ledger.begin(host, Begun(author.command, written, None if link is None else str(link), goal, drained))
    log(host, author, "begun")
    _tidy(host)


def _refuse_where_nginx_does(host: Host) -> None:
    """What nginx refuses of others' files it would refuse of every front: nothing is begun then.

    Raises:
        CommandFailed: it refuses what is there, and not for our front.
    """
    said = host.run(("nginx", "-t"), timeout_s=apply.COMMAND_TIMEOUT_S, check=False)
    if said.status == 0:
        return
    ours = (host.read_bytes(render.FRONT_PATH) or b"").decode(errors="replace")
    blamed = [str(render.FRONT_PATH), *re.findall(r'"(/[^"]+)"', ours)]
    if not any(path in said.stderr for path in blamed):
        msg = f"cannot begin: nginx refuses its files, and not for ours; nothing was changed:\n  {said.stderr.strip()}"
        raise CommandFailed(msg)


def log(host: Host, author: Author, result: str) -> None:
    """One line of the audit log."""
    ledger.log(host, who=author.who, command=author.command, result=result)


def advice(host: Host) -> str | None:
    """What to type where a change did not end; ``None`` where none is unfinished.

    Raises:
        CommandFailed: what is remembered cannot be read.
    """
    remembered = ledger.read(host)
    if remembered.begun is None:
        return None
    finish = f"`{remembered.begun.command}` finishes it"
    if remembered.current is None:
        return f"{finish}, `chatterbox-deploy uninstall` undoes it"
    if remembered.begun.drained is not None or remembered.begun.goal == remembered.current:
        return finish
    there = "" if remembered.begun.goal is None else f" {remembered.current}"
    return f"{finish}, `chatterbox-deploy rollback{there}` undoes it"


def _tidy(host: Host) -> None:
    """Remove files that were half written when somebody pulled the plug (``host``: mkstemp(3) beside the target)."""
    for directory in (render.UNIT_DIR, render.FRONT_PATH.parent):
        for path in host.glob(directory, ".chatterbox-tts*"):
            if _HALF_WRITTEN.fullmatch(path.name):
                host.remove(path)


_HALF_WRITTEN = re.compile(r"\.chatterbox-tts.*\.(service|target|timer|conf)\.[a-z0-9_]{8}")


def _gone_back(
    host: Host, before: HostState, author: Author, error: CommandFailed, progress: Progress
) -> CommandFailed:
    """Return to what was applied last; what to raise then."""
    remembered = ledger.read(host)
    kept = ledger.find_revision(host, remembered.current)
    if kept is None:
        msg = f"{error}\nnothing was applied before, so there is nothing to go back to: {advice(host)}"
        return CommandFailed(msg)
    what = f"go back to revision {kept.number}"
    # Whoever was out of order before may not come up now either: the others do not wait for it.
    lame = [name for name, unit in before.instances.items() if unit.active != "active"]
    try:
        # The keys that are there now are there: no going back on them.
        back = _propose(host, of_revision(host, kept), replace(remembered, keys={}), last=lame)
        if back.plan.problems:
            log(host, author, f"cannot {what}: {'; '.join(back.plan.problems)}")
            return CommandFailed(f"{error}\nand cannot {what}: {'; '.join(back.plan.problems)}; {advice(host)}")
        begin(host, author, back.plan.steps, goal=kept.number)
        apply.carry_out(back.plan.steps, host, progress(len(back.plan.steps), f"going back to revision {kept.number}"))
    except DeployError as second:
        log(host, author, f"cannot {what}: {second}")
        return CommandFailed(f"{error}\nand cannot {what}: {second}\n{advice(host)}")
    _remember(host, back, author, remembered.keys)
    log(host, author, f"went back to revision {kept.number}")
    return WentBack(f"{error}\nwent back to revision {kept.number}, which serves as before")


def _remember(host: Host, proposal: Proposal, author: Author, keys: Mapping[str, str]) -> int:
    """``keys``: digests of those that every instance has for certain."""
    wanted = proposal.wanted
    remembered = ledger.read(host)
    names = {instance.name for instance in wanted.fleet.instances}
    files = {str(file.path): ledger.digest(file.text) for file in wanted.files}
    number = _revision_number(host, proposal, author, remembered.current)
    ledger.end(
        host,
        Ledger(
            current=number,
            files=files | front_digest(host),
            keys=keys,
            # On the way back nobody takes back his word; in a new fleet file who is gone is gone.
            drained=tuple(
                name for name in remembered.drained if name in names or proposal.blueprint.number is not None
            ),
        ),
    )
    return number


def _revision_number(host: Host, proposal: Proposal, author: Author, current: int | None) -> int:
    """That of a revision which says the same, else a new one's, which is kept."""
    asked = proposal.blueprint
    if asked.number is not None:
        return asked.number
    files = {str(file.path): file.text for file in proposal.wanted.files}
    number = ledger.next_number(host)
    # The newest, too: it was kept, and its author died before the ledger said so.
    for known in (ledger.find_revision(host, current), ledger.find_revision(host, number - 1)):
        if known is not None and (known.fleet_toml, known.files, known.version) == (
            asked.fleet_toml,
            files,
            asked.version,
        ):
            return known.number
    kept = Revision(
        number=number,
        when=host.now().isoformat(timespec="seconds"),
        who=author.who,
        command=author.command,
        source=asked.source,
        fleet_toml=asked.fleet_toml,
        files=files,
        templates=asked.templates,
        version=asked.version,
        before=current,
    )
    ledger.keep(host, kept, needed=() if current is None else (current,))
    return number


def front_digest(host: Host) -> dict[str, str]:
    """Of the front as it lies there: with instances drained it is not word for word what the fleet renders."""
    content = host.read_bytes(render.FRONT_PATH)
    if content is None:
        return {}
    return {str(render.FRONT_PATH): ledger.digest(content.decode(errors="replace"))}
