"""T3's steps by Triton's kernels against the same by torch, interpreted on the CPU; scripts/gpu/fast_t3.py on a GPU."""

import copy
import importlib.util
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_server.engine import Sampling
from chatterbox_server.engines.stock import KINDS, kinds
from server import tiny
from server.fakes import an_utterance
from server.tiny import Models

if TYPE_CHECKING:
    from chatterbox_server.engines.fast.t3.slots import Prompt, Slots

pytestmark = [
    *tiny.warnings,
    *tiny.model,
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # triton's interpreter
    # torch's wheel for CPUs comes without it.
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]

STEPS = 1
WATCHED = ((1, 1), (0, 0), (1, 0))
STATE = ("last", "count", "position", "done", "seen")
SAMPLINGS = (
    Sampling(top_k=0),
    Sampling(temperature=1.3, cfg_weight=0.8, min_p=0.0, top_k=0, repetition_penalty=2.0),
)


@pytest.fixture(scope="module")
def stepper() -> Any:
    import triton

    from chatterbox_server.engines.fast.t3 import stepper

    if not triton.knobs.runtime.interpret:
        pytest.skip("compiled for a GPU in this process")
    return stepper


@pytest.mark.parametrize(
    ("kind", "together", "few", "watched"),
    [
        pytest.param("chatterbox", 1, 2, WATCHED, id="chatterbox, watched, one alone: a kernel for each matrix"),
        pytest.param("chatterbox", 2, 0, WATCHED, id="chatterbox, watched, two: around cuBLAS"),
        pytest.param("turbo", 1, 2, (), id="turbo, one alone: a kernel for each matrix"),
    ],
)
def test_kernels_read_and_step_as_torch_does(
    kind: str, together: int, few: int, watched: tuple[tuple[int, int], ...], *, stepper: Any, models: Models
) -> None:
    import torch

    from chatterbox_server.engines.fast.t3 import slots
    from chatterbox_server.engines.fast.t3.alignment import Alignment

    model = models.lend(kind)
    prompts = []
    for number in range(together):
        utterance = an_utterance("Hello to you."[: 8 + number], sampling=SAMPLINGS[number])
        conditionals = kinds.conditioned(KINDS[kind], utterance, copy.copy(model.conds.t3))
        manner = slots.embedded(model.t3, conditionals)
        prompts.append(slots.prompt(model.t3, KINDS[kind].text(model, utterance), manner))
    # A slot more than there are utterances: the batch is filled up with the spare one.
    by_torch, by_kernels = (
        slots.Slots(model.t3, slots=together + 1, dtype=torch.float32, most_tokens=16, longest=128) for _ in range(2)
    )
    if watched:
        # As multilingual watches itself, in a model of two layers: fourteen take the interpreter too long.
        for one in (by_torch, by_kernels):
            one.alignment = Alignment(watched, slots=together + 2, stop=one.stop, device="cpu")
    padded = torch.tensor([*range(together), by_kernels.spare])
    with torch.inference_mode():
        expected = [read(by_torch, by_torch.read, prompts)]
        got = [read(by_kernels, stepper.Stepper(by_kernels, together, reads=True).read, prompts)]
        for alignment in (by_torch.alignment, by_kernels.alignment):
            if alignment is not None and together > 1:
                alignment.complete[0], alignment.again[0] = True, 6.0
        steps = stepper.Stepper(by_kernels, together + 1, few=few * (together + 1))
        for _ in range(STEPS):
            expected.append(by_torch.step(padded[:-1], sort=False)[0].tolist())
            got.append(steps.step(padded, sort=False)[0][:-1].tolist())
    assert got == expected
    if by_torch.alignment is not None and by_kernels.alignment is not None:
        assert together == 1 or got[-1][0] == by_torch.stop
        for name in ("reached", "complete", "before", "verdicts", "again", "lingered"):
            seen, right = (getattr(one, name)[:together] for one in (by_kernels.alignment, by_torch.alignment))
            assert torch.allclose(seen.double(), right.double(), atol=1e-6), name
    for name in STATE:
        assert torch.equal(getattr(by_torch, name)[:together], getattr(by_kernels, name)[:together]), name
    for one, other in ((by_torch.cache.keys, by_kernels.cache.keys), (by_torch.cache.values, by_kernels.cache.values)):
        rows = together * by_torch.rows
        assert float((one[:, :rows] - other[:, :rows]).abs().max()) < 1e-5


def read(of: "Slots", work: Any, prompts: "list[Prompt]") -> list[int]:
    """First tokens behind prompts of one bite each."""
    import torch

    from chatterbox_server.engines.fast.t3.slots import CHUNK, Bite

    of.begin([(number, one, 2**33 * number + 7, SAMPLINGS[number], STEPS + 1) for number, one in enumerate(prompts)])
    x = torch.zeros(len(prompts), of.rows, CHUNK, of.backbone.dim)
    bites = [Bite(number, one, 0) for number, one in enumerate(prompts)]
    tokens: list[int] = work(x, *map(torch.tensor, of.fill(x, bites)), sort=False)[0].tolist()
    return tokens
