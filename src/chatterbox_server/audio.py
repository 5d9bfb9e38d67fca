"""Samples into the bytes of a format, whole or as they come. Touches no file."""

import contextlib
import io
import struct
import weakref
from fractions import Fraction
from typing import Final, Literal, Protocol, get_args

import av
import numpy as np
from av.audio.stream import AudioStream
from av.codec.context import Flags
from numpy.typing import NDArray

Format = Literal["mp3", "opus", "aac", "flac", "wav", "pcm"]

FORMATS: Final[tuple[Format, ...]] = get_args(Format)

MEDIA_TYPES: Final[dict[Format, str]] = {
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "aac": "audio/aac",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
}

# FFmpeg's container and codec. AAC travels as ADTS, which has no header and so no length.
_CODECS: Final[dict[Format, tuple[str, str]]] = {
    "mp3": ("mp3", "libmp3lame"),
    "opus": ("ogg", "libopus"),
    "aac": ("adts", "aac"),
    "flac": ("flac", "flac"),
    "wav": ("wav", "pcm_s16le"),
}

# Of lossy formats; ample for one voice at 24 kHz (RFC 7587 calls 28 to 40 enough for Opus).
_BITS_PER_S: Final[dict[Format, int]] = {"mp3": 64_000, "opus": 48_000, "aac": 64_000}

# bitexact: no version of FFmpeg, no random serial; equal sound is equal bytes. flush_packets: hold nothing back.
_OPTIONS: Final = {"fflags": "+bitexact", "flush_packets": "1"}

_OPTIONS_OF: Final[dict[Format, dict[str, str]]] = {
    # A title page for music; it would only delay the first sound.
    "mp3": {"id3v2_version": "0"},
    # Microseconds; FFmpeg's own second of sound is a second of waiting.
    "opus": {"page_duration": "100000"},
}

_BLOCK: Final = 1 << 16


class NotSound(Exception):
    """The samples are no sound: the engine is at fault."""


class _Sink(Protocol):
    def write(self, content: bytes, /) -> int: ...


class _File(_Sink, Protocol):
    def seek(self, offset: int, whence: int = 0, /) -> int: ...
    def tell(self) -> int: ...


class _Pipe:
    """Takes bytes and cannot seek, so that no muxer counts on mending its header later."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, content: bytes, /) -> int:
        # A copy: what FFmpeg lends is its own again after this call.
        self._parts.append(bytes(content))
        return len(content)

    def take(self) -> bytes:
        taken = b"".join(self._parts)
        self._parts.clear()
        return taken


class _Codec:
    """One format of FFmpeg's, written to a sink that may seek (then headers hold lengths) or may not."""

    def __init__(self, audio_format: Format, sample_rate_hz: int, sink: _Sink, *, seeks: bool) -> None:
        container, codec = _CODECS[audio_format]
        options = _OPTIONS | _OPTIONS_OF.get(audio_format, {})
        if audio_format == "mp3" and not seeks:
            # The Xing frame says how long the whole is, which nobody knows yet.
            options |= {"write_xing": "0"}
        self._container = av.open(sink, "w", format=container, options=options)
        # The container and its streams hold each other, and megabytes of codec with them, until closed.
        self._close = weakref.finalize(self, self._container.close)
        stream = self._container.add_stream(codec, rate=sample_rate_hz, layout="mono")
        assert isinstance(stream, AudioStream)  # noqa: S101 (the codecs above are)
        stream.codec_context.flags |= Flags.bitexact
        if audio_format in _BITS_PER_S:
            stream.bit_rate = _BITS_PER_S[audio_format]
        self._stream = stream
        self._time_base = Fraction(1, sample_rate_hz)
        self._written = 0
        self._container.start_encoding()

    def write(self, whole: NDArray[np.int16]) -> None:
        for start in range(0, whole.size, _BLOCK):
            block = whole[np.newaxis, start : start + _BLOCK]
            frame = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
            frame.sample_rate = self._time_base.denominator
            frame.time_base = self._time_base
            frame.pts = self._written
            self._written += block.size
            self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._close()

    def drop(self) -> None:
        # The end of the file is written even so, and on a full disk that fails.
        with contextlib.suppress(OSError, av.error.FFmpegError):
            self._close()


