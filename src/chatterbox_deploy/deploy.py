"""One change of a host as a transaction: planned, carried out and remembered, or gone back on. Prints nothing."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Protocol

from chatterbox_deploy import apply, config, difference, facts, ledger, nginx, observe, plan, render, systemd
from chatterbox_deploy.difference import Change
from chatterbox_deploy.errors import CommandFailed, ForeignFile
from chatterbox_deploy.facts import HostState
from chatterbox_deploy.fleet import SYSTEM
from chatterbox_deploy.ledger import Revision
from chatterbox_deploy.plan import Plan
from chatterbox_deploy.steps import PointLink, Purge, ShowFront, WaitIdle
from chatterbox_deploy.templates import Templates

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

    from chatterbox_deploy.facts import Wanted
    from chatterbox_deploy.host import Host
    from chatterbox_deploy.ledger import Ledger
    from chatterbox_deploy.render import RenderedFile
    from chatterbox_deploy.steps import Step

LINK = PurePosixPath(config.VERSION_LINK)


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What an operator asks for, as text: enough to render it here and now, or to keep it."""

    source: str
    """The fleet file's path."""

    fleet_toml: str
    templates: Mapping[str, str] = field(default_factory=dict)
    """Templates of the operator's own, by name."""

    version: str | None = None
    """Directory of the server's version; ``None`` where no link is used."""

    files: tuple[RenderedFile, ...] | None = None
    """Word for word, where they were rendered before."""

    number: int | None = None
    """The revision that it is."""


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


def blueprint(host: Host, *, source: str, fleet_toml: str, templates: Mapping[str, str]) -> Blueprint:
    """A fleet file as it would be applied to this host now."""
    link = host.read_link(LINK)
    return Blueprint(source, fleet_toml, templates, None if link is None else str(link))


def of_revision(kept: Revision) -> Blueprint:
    """A revision as it was applied."""
    return Blueprint(kept.source, kept.fleet_toml, kept.templates, kept.version, kept.rendered(), kept.number)


def current(host: Host) -> Blueprint:
    """What was applied last.

    Raises:
        CommandFailed: nothing was.
    """
    number = ledger.read(host).current
    if number is None:
        msg = "cannot find a fleet that was applied here: `chatterbox-deploy apply` does it"
        raise CommandFailed(msg)
    return of_revision(ledger.revision(host, number))


def previous(host: Host) -> Blueprint:
    """What ``rollback`` goes back to: what was applied before; while a change is unfinished, what it began from.

    Raises:
        CommandFailed: there is nothing before.
    """
    remembered = ledger.read(host)
    if remembered.interrupted is not None and remembered.current is not None:
        return of_revision(ledger.revision(host, remembered.current))
    older = [
        kept for kept in ledger.revisions(host) if remembered.current is not None and kept.number < remembered.current
    ]
    if not older:
        msg = "cannot go back: no revision was applied before this one (`chatterbox-deploy history`)"
        raise CommandFailed(msg)
    return of_revision(older[-1])


def want(asked: Blueprint) -> Wanted:
    """The fleet of a blueprint.

    Raises:
        FleetFileError: its fleet file is wrong.
        TemplateError: a template cannot be filled in.
    """
    fleet = config.load(asked.fleet_toml, source=asked.source)
    if asked.version is not None:
        fleet = fleet.with_version(asked.version)
    wanted = facts.want(fleet, Templates(asked.templates), source=asked.source)
    return wanted if asked.files is None else replace(wanted, files=asked.files)


def propose(
    host: Host, asked: Blueprint, *, restart: Mapping[str, str] | None = None, max_unavailable: int = 1
) -> Proposal:
    """Look at the host, and plan.

    Raises:
        DeployError: the host or the fleet file cannot be read.
    """
    return _propose(host, asked, ledger.read(host), restart, max_unavailable)


def _propose(
    host: Host,
    asked: Blueprint,
    remembered: Ledger,
    restart: Mapping[str, str] | None = None,
    max_unavailable: int = 1,
) -> Proposal:
    wanted = want(asked)
    state = observe.state(host, remembered, wanted=wanted.files, fleet=wanted.fleet)
    link = None
    if asked.version is not None and host.read_link(LINK) != PurePosixPath(asked.version):
        link = PointLink(LINK, PurePosixPath(asked.version))
    made = plan.plan(wanted, state, restart=restart, max_unavailable=max_unavailable, link=link)
    return Proposal(asked, wanted, state, made)


