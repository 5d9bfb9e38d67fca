"""The file that a book becomes, read back by FFmpeg; and the directory that keeps its parts."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import av
import numpy as np
import pytest

from chatterbox_deploy import audiobook
from chatterbox_deploy.errors import CommandFailed
from chatterbox_deploy.formats import FORMATS
from chatterbox_deploy.narration import Span, Take, Timeline
from chatterbox_deploy.parts import Parts
from chatterbox_deploy.wav import Sound

if TYPE_CHECKING:
    from pathlib import Path

TAGS = {"title": "The Bøok", "artist": "Ada", "album": "The Bøok", "genre": "Audiobook"}
FRAME_S = 1024 / 24_000
"""Of AAC, the longest of them."""
NAME = "0123456789abcdef" * 2
OTHER = "f" * 32


def tone(seconds: float, pitch_hz: float, rate_hz: int = 24_000, level: float = 0.3) -> bytes:
    times = np.arange(round(seconds * rate_hz)) / rate_hz
    return bytes((np.sin(2 * np.pi * pitch_hz * times) * level * 32767).astype("<i2").tobytes())


def book(rate_hz: int, chapters: int = 5) -> tuple[Timeline, dict[str, bytes]]:
    """Chapters of a high and a low tone, each with a silence that is no whole frame."""
    sounds = {"a": tone(1.337, 880, rate_hz), "b": tone(0.71, 220, rate_hz, 0.05)}
    parts: list[tuple[Take, int]] = []
    spans: list[Span] = []
    at = 0
    for number in range(chapters):
        began = at
        for name, silence in (("a", rate_hz // 7), ("b", rate_hz // 3)):
            parts.append((Take(name, name, {}), silence))
            at += len(sounds[name]) // 2 + silence
        spans.append(Span(f"Chapter {number} · ü", began, at))
    return Timeline(rate_hz, tuple(parts), tuple(spans), ()), sounds


def write(path: Path, rate_hz: int = 24_000, loudness_lufs: float | None = None) -> Timeline:
    timeline, sounds = book(rate_hz)
    audiobook.write(path, timeline, lambda take: sounds[take.name], tags=TAGS, loudness_lufs=loudness_lufs)
    return timeline


@pytest.mark.parametrize("rate_hz", [24_000, 22_050])
@pytest.mark.parametrize("suffix", FORMATS)
def test_length_chapters_and_tags_come_back(suffix: str, rate_hz: int, tmp_path: Path) -> None:
    timeline = write(tmp_path / f"book{suffix}", rate_hz)

    with av.open(str(tmp_path / f"book{suffix}")) as container:
        stream = container.streams.audio[0]
        tags = {**stream.metadata, **container.metadata}
        chapters = [(float(c["start"] * (c["time_base"] or 0)), c["metadata"]["title"]) for c in container.chapters()]
        length_s = sum(frame.samples for frame in container.decode(stream)) / stream.rate

    assert length_s == pytest.approx(timeline.duration_s, abs=FRAME_S)
    assert {name: tags[name] for name in ("title", "artist", "genre")} == {
        name: TAGS[name] for name in ("title", "artist", "genre")
    }
    wanted = [] if suffix == ".wav" else [(chapter.start / rate_hz, chapter.text) for chapter in timeline.chapters]
    assert [title for _, title in chapters] == [title for _, title in wanted]
    for (start_s, _), (wanted_s, _) in zip(chapters, wanted, strict=True):
        assert start_s == pytest.approx(wanted_s, abs=0.001)


def test_what_sounds_sounds_where_the_timeline_says(tmp_path: Path) -> None:
    timeline = write(tmp_path / "book.m4b")

    with av.open(str(tmp_path / "book.m4b")) as container:
        heard = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])

    # The first twentieth of a second of each chapter is its high, loud tone; just before it there is silence.
    for chapter in timeline.chapters[1:]:
        begins = heard[chapter.start : chapter.start + 1200]
        before = heard[chapter.start - 4800 : chapter.start - 1200]
        assert np.abs(begins).max() > 0.2
        assert np.abs(before).max() < 0.01


def test_a_book_for_players_that_remember_the_place(tmp_path: Path) -> None:
    write(tmp_path / "book.m4b")

    content = (tmp_path / "book.m4b").read_bytes()

    assert content[4:12] == b"ftypM4B "
    assert content.index(b"moov") < content.index(b"mdat")


def test_lossless_is_every_sample_and_nothing_else(tmp_path: Path) -> None:
    timeline, sounds = book(24_000)
    write(tmp_path / "book.flac")

    with av.open(str(tmp_path / "book.flac")) as container:
        heard = b"".join(frame.to_ndarray().astype("<i2").tobytes() for frame in container.decode(audio=0))

    assert heard == b"".join(sounds[take.name] + bytes(2 * silence) for take, silence in timeline.parts)


def test_evened_out_the_quiet_comes_near_to_the_loud_and_nothing_moves(tmp_path: Path) -> None:
    sounds = {"loud": tone(12, 300), "quiet": tone(12, 300, level=0.05)}
    parts = tuple((Take(name, name, {}), 12_000) for name in sounds)
    samples = 2 * (12 * 24_000 + 12_000)
    whole = Timeline(24_000, parts, (Span("All", 0, samples),), ())
    ratios = []
    for loudness in (None, -19.0):
        path = tmp_path / f"book{loudness}.flac"
        audiobook.write(path, whole, lambda take: sounds[take.name], tags=TAGS, loudness_lufs=loudness)
        with av.open(str(path)) as container:
            heard = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)]).astype(np.float64)
        assert heard.size == samples
        ratios.append(np.abs(heard[: 12 * 24_000]).max() / np.abs(heard[-5 * 24_000 :]).max())

    assert ratios[0] == pytest.approx(6, rel=0.01)
    assert ratios[1] < 3


def test_what_cannot_be_written_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    timeline, _ = book(24_000)

    def gone(take: Take) -> bytes:
        raise CommandFailed("cannot read a")

    with pytest.raises(CommandFailed, match="cannot read a"):
        audiobook.write(tmp_path / "book.m4b", timeline, gone, tags=TAGS)
    with pytest.raises(CommandFailed, match=r"cannot write .*/nowhere/book\.m4b: no such file or directory"):
        write(tmp_path / "nowhere" / "book.m4b")

    assert list(tmp_path.iterdir()) == []


WRITE_LONG = """
import resource, sys
from pathlib import Path
from chatterbox_deploy import audiobook
from chatterbox_deploy.narration import Span, Take, Timeline

