"""The benchmark reads the length of a sound off the bytes that the server made."""

from __future__ import annotations

import numpy as np
import pytest

from chatterbox_deploy.bench import heard
from chatterbox_server import audio

SECONDS = 3.5
SOUND = (0.3 * np.sin(np.arange(round(24_000 * SECONDS)) * 0.05)).astype(np.float32)

# Lossy encoders put a frame or two of silence before and behind (an mp3 frame at 24 kHz is 24 ms, an aac one 43).
PADDING_S = {"mp3": 0.08, "aac": 0.13}


@pytest.mark.parametrize("audio_format", audio.FORMATS)
def test_of_a_whole_answer(audio_format: audio.Format) -> None:
    body = audio.encode(SOUND, 24_000, audio_format)

    found = heard.audio_s(body, audio_format)

    assert found is not None
    assert SECONDS <= found <= SECONDS + PADDING_S.get(audio_format, 1e-9)


@pytest.mark.parametrize("audio_format", audio.FORMATS)
def test_of_a_streamed_one(audio_format: audio.Format) -> None:
    encoder = audio.Encoder(audio_format, 24_000)
    body = encoder.encode(SOUND[:30_000]) + encoder.encode(SOUND[30_000:]) + encoder.finish()

    found = heard.audio_s(body, audio_format)

    if audio_format == "flac":
        assert found is None, "its header was written before anybody knew"
    else:
        assert found is not None
        assert SECONDS <= found <= SECONDS + PADDING_S.get(audio_format, 1e-9)


@pytest.mark.parametrize("audio_format", heard.STEADY)
def test_where_the_sound_begins(audio_format: heard.Format) -> None:
    encoder = audio.Encoder(audio_format, 24_000)
    body = encoder.encode(SOUND)

    found = heard.layout(body[:100], audio_format)

    assert found is not None
    assert found.bytes_per_s == 48_000
    assert (len(body) - found.begins_at) / found.bytes_per_s == pytest.approx(SECONDS)


def test_all_formats_of_the_server_are_known() -> None:
    assert set(heard.FORMATS) == set(audio.FORMATS)
