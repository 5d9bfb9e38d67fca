"""What an engine is: the words that the queue, the routes and every engine share. Imports no engine."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Failure = Literal["out_of_memory", "broken", "stuck", "odd_piece", "recycled"]
"""What may go wrong with an engine, as metrics count it."""

LOOK_UP_S: Final = 0.1
"""How often one who waits inside an engine asks whether anybody still wants the utterance."""


class EngineError(Exception):
    """The engine could not do its work, and not because of what was asked."""


class Unable(EngineError):
    """It can never be loaded here as it is told: a package or a program is missing, or it cannot do what is asked.

    A fresh start would find the same; what may come by itself (a GPU, weights, a mount) is another error.
    """


class OutOfMemory(EngineError):
    """The utterance did not fit into the GPU's memory; a shorter one may, once ``free`` was called."""

    def __init__(self, message: str, *, freed: bool = False) -> None:
        super().__init__(message)
        self.freed = freed
        """The engine has called it already, once for all whom this is told."""


class EngineBroken(EngineError):
    """The engine will never speak again in this process (a CUDA error that poisons the context)."""


class Refused(Exception):
    """What was asked cannot be spoken; says why, in words for whoever asked."""

    def __init__(self, reason: str, *, param: str) -> None:
        super().__init__(reason)
        self.param = param
        """Field of the request that is to blame."""


class TooLong(Refused):
    """The text cannot be read at once; a part of it may be."""


class Dropped(Exception):
    """Nobody waits for the utterance any more; nothing went wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the model chooses; the defaults are those of ``ChatterboxTTS.generate`` (0.1.7)."""

    exaggeration: float = 0.5
    cfg_weight: float = 0.5
    temperature: float = 0.8
    min_p: float = 0.05
    top_p: float = 1.0
    top_k: int = 1000
    """Used by Turbo alone; 0 turns it off."""
    repetition_penalty: float = 1.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Utterance:
    """One thing to say, complete: two equal utterances sound the same, whatever was spoken between them."""

    text: str
    voice: Path | None
    """Recording to imitate; ``None`` is the voice built into the engine."""
    language: str
    """One of the engine's ``languages``."""
    speed: float
    """1.0 is the engine's own pace; within its ``speeds``."""
    sampling: Sampling
    seed: int
    """Chosen at the door when the client gave none, so that every answer can be repeated."""


class Errand:
    """One utterance's way through an engine: who asked can take it back, and the engine says how far it is.

    Any thread may use it; of those that work on the utterance, one at a time.
    """

    def __init__(
        self,
        on_way: Callable[[], None] = lambda: None,
        on_sound: Callable[[NDArray[np.float32]], None] | None = None,
    ) -> None:
        """``on_way`` is called, on whichever thread it happens, once the next utterance may come in.

        ``on_sound`` is called so with what is ready before the rest, if anybody wants to hear it.
        """
        self._on_way = on_way
        self._on_sound = on_sound
        self._wanted = True
        # Worked seconds, whether at work, since when: one tuple, so that no reader sees half of a change.
        self._now: tuple[float, bool, float] = (0.0, False, time.monotonic())
        self.in_the_way = True
        """The engine cannot begin another utterance yet."""
        self.given = 0
        """Samples that were heard already."""

    @property
    def listens(self) -> bool:
        """Somebody wants to hear the beginning before the end is there."""
        return self._on_sound is not None

    def give(self, samples: NDArray[np.float32]) -> None:
        """What is ready; what ``synthesize`` returns goes on from there."""
        self.given += samples.size
        if self._on_sound is not None:
            self._on_sound(samples)

    def keep_whole(self) -> None:
        """From now on nobody is to hear the beginning before the end is there."""
        self._on_sound = None

    def drop(self) -> None:
        """Nobody waits for it any more."""
        self._wanted = False

    def check(self) -> None:
        """Cheap enough to be called at every step.

        Raises:
            Dropped: nobody waits for it any more.
        """
        if not self._wanted:
            raise Dropped

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Around each stretch of work: what lies between, the wait for one's turn, makes no engine seem stuck.

        Raises:
            Dropped: before the work begins.
        """
        self.check()
        worked_s, _, _ = self._now
        began_s = time.monotonic()
        self._now = (worked_s, True, began_s)
        try:
            yield
        finally:
            ended_s = time.monotonic()
            self._now = (worked_s + ended_s - began_s, False, ended_s)

    def make_way(self) -> None:
        """The next utterance may come in, while this one goes on."""
        if self.in_the_way:
            self.in_the_way = False
            self._on_way()

    def worked_s(self, now_s: float) -> float:
        """Seconds of work so far, on ``time.monotonic``'s clock."""
        worked_s, at_work, since_s = self._now
        return worked_s + (now_s - since_s if at_work else 0.0)

    def idle_s(self, now_s: float) -> float:
        """Seconds since anybody worked on it, or since it came; 0 while somebody does."""
        _, at_work, since_s = self._now
        return 0.0 if at_work else now_s - since_s


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    """Of all GPUs that the engine uses, together."""

    allocated_bytes: int
    """In tensors of this process."""
    reserved_bytes: int
    """Held by this process, tensors or not."""
    free_bytes: int
    """Held by nobody."""
    total_bytes: int


class Engine(Protocol):
    """A loaded model. It is built on one of the threads that will call it."""

    name: str
    """``stock``, ``espeak`` …"""
    model: str
    """What is loaded, as ``/v1/models`` names it."""
    places: int
    """Utterances that it may have in hand at once, each on a thread of its caller's; 1: one after another."""
    sample_rate_hz: int
    longest_piece: int
    """Characters of one utterance that it speaks well; longer text is split before it comes here."""
    tokens_per_audio_s: float | None
    """Speech tokens it makes for a second of sound; ``None`` where it knows no tokens."""
    speeds: tuple[float, float]
    """Slowest and fastest pace; both 1.0 where the engine has only its own."""
    languages: tuple[str, ...]
    """Languages it speaks; the first is spoken when the client names none."""
    defaults: Sampling
    """What it uses for whatever the client leaves out."""
    frees_beside: bool
    """``free`` may be called beside utterances in hand, and gives back no less than without them."""

    @property
    def broken(self) -> EngineBroken | None:
        """Why it will never speak again, where it knows so without being asked to; answered at once, on any thread."""
        ...

    def facts(self) -> Mapping[str, object]:
        """What ``/readyz`` reports, as JSON values; answers at once, also while an utterance runs."""
        ...

    def memory(self) -> GpuMemory | None:
        """What is held now; ``None`` without a GPU. Called on any of the callers' threads, also beside an utterance."""
        ...

    def free(self) -> None:
        """Give back what is cached and not in use; called while no utterance is in hand, or see ``frees_beside``."""
        ...

    def synthesize(self, utterance: Utterance, errand: Errand) -> NDArray[np.float32]:
        """Return mono samples in [-1, 1] at ``sample_rate_hz``.

        Up to ``places`` threads call it at once. None comes in before each that is inside has made way
        (``errand.make_way``) or is done, so that whose turn it is can be decided as late as possible: an engine that
        can begin the next one earlier says so. What it does, it does ``errand.at_work()``: how long that lasts tells
        an engine that is stuck. To an errand that listens it may give the beginning while it makes the rest, which it
        returns.

        Raises:
            Dropped: ``errand`` was dropped. An engine of several steps checks between them.
            Refused: the voice or another part of the utterance cannot be used; ``TooLong``, its text not at once.
            OutOfMemory: it did not fit.
            EngineBroken: the process must be replaced; whatever else is in hand is lost, too.
            EngineError: anything else. No other utterance suffers.
        """
        ...
