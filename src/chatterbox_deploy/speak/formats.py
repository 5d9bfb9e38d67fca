"""The files that a book can become, in FFmpeg's words. Writes none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Format:
    """FFmpeg's container and codec."""

    container: str
    codec: str
    bit_rate: int | None = None
    """Of lossy codecs; ample for one voice at 24 kHz (RFC 7587 calls 28 to 40 kb/s enough for Opus)."""
    options: tuple[tuple[str, str], ...] = ()
    """Of the container."""
    coder: tuple[tuple[str, str], ...] = ()
    """Options of the codec."""
    comments: bool = False
    """Whether chapters are Vorbis comments, which FFmpeg 8 writes a second late for Opus and not at all for FLAC."""


# "M4B " makes players remember the place; faststart puts the index first, for players that stream. The fast coder takes
# a seventh of the time of FFmpeg's own choice, and at this bit rate is the nearer to what went in.
_MP4: Final = Format(
    "ipod", "aac", 64_000, (("brand", "M4B "), ("movflags", "+faststart")), coder=(("aac_coder", "fast"),)
)

FORMATS: Final[Mapping[str, Format]] = {
    ".m4b": _MP4,
    ".m4a": _MP4,
    ".mp3": Format("mp3", "libmp3lame", 64_000, (("id3v2_version", "3"),)),
    ".opus": Format("ogg", "libopus", 40_000, comments=True),
    ".flac": Format("flac", "flac", comments=True),
    # More than 4 GB, a day of sound, needs the longer header.
    ".wav": Format("wav", "pcm_s16le", options=(("rf64", "auto"),)),
}
"""By suffix of the file's name. A WAV has no chapters."""
