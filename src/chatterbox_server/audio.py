"""Samples into the bytes of a format. Touches no file."""

import io
from typing import Final, Literal, get_args

import numpy as np
import soundfile
from numpy.typing import NDArray

Format = Literal["mp3", "opus", "flac", "wav", "pcm"]

FORMATS: Final[tuple[Format, ...]] = get_args(Format)

MEDIA_TYPES: Final[dict[Format, str]] = {
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
}

# libsndfile's names; opus travels in an Ogg container.
_CONTAINERS: Final[dict[Format, tuple[str, str]]] = {
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "opus": ("OGG", "OPUS"),
    "flac": ("FLAC", "PCM_16"),
    "wav": ("WAV", "PCM_16"),
}

_BLOCK: Final = 1 << 16


class NotSound(Exception):
    """The samples are no sound: the engine is at fault."""


def encode(samples: NDArray[np.float32], sample_rate_hz: int, audio_format: Format) -> bytes:
    """Encode mono ``samples``; what lies beyond [-1, 1] is clipped. ``pcm`` is 16 bit, little-endian, no header.

    Raises:
        NotSound: no samples, more than one channel, or a sample that is not a finite number.
    """
    if samples.ndim != 1 or samples.size == 0:
        msg = f"the engine returned samples of shape {samples.shape}"
        raise NotSound(msg)
    if not np.isfinite(samples).all():
        msg = f"the engine returned {np.count_nonzero(~np.isfinite(samples))} samples that are no number"
        raise NotSound(msg)
    whole = (np.clip(samples, -1.0, 1.0) * 32767.0).round().astype("<i2")
    if audio_format == "pcm":
        return whole.tobytes()
    container, subtype = _CONTAINERS[audio_format]
    buffer = io.BytesIO()
    with soundfile.SoundFile(
        buffer, "w", samplerate=sample_rate_hz, channels=1, format=container, subtype=subtype
    ) as sink:
        # In blocks: libsndfile's lossy encoders keep a whole write on the stack.
        for start in range(0, whole.size, _BLOCK):
            sink.write(whole[start : start + _BLOCK])
    return buffer.getvalue()
