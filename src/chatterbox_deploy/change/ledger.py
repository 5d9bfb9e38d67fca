"""What this tool remembers of a host: revisions, what was applied last, drains, a change begun, and who did what."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from chatterbox_deploy import __version__
from chatterbox_deploy.errors import CommandFailed
from chatterbox_deploy.render import RenderedFile

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from contextlib import AbstractContextManager

    from chatterbox_deploy.host import Host

DIR = PurePosixPath("/var/lib/chatterbox-deploy")
MANIFEST = DIR / "manifest.json"
APPLYING = DIR / "applying.json"
LOG = DIR / "log.jsonl"
REVISIONS = DIR / "revisions"
LOCK = PurePosixPath("/run/chatterbox-deploy.lock")
"""Not below ``DIR``, which ``uninstall --purge`` removes while it holds the lock."""

KEPT = 50
"""Revisions; older ones are forgotten. Each is about the size of the rendered files."""


@dataclass(frozen=True, slots=True)
class Revision:
    """One state of a fleet that was applied, whole: enough to bring it back."""

    number: int
    when: str
    """ISO 8601, UTC."""

    who: str
    command: str
    source: str
    """The fleet file's path."""

    fleet_toml: str
    files: Mapping[str, str]
    """Path → rendered text."""

    templates: Mapping[str, str] = field(default_factory=dict)
    """Templates of the operator's own (``--templates``), by name."""

    version: str | None = None
    """Where the link to the server's version pointed."""

    before: int | None = None
    """The revision that served when this one was applied first."""

    tool: str = __version__

    def rendered(self) -> tuple[RenderedFile, ...]:
        """Its files."""
        return tuple(RenderedFile(PurePosixPath(path), text) for path, text in sorted(self.files.items()))


