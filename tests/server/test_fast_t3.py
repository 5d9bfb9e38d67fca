"""T3 of many utterances at once: each says what the package's own loop says, under the same noise."""

import copy
import itertools
import logging
import random
import re
import threading
import time
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
    from chatterbox_server.engines.fast.t3.slots import Prompt, Slots

pytestmark = [*tiny.warnings, *tiny.model]

KINDS = ("chatterbox", "turbo")
TEXTS = ("Hello.", "Yes!", "Go on.")
RULES = ("long_tail", "alignment_repetition", "token_repetition")
"""By which multilingual's alignment analyser forces the end, in its own words."""


def counted(seed: int) -> Any:
    """Within it, ``torch.multinomial`` chooses by ``noise`` for that seed: a step later each time."""
    import torch
    from torch.overrides import TorchFunctionMode

    from chatterbox_server.engines.fast import noise

    class Counted(TorchFunctionMode):  # type: ignore[misc,unused-ignore]
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
    try:
        with counted(utterance.seed), torch.inference_mode():
            return [int(token) for token in known.infer(model, utterance, text, conditionals).flatten()]
    finally:
        if kind == "multilingual":
            # Its alignment analyser leaves three behind at each call.
            for layer in model.t3.tfmr.layers:
                layer.self_attn._forward_hooks.clear()


def prompted(model: Any, kind: str, utterance: Utterance) -> "Prompt":
    from chatterbox_server.engines.fast.t3 import slots

    known = KINDS_KNOWN[kind]
    conditionals = kinds.conditioned(known, utterance, copy.copy(model.conds.t3))
    return slots.prompt(model.t3, known.text(model, utterance), slots.embedded(model.t3, conditionals))


def chosen(slots: "Slots", told: list[tuple["Prompt", Utterance]], *, sort: bool, by_count: bool) -> list[list[int]]:
    """What T3 says of all of them, begun together."""
    import torch

    from chatterbox_server.engines.fast.t3.slots import CHUNK, Bite

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


