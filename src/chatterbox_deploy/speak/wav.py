"""WAV of one channel and 16 bits: what instances send, and what is kept of it. Touches no file."""

from __future__ import annotations

import io
import wave
from dataclasses import dataclass
from typing import Final

SAMPLE_BYTES: Final = 2
_STREAMED: Final = 0x3FFF_8000
"""Samples (12 hours at 24 kHz) beyond which a header's count is the placeholder of whoever did not know it yet."""


class NotWav(Exception):
    """It is no WAV of one channel and 16 bits, or not all of one."""


@dataclass(frozen=True, slots=True)
class Sound:
    sample_rate_hz: int
    pcm: bytes
    """Signed, little-endian."""

    @property
    def samples(self) -> int:
        return len(self.pcm) // SAMPLE_BYTES


def decode(content: bytes) -> Sound:
    """The sound of a WAV; a streamed one's header promises more than is there.

    Raises:
        NotWav: it is none, or it ends before its header says so.
    """
    try:
        with wave.open(io.BytesIO(content)) as reader:
            shape = (reader.getnchannels(), reader.getsampwidth())
            promised = reader.getnframes()
            sound = Sound(reader.getframerate(), reader.readframes(promised))
    except (wave.Error, EOFError) as error:
        msg = f"no WAV: {str(error) or 'it ends early'}"
        raise NotWav(msg) from None
    if shape != (1, SAMPLE_BYTES):
        msg = f"a WAV of {shape[0]} channels and {8 * shape[1]} bits, not of 1 and 16"
        raise NotWav(msg)
    if sound.samples < promised < _STREAMED:
        msg = f"a WAV cut short: {sound.samples} of {promised} samples"
        raise NotWav(msg)
    if not sound.samples:
        raise NotWav("a WAV without a sample")
    return sound


def encode(sound: Sound) -> bytes:
    """With exact lengths in its header."""
    stream = io.BytesIO()
    with wave.open(stream, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(SAMPLE_BYTES)
        writer.setframerate(sound.sample_rate_hz)
        writer.writeframes(sound.pcm)
    return stream.getvalue()
