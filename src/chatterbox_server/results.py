"""Sound kept as files for a while, for whoever knows the name: any instance of the host serves it. Answers no request.

The same directory holds recordings that came with a request, for as long as it is spoken and a while longer.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from chatterbox_server import audio, recordings

KEPT_S: Final = 3600
MOST_BYTES: Final = 2_000_000_000
"""Kept at most, of all instances together; beyond it the oldest go first."""

_GRACE_S: Final = 60
"""Between no longer being found and being removed, for whoever has just found it."""

# 128 bits: nobody finds by guessing what was said to somebody else.
_NAME: Final = re.compile(rf"[0-9a-f]{{32}}\.(?:{'|'.join(audio.FORMATS)})")
_VOICE: Final = re.compile(r"voice-[0-9a-f]{64}\.wav")
_UNFINISHED: Final = re.compile(r"\.[A-Za-z0-9_]+\.part")


class NoSuchResult(Exception):
    """It is not kept, or no longer."""


class KeepsNothing(Exception):
    """This server has no directory for results."""


class CannotKeep(Exception):
    """The directory of results cannot be written to; says why."""


class Unfinished:
    """A file that nobody sees before it is whole; unless it is given a name, it vanishes when the context is left."""

    def __init__(self, directory: Path, audio_format: audio.Format, sample_rate_hz: int) -> None:
        with _writes():
            directory.mkdir(mode=0o750, parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=directory, prefix=".", suffix=".part")
        # Held until it is closed: what no living process holds, the sweep may remove.
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        self._path = Path(name)
        self._file = os.fdopen(descriptor, "wb")
        self._recorder: audio.Recorder | None = None
        self._how = audio_format, sample_rate_hz

    def write(self, samples: NDArray[np.float32]) -> None:
        """Raises ``CannotKeep``, and ``NotSound`` as the encoder does."""
        with _writes():
            if self._recorder is None:
                self._recorder = audio.Recorder(*self._how, self._file)
            self._recorder.write(samples)

    def finish(self, path: Path) -> None:
        """Call it ``path`` from now on, unless that is there already. Raises ``CannotKeep``."""
        if self._recorder is None:
            msg = "the engine returned no sound"
            raise audio.NotSound(msg)
        with _writes():
            self._recorder.finish()
            self._file.flush()
            os.fchmod(self._file.fileno(), 0o640)
            # Unlike a rename, a link never overwrites: somebody may hold what is there.
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(self._path)
            # One file is not to be counted under two names.
            self._path.unlink()

    def __enter__(self) -> "Unfinished":
        return self

    def __exit__(self, *_: object) -> None:
        if self._recorder is not None:
            self._recorder.drop()
        # What is still buffered may not fit on the disk.
        with contextlib.suppress(OSError):
            self._file.close()
        self._path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Results:
    """Several instances write and sweep at once: a file is linked into place whole, and may be gone at any time."""

    directory: Path | None
    kept_s: float = KEPT_S
    most_bytes: int = MOST_BYTES

    def begin(self, audio_format: audio.Format, sample_rate_hz: int) -> Unfinished:
        """A result to be written to, and then to be given to ``keep``.

        Raises:
            KeepsNothing, CannotKeep: before anything is spoken in vain.
        """
        return Unfinished(self._kept_in(), audio_format, sample_rate_hz)

    def keep(self, result: Unfinished, audio_format: audio.Format) -> str:
        """Its name from now on, random; makes room. Raises as ``Unfinished.finish``."""
        name = f"{secrets.token_hex(16)}.{audio_format}"
        result.finish(self._kept_in() / name)
        self.sweep()
        return name

    def find(self, name: str) -> Path:
        """The result called ``name``, which can name no other path.

        Raises:
            NoSuchResult: says how long results are kept.
        """
        if self.directory is not None and _NAME.fullmatch(name):
            path = self.directory / name
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime < self.kept_s:
                    return path
        msg = f"no such result: what was spoken is kept for {self.kept_s / 60:g} minutes"
        raise NoSuchResult(msg)

    @contextlib.contextmanager
    def voice(self, source: BinaryIO) -> Iterator[Path]:
        """The recording in ``source`` as a voice, there for as long as the context lasts.

        Its name is that of its content: who sends it again within ``kept_s`` need not wait for it to be decoded, and
        the engine may remember it.

        Raises:
            KeepsNothing, CannotKeep: as ``begin``.
            NotARecording: it cannot be a voice.
        """
        digest = hashlib.sha256()
        while block := source.read(1 << 20):
            digest.update(block)
        path = self._kept_in() / f"voice-{digest.hexdigest()}.wav"
        with contextlib.ExitStack() as stack:
            while (held := _held(path)) is None:
                source.seek(0)
                self._write_voice(source, path)
            stack.callback(os.close, held)
            yield path

    def _write_voice(self, source: BinaryIO, path: Path) -> None:
        samples = recordings.normalise(source, shortest_s=recordings.SHORTEST_S, longest_s=recordings.LONGEST_S)
        with self.begin("wav", recordings.SAMPLE_RATE_HZ) as unfinished:
            unfinished.write(samples)
            unfinished.finish(path)
        self.sweep()

    def sweep(self) -> None:
        """Remove what has been kept long enough, and of what is too much the oldest, but never the newest.

        What somebody holds stays, and so does every file that is not ours.
        """
        rows = sorted(_rows(self._kept_in()))
        now_s, kept_bytes = time.time(), sum(size_bytes for _, size_bytes, _ in rows)
        for written_s, size_bytes, path in rows:
            expired = now_s - written_s > self.kept_s + _GRACE_S
            # What is being written may not be held yet, but then it is not old.
            may_go = path is not rows[-1][2] and not _UNFINISHED.fullmatch(path.name)
            too_much = may_go and kept_bytes > self.most_bytes
            if (expired or too_much) and _removed(path):
                kept_bytes -= size_bytes

    def _kept_in(self) -> Path:
        if self.directory is None:
            raise KeepsNothing("this server keeps no files: its operator has named no directory for results")
        return self.directory


def _rows(directory: Path) -> Iterator[tuple[float, int, Path]]:
    """When each of our files was last written to, its size in bytes, and its path."""
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            if any(ours.fullmatch(entry.name) for ours in (_NAME, _VOICE, _UNFINISHED)):
                # Another instance may have swept it.
                with contextlib.suppress(OSError):
                    stat = entry.stat(follow_symlinks=False)
                    yield stat.st_mtime, stat.st_size, Path(entry.path)


def _held(path: Path) -> int | None:
    """A descriptor that keeps every sweep of this host from removing ``path``; ``None``: it is not there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    with contextlib.suppress(FileNotFoundError):
        # It may have been swept before it was held.
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    os.close(descriptor)
    return None


def _removed(path: Path) -> bool:
    """Whether ``path`` is gone; not if somebody holds it."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        return True
    return not path.exists()


@contextlib.contextmanager
def _writes() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        msg = f"cannot write to the directory of results: {error.strerror}"
        raise CannotKeep(msg) from error
