"""S3Gen's vocoder: mel spectrograms to sound, by the package's weights, for rows of different lengths at once.

A convolution looks both ways and must find nothing beyond a row's end, so each activation also clears what is there.
The source's phase, the Fourier transforms at both ends and the sound itself are float32 or better throughout.
"""

import math
from typing import Any, Final, NamedTuple

import torch
from torch.nn import functional

from chatterbox_server.engines.fast import noise
from chatterbox_server.engines.fast.s3gen.layers import Kernels, Linear, windows

DRAWN_AT_ONCE: Final = 4
"""Samples of the source's noise from one counter: its position counts these, its lane is the sample among them."""


class Heard(NamedTuple):
    """A batch of pieces of mel spectrograms, padded to ``width`` frames."""

    mel: Any
    """(batch, width, bands), float32; beyond ``frames`` anything."""
    frames: Any
    """(batch,)."""
    first: Any
    """The place of a piece's first frame in its utterance, (batch,)."""
    anchor: Any
    """The frame of the piece at which its source's phase is ``phase``, (batch,)."""
    phase: Any
    """Turns of each harmonic until there, float64, (batch, harmonics)."""
    seeds: Any
    """(batch,), int64."""


class Vocoder:
    """Of the package's ``HiFTGenerator``, on the device where its weights are."""

    def __init__(self, vocoder: Any, *, dtype: Any, kernels: Kernels = "torch") -> None:
        self._dtype = dtype
        self._slope, self._limit = vocoder.lrelu_slope, vocoder.audio_limit
        self._mean = _tiled_mean if kernels == "triton" else _mean
        self.pitch = _Pitch(vocoder.f0_predictor)
        self.source = _Source(vocoder.m_source, vocoder.f0_upsamp.scale_factor)
        self._before = _Convolution(vocoder.conv_pre, dtype)
        self._ups = [_Convolution(up, dtype) for up in vocoder.ups]
        self._downs = [_Convolution(down, dtype) for down in vocoder.source_downs]

        def block(block: Any) -> "_Resblock | _Tiled":
            return _Tiled(block, dtype) if kernels == "triton" else _Resblock(block, dtype)

        self._source_blocks = [block(one) for one in vocoder.source_resblocks]
        blocks, each = [block(one) for one in vocoder.resblocks], vocoder.num_kernels
        self._blocks = [blocks[at : at + each] for at in range(0, len(blocks), each)]
        self._after = _Convolution(vocoder.conv_post, dtype)
        self._rates = [up.stride[0] for up in vocoder.ups]
        points, hop = vocoder.istft_params["n_fft"], vocoder.istft_params["hop_len"]
        self._spectra = _Spectra(points, hop, vocoder.stft_window.to(self._before.weight.device))
        self.samples_per_frame: int = math.prod(self._rates) * hop

    def __call__(self, heard: Heard) -> tuple[Any, Any]:
        """Sound (batch, width * samples per frame), float32, and the phase at which each frame begins."""
        valid = torch.arange(heard.mel.shape[1], device=heard.mel.device) < heard.frames[:, None]
        mel = heard.mel * valid[..., None]
        source, phases = self.source(self.pitch(mel, valid), heard)
        return self._sound(mel, source, heard.frames), phases

    def _sound(self, mel: Any, source: Any, frames: Any) -> Any:
        spectrum = self._spectra.of(source, frames * self.samples_per_frame)
        spectrum = _across_time(spectrum.to(self._dtype))
        x = self._before(_across_time(mel.to(self._dtype)))
        x = _mean(x, frames, _inside(x, frames), 1.0, self._slope)
        length, last = 1, len(self._ups) - 1
        for level, rate in enumerate(self._rates):
            length *= rate
            ends = frames * length + int(level == last)
            x = self._ups[level](x)
            if level == last:
                # The package's ReflectionPad1d((1, 0)).
                x = torch.cat((x[..., 1:2], x), dim=-1)
            inside = _inside(x, ends)
            x = self._source_blocks[level](self._downs[level](spectrum), ends, inside, x)
            sums = None
            for block in self._blocks[level]:
                sums = block(x, ends, inside, sums)
            # The package's last one has torch's own slope.
            x = self._mean(sums, ends, inside, 1 / len(self._blocks[level]), 0.01 if level == last else self._slope)
        x = self._after(x).squeeze(2).transpose(1, 2).float()
        return self._spectra.back(x, ends).clamp(-self._limit, self._limit)


def _across_time(x: Any) -> Any:
    """(batch, time, channels) → (batch, channels, 1, time)."""
    return x.transpose(1, 2).unsqueeze(2).contiguous(memory_format=torch.channels_last)


def _inside(x: Any, ends: Any) -> Any:
    return (torch.arange(x.shape[-1], device=x.device) < ends[:, None])[:, None, None, :]


