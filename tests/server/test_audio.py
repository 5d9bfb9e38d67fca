"""Samples in, files out: every format decodes to the same sound, whole and as a stream."""

import gc
import io
import struct
import weakref

import av
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from chatterbox_server import audio

RATE_HZ = 24_000

PADDED_S = {"mp3": 0.1, "aac": 0.1}
"""Formats whose streams end in a whole frame, and cannot say how much of it was asked for."""

PIECES_S = (0.7, 2.0, 0.03, 1.27)


def a_tone(*, hertz: float, seconds: float, rate_hz: int = RATE_HZ) -> NDArray[np.float32]:
    time_s = np.arange(round(seconds * rate_hz)) / rate_hz
    tone: NDArray[np.float32] = (0.5 * np.sin(2 * np.pi * hertz * time_s)).astype(np.float32)
    return tone


class Forward(soundfile.SoundFile):  # type: ignore[misc]
    """Read as a player reads a stream: libsndfile cannot seek in flac of unknown length."""

    def seekable(self) -> bool:
        return False


def decoded(content: bytes, audio_format: audio.Format) -> NDArray[np.float32]:
    """By libsndfile, which shares no code with FFmpeg; it has no AAC."""
    if audio_format == "pcm":
        return np.frombuffer(content, "<i2").astype(np.float32) / 32767
    if audio_format == "aac":
        with av.open(io.BytesIO(content), "r") as container:
            return np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    with Forward(io.BytesIO(content)) as sound:
        assert (sound.samplerate, sound.channels) == (RATE_HZ, 1)
        blocks = []
        while (block := sound.read(1 << 16, dtype="float32")).size:
            blocks.append(block)
        return np.concatenate(blocks)


def streamed(samples: NDArray[np.float32], audio_format: audio.Format) -> list[bytes]:
    """What each of ``PIECES_S`` gives out, and then the end."""
    encoder = audio.Encoder(audio_format, RATE_HZ)
    ends = np.cumsum([round(seconds * RATE_HZ) for seconds in PIECES_S])
    return [*(encoder.encode(piece) for piece in np.split(samples, ends)[:-1]), encoder.finish()]


@pytest.mark.parametrize("audio_format", audio.FORMATS)
@pytest.mark.parametrize("way", ["whole", "stream"])
def test_what_comes_out_decodes_to_the_sound_that_went_in(way: str, audio_format: audio.Format) -> None:
    tone = a_tone(hertz=440, seconds=4)

    content = audio.encode(tone, RATE_HZ, audio_format) if way == "whole" else b"".join(streamed(tone, audio_format))

    sound = decoded(content, audio_format)
    padded_s = PADDED_S.get(audio_format, 0.0) if (way, audio_format) != ("whole", "mp3") else 0.0
    assert 4.0 <= sound.size / RATE_HZ <= 4.0 + padded_s
    spectrum = np.abs(np.fft.rfft(sound))
    assert np.argmax(spectrum) * RATE_HZ / sound.size == pytest.approx(440, abs=1)
    assert np.abs(sound).max() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("audio_format", ["wav", "flac", "pcm"])
def test_lossless_formats_lose_nothing_but_the_sixteenth_bit(audio_format: audio.Format) -> None:
    noise = np.random.default_rng(0).uniform(-1, 1, RATE_HZ * 4).astype(np.float32)
    for content in (audio.encode(noise, RATE_HZ, audio_format), b"".join(streamed(noise, audio_format))):
        np.testing.assert_allclose(decoded(content, audio_format), noise, atol=1e-4)


