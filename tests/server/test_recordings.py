"""What somebody sends as a voice: used as it should sound, or refused in words they understand."""

import io
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from chatterbox_server import audio, recordings

RATE_HZ = recordings.SAMPLE_RATE_HZ
UNKNOWN = "the file is no sound in a format that is read here (wav, flac, ogg, mp3, m4a, webm)"
WANTED = "send 5 to 30 s of speech"


def speech(seconds: float, rate_hz: int = RATE_HZ, loud: float = 0.2) -> NDArray[np.float32]:
    time_s = np.arange(round(seconds * rate_hz)) / rate_hz
    hum = np.sin(2 * np.pi * 150 * time_s) * (0.55 + 0.45 * np.sin(2 * np.pi * 3.5 * time_s))
    spoken: NDArray[np.float32] = (loud * hum).astype(np.float32)
    return spoken


def a_file(
    samples: NDArray[np.float32], rate_hz: int = RATE_HZ, kind: str = "WAV", subtype: str | None = None
) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, format=kind, subtype=subtype)
    return file.getvalue()


def in_container(samples: NDArray[np.float32], container: str, codec: str) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=RATE_HZ, layout="mono")
        assert isinstance(stream, av.AudioStream)
        frame = av.AudioFrame.from_ndarray((samples * 32767).astype("<i2")[np.newaxis], format="s16", layout="mono")
        frame.sample_rate = RATE_HZ
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("voice.wav", content)
    return file.getvalue()


def with_a_nan() -> NDArray[np.float32]:
    samples = speech(8)
    samples[100] = np.nan
    return samples


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def normalised(content: bytes) -> NDArray[np.float32]:
    return recordings.normalise(io.BytesIO(content), shortest_s=5, longest_s=30)


