"""The one door to the outside world: files. Decides nothing."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

from chatterbox_deploy.errors import CommandFailed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatterbox_deploy.render import RenderedFile


class Host(Protocol):
    """A machine that holds a fleet, seen through absolute paths."""

    def read_bytes(self, path: PurePosixPath) -> bytes | None:
        """Contents of a regular file, or ``None`` if there is none.

        Raises:
            CommandFailed: it is there and cannot be read.
        """
        ...

    def glob(self, directory: PurePosixPath, pattern: str) -> list[PurePosixPath]:
        """Files of ``directory`` whose names match; empty if there is no such directory."""
        ...

    def write_files(self, files: Sequence[RenderedFile]) -> None:
        """Write every file or, if one cannot be written, change none that is there.

        Raises:
            CommandFailed: naming the file and the reason.
        """
        ...


class LocalHost:
    """This machine, or a directory tree that stands for one (``--output DIR``)."""

    def __init__(self, root: Path = Path("/")) -> None:
        """Absolute paths are taken below ``root``."""
        self._root = root

    def at(self, path: PurePosixPath) -> Path:
        """Where an absolute path of the host lies on this machine."""
        return self._root / path.relative_to("/")

    def read_bytes(self, path: PurePosixPath) -> bytes | None:
        """See ``Host``."""
        try:
            # Not a FIFO, which would make us wait for a writer, nor the /dev/null of a masked unit.
            if not stat.S_ISREG(self.at(path).stat().st_mode):
                msg = f"cannot read {self.at(path)}: not a regular file"
                raise CommandFailed(msg)
            return self.at(path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _failed("read", self.at(path), error) from None

    def glob(self, directory: PurePosixPath, pattern: str) -> list[PurePosixPath]:
        """See ``Host``."""
        return sorted(directory / found.name for found in self.at(directory).glob(pattern) if found.is_file())

    def write_files(self, files: Sequence[RenderedFile]) -> None:
        """See ``Host``; each file appears whole under its name (rename(2)), never half-written."""
        staged: list[tuple[Path, Path]] = []
        try:
            # All bytes are on the disk before the first name changes: a full disk costs nothing.
            for file in files:
                target = self.at(file.path)
                try:
                    staged.append((_stage(file, target), target))
                except OSError as error:
                    raise _failed("write", target, error) from None
            while staged:
                temporary, target = staged[0]
                try:
                    temporary.replace(target)
                except OSError as error:
                    raise _failed("write", target, error) from None
                staged.pop(0)
        finally:
            for temporary, _ in staged:
                with suppress(OSError):
                    temporary.unlink()


def _stage(file: RenderedFile, target: Path) -> Path:
    """The file's bytes, synced, under a temporary name beside ``target``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # A directory in the way would be found only by the rename, after others were already written.
    if target.is_dir():
        raise IsADirectoryError(None, "is a directory")
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as stream:
            stream.write(file.text)
            stream.flush()
            os.fchmod(stream.fileno(), file.mode)
            os.fsync(stream.fileno())
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise
    return Path(name)


def _failed(verb: str, path: Path, error: OSError) -> CommandFailed:
    reason = (error.strerror or str(error)).lower()
    hint = "; run it as root (sudo)" if isinstance(error, PermissionError) and os.geteuid() != 0 else ""
    return CommandFailed(f"cannot {verb} {path}: {reason}{hint}")
