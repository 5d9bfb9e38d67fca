"""The next token of many utterances at once, each with its own knobs. Plain torch; draws nothing itself.

Step by step what the package's loops do with ``transformers``' processors, for many rows: tests/server/test_fast_t3.py
holds the tokens to be the same under the same noise. ``choosing`` beside this does the common case in one launch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch

from chatterbox_server.engine import Sampling
from chatterbox_server.engines.fast import noise
from chatterbox_server.engines.fast.pinned import sent
from chatterbox_server.engines.stock.kinds import COLDEST, TINY_CFG_WEIGHT


@dataclass(frozen=True, slots=True)
class Knobs:
    """Of each utterance, ``(utterances,)``."""

    seed: torch.Tensor
    cfg_weight: torch.Tensor
    temperature: torch.Tensor
    min_p: torch.Tensor
    cut: torch.Tensor
    """1 - top_p: what may be cut off at the unlikely end."""
    top_k: torch.Tensor
    penalty: torch.Tensor
    """Of repetition; at least 1 makes it rarer."""

    @classmethod
    def empty(cls, count: int, device: str | torch.device) -> "Knobs":
        return cls(*(torch.ones(count, dtype=_dtype(knob.name), device=device) for knob in fields(cls)))

    def at(self, places: torch.Tensor) -> "Knobs":
        return Knobs(*(getattr(self, knob.name)[places] for knob in fields(self)))

    def turn(self, places: torch.Tensor, asked: Sequence[tuple[int, Sampling]], *, vocabulary: int) -> None:
        """Of the utterances at ``places``, as each one's seed and ``Sampling`` say."""
        columns = zip(*(_values(seed, sampling, vocabulary) for seed, sampling in asked), strict=True)
        for knob, column in zip(fields(self), columns, strict=True):
            kept = getattr(self, knob.name)
            kept[places] = sent(torch.tensor(column, dtype=kept.dtype), kept.device)


def sorts(sampling: Sampling, *, by_count: bool) -> bool:
    """Whether all tokens have to be sorted for it; ``by_count``: top_k is heeded."""
    return sampling.top_p < 1 or (by_count and sampling.top_k > 0)


def _dtype(knob: str) -> torch.dtype:
    return torch.int64 if knob in {"seed", "top_k"} else torch.float32


def _values(seed: int, sampling: Sampling, vocabulary: int) -> tuple[int | float, ...]:
    """In the order of ``Knobs``."""
    return (
        noise.word(seed),
        max(sampling.cfg_weight, TINY_CFG_WEIGHT),
        max(sampling.temperature, COLDEST),
        sampling.min_p,
        1 - sampling.top_p,
        min(sampling.top_k, vocabulary) or vocabulary,
        sampling.repetition_penalty,
    )


def guided(
    logits: torch.Tensor,
    seen: torch.Tensor,
    knobs: Knobs,
    *,
    sort: bool,
    rule: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Probabilities by ``T3.inference``'s rules; ``logits`` are ``(utterances, 2, tokens)``, with and without text.

    ``seen``, ``(utterances, tokens)``, are those that were chosen before. Without ``sort`` top_p must be 1 everywhere.
    ``rule``: what the alignment makes of the scores before they are looked at.
    """
    with_text, without = logits.unbind(1)
    scores = with_text + knobs.cfg_weight[:, None] * (with_text - without)
    if rule is not None:
        scores = rule(scores)
    scores = _penalised(scores, seen, knobs) / knobs.temperature[:, None]
    likely = torch.softmax(scores, dim=-1)
    top, best = likely.max(dim=-1, keepdim=True)
    unlikely = (likely < knobs.min_p[:, None] * top).scatter(-1, best, value=False)
    scores = scores.masked_fill(unlikely, -torch.inf)
    if sort:
        scores = _cut(scores, knobs)
    return torch.softmax(scores, dim=-1)


def turbo(logits: torch.Tensor, seen: torch.Tensor, knobs: Knobs, *, sort: bool) -> torch.Tensor:
    """By ``T3.inference_turbo``'s rules; ``logits`` are ``(utterances, tokens)``. Without ``sort`` no top_k either."""
    scores = logits / knobs.temperature[:, None]
    if sort:
        kth = torch.sort(scores, descending=True).values.gather(-1, knobs.top_k[:, None] - 1)
        scores = _cut(scores.masked_fill(scores < kth, -torch.inf), knobs)
    return torch.softmax(_penalised(scores, seen, knobs), dim=-1)


def choose(likely: torch.Tensor, clocks: torch.Tensor) -> torch.Tensor:
    """As ``torch.multinomial`` chooses one: the first to ring of ``clocks``, exponential of rate 1."""
    return (likely / clocks).argmax(dim=-1)


def _penalised(scores: torch.Tensor, seen: torch.Tensor, knobs: Knobs) -> torch.Tensor:
    penalty = knobs.penalty[:, None]
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def _cut(scores: torch.Tensor, knobs: Knobs) -> torch.Tensor:
    """Without the least likely that together are no more than ``cut``; the most likely always stays."""
    rising, order = torch.sort(scores)
    off = torch.softmax(rising, dim=-1).cumsum(dim=-1) <= knobs.cut[:, None]
    off[:, -1] = False
    return scores.masked_fill(off.scatter(-1, order, off), -torch.inf)
