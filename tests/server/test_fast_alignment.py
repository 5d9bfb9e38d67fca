"""What T3's attention says of its text: the package's own AlignmentStreamAnalyzer comes to the same verdicts."""

import functools
import importlib.util
import logging
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_server.engines.stock import KINDS
from server import tiny
from server.fakes import an_utterance
from server.test_fast_t3 import prompted
from server.tiny import Models, but

if TYPE_CHECKING:
    from chatterbox_server.engines.fast.t3.alignment import Alignment, Glance
    from chatterbox_server.engines.fast.t3.slots import Prompt

pytestmark = [*tiny.warnings, *tiny.model]

STOP, TOKENS, POSITIONS = 7, 12, 120
REASONS = ("long_tail", "alignment_repetition", "token_repetition")


@dataclass
class Told:
    """One utterance by the package's class: hand-made attention in, verdicts out."""

    begin: int
    text: int
    seed: int
    chosen: list[int] = field(default_factory=lambda: [STOP - 1])

    def __post_init__(self) -> None:
        import torch
        from chatterbox.models.t3.inference.alignment_stream_analyzer import (
            LLAMA_ALIGNED_HEADS,
            AlignmentStreamAnalyzer,
        )

        class Said(torch.nn.Module):  # type: ignore[misc,unused-ignore]
            def forward(self, attention: Any) -> Any:
                return None, attention

        class Layer(torch.nn.Module):  # type: ignore[misc,unused-ignore]
            def __init__(self) -> None:
                super().__init__()
                self.self_attn = Said()

        self.heads = LLAMA_ALIGNED_HEADS
        self.backbone = torch.nn.Module()
        self.backbone.layers = torch.nn.ModuleList(Layer() for _ in range(14))
        self.analyzer = AlignmentStreamAnalyzer(
            self.backbone, None, text_tokens_slice=(self.begin, self.begin + self.text), eos_idx=STOP
        )
        self.dice = random.Random(self.seed)  # noqa: S311 (a test that repeats)
        self.noise = torch.Generator().manual_seed(self.seed)
        self.speed = self.dice.choice((0.6, 1.0, 1.7))
        self.fault = self.dice.choice(("none", "lingers", "goes back", "jumps"))
        self.sharp = self.dice.choice((1.0, 4.0, 12.0))
        self.at = 0.0

    def attention(self) -> Any:
        """Of the newest position, ``(heads, positions)``: along the text, and what goes wrong there."""
        import torch

        length = self.begin + self.text + 1 + len(self.chosen)
        if self.at >= self.text - 3 and self.fault != "lingers":
            self.at = self.dice.uniform(0, self.text) if self.fault != "none" else self.text + 3.0
        elif self.fault == "jumps" and self.dice.random() < 0.15:
            self.at += self.dice.choice((-6, -4, -3, 5, 7, 9))
        self.at = min(self.at + self.speed, self.text - 1.0 if self.fault == "lingers" else 2.0 * self.text)
        scores = torch.randn(len(self.heads), length, generator=self.noise)
        near = min(self.begin + max(round(self.at), 0), length - 1)
        scores[:, near] += self.sharp
        whole = torch.zeros(len(self.heads), POSITIONS)
        whole[:, :length] = torch.softmax(scores, dim=-1)
        return whole

    def look(self, attention: Any) -> tuple[int, int, bool]:
        """Verdict, where it is, whether all is said."""
        import torch

        length = self.begin + self.text + 1 + len(self.chosen)
        first = self.analyzer.curr_frame_pos == 0
        for (layer, head), row in zip(self.heads, attention, strict=True):
            # Other heads, the row without text and the prompt's positions are not to be looked at.
            heads = torch.full((2, 16, length if first else 1, length), 0.9)
            heads[0, head, -1] = row[:length]
            self.backbone.layers[layer].self_attn(heads)
        logits = torch.randn(1, TOKENS, generator=self.noise)
        ruled = self.analyzer.step(logits.clone(), next_token=self.chosen[-1])
        others = [token for token in range(TOKENS) if token != STOP]
        over = bool((ruled[0, others] == -(2.0**15)).all()) and float(ruled[0, STOP]) == 2.0**15
        assert over or torch.equal(ruled[0, others], logits[0, others])
        held = float(ruled[0, STOP]) == -(2.0**15)
        assert over or held or torch.equal(ruled, logits)
        return 2 if over else int(held), int(self.analyzer.text_position), bool(self.analyzer.complete)

    def choose(self) -> None:
        others = [token for token in range(STOP) if token != self.chosen[-1]]
        repeats = self.dice.random() < 0.02 and len(self.chosen) > 1
        self.chosen.append(self.chosen[-1] if repeats else self.dice.choice(others))