class Encoder:
    """A stream of unknown length, encoded as its sound comes; memory does not grow with it.

    wav says 0xFFFFFFFF where lengths belong, flac says 0; mp3 and aac last up to 0.1 s longer than what went in,
    for only a header can tell a player what is padding. Dropping an encoder releases its codec.
    """

    def __init__(self, audio_format: Format, sample_rate_hz: int) -> None:
        self._pipe = _Pipe()
        by_hand = audio_format in {"wav", "pcm"}
        self._codec = None if by_hand else _Codec(audio_format, sample_rate_hz, self._pipe, seeks=False)
        if audio_format == "wav":
            self._pipe.write(_wav_header(sample_rate_hz, None))

    def encode(self, samples: NDArray[np.float32]) -> bytes:
        """What is ready to leave: all but the last frames, the headers before the first sound.

        Raises:
            NotSound: as the function ``encode``; what came before is unharmed.
        """
        whole = _sixteen_bit(samples)
        if self._codec is None:
            self._pipe.write(whole.tobytes())
        else:
            self._codec.write(whole)
        return self._pipe.take()

    def finish(self) -> bytes:
        """The rest; called once, and last."""
        if self._codec is not None:
            self._codec.finish()
        return self._pipe.take()


class Recorder:
    """A file of unknown length, encoded as its sound comes; memory does not grow with it.

    Finished, it has exact lengths in every header that has one, for a file can be mended.
    """

    def __init__(self, audio_format: Format, sample_rate_hz: int, file: _File) -> None:
        """``file`` is written to until ``finish`` or ``drop``; closing it is up to the caller."""
        self._file = file
        self._codec = None if audio_format == "pcm" else _Codec(audio_format, sample_rate_hz, file, seeks=True)

    def write(self, samples: NDArray[np.float32]) -> None:
        """Add ``samples``.

        Raises:
            NotSound: as the function ``encode``; what came before is unharmed.
            OSError: the file cannot be written to.
        """
        whole = _sixteen_bit(samples)
        if self._codec is None:
            self._file.write(whole.tobytes())
        else:
            self._codec.write(whole)

    def finish(self) -> None:
        """Write the rest, and the lengths; called once, and last. Raises ``OSError``."""
        if self._codec is not None:
            self._codec.finish()

    def drop(self) -> None:
        """Release the codec, whatever the file is now; after ``finish`` there is nothing left to do."""
        if self._codec is not None:
            self._codec.drop()


def encode(samples: NDArray[np.float32], sample_rate_hz: int, audio_format: Format) -> bytes:
    """Encode mono ``samples`` at once, with exact lengths in every header that has one.

    What lies beyond [-1, 1] is clipped. ``pcm`` is 16 bit, little-endian, no header.

    Raises:
        NotSound: no samples, more than one channel, or a sample that is not a finite number.
    """
    if audio_format == "wav":
        # By hand, as the pieces of a stream: FFmpeg takes as long for the file as all the rest of it.
        content = _sixteen_bit(samples).tobytes()
        return _wav_header(sample_rate_hz, len(content)) + content
    buffer = io.BytesIO()
    recorder = Recorder(audio_format, sample_rate_hz, buffer)
    try:
        recorder.write(samples)
        recorder.finish()
    finally:
        recorder.drop()
    return buffer.getvalue()


def _sixteen_bit(samples: NDArray[np.float32]) -> NDArray[np.int16]:
    if samples.ndim != 1 or samples.size == 0:
        msg = f"the engine returned samples of shape {samples.shape}"
        raise NotSound(msg)
    if not np.isfinite(samples).all():
        msg = f"the engine returned {np.count_nonzero(~np.isfinite(samples))} samples that are no number"
        raise NotSound(msg)
    # In place: memory that is touched for the first time costs more than the arithmetic.
    scaled = np.clip(samples, -1.0, 1.0)
    scaled *= 32767.0
    return np.rint(scaled, out=scaled).astype("<i2")


def _wav_header(sample_rate_hz: int, size: int | None) -> bytes:
    """As FFmpeg writes it before ``size`` bytes of 16 bit mono; ``None``: of a length that nobody knows yet."""
    length = b"\xff" * 4 if size is None else struct.pack("<I", size)
    whole = length if size is None else struct.pack("<I", size + 36)
    described = struct.pack("<IHHIIHH", 16, 1, 1, sample_rate_hz, 2 * sample_rate_hz, 2, 16)
    return b"RIFF" + whole + b"WAVEfmt " + described + b"data" + length
