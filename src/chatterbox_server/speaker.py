"""One piece of text, spoken well: sound of a plausible length, or smaller bites where memory is short.

Runs on a thread that may call the engine; decides when to ask it again, never what to do with an error that stays.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chatterbox_server import pace, text
from chatterbox_server.engine import Engine, Errand, Failure, OutOfMemory, TooLong, Utterance
from chatterbox_server.joints import Joints

SMALLEST = 40
"""Characters below which half a text needs hardly less memory than the whole, and none is too long to be read."""


@dataclass(frozen=True, slots=True)
class Sound:
    samples: NDArray[np.float32]
    remarks: tuple[Failure, ...] = ()
    """What did not go well at once: ``out_of_memory``, ``odd_piece``."""


Speak = Callable[[Engine, Utterance, Errand, Callable[[], None]], Sound]
"""As ``speak``, told the rest."""


def speak(
    engine: Engine, utterance: Utterance, errand: Errand, free: Callable[[], None], *, check_duration: bool = True
) -> Sound:
    """Speak ``utterance``, once more if it came out too short or too long for its text and nobody has heard of it yet.

    ``free`` has the engine give memory back, as soon as it has nothing else in hand; not where it has done so itself.

    Raises:
        Dropped, Refused, EngineError: as the engine does; ``OutOfMemory`` only if smaller bites did not fit either.
    """
    samples, remarks = _in_memory(engine, utterance, errand, free)
    # What somebody has heard already is not said again.
    if not check_duration or errand.given or _plausible(engine, utterance, samples):
        return Sound(samples, remarks)
    errand.check()
    # Which of the two is better, shows at the end.
    errand.keep_whole()
    # The model sometimes stops early or rambles on; other dice seldom do it again.
    try:
        again, more = _in_memory(engine, dataclasses.replace(utterance, seed=utterance.seed ^ 1), errand, free)
    except OutOfMemory:
        # An odd sound is better than none.
        return Sound(samples, (*remarks, "out_of_memory", "odd_piece"))
    better = again if _plausible(engine, utterance, again) else samples
    return Sound(better, (*remarks, *more, "odd_piece"))


def _in_memory(
    engine: Engine, utterance: Utterance, errand: Errand, free: Callable[[], None]
) -> tuple[NDArray[np.float32], tuple[Failure, ...]]:
    """The sound, in halves where the whole does not fit."""
    try:
        return _readable(engine, utterance, errand), ()
    except OutOfMemory as error:
        if errand.given:
            raise
        freed = error.freed
    # Outside that handler, whose exception holds the frames that hold the memory.
    if not freed:
        free()
    return _in_halves(engine, utterance, errand), ("out_of_memory",)


def _readable(engine: Engine, utterance: Utterance, errand: Errand) -> NDArray[np.float32]:
    """The sound, in halves where the whole cannot be read at once: an engine may need several tokens for a letter."""
    try:
        return engine.synthesize(utterance, errand)
    except TooLong:
        if len(utterance.text) <= SMALLEST:
            raise
    return _in_halves(engine, utterance, errand)


def _in_halves(engine: Engine, utterance: Utterance, errand: Errand) -> NDArray[np.float32]:
    # The second half's beginning would be heard before the first half's end.
    errand.keep_whole()
    halves = text.split(
        utterance.text, language=utterance.language, longest=max(SMALLEST, len(utterance.text) * 2 // 3)
    )
    joints = Joints(engine.sample_rate_hz)
    sounds = []
    for half in halves:
        errand.check()
        sound = _readable(engine, dataclasses.replace(utterance, text=half.text), errand)
        # Without the pauses of the split: it would have been one breath.
        sounds.append(joints.join(sound, 0.0))
    return np.concatenate(sounds)


def _plausible(engine: Engine, utterance: Utterance, samples: NDArray[np.float32]) -> bool:
    audio_s = samples.size / engine.sample_rate_hz
    return pace.implausible(utterance.text, audio_s, speed=utterance.speed) is None
