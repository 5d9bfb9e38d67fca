"""T3 of many utterances at once: each says what the package's own loop says, under the same noise."""

import copy
import itertools
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_server.engine import Sampling, Utterance
from chatterbox_server.engines.stock import KINDS as KINDS_KNOWN
from chatterbox_server.engines.stock import kinds
from server import tiny
from server.fakes import an_utterance
from server.tiny import Models, but

if TYPE_CHECKING:
    from chatterbox_server.engines.fast.slots import Prompt, Slots

pytestmark = [*tiny.warnings, *tiny.model]

KINDS = ("chatterbox", "turbo")
MOST = 120
TEXTS = ("Hello to you.", "Yes!", "A somewhat longer sentence, said by one who takes time.", "Three, two, one, go")


def counted(seed: int) -> Any:
    """Within it, ``torch.multinomial`` chooses by ``noise`` for that seed: a step later each time."""
    import torch
    from torch.overrides import TorchFunctionMode

    from chatterbox_server.engines.fast import noise

    class Counted(TorchFunctionMode):
        step = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is not torch.multinomial:
                return func(*args, **(kwargs or {}))
            likely = args[0]
            drawn = noise.exponential(
                torch.tensor([noise.word(seed)]), noise.TOKENS, torch.tensor([self.step]), likely.shape[-1]
            )
            self.step += 1
            return (likely / drawn).argmax(dim=-1, keepdim=True)

    return Counted()


def by_the_package(model: Any, kind: str, utterance: Utterance) -> list[int]:
    import torch

    known = KINDS_KNOWN[kind]
    conditionals = kinds.conditioned(known, utterance, copy.copy(model.conds.t3))
    text = known.text(model, utterance)
    with counted(utterance.seed), torch.inference_mode():
        return [int(token) for token in known.infer(model, utterance, text, conditionals).flatten()]


def prompted(model: Any, kind: str, utterance: Utterance) -> "Prompt":
    from chatterbox_server.engines.fast import slots

    known = KINDS_KNOWN[kind]
    conditionals = kinds.conditioned(known, utterance, copy.copy(model.conds.t3))
    return slots.prompt(model.t3, known.text(model, utterance), conditionals)


def chosen(slots: "Slots", told: list[tuple["Prompt", Utterance]], *, sort: bool, by_count: bool) -> list[list[int]]:
    """What T3 says of all of them, begun together."""
    import torch

    from chatterbox_server.engines.fast.slots import CHUNK, Bite

    stop, said = 6562, [list[int]() for _ in told]
    with torch.inference_mode():
        slots.begin([(number, one, asked.seed, asked.sampling, 1000) for number, (one, asked) in enumerate(told)])
        x = torch.zeros(len(told), slots.rows, CHUNK, slots.backbone.dim)
        for begin in range(0, max(one.length for one, _ in told), CHUNK):
            bites = [Bite(number, one, begin) for number, (one, _) in enumerate(told) if begin < one.length]
            tokens, _ = slots.read(x, *map(torch.tensor, slots.fill(x, bites)), sort=sort)
            for place, bite in enumerate(bites):
                if bite.last:
                    said[bite.slot].append(int(tokens[place]))
        everyone = torch.arange(len(told))
        while not bool(slots.done[: len(told)].all()):
            alive = ~slots.done[: len(told)]
            tokens, _ = slots.step(everyone, sort=sort)
            for number in alive.nonzero().flatten().tolist():
                said[number].append(int(tokens[number]))
    return [tokens[:-1] if by_count and tokens[-1] == stop else tokens for tokens in said]


def grid(kind: str) -> Iterator[Sampling]:
    plain = KINDS_KNOWN[kind].defaults
    knobs: dict[str, tuple[float, ...]] = {
        "temperature": (0.8, 1.0, 1.4),
        "top_p": (1.0, 0.7),
        "repetition_penalty": (1.0, 1.2, 2.0),
    }
    knobs |= {"top_k": (0, 5, 1000)} if kind == "turbo" else {"cfg_weight": (0.0, 0.5, 1.0), "min_p": (0.0, 0.05, 0.3)}
    for values in itertools.product(*knobs.values()):
        utterance = but(an_utterance("x", sampling=plain), **dict(zip(knobs, values, strict=True)))
        yield utterance.sampling


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_sample_chooses_the_tokens_that_the_package_chooses(kind: str, models: Models) -> None:
    import torch

    from chatterbox_server.engines.fast import sampling as rules
    from chatterbox_server.engines.fast.slots import Slots

    model = models.lend(kind)
    dice = random.Random(kind)
    samplings = list(grid(kind))
    dice.shuffle(samplings)
    utterances = [
        an_utterance(dice.choice(TEXTS), sampling=one, seed=dice.choice((number, 2**32 + number, 2**63 + number)))
        for number, one in enumerate(samplings)
    ]
    slots = Slots(model.t3, slots=16, dtype=torch.float32, most_tokens=1000, longest=256)
    for begin in range(0, len(utterances), 16):
        batch = utterances[begin : begin + 16]
        # Whether all are sorted is decided by those who need it: the others must not hear of it.
        needs = any(rules.sorts(one.sampling, by_count=kind == "turbo") for one in batch)
        told = [(prompted(model, kind, one), one) for one in batch]
        together = chosen(slots, told, sort=needs, by_count=kind == "turbo")
        for utterance, tokens in zip(batch, together, strict=True):
            assert tokens == by_the_package(model, kind, utterance), utterance
    assert begin
