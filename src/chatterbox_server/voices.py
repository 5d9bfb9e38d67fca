"""The voices that a request may name: a directory of recordings and the built-in one. Decodes nothing itself."""

import contextlib
import difflib
import os
import re
import shlex
import tempfile
import wave
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final, Literal

from chatterbox_server import audio, recordings

DEFAULT: Final = "default"
OPENAI: Final = frozenset(
    ("alloy", "ash", "ballad", "cedar", "coral", "echo", "fable", "marin", "nova", "onyx", "sage", "shimmer", "verse")
)
"""Names that clients of OpenAI send unasked; each is the built-in voice until a recording or an alias has its name."""

EXTENSIONS: Final = (".wav", ".flac", ".ogg", ".mp3")
"""In order of preference, where one name has several files."""

MOST: Final = 1000
"""Recordings kept: each question reads the directory again."""

_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")

# Never the name of a voice, so what is half written cannot be spoken.
_UNFINISHED: Final = ".part"


class UnknownVoice(Exception):
    """Nobody here has that name."""

    def __init__(self, name: str, known: tuple[str, ...], *, meant: str | None = None) -> None:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean '{close[0]}'?)" if close and meant is None else ""
        stands = "" if meant is None else f", which stands for {meant!r} here,"
        which = f"voice {name[:64]!r}{stands} is not there" if meant else f"unknown voice {name[:64]!r}{hint}"
        super().__init__(f"{which}; known: {', '.join(known)}")


class BadName(Exception):
    """No recording can be called so, or none is meant."""


class NameTaken(Exception):
    """Somebody else has that name, or has taken it meanwhile."""


class LibraryFull(Exception):
    """There are as many recordings as there may be."""


class LibraryReadOnly(Exception):
    """The directory cannot be written to; says why."""


@dataclass(frozen=True, slots=True)
class Voice:
    name: str
    kind: Literal["built-in", "alias", "recording"]
    recording: Path | None
    meant: str = DEFAULT
    """The voice that an alias stands for."""
    there: bool = True
    """False for an alias of a voice that does not exist."""

    @property
    def created(self) -> int | None:
        """Unix time of the recording."""
        with contextlib.suppress(OSError):
            return None if self.recording is None else int(self.recording.stat().st_mtime)
        return None

    @property
    def duration_s(self) -> float | None:
        """Read from the header, so only of a WAV as this library writes it."""
        if self.recording is None or self.recording.suffix != ".wav":
            return None
        try:
            with wave.open(str(self.recording)) as sound:
                length_s: float = sound.getnframes() / sound.getframerate()
        except (OSError, EOFError, ArithmeticError, wave.Error):
            return None
        return round(length_s, 3)


_BUILT_IN: Final = Voice(DEFAULT, "built-in", None)