def an_alignment(utterances: list[Told]) -> "Alignment":
    import torch

    from chatterbox_server.engines.fast.t3.alignment import Alignment

    made = Alignment(utterances[0].heads, slots=len(utterances) + 1, stop=STOP, device="cpu")
    everyone = torch.arange(len(utterances))
    begins, lengths = (torch.tensor([getattr(one, name) for one in utterances]) for name in ("begin", "text"))
    made.begin(everyone, begins, lengths)
    return made


def test_every_verdict_is_the_packages_whatever_is_seen(models: Models, caplog: pytest.LogCaptureFixture) -> None:
    """48 slots, 60 turns: at every one some sit out, and a slot is given to another utterance."""
    import torch

    assert models
    caplog.set_level(logging.WARNING)
    dice = random.Random(3)  # noqa: S311
    utterances = [Told(dice.randint(0, 9), dice.randint(6, 30), seed) for seed in range(48)]
    alignment = an_alignment(utterances)
    everyone = torch.arange(len(utterances))
    seen: Counter[str] = Counter()
    for number, one in enumerate(utterances):
        assert int(alignment.verdicts[number]) == one.look(one.attention())[0]
        one.choose()
    for turn in range(60):
        for number in range(max(turn - 12, 0), turn - 11):
            utterances[number] = one = Told(dice.randint(0, 9), dice.randint(6, 30), 1000 * turn + number)
            alignment.begin(torch.tensor([number]), torch.tensor([one.begin]), torch.tensor([one.text]))
            assert int(alignment.verdicts[number]) == one.look(one.attention())[0]
            one.choose()
        alive = torch.tensor([dice.random() < 0.9 for _ in utterances])
        attention = torch.stack([one.attention() for one in utterances])
        last = torch.tensor([one.chosen[-1] for one in utterances])
        count = torch.tensor([len(one.chosen) - 1 for one in utterances])
        before = alignment.verdicts.clone()
        alignment.look(everyone, last, count, attention, alive)
        for number, one in enumerate(utterances):
            if not alive[number]:
                assert alignment.verdicts[number] == before[number]
                continue
            caplog.clear()
            verdict, position, complete = one.look(attention[number])
            told = (alignment.verdicts[number], alignment.reached[number], alignment.complete[number])
            assert tuple(int(one) for one in told) == (verdict, position, complete), (number, len(one.chosen))
            seen.update(reasons(caplog.text) or ["held" if verdict else "free"])
            one.choose()
    assert not bool(alignment.verdicts[-1])
    # Each rule has decided, also by itself.
    assert min(seen[reason] for reason in (*REASONS, "held", "free")) > 9, seen


def reasons(logged: str) -> list[str]:
    """Which of its rules the package names when it forces the end; several as one word."""
    said = next((line for line in logged.splitlines() if "forcing EOS" in line), "")
    found = [name for name in REASONS if f"{name}=True" in said or f"{name}=tensor(True)" in said]
    return ["+".join(found)] if found else []