SPOKEN = speech(8)
PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{}\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(a_file(SPOKEN), id="wav"),
        pytest.param(a_file(SPOKEN, subtype="FLOAT"), id="wav of floats"),
        pytest.param(a_file(SPOKEN, subtype="PCM_24"), id="wav of 24 bits"),
        pytest.param(a_file(SPOKEN, subtype="ULAW"), id="wav of a telephone"),
        pytest.param(a_file(np.stack([speech(8, 44_100)] * 2, 1), 44_100), id="stereo at 44.1 kHz"),
        pytest.param(a_file(SPOKEN, kind="FLAC"), id="flac"),
        pytest.param(a_file(SPOKEN, kind="OGG", subtype="VORBIS"), id="vorbis"),
        pytest.param(a_file(SPOKEN, kind="AIFF"), id="aiff"),
        pytest.param(audio.encode(SPOKEN, RATE_HZ, "opus"), id="opus"),
        pytest.param(audio.encode(SPOKEN, RATE_HZ, "mp3"), id="mp3"),
        pytest.param(audio.encode(SPOKEN, RATE_HZ, "aac"), id="aac"),
        pytest.param(in_container(SPOKEN, "mp4", "aac"), id="m4a"),
        pytest.param(in_container(SPOKEN, "mp4", "alac"), id="alac"),
        pytest.param(in_container(SPOKEN, "webm", "libopus"), id="webm"),
        pytest.param(in_container(SPOKEN, "matroska", "aac"), id="mkv"),
    ],
)
def test_every_common_format_becomes_the_same_voice(content: bytes) -> None:
    voice = normalised(content)
    assert voice.dtype == np.float32
    assert voice.size / RATE_HZ == pytest.approx(8.0, abs=0.1)
    assert np.sqrt(np.mean(voice**2)) == pytest.approx(recordings.LOUDNESS, rel=0.01)
    spectrum = np.abs(np.fft.rfft(voice))
    assert np.argmax(spectrum) * RATE_HZ / voice.size == pytest.approx(150, abs=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "the file is empty", id="empty"),
        pytest.param(a_file(SPOKEN)[:44], "the file has no sound in it", id="header only"),
        pytest.param(a_file(SPOKEN)[:30], UNKNOWN, id="half a header"),
        pytest.param(half(a_file(SPOKEN)), f"the recording lasts 4.00 s; {WANTED}", id="truncated wav"),
        pytest.param(
            half(a_file(np.random.default_rng(0).uniform(-0.5, 0.5, 12 * RATE_HZ).astype(np.float32), kind="FLAC")),
            "the file is cut off: it says 12.0 s, and holds 6.0 s",
            id="truncated flac",
        ),
        pytest.param(half(in_container(SPOKEN, "mp4", "aac")), UNKNOWN, id="truncated m4a"),
        pytest.param(np.random.default_rng(0).bytes(100_000), UNKNOWN, id="random bytes"),
        pytest.param(a_file(speech(0.01)), f"the recording lasts 0.01 s; {WANTED}", id="10 ms"),
        pytest.param(a_file(with_a_nan(), subtype="FLOAT"), "the recording has samples that are no number", id="NaN"),
        pytest.param(b"\x89PNG\r\n\x1a\n" + bytes(1000), UNKNOWN, id="a picture"),
        pytest.param(b"This is no sound.\n" * 100, UNKNOWN, id="text"),
        pytest.param(zipped(a_file(SPOKEN)), UNKNOWN, id="zip"),
        pytest.param(a_file(np.zeros(8 * RATE_HZ, np.float32)), "the recording is silent", id="silence"),
        pytest.param(a_file(speech(3)), f"the recording lasts 3.00 s; {WANTED}", id="3 s"),
        pytest.param(a_file(speech(35)), f"the recording lasts 35.00 s; {WANTED}", id="35 s"),
        pytest.param(a_file(speech(60)), f"the recording lasts more than 30 s; {WANTED}", id="60 s"),
        pytest.param(
            a_file(np.concatenate([np.zeros(4 * RATE_HZ, np.float32), speech(3)])),
            f"the recording lasts 3.10 s without the silence around it; {WANTED}",
            id="3 s after silence",
        ),
        pytest.param(
            a_file(SPOKEN, 4000), "the recording has 4000 samples a second; 8000 to 192000 are read", id="4 kHz"
        ),
        pytest.param(
            a_file(np.stack([SPOKEN] * 9, 1)), "the recording has 9 channels; 1 to 8 are read", id="9 channels"
        ),
        pytest.param(
            a_file(SPOKEN, subtype="MS_ADPCM"), "the file holds sound as adpcm_ms, which is not read here", id="ADPCM"
        ),
    ],
)
def test_what_cannot_be_a_voice_is_told_why(content: bytes, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(recordings.NotARecording) as told:
        normalised(content)
    assert str(told.value) == message
    # FFmpeg talks to the terminal unless it is told not to.
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "playlist",
    [
        PLAYLIST.format("file:///etc/passwd"),
        PLAYLIST.format("{}"),
        PLAYLIST.format("http://127.0.0.1:9/voice.wav"),
        "ffconcat version 1.0\nfile {}\n",
        "ffconcat version 1.0\nfile /etc/passwd\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
    ],
)
def test_a_playlist_opens_no_other_file(playlist: str, tmp_path: Path) -> None:
    other = tmp_path / "voice.wav"
    other.write_bytes(a_file(SPOKEN))
    with pytest.raises(recordings.NotARecording) as told:
        normalised(playlist.format(other).encode())
    assert str(told.value) == UNKNOWN


def test_the_decoder_could_open_no_file_if_it_wanted_to(tmp_path: Path) -> None:
    """The second wall: whatever FFmpeg is talked into, its process has no file to open it with."""
    program = (
        "import sys; from chatterbox_server import decoder\n"
        "decoder.decode = lambda longest_s: open('/etc/passwd')\n"
        "decoder.main()"
    )
    done = subprocess.run([sys.executable, "-c", program, "1"], capture_output=True, check=False)
    assert done.returncode == 1
    assert b"Too many open files" in done.stderr


def an_mp4_that_claims(samples: int) -> bytes:
    """Some four kilobytes whose index promises ``samples`` packets, 24 bytes of memory for each."""

    def box(name: bytes, *parts: bytes) -> bytes:
        inside = b"".join(parts)
        return struct.pack(">I4s", 8 + len(inside), name) + inside

    def full(name: bytes, *parts: bytes) -> bytes:
        return box(name, bytes(4), *parts)

    entry = box(b".mp3", bytes(6), struct.pack(">H8xHHHHI", 1, 1, 16, 0, 0, RATE_HZ << 16))
    table = box(
        b"stbl",
        full(b"stsd", struct.pack(">I", 1), entry),
        full(b"stts", struct.pack(">III", 1, samples, 576)),
        full(b"stsc", struct.pack(">IIII", 1, 1, samples, 1)),
        full(b"stsz", struct.pack(">II", 1, samples)),
        full(b"stco", struct.pack(">II", 1, 40)),
    )
    media = box(
        b"mdia",
        full(b"mdhd", struct.pack(">IIIIHH", 0, 0, RATE_HZ, 0xFFFFFFFF, 0, 0)),
        full(b"hdlr", bytes(4), b"soun", bytes(13)),
        box(b"minf", full(b"smhd", bytes(4)), table),
    )
    track = box(b"trak", box(b"tkhd", struct.pack(">IIIIII60x", 7, 0, 0, 1, 0, 1000)), media)
    head = full(b"mvhd", struct.pack(">IIIIIH70xI", 0, 0, 1000, 1000, 0x10000, 0x100, 2))
    return box(b"ftyp", b"isom\0\0\0\0isommp42") + box(b"moov", head, track) + box(b"mdat", b"\xff\xfb" * 2000)


