"""S3Gen's flow: speech tokens and a voice to a mel spectrogram, by the package's weights, for many utterances at once.

What does not change from step to step (time, speaker, prompt, the encoder's word) is worked out once. The state of the
solver and time itself are float32 whatever the network computes in.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch.nn import functional

from chatterbox_server.engine import EngineError
from chatterbox_server.engines.fast import noise
from chatterbox_server.engines.fast.s3gen.encoder import Encoder
from chatterbox_server.engines.fast.s3gen.layers import Attention, Kernels, Lengths, Linear, Norm, attend, windows

BANDS: Final = 80
"""Of the mel spectrogram."""


class Asked(NamedTuple):
    """A batch of utterances, padded to ``width`` tokens."""

    tokens: Any
    """The prompt's, then the utterance's, (batch, width); beyond ``lengths`` anything that is a token."""
    lengths: Any
    """(batch,)."""
    heard: Any
    """The prompt's own mel spectrogram, (batch, 2 * width, bands), float32."""
    prompt: Any
    """Frames of it that count, (batch,)."""
    frames: Any
    """To be made, the prompt's too, (batch,): two for each token, or fewer where the last tokens are look-ahead."""
    speaker: Any
    """The package's embedding, (batch, 192)."""
    seeds: Any
    """(batch,), int64."""


class Flow:
    """Of the package's ``CausalMaskedDiffWithXvec``, on the device where its weights are."""

    def __init__(
        self,
        flow: Any,
        *,
        steps: int,
        meanflow: bool,
        encoder_dtype: Any,
        dtype: Any,
        attention: Attention = "mask",
        kernels: Kernels = "torch",
    ) -> None:
        weight = flow.input_embedding.weight
        self._embedding = weight.detach().to(encoder_dtype)
        # In float32 as it is written.
        of_encoder: Kernels = kernels if encoder_dtype == dtype else "torch"
        self._encoder = Encoder(flow.encoder, dtype=encoder_dtype, device=weight.device, kernels=of_encoder)
        self._project = Linear.of(flow.encoder_proj, torch.float32)
        self._speaker = Linear.of(flow.spk_embed_affine_layer, torch.float32)
        self._guidance = None if meanflow else float(flow.decoder.inference_cfg_rate)
        times = torch.linspace(0, 1, steps + 1, device=weight.device)
        if not meanflow and flow.decoder.t_scheduler == "cosine":
            times = 1 - torch.cos(times * 0.5 * torch.pi)
        self._paces: list[float] = (times[1:] - times[:-1]).tolist()
        self._estimator = Estimator(flow.decoder.estimator, times, dtype=dtype, attention=attention, kernels=kernels)
        self.frames_per_token: int = flow.token_mel_ratio
        self.tokens_ahead: int = flow.pre_lookahead_len

    def __call__(self, asked: Asked) -> Any:
        """A mel spectrogram (batch, 2 * width, bands), float32; beyond ``asked.frames`` it may be anything."""
        width = asked.tokens.shape[1] * self.frames_per_token
        steps = torch.arange(width, device=asked.tokens.device)
        inside = steps[: asked.tokens.shape[1]] < asked.lengths[:, None]
        embedded = functional.embedding(asked.tokens, self._embedding) * inside[..., None]
        means = self._project(self._encoder(embedded, asked.lengths).float())
        known = asked.heard * (steps < asked.prompt[:, None])[..., None]
        likeness = self._speaker(functional.normalize(asked.speaker, dim=1))[:, None].expand(-1, width, -1)
        x = noise.normal(asked.seeds[:, None], noise.FLOW, steps.expand(len(means), -1), BANDS)
        return self._solve(x, torch.cat((means, likeness, known), dim=-1), Lengths.of(asked.frames, width))

    def _solve(self, x: Any, told: Any, lengths: Lengths) -> Any:
        """Euler's method."""
        batch = len(x)
        guided = self._guidance is not None
        constant = self._estimator.constant(told, guided=guided)
        over = lengths.twice() if guided else lengths
        for step, pace in enumerate(self._paces):
            slope = self._estimator(x, constant, over, step)
            if self._guidance is not None:
                slope = (1 + self._guidance) * slope[:batch] - self._guidance * slope[batch:]
            x = x + pace * slope
        return x


