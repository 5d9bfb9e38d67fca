"""The directory that keeps what was spoken until the whole is written: a file for each take, whole or not there."""

from __future__ import annotations

import fcntl
import os
import re
import wave
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from chatterbox_deploy.errors import CommandFailed
from chatterbox_deploy.speak import wav

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from chatterbox_deploy.speak.wav import Sound

_OURS: Final = re.compile(r"\.?[0-9a-f]{32}\.(?:wav|tmp)|lock")


class Parts:
    """Holds the directory for as long as a ``with`` lasts; only files that are its own are ever removed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def held(self, holder: str) -> Iterator[None]:
        """The kernel lets go of it when we die.

        Raises:
            CommandFailed: somebody else holds it, or it cannot be made.
        """
        descriptor = self._lock()
        try:
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"`{holder}` (process {os.getpid()})".encode(), 0)
            for left in self.folder.glob(".*.tmp"):
                self._remove(left)
            yield
        finally:
            # Nothing was spoken: leave nothing.
            if self.folder.is_dir() and not self.count():
                self.clear()
            os.close(descriptor)

    def _lock(self) -> int:
        place = self.folder / "lock"
        while True:
            try:
                self.folder.mkdir(exist_ok=True)
                descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except OSError as error:
                msg = f"cannot keep parts in {self.folder}: {(error.strerror or str(error)).lower()}"
                raise CommandFailed(msg) from None
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever held it took the file away at the end: then this is not the lock that others see.
                if place.exists() and place.stat().st_ino == os.fstat(descriptor).st_ino:
                    return descriptor
            except BlockingIOError:
                who = os.pread(descriptor, 4096, 0).decode(errors="replace") or "another process"
                os.close(descriptor)
                msg = f"cannot begin: {who} is using {self.folder}; wait until it has ended"
                raise CommandFailed(msg) from None
            os.close(descriptor)

    def samples(self, names: Iterable[str]) -> dict[str, tuple[int, int]]:
        """Sample rate and length of each take that is there; from its header, for the file is whole."""
        found: dict[str, tuple[int, int]] = {}
        for name in names:
            with suppress(FileNotFoundError, wave.Error, EOFError), wave.open(str(self._path(name))) as reader:
                found[name] = (reader.getframerate(), reader.getnframes())
        return found

    def keep(self, name: str, sound: Sound) -> None:
        """On the disk under its name (rename(2)) when this returns; never half of it.

        Raises:
            CommandFailed: it cannot be written.
        """
        temporary = self.folder / f".{name}.tmp"
        try:
            with temporary.open("wb") as stream:
                stream.write(wav.encode(sound))
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(self._path(name))
        except OSError as error:
            msg = f"cannot write {self._path(name)}: {(error.strerror or str(error)).lower()}"
            raise CommandFailed(msg) from None

    def read(self, name: str) -> Sound:
        """The sound of a take that is there.

        Raises:
            CommandFailed: it cannot be read.
        """
        try:
            return wav.decode(self._path(name).read_bytes())
        except (OSError, wav.NotWav) as error:
            msg = f"cannot read {self._path(name)}: {error}; remove it and type the same again"
            raise CommandFailed(msg) from None

    def count(self) -> int:
        """Takes that are there, of this text or of an older one."""
        return sum(1 for _ in self.folder.glob("*.wav"))

    def clear(self) -> None:
        """Take away what is ours, and the directory if nothing else is in it."""
        for path in list(self.folder.iterdir()):
            if _OURS.fullmatch(path.name):
                self._remove(path)
        with suppress(OSError):
            self.folder.rmdir()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.wav"

    def _remove(self, path: Path) -> None:
        with suppress(FileNotFoundError):
            path.unlink()