minutes = int(sys.argv[1])
pcm = bytes(range(256)) * (24_000 * 2 * 20 // 256)
samples = len(pcm) // 2
parts = ((Take("a", "a", {}), 0),) * (minutes * 3)
whole = Timeline(24_000, parts, (Span("All", 0, samples * len(parts)),), ())
audiobook.write(Path(sys.argv[2]), whole, lambda take: pcm, tags={})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_book(tmp_path: Path) -> None:
    def peak_kib(minutes: int) -> int:
        argv = (sys.executable, "-c", WRITE_LONG, str(minutes), tmp_path / "book.flac")
        return int(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)

    # 60 minutes of sound are 170 MB.
    assert peak_kib(60) < peak_kib(1) + 20_000


# -- parts ----------------------------------------------------------------------------------------------------


def test_a_part_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "book.m4b.parts")
    with parts.held("speak"):
        parts.keep(NAME, Sound(24_000, tone(0.5, 440)))
        # As kill -9 and a full disk leave them.
        (parts.folder / f".{OTHER}.tmp").write_bytes(b"RIFF")
        (parts.folder / f"{OTHER}.wav").write_bytes(b"")

        assert parts.samples([NAME, OTHER, "0" * 32]) == {NAME: (24_000, 12_000)}
        assert parts.pcm(NAME) == tone(0.5, 440)
        with pytest.raises(CommandFailed, match="remove it and type the same again"):
            parts.pcm(OTHER)

    with parts.held("speak"):
        assert not list(parts.folder.glob(".*.tmp"))


def test_what_is_not_ours_stays_when_all_is_done(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    (tmp_path / "notes.wav").write_text("mine")
    with parts.held("speak"):
        parts.keep(NAME, Sound(24_000, tone(0.1, 440)))
        parts.clear()

    assert [path.name for path in tmp_path.iterdir()] == ["notes.wav"]


def test_a_run_that_spoke_nothing_leaves_nothing(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "book.m4b.parts")
    with parts.held("speak"):
        pass

    assert list(tmp_path.iterdir()) == []


def test_the_second_of_two_at_once_is_told_who_the_first_is(tmp_path: Path) -> None:
    first, second = Parts(tmp_path / "parts"), Parts(tmp_path / "parts")
    with (
        first.held("chatterbox-deploy speak book.txt"),
        pytest.raises(CommandFailed) as refused,
        second.held("chatterbox-deploy speak other.txt"),
    ):
        pass

    assert str(refused.value) == (
        f"cannot begin: `chatterbox-deploy speak book.txt` (process {os.getpid()}) is using {tmp_path}/parts; "
        "wait until it has ended"
    )
    with second.held("again"):
        pass
