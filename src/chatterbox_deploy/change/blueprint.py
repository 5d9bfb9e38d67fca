"""What an operator asks for, as text: from a fleet file, or from a revision that was applied before."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from chatterbox_deploy.change import facts, ledger
from chatterbox_deploy.config import reading, tables
from chatterbox_deploy.errors import CommandFailed
from chatterbox_deploy.templates import Templates

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chatterbox_deploy.change.facts import Wanted
    from chatterbox_deploy.change.ledger import Revision
    from chatterbox_deploy.host import Host
    from chatterbox_deploy.render import RenderedFile

LINK = PurePosixPath(tables.VERSION_LINK)


@dataclass(frozen=True, slots=True)
class Blueprint:
    """Enough to render a fleet here and now, or to keep it."""

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


def of_file(host: Host, *, source: str, fleet_toml: str, templates: Mapping[str, str]) -> Blueprint:
    """A fleet file as it would be applied to this host now."""
    link = host.read_link(LINK)
    return Blueprint(source, fleet_toml, templates, None if link is None else str(link))


def of_revision(host: Host, kept: Revision) -> Blueprint:
    """A revision as it was applied."""
    begun = ledger.read(host).begun
    # One that knew of no version ran from wherever the link led, until a change was begun.
    version = kept.version or (None if begun is None else begun.link)
    return Blueprint(kept.source, kept.fleet_toml, kept.templates, version, kept.rendered(), kept.number)


def current(host: Host) -> Blueprint:
    """What was applied last.

    Raises:
        CommandFailed: nothing was.
    """
    kept = ledger.find_revision(host, ledger.read(host).current)
    if kept is None:
        msg = "cannot find a fleet that was applied here: `chatterbox-deploy apply` does it"
        raise CommandFailed(msg)
    return of_revision(host, kept)


def previous(host: Host) -> Blueprint:
    """What ``rollback`` goes back to: what served before the revision that serves now was first applied.

    While a change is unfinished: what it began from, or, where it was itself on the way back, where it went.

    Raises:
        CommandFailed: there is nothing before.
    """
    remembered = ledger.read(host)
    number: int | None
    if remembered.begun is not None:
        number = remembered.current if remembered.begun.goal is None else remembered.begun.goal
    else:
        serving = ledger.find_revision(host, remembered.current)
        number = None if serving is None else serving.before
    if number is None:
        msg = "cannot go back: no revision was applied before this one (`chatterbox-deploy history`)"
        raise CommandFailed(msg)
    return of_revision(host, ledger.revision(host, number))


def want(asked: Blueprint) -> Wanted:
    """The fleet of a blueprint.

    Raises:
        FleetFileError: its fleet file is wrong.
        TemplateError: a template cannot be filled in.
    """
    fleet = reading.load(asked.fleet_toml, source=asked.source)
    if asked.version is not None:
        fleet = fleet.with_version(asked.version)
    wanted = facts.want(fleet, Templates(asked.templates), source=asked.source)
    return wanted if asked.files is None else replace(wanted, files=asked.files)
