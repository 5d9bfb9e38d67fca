"""Results as files: who finds them, for how long, and what makes room."""

import io
import os
import stat
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from chatterbox_server import audio
from chatterbox_server.recordings import NotARecording
from chatterbox_server.results import CannotKeep, KeepsNothing, NoSuchResult, Results
from chatterbox_server.server import resident_bytes

SOUND = np.random.default_rng(1).uniform(-0.5, 0.5, 24_000).astype(np.float32)


def kept(results: Results, audio_format: audio.Format = "wav", *, samples: NDArray[np.float32] = SOUND) -> str:
    """The name of a result, written in ten pieces."""
    with results.begin(audio_format, 24_000) as unfinished:
        for piece in np.split(samples, 10):
            unfinished.write(piece)
        return results.keep(unfinished, audio_format)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def aged(path: Path, seconds: float) -> Path:
    """``path`` as if it had been written so long ago."""
    written_s = time.time() - seconds
    os.utime(path, (written_s, written_s))
    return path


def a_recording(pitch_hz: float = 150.0, *, seconds: float = 6.0) -> io.BytesIO:
    time_s = np.arange(round(seconds * 16_000)) / 16_000
    file = io.BytesIO()
    soundfile.write(file, 0.2 * np.sin(2 * np.pi * pitch_hz * time_s), 16_000, format="FLAC")
    file.seek(0)
    return file


# -- kept and found ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("audio_format", audio.FORMATS)
def test_what_was_written_piece_by_piece_is_the_same_file_as_the_whole_at_once(
    audio_format: audio.Format, tmp_path: Path
) -> None:
    results = Results(tmp_path / "made" / "on demand")
    name = kept(results, audio_format)

    path = results.find(name)
    assert path.read_bytes() == audio.encode(SOUND, 24_000, audio_format)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert names(path.parent) == {name}