class _Convolution:
    """Along time, as torch's of two dimensions, whose memory has the channels innermost, as tensor cores read them."""

    def __init__(self, module: Any, dtype: Any) -> None:
        # ``weight`` is a product where the package keeps norm and direction apart.
        weight = module.weight.detach().clone().to(dtype).unsqueeze(2)
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self._bias = module.bias.detach().to(dtype)
        self._stride, self._padding = (1, module.stride[0]), (0, module.padding[0])
        self._dilation = (1, module.dilation[0])
        self._transposed = isinstance(module, torch.nn.ConvTranspose1d)

    def __call__(self, x: Any) -> Any:
        if self._transposed:
            return functional.conv_transpose2d(x, self.weight, self._bias, self._stride, self._padding)
        return functional.conv2d(x, self.weight, self._bias, self._stride, self._padding, self._dilation)


class _Resblock:
    def __init__(self, block: Any, dtype: Any) -> None:
        self._steps = [
            (_bend(bend_1, dtype), _Convolution(first, dtype), _bend(bend_2, dtype), _Convolution(second, dtype))
            for bend_1, first, bend_2, second in zip(
                block.activations1, block.convs1, block.activations2, block.convs2, strict=True
            )
        ]

    def __call__(self, x: Any, ends: Any, inside: Any, summed: Any = None) -> Any:
        """``x`` is let grow beyond its end, for nothing reads it there but what clears it first."""
        del ends
        for bend_1, first, bend_2, second in self._steps:
            x = x + second(_snake(first(_snake(x, *bend_1, inside)), *bend_2, inside))
        return x if summed is None else x + summed


class _Tiled:
    """The same by kernels of ours, which bend what they make while they have it in hand."""

    def __init__(self, block: Any, dtype: Any) -> None:
        from chatterbox_server.engines.fast.s3gen import tiles

        self._tiles = tiles
        self._convolutions = [
            (layer.weight.detach().to(dtype).permute(2, 0, 1).contiguous(), layer.bias.detach().to(dtype), dilation)
            for pair in zip(block.convs1, block.convs2, strict=True)
            for layer in pair
            for dilation in layer.dilation
        ]
        self._bends = [
            tuple(part.flatten() for part in _bend(snake, dtype))
            for pair in zip(block.activations1, block.activations2, strict=True)
            for snake in pair
        ]

    def __call__(self, x: Any, ends: Any, inside: Any, summed: Any = None) -> Any:
        del inside
        x, last = _to_time(x), len(self._convolutions) - 1
        summed = None if summed is None else _to_time(summed)
        bent = self._tiles.bent(x, ends, bend=self._bends[0])
        for place, weights in enumerate(self._convolutions):
            second, ended = bool(place % 2), place == last
            made, bent = self._tiles.around(
                bent,
                weights,
                ends,
                beside=x if second else None,
                summed=summed if ended else None,
                bend=None if ended else self._bends[place + 1],
                keep=second,
            )
            x = made if second else x
        return _to_channels(x)


def _bend(snake: Any, dtype: Any) -> tuple[Any, Any]:
    alpha = snake.alpha.detach()[:, None, None]
    return alpha.to(dtype), (1 / (alpha + snake.no_div_by_zero)).to(dtype)


def _snake(x: Any, alpha: Any, inverse: Any, inside: Any) -> Any:
    return torch.addcmul(x, inverse, torch.sin(x * alpha).square()) * inside


def _mean(sums: Any, _ends: Any, inside: Any, share: float, slope: float) -> Any:
    return functional.leaky_relu(sums * share, slope) * inside


def _tiled_mean(sums: Any, ends: Any, _inside: Any, share: float, slope: float) -> Any:
    from chatterbox_server.engines.fast.s3gen import tiles

    return _to_channels(tiles.bent(_to_time(sums), ends, scale=share, slope=slope))


def _to_time(x: Any) -> Any:
    """(batch, channels, 1, time) → (batch, time, channels), which it already is in memory."""
    return x.squeeze(2).transpose(1, 2).contiguous()


def _to_channels(x: Any) -> Any:
    return x.transpose(1, 2).unsqueeze(2)


class _Pitch:
    """The package's ``ConvRNNF0Predictor``, float32: a small error of pitch becomes with time a large one of phase."""

    def __init__(self, predictor: Any) -> None:
        modules = [module for module in predictor.condnet if isinstance(module, torch.nn.Conv1d)]
        self._layers = [Linear.over_time(module, torch.float32) for module in modules]
        self._reaches = [module.padding[0] for module in modules]
        self._out = Linear.of(predictor.classifier, torch.float32)

    def __call__(self, mel: Any, valid: Any) -> Any:
        """(batch, frames, bands) → Hz, (batch, frames)."""
        x = mel
        for layer, reach in zip(self._layers, self._reaches, strict=True):
            x = functional.elu(layer(windows(x, reach, reach))) * valid[..., None]
        return self._out(x).squeeze(-1).abs()


