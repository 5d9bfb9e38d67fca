"""The one door to the outside world: files, commands, HTTP, the clock. Decides nothing."""

from __future__ import annotations

import fcntl
import http.client
import os
import shlex
import shutil
import ssl
import stat
import subprocess
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, Protocol, TextIO
from urllib.parse import urlsplit

from chatterbox_deploy.errors import CommandFailed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from chatterbox_deploy.render import RenderedFile


_LONGEST_CHAIN = 40
"""Links that one path may lead over, as in the kernel (path_resolution(7))."""


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command ended."""

    status: int
    stdout: str = ""
    stderr: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole HTTP response; names of headers in lower case."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Piece:
    """What a file got since it was read last."""

    inode: int
    """Tells a file from the one that had its name before."""

    start: int
    content: bytes


class Host(Protocol):
    """A machine that holds a fleet, seen through absolute paths."""

    def read_bytes(self, path: PurePosixPath) -> bytes | None:
        """Contents of a regular file, or ``None`` if there is none.

        Raises:
            CommandFailed: it is there and cannot be read.
        """
        ...

    def read_on(self, path: PurePosixPath, ends: Mapping[int, int], *, limit_bytes: int) -> Piece | None:
        """What was appended to a file since it was read to its end in ``ends``, by inode; ``None`` if there is no file.

        All of it, where it is not among them or became shorter; never more than the last ``limit_bytes``.

        Raises:
            CommandFailed: it is there and cannot be read.
        """
        ...

    def glob(self, directory: PurePosixPath, pattern: str) -> list[PurePosixPath]:
        """Files below ``directory`` that match; empty if there is no such directory."""
        ...

    def write_files(self, files: Sequence[RenderedFile]) -> None:
        """Write every file or, if one cannot be written, change none that is there.

        Raises:
            CommandFailed: naming the file and the reason.
        """
        ...

    def append(self, path: PurePosixPath, text: str) -> None:
        """Add to the end of a file that only its owner reads.

        Raises:
            CommandFailed: it cannot be written.
        """
        ...

    def remove(self, path: PurePosixPath) -> None:
        """Take away a file, a link, or a directory with all that is in it; nothing happens if it is not there.

        Raises:
            CommandFailed: it cannot be removed.
        """
        ...

    def read_link(self, path: PurePosixPath) -> PurePosixPath | None:
        """Where a symbolic link points, absolute; ``None`` if there is no link."""
        ...

    def link(self, path: PurePosixPath, target: PurePosixPath) -> None:
        """Make, or turn, a symbolic link; nobody ever sees none there.

        Raises:
            CommandFailed: it cannot be made.
        """
        ...

    def run(self, argv: Sequence[str], *, timeout_s: float, check: bool = True) -> Ran:
        """Run a command to its end, on this machine whatever the root is.

        Raises:
            CommandFailed: it is not there, did not end in time, or (``check``) its exit status is not 0.
        """
        ...

    def request(
        self, method: str, url: str, *, headers: Mapping[str, str] | None = None, body: bytes = b"", timeout_s: float
    ) -> Answer | None:
        """One HTTP request; ``None`` if nobody answered in time."""
        ...

    def lock(self, path: PurePosixPath, holder: str) -> AbstractContextManager[None]:
        """Hold the lock at ``path`` as ``holder``; the kernel lets go of it when we die.

        Raises:
            CommandFailed: somebody else holds it.
        """
        ...

    def now(self) -> datetime:
        """The time, in UTC."""
        ...

    def monotonic_s(self) -> float:
        """Seconds since some moment."""
        ...

    def sleep(self, seconds: float) -> None:
        """Wait."""
        ...


class LocalHost:
    """This machine, or a directory tree that stands for one (``--output DIR``)."""

    def __init__(self, root: Path = Path("/")) -> None:
        """Absolute paths are taken below ``root``."""
        self._root = root

    def at(self, path: PurePosixPath, *, followed: bool = False) -> Path:
        """Where an absolute path of the host lies on this machine; links on the way are the host's, as in a chroot.

        The last name is meant itself, be it a link, unless it is to be ``followed``.
        """
        if self._root == Path("/"):
            return Path(path)
        place = self._root
        left = list(reversed(path.relative_to("/").parts))
        links = 0
        while left:
            part = left.pop()
            if part == "..":
                place = place.parent if place != self._root else place
            elif (left or followed) and (place / part).is_symlink() and (links := links + 1) <= _LONGEST_CHAIN:
                target = PurePosixPath((place / part).readlink())
                place = self._root if target.is_absolute() else place
                left += reversed(target.relative_to("/").parts if target.is_absolute() else target.parts)
            else:
                place /= part
        return place

    def read_bytes(self, path: PurePosixPath) -> bytes | None:
        """See ``Host``."""
        with self._reading(path) as stream:
            return None if stream is None else stream.read()

    def read_on(self, path: PurePosixPath, ends: Mapping[int, int], *, limit_bytes: int) -> Piece | None:
        """See ``Host``."""
        with self._reading(path) as stream:
            if stream is None:
                return None
            about = os.fstat(stream.fileno())
            start = ends.get(about.st_ino, 0)
            start = max(start if start <= about.st_size else 0, about.st_size - limit_bytes)
            stream.seek(start)
            return Piece(about.st_ino, start, stream.read(about.st_size - start))

    @contextmanager
    def _reading(self, path: PurePosixPath) -> Iterator[BinaryIO | None]:
        """A regular file, opened; ``None`` if there is none."""
        place = self.at(path, followed=True)
        try:
            # Not a FIFO, which would make us wait for a writer, nor the /dev/null of a masked unit.
            if not stat.S_ISREG(place.stat().st_mode):
                msg = f"cannot read {place}: not a regular file"
                raise CommandFailed(msg)
            opened = place.open("rb")
        except (FileNotFoundError, NotADirectoryError):
            yield None
            return
        except OSError as error:
            raise _failed("read", place, error) from None
        with opened as stream:
            try:
                yield stream
            except OSError as error:
                raise _failed("read", place, error) from None

    def glob(self, directory: PurePosixPath, pattern: str) -> list[PurePosixPath]:
        """See ``Host``."""
        place = self.at(directory, followed=True)
        return sorted(directory / found.relative_to(place) for found in place.glob(pattern) if found.is_file())

    def write_files(self, files: Sequence[RenderedFile]) -> None:
        """See ``Host``; each file appears whole under its name (rename(2)), never half-written."""
        staged: list[tuple[Path, Path]] = []
        try:
            # All bytes are on the disk before the first name changes: a full disk costs nothing.
            for file in files:
                target = self.at(file.path)
                try:
                    # Around what only its owner may read, a directory that only he may open.
                    target.parent.mkdir(mode=0o777 if file.mode & 0o077 else 0o700, parents=True, exist_ok=True)
                    staged.append((_stage(file.text.encode(), target, mode=file.mode), target))
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

    def append(self, path: PurePosixPath, text: str) -> None:
        """See ``Host``."""
        try:
            self.at(path).parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(
                os.open(self.at(path), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a", encoding="utf-8"
            ) as stream:
                stream.write(text)
        except OSError as error:
            raise _failed("write", self.at(path), error) from None

    def remove(self, path: PurePosixPath) -> None:
        """See ``Host``."""
        place = self.at(path)
        try:
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            else:
                place.unlink(missing_ok=True)
        except OSError as error:
            raise _failed("remove", place, error) from None

    def read_link(self, path: PurePosixPath) -> PurePosixPath | None:
        """See ``Host``."""
        try:
            return path.parent / self.at(path).readlink()
        except OSError:
            return None

    def link(self, path: PurePosixPath, target: PurePosixPath) -> None:
        """See ``Host``; relative where it can be, so that the tree may be moved."""
        place = self.at(path)
        short = target.relative_to(path.parent) if target.is_relative_to(path.parent) else target
        fresh = place.with_name(f".{place.name}.{os.getpid()}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(short)
            fresh.replace(place)
        except OSError as error:
            with suppress(OSError):
                fresh.unlink()
            raise _failed("link", place, error) from None

    def run(self, argv: Sequence[str], *, timeout_s: float, check: bool = True) -> Ran:
        """See ``Host``."""
        try:
            done = subprocess.run(
                argv,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
                check=False,
                stdin=subprocess.DEVNULL,
                # The terminal's Ctrl-C reaches us, not half of what we began.
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            msg = f"cannot run `{shlex.join(argv)}`: it did not end within {timeout_s:g} s"
            raise CommandFailed(msg) from None
        except OSError as error:
            msg = f"cannot run `{shlex.join(argv)}`: {(error.strerror or str(error)).lower()}"
            raise CommandFailed(msg) from None
        if check and done.returncode != 0:
            said = done.stderr.strip() or done.stdout.strip() or "no output"
            msg = f"cannot run `{shlex.join(argv)}`: exit status {done.returncode}: {said}"
            raise CommandFailed(msg)
        return Ran(done.returncode, done.stdout, done.stderr)

    def request(
        self, method: str, url: str, *, headers: Mapping[str, str] | None = None, body: bytes = b"", timeout_s: float
    ) -> Answer | None:
        """See ``Host``."""
        place = urlsplit(url)
        if place.scheme == "https":
            # We ask this machine by its address; whose name the certificate bears is for clients to judge.
            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                place.hostname or "", place.port or 443, timeout=timeout_s, context=context
            )
        else:
            connection = http.client.HTTPConnection(place.hostname or "", place.port or 80, timeout=timeout_s)
        try:
            connection.request(method, place.path or "/", body=body or None, headers=dict(headers or {}))
            response = connection.getresponse()
            named = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, named, response.read())
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    @contextmanager
    def lock(self, path: PurePosixPath, holder: str) -> Iterator[None]:
        """See ``Host``."""
        place = self.at(path)
        with _locked(place) as stream:
            stream.truncate(0)
            stream.write(f"`{holder}` (process {os.getpid()})")
            stream.flush()
            try:
                yield
            finally:
                with suppress(OSError):
                    place.unlink()

    def now(self) -> datetime:
        """See ``Host``."""
        return datetime.now(UTC)

    def monotonic_s(self) -> float:
        """See ``Host``."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """See ``Host``."""
        time.sleep(seconds)


@contextmanager
def _locked(place: Path) -> Iterator[TextIO]:
    while True:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise _failed("lock", place, error) from None
        with os.fdopen(descriptor, "r+") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                who = stream.read().strip() or "another process"
                msg = f"cannot begin: {who} is changing this fleet now; wait until it has ended"
                raise CommandFailed(msg) from None
            # Whoever held it took the file away at the end: then this is not the lock that others see.
            if place.exists() and place.stat().st_ino == os.fstat(descriptor).st_ino:
                yield stream
                return


def save(path: Path, content: str | bytes) -> None:
    """What somebody wants in a file, whole or not at all; a device or a pipe (/dev/stdout) is written as it is.

    Raises:
        CommandFailed: it cannot be written.
    """
    content = content.encode() if isinstance(content, str) else content
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_bytes(content)
            return
        target = path.resolve()
        temporary = _stage(content, target, mode=0o666 & ~_umask())
        try:
            temporary.replace(target)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _failed("write", path, error) from None


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _stage(content: bytes, target: Path, *, mode: int) -> Path:
    """The bytes, synced, under a temporary name beside ``target``."""
    # A directory in the way would be found only by the rename, after others were already written.
    if target.is_dir():
        raise IsADirectoryError(None, "is a directory")
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fchmod(stream.fileno(), mode)
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
