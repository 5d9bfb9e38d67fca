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
        if not _is_sound(samples):
            return samples
        (loud, _), margin = self.loud(samples), self.margin
        kept = samples[: 2 * margin] if loud is None else samples[max(0, loud.start - margin) : loud.stop + margin]
        return self.faded(kept, into=True, out=True, pause_s=pause_s)

    def loud(self, samples: NDArray[np.float32], loudest: float = 0.0) -> tuple[slice | None, float]:
        """From the first loud frame to the last, ``None`` if there is none; and the energy of the loudest.

        ``loudest`` is the energy of a frame that was heard before.
        """
        energies = self.energies(samples)
        loudest = max(loudest, float(energies.max()))
        # Of a whole frame, also where the last is shorter: one loud sample at the end is not a loud frame.
        frames = np.flatnonzero(energies > loudest * QUIET**2)
        if frames.size == 0:
            return None, loudest
        return slice(int(frames[0]) * self._frame, min(samples.size, (int(frames[-1]) + 1) * self._frame)), loudest

    def energies(self, samples: NDArray[np.float32]) -> NDArray[np.float64]:
        """Of each frame."""
        # In double precision: the square of a very large or very small sample would not fit in single.
        energies: NDArray[np.float64] = np.add.reduceat(
            np.square(samples, dtype=np.float64), np.arange(0, samples.size, self._frame)
        )
        return energies

    def faded(
        self, samples: NDArray[np.float32], *, into: bool, out: bool, pause_s: float = 0.0
    ) -> NDArray[np.float32]:
        """A copy, with ``pause_s`` of silence behind it."""
        copy = np.concatenate((samples, self.pause(pause_s)))
        steps = min(round(FADE_S * self.sample_rate_hz), samples.size // 2)
        # A raised cosine: neither the level nor its slope jumps.
        rise = (0.5 - 0.5 * np.cos(np.pi * np.arange(steps) / max(1, steps))).astype(np.float32)
        if into:
            copy[:steps] *= rise
        if out:
            copy[samples.size - steps : samples.size] *= rise[::-1]
        return copy

    def pause(self, pause_s: float) -> NDArray[np.float32]:
        return np.zeros(round(pause_s * self.sample_rate_hz), np.float32)

    @property
    def _frame(self) -> int:
        return max(1, round(FRAME_S * self.sample_rate_hz))

    @property
    def margin(self) -> int:
        """Samples."""
        return round(MARGIN_S * self.sample_rate_hz)

    def tail(self, silence: NDArray[np.float32]) -> NDArray[np.float32]:
        """As much of its end as may yet be heard before a sound, from the beginning of a frame on."""
        begin = max(0, silence.size - 2 * self.margin - self._frame)
        return silence[begin - begin % self._frame :].copy()


class InParts:
    """One piece that comes in parts, as ``Joints.join`` joins a whole, as far as a part can tell.

    What is silence is measured by the loudest so far. Silence between two parts stays, for sound may follow it.
    """

    def __init__(self, joints: Joints) -> None:
        self._joints = joints
        self._loudest = 0.0
        # Silence before the first sound, as far back as its margin may reach.
        self._before = np.zeros(0, np.float32)
        self._since = 0
        """Samples that were heard behind the last loud frame."""
        self.begun = False
        """There was something to hear of it."""

    def join(self, samples: NDArray[np.float32], *, last: bool, pause_s: float) -> NDArray[np.float32]:
        """What to hear of the next part; ``pause_s`` of silence after the ``last``.

        A beginning of silence is kept back until there is sound to hear.
        """
        if self._before.size and samples.ndim == 1:
            samples = np.concatenate((self._before, samples))
            self._before = samples[:0]
        if last and not self.begun:
            return self._joints.join(samples, pause_s)
        if not _is_sound(samples):
            return np.concatenate((samples, self._joints.pause(pause_s))) if last else samples
        loud, self._loudest = self._joints.loud(samples, self._loudest)
        if not self.begun and loud is None:
            self._before = self._joints.tail(samples)
            return samples[:0]
        margin = self._joints.margin
        begin = 0 if self.begun or loud is None else max(0, loud.start - margin)
        # Counted from the last loud frame, in whichever part it was.
        end = max(0, margin - self._since) if loud is None else loud.stop + margin
        self._since = self._since + samples.size if loud is None else samples.size - loud.stop
        kept, into = samples[begin : end if last else samples.size], not self.begun
        self.begun = True
        return self._joints.faded(kept, into=into, out=last, pause_s=pause_s if last else 0.0)


def _is_sound(samples: NDArray[np.float32]) -> bool:
    return samples.ndim == 1 and samples.size > 0 and bool(np.isfinite(samples).all())
