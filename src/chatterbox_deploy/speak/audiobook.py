"""One file with chapters and tags, encoded as its sound comes (FFmpeg's libraries). Memory does not grow with the book.

Chapters stand at the beginning of most formats, and where they begin is known at the end. So what the encoder makes
waits in a nameless file, and is copied behind the header once that can be written: the slow part is done by then.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections import deque
from contextlib import contextmanager, suppress
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Final

import av
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.filter import Graph
from av.packet import Packet

from chatterbox_deploy.errors import CommandFailed
from chatterbox_deploy.speak.formats import FORMATS
from chatterbox_deploy.speak.wav import SAMPLE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from chatterbox_deploy.speak.narration import Span

_OPUS_RATES_HZ: Final = (8_000, 12_000, 16_000, 24_000, 48_000)

_BLOCK: Final = 1 << 15
"""Samples handed to the encoder at once."""


class Recording:
    """A file in the making. Until ``finish`` there is none under its name; whoever cannot finish it, drops it."""

    def __init__(self, path: Path, sample_rate_hz: int, *, loudness_lufs: float | None = None) -> None:
        """The suffix of ``path`` says the format.

        With ``loudness_lufs`` the loudness is evened out towards it (EBU R 128), in one pass.

        Raises:
            CommandFailed: it cannot be written.
        """
        self.written_s = 0.0
        """Seconds of sound so far; any thread may read it."""
        self._path = path
        self._rate_hz = sample_rate_hz
        # Hidden, with the same suffix; the next attempt overwrites what a killed one left.
        self._partial = path.with_name(f".{path.stem}.partial{path.suffix.lower()}")
        self._made = FORMATS[self._partial.suffix]
        self._graph = None if loudness_lufs is None else _evening(sample_rate_hz, loudness_lufs)
        self._samples = 0
        with self._failing():
            self._spool = _Spool(path.parent)
            self._container = av.open(
                str(self._partial), "w", format=self._made.container, options=dict(self._made.options)
            )
        self._stream = self._add_stream()

    def _add_stream(self) -> AudioStream:
        rate_hz = self._rate_hz
        if self._made.codec == "libopus":
            rate_hz = min((rate for rate in _OPUS_RATES_HZ if rate >= rate_hz), default=_OPUS_RATES_HZ[-1])
        stream = self._container.add_stream(
            self._made.codec, rate=rate_hz, layout="mono", options=dict(self._made.coder)
        )
        if not isinstance(stream, AudioStream):
            raise TypeError(self._made.codec)
        if self._made.bit_rate is not None:
            stream.bit_rate = self._made.bit_rate
        return stream

    def add(self, pcm: bytes) -> None:
        """Sound that comes next: 16 bits, one channel.

        Raises:
            CommandFailed: there is no room for it.
        """
        with self._failing():
            for start in range(0, len(pcm), _BLOCK * SAMPLE_BYTES):
                self._encode(self._evened(self._frame(pcm[start : start + _BLOCK * SAMPLE_BYTES])))
                self.written_s = self._samples / self._rate_hz

    def finish(self, chapters: Sequence[Span], tags: Mapping[str, str]) -> None:
        """Write the whole under its name; ``tags`` are FFmpeg's names (title, artist, album, genre).

        Raises:
            CommandFailed: it cannot be written.
        """
        with self._failing():
            self._encode(self._evened(None))
            told = self._container.metadata if self._made.container != "ogg" else self._stream.metadata
            told.update(tags)
            if self._made.comments:
                told.update(_chapter_comments(chapters, self._rate_hz))
            else:
                self._container.set_chapters(_chapters(chapters, self._rate_hz))
            for packet in self._spool.packets(self._stream):
                self._container.mux(packet)
            self._container.mux(self._stream.encode(None))
            self._container.close()
            # The parts go once the whole is there: it has to outlive a power cut.
            with self._partial.open("rb") as stream:
                os.fsync(stream.fileno())
            self._partial.replace(self._path)

    def drop(self) -> None:
        """Leave nothing but what is finished."""
        # The end of the file is written even so, and on a full disk that fails.
        with suppress(OSError, av.error.FFmpegError):
            self._container.close()
        self._spool.close()
        with suppress(OSError):
            self._partial.unlink()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, av.error.FFmpegError) as error:
            msg = f"cannot write {self._path}: {(error.strerror or str(error)).lower()}"
            raise CommandFailed(msg) from None

    def _frame(self, pcm: bytes) -> AudioFrame:
        # align=1: no bytes beyond the samples, so that numpy is not needed to fill it.
        frame = AudioFrame(format="s16", layout="mono", samples=len(pcm) // SAMPLE_BYTES, align=1)
        frame.planes[0].update(pcm)
        frame.sample_rate = self._rate_hz
        frame.time_base = Fraction(1, self._rate_hz)
        frame.pts = self._samples
        self._samples += frame.samples
        return frame

    def _evened(self, frame: AudioFrame | None) -> Iterator[AudioFrame]:
        """What comes out where ``frame`` goes in; after the last, the rest."""
        if self._graph is None:
            if frame is not None:
                yield frame
            return
        self._graph.push(frame)
        while True:
            try:
                pulled = self._graph.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return
            if isinstance(pulled, AudioFrame):
                yield pulled

    def _encode(self, frames: Iterable[AudioFrame]) -> None:
        for frame in frames:
            for packet in self._stream.encode(frame):
                self._spool.add(packet)


class _Spool:
    """Packets in a file that has no name, so that it goes with us, however we end."""

    _HEAD: Final = struct.Struct("<qqqiii")
    """Presentation, decoding, duration, time base, size; -1 for a packet that is kept as it is."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  until close
        self._kept: deque[Packet[Any]] = deque()

    def add(self, packet: Packet[Any]) -> None:
        # Side data, such as how much of the first packet is padding, have no bytes of their own; they are rare.
        if any(True for _ in packet.iter_sidedata()):
            self._kept.append(packet)
            self._file.write(self._HEAD.pack(0, 0, 0, 0, 0, -1))
            return
        content, base = bytes(packet), packet.time_base
        times = (packet.pts or 0, packet.dts or 0, packet.duration or 0, base.numerator, base.denominator)
        self._file.write(self._HEAD.pack(*times, len(content)) + content)

    def packets(self, stream: AudioStream) -> Iterator[Packet[Any]]:
        self._file.seek(0)
        while head := self._file.read(self._HEAD.size):
            pts, dts, duration, numerator, denominator, size = self._HEAD.unpack(head)
            if size < 0:
                yield self._kept.popleft()
                continue
            packet: Packet[Any] = Packet(self._file.read(size))
            packet.pts, packet.dts, packet.duration = pts, dts, duration
            packet.time_base = Fraction(numerator, denominator)
            packet.stream = stream
            packet.is_keyframe = True
            yield packet

    def close(self) -> None:
        self._file.close()