@pytest.mark.parametrize("text", [4, 5])
def test_a_text_too_short_for_the_package_is_spoken(text: int) -> None:
    """The package looks for text before the last five tokens: there is none, and it fails as soon as all is said."""
    import torch

    one = Told(3, text, 1)
    alignment = an_alignment([one])
    assert one.look(one.attention())[0] == int(alignment.verdicts[0]) == 0
    one.choose()
    for _ in range(20):
        attention = torch.full((1, len(one.heads), POSITIONS), 0.0)
        attention[..., one.begin + min(len(one.chosen), text - 1)] = 1.0
        alignment.look(
            torch.tensor([0]), torch.tensor([one.chosen[-1]]), torch.tensor([len(one.chosen) - 1]),
            attention, torch.tensor([True]),
        )  # fmt: skip
        if not bool(one.analyzer.complete):
            if bool(alignment.complete[0]):
                with pytest.raises(IndexError, match="non-zero size"):
                    one.look(attention[0])
            else:
                assert one.look(attention[0])[0] == int(alignment.verdicts[0])
        if int(alignment.verdicts[0]) == 2:
            break
        one.chosen.append(len(one.chosen) % 5)
    # Its end lingers for five tokens after it is said.
    assert len(one.chosen) == text + 5


WORDS = ("one", "two", "go", "hello", "bonjour", "vous", "to", "you", "all", "and", "on", "again", "yes", "no")
SPOKEN = 60
"""Tokens, random, behind each text."""


@pytest.mark.parametrize("watchful", [False, True], ids=["attention everywhere", "attention on text"])
def test_in_bfloat16_few_verdicts_are_others_and_sums_are_close(watchful: bool, models: Models) -> None:
    """16 texts, the same tokens behind them in both. Beside each limit is what ten such draws came to at most."""
    import torch

    from chatterbox_server.engines.fast.t3.alignment import ENOUGH, OVER

    model = models.lend_watchful(ends=True) if watchful else models.lend("multilingual")
    dice = random.Random(4)  # noqa: S311
    told = KINDS["multilingual"].defaults
    texts = [" ".join(dice.choices(WORDS, k=dice.randint(1, 6))).capitalize() + "." for _ in range(16)]
    utterances = [but(an_utterance(text, sampling=told), language=dice.choice(("en", "fr", "de"))) for text in texts]
    with torch.inference_mode():
        prompts = [prompted(model, "multilingual", one) for one in utterances]
        tokens = torch.randint(0, 6561, (len(prompts), 1, SPOKEN), generator=torch.Generator().manual_seed(4))
        spoken = model.t3.speech_emb(tokens) + model.t3.speech_pos_emb.emb.weight[1 : SPOKEN + 1]
        exact, rounded = (judged(model, prompts, spoken, dtype) for dtype in (torch.float32, torch.bfloat16))
    # Of 960 verdicts 0.7 % were others, on text 3.1 %; with attention's scores rounded, too, 6 % at least.
    differ = exact["verdicts"] != rounded["verdicts"]
    assert float(differ.float().mean()) < (0.06 if watchful else 0.02)
    # Whoever is believed to have said all a token sooner begins to add up sooner: 3 at most.
    alike = (exact["complete"] == rounded["complete"]).all(dim=0)
    assert int(alike.sum()) > 10
    sums, other = (torch.cat((one["again"][..., None], one["lingered"]), dim=-1)[:, alike] for one in (exact, rounded))
    # 0.06.
    assert float(((other - sums).abs() / sums.clamp(min=ENOUGH)).max()) < 0.1
    # An end is forced in one and not in the other only where a sum was as good as there: within 0.12.
    ends = ((exact["verdicts"] == OVER) != (rounded["verdicts"] == OVER))[:, alike]
    assert bool(((sums - ENOUGH).abs().amin(dim=-1)[ends] < 0.25).all())
    # There was something to agree on.
    assert [int((exact["verdicts"] == verdict).sum()) > 30 for verdict in (0, 1, 2)] == [True, True, watchful]


def glanced(glances: "list[Glance]", begin: int, layer: int, *shown: Any) -> None:
    """Each of ``glances`` at one position more, as if it were a step's only one."""
    query, keys, seen = shown
    for until, glance in enumerate(glances, begin + 1):
        glance(layer, query[:, :, :until], keys, seen[:, :, :until])