class Estimator:
    """Of the package's ``ConditionalDecoder`` as S3Gen configures it: causal, one resolution.

    Convolutions look back only, so that padding, which is behind, is kept out of attention alone.
    """

    def __init__(
        self,
        estimator: Any,
        times: Any,
        *,
        dtype: Any,
        attention: Attention,
        kernels: Kernels,
    ) -> None:
        if not estimator.causal or len(estimator.down_blocks) != 1:
            msg = 'cannot run an estimator that looks ahead, or at several resolutions: set server.engine = "stock"'
            raise EngineError(msg)
        self._dtype = dtype
        groups = [*estimator.down_blocks, *estimator.mid_blocks, *estimator.up_blocks]
        embedded = _embedded(estimator, times)
        layers: Layers = _InTorch(attention) if kernels == "torch" else _InTriton(attention)
        self._layers = layers
        self._blocks = [_blocks(group[1], dtype) for group in groups]
        self._resnets = [
            _Resnet(group[0], embedded, dtype, layers, before=blocks)
            for group, blocks in zip(groups, self._blocks, strict=True)
        ]
        self._entrance = _Entrance(self._resnets[0])
        self._down = Linear.over_time(estimator.down_blocks[0][2], dtype)
        self._up = Linear.over_time(estimator.up_blocks[0][2], dtype)
        self._last, self._last_norm = _convolution(estimator.final_block, dtype)
        self._nothing = torch.zeros_like(self._last_norm[1])
        self._out = Linear.of(estimator.final_proj, dtype)

    def constant(self, told: Any, *, guided: bool) -> tuple[Any, Any]:
        """What the first convolutions make of all but ``x``; with guidance, of nothing at all for the second half."""
        return self._entrance.constant(told.to(self._dtype), guided=guided)

    def __call__(self, x: Any, constant: tuple[Any, Any], lengths: Lengths, step: int) -> Any:
        """The slope at ``x``, float32; twice as many rows with guidance."""
        x = self._entrance(x.to(self._dtype), constant, step)
        x = self._attended(x, 0, lengths)
        skip = x
        x = self._down(self._layers.windows(x))
        for at in range(1, len(self._resnets) - 1):
            x = self._attended(self._resnets[at](x, step), at, lengths)
        x = self._resnets[-1](torch.cat((x, skip), dim=-1), step)
        x = self._up(self._layers.windows(self._attended(x, -1, lengths)))
        x = self._layers.convolution(x, self._last, self._last_norm, self._nothing)
        return self._out(x).float()

    def _attended(self, x: Any, at: int, lengths: Lengths) -> Any:
        return self._layers.blocks(x, lengths, self._blocks[at])


def _embedded(estimator: Any, times: Any) -> Any:
    """Each step's time as every resnet is told it, (steps, channels)."""
    begin = estimator.time_mlp(estimator.time_embeddings(times[:-1]))
    if not estimator.meanflow:
        return begin
    end = estimator.time_mlp(estimator.time_embeddings(times[1:]))
    return estimator.time_embed_mixer(torch.cat((begin, end), dim=1))


def _convolution(block: Any, dtype: Any) -> tuple[tuple[Any, Any], tuple[Any, Any, float]]:
    """Weight and bias; those of its norm, and what keeps it from dividing by nothing."""
    layer, norm = Linear.over_time(block.block[0], dtype), Norm.of(block.block[2], dtype)
    return (layer.weight, layer.bias), (norm.weight, norm.bias, norm.eps)


class _Resnet:
    """Two convolutions, with the time of the step between them; blocks come after it."""

    def __init__(self, resnet: Any, embedded: Any, dtype: Any, layers: "Layers", *, before: "Blocks") -> None:
        times = resnet.mlp(embedded).to(dtype)
        self._times = [times[step].clone() for step in range(len(times))]
        self.first, self._norm_1 = _convolution(resnet.block1, dtype)
        self._second, self._norm_2 = _convolution(resnet.block2, dtype)
        beside = Linear.of(resnet.res_conv, dtype)
        self.beside = Linear(beside.weight, beside.bias + before.biases) if layers.ahead else beside
        self._layers = layers

    def __call__(self, x: Any, step: int) -> Any:
        inner = self._layers.convolution(x, self.first, self._norm_1, self._times[step])
        return self._layers.convolution(inner, self._second, self._norm_2, self.beside(x))

    def told(self, first: Any, beside: Any, step: int) -> Any:
        """What comes after the first convolution, and the one beside both."""
        inner = self._layers.mish(first, self._norm_1, self._times[step])
        return self._layers.convolution(inner, self._second, self._norm_2, beside)


