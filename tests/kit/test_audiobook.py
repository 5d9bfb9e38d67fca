"""The file that a book becomes, read back by FFmpeg; and the directory that keeps its parts."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import av
import numpy as np
import pytest

from chatterbox_deploy.errors import CommandFailed
from chatterbox_deploy.speak.audiobook import Recording
from chatterbox_deploy.speak.binding import Binder
from chatterbox_deploy.speak.formats import FORMATS
from chatterbox_deploy.speak.narration import Span, Take
from chatterbox_deploy.speak.parts import Parts
from chatterbox_deploy.speak.wav import Sound

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


def book(rate_hz: int, chapters: int = 5) -> tuple[list[Span], list[bytes]]:
    """Chapters of a high and a low tone, each with a silence that is no whole frame."""
    high, low = tone(1.337, 880, rate_hz), tone(0.71, 220, rate_hz, 0.05)
    sounds = [high + bytes(2 * (rate_hz // 7)), low + bytes(2 * (rate_hz // 3))] * chapters
    length = sum(map(len, sounds[:2])) // 2
    return [Span(f"Chapter {n} · ü", n * length, (n + 1) * length) for n in range(chapters)], sounds


def write(
    path: Path, sounds: list[bytes], chapters: list[Span], rate_hz: int = 24_000, *, lufs: float | None = None
) -> None:
    recording = Recording(path, rate_hz, loudness_lufs=lufs)
    try:
        for sound in sounds:
            recording.add(sound)
        recording.finish(chapters, TAGS)
    finally:
        recording.drop()


@pytest.mark.parametrize("rate_hz", [24_000, 22_050])
@pytest.mark.parametrize("suffix", FORMATS)
def test_length_chapters_and_tags_come_back(suffix: str, rate_hz: int, tmp_path: Path) -> None:
    spans, sounds = book(rate_hz)
    write(tmp_path / f"book{suffix}", sounds, spans, rate_hz)

    with av.open(str(tmp_path / f"book{suffix}")) as container:
        stream = container.streams.audio[0]
        tags = {**stream.metadata, **container.metadata}
        chapters = [(float(c["start"] * (c["time_base"] or 0)), c["metadata"]["title"]) for c in container.chapters()]
        length_s = sum(frame.samples for frame in container.decode(stream)) / stream.rate

    assert length_s == pytest.approx(spans[-1].end / rate_hz, abs=FRAME_S)
    assert {name: tags[name] for name in ("title", "artist", "genre")} == {
        name: TAGS[name] for name in ("title", "artist", "genre")
    }
    wanted = [] if suffix == ".wav" else [(chapter.start / rate_hz, chapter.text) for chapter in spans]
    assert [title for _, title in chapters] == [title for _, title in wanted]
    for (start_s, _), (wanted_s, _) in zip(chapters, wanted, strict=True):
        assert start_s == pytest.approx(wanted_s, abs=0.001)


def test_what_sounds_sounds_where_the_timeline_says(tmp_path: Path) -> None:
    spans, sounds = book(24_000)
    write(tmp_path / "book.m4b", sounds, spans)

    with av.open(str(tmp_path / "book.m4b")) as container:
        heard = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])

    # The first twentieth of a second of each chapter is its high, loud tone; just before it there is silence.
    for chapter in spans[1:]:
        begins = heard[chapter.start : chapter.start + 1200]
        before = heard[chapter.start - 4800 : chapter.start - 1200]
        assert np.abs(begins).max() > 0.2
        assert np.abs(before).max() < 0.01


def test_a_book_for_players_that_remember_the_place(tmp_path: Path) -> None:
    spans, sounds = book(24_000)
    write(tmp_path / "book.m4b", sounds, spans)

    content = (tmp_path / "book.m4b").read_bytes()

    assert content[4:12] == b"ftypM4B "
    assert content.index(b"moov") < content.index(b"mdat")


def test_lossless_is_every_sample_and_nothing_else(tmp_path: Path) -> None:
    spans, sounds = book(24_000)
    write(tmp_path / "book.flac", sounds, spans)

    with av.open(str(tmp_path / "book.flac")) as container:
        heard = b"".join(frame.to_ndarray().astype("<i2").tobytes() for frame in container.decode(audio=0))

    assert heard == b"".join(sounds)


def test_evened_out_the_quiet_comes_near_to_the_loud_and_nothing_moves(tmp_path: Path) -> None:
    sounds = [tone(12, 300) + bytes(24_000), tone(12, 300, level=0.05) + bytes(24_000)]
    samples = 2 * (12 * 24_000 + 12_000)
    ratios: list[float] = []
    for lufs in (None, -19.0):
        path = tmp_path / f"book{len(ratios)}.flac"
        write(path, sounds, [Span("All", 0, samples)], lufs=lufs)
        with av.open(str(path)) as container:
            heard = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)]).astype(np.float64)
        assert heard.size == samples
        ratios.append(np.abs(heard[: 12 * 24_000]).max() / np.abs(heard[-5 * 24_000 :]).max())

    assert ratios[0] == pytest.approx(6, rel=0.01)
    assert ratios[1] < 3


def test_what_cannot_be_written_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match=r"cannot write .*/nowhere/book\.m4b: no such file or directory"):
        Recording(tmp_path / "nowhere" / "book.m4b", 24_000)
    dropped = Recording(tmp_path / "book.m4b", 24_000)
    dropped.add(tone(1, 440))
    dropped.drop()

    assert list(tmp_path.iterdir()) == []


WRITE_LONG = """
import resource, sys
from pathlib import Path
from chatterbox_deploy.speak.audiobook import Recording
from chatterbox_deploy.speak.binding import Binder
from chatterbox_deploy.speak.narration import Span

