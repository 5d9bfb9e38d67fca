"""What somebody recorded, as the voice that an engine can imitate, or the reason why it cannot. Keeps nothing."""

import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from shutil import copyfileobj
from typing import IO, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from chatterbox_server import decoder

SAMPLE_RATE_HZ: Final = decoder.SAMPLE_RATE_HZ

SHORTEST_S: Final = 5.0
LONGEST_S: Final = 30.0
"""Of an upload: the models hear 6 to 15 s of it, and a voice is read again by each engine."""

SILENCE_S: Final = 10.0
"""So much silence may lie before and behind the longest recording; what comes after is not decoded."""

LOUDNESS: Final = 0.1
"""Root mean square that a voice is brought to: -20 dBFS, as speech is commonly levelled; engines copy loudness."""

PEAK: Final = 0.97
"""Loudest sample: where a peak would clip, the whole stays quieter than ``LOUDNESS``."""

_SILENT: Final = 1e-3
"""Root mean square of a fiftieth of a second: -60 dBFS, below the noise of a quiet room."""

_FADES: Final = 0.01
"""Quieter than the loudest by this (-40 dB) is the silence around speech."""

_MARGIN_S: Final = 0.1

_HANG_S: Final = 60

log = logging.getLogger(__name__)


class NotARecording(Exception):
    """It cannot be a voice; says why, for whoever sent it."""


def normalise(source: BinaryIO | Path, *, shortest_s: float, longest_s: float) -> NDArray[np.float32]:
    """Mono samples at ``SAMPLE_RATE_HZ``, without silence around them and about as loud as every other voice.

    ``source`` is any common format, from anybody: it is decoded in a process of its own, within limits.

    Raises:
        NotARecording: no sound, damaged, silent, shorter or longer than it may be.
    """
    enough_s = longest_s + SILENCE_S
    samples = _decoded(source, enough_s)
    wanted = f"send {shortest_s:g} to {longest_s:g} s of speech"
    if samples.size >= round(enough_s * SAMPLE_RATE_HZ):
        msg = f"the recording lasts more than {longest_s:g} s; {wanted}"
        raise NotARecording(msg)
    speech = _trimmed(samples)
    length_s = speech.size / SAMPLE_RATE_HZ
    if not shortest_s <= length_s <= longest_s:
        trimmed = "" if samples.size - speech.size < SAMPLE_RATE_HZ // 10 else " without the silence around it"
        msg = f"the recording lasts {length_s:.2f} s{trimmed}; {wanted}"
        raise NotARecording(msg)
    return _levelled(speech)


def check(path: Path, *, shortest_s: float, longest_s: float) -> None:
    """Whether a file that somebody put there by hand can be a voice; changes nothing.

    Raises:
        NotARecording: as ``normalise``.
    """
    normalise(path, shortest_s=shortest_s, longest_s=longest_s)


def _decoded(source: BinaryIO | Path, longest_s: float) -> NDArray[np.float32]:
    if isinstance(source, Path):
        try:
            # Not to wait for ever for the other end of a FIFO.
            with open(source, "rb", opener=_at_once) as file:
                return _decoded_file(file, longest_s)
        except OSError as error:
            msg = f"cannot read the recording: {error.strerror}"
            raise NotARecording(msg) from None
    # A real file, for formats are read back and forth, and the decoder has its stdin only.
    with tempfile.TemporaryFile() as file:
        copyfileobj(source, file)
        file.seek(0)
        return _decoded_file(file, longest_s)


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _decoded_file(file: IO[bytes], longest_s: float) -> NDArray[np.float32]:
    if not os.fstat(file.fileno()).st_size:
        raise NotARecording("the file is empty")
    argv = (sys.executable, "-P", "-m", decoder.__name__, str(longest_s))
    # A pool of threads for linear algebra would take address space, which the decoder has little of.
    environ = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    try:
        done = subprocess.run(argv, stdin=file, capture_output=True, check=False, timeout=_HANG_S, env=environ)
    except subprocess.TimeoutExpired:
        said, status = "no end", None
    else:
        said, status = done.stderr.decode(errors="replace").strip().rpartition("\n")[2], done.returncode
    if status == decoder.REFUSED:
        raise NotARecording(done.stdout.decode())
    if status != 0:
        log.warning("cannot decode a recording: exit status %s: %s", status, said or "no output")
        raise NotARecording("the file takes more memory or time to decode than a recording may")
    return np.frombuffer(done.stdout, "<f4").astype(np.float32)


def _trimmed(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    frame = SAMPLE_RATE_HZ // 50
    # 64 bit, for the square of a huge sample is no 32-bit number.
    power = np.add.reduceat(samples.astype(np.float64) ** 2, np.arange(0, samples.size, frame)) / frame
    loud = np.sqrt(power)
    if loud.max() < _SILENT:
        raise NotARecording("the recording is silent")
    speaks = np.flatnonzero(loud >= max(_SILENT, _FADES * loud.max()))
    margin = round(_MARGIN_S * SAMPLE_RATE_HZ)
    return samples[max(0, speaks[0] * frame - margin) : (speaks[-1] + 1) * frame + margin]


def _levelled(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    exact = samples.astype(np.float64)
    gain = min(LOUDNESS / np.sqrt(np.mean(exact**2)), PEAK / np.abs(exact).max())
    levelled: NDArray[np.float32] = (exact * gain).astype(np.float32)
    return levelled