class _Source:
    """The package's ``SourceModuleHnNSF``: sines of the harmonics where there is a pitch, else breath."""

    def __init__(self, module: Any, samples_per_frame: float) -> None:
        sines = module.l_sin_gen
        weight = module.l_linear.weight.detach()[0]
        self._weight, self._bias = weight, module.l_linear.bias.detach()
        # The harmonics' noises have one loudness and are only ever added up: that is one noise of this weight.
        self._breath = weight.norm()
        self._amplitude, self._deviation, self._threshold = sines.sine_amp, sines.noise_std, sines.voiced_threshold
        self._rate_hz = sines.sampling_rate
        self.harmonics: int = sines.harmonic_num + 1
        self._each = int(samples_per_frame)
        self._turns = torch.arange(1, self.harmonics + 1, device=weight.device)

    def __call__(self, pitch: Any, heard: Heard) -> tuple[Any, Any]:
        steps = (pitch[..., None] * self._turns / self._rate_hz).double()
        phases = torch.cumsum(steps * self._each, dim=1) - steps * self._each
        at = heard.anchor[:, None, None].expand(-1, 1, self.harmonics)
        phases = phases - phases.gather(1, at) + heard.phase[:, None]
        within = torch.arange(1, self._each + 1, device=pitch.device, dtype=torch.float64)
        # Rounded to float32 before whole turns are taken off, as the package does it.
        turns = (phases[..., None] + steps[..., None] * within).float() % 1
        begin = (
            noise.uniform(noise.drawn(heard.seeds, noise.PHASES, torch.zeros_like(heard.seeds), self.harmonics)) - 0.5
        ) * 2
        begin = torch.pi * begin * (self._turns > 1)
        sines = torch.sin(2 * torch.pi * turns + begin[:, None, :, None])
        voiced = (pitch > self._threshold)[..., None]
        merged = (sines * (self._amplitude * self._weight)[:, None]).sum(2) * voiced
        loudness = torch.where(voiced, self._deviation, self._amplitude / 3) * self._breath
        merged = merged + loudness * self._noise(heard.first, heard.seeds, pitch.shape[1]) + self._bias
        return torch.tanh(merged).flatten(1), phases

    def _noise(self, first: Any, seeds: Any, width: int) -> Any:
        """(batch, frames, samples of each): a sample's is the same in whichever row it is."""
        each = self._each // DRAWN_AT_ONCE
        positions = first[:, None] * each + torch.arange(width * each, device=first.device)
        drawn = noise.normal(seeds[:, None], noise.SOURCE, positions, DRAWN_AT_ONCE)
        return drawn.flatten(1).unflatten(1, (width, self._each))


class _Spectra:
    """torch's ``stft`` and ``istft`` with centred windows, as products: each row ends where it ends."""

    def __init__(self, points: int, hop: int, window: Any) -> None:
        self._points, self._hop = points, hop
        bins, times = torch.arange(points // 2 + 1, dtype=torch.float64), torch.arange(points, dtype=torch.float64)
        angles = 2 * torch.pi * bins[:, None] * times / points
        self._window = window.float()
        wide = window.double().cpu()
        there = torch.cat((angles.cos(), -angles.sin())) * wide
        inner = torch.full((len(bins), 1), 2.0, dtype=torch.float64)
        inner[0] = inner[-1] = 1.0
        again = torch.cat((inner * angles.cos(), -inner * angles.sin())) * wide / points
        self._there = there.float().to(window.device)
        self._again = again.T.contiguous().float().to(window.device)
        self._square = self._window.square()

    def of(self, samples: Any, lengths: Any) -> Any:
        """(batch, samples) → (batch, samples / hop + 1, real and imaginary parts), rows reflected at both ends."""
        half = self._points // 2
        at = torch.arange(-half, samples.shape[1] + half, device=samples.device).abs()
        at = torch.minimum(at.expand(len(samples), -1), 2 * (lengths[:, None] - 1) - at).clamp(min=0)
        framed = samples.gather(1, at).unfold(1, self._points, self._hop)
        steps = torch.arange(framed.shape[1], device=samples.device)
        inside = steps < (lengths // self._hop + 1)[:, None]
        return functional.linear(framed, self._there) * inside[..., None]

    def back(self, x: Any, lengths: Any) -> Any:
        """(batch, time, logarithms of magnitudes, then phases' arcs) → samples; ``lengths`` are of time."""
        bins = self._points // 2 + 1
        magnitude, phase = torch.exp(x[..., :bins]).clip(max=1e2), torch.sin(x[..., bins:])
        inside = (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None]
        spectrum = torch.cat((magnitude * torch.cos(phase), magnitude * torch.sin(phase)), dim=-1)
        sound = self._overlapped(functional.linear(spectrum, self._again) * inside)
        weight = self._overlapped(self._square.expand(*x.shape[:2], -1) * inside)
        # Beyond a row's end there is neither.
        return sound / torch.where(weight > 1e-11, weight, 1.0)

    def _overlapped(self, framed: Any) -> Any:
        """Each frame added a hop after the one before; half a frame less at both ends."""
        turns = self._points // self._hop
        parts = framed.unflatten(-1, (turns, self._hop))
        length = framed.shape[1]
        added = sum(functional.pad(parts[:, :, turn], (0, 0, turn, turns - 1 - turn)) for turn in range(turns))
        return added[:, turns // 2 : length + turns // 2 - 1].flatten(1)
