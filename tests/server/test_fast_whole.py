"""T3's layers in one launch: for whom, and ``whole.cu`` on a GPU of fibres; scripts/gpu/fast_t3.py on a real one."""

import ctypes
import importlib.util
import platform
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from chatterbox_server.engines.fast.t3.backbone import Backbone

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch"),
]

LAYERS, POSITIONS, TOKENS = 1, 96, 8194


@pytest.fixture(scope="module")
def backbone() -> "Backbone":
    """A layer of chatterbox's size, weights random."""
    import torch

    from chatterbox_server.engines.fast.t3.backbone import Backbone, Layer

    dice = torch.Generator().manual_seed(3)

    def matrix(out: int, of: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(out, of, generator=dice) * scale / of**0.5).bfloat16()

    layer = Layer(
        matrix(3072, 1024, 1.5), None, matrix(1024, 1024), None, matrix(8192, 1024), None, matrix(1024, 4096), None
    )
    angles = torch.arange(POSITIONS)[:, None] * 10_000 ** -(torch.arange(0, 64, 2) / 64).repeat(2)
    head = matrix(TOKENS, 1024)
    return Backbone(
        layers=(layer,) * LAYERS, head=head, head_bias=None, heads=16, head_dim=64, eps=1e-5, gated=True,
        cos=angles.cos(), sin=angles.sin(), positions=None,
    )  # fmt: skip


def test_what_it_was_not_written_for_it_says_at_once(backbone: "Backbone") -> None:
    import torch

    from chatterbox_server.engines.fast.t3 import whole

    assert whole.unfit(backbone, 2, TOKENS) is None
    turbo = replace(backbone, gated=False, cos=None, sin=None, head_bias=torch.zeros(TOKENS))
    assert whole.unfit(turbo, 2, TOKENS) == "one launch for all layers needs a Llama, no biases"
    exact = replace(backbone, head=backbone.head.float())
    assert whole.unfit(exact, 6, 100) == (
        "one launch for all layers needs bfloat16, 8,192 to 9,216 tokens, 1, 2, 4 or 8 rows"
    )


@pytest.mark.parametrize(
    ("gpu", "reason"),
    [
        ({}, None),
        ({"capability": (8, 9)}, "needs compute capability 9.0, this GPU has 8.9"),
        ({"multiprocessors": 114}, "needs 128 multiprocessors, there are 114"),
        ({"capability": (12, 0), "shared_bytes": 101_376}, "needs 232448 bytes of shared memory, there are 101376"),
        ({"cooperative": False}, "needs cooperative launches"),
        ({"mps": True}, "needs the GPU for itself, and MPS shares it"),
    ],
)
def test_a_gpu_that_it_does_not_fit_keeps_the_kernels_of_today(gpu: dict[str, Any], reason: str | None) -> None:
    from chatterbox_server.engines.fast.t3 import whole

    h200: dict[str, Any] = {"capability": (9, 0), "multiprocessors": 132, "shared_bytes": 232_448}
    h200 |= {"cooperative": True, "mps": False}
    got = whole.unfit_gpu(**h200 | gpu)
    assert got == (reason and f"one launch for all layers {reason}")


def test_its_shared_memory_is_used_up_and_not_more() -> None:
    from chatterbox_server.engines.fast.t3 import whole

    assert [whole.ring(m)[0] for m in whole.ROWS] == [12, 12, 10, 8]
    assert all(whole.ring(m)[1] <= whole.SHARED_BYTES for m in whole.ROWS)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="its fibres are for x86-64")
def test_programs_that_never_meet_step_as_torch_does(backbone: "Backbone", tmp_path: Path) -> None:
    """Twice, for what one launch leaves lies there in the next. In an order that nobody would wish for."""
    import torch

    from chatterbox_server.engines.fast.t3 import whole
    from chatterbox_server.engines.fast.t3.backbone import Cache

    m, watched = 2, ((0, 3),)
    machine = emulated(tmp_path, whole.options(m, TOKENS, LAYERS, watched=len(watched), bounded=False))
    dice = torch.Generator().manual_seed(5)
    cache = backbone.cache(4, POSITIONS)
    for part in (cache.keys, cache.values):
        part.copy_(torch.randn(part.shape, generator=dice))
    right = Cache(cache.keys.clone(), cache.values.clone())
    x, rows, at = torch.zeros(m, 1024), torch.tensor([3, 1], dtype=torch.int32), torch.zeros(m, dtype=torch.int32)
    logits, scores = torch.zeros(m, TOKENS), torch.zeros(1, len(watched), POSITIONS)
    slots: Any = SimpleNamespace(backbone=backbone, cache=cache, device=torch.device("cpu"))
    buffers = whole.Buffers.of(slots, x=x, rows=rows, at=at, logits=logits, scores=scores, heads=watched)
    seen: list[torch.Tensor] = []

    def look(_: int, query: torch.Tensor, keys: torch.Tensor, __: torch.Tensor) -> None:
        seen.append(keys[3, 3].float() @ query[0, 3, 0].float() / 8)

    for position in (70, 71):
        x.copy_(torch.randn(m, 1024, generator=dice))
        at.fill_(position)
        with torch.inference_mode():
            expected = backbone.logits(backbone.forward(x[:, None].clone(), right, rows.long(), at.long(), look=look))
        # What is to be written nobody has to read.
        for part in (cache.keys, cache.values):
            part[:, rows.long(), :, position] = float("nan")
        turns = machine.launch(
            ctypes.byref(buffers.told), whole.PROGRAMS, whole.THREADS, whole.ring(m)[1], position, 3_000
        )
        assert turns > 0
        assert relative(logits, expected[:, 0]) < 0.01
        assert relative(cache.keys, right.keys) < 0.001
        assert relative(cache.values, right.values) < 0.001
        assert relative(scores[0, 0, : position + 1], seen.pop()[: position + 1]) < 0.01


def relative(one: Any, other: Any) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


def emulated(folder: Path, options: tuple[str, ...]) -> Any:
    """``whole.cu`` for tests/server/emulated.h."""
    from chatterbox_server.engines.fast.t3 import whole

    source, machine = Path(whole.__file__).with_suffix(".cu"), Path(__file__).with_name("emulated.h")
    program, library = folder / "whole.cpp", folder / "whole.so"
    program.write_text(f'#include "{source}"\nENTER\n')
    defined = (f'-DEMULATED="{machine}"', *options)
    # Pragmas for a compiler that unrolls are none of its.
    argv = ("g++", "-std=c++17", "-O2", "-w", "-shared", "-fPIC", *defined, str(program), "-o", str(library))
    subprocess.run(argv, check=True)
    return ctypes.CDLL(str(library))
