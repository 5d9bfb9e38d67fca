"""A book's sound is encoded in its order, on a thread of its own, while later pieces are still spoken."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Self

from chatterbox_deploy.errors import CommandFailed
from chatterbox_deploy.speak.audiobook import Recording
from chatterbox_deploy.speak.wav import SAMPLE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from chatterbox_deploy.speak.narration import Span, Take
    from chatterbox_deploy.speak.parts import Parts


class Binder:
    """Encodes from the beginning as far as there is something; left without ``finish``, it leaves no file."""

    def __init__(
        self,
        path: Path,
        wanted: Sequence[tuple[Take, float]],
        parts: Parts,
        there: Iterable[str],
        *,
        loudness_lufs: float | None,
    ) -> None:
        """``wanted`` is each piece and the seconds of silence after it; ``there`` is what was spoken before."""
        self._path = path
        self._wanted = wanted
        self._parts = parts
        self._there = set(there)
        self._loudness_lufs = loudness_lufs
        self._changed = threading.Condition()
        self._dropped = False
        self._recording: Recording | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="binder", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._dropped = True
            self._changed.notify()
        self._thread.join()
        if self._recording is not None:
            self._recording.drop()

    def spoken(self, name: str) -> None:
        """One more is there; any thread may say so."""
        with self._changed:
            self._there.add(name)
            self._changed.notify()

    @property
    def written_s(self) -> float:
        """Seconds of sound that are encoded."""
        return 0.0 if self._recording is None else self._recording.written_s

    def wait(self, timeout_s: float) -> bool:
        """Whether all is encoded, within so many seconds; called once all was spoken.

        Raises:
            CommandFailed: it cannot be.
        """
        self._thread.join(timeout_s)
        if self._error is not None:
            raise self._error
        return not self._thread.is_alive()

    def finish(self, chapters: Sequence[Span], tags: Mapping[str, str]) -> None:
        """Write the whole under its name; called once all is encoded.

        Raises:
            CommandFailed: it cannot be written.
        """
        assert self._recording is not None  # noqa: S101  a manuscript is never empty
        self._recording.finish(chapters, tags)

    def _run(self) -> None:
        try:
            for take, pause_s in self._wanted:
                with self._changed:
                    while not self._dropped and take.name not in self._there:
                        self._changed.wait()
                    if self._dropped:
                        return
                self._add(take, pause_s)
        except Exception as error:  # noqa: BLE001  raised again where somebody waits
            self._error = error

    def _add(self, take: Take, pause_s: float) -> None:
        sound = self._parts.read(take.name)
        if self._recording is None:
            self._recording = Recording(self._path, sound.sample_rate_hz, loudness_lufs=self._loudness_lufs)
            self._rate_hz = sound.sample_rate_hz
        if sound.sample_rate_hz != self._rate_hz:
            msg = (
                f"cannot join sounds of {self._rate_hz} and {sound.sample_rate_hz} Hz: another server spoke some of "
                f"{self._parts.folder}"
            )
            raise CommandFailed(msg)
        self._recording.add(sound.pcm + bytes(round(pause_s * sound.sample_rate_hz) * SAMPLE_BYTES))