minutes = int(sys.argv[1])
pcm = bytes(range(256)) * (24_000 * 2 * 20 // 256)
recording = Recording(Path(sys.argv[2]), 24_000)
for _ in range(minutes * 3):
    recording.add(pcm)
recording.finish([Span("All", 0, minutes * 60 * 24_000)], {})
recording.drop()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_book(tmp_path: Path) -> None:
    def peak_kib(minutes: int) -> int:
        argv = (sys.executable, "-c", WRITE_LONG, str(minutes), tmp_path / "book.wav")
        return int(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)

    # 60 minutes of sound are 170 MB.
    assert peak_kib(60) < peak_kib(1) + 20_000


# -- the order of a book --------------------------------------------------------------------------------------


def test_a_book_is_bound_in_its_order_while_it_is_spoken_in_another(tmp_path: Path) -> None:
    spoken = {f"{number:032x}": tone(0.1, 200 + 100 * number) for number in range(6)}
    wanted = [(Take(name, name, {}), 0.05) for name in spoken]
    parts = Parts(tmp_path / "parts")
    with parts.held("speak"):
        first, *rest = spoken
        parts.keep(first, Sound(24_000, spoken[first]))
        with Binder(tmp_path / "book.flac", wanted, parts, [first], loudness_lufs=None) as binder:
            for name in reversed(rest):
                assert not binder.wait(0.01)
                parts.keep(name, Sound(24_000, spoken[name]))
                binder.spoken(name)
            while not binder.wait(1):
                pass
            binder.finish([Span("All", 0, 6 * 3600)], TAGS)

    with av.open(str(tmp_path / "book.flac")) as container:
        heard = b"".join(frame.to_ndarray().astype("<i2").tobytes() for frame in container.decode(audio=0))
    assert heard == b"".join(sound + bytes(2 * 1200) for sound in spoken.values())


def test_a_book_that_is_given_up_leaves_no_file(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "parts")
    wanted = [(Take(name, name, {}), 0.0) for name in (NAME, OTHER)]
    with parts.held("speak"):
        parts.keep(NAME, Sound(24_000, tone(0.1, 440)))
        with Binder(tmp_path / "book.m4b", wanted, parts, [NAME], loudness_lufs=None) as binder:
            while not binder.written_s:
                assert not binder.wait(0.01)

    assert [path.name for path in tmp_path.iterdir()] == ["parts"]


def test_sounds_of_two_rates_are_not_joined(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "parts")
    wanted = [(Take(name, name, {}), 0.0) for name in (NAME, OTHER)]
    with parts.held("speak"):
        parts.keep(NAME, Sound(24_000, tone(0.1, 440)))
        parts.keep(OTHER, Sound(22_050, tone(0.1, 440)))
        binder = Binder(tmp_path / "book.m4b", wanted, parts, [NAME, OTHER], loudness_lufs=None)
        with (
            binder,
            pytest.raises(CommandFailed, match="cannot join sounds of 24000 and 22050 Hz: another server spoke"),
        ):
            binder.wait(10)


# -- parts ----------------------------------------------------------------------------------------------------


def test_a_part_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "book.m4b.parts")
    with parts.held("speak"):
        parts.keep(NAME, Sound(24_000, tone(0.5, 440)))
        # As kill -9 and a full disk leave them.
        (parts.folder / f".{OTHER}.tmp").write_bytes(b"RIFF")
        (parts.folder / f"{OTHER}.wav").write_bytes(b"")

        assert parts.samples([NAME, OTHER, "0" * 32]) == {NAME: (24_000, 12_000)}
        assert parts.read(NAME) == Sound(24_000, tone(0.5, 440))
        with pytest.raises(CommandFailed, match="remove it and type the same again"):
            parts.read(OTHER)

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
