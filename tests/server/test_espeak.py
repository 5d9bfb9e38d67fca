"""The offline engine: real speech, honest about what it is."""

import dataclasses
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from chatterbox_server import engines
from chatterbox_server.engine import EngineError, Errand, Refused
from chatterbox_server.engines import espeak
from chatterbox_server.settings import Settings
from server.fakes import an_utterance

needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")


@needs_espeak
def test_it_speaks_and_says_what_it_is() -> None:
    engine = engines.load(Settings(engine="espeak"))

    samples = engine.synthesize(an_utterance("Hello there, this is a short sentence."), Errand())

    assert 1.0 < samples.size / engine.sample_rate_hz < 6.0
    assert samples.dtype == np.float32
    assert 0.1 < np.abs(samples).max() <= 1.0
    assert engine.facts()["engine"] == "offline stand-in: espeak-ng, not Chatterbox"


@needs_espeak
def test_speed_language_and_text_change_the_sound_and_the_seed_does_not() -> None:
    engine = espeak.load()
    plain = an_utterance("One two three four five.")
    sound = engine.synthesize(plain, Errand())

    assert engine.synthesize(dataclasses.replace(plain, speed=2.0), Errand()).size < 0.7 * sound.size
    assert not np.array_equal(engine.synthesize(dataclasses.replace(plain, language="de"), Errand()), sound)
    np.testing.assert_array_equal(engine.synthesize(dataclasses.replace(plain, seed=9), Errand()), sound)


@needs_espeak
def test_text_is_text_whatever_it_looks_like() -> None:
    engine = espeak.load()
    for text in ("--version", "-f /etc/passwd", "$(id); `id`", "<speak>x</speak>", "größe 漢字 🙂"):
        assert engine.synthesize(an_utterance(text), Errand()).size > 1000, text


@needs_espeak
def test_a_recording_is_refused() -> None:
    with pytest.raises(Refused, match=r"cannot imitate the recording anna\.wav"):
        espeak.load().synthesize(an_utterance("x", voice=Path("/voices/anna.wav")), Errand())


def test_without_the_program_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(EngineError, match="cannot find espeak-ng: apt-get install espeak-ng"):
        engines.load(Settings(engine="espeak"))


def test_a_streamed_wav_is_as_long_as_it_is_whatever_its_header_says() -> None:
    head = struct.pack("<HHIIHH", 1, 1, 22_050, 44_100, 2, 16)
    wav = b"RIFF\x24\xf0\xff\x7fWAVEfmt " + struct.pack("<I", 16) + head
    wav += b"LIST\x03\x00\x00\x00abc\x00" + b"data\x00\xf0\xff\x7f" + struct.pack("<3h", 0, 16384, -32768)

    samples, rate_hz = espeak.decode(wav + b"\x01")

    assert rate_hz == 22_050
    np.testing.assert_array_equal(samples, np.array([0, 0.5, -1], np.float32))


@pytest.mark.parametrize("content", [b"", b"RIFF", b"RIFF0000WAVE", b"RIFF0000WAVEdata\x00\x00\x00\x00"])
def test_no_wav_is_an_error_and_no_silence(content: bytes) -> None:
    with pytest.raises(EngineError):
        espeak.decode(content)


def test_a_wav_of_another_kind_is_an_error_and_no_noise() -> None:
    head = struct.pack("<HHIIHH", 1, 2, 22_050, 88_200, 4, 16)
    wav = b"RIFF\x30\x00\x00\x00WAVEfmt " + struct.pack("<I", 16) + head + b"data\x04\x00\x00\x00\x00\x00\x00\x00"
    with pytest.raises(EngineError, match="espeak-ng returned no WAV of one channel and 16 bits"):
        espeak.decode(wav)
