"""The voices that a request may name: a directory of recordings and the built-in one. Reads names, no sound."""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

DEFAULT: Final = "default"
OPENAI: Final = frozenset(
    ("alloy", "ash", "ballad", "coral", "echo", "fable", "nova", "onyx", "sage", "shimmer", "verse")
)
"""Names that clients of OpenAI send unasked; each is the built-in voice until a recording has its name."""

EXTENSIONS: Final = (".wav", ".flac", ".ogg", ".mp3")
"""In order of preference, where one name has several files."""

_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


class UnknownVoice(Exception):
    """Nobody here has that name."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        super().__init__(f"unknown voice {name[:64]!r}{hint}; known: {', '.join(known)}")


@dataclass(frozen=True, slots=True)
class Voice:
    name: str
    kind: Literal["built-in", "alias", "recording"]
    recording: Path | None


@dataclass(frozen=True, slots=True)
class Library:
    """The directory is read again for each question, so a file put there speaks without a restart."""

    directory: Path | None

    def voices(self) -> dict[str, Voice]:
        """Every voice by its name: the built-in one, recordings, then OpenAI's names."""
        recordings = {path.stem: Voice(path.stem, "recording", path) for path in self._recordings()}
        aliases = {name: Voice(name, "alias", None) for name in sorted(OPENAI - recordings.keys())}
        return {DEFAULT: Voice(DEFAULT, "built-in", None)} | dict(sorted(recordings.items())) | aliases

    def find(self, name: str) -> Voice:
        """The voice called ``name``, which is only ever compared, so it cannot name a path.

        Raises:
            UnknownVoice: with the names there are.
        """
        voices = self.voices()
        if name not in voices:
            raise UnknownVoice(name, tuple(known for known, voice in voices.items() if voice.kind != "alias"))
        return voices[name]

    def _recordings(self) -> Iterator[Path]:
        """Files that name a voice, the preferred extension of each name last."""
        try:
            paths = sorted(self.directory.iterdir()) if self.directory is not None else []
        except OSError:
            # Not made yet, or not for us to read: the built-in voice speaks all the same.
            return
        for extension in reversed(EXTENSIONS):
            for path in paths:
                fits = path.suffix == extension and path.stem != DEFAULT and _NAME.fullmatch(path.stem)
                if fits and path.is_file():
                    yield path