def carry_out(host: Host, proposal: Proposal, author: Author, progress: Progress, *, goes_back: bool = True) -> int:
    """Do what was proposed; the number of the revision that is then on the host. ``ledger.lock`` is held.

    Raises:
        WentBack: a step failed, and the host is again what it was.
        CommandFailed: a step failed, and there was nothing to go back to, or going back failed, too.
    """
    ledger.begin(host, who=author.who, command=author.command)
    _tidy(host)
    try:
        apply.carry_out(proposal.plan.steps, host, progress(len(proposal.plan.steps)))
    except CommandFailed as error:
        ledger.log(host, who=author.who, command=author.command, result=f"failed: {error}")
        raise _gone_back(host, author, error, progress) if goes_back else error from None
    number = _remember(host, proposal, author)
    ledger.log(host, who=author.who, command=author.command, result=f"done: revision {number}")
    return number


def _tidy(host: Host) -> None:
    """Remove files that were half written when somebody pulled the plug; nobody reads them by these names."""
    for directory, pattern in ((render.UNIT_DIR, ".chatterbox-tts*"), (render.FRONT_PATH.parent, ".chatterbox-tts*")):
        for path in host.glob(directory, pattern):
            host.remove(path)


def _gone_back(host: Host, author: Author, error: CommandFailed, progress: Progress) -> CommandFailed:
    """Return to what was applied last; what to raise then."""
    remembered = ledger.read(host)
    if remembered.current is None:
        msg = (
            f"{error}\nnothing was applied before, so there is nothing to go back to: "
            "`chatterbox-deploy apply` goes on from here, `chatterbox-deploy uninstall` clears up"
        )
        return CommandFailed(msg)
    try:
        # The keys that are there now are there: no going back on them.
        before = _propose(host, of_revision(ledger.revision(host, remembered.current)), replace(remembered, keys={}))
        if before.plan.problems:
            return CommandFailed(f"{error}\nand cannot go back: {'; '.join(before.plan.problems)}")
        tell = progress(len(before.plan.steps), f"going back to revision {remembered.current}")
        apply.carry_out(before.plan.steps, host, tell)
    except CommandFailed as second:
        ledger.log(host, who=author.who, command=author.command, result=f"cannot go back: {second}")
        return CommandFailed(f"{error}\nand cannot go back to revision {remembered.current}: {second}")
    _remember(host, before, author)
    ledger.log(host, who=author.who, command=author.command, result=f"went back to revision {remembered.current}")
    return WentBack(f"{error}\nwent back to revision {remembered.current}, which serves as before")


def _remember(host: Host, proposal: Proposal, author: Author) -> int:
    asked, wanted = proposal.blueprint, proposal.wanted
    remembered = ledger.read(host)
    files = {str(file.path): file.text for file in wanted.files}
    number = asked.number
    if number is None and remembered.current is not None:
        last = ledger.revision(host, remembered.current)
        if (last.fleet_toml, last.files, last.version) == (asked.fleet_toml, files, asked.version):
            number = last.number
    if number is None:
        number = ledger.next_number(host)
        when = host.now().isoformat(timespec="seconds")
        ledger.keep(
            host,
            Revision(
                number,
                when,
                author.who,
                author.command,
                asked.source,
                asked.fleet_toml,
                files,
                asked.templates,
                asked.version,
            ),
        )
    keys = {
        path: digest
        for path in (wanted.fleet.front.api_keys_file, wanted.fleet.service.api_keys_file)
        if path is not None and (digest := observe.key_digest(host, path)) is not None
    }
    names = {instance.name for instance in wanted.fleet.instances}
    ledger.end(
        host,
        ledger.Ledger(
            current=number,
            files=ledger.digests(wanted.files) | _front_digest(host),
            keys=keys,
            drained=tuple(name for name in remembered.drained if name in names),
        ),
    )
    return number


def _front_digest(host: Host) -> dict[str, str]:
    """Of the front as it lies there: with instances drained it is not word for word what the fleet renders."""
    content = host.read_bytes(render.FRONT_PATH)
    if content is None:
        return {}
    return ledger.digests([render.RenderedFile(render.FRONT_PATH, content.decode(errors="replace"))])


def drain(host: Host, names: Collection[str], author: Author, progress: Progress, *, drained: bool) -> None:
    """Take instances out of the front and wait until they are idle, or put them back. ``ledger.lock`` is held.

    Raises:
        CommandFailed: nothing was applied here, or nginx refuses.
    """
    wanted = want(current(host))
    remembered = ledger.read(host)
    if remembered.interrupted is not None:
        msg = f"cannot begin: `{remembered.interrupted}` did not end; `chatterbox-deploy apply` finishes it"
        raise CommandFailed(msg)
    path = render.FRONT_PATH
    before = (host.read_bytes(path) or b"").decode(errors="replace")
    if not render.is_ours(before):
        msg = f"cannot find our front at {path}: `chatterbox-deploy apply` writes it"
        raise CommandFailed(msg)
    upstreams = [
        replace(upstream, drained=drained if upstream.name in names else upstream.drained)
        for upstream in nginx.find_upstreams(before)
    ]
    service = wanted.fleet.service
    text = wanted.front(upstreams)
    steps: list[Step] = (
        [ShowFront(Change(render.RenderedFile(path, text), before), tuple(upstreams))] if text != before else []
    )
    if drained:
        steps += [
            WaitIdle(upstream.name, upstream.host, upstream.port, service.stop_timeout_s, service.speaks_notify)
            for upstream in upstreams
            if upstream.name in names
        ]
    kept = [name for name in remembered.drained if name not in names]
    ledger.write(host, replace(remembered, drained=tuple(sorted([*kept, *names]) if drained else kept)))
    ledger.log(host, who=author.who, command=author.command, result="begun")
    apply.carry_out(steps, host, progress(len(steps)))
    remembered = ledger.read(host)
    ledger.write(host, replace(remembered, files={**remembered.files, **_front_digest(host)}))
    ledger.log(host, who=author.who, command=author.command, result="done")


