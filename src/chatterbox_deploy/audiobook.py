"""A timeline's sound into one file with chapters and tags (FFmpeg's libraries). Memory does not grow with the book."""

from __future__ import annotations

import os
from fractions import Fraction
from typing import TYPE_CHECKING, Final

import av
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.filter import Graph

from chatterbox_deploy.errors import CommandFailed
from chatterbox_deploy.formats import FORMATS
from chatterbox_deploy.wav import SAMPLE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from chatterbox_deploy.narration import Take, Timeline


_OPUS_RATES_HZ: Final = (8_000, 12_000, 16_000, 24_000, 48_000)

_BLOCK: Final = 1 << 15
"""Samples handed to the encoder at once."""


def write(
    path: Path,
    timeline: Timeline,
    read: Callable[[Take], bytes],
    *,
    tags: Mapping[str, str],
    loudness_lufs: float | None = None,
    on_way: Callable[[float], None] = lambda _: None,
) -> None:
    """Write the whole to ``path``, whose name's suffix says the format; complete under that name, or not there.

    ``read`` gives the samples of a take; ``tags`` are FFmpeg's names (title, artist, album, genre). With
    ``loudness_lufs`` the loudness is evened out towards it (EBU R 128), in one pass. ``on_way`` hears the seconds of
    sound that are written.

    Raises:
        CommandFailed: it cannot be written.
    """
    # Hidden, with the same suffix; the next attempt overwrites what a killed one left.
    partial = path.with_name(f".{path.stem}.partial{path.suffix.lower()}")
    frames = _frames(timeline, read)
    if loudness_lufs is not None:
        frames = _evened(frames, timeline.sample_rate_hz, loudness_lufs)
    try:
        _encode(partial, timeline, frames, tags, on_way)
        # The parts go once the whole is there: it has to outlive a power cut.
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    except (OSError, av.error.FFmpegError) as error:
        msg = f"cannot write {path}: {(error.strerror or str(error)).lower()}"
        raise CommandFailed(msg) from None
    finally:
        partial.unlink(missing_ok=True)


def _encode(
    path: Path,
    timeline: Timeline,
    frames: Iterator[AudioFrame],
    tags: Mapping[str, str],
    on_way: Callable[[float], None],
) -> None:
    made, rate_hz = FORMATS[path.suffix], timeline.sample_rate_hz
    if made.codec == "libopus":
        rate_hz = min((rate for rate in _OPUS_RATES_HZ if rate >= rate_hz), default=_OPUS_RATES_HZ[-1])
    with av.open(str(path), "w", format=made.container, options=dict(made.options)) as container:
        stream = container.add_stream(made.codec, rate=rate_hz, layout="mono", options=dict(made.coder))
        if not isinstance(stream, AudioStream):
            raise TypeError(made.codec)
        if made.bit_rate is not None:
            stream.bit_rate = made.bit_rate
        told = container.metadata if made.container != "ogg" else stream.metadata
        told.update(tags)
        if made.comments:
            told.update(_chapter_comments(timeline))
        else:
            container.set_chapters(_chapters(timeline))
        written = 0
        for frame in frames:
            container.mux(stream.encode(frame))
            written += frame.samples
            on_way(written / timeline.sample_rate_hz)
        container.mux(stream.encode(None))


def _chapters(timeline: Timeline) -> list[av.container.Chapter]:
    return [
        {
            "id": number,
            "start": chapter.start,
            "end": chapter.end,
            "time_base": Fraction(1, timeline.sample_rate_hz),
            "metadata": {"title": chapter.text},
        }
        for number, chapter in enumerate(timeline.chapters)
    ]


def _chapter_comments(timeline: Timeline) -> dict[str, str]:
    """``CHAPTER000=00:00:00.000`` and ``CHAPTER000NAME=…`` (wiki.xiph.org/Chapter_Extension)."""
    comments: dict[str, str] = {}
    for number, chapter in enumerate(timeline.chapters):
        seconds, milliseconds = divmod(round(chapter.start * 1000 / timeline.sample_rate_hz), 1000)
        at = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{milliseconds:03}"
        comments |= {f"CHAPTER{number:03}": at, f"CHAPTER{number:03}NAME": chapter.text}
    return comments


def _frames(timeline: Timeline, read: Callable[[Take], bytes]) -> Iterator[AudioFrame]:
    at = 0
    for take, silence in timeline.parts:
        pcm = read(take) + bytes(silence * SAMPLE_BYTES)
        for start in range(0, len(pcm), _BLOCK * SAMPLE_BYTES):
            block = pcm[start : start + _BLOCK * SAMPLE_BYTES]
            # align=1: no bytes beyond the samples, so that numpy is not needed to fill it.
            frame = AudioFrame(format="s16", layout="mono", samples=len(block) // SAMPLE_BYTES, align=1)
            frame.planes[0].update(block)
            frame.sample_rate = timeline.sample_rate_hz
            frame.time_base = Fraction(1, timeline.sample_rate_hz)
            frame.pts = at
            at += frame.samples
            yield frame


def _evened(frames: Iterator[AudioFrame], rate_hz: int, loudness_lufs: float) -> Iterator[AudioFrame]:
    """Through FFmpeg's loudnorm, which changes no length, and back to 16 bits."""
    graph = Graph()
    graph.link_nodes(
        graph.add_abuffer(sample_rate=rate_hz, format="s16", layout="mono", time_base=Fraction(1, rate_hz)),
        graph.add("loudnorm", f"I={loudness_lufs}:TP=-2:LRA=7"),
        graph.add("aformat", f"sample_fmts=s16:sample_rates={rate_hz}:channel_layouts=mono"),
        graph.add("abuffersink"),
    ).configure()
    for frame in frames:
        graph.push(frame)
        yield from _pulled(graph)
    graph.push(None)
    yield from _pulled(graph)


def _pulled(graph: Graph) -> Iterator[AudioFrame]:
    while True:
        try:
            frame = graph.pull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return
        if isinstance(frame, AudioFrame):
            yield frame
