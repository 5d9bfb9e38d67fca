"""What a plan is made of: each step says what it will do. Carries out nothing."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import PurePosixPath

    from chatterbox_deploy.change.difference import Change
    from chatterbox_deploy.fleet import Upstream
    from chatterbox_deploy.render import RenderedFile


@dataclass(frozen=True, slots=True)
class PointLink:
    """Turn the link to the version of the server that runs."""

    path: PurePosixPath
    target: PurePosixPath

    def __str__(self) -> str:
        return f"point {self.path} to {self.target}"


@dataclass(frozen=True, slots=True)
class VerifyUnits:
    """Have systemd read the units before any of them is in place."""

    files: tuple[RenderedFile, ...]

    def __str__(self) -> str:
        return f"verify {len(self.files)} units (systemd-analyze verify)"


@dataclass(frozen=True, slots=True)
class WriteFiles:
    """Write units; systemd does not know of them yet."""

    changes: tuple[Change, ...]

    def __str__(self) -> str:
        return f"write {', '.join(str(change.file.path) for change in self.changes)}"


@dataclass(frozen=True, slots=True)
class RemoveFile:
    """Remove a file of ours."""

    path: PurePosixPath
    before: str

    def __str__(self) -> str:
        return f"remove {self.path}"


@dataclass(frozen=True, slots=True)
class Purge:
    """Remove what the fleet itself has written: a directory or a file."""

    path: PurePosixPath

    def __str__(self) -> str:
        return f"purge {self.path}"


@dataclass(frozen=True, slots=True)
class ShowFront:
    """Write the front, have nginx test it (``nginx -t``) and reload; what nginx refuses is put back."""

    change: Change
    upstreams: tuple[Upstream, ...]

    @property
    def changes(self) -> tuple[Change, ...]:
        return (self.change,)

    def __str__(self) -> str:
        def those(state: str) -> str:
            named = [each.name for each in self.upstreams if getattr(each, state)]
            return f"; {', '.join(named)} {state}" if named else ""

        up = [f"{each.name} ({each.port})" for each in self.upstreams if not (each.drained or each.leaving)]
        return f"front: {', '.join(up) or 'nobody'} in service{those('leaving')}{those('drained')}; nginx -t, reload"


@dataclass(frozen=True, slots=True)
class Run:
    """Run a command."""

    argv: tuple[str, ...]
    why: str

    def __str__(self) -> str:
        return f"{shlex.join(self.argv)} ({self.why})"


@dataclass(frozen=True, slots=True)
class StopUnits:
    """Stop units, each when it has finished what it began."""

    units: tuple[str, ...]

    def __str__(self) -> str:
        return f"systemctl stop {' '.join(self.units)}"


@dataclass(frozen=True, slots=True)
class StartUnits:
    """Start units; returns when each is ready or has failed."""

    units: tuple[str, ...]
    timeout_s: int

    def __str__(self) -> str:
        return f"systemctl start {' '.join(self.units)}"


@dataclass(frozen=True, slots=True)
class WaitIdle:
    """Wait until an instance has answered everything it was asked."""

    name: str
    host: str
    port: int
    timeout_s: int
    """Then go on: a stop finishes what was begun, too."""

    tells: bool
    """Whether it says how busy it is; of another server the open connections are counted."""

    def __str__(self) -> str:
        return f"wait until {self.name} is idle"


@dataclass(frozen=True, slots=True)
class WaitReady:
    """Wait until the process that systemd started last answers on the port."""

    name: str
    unit: str
    host: str
    port: int
    timeout_s: int
    tells: bool
    """Whether it names itself (``/readyz``, INVOCATION_ID); of another server an open port is enough."""

    def __str__(self) -> str:
        return f"wait until {self.name} is ready on port {self.port}"


@dataclass(frozen=True, slots=True)
class Speak:
    """Have an instance say a few words, and listen."""

    name: str
    host: str
    port: int
    timeout_s: int
    api_keys_file: str | None

    def __str__(self) -> str:
        return f"hear {self.name} speak"


Step = (
    PointLink
    | VerifyUnits
    | WriteFiles
    | RemoveFile
    | Purge
    | ShowFront
    | Run
    | StopUnits
    | StartUnits
    | WaitIdle
    | WaitReady
    | Speak
)