@dataclass(frozen=True, slots=True)
class Begun:
    """A change that was begun and did not end: the host is between two states."""

    command: str
    """Typed again, it goes on."""

    files: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Path → SHA-256 of each text that it may have left there."""

    link: str | None = None
    """Where the link to the server's version pointed before."""

    goal: int | None = None
    """The revision that it goes to, where that one was applied before."""

    drained: Sequence[str] | None = None
    """Who is out of the front in the end, where it is a drain."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """What was applied last."""

    current: int | None = None
    """Number of the revision on the host."""

    files: Mapping[str, str] = field(default_factory=dict)
    """Path → SHA-256 of every file that we wrote."""

    keys: Mapping[str, str] = field(default_factory=dict)
    """Path → SHA-256 of the files of API keys that are in use."""

    drained: Sequence[str] = ()
    begun: Begun | None = None

    @property
    def paths(self) -> frozenset[str]:
        """Of every file that we may have written, wherever the fleet file had it."""
        return frozenset(self.files) | (frozenset() if self.begun is None else frozenset(self.begun.files))

    def wrote(self, path: PurePosixPath, text: str) -> bool | None:
        """Whether a file has a text that we put there; ``None`` where we remember nothing of it."""
        known = {self.files[str(path)]} if str(path) in self.files else set()
        if self.begun is not None:
            known |= set(self.begun.files.get(str(path), ()))
        return digest(text) in known if known else None


def lock(host: Host, command: str) -> AbstractContextManager[None]:
    """Nobody else changes this host's fleet meanwhile; whoever tries is told of ``command``.

    Raises:
        CommandFailed: somebody else does.
    """
    return host.lock(LOCK, command)


def read(host: Host) -> Ledger:
    """What is remembered; nothing, on a fresh host.

    Raises:
        CommandFailed: it cannot be read.
    """
    remembered = _known(Ledger, _load(host, MANIFEST) or {})
    begun = _load(host, APPLYING)
    return Ledger(**{**remembered, "begun": None if begun is None else Begun(**_known(Begun, begun))})


def begin(host: Host, begun: Begun) -> None:
    """From here to ``end`` the host is between two states; should we die, the next plan knows."""
    if (before := read(host).begun) is not None:
        # What that one left behind is not forgotten before all is well again.
        files = {
            path: sorted({*before.files.get(path, ()), *begun.files.get(path, ())})
            for path in {**before.files, **begun.files}
        }
        begun = replace(begun, files=files, link=before.link)
    _store(host, APPLYING, asdict(begun))


def end(host: Host, ledger: Ledger) -> None:
    """The host is as ``ledger`` says."""
    remembered = asdict(ledger)
    del remembered["begun"]
    _store(host, MANIFEST, remembered)
    host.remove(APPLYING)


def log(host: Host, *, who: str, command: str, result: str) -> None:
    """One line of the audit log."""
    line = {"when": _now(host), "who": who, "command": command, "result": result}
    host.append(LOG, json.dumps(line, ensure_ascii=False) + "\n")


def revisions(host: Host) -> list[Revision]:
    """Every revision that is kept, the oldest first; those that cannot be read are left out."""
    found = (_revision(host, path) for path in host.glob(REVISIONS, "*.json"))
    return sorted((kept for kept in found if kept is not None), key=lambda each: each.number)


def unreadable_revisions(host: Host) -> list[PurePosixPath]:
    """Files of revisions that somebody damaged."""
    return [path for path in host.glob(REVISIONS, "*.json") if _revision(host, path) is None]


def _revision(host: Host, path: PurePosixPath) -> Revision | None:
    try:
        content = _load(host, path)
        return None if content is None else Revision(**_known(Revision, content))
    except (CommandFailed, TypeError):
        return None


def find_revision(host: Host, number: int | None) -> Revision | None:
    """One of them, if it is still kept."""
    content = None if number is None else _load(host, _path(number))
    return None if content is None else Revision(**_known(Revision, content))


def revision(host: Host, number: int) -> Revision:
    """One of them.

    Raises:
        CommandFailed: there is none of that number.
    """
    if (found := find_revision(host, number)) is None:
        numbers = ", ".join(str(kept.number) for kept in revisions(host)) or "none yet"
        msg = f"cannot find revision {number}; there are: {numbers} (`chatterbox-deploy history`)"
        raise CommandFailed(msg)
    return found


def keep(host: Host, kept: Revision, *, needed: Collection[int] = ()) -> None:
    """Write a revision, and forget the oldest beyond ``KEPT`` that are not ``needed``."""
    _store(host, _path(kept.number), asdict(kept))
    spared = {_path(number) for number in (*needed, kept.number)}
    for old in host.glob(REVISIONS, "*.json")[:-KEPT]:
        if old not in spared:
            host.remove(old)


def next_number(host: Host) -> int:
    """The number that no revision had yet."""
    numbers = [int(found[0]) for path in host.glob(REVISIONS, "*.json") if (found := re.match(r"\d+", path.name))]
    return max(numbers, default=0) + 1


def digest(text: str) -> str:
    """SHA-256 of a file's text."""
    return hashlib.sha256(text.encode()).hexdigest()


def _path(number: int) -> PurePosixPath:
    return REVISIONS / f"{number:06}.json"


def _now(host: Host) -> str:
    return host.now().isoformat(timespec="seconds")


def _known(kind: type[Begun | Ledger | Revision], content: Mapping[str, Any]) -> dict[str, Any]:
    """What this version of ours understands of what another one may have written."""
    names = {each.name for each in fields(kind)}
    return {name: value for name, value in content.items() if name in names}


def _load(host: Host, path: PurePosixPath) -> dict[str, Any] | None:
    content = host.read_bytes(path)
    if content is None:
        return None
    try:
        loaded = json.loads(content)
    except ValueError as error:
        msg = f"cannot read {path}: {error}; move it away to begin anew"
        raise CommandFailed(msg) from None
    return loaded if isinstance(loaded, dict) else {}


def _store(host: Host, path: PurePosixPath, content: Mapping[str, Any]) -> None:
    host.write_files([RenderedFile(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n", 0o600)])
