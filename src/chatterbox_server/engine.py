"""What an engine is: the words that the queue, the routes and every engine share. Imports no engine."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Failure = Literal["out_of_memory", "broken", "stuck", "odd_piece", "recycled"]
"""What may go wrong with an engine, as metrics count it."""


class EngineError(Exception):
    """The engine could not do its work, and not because of what was asked."""


class OutOfMemory(EngineError):
    """The utterance did not fit into the GPU's memory; a shorter one may, once ``free`` was called."""


class EngineBroken(EngineError):
    """The engine will never speak again in this process (a CUDA error that poisons the context)."""


class Refused(Exception):
    """What was asked cannot be spoken; says why, in words for whoever asked."""

    def __init__(self, reason: str, *, param: str) -> None:
        super().__init__(reason)
        self.param = param
        """Field of the request that is to blame."""


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
    """A loaded model. Not thread-safe: the queue calls it from one worker thread."""

    name: str
    """``stock``, ``espeak`` …"""
    model: str
    """What is loaded, as ``/v1/models`` names it."""
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

    def facts(self) -> Mapping[str, object]:
        """What ``/readyz`` reports, as JSON values; answers at once, also while an utterance runs."""
        ...

    def memory(self) -> GpuMemory | None:
        """What is held now; ``None`` without a GPU. Called between utterances, on the engine's thread."""
        ...

    def free(self) -> None:
        """Give back what is cached and not in use; called between utterances, on the engine's thread."""
        ...

    def synthesize(self, utterance: Utterance) -> NDArray[np.float32]:
        """Return mono samples in [-1, 1] at ``sample_rate_hz``.

        Raises:
            Refused: the voice or another part of the utterance cannot be used.
            OutOfMemory: it did not fit.
            EngineBroken: the process must be replaced.
            EngineError: anything else.
        """
        ...
