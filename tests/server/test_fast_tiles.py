"""The fast engine's Triton kernels against the same layers in torch, interpreted on the CPU; scripts/gpu on a GPU."""

import copy
import importlib.util
from typing import Any

import pytest

from server import tiny
from server.tiny import Models

pytestmark = [
    *tiny.warnings,
    *tiny.model,
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # triton's interpreter
    # torch's wheel for CPUs comes without it.
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]

CLOSE = 1e-5


@pytest.fixture(scope="module")
def tiles() -> Any:
    import triton

    from chatterbox_server.engines.fast.s3gen import tiles

    if not triton.knobs.runtime.interpret:
        pytest.skip("compiled for a GPU in this process")
    return tiles


def some(*shape: int) -> Any:
    import torch

    return torch.randn(*shape) * 0.2


def apart(one: Any, other: Any) -> float:
    return float((one - other).norm() / other.norm())


def some_blocks(count: int) -> Any:
    """Of the package's own kind, with weights that matter."""
    import torch
    from chatterbox.models.s3gen.matcha.transformer import BasicTransformerBlock

    from chatterbox_server.engines.fast.s3gen.flow import _blocks

    blocks = [
        BasicTransformerBlock(
            dim=64, num_attention_heads=2, attention_head_dim=64, dropout=0.0, activation_fn="gelu",
            attention_bias=False, cross_attention_dim=None, double_self_attention=False,
        ).eval()
        for _ in range(count)
    ]  # fmt: skip
    for block in blocks:
        for parameter in block.parameters():
            parameter.data = some(*parameter.shape)
    return _blocks(blocks, torch.float32)


def test_blocks_are_what_torch_makes_of_them(tiles: Any) -> None:
    import torch

    from chatterbox_server.engines.fast.s3gen.flow import _InTorch, _InTriton
    from chatterbox_server.engines.fast.s3gen.layers import Lengths

    torch.manual_seed(1)
    assert tiles
    lengths = Lengths.of(torch.tensor([37, 30, 1]), 37)
    x, blocks = some(3, 37, 64), some_blocks(3)
    right = _InTorch("mask").blocks(x, lengths, blocks)
    # On the CPU torch bends by the exact form.
    assert apart(_InTriton("mask").blocks(x + blocks.biases, lengths, blocks), right) < CLOSE


def test_an_estimator_is_what_torch_makes_of_it(tiles: Any, models: Models) -> None:
    import torch

    from chatterbox_server.engines.fast.s3gen.flow import BANDS, Estimator
    from chatterbox_server.engines.fast.s3gen.layers import Lengths

    torch.manual_seed(1)
    assert tiles
    estimator = copy.deepcopy(models.lend("chatterbox").s3gen.flow.decoder.estimator)
    for parameter in estimator.parameters():
        if parameter.dim() == 1:
            parameter.data = parameter.data + some(*parameter.shape)
    lengths = Lengths.of(torch.tensor([37, 30]), 37)
    x, told = some(2, 37, BANDS), some(2, 37, 3 * BANDS)
    with torch.inference_mode():
        times = torch.linspace(0, 1, 3)
        plain = Estimator(estimator, times, dtype=torch.float32, attention="mask", kernels="torch")
        ours = Estimator(estimator, times, dtype=torch.float32, attention="triton", kernels="triton")
        made, right = (each(x, each.constant(told, guided=False), lengths, 1) for each in (ours, plain))
    assert apart(made[lengths.valid], right[lengths.valid]) < 1e-4


def test_an_encoder_is_what_torch_makes_of_it(tiles: Any, models: Models) -> None:
    import torch

    from chatterbox_server.engines.fast.s3gen.encoder import Encoder

    torch.manual_seed(1)
    assert tiles
    encoder = copy.deepcopy(models.lend("chatterbox").s3gen.flow.encoder)
    for parameter in encoder.parameters():
        parameter.data = parameter.data + some(*parameter.shape)
    lengths, embedded = torch.tensor([70, 41, 1]), some(3, 70, 64)
    with torch.inference_mode():
        plain = Encoder(encoder, dtype=torch.float32, device="cpu")
        ours = Encoder(encoder, dtype=torch.float32, device="cpu", kernels="triton")
        made, right = ours(embedded, lengths), plain(embedded, lengths)
    inside = torch.arange(140) < 2 * lengths[:, None]
    assert apart(made[inside], right[inside]) < 1e-4


@pytest.mark.parametrize("counts", [(150, 128, 1), (64, 0, 63)])
def test_attention_is_what_torch_makes_of_it(counts: tuple[int, ...], tiles: Any) -> None:
    import torch

    from chatterbox_server.engines.fast.s3gen.layers import Lengths, attend

    torch.manual_seed(1)
    assert tiles
    lengths = Lengths.of(torch.tensor(counts), max(counts))
    made = torch.randn(3, max(counts), 3 * 2 * 64)
    # What lies in padding may be any number.
    made[~lengths.valid] = 100.0
    ours = attend(made, 2, lengths, "triton")
    right = attend(made, 2, lengths, "mask")
    assert apart(ours[lengths.valid], right[lengths.valid]) < CLOSE
    for row, count in zip(ours, counts, strict=True):
        assert not row[-(-count // 64) * 64 :].any()


@pytest.mark.parametrize("many", [1, 8192])
@pytest.mark.parametrize("inputs", [64, 80, 128])
def test_a_convolution_is_what_torch_makes_of_it(
    inputs: int, many: int, tiles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from chatterbox_server.engines.fast.s3gen.flow import _InTorch, _InTriton

    torch.manual_seed(1)
    monkeypatch.setattr(tiles, "MANY_ROWS", many)
    x, first, norm = some(3, 37, inputs), (some(64, 3 * inputs), some(64)), (1 + some(64), some(64), 1e-5)
    for added in (some(64), some(3, 37, 64)):
        ours, plain = (made("mask").convolution(x, first, norm, added) for made in (_InTriton, _InTorch))
        assert apart(ours, plain) < CLOSE


@pytest.mark.parametrize(("channels", "taps"), [(64, 11), (128, 3)])
def test_a_residual_block_is_what_torch_makes_of_it(channels: int, taps: int, tiles: Any) -> None:
    import torch
    from chatterbox.models.s3gen.hifigan import ResBlock

    from chatterbox_server.engines.fast.s3gen.vocoder import _inside, _Resblock, _Tiled

    torch.manual_seed(1)
    assert tiles
    block = ResBlock(channels, taps, [1, 3, 5]).eval()
    for module in block.modules():
        if hasattr(module, "parametrizations"):
            module.parametrizations.weight.original0.data.mul_(10)
    with torch.inference_mode():
        x, summed, ends = torch.randn(2, channels, 1, 75), torch.randn(2, channels, 1, 75), torch.tensor([75, 33])
        inside = _inside(x, ends)

        plain, ours = _Resblock(block, torch.float32), _Tiled(block, torch.float32)
        for more in (None, summed):
            made, right = ours(x, ends, inside, more), plain(x, ends, inside, more)
            assert apart(made * inside, right * inside) < CLOSE


def test_a_mean_is_what_torch_makes_of_it(tiles: Any) -> None:
    import torch

    from chatterbox_server.engines.fast.s3gen.vocoder import _inside, _mean, _tiled_mean

    assert tiles
    x, ends = torch.randn(2, 64, 1, 75), torch.tensor([75, 33])
    inside = _inside(x, ends)
    assert apart(_tiled_mean(x, ends, inside, 1 / 3, 0.1), _mean(x, ends, inside, 1 / 3, 0.1)) < CLOSE
