"""One job of speaking a manuscript: what is asked for, what is there, where each piece sounds. Asks nobody.

A piece's sound is named by a digest of all that determines it, so that whatever was spoken before and still fits is
used again, also after the text was changed around it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from chatterbox_deploy.config.tables import FleetConfig
    from chatterbox_deploy.speak.manuscript import Manuscript


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How it is to be spoken; ``None`` is left to the server."""

    model: str | None = None
    voice: str | None = None
    language: str | None = None
    speed: float | None = None
    exaggeration: float | None = None
    cfg_weight: float | None = None
    temperature: float | None = None
    seed: int = 0
    """From it and its text each piece gets a seed of its own."""


@dataclass(frozen=True, slots=True)
class Take:
    """A piece as it is asked for. Equal texts are one take: it is spoken once and heard wherever it stands."""

    name: str
    """Of the file that keeps its sound."""
    text: str
    request: Mapping[str, Any]
    """The body of POST /v1/audio/speech."""


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of the whole, in samples from its beginning."""

    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """The whole, put together."""

    sample_rate_hz: int
    chapters: tuple[Span, ...]
    """Seamless: each ends where the next begins."""
    cues: tuple[Span, ...]
    """Each piece, without the silence that follows it."""

    @property
    def samples(self) -> int:
        """Of the whole."""
        return self.chapters[-1].end

    @property
    def duration_s(self) -> float:
        """Of the whole."""
        return self.samples / self.sample_rate_hz


def takes(manuscript: Manuscript, manner: Manner, *, spoken_by: Mapping[str, Any]) -> tuple[Take, ...]:
    """One for each piece, in their order. ``spoken_by`` is what else determines the sound: the model, the recording."""
    return tuple(_take(piece.text, manner, spoken_by) for piece in manuscript.pieces)


def _take(text: str, manner: Manner, spoken_by: Mapping[str, Any]) -> Take:
    chosen = {
        name: value
        for name in ("model", "voice", "language", "speed", "exaggeration", "cfg_weight", "temperature")
        if (value := getattr(manner, name)) is not None
    }
    # Within what the API takes (below 2**53), and within 32 bits, as random number generators like it.
    seed = int.from_bytes(hashlib.sha256(f"{manner.seed}\n{text}".encode()).digest()[:4])
    request = {"input": text, "response_format": "wav", "seed": seed, **chosen}
    whole = json.dumps({"request": request, "spoken_by": dict(spoken_by)}, sort_keys=True)
    return Take(hashlib.sha256(whole.encode()).hexdigest()[:32], text, request)


def missing(wanted: Iterable[Take], present: Collection[str]) -> list[Take]:
    """What is still to be spoken, each once, in the order in which it is heard first."""
    return [take for take in {take.name: take for take in wanted}.values() if take.name not in present]


def timeline(
    manuscript: Manuscript, wanted: Sequence[Take], samples: Mapping[str, int], *, sample_rate_hz: int, untitled: str
) -> Timeline:
    """Where everything is, once all was spoken; ``samples`` is how long each take is.

    A chapter that has no title is called ``untitled``.
    """
    chapters: list[Span] = []
    cues: list[Span] = []
    at = 0
    spoken = iter(wanted)
    for chapter in manuscript.chapters:
        began = at
        for piece in chapter.pieces:
            take = next(spoken)
            silence = round(piece.pause_s * sample_rate_hz)
            cues.append(Span(piece.text, at, at + samples[take.name]))
            at += samples[take.name] + silence
        chapters.append(Span(chapter.title or untitled, began, at))
    return Timeline(sample_rate_hz, tuple(chapters), tuple(cues))


def in_flight(config: FleetConfig) -> int:
    """Requests that keep all instances of the stock engine busy: in each one that is spoken, and one that is next.

    An instance that begins a piece before the last one is done (``server.pipeline``) has one more. Never more than
    the queues hold. An instance of the fast engine tells itself how many it speaks at once, with its first answer.
    """
    server = config.server
    ahead = 0
    for key, ports in config.gpus.items():
        pipelined = server.pipeline == "on" or (server.pipeline == "auto" and "," in key)
        each = min(3 if pipelined else 2, 1 + server.queue_size)
        ahead += (len(ports) if isinstance(ports, list) else 1) * each
    return ahead