def test_noise_is_philox_as_published() -> None:
    """The vectors of Random123's own tests (kat_vectors, philox4x32 10)."""
    import torch

    from chatterbox_server.engines.fast import noise

    full, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
    for told, expected in (
        ((0,) * 6, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((full,) * 6, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        first, second, third, fourth, *key = (torch.tensor(word) for word in told)
        words = noise.philox((first, second, third, fourth), (key[0], key[1]))
        assert tuple(int(word) for word in words) == expected


def test_noise_belongs_to_a_place_and_not_to_its_neighbours() -> None:
    import torch

    from chatterbox_server.engines.fast import noise

    seeds = torch.tensor([noise.word(seed) for seed in (0, 1, 2**63 + 1)])
    together = noise.exponential(seeds[:, None], noise.TOKENS, torch.arange(5), 10)
    alone = noise.exponential(seeds[2], noise.TOKENS, torch.tensor(3), 6)
    assert torch.equal(together[2, 3, :6], alone)
    assert together.unique().numel() == together.numel()
    assert float(together.min()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_sample_chooses_the_tokens_that_the_package_chooses(kind: str, models: Models) -> None:
    import torch

    from chatterbox_server.engines.fast.t3 import sampling as rules
    from chatterbox_server.engines.fast.t3.slots import Slots

    model = models.lend(kind)
    dice = random.Random(kind)  # noqa: S311 (a test that repeats)
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


@pytest.mark.parametrize(
    ("which", "rules"),
    [
        pytest.param(0, {"token_repetition"}, id="attention everywhere"),
        pytest.param(1, {"held", "alignment_repetition", "token_repetition"}, id="attention on text"),
        pytest.param(2, {"long_tail", "alignment_repetition", "token_repetition"}, id="never ends by itself"),
    ],
)
def test_multilingual_chooses_the_tokens_that_the_package_chooses_watching_itself(
    which: int, rules: set[str], models: Models, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """12 of different sampling, languages and lengths, with sorting and without; each of these weights has others.

    The package's own analyser says which rules it used.
    """
    import torch
    from chatterbox.models.t3.inference.alignment_stream_analyzer import AlignmentStreamAnalyzer

    from chatterbox_server.engines.fast.t3.slots import Slots

    caplog.set_level(logging.WARNING)
    held: set[str] = set()
    step = AlignmentStreamAnalyzer.step

    def told(analyzer: Any, logits: Any, **more: Any) -> Any:
        likely, ruled = int(logits[0].argmax()), step(analyzer, logits, **more)
        # Held back where it was the most likely.
        if likely == analyzer.eos_idx and float(ruled[0, likely]) < 0:
            held.add("held")
        return ruled

    monkeypatch.setattr(AlignmentStreamAnalyzer, "step", told)
    model = models.lend_watchful(ends=which == 1) if which else models.lend("multilingual")
    dice = random.Random(58)  # noqa: S311 (a test that repeats, by which every rule is used both ways)
    samplings = dice.sample(list(grid("multilingual")), 33)[which::3]
    # Cold and without a penalty it says the same again and again.
    cold = {"temperature": 0.01, "repetition_penalty": 1.0, "top_p": 1.0}
    samplings.append(but(an_utterance("x", sampling=samplings[0]), **cold).sampling)
    utterances = [
        but(an_utterance(dice.choice((*TEXTS, "Bonjour, vous.")), sampling=one), seed=number, language=language)
        for number, one in enumerate(samplings)
        for language in (dice.choice(("en", "fr", "de")),)
    ]
    unsorted = [one for one in utterances if one.sampling.top_p == 1]
    # Two are spoken both ways: whoever needs no sorting must not hear of it.
    ways = {False: unsorted, True: [one for one in utterances if one not in unsorted[2:]]}
    slots = Slots(model.t3, slots=12, dtype=torch.float32, most_tokens=1000, longest=256)
    together = {
        sort: chosen(slots, [(prompted(model, "multilingual", one), one) for one in asked], sort=sort, by_count=False)
        for sort, asked in ways.items()
    }
    used: dict[bool, set[str]] = {sort: set() for sort in ways}
    for utterance in utterances:
        caplog.clear()
        held.clear()
        expected = by_the_package(model, "multilingual", utterance)
        found = {rule for rule in RULES if re.search(rf"{rule}=(True|tensor\(True)", caplog.text)} | held
        for sort, asked in ways.items():
            if utterance in asked:
                assert together[sort][asked.index(utterance)] == expected, (utterance, sort)
                used[sort] |= found
    for sort, found in used.items():
        assert rules <= found, (sort, found)


@pytest.mark.parametrize("kind", [*KINDS, "multilingual"])
def test_bfloat16_changes_logits_by_little(kind: str, models: Models) -> None:
    """All positions of a prompt and random tokens behind it, at once."""
    import torch

    from chatterbox_server.engines.fast.t3 import backbone

    model = models.lend(kind)
    prompt = prompted(model, kind, an_utterance("Hello to you.", sampling=KINDS_KNOWN[kind].defaults))
    spoken = model.t3.speech_emb(torch.randint(0, 6561, (1, 60), generator=torch.Generator().manual_seed(1)))
    x = torch.cat((prompt.embeds, spoken.expand(len(prompt.embeds), -1, -1)), dim=1)
    logits = {}
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            made = backbone.of(model.t3, dtype=dtype, positions=x.shape[1])
            rows = torch.arange(len(x))
            hidden = made.forward(x, made.cache(len(x), x.shape[1]), rows, torch.zeros_like(rows))
            logits[dtype] = made.logits(hidden[:, prompt.length :])
    exact, rounded = logits[torch.float32], logits[torch.bfloat16]
    assert float((rounded - exact).norm() / exact.norm()) < 0.03
    assert float((rounded.argmax(-1) == exact.argmax(-1)).float().mean()) > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_a_slot_is_anothers_while_steps_for_who_left_are_on_their_way(kind: str, models: Models) -> None:
    """As on a GPU, results are heard a few steps late, here always as late as may be; nobody hears another's.

    Of two slots, each goes through many hands; every third asker leaves before it is told all.
    """
    import torch

    from chatterbox_server.engine import Errand
    from chatterbox_server.engines.fast.t3.batch import Batch
    from chatterbox_server.engines.fast.t3.graphs import T3, Work
    from chatterbox_server.engines.fast.t3.slots import Slots

    class Late:
        """What CUDA's event is to a GPU that is never ahead of the host."""

        def query(self) -> bool:
            return False

        def synchronize(self) -> None:
            return None

    class OnItsWay(T3):
        def step(self, slots: Any, *, sort: bool) -> Work:
            return late(super().step(slots, sort=sort))

        def read(self, bites: Any, *, sort: bool) -> Work:
            return late(super().read(bites, sort=sort))

    def late(work: Work) -> Work:
        work._chosen._event = Late()
        return work

    model = models.lend(kind)
    asked = [
        but(an_utterance(TEXTS[number % 3], sampling=KINDS_KNOWN[kind].defaults), seed=number) for number in range(12)
    ]
    alone = [by_the_package(model, kind, one) for one in asked]
    batch = Batch(OnItsWay(Slots(model.t3, slots=2, dtype=torch.float32)), by_count=kind == "turbo")
    lines = [batch.ask(prompted(model, kind, one), one.seed, one.sampling, limit=1000) for one in asked]
    try:
        for number, (line, whole) in enumerate(zip(lines, alone, strict=True)):
            leaves = number % 3 == 1
            told = line.wait(Errand(), enough=2 if leaves else 1000)
            batch.leave(line)
            if kind == "turbo" and told[-1] == 6562:
                told = told[:-1]
            assert told == whole[: len(told)]
            assert leaves or len(told) == len(whole)
    finally:
        batch.close()


def test_steps_that_take_all_of_the_gpu_wait_for_who_is_spoken_to_unless_somebody_waits_for_them(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from chatterbox_server.engine import Errand
    from chatterbox_server.engines.fast.t3 import batch as batches
    from chatterbox_server.engines.fast.t3.graphs import T3
    from chatterbox_server.engines.fast.t3.slots import Slots

    class Alone(T3):
        def alone(self, count: int) -> bool:
            return count <= 2

    few = 2
    monkeypatch.setattr(batches, "PATIENCE_S", 60.0)
    monkeypatch.setattr(batches, "STEPS_IN_A_ROW", few)
    model, asked, gone = models.lend("chatterbox"), but(an_utterance(TEXTS[0]), seed=3), threading.Event()
    alone = by_the_package(model, "chatterbox", asked)
    assert len(alone) > 16
    slots = Slots(model.t3, slots=4, dtype=torch.float32)
    batch = batches.Batch(Alone(slots), by_count=False, gone_before=gone.wait)
    line = batch.ask(prompted(model, "chatterbox", asked), asked.seed, asked.sampling, limit=1000)
    try:
        # Each time as many as are waited for, and those that take no longer than others will wait.
        for enough in (4, 8, 13):
            assert len(line.wait(Errand(), enough=enough)) >= enough
            time.sleep(0.2)
            assert len(line.tokens) <= enough + few + 1
        gone.set()
        assert line.wait(Errand(), enough=1000) == alone
    finally:
        batch.close()
