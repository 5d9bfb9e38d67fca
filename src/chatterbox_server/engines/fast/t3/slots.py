"""The utterances that T3 has in hand, each in a slot of its own that never moves: prompts go in, tokens come out.

All state is on the device, so a step needs nothing from the host and can be captured once and replayed for ever.
Decides nothing: who gets a slot, and when it is done with, is ``batch``'s to say.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from chatterbox_server.engine import Sampling
from chatterbox_server.engines.fast import noise
from chatterbox_server.engines.fast.pinned import sent
from chatterbox_server.engines.fast.t3 import backbone, sampling
from chatterbox_server.engines.fast.t3.alignment import Alignment, Glance
from chatterbox_server.engines.stock.kinds import MOST_TOKENS

CHUNK: Final = 128
"""Positions of a prompt that are read at once: long enough to use a GPU, short enough that nobody hears the wait."""

LONGEST_PROMPT: Final = 1024
"""Positions: conditionals (34, or Turbo's 376) and text, of which the server makes pieces of 280 characters."""


Chosen = tuple[torch.Tensor, torch.Tensor]
"""Of each slot: the token that was chosen last, and whether that was all."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What T3 reads before its first token."""

    embeds: torch.Tensor
    """``(rows, length, dim)``, float32: two rows where text guides, the second without it; else one."""
    text: range = range(0)
    """Where in it the text is, start and stop among it."""
    ready: Any = None
    """CUDA's event before which it is not there, if another stream than the reader's makes it."""

    @property
    def length(self) -> int:
        return int(self.embeds.shape[1])


@dataclass(frozen=True, slots=True)
class Bite:
    """Part of a prompt, to be read in one go."""

    slot: int
    prompt: Prompt
    begin: int

    @property
    def last(self) -> bool:
        return self.begin + CHUNK >= self.prompt.length


class Slots:
    """Of one T3. For one thread, and on a GPU for one stream."""

    def __init__(
        self, t3: Any, *, slots: int, dtype: torch.dtype, most_tokens: int = MOST_TOKENS, longest: int = LONGEST_PROMPT
    ) -> None:
        self.device = t3.speech_head.weight.device
        self.slots = slots
        self.rows = 1 if t3.is_gpt else 2
        self.vocabulary: int = t3.hp.speech_tokens_dict_size
        self.longest_prompt = longest
        self.stop: int = t3.hp.stop_speech_token
        self.start: int = t3.hp.start_speech_token
        self._rule: Callable[..., torch.Tensor] = sampling.turbo if t3.is_gpt else sampling.guided
        self.alignment = Alignment.of(t3, slots=slots + 1, device=self.device)
        positions = longest + most_tokens
        self.backbone = backbone.of(t3, dtype=dtype, positions=positions)
        # One slot more than there are: where a batch is filled up, its rows do their work.
        self.cache = self.backbone.cache((slots + 1) * self.rows, positions)
        self.speech = t3.speech_emb.weight.detach().float()
        self.speech_positions = None if t3.is_gpt else t3.speech_pos_emb.emb.weight.detach().float()

        def state(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros((slots + 1, *shape), dtype=dtype, device=self.device)

        self.knobs = sampling.Knobs.empty(slots + 1, self.device)
        self.last = state(torch.int64)
        """Token that was chosen last."""
        self.count = state(torch.int64)
        """Tokens chosen so far."""
        self.position = state(torch.int64)
        """Where in the cache the next one goes."""
        self.limit = state(torch.int64)
        self.done = state(torch.bool).fill_(True)
        self.seen = state(torch.bool, self.vocabulary)

    @property
    def spare(self) -> int:
        """The slot that is nobody's."""
        return self.slots

    def begin(self, newcomers: Sequence[tuple[int, Prompt, int, Sampling, int]]) -> None:
        """Make slots ready: each one's number, prompt, seed, sampling and most tokens."""
        numbers, prompts, seeds, samplings, limits = zip(*newcomers, strict=True)
        places = self._on_device(numbers)
        self.knobs.turn(places, tuple(zip(seeds, samplings, strict=True)), vocabulary=self.vocabulary)
        self.count[places] = 0
        self.position[places] = self._on_device([prompt.length for prompt in prompts])
        self.limit[places] = self._on_device(limits)
        self.done[places] = False
        self.seen[places] = False
        self.seen[places, self.start] = True
        if self.alignment is not None:
            begins, lengths = ([number(one.text) for one in prompts] for number in (lambda text: text.start, len))
            self.alignment.begin(places, self._on_device(begins), self._on_device(lengths))

    def end(self, numbers: Sequence[int]) -> None:
        """Choose no more tokens in these slots."""
        self.done[self._on_device(numbers)] = True

    def fill(self, x: torch.Tensor, bites: Sequence[Bite]) -> tuple[list[int], list[int], list[int]]:
        """Write what is to be read into ``x``, ``(places, rows, CHUNK, dim)``; slots, begins and lasts for ``read``.

        Where ``x`` has more places than there are bites, the slot is the spare one.
        """
        for place, bite in enumerate(bites):
            if bite.prompt.ready is not None:
                stream = torch.cuda.current_stream(self.device)
                stream.wait_event(bite.prompt.ready)
                bite.prompt.embeds.record_stream(stream)
            part = bite.prompt.embeds[:, bite.begin : bite.begin + CHUNK]
            x[place, :, : part.shape[1]] = part
        rest = x.shape[0] - len(bites)
        return (
            [bite.slot for bite in bites] + [self.spare] * rest,
            [bite.begin for bite in bites] + [0] * rest,
            [bite.prompt.length - 1 - bite.begin if bite.last else -1 for bite in bites] + [-1] * rest,
        )

    def read(
        self, x: torch.Tensor, slots: torch.Tensor, begins: torch.Tensor, lasts: torch.Tensor, *, sort: bool
    ) -> Chosen:
        """Bites of prompts into the cache; where ``lasts`` is no -1, the first token is chosen behind that place."""
        places, rows, length, dim = x.shape
        hidden = self.backbone.forward(
            x.flatten(0, 1),
            self.cache,
            self._rows_of(slots),
            begins.repeat_interleave(rows),
            reach=min(self.longest_prompt, self.cache.positions),
        ).view(places, rows, length, dim)
        at = lasts.clamp(min=0)[:, None, None, None].expand(-1, rows, 1, dim)
        logits = self.backbone.logits(hidden.gather(2, at).squeeze(2))
        return self.choose(logits, slots, lasts >= 0, sort=sort)

    def step(self, slots: torch.Tensor, *, sort: bool, reach: int | None = None) -> Chosen:
        """One more token in each of ``slots``."""
        last, count = self.last[slots], self.count[slots]
        x = self.speech[last]
        if self.speech_positions is not None:
            x = x + self.speech_positions[count]
        glance = None
        if self.alignment is not None:
            glance = Glance(self.alignment.heads, slots * self.rows, self.rows)
        hidden = self.backbone.forward(
            x.repeat_interleave(self.rows, 0)[:, None],
            self.cache,
            self._rows_of(slots),
            self.position[slots].repeat_interleave(self.rows),
            reach,
            look=glance,
        )
        alive = ~self.done[slots]
        self.position[slots] += alive
        if self.alignment is not None and glance is not None:
            self.alignment.look(slots, last, count, glance.attention, alive)
        logits = self.backbone.logits(hidden.view(-1, self.rows, self.backbone.dim))
        return self.choose(logits, slots, alive, sort=sort)

    def choose(self, logits: torch.Tensor, slots: torch.Tensor, wanted: torch.Tensor, *, sort: bool) -> Chosen:
        knobs, count, seen = self.knobs.at(slots), self.count[slots], self.seen[slots]
        drawn = noise.exponential(knobs.seed, noise.TOKENS, count, self.vocabulary)
        watched = {} if self.alignment is None else {"rule": self.alignment.rule(slots)}
        likely = self._rule(logits.squeeze(1), seen, knobs, sort=sort, **watched)
        token = torch.where(wanted, sampling.choose(likely, drawn), self.last[slots])
        if self.rows == 1:
            # Turbo's loop looks back at what it chose, and only before the first at the start.
            self.seen[slots, self.start] &= ~wanted
        self.seen[slots, token] |= wanted
        self.last[slots] = token
        self.count[slots] += wanted
        self.done[slots] |= wanted & ((token == self.stop) | (self.count[slots] >= self.limit[slots]))
        return token, self.done[slots]

    def _rows_of(self, slots: torch.Tensor) -> torch.Tensor:
        return (slots[:, None] * self.rows + torch.arange(self.rows, device=self.device)).flatten()

    def _on_device(self, numbers: Sequence[int]) -> torch.Tensor:
        return sent(torch.tensor(list(numbers), dtype=torch.int64), self.device)


def embedded(t3: Any, conditionals: Any) -> torch.Tensor:
    """The voice and its manner as the package's ``T3`` reads them, (1, length, dim); ``conditionals`` are a copy."""
    with torch.inference_mode():
        manner: torch.Tensor = t3.prepare_conditioning(conditionals)
        return manner


def prompt(t3: Any, text: torch.Tensor, manner: torch.Tensor) -> Prompt:
    """What the package's ``T3`` reads before its loop; ``text`` as ``kinds`` makes it, ``manner`` as ``embedded``."""
    with torch.inference_mode():
        start = t3.speech_emb(torch.full_like(text[:, :1], t3.hp.start_speech_token))
        said = t3.text_emb(text)
        if not t3.is_gpt:
            # Without text there is only where it would be.
            said[1].zero_()
            said = said + t3.text_pos_emb(text)
            start = start + t3.speech_pos_emb.get_fixed_embedding(0)
            # T3.inference says the start twice.
            start = torch.cat((start, start), dim=1)
        begin = manner.shape[1]
        whole = torch.cat((manner.expand(len(said), -1, -1), said, start), dim=1).float()
        return Prompt(whole, text=range(begin, begin + said.shape[1]))