def test_names_cannot_be_guessed(tmp_path: Path) -> None:
    first, second = kept(Results(tmp_path)), kept(Results(tmp_path))
    assert len(first.removesuffix(".wav")) == 32
    assert first != second


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../secret.wav",
        "/etc/passwd",
        "secret.wav",
        f"{'0' * 32}.wav/../secret.wav",
        f"{'0' * 32}.wav\n",
        f"{'0' * 32}.exe",
        f"{'A' * 32}.wav",
        f"{'0' * 31}.wav",
        f"{'0' * 32}.wav\0",
        f"voice-{'0' * 64}.wav",
    ],
)
def test_a_name_is_never_a_path(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret.wav").touch()
    (tmp_path / f"voice-{'0' * 64}.wav").touch()
    with pytest.raises(NoSuchResult):
        Results(tmp_path).find(name)


def test_a_result_that_is_too_old_is_not_found_and_the_refusal_says_how_long_they_are_kept(tmp_path: Path) -> None:
    results = Results(tmp_path)
    path = results.find(kept(results))
    aged(path, 3590)
    assert results.find(path.name) == path
    aged(path, 3601)
    with pytest.raises(NoSuchResult, match="no such result: what was spoken is kept for 60 minutes"):
        results.find(path.name)


def test_what_is_not_finished_is_not_found_and_leaves_nothing(tmp_path: Path) -> None:
    results = Results(tmp_path)
    with results.begin("mp3", 24_000) as unfinished:
        unfinished.write(SOUND)
        (name,) = names(tmp_path)
        with pytest.raises(NoSuchResult):
            results.find(name)
    assert not names(tmp_path)


def test_no_sound_is_no_result(tmp_path: Path) -> None:
    results = Results(tmp_path)
    with pytest.raises(audio.NotSound), results.begin("wav", 24_000) as unfinished:
        results.keep(unfinished, "wav")
    assert not names(tmp_path)


def test_without_a_directory_nothing_is_kept() -> None:
    with pytest.raises(KeepsNothing):
        Results(None).begin("wav", 24_000)
    with pytest.raises(NoSuchResult):
        Results(None).find(f"{'0' * 32}.wav")


def test_a_directory_that_cannot_be_written_to_is_said_before_anything_is_spoken(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CannotKeep, match="cannot write to the directory of results: File exists"):
        Results(tmp_path / "file").begin("wav", 24_000)


def test_memory_does_not_grow_with_the_sound(tmp_path: Path) -> None:
    results = Results(tmp_path)
    piece = np.tile(SOUND, 10)
    with results.begin("wav", 24_000) as unfinished:
        for _ in range(10):
            unfinished.write(piece)
        before_bytes = resident_bytes()
        for _ in range(190):
            unfinished.write(piece)
        grown_bytes = resident_bytes() - before_bytes
        path = results.find(results.keep(unfinished, "wav"))
    assert soundfile.info(path).duration == 2000
    assert path.stat().st_size > 90_000_000
    assert grown_bytes < 20_000_000


# -- making room ------------------------------------------------------------------------------------------


def test_each_result_sweeps_what_is_too_old_and_nothing_of_anybody_else(tmp_path: Path) -> None:
    results = Results(tmp_path)
    old, fresh = kept(results), kept(results)
    voice = tmp_path / f"voice-{'0' * 64}.wav"
    left_behind = tmp_path / ".tmpk_2ab.part"
    for path in (tmp_path / old, voice, left_behind, tmp_path / "notes.txt", tmp_path / "song.wav"):
        path.touch()
        aged(path, 3700)

    new = kept(results)
    assert names(tmp_path) == {fresh, new, "notes.txt", "song.wav"}


def test_what_has_just_been_found_is_not_swept_before_it_can_be_opened(tmp_path: Path) -> None:
    results = Results(tmp_path)
    path = aged(results.find(kept(results)), 3610)
    results.sweep()
    assert path.exists()


def test_the_oldest_go_first_when_there_is_too_much_and_the_newest_stays_whatever_its_size(tmp_path: Path) -> None:
    one_bytes = len(audio.encode(SOUND, 24_000, "wav"))
    results = Results(tmp_path, most_bytes=3 * one_bytes)
    first, second, third = kept(results), kept(results), kept(results)
    for name, age_s in ((second, 30), (first, 20), (third, 10)):
        aged(tmp_path / name, age_s)

    fourth = kept(results)
    assert names(tmp_path) == {first, third, fourth}
    huge = kept(results, samples=np.tile(SOUND, 5))
    assert names(tmp_path) == {huge}


def test_what_is_still_being_written_is_not_swept(tmp_path: Path) -> None:
    slow, quick = Results(tmp_path), Results(tmp_path, most_bytes=0)
    with slow.begin("wav", 24_000) as unfinished:
        unfinished.write(SOUND)
        (half,) = names(tmp_path)
        aged(tmp_path / half, 4000)
        kept(quick)
        unfinished.write(SOUND)
        path = slow.find(slow.keep(unfinished, "wav"))
    assert soundfile.info(path).duration == 2


def test_several_instances_write_and_sweep_at_once(tmp_path: Path) -> None:
    one_bytes = len(audio.encode(SOUND, 24_000, "wav"))
    wrong: list[BaseException] = []

    def instance() -> None:
        try:
            for _ in range(20):
                kept(Results(tmp_path, most_bytes=5 * one_bytes))
        except BaseException as error:  # noqa: BLE001 (to be seen by the test, not by the thread)
            wrong.append(error)

    threads = [threading.Thread(target=instance) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    Results(tmp_path, most_bytes=5 * one_bytes).sweep()
    assert 1 <= len(names(tmp_path)) <= 5


# -- recordings that come with a request ------------------------------------------------------------------


def test_a_recording_is_a_voice_and_the_same_one_is_not_decoded_again(tmp_path: Path) -> None:
    results = Results(tmp_path)
    with results.voice(a_recording()) as first:
        samples, rate_hz = soundfile.read(first)
        assert (samples.size / rate_hz, rate_hz) == (pytest.approx(6, abs=0.1), 24_000)
        was = first.stat()
    with results.voice(a_recording()) as again, results.voice(a_recording(200)) as other:
        # By path, mtime and size an engine knows the voice again.
        assert again == first
        assert (again.stat().st_ino, again.stat().st_mtime_ns) == (was.st_ino, was.st_mtime_ns)
        assert other != first
    assert stat.S_IMODE(was.st_mode) == 0o640


def test_a_voice_is_there_for_as_long_as_it_is_spoken_with_and_then_goes_like_any_result(tmp_path: Path) -> None:
    results = Results(tmp_path, most_bytes=0)
    with results.voice(a_recording()) as path, results.voice(a_recording()):
        aged(path, 4000)
        kept(results)
        assert path.exists()
    kept(results)
    assert not path.exists()


def test_what_cannot_be_a_voice_leaves_nothing(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for source in (io.BytesIO(), io.BytesIO(b"RIFF"), a_recording(seconds=1)):
        with pytest.raises(NotARecording), results.voice(source):
            pass
    assert not names(tmp_path)