def test_a_file_that_asks_for_gigabytes_gets_none() -> None:
    with pytest.raises(recordings.NotARecording) as told:
        normalised(an_mp4_that_claims(80_000_000))
    # FFmpeg was given no memory for the index, so it found no packet; with all it asks for it would find damaged ones.
    assert str(told.value) == "the file has no sound in it"


@pytest.mark.parametrize(("kind", "subtype"), [("FLAC", None), ("MP3", None), ("OGG", "OPUS")])
def test_what_is_long_in_a_small_file_is_not_decoded(kind: str, subtype: str | None) -> None:
    bomb = io.BytesIO()
    with soundfile.SoundFile(bomb, "w", 8000, 1, format=kind, subtype=subtype) as sound:
        for _ in range(14):
            sound.write(np.zeros(90 * 8000, np.float32))
    with tempfile.TemporaryFile() as file:
        file.write(bomb.getvalue())
        file.seek(0)
        argv = [sys.executable, "-m", "chatterbox_server.decoder", "40"]
        decoded = subprocess.run(argv, stdin=file, capture_output=True, check=False)
    assert decoded.returncode == 0
    assert len(decoded.stdout) == 40 * RATE_HZ * 4
    with pytest.raises(recordings.NotARecording, match="lasts more than 30 s"):
        normalised(bomb.getvalue())


def test_silence_around_speech_is_cut_and_pauses_in_it_stay() -> None:
    quiet = np.zeros(3 * RATE_HZ, np.float32)
    voice = normalised(a_file(np.concatenate([quiet, speech(4), quiet[:RATE_HZ], speech(4), quiet])))
    assert voice.size / RATE_HZ == pytest.approx(9.2, abs=0.1)


@pytest.mark.parametrize("loud", [0.01, 0.2, 1.0])
def test_every_voice_is_equally_loud(loud: float) -> None:
    voice = normalised(a_file(speech(8, loud=loud), subtype="FLOAT"))
    assert np.sqrt(np.mean(voice**2)) == pytest.approx(recordings.LOUDNESS, rel=0.01)


def test_a_voice_with_a_loud_click_stays_quieter_and_does_not_clip() -> None:
    clicking = speech(8, loud=0.01)
    clicking[RATE_HZ] = 1.0
    assert np.abs(normalised(a_file(clicking))).max() == pytest.approx(recordings.PEAK, rel=0.01)


def test_both_channels_are_heard() -> None:
    left, right = speech(8), np.zeros(8 * RATE_HZ, np.float32)
    for channels in ([left, right], [right, left]):
        assert normalised(a_file(np.stack(channels, 1))).size == pytest.approx(8 * RATE_HZ, abs=RATE_HZ // 10)


def test_a_file_put_there_by_hand_is_checked_and_left_as_it_is(tmp_path: Path) -> None:
    good, short = tmp_path / "good.wav", tmp_path / "short.wav"
    good.write_bytes(a_file(SPOKEN))
    short.write_bytes(a_file(speech(1)))
    recordings.check(good, shortest_s=5, longest_s=30)
    assert good.read_bytes() == a_file(SPOKEN)
    for path, message in (
        (short, f"the recording lasts 1.00 s; {WANTED}"),
        (tmp_path / "gone.wav", "cannot read the recording: No such file or directory"),
        (tmp_path, "cannot read the recording: Is a directory"),
    ):
        with pytest.raises(recordings.NotARecording) as told:
            recordings.check(path, shortest_s=5, longest_s=30)
        assert str(told.value) == message


def test_a_pipe_is_no_recording_and_nobody_waits_for_it(tmp_path: Path) -> None:
    pipe = tmp_path / "voice.wav"
    os.mkfifo(pipe)
    with pytest.raises(recordings.NotARecording, match="the file is empty"):
        recordings.check(pipe, shortest_s=5, longest_s=30)
