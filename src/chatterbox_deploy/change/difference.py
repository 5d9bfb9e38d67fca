"""What separates the files on a host from the files a fleet wants. Decides; touches nothing."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatterbox_deploy import render

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import PurePosixPath

    from chatterbox_deploy.render import RenderedFile


@dataclass(frozen=True, slots=True)
class Change:
    """A file to write."""

    file: RenderedFile
    before: str | None
    """Text on disk; ``None`` where there is no file yet."""

    def diff(self) -> str:
        """Unified diff as ``diff -u`` prints it."""
        name = str(self.file.path)
        return "".join(
            difflib.unified_diff(
                [] if self.before is None else self.before.splitlines(keepends=True),
                self.file.text.splitlines(keepends=True),
                "/dev/null" if self.before is None else f"a{name}",
                f"b{name}",
            )
        )


@dataclass(frozen=True, slots=True)
class Changes:
    """The outcome of comparing a host with a fleet; every path is in at most one of the four."""

    to_write: tuple[Change, ...]
    unchanged: tuple[PurePosixPath, ...]
    stale: tuple[PurePosixPath, ...]
    """Ours, and no longer wanted: usually a GPU left the fleet file."""

    foreign: tuple[PurePosixPath, ...]
    """Where we would write, but not ours: never overwritten."""

    def __bool__(self) -> bool:
        """Whether the host differs from the fleet."""
        return bool(self.to_write or self.stale or self.foreign)


def compare(wanted: Sequence[RenderedFile], on_disk: Mapping[PurePosixPath, str]) -> Changes:
    """Sort out ``wanted`` against the text of the files that are there.

    ``on_disk`` may hold files of other people; only one that carries our header counts as ours.
    """
    foreign = {file.path for file in wanted if file.path in on_disk and not render.is_ours(on_disk[file.path])}
    differing = [
        Change(file, on_disk.get(file.path))
        for file in wanted
        if file.path not in foreign and on_disk.get(file.path) != file.text
    ]
    written = {change.file.path for change in differing}
    wanted_paths = {file.path for file in wanted}
    return Changes(
        to_write=tuple(differing),
        unchanged=tuple(path for path in sorted(wanted_paths) if path not in foreign | written),
        stale=tuple(
            path for path, text in sorted(on_disk.items()) if path not in wanted_paths and render.is_ours(text)
        ),
        foreign=tuple(sorted(foreign)),
    )
