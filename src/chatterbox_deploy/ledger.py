"""What this tool remembers of a host: revisions, what was applied last, drains, a plan begun, and who did what."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from chatterbox_deploy import __version__
from chatterbox_deploy.errors import CommandFailed
from chatterbox_deploy.render import RenderedFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from contextlib import AbstractContextManager

    from chatterbox_deploy.host import Host

DIR = PurePosixPath("/var/lib/chatterbox-deploy")
MANIFEST = DIR / "manifest.json"
APPLYING = DIR / "applying.json"
LOG = DIR / "log.jsonl"
LOCK = DIR / "lock"
REVISIONS = DIR / "revisions"
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

    tool: str = __version__

    def rendered(self) -> tuple[RenderedFile, ...]:
        """Its files."""
        return tuple(RenderedFile(PurePosixPath(path), text) for path, text in sorted(self.files.items()))


@dataclass(frozen=True, slots=True)
class Ledger:
    """What was applied last."""

    current: int | None = None
    """Number of the revision on the host."""

    files: Mapping[str, str] = field(default_factory=dict)
    """Path → SHA-256 of every file that we wrote."""

    keys: Mapping[str, str] = field(default_factory=dict)
    """Path → SHA-256 of the files of API keys that are in use."""

    drained: tuple[str, ...] = ()
    interrupted: str | None = None
    """The command that was begun and did not end."""


def lock(host: Host) -> AbstractContextManager[None]:
    """Nobody else changes this host's fleet meanwhile.

    Raises:
        CommandFailed: somebody else does.
    """
    return host.lock(LOCK)


def read(host: Host) -> Ledger:
    """What is remembered; nothing, on a fresh host.

    Raises:
        CommandFailed: it cannot be read.
    """
    remembered = _load(host, MANIFEST) or {}
    begun = _load(host, APPLYING)
    return Ledger(
        current=remembered.get("current"),
        files=remembered.get("files", {}),
        keys=remembered.get("keys", {}),
        drained=tuple(remembered.get("drained", ())),
        interrupted=None if begun is None else str(begun.get("command", "a command")),
    )


def begin(host: Host, *, who: str, command: str) -> None:
    """From here to ``end`` the host is between two states; should we die, the next plan knows."""
    _store(host, APPLYING, {"who": who, "when": _now(host), "command": command})
    log(host, who=who, command=command, result="begun")


def end(host: Host, ledger: Ledger) -> None:
    """The host is as ``ledger`` says."""
    write(host, ledger)
    host.remove(APPLYING)


def write(host: Host, ledger: Ledger) -> None:
    """Remember, without the mark of a plan begun."""
    remembered = asdict(replace(ledger, interrupted=None))
    del remembered["interrupted"]
    _store(host, MANIFEST, remembered)


def log(host: Host, *, who: str, command: str, result: str) -> None:
    """One line of the audit log."""
    line = {"when": _now(host), "who": who, "command": command, "result": result}
    host.append(LOG, json.dumps(line, ensure_ascii=False) + "\n")


def revisions(host: Host) -> list[Revision]:
    """Every revision that is kept, the oldest first."""
    found = [_load(host, path) for path in host.glob(REVISIONS, "*.json")]
    return sorted((Revision(**content) for content in found if content is not None), key=lambda kept: kept.number)


def revision(host: Host, number: int) -> Revision:
    """One of them.

    Raises:
        CommandFailed: there is none of that number.
    """
    content = _load(host, _path(number))
    if content is None:
        numbers = ", ".join(str(kept.number) for kept in revisions(host)) or "none yet"
        msg = f"cannot find revision {number}; there are: {numbers} (`chatterbox-deploy history`)"
        raise CommandFailed(msg)
    return Revision(**content)


def keep(host: Host, kept: Revision) -> None:
    """Write a revision, and forget the oldest beyond ``KEPT``."""
    _store(host, _path(kept.number), asdict(kept))
    for old in host.glob(REVISIONS, "*.json")[:-KEPT]:
        host.remove(old)


def next_number(host: Host) -> int:
    """The number that no revision had yet."""
    numbers = [int(found[0]) for path in host.glob(REVISIONS, "*.json") if (found := re.match(r"\d+", path.name))]
    return max(numbers, default=0) + 1


def digests(files: Iterable[RenderedFile]) -> dict[str, str]:
    """Path → SHA-256, as ``Ledger.files`` has them."""
    return {str(file.path): hashlib.sha256(file.text.encode()).hexdigest() for file in files}


def _path(number: int) -> PurePosixPath:
    return REVISIONS / f"{number:06}.json"


def _now(host: Host) -> str:
    return host.now().isoformat(timespec="seconds")


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
