"""Samples in, files out: every format decodes to the same sound."""

import io

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from chatterbox_server import audio


def a_tone(*, hertz: float, seconds: float, rate_hz: int = 24_000) -> NDArray[np.float32]:
    time_s = np.arange(round(seconds * rate_hz)) / rate_hz
    tone: NDArray[np.float32] = (0.5 * np.sin(2 * np.pi * hertz * time_s)).astype(np.float32)
    return tone


@pytest.mark.parametrize("audio_format", ["wav", "flac", "mp3", "opus"])
def test_a_file_decodes_to_the_sound_that_went_in(audio_format: audio.Format) -> None:
    tone = a_tone(hertz=440, seconds=7)

    decoded, rate_hz = soundfile.read(io.BytesIO(audio.encode(tone, 24_000, audio_format)), dtype="float32")

    assert decoded.ndim == 1
    # Lossy formats pad to whole frames, Opus at its own rate.
    assert decoded.size / rate_hz == pytest.approx(7.0, abs=0.1)
    spectrum = np.abs(np.fft.rfft(decoded))
    assert np.argmax(spectrum) * rate_hz / decoded.size == pytest.approx(440, abs=1)
    assert np.abs(decoded).max() == pytest.approx(0.5, abs=0.05)


def test_wav_and_flac_lose_nothing_but_the_sixteenth_bit() -> None:
    noise = np.random.default_rng(0).uniform(-1, 1, 5000).astype(np.float32)
    for audio_format in ("wav", "flac"):
        content = audio.encode(noise, 24_000, audio_format)
        decoded, _ = soundfile.read(io.BytesIO(content), dtype="float32")
        np.testing.assert_allclose(decoded, noise, atol=1e-4)


def test_pcm_is_sixteen_bit_little_endian_and_clipped() -> None:
    samples = np.array([0.0, 1.0, -1.0, 3.0, -3.0, 0.5], np.float32)
    assert audio.encode(samples, 24_000, "pcm").hex(" ", 2) == "0000 ff7f 0180 ff7f 0180 0040"


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
    for audio_format in audio.FORMATS:
        with pytest.raises(audio.NotSound, match=words):
            audio.encode(np.array(samples, np.float32), 24_000, audio_format)