@dataclass(frozen=True, slots=True)
class Removal:
    """What an uninstallation takes away, and what it leaves."""

    plan: Plan
    kept: tuple[Change, ...]
    """Files of ours that were edited by hand; each differs from what we wrote."""


def removal(host: Host, *, purge: bool, force: bool) -> Removal:
    """How to take the fleet off the host.

    Raises:
        CommandFailed: the host cannot be read.
    """
    remembered = ledger.read(host)
    state = observe.state(host, remembered)
    written = dict(ledger.revision(host, remembered.current).files) if remembered.current is not None else {}
    edited = [] if force else sorted(state.edited)
    made = plan.plan_removal(state, keep=edited)
    kept = tuple(Change(render.RenderedFile(path, state.files[path]), written.get(str(path))) for path in edited)
    if purge:
        there = [path for path in (*_PURGED, *_runtime_dirs(host, kept)) if _is_there(host, path)]
        logs = host.glob(PurePosixPath(SYSTEM.log_dir), "chatterbox-tts.access.log*")
        made = replace(made, steps=(*made.steps, *(Purge(path) for path in (*there, *logs))))
    return Removal(made, kept)


def remove(host: Host, removal: Removal, author: Author, progress: Progress, *, purge: bool) -> None:
    """Carry it out. ``ledger.lock`` is held.

    Raises:
        CommandFailed: a step failed; typed again, it goes on.
    """
    ledger.begin(host, who=author.who, command=author.command)
    _tidy(host)
    apply.carry_out(removal.plan.steps, host, progress(len(removal.plan.steps)))
    if purge:
        host.remove(ledger.DIR)
    else:
        ledger.end(host, ledger.Ledger())
        ledger.log(host, who=author.who, command=author.command, result="done: uninstalled")


_PURGED = (
    *(
        PurePosixPath(place)
        for name in (SYSTEM.state_dir, SYSTEM.cache_dir)
        # Where the user is made up by systemd, the directory itself is private and the name a link to it.
        for place in (name, name.replace("/chatterbox-tts", "/private/chatterbox-tts"))
    ),
    LINK,
    PurePosixPath(config.VERSIONS_DIR),
)


def _runtime_dirs(host: Host, kept: Collection[Change]) -> list[PurePosixPath]:
    """Of every instance that there ever was: where the user is made up, systemd leaves a link behind at each stop."""
    units = {PurePosixPath(path).name for revision in ledger.revisions(host) for path in revision.files}
    names = {systemd.instance_name(unit) for unit in units - {change.file.path.name for change in kept}}
    return [PurePosixPath(f"/run/chatterbox-tts-{name}") for name in sorted(filter(None, names))]


def _is_there(host: Host, path: PurePosixPath) -> bool:
    return host.run(("test", "-e", str(path), "-o", "-L", str(path)), timeout_s=10, check=False).status == 0


def install(host: Host, root: Path, asked: Blueprint, author: Author) -> list[str]:
    """Write a fleet into a directory tree that will boot elsewhere; what was done, a line each. Nothing runs.

    Raises:
        ForeignFile: a file of others is in the way.
        CommandFailed: a file cannot be written, or systemctl is not there.
    """
    wanted = want(asked)
    found = difference.compare(wanted.files, observe.files(host, wanted.files))
    if found.foreign:
        names = "".join(f"\n  {path}" for path in found.foreign)
        msg = f"cannot write over files that chatterbox-deploy did not write; move them away first:{names}"
        raise ForeignFile(msg)
    with ledger.lock(host):
        host.write_files([change.file for change in found.to_write])
        for path in found.stale:
            host.remove(path)
        host.run(("systemctl", f"--root={root}", "enable", systemd.TARGET), timeout_s=apply.COMMAND_TIMEOUT_S)
        made = Proposal(asked, wanted, HostState(), Plan())
        number = _remember(host, made, author)
    return [
        *(f"wrote  {change.file.path}" for change in found.to_write),
        *(f"removed  {path}" for path in found.stale),
        f"enabled  {systemd.TARGET}",
        f"done: revision {number}",
    ]
