"""What came back, as a listener has it: how long the sound is, and whether it stalled on its way. Asks nobody.

Lengths are read off the bytes themselves (samples, frames, granules), never estimated from the text.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from collections.abc import Sequence

Format = Literal["wav", "pcm", "mp3", "opus", "aac", "flac"]
FORMATS: tuple[Format, ...] = get_args(Format)

STEADY: tuple[Format, ...] = ("wav", "pcm")
"""Of which each byte is as much sound as the next, so that it is known what has come at any moment."""

PCM_BYTES_PER_S = 24_000 * 2
"""OpenAI's pcm: 16 bit, mono, 24 kHz."""

_KBIT_PER_S = {
    3: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_KBIT_PER_S[0] = _KBIT_PER_S[2]
_MPEG_HZ = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
_ADTS_HZ = (96_000, 88_200, 64_000, 48_000, 44_100, 32_000, 24_000, 22_050, 16_000, 12_000, 11_025, 8_000, 7_350)
_OPUS_HZ = 48_000


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the sound is in a body of a steady format."""

    begins_at: int
    """Byte of the first sample."""
    bytes_per_s: int


@dataclass(frozen=True, slots=True)
class Playback:
    """How it was to listen from the first sound on, at the pace of the sound, without waiting for more to come."""

    stalls: int
    """How often nothing was left to play before the end had come."""
    stalled_s: float
    longest_gap_s: float
    """Between two arrivals of sound."""


def layout(head: bytes, audio_format: Format) -> Layout | None:
    """Where the sound begins, from the first bytes of a body; ``None`` until enough has come, or for good."""
    if audio_format == "pcm":
        return Layout(0, PCM_BYTES_PER_S)
    if audio_format != "wav" or head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        return None
    at, bytes_per_s = 12, 0
    while len(head) >= at + 8:
        name, size = struct.unpack_from("<4sI", head, at)
        if name == b"data":
            return Layout(at + 8, bytes_per_s) if bytes_per_s else None
        if name == b"fmt " and len(head) >= at + 20:
            (bytes_per_s,) = struct.unpack_from("<I", head, at + 16)
        at += 8 + size + size % 2
    return None


def audio_s(body: bytes, audio_format: Format) -> float | None:
    """Seconds of sound in a whole body; ``None`` where its bytes do not say (a streamed flac), 0 if there is none."""
    match audio_format:
        case "wav" | "pcm":
            found = layout(body[:4096], audio_format)
            return None if found is None else max(0, len(body) - found.begins_at) / found.bytes_per_s
        case "mp3":
            return _mp3_s(body)
        case "aac":
            return _adts_s(body)
        case "opus":
            return _ogg_opus_s(body)
        case "flac":
            return _flac_s(body)


def playback(arrivals: Sequence[tuple[float, float]]) -> Playback:
    """``arrivals``: when sound came (seconds on any clock), and how many seconds of it there were by then."""
    if not arrivals:
        return Playback(0, 0.0, 0.0)
    began_s, _ = arrivals[0]
    stalls, stalled_s, longest_gap_s = 0, 0.0, 0.0
    for (before_s, had_s), (now_s, _) in pairwise(arrivals):
        longest_gap_s = max(longest_gap_s, now_s - before_s)
        # What had come by then lasts until here.
        empty_at_s = began_s + stalled_s + had_s
        # A sound card holds a few milliseconds of its own: less than that nobody hears.
        if now_s > empty_at_s + 0.01:
            stalls += 1
            stalled_s += now_s - empty_at_s
    return Playback(stalls, stalled_s, longest_gap_s)


def _mp3_s(body: bytes) -> float:
    """Frames of MPEG layer III, each 1,152 samples (MPEG-1) or 576; the encoder's own 50 ms of padding included."""
    at, seconds = _behind_id3(body), 0.0
    while at + 4 <= len(body):
        first, second, third = body[at], body[at + 1], body[at + 2]
        version, row, rate = second >> 3 & 3, third >> 4, third >> 2 & 3
        if first != 0xFF or second & 0xE6 != 0xE2 or version == 1 or row in (0, 15) or rate == 3:
            at += 1
            continue
        samples, hz = (1152 if version == 3 else 576), _MPEG_HZ[version][rate]
        length = samples // 8 * _KBIT_PER_S[version][row] * 1000 // hz + (third >> 1 & 1)
        # The first frame may be a table of contents (Xing, Info), which is silent.
        if not (seconds == 0 and {b"Xing", b"Info"} & {body[at + skip : at + skip + 4] for skip in (13, 21, 36)}):
            seconds += samples / hz
        at += length
    return seconds


def _behind_id3(body: bytes) -> int:
    if body[:3] != b"ID3" or len(body) < 10:
        return 0
    size = 0
    for seven_bits in body[6:10]:
        size = size << 7 | seven_bits
    return 10 + size


def _adts_s(body: bytes) -> float:
    """Frames of ADTS, 1,024 samples each."""
    at, seconds = 0, 0.0
    while at + 7 <= len(body):
        rate, length = body[at + 2] >> 2 & 15, (body[at + 3] & 3) << 11 | body[at + 4] << 3 | body[at + 5] >> 5
        if body[at] != 0xFF or body[at + 1] & 0xF6 != 0xF0 or rate >= len(_ADTS_HZ) or length < 7:
            at += 1
            continue
        seconds += 1024 / _ADTS_HZ[rate]
        at += length
    return seconds


def _ogg_opus_s(body: bytes) -> float | None:
    """The last page says how many samples there are by its end, at 48 kHz (RFC 7845, section 4)."""
    head, last = body.find(b"OpusHead"), body.rfind(b"OggS")
    if head < 0 or len(body) < head + 12 or len(body) < last + 14:
        return None
    skipped = int.from_bytes(body[head + 10 : head + 12], "little")
    samples = int.from_bytes(body[last + 6 : last + 14], "little", signed=True)
    return max(0, samples - skipped) / _OPUS_HZ


def _flac_s(body: bytes) -> float | None:
    """STREAMINFO holds the rate in 20 bits and the samples in 36; 0 of these is unknown (RFC 9639, section 8.2)."""
    if body[:4] != b"fLaC" or len(body) < 26:
        return None
    word = int.from_bytes(body[18:26], "big")
    hz, samples = word >> 44, word & (1 << 36) - 1
    return samples / hz if hz and samples else None
