"""Pieces of sound into one: less silence, soft edges, a pause between. What is no sound passes as it is."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

QUIET: Final = 10 ** (-46 / 20)
"""Of the loudest frame: below it lies silence. The quietest consonants lie 35 to 40 dB below a vowel."""

FRAME_S: Final = 0.01
MARGIN_S: Final = 0.05
"""Kept of the silence at either end, for what begins or dies away below ``QUIET``."""

FADE_S: Final = 0.005


@dataclass(frozen=True, slots=True)
class Joints:
    """One request's pieces into one seamless sound."""

    sample_rate_hz: int

    def join(self, samples: NDArray[np.float32], pause_s: float) -> NDArray[np.float32]:
        """``samples`` without the silence around them, faded in and out, then ``pause_s`` of silence.

        Never empty unless ``samples`` are; of a piece that is all silence a tenth of a second is left.
        """
        if samples.ndim != 1 or samples.size == 0 or not np.isfinite(samples).all():
            return samples
        kept = self._kept(samples)
        faded = samples[kept] * self._fade(kept.stop - kept.start)
        return np.concatenate((faded, np.zeros(round(pause_s * self.sample_rate_hz), np.float32)))

    def _kept(self, samples: NDArray[np.float32]) -> slice:
        frame = max(1, round(FRAME_S * self.sample_rate_hz))
        margin = round(MARGIN_S * self.sample_rate_hz)
        starts = np.arange(0, samples.size, frame)
        # In double precision: the square of a very large or very small sample would not fit in single.
        energies = np.add.reduceat(samples.astype(np.float64) ** 2, starts)
        # Of a whole frame, also where the last is shorter: one loud sample at the end is not a loud frame.
        loud = np.flatnonzero(energies > energies.max() * QUIET**2)
        if loud.size == 0:
            return slice(0, min(samples.size, 2 * margin))
        return slice(max(0, int(starts[loud[0]]) - margin), min(samples.size, int(starts[loud[-1]]) + frame + margin))

    def _fade(self, size: int) -> NDArray[np.float32]:
        gain = np.ones(size, np.float32)
        steps = min(round(FADE_S * self.sample_rate_hz), size // 2)
        # A raised cosine: neither the level nor its slope jumps.
        rise = (0.5 - 0.5 * np.cos(np.pi * np.arange(steps) / max(1, steps))).astype(np.float32)
        gain[:steps] = rise
        gain[size - steps :] = rise[::-1]
        return gain