@pytest.mark.parametrize("audio_format", ["mp3", "opus"])
def test_lossy_formats_begin_where_the_sound_begins(audio_format: audio.Format) -> None:
    click = np.zeros(RATE_HZ, np.float32)
    click[RATE_HZ // 2 :] = 0.5
    sound = decoded(audio.encode(click, RATE_HZ, audio_format), audio_format)
    assert np.argmax(np.abs(sound) > 0.25) == pytest.approx(RATE_HZ // 2, abs=0.002 * RATE_HZ)


@pytest.mark.parametrize("audio_format", audio.FORMATS)
def test_the_first_sentence_leaves_when_it_has_been_spoken(audio_format: audio.Format) -> None:
    first, *_ = streamed(a_tone(hertz=440, seconds=4), audio_format)
    assert decoded(first, audio_format).size / RATE_HZ == pytest.approx(PIECES_S[0], abs=0.2)


@pytest.mark.parametrize("audio_format", audio.FORMATS)
def test_a_long_stream_comes_out_as_it_goes_in(audio_format: audio.Format) -> None:
    """No second is held back, so memory does not grow with the length."""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, RATE_HZ).astype(np.float32)
    encoder = audio.Encoder(audio_format, RATE_HZ)
    sizes = [len(encoder.encode(noise)) for _ in range(300)]
    usual = np.median(sizes)
    assert 0.5 * usual < min(sizes[1:])
    assert max(sizes[1:]) < 2 * usual
    assert len(encoder.finish()) < usual


def test_a_stream_of_wav_says_that_it_does_not_know_its_length() -> None:
    content = b"".join(streamed(a_tone(hertz=440, seconds=4), "wav"))
    assert struct.unpack("<4sI4s", content[:12]) == (b"RIFF", 0xFFFFFFFF, b"WAVE")
    assert struct.unpack("<4sI", content[36:44]) == (b"data", 0xFFFFFFFF)


def test_a_whole_wav_and_a_whole_flac_say_how_long_they_are() -> None:
    tone = a_tone(hertz=440, seconds=4)
    wav = audio.encode(tone, RATE_HZ, "wav")
    assert struct.unpack("<I", wav[4:8]) == (len(wav) - 8,)
    assert struct.unpack("<4sI", wav[36:44]) == (b"data", 2 * tone.size)
    with soundfile.SoundFile(io.BytesIO(audio.encode(tone, RATE_HZ, "flac"))) as flac:
        assert flac.frames == tone.size


@pytest.mark.parametrize("audio_format", audio.FORMATS)
def test_equal_sounds_are_equal_bytes_and_name_no_version(audio_format: audio.Format) -> None:
    tone = a_tone(hertz=440, seconds=4)
    assert streamed(tone, audio_format) == streamed(tone, audio_format)
    whole = audio.encode(tone, RATE_HZ, audio_format)
    assert whole == audio.encode(tone, RATE_HZ, audio_format)
    versions = [".".join(map(str, version)).encode() for version in av.library_versions.values()]
    assert not any(version in whole for version in versions)


@pytest.mark.parametrize("audio_format", audio.FORMATS)
def test_a_client_that_hangs_up_leaves_no_codec_behind(audio_format: audio.Format) -> None:
    gc.disable()
    try:
        encoder = audio.Encoder(audio_format, RATE_HZ)
        encoder.encode(a_tone(hertz=440, seconds=1))
        # The muxer holds the pipe for as long as it lives itself.
        pipe = weakref.ref(encoder._pipe)
        del encoder
        assert pipe() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("audio_format", audio.FORMATS)
def test_a_stream_without_a_sound_ends_without_one(audio_format: audio.Format) -> None:
    assert len(audio.Encoder(audio_format, RATE_HZ).finish()) < 10_000


@pytest.mark.parametrize("audio_format", audio.FORMATS)
def test_a_single_sample_is_a_sound(audio_format: audio.Format) -> None:
    one = np.array([0.5], np.float32)
    assert decoded(audio.encode(one, RATE_HZ, audio_format), audio_format).size >= 1


def test_pcm_is_sixteen_bit_little_endian_and_clipped() -> None:
    samples = np.array([0.0, 1.0, -1.0, 3.0, -3.0, 0.5], np.float32)
    assert audio.encode(samples, RATE_HZ, "pcm").hex(" ", 2) == "0000 ff7f 0180 ff7f 0180 0040"


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ([0.0, np.nan], "1 samples that are no number"),
        ([np.inf, -np.inf], "2 samples that are no number"),
        ([], r"samples of shape \(0,\)"),
        ([[0.0], [0.0]], r"samples of shape \(2, 1\)"),
    ],
)
def test_what_is_no_sound_is_never_sent_as_sound(samples: list[float], words: str) -> None:
    wrong = np.array(samples, np.float32)
    for audio_format in audio.FORMATS:
        with pytest.raises(audio.NotSound, match=words):
            audio.encode(wrong, RATE_HZ, audio_format)
        encoder = audio.Encoder(audio_format, RATE_HZ)
        with pytest.raises(audio.NotSound, match=words):
            encoder.encode(wrong)
        tone = a_tone(hertz=440, seconds=1)
        rest = encoder.encode(tone) + encoder.finish()
        assert decoded(rest, audio_format).size >= tone.size


@pytest.mark.parametrize("seconds", [1 / RATE_HZ, 0.5, 4.0])
def test_a_wav_by_hand_is_ffmpegs_byte_for_byte(seconds: float) -> None:
    tone = a_tone(hertz=440, seconds=seconds)
    file, pipe = io.BytesIO(), audio._Pipe()
    recorder = audio.Recorder("wav", RATE_HZ, file)
    recorder.write(tone)
    recorder.finish()
    codec = audio._Codec("wav", RATE_HZ, pipe, seeks=False)
    codec.write(audio._sixteen_bit(tone))
    codec.finish()
    encoder = audio.Encoder("wav", RATE_HZ)

    assert audio.encode(tone, RATE_HZ, "wav") == file.getvalue()
    assert encoder.encode(tone) + encoder.finish() == pipe.take()