@dataclass(frozen=True, slots=True)
class Library:
    """The directory is read again for each question, so a file put there speaks without a restart.

    Several instances may write to it at once: every change is one link or one rename.
    """

    directory: Path | None
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names for voices; a recording of the same name goes first."""

    def voices(self) -> dict[str, Voice]:
        """Every voice by its name: the built-in one, recordings, then aliases, OpenAI's names among them."""
        own = {DEFAULT: _BUILT_IN}
        found = {path.stem: Voice(path.stem, "recording", path) for path in self._recordings()}
        own |= dict(sorted(found.items()))
        meanings = sorted(self._meanings().items())
        aliases = {name: self._alias(name, meant, own) for name, meant in meanings if name not in own}
        return own | aliases

    def find(self, name: str) -> Voice:
        """The voice called ``name``, which is only ever compared, so it cannot name a path.

        Raises:
            UnknownVoice: with the names there are.
        """
        # Without a look at all the others, of which there may be a thousand.
        if (own := self._own(name)) is not None:
            return own
        meant = self._meanings().get(name)
        if meant is not None and (own := self._own(meant)) is not None:
            return Voice(name, "alias", own.recording, meant)
        known = tuple(voice.name for voice in self.voices().values() if voice.kind != "alias")
        raise UnknownVoice(name, known, meant=meant)

    def add(self, name: str, source: BinaryIO, *, replace: bool = False) -> Voice:
        """Keep what ``source`` holds as voice ``name``: 16 bit, 24 kHz, mono, trimmed and levelled.

        Raises:
            BadName, NameTaken, LibraryFull, LibraryReadOnly: before anything is decoded, where that can be known.
            NotARecording: it cannot be a voice.
        """
        directory = self._writable()
        self._allow(name)
        own = [voice.name for voice in self.voices().values() if voice.kind == "recording"]
        if name in own and not replace:
            raise _taken(name)
        if name not in own and len(own) >= MOST:
            msg = f"{len(own)} recordings are kept, and no more may: remove one"
            raise LibraryFull(msg)
        samples = recordings.normalise(source, shortest_s=recordings.SHORTEST_S, longest_s=recordings.LONGEST_S)
        sound = audio.encode(samples, recordings.SAMPLE_RATE_HZ, "wav")
        with _changes(name, directory), _written(directory, sound) as unfinished:
            path = directory / f"{name}.wav"
            if replace:
                unfinished.replace(path)
            else:
                # Unlike a rename, a link never overwrites.
                path.hardlink_to(unfinished)
        return Voice(name, "recording", path)

    def rename(self, old: str, new: str) -> Voice:
        """Call the recording ``old`` ``new`` from now on.

        Raises:
            UnknownVoice, BadName, NameTaken, LibraryReadOnly: and nothing has changed.
        """
        directory = self._writable()
        paths = self._files(old)
        self._allow(new)
        if any(path.stem == new for path in self._recordings()):
            raise _taken(new)
        with _changes(new, directory):
            for path in paths:
                (directory / f"{new}{path.suffix}").hardlink_to(path)
            for path in paths:
                path.unlink(missing_ok=True)
            _sync(directory)
        return self.find(new)

    def remove(self, name: str) -> None:
        """Forget the recording ``name``, every file of it.

        Raises:
            UnknownVoice, BadName, LibraryReadOnly: nothing has changed.
        """
        directory = self._writable()
        paths = self._files(name)
        with _changes(name, directory):
            for path in paths:
                path.unlink(missing_ok=True)
            _sync(directory)

    def _recordings(self) -> Iterator[Path]:
        """Files that name a voice, the preferred extension of each name last."""
        if self.directory is None:
            return
        try:
            home = self.directory.resolve()
            paths = sorted(self.directory.iterdir())
        except OSError:
            # Not made yet, or not for us to read: the built-in voice speaks all the same.
            return
        for extension in reversed(EXTENSIONS):
            for path in paths:
                fits = path.suffix == extension and path.stem != DEFAULT and _NAME.fullmatch(path.stem)
                if fits and _stays(path, home):
                    yield path

    def _own(self, name: str) -> Voice | None:
        """The built-in voice or the recording of that name."""
        if name == DEFAULT:
            return _BUILT_IN
        if self.directory is None or not _NAME.fullmatch(name):
            return None
        try:
            home = self.directory.resolve()
            paths = [self.directory / f"{name}{extension}" for extension in EXTENSIONS]
            return next((Voice(name, "recording", path) for path in paths if _stays(path, home)), None)
        except OSError:
            # As in _recordings.
            return None

    def _meanings(self) -> dict[str, str]:
        return dict.fromkeys(OPENAI, DEFAULT) | dict(self.aliases)

    def _files(self, name: str) -> list[Path]:
        voice = self.find(name)
        if voice.kind != "recording":
            msg = f"{name!r} is no recording: it can be neither renamed nor removed"
            raise BadName(msg)
        return [path for path in self._recordings() if path.stem == name]

    def _alias(self, name: str, meant: str, own: Mapping[str, Voice]) -> Voice:
        found = own.get(meant)
        return Voice(name, "alias", found.recording if found else None, meant, there=found is not None)

    def _writable(self) -> Path:
        if self.directory is None:
            raise LibraryReadOnly("cannot keep voices: this server has no directory for them")
        return self.directory

    def _allow(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            msg = f"a voice is called 1 to 64 letters, digits, '_' and '-', not {name[:64]!r}"
            raise BadName(msg)
        if name == DEFAULT:
            msg = f"{DEFAULT!r} is the built-in voice: choose another name"
            raise BadName(msg)
        if name in self.aliases:
            msg = f"{name!r} stands for {self.aliases[name]!r} here: choose another name"
            raise NameTaken(msg)


def _stays(path: Path, home: Path) -> bool:
    """A file; a link may not lead out: what it would show, whoever made it might not be allowed to see."""
    return path.is_file() and (not path.is_symlink() or path.resolve().is_relative_to(home))


def _taken(name: str) -> NameTaken:
    return NameTaken(f"there is a voice {name!r} already")


@contextlib.contextmanager
def _changes(name: str, directory: Path) -> Iterator[None]:
    """Every way in which ``directory`` may say no, in words for whoever asked; ``name`` is the one to be taken."""
    try:
        yield
    except FileExistsError:
        raise _taken(name) from None
    except OSError as error:
        missing = isinstance(error, FileNotFoundError) and not directory.exists()
        cure = f"; on the server: mkdir -p {shlex.quote(str(directory))}" if missing else ""
        msg = f"cannot write to the directory of voices, {directory}: {error.strerror}{cure}"
        raise LibraryReadOnly(msg) from error


@contextlib.contextmanager
def _written(directory: Path, content: bytes) -> Iterator[Path]:
    """``content`` on disk under a name that is no voice's, for the time being."""
    descriptor, name = tempfile.mkstemp(dir=directory, prefix=".", suffix=_UNFINISHED)
    path = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), 0o640)
            os.fsync(file.fileno())
        yield path
        _sync(directory)
    finally:
        path.unlink(missing_ok=True)


def _sync(directory: Path) -> None:
    """A new name is safe only when its directory is on disk too."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