class _Entrance:
    """The first resnet, whose convolutions take what never changes and what does apart: they are linear."""

    def __init__(self, resnet: _Resnet) -> None:
        self._resnet = resnet
        (weight, bias), beside = resnet.first, resnet.beside
        by_time = weight.unflatten(1, (3, -1))
        self._first = Linear(by_time[..., BANDS:].flatten(1).contiguous(), bias)
        self._beside = Linear(beside.weight[:, BANDS:].contiguous(), beside.bias)
        self._first_of_x = Linear(by_time[..., :BANDS].flatten(1).contiguous(), None)
        self._beside_of_x = Linear(beside.weight[:, :BANDS].contiguous(), None)

    def constant(self, told: Any, *, guided: bool) -> tuple[Any, Any]:
        made = self._first(windows(told, 2)), self._beside(told)
        if not guided:
            return made
        of_nothing = self._first.bias.expand_as(made[0]), self._beside.bias.expand_as(made[1])
        return torch.cat((made[0], of_nothing[0])), torch.cat((made[1], of_nothing[1]))

    def __call__(self, x: Any, constant: tuple[Any, Any], step: int) -> Any:
        first, beside = constant
        turns = (len(first) // len(x), 1, 1)
        first = first + self._first_of_x(windows(x, 2)).repeat(turns)
        return self._resnet.told(first, beside + self._beside_of_x(x).repeat(turns), step)


class Weights(NamedTuple):
    """Of the package's ``BasicTransformerBlock``: attention, then a feed-forward, each over its input's norm."""

    heads: int
    before: tuple[Any, ...]
    """Norm: weight, bias, eps."""
    into: Any
    """Queries, keys and values."""
    out: Linear
    between: tuple[Any, ...]
    """Norm."""
    widen: Linear
    narrow: Linear
    early: tuple[Any, Any]
    """The biases of the products from here on, before and between, negative: for an ``x`` that holds them already."""


class Blocks(NamedTuple):
    """Some that follow each other."""

    weights: list[Weights]
    biases: Any
    """All that is added to ``x`` but for the products' own."""


def _blocks(blocks: Sequence[Any], dtype: Any) -> Blocks:
    made = list[Weights]()
    adding = [layer.bias.detach() for block in blocks for layer in (block.attn1.to_out[0], block.ff.net[2])]
    for at, block in enumerate(blocks):
        before, between = Norm.of(block.norm1, dtype), Norm.of(block.norm3, dtype)
        made.append(
            Weights(
                heads=block.attn1.heads,
                before=(before.weight, before.bias, before.eps),
                into=Linear.stacked([block.attn1.to_q, block.attn1.to_k, block.attn1.to_v], dtype),
                out=Linear.of(block.attn1.to_out[0], dtype),
                between=(between.weight, between.bias, between.eps),
                widen=Linear.of(block.ff.net[0].proj, dtype),
                narrow=Linear.of(block.ff.net[2], dtype),
                early=(-sum(adding[2 * at :]).to(dtype), -sum(adding[2 * at + 1 :]).to(dtype)),
            )
        )
    return Blocks(made, sum(adding).to(dtype))


# -- whose layers ----------------------------------------------------------------------------------------------


class Layers(Protocol):
    """What the estimator is made of."""

    ahead: bool
    """Whether ``blocks`` wants its biases to be in ``x`` already."""

    def windows(self, x: Any) -> Any:
        """Each frame after the two before it."""
        ...

    def convolution(self, x: Any, first: tuple[Any, Any], norm: tuple[Any, ...], added: Any) -> Any:
        """Over ``windows``, then ``mish``."""
        ...

    def mish(self, x: Any, norm: tuple[Any, ...], added: Any) -> Any:
        """Mish of the norm, plus ``added``: for all frames, or for each."""
        ...

    def blocks(self, x: Any, lengths: Lengths, blocks: Blocks) -> Any:
        """``x`` may be written over."""
        ...


class _InTorch:
    """As it is written."""

    ahead = False

    def __init__(self, attention: Attention) -> None:
        self._attention = attention

    def windows(self, x: Any) -> Any:
        return windows(x, 2)

    def convolution(self, x: Any, first: tuple[Any, Any], norm: tuple[Any, ...], added: Any) -> Any:
        return self.mish(functional.linear(windows(x, 2), *first), norm, added)

    def mish(self, x: Any, norm: tuple[Any, ...], added: Any) -> Any:
        return functional.mish(_normed(x, norm)) + added

    def blocks(self, x: Any, lengths: Lengths, blocks: Blocks) -> Any:
        for block in blocks.weights:
            made = block.into(_normed(x, block.before))
            x = x + block.out(attend(made, block.heads, lengths, self._attention))
            x = x + block.narrow(functional.gelu(block.widen(_normed(x, block.between))))
        return x


class _InTriton:
    """In fewer kernels: a product adds to the residual stream itself, and another bends what it makes by GELU.

    A product that adds has no place for a bias: the stream holds all of them from the start, and whoever reads it takes
    off those whose turn has not come. Of GELU cuBLAS knows the tanh form, whose error is below that of bf16.
    """

    ahead = True

    def __init__(self, attention: Attention) -> None:
        from chatterbox_server.engines.fast.s3gen import tiles

        self._attention, self._tiles = attention, tiles
        self.windows, self.mish, self.convolution = tiles.windows, tiles.norm_mish, tiles.convolution

    def blocks(self, x: Any, lengths: Lengths, blocks: Blocks) -> Any:
        stream = x.flatten(0, 1)
        for block in blocks.weights:
            made = block.into(self._tiles.norm(x, block.before, block.early[0]))
            attended = attend(made, block.heads, lengths, self._attention)
            stream.addmm_(attended.flatten(0, 1), block.out.weight.t())
            normed = self._tiles.norm(x, block.between, block.early[1])
            wide = torch._addmm_activation(  # noqa: SLF001 (the only name of it)
                block.widen.bias, normed.flatten(0, 1), block.widen.weight.t(), use_gelu=True
            )
            stream.addmm_(wide, block.narrow.weight.t())
        return x


def _normed(x: Any, norm: tuple[Any, ...]) -> Any:
    weight, bias, eps = norm
    return functional.layer_norm(x, weight.shape, weight, bias, eps)