def judged(model: Any, prompts: "list[Prompt]", spoken: Any, dtype: Any) -> dict[str, Any]:
    """What is known after each token of each utterance: ``(tokens, utterances, …)``."""
    import torch
    from torch.nn import functional

    from chatterbox_server.engines.fast.t3 import backbone
    from chatterbox_server.engines.fast.t3.alignment import Alignment, Glance

    positions = max(prompt.length for prompt in prompts) + SPOKEN
    made = backbone.of(model.t3, dtype=dtype, positions=positions)
    alignment = Alignment.of(model.t3, slots=len(prompts), device="cpu")
    assert alignment is not None
    rows, everyone = torch.arange(2), torch.arange(len(prompts))
    attention = []
    for prompt, said in zip(prompts, spoken, strict=True):
        glances = [Glance(alignment.heads, torch.tensor([0]), 2) for _ in range(SPOKEN)]

        x = torch.cat((prompt.embeds, said.expand(2, -1, -1)), dim=1)
        look = functools.partial(glanced, glances, prompt.length)
        made.forward(x, made.cache(2, x.shape[1]), rows, torch.zeros_like(rows), look=look)
        # To as many positions for each.
        attention.append(torch.cat([functional.pad(one.attention, (0, positions - x.shape[1])) for one in glances]))
    begins = torch.tensor([prompt.text.start for prompt in prompts])
    alignment.begin(everyone, begins, torch.tensor([len(prompt.text) for prompt in prompts]))
    known: dict[str, list[Any]] = {name: [] for name in ("verdicts", "complete", "again", "lingered")}
    for count, one in enumerate(torch.stack(attention, dim=1), 1):
        last, alive = torch.full_like(everyone, count), torch.ones_like(everyone, dtype=torch.bool)
        alignment.look(everyone, last, torch.full_like(everyone, count), one, alive)
        for name, seen in known.items():
            seen.append(getattr(alignment, name).clone())
    return {name: torch.stack(seen) for name, seen in known.items()}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")  # triton's interpreter
def test_a_kernel_judges_as_torch_does(models: Models) -> None:
    """12 utterances, long enough for every verdict; interpreted, as in tests/server/test_fast_kernels.py."""
    import torch
    import triton

    from chatterbox_server.engines.fast.t3 import choosing

    if not triton.knobs.runtime.interpret:
        pytest.skip("compiled for a GPU in this process")
    assert models
    utterances = [Told(number, 6 + number, 100 + number) for number in range(12)]
    by_torch, by_kernel = an_alignment(utterances), an_alignment(utterances)
    for one in utterances:
        one.choose()
    dice = random.Random(5)  # noqa: S311
    slots, verdicts = torch.arange(len(utterances)), Counter[int]()
    for _ in range(40):
        alive = torch.tensor([dice.random() < 0.9 for _ in utterances])
        attention = torch.stack([one.attention() for one in utterances])
        last = torch.tensor([one.chosen[-1] for one in utterances])
        count = torch.tensor([len(one.chosen) - 1 for one in utterances])
        # The row with text is the first of two.
        at = torch.stack([torch.tensor([one.begin + one.text + len(one.chosen), 0]) for one in utterances]).int()
        by_torch.look(slots, last, count, attention, alive)
        choosing.judge[(len(utterances),)](
            attention.log(), slots, at, last, count, ~alive, by_kernel.begins, by_kernel.lengths, by_kernel.reached,
            by_kernel.complete, by_kernel.lingered, by_kernel.again, by_kernel.before, by_kernel.verdicts,
            HEADS=3, ROWS=2, POSITIONS=POSITIONS, WIDTH=128, EARLY=False,
        )  # fmt: skip
        for name in ("reached", "complete", "before", "verdicts", "again", "lingered"):
            got, right = (getattr(one, name).double() for one in (by_kernel, by_torch))
            assert torch.allclose(got, right, atol=1e-5), name
        verdicts.update(by_torch.verdicts[:-1].tolist())
        for one, alone in zip(utterances, alive.tolist(), strict=True):
            if alone:
                one.choose()
    assert min(verdicts[verdict] for verdict in (0, 1, 2)) > 9, verdicts
