"""Decodes one untrusted file from stdin to mono samples on stdout, in a process of its own. Opens nothing else.

A few bytes can tell FFmpeg to reserve gigabytes, and a hole in one of its demuxers would end whoever called it.
So ``recordings`` runs this module as a program: within its limits the worst file ends only this process.
"""

import os
import resource
import sys
from typing import Final

import av
import av.subtitles.stream  # PyAV would import it when it opens a file, and then no more can be opened
import numpy as np
import soxr
from numpy.typing import NDArray

SAMPLE_RATE_HZ: Final = 24_000

REFUSED: Final = 3
"""Exit status after which stdout holds the reason, in words for whoever sent the file."""

MEMORY_BYTES: Final = 1 << 30
CPU_S: Final = 20

CHANNELS: Final = 8
RATES_HZ: Final = (8_000, 192_000)

# FFmpeg's names. Nothing that reads playlists, other files or pictures.
DEMUXERS: Final = ("aac", "aiff", "flac", "matroska", "mov", "mp3", "ogg", "wav")
DECODERS: Final = (
    *("aac", "alac", "flac", "libopus", "mp3", "mp3float", "opus", "vorbis"),
    *("pcm_alaw", "pcm_f32le", "pcm_f64le", "pcm_mulaw", "pcm_s16be", "pcm_s16le", "pcm_s24be", "pcm_s24le"),
    *("pcm_s32be", "pcm_s32le", "pcm_u8"),
)

_OPTIONS: Final = {
    "format_whitelist": ",".join(DEMUXERS),
    "codec_whitelist": ",".join(DECODERS),
    "protocol_whitelist": "",
}

_KNOWN: Final = "wav, flac, ogg, mp3, m4a, webm"

# These say in their header how long they are, so a file that was cut off can be told.
_SAY_THEIR_LENGTH: Final = ("aiff", "flac", "mov", "wav")


class Refused(Exception):
    """Why the file cannot be used."""


def main() -> None:
    """``decoder SECONDS``: stop after so many seconds of sound, whatever the file claims."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    # Only 0, 1 and 2 are left: no file, no socket can be opened from here on.
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    try:
        samples = decode(longest_s=float(sys.argv[1]))
    except Refused as error:
        sys.stdout.write(str(error))
        sys.exit(REFUSED)
    sys.stdout.buffer.write(samples.astype("<f4").tobytes())


def decode(*, longest_s: float) -> NDArray[np.float32]:
    """The first ``longest_s`` seconds of the sound on stdin, at ``SAMPLE_RATE_HZ``.

    Raises:
        Refused: it is no sound, or damaged.
    """
    try:
        container = av.open(os.fdopen(0, "rb"), "r", options=_OPTIONS, metadata_errors="ignore")
    except av.error.MemoryError:
        # Not for us to explain: it ends the process, and the caller speaks for it.
        raise
    except av.error.FFmpegError:
        reason = f"the file is no sound in a format that is read here ({_KNOWN})"
        raise Refused(reason) from None
    with container:
        if not container.streams.audio:
            raise Refused("the file has no sound in it")
        mono, rate_hz, claimed_s = _listen(container, longest_s)
    if not np.isfinite(mono).all():
        raise Refused("the recording has samples that are no number")
    if claimed_s - mono.size / rate_hz > 1.0 and mono.size < longest_s * rate_hz:
        reason = f"the file is cut off: it says {claimed_s:.1f} s, and holds {mono.size / rate_hz:.1f} s"
        raise Refused(reason)
    resampled: NDArray[np.float32] = soxr.resample(mono, rate_hz, SAMPLE_RATE_HZ)
    return resampled[: round(longest_s * SAMPLE_RATE_HZ)]


def _listen(container: av.container.InputContainer, longest_s: float) -> tuple[NDArray[np.float32], int, float]:
    """Mono samples, their rate, and how many seconds the header claims (0.0 where it claims nothing)."""
    stream = container.streams.audio[0]
    if stream.codec_context.name not in DECODERS:
        reason = f"the file holds sound as {stream.codec_context.name}, which is not read here"
        raise Refused(reason)
    stream.codec_context.thread_count = 1
    rate_hz = stream.codec_context.sample_rate
    if not RATES_HZ[0] <= rate_hz <= RATES_HZ[1]:
        reason = f"the recording has {rate_hz} samples a second; {RATES_HZ[0]} to {RATES_HZ[1]} are read"
        raise Refused(reason)
    if not 1 <= stream.codec_context.channels <= CHANNELS:
        reason = f"the recording has {stream.codec_context.channels} channels; 1 to {CHANNELS} are read"
        raise Refused(reason)
    to_float = av.AudioResampler(format="fltp")
    blocks: list[NDArray[np.float32]] = []
    heard = packets = damaged = 0
    for packet in container.demux(stream):
        packets += 1
        try:
            for frame in packet.decode():
                for planes in to_float.resample(frame):
                    blocks.append(planes.to_ndarray().mean(axis=0))
                    heard += planes.samples
        except av.error.MemoryError:
            raise
        # Damaged, or of another rate or shape than what came before.
        except ValueError:
            damaged += 1
        if heard > longest_s * rate_hz:
            break
    if damaged * 10 > packets:
        raise Refused("the file is damaged")
    if not heard:
        raise Refused("the file has no sound in it")
    claims = container.format.name.split(",")[0] in _SAY_THEIR_LENGTH and container.duration is not None
    return np.concatenate(blocks), rate_hz, (container.duration or 0) / av.time_base if claims else 0.0


if __name__ == "__main__":
    main()
