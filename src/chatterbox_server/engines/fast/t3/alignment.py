"""What the package's AlignmentStreamAnalyzer decides, for many utterances at once and on the device. Plain torch.

Multilingual's T3 watches three heads of its own attention while it speaks: where in the text it is, so that the end is
held back before the text is said and forced when it lingers, says text again, or says a token twice in a row. The
package looks anew at all that was spoken after each token; its rules need no more of it than a few numbers of each
utterance, which are kept here: tests/server/test_fast_alignment.py holds the two to the same verdicts. ``choosing``
beside this does the same in one launch.

Of what the package works out, ``started`` and how long the last token takes decide nothing, and are left out. So
are the prompt's own rows: of its first look only the text's first position is kept, which is then the most likely one.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

HELD: Final = 1
"""Verdict: this token is not the end."""
OVER: Final = 2
"""Verdict: this token is the end. 0 leaves the choice as it is."""

LOUD: Final = 2.0**15
"""Logit of what is certain; its negative is never chosen."""

LAST: Final = 3
"""Text tokens at the end: where they are reached the text is said, and they may linger."""
SPOKEN: Final = 5
"""All but so many text tokens at the end: to look at them after the text is said is to say it again."""
ENOUGH: Final = 5.0
"""Attention that adds up to so much is a fault: about as many tokens, 200 ms."""
BACK: Final = 4
FORTH: Final = 7
"""Text tokens: less than so far from where it was may it be, or it is not believed."""


class Alignment:
    """Of each slot: what has been seen of its attention to its text, and what follows for the next token."""

    def __init__(self, heads: Sequence[tuple[int, int]], *, slots: int, stop: int, device: str | torch.device) -> None:
        """``heads``: the layer and the head of each that is watched. ``stop``: the token that is the end."""
        self.heads = tuple(heads)
        self.stop = stop

        def state(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros((slots, *shape), dtype=dtype, device=device)

        self.begins = state(torch.int64)
        """Where in the cache the text begins."""
        self.lengths = state(torch.int64)
        """Of the text, in tokens, start and stop among them."""
        self.reached = state(torch.int64)
        """Where in the text it is believed to be."""
        self.complete = state(torch.bool)
        self.lingered = state(torch.float32, LAST)
        """Attention to each of the last text tokens since the text is said."""
        self.again = state(torch.float32)
        """The strongest to a text token before those, added up since then."""
        self.before = state(torch.int64)
        """The token before the last one."""
        self.verdicts = state(torch.int32)

    @classmethod
    def of(cls, t3: Any, *, slots: int, device: str | torch.device) -> "Alignment | None":
        """For the package's ``T3``; none where it does not watch itself."""
        if not t3.hp.is_multilingual:
            return None
        from chatterbox.models.t3.inference.alignment_stream_analyzer import LLAMA_ALIGNED_HEADS

        return cls(LLAMA_ALIGNED_HEADS, slots=slots, stop=t3.hp.stop_speech_token, device=device)

    def begin(self, places: torch.Tensor, begins: torch.Tensor, lengths: torch.Tensor) -> None:
        """Nothing is said yet of the texts at ``places``, ``lengths`` tokens each behind ``begins``."""
        self.begins[places] = begins
        self.lengths[places] = lengths
        self.reached[places] = 0
        self.complete[places] = lengths <= LAST
        self.lingered[places] = 0.0
        self.again[places] = 0.0
        # No token is this one.
        self.before[places] = -1
        # The first look is at the text's first position: of a text this long that is not its end.
        self.verdicts[places] = torch.where(lengths > SPOKEN, HELD, 0).to(torch.int32)

    def look(
        self, slots: torch.Tensor, last: torch.Tensor, count: torch.Tensor, attention: torch.Tensor, alive: torch.Tensor
    ) -> None:
        """Verdicts for the next token of those of ``slots`` that are ``alive``.

        Args:
            slots: of the utterances, as are all that follow.
            last: the token that was chosen last.
            count: how many were chosen, at least one.
            attention: of the newest position to all of the cache, ``(utterances, heads, positions)``.
            alive: the others' state stays as it is.
        """
        text, complete = self.lengths[slots], self.complete[slots]
        attended = attention.mean(dim=1)
        column = torch.arange(attended.shape[-1], device=attended.device) - self.begins[slots, None]
        # Text is not believed to be said sooner than a token for each.
        inside = (column >= 0) & (column < text[:, None]) & (column <= count[:, None])
        here = attended.masked_fill(~inside, -1.0).argmax(dim=-1) - self.begins[slots]
        attended = attended.masked_fill(~inside, 0.0)
        moved = here - self.reached[slots]
        reached = torch.where((moved > -BACK) & (moved < FORTH), here, self.reached[slots])

        since = complete.to(attended.dtype)
        ends = (text[:, None] + torch.arange(-LAST, 0, device=text.device)).clamp(min=0) + self.begins[slots, None]
        lingered = self.lingered[slots] + since[:, None] * attended.gather(-1, ends)
        spoken = attended.masked_fill(column >= text[:, None] - SPOKEN, 0.0)
        again = self.again[slots] + since * spoken.amax(dim=-1)
        over = (lingered.amax(dim=-1) >= ENOUGH) | (again > ENOUGH) | (last == self.before[slots])
        held = (here < text - LAST) & (text > SPOKEN)
        verdicts = torch.where(over, OVER, torch.where(held, HELD, 0)).to(torch.int32)

        for kept, new in (
            (self.reached, reached),
            (self.complete, complete | (reached >= text - LAST)),
            (self.again, again),
            (self.before, last),
            (self.verdicts, verdicts),
        ):
            kept[slots] = torch.where(alive, new, kept[slots])
        self.lingered[slots] = torch.where(alive[:, None], lingered, self.lingered[slots])

    def rule(self, slots: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """What makes scores, ``(utterances, tokens)``, those of the verdicts on ``slots``."""
        verdicts = self.verdicts[slots][:, None]

        def ruled(scores: torch.Tensor) -> torch.Tensor:
            ends = torch.arange(scores.shape[-1], device=scores.device) == self.stop
            scores = torch.where((verdicts == HELD) & ends, -LOUD, scores)
            return torch.where(verdicts == OVER, torch.where(ends, LOUD, -LOUD), scores)

        return ruled


class Glance:
    """One step's attention of the watched heads, as a ``backbone.Look`` that keeps it."""

    def __init__(self, heads: Sequence[tuple[int, int]], rows: torch.Tensor, each: int) -> None:
        """``rows`` of the cache are watched, every ``each``-th of those that step."""
        self._heads, self._rows, self._each = heads, rows, each
        self._found: dict[int, torch.Tensor] = {}

    def __call__(self, layer: int, query: torch.Tensor, keys: torch.Tensor, seen: torch.Tensor) -> None:
        for which, (watched, head) in enumerate(self._heads):
            if watched == layer:
                asked = query[:: self._each, head, -1:].float()
                # Not as a product of matrices: that would be as rough as the GPU is told to be.
                scores = (keys[self._rows, head].float() * asked).sum(dim=-1) * asked.shape[-1] ** -0.5
                scores = scores.masked_fill(~seen[:: self._each, 0, -1], -torch.inf)
                self._found[which] = torch.softmax(scores, dim=-1)

    @property
    def attention(self) -> torch.Tensor:
        """``(utterances, heads, positions)``."""
        return torch.stack([self._found[which] for which in range(len(self._heads))], dim=1)