def _chapters(chapters: Sequence[Span], rate_hz: int) -> list[av.container.Chapter]:
    return [
        {
            "id": number,
            "start": chapter.start,
            "end": chapter.end,
            "time_base": Fraction(1, rate_hz),
            "metadata": {"title": chapter.text},
        }
        for number, chapter in enumerate(chapters)
    ]


def _chapter_comments(chapters: Sequence[Span], rate_hz: int) -> dict[str, str]:
    """``CHAPTER000=00:00:00.000`` and ``CHAPTER000NAME=…`` (wiki.xiph.org/Chapter_Extension)."""
    comments: dict[str, str] = {}
    for number, chapter in enumerate(chapters):
        seconds, milliseconds = divmod(round(chapter.start * 1000 / rate_hz), 1000)
        at = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{milliseconds:03}"
        comments |= {f"CHAPTER{number:03}": at, f"CHAPTER{number:03}NAME": chapter.text}
    return comments


def _evening(rate_hz: int, loudness_lufs: float) -> Graph:
    """FFmpeg's loudnorm, which changes no length, and back to 16 bits."""
    graph = Graph()
    graph.link_nodes(
        graph.add_abuffer(sample_rate=rate_hz, format="s16", layout="mono", time_base=Fraction(1, rate_hz)),
        graph.add("loudnorm", f"I={loudness_lufs}:TP=-2:LRA=7"),
        graph.add("aformat", f"sample_fmts=s16:sample_rates={rate_hz}:channel_layouts=mono"),
        graph.add("abuffersink"),
    ).configure()
    return graph
