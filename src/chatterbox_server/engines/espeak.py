"""The offline stand-in: real speech from the espeak-ng program, without GPU or weights. It is not Chatterbox."""

import io
import shutil
import subprocess
import wave
from collections.abc import Mapping
from typing import Final

import numpy as np
import soxr
from numpy.typing import NDArray

from chatterbox_server.engine import EngineError, Errand, Refused, Sampling, Unable, Utterance

WORDS_PER_MINUTE: Final = 175
"""espeak-ng's own pace; it accepts 80 to 450."""

HANG_S: Final = 600
"""espeak-ng speaks an hour of sound in seconds; this is a guard, not a limit."""


class EspeakEngine:
    """One process of espeak-ng per utterance. ``sampling`` and ``seed`` mean nothing to it: it never varies."""

    name = "espeak"
    model = "espeak-ng"
    places = 1
    # OpenAI's pcm has no header and means 24 kHz, and Opus knows no 22,050 Hz, so this engine resamples.
    sample_rate_hz = 24_000
    longest_piece = 1_000
    tokens_per_audio_s: float | None = None
    speeds = (0.5, 2.5)
    defaults = Sampling()
    frees_beside = True
    broken = None

    def __init__(self, program: str, version: str, languages: tuple[str, ...]) -> None:
        self._program = program
        self._version = version
        self.languages = languages

    def facts(self) -> Mapping[str, object]:
        return {"engine": "offline stand-in: espeak-ng, not Chatterbox", "version": self._version, "devices": []}

    def memory(self) -> None:
        """It has no GPU."""

    def free(self) -> None:
        """It caches nothing."""

    def synthesize(self, utterance: Utterance, errand: Errand) -> NDArray[np.float32]:
        if utterance.voice is not None:
            reason = f"espeak-ng cannot imitate the recording {utterance.voice.name}; only 'default' speaks"
            raise Refused(reason, param="voice")
        pace = str(round(WORDS_PER_MINUTE * utterance.speed))
        with errand.at_work():
            said = _run(
                (self._program, "--stdin", "--stdout", "-b", "1", "-v", utterance.language, "-s", pace),
                utterance.text,
            )
            samples, sample_rate_hz = decode(said)
            resampled: NDArray[np.float32] = soxr.resample(samples, sample_rate_hz, self.sample_rate_hz)
        return resampled


def load() -> EspeakEngine:
    """Find espeak-ng and ask what it speaks.

    Raises:
        Unable: there is none.
    """
    program = shutil.which("espeak-ng")
    if program is None:
        msg = "cannot find espeak-ng: apt-get install espeak-ng"
        raise Unable(msg)
    version = _run((program, "--version"), "").decode().split("Data at")[0].strip()
    # Columns: priority, language, age/gender, name, file, other languages.
    rows = _run((program, "--voices"), "").decode().splitlines()[1:]
    languages = sorted({row.split()[1] for row in rows if row.split()} - {"en"})
    return EspeakEngine(program, version, ("en", *languages))


def decode(wav: bytes) -> tuple[NDArray[np.float32], int]:
    """Samples and their rate. A streamed WAV's header promises 2 GB; what is there is read.

    Raises:
        EngineError: it is no WAV of one channel and 16 bits.
    """
    try:
        with wave.open(io.BytesIO(wav)) as sound:
            shape, sample_rate_hz = (sound.getnchannels(), sound.getsampwidth()), sound.getframerate()
            frames = sound.readframes(sound.getnframes())
    except (wave.Error, EOFError) as error:
        msg = f"espeak-ng returned no WAV: {str(error) or 'it ends early'}"
        raise EngineError(msg) from None
    if shape != (1, 2):
        raise EngineError("espeak-ng returned no WAV of one channel and 16 bits")
    whole = np.frombuffer(frames, "<i2", count=len(frames) // 2)
    return whole.astype(np.float32) / 32768.0, sample_rate_hz


def _run(argv: tuple[str, ...], text: str) -> bytes:
    try:
        done = subprocess.run(argv, input=text.encode(), capture_output=True, check=False, timeout=HANG_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        msg = f"cannot run espeak-ng: {error}"
        raise EngineError(msg) from None
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split()) or "no output"
        msg = f"cannot run espeak-ng: exit status {done.returncode}: {said}"
        raise EngineError(msg)
    return done.stdout
