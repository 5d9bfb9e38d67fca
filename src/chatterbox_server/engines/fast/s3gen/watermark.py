"""The package's watermark (perth's implicit one) for a batch, on the device: its network and weights, the same samples.

perth works at 32 kHz: soxr resamples there and back, and between them a network turns the spectrum below 2 kHz up and
down a little. soxr's filter is measured, by asking soxr, and applied as a product; the rest is written out here.
"""

import math
from typing import Any, Final, NamedTuple

import librosa
import numpy as np
import torch
from torch.nn import functional

from chatterbox_server.engine import EngineError

HEADROOM_DB: Final = 15
"""Of perth's normalised spectra (``perth_net_implicit.utils.normalize``)."""
SILENT: Final = 0.05
"""Frames that are not marked are quieter than this share of the loudest (``perth_net_implicit.model.magmask``)."""
REACH: Final = 132
"""Samples to either side that soxr's filter hears, whose weights beyond are below 1e-7."""
TURNS: Final = 64
"""Of the filter in one product: more waste arithmetic, fewer waste memory."""


class Sounds(NamedTuple):
    """A batch, padded."""

    samples: Any
    """(batch, width), float32; beyond ``lengths`` anything."""
    lengths: Any
    """(batch,)."""


class Watermark:
    """For sound of one rate."""

    def __init__(self, watermarker: Any, *, sample_rate_hz: int, device: str) -> None:
        """``watermarker`` is ``perth.PerthImplicitWatermarker``, which keeps its own weights where they are."""
        net = watermarker.perth_net
        config = net.hp
        rate_hz = config.sample_rate
        self._to = _Resampler(sample_rate_hz, rate_hz, device)
        self._back = _Resampler(rate_hz, sample_rate_hz, device)
        self._points, self._hop = config.n_fft, config.hop_size
        if config.window_fn != "hann" or config.window_size != config.n_fft:
            msg = f"cannot mark with a window of {config.window_fn}, {config.window_size} of {config.n_fft}"
            raise EngineError(msg)
        self._window = torch.hann_window(self._points, device=device)
        self._least = config.stft_magnitude_min
        self._least_db = 20 * math.log10(self._least)
        self._range_db = HEADROOM_DB - self._least_db
        self._bands = net.encoder.subband
        self._layers = [
            (layer.conv.weight.detach().to(device), layer.conv.bias.detach().to(device), bool(layer.act))
            for layer in net.encoder.layers
        ]

    def __call__(self, sounds: Sounds) -> Any:
        """(batch, width), float32, marked as perth would mark each row up to its length alone.

        Exact where lengths are of whole hops (10 ms), as S3Gen's are.
        """
        samples, lengths = sounds
        width = samples.shape[1]
        sound = self._to(_cleared(samples, lengths))
        ends = lengths * self._to.up // self._to.down
        framed, inside = self._framed(sound, ends)
        spectrum = torch.fft.rfft(framed * self._window)
        louder = torch.pow(10.0, self._residual(spectrum.abs(), inside) * (self._range_db / 20))
        spectrum[..., : self._bands] *= louder
        weighted = torch.fft.irfft(spectrum, n=self._points) * self._window * inside
        sound = self._overlapped(weighted) / self._overlapped(self._window.square() * inside).clamp(min=1e-11)
        return self._back(_cleared(sound, ends))[:, :width]

    def _framed(self, sound: Any, ends: Any) -> tuple[Any, Any]:
        """Centred frames (batch, frames, points), each row reflected at both ends; which of them are a row's."""
        half = self._points // 2
        at = torch.arange(-half, sound.shape[1] + half, device=sound.device).abs()
        at = torch.minimum(at.expand(len(sound), -1), 2 * (ends[:, None] - 1) - at).clamp(min=0)
        framed = sound.gather(1, at).unfold(1, self._points, self._hop)
        steps = torch.arange(framed.shape[1], device=sound.device)
        return framed, (steps < (ends // self._hop + 1)[:, None])[..., None]

    def _residual(self, magnitude: Any, inside: Any) -> Any:
        """What the network adds to the normalised spectrum, (batch, frames, bands)."""
        normal = (20 * torch.log10(magnitude.clamp(min=self._least)) - self._least_db) / self._range_db * inside
        loudness = normal.sum(2)
        marked = loudness > loudness.amax(dim=1, keepdim=True) * SILENT
        x, within = normal[..., : self._bands].transpose(1, 2), inside.transpose(1, 2)
        for weight, bias, bent in self._layers:
            x = functional.conv1d(x, weight, bias, padding=weight.shape[2] // 2)
            # Beyond its end a row is nothing, as alone.
            x = (functional.leaky_relu(x) if bent else x) * within
        return x.transpose(1, 2) * marked[..., None]

    def _overlapped(self, framed: Any) -> Any:
        """Frames added up where they belong, from the middle of the first to that of the last."""
        count = framed.shape[1]
        length = (count - 1) * self._hop + self._points
        added = functional.fold(
            framed.transpose(1, 2), output_size=(1, length), kernel_size=(1, self._points), stride=(1, self._hop)
        )
        return added.flatten(1)[:, self._points // 2 : length - self._points // 2]


def _cleared(samples: Any, lengths: Any) -> Any:
    return samples * (torch.arange(samples.shape[1], device=samples.device) < lengths[:, None])


class _Resampler:
    """``librosa.resample``, whose filter is soxr's, for sound of a whole number of its turns."""

    def __init__(self, rate_hz: int, wanted_hz: int, device: str) -> None:
        common = math.gcd(rate_hz, wanted_hz)
        self.up, self.down = wanted_hz // common, rate_hz // common
        """So many samples out for so many in: one turn."""
        taps = self._measured(rate_hz, wanted_hz)
        # All outputs of some turns from the inputs around them, as one matrix.
        matrix = np.zeros((TURNS, self.up, TURNS * self.down + 2 * REACH + 1), np.float32)
        for turn in range(TURNS):
            matrix[turn, :, turn * self.down : turn * self.down + 2 * REACH + 1] = taps
        self._matrix = torch.from_numpy(matrix.reshape(TURNS * self.up, -1)).to(device)

    def _measured(self, rate_hz: int, wanted_hz: int) -> Any:
        """(up, 2 * reach + 1): what each output of a turn hears around the turn's first input."""
        middle = 4 * REACH
        taps = np.zeros((self.up, 2 * REACH + 1), np.float32)
        for place in range(self.down):
            click = np.zeros(2 * middle * self.down, np.float32)
            click[middle * self.down + place] = 1
            answer = librosa.resample(click, orig_sr=rate_hz, target_sr=wanted_hz).reshape(-1, self.up)
            for turn in range(-REACH, REACH):
                at = place + turn * self.down + REACH
                if 0 <= at <= 2 * REACH:
                    taps[:, at] = answer[middle - turn]
        return taps

    def __call__(self, samples: Any) -> Any:
        length = samples.shape[1]
        turns = -(-length // self.down)
        blocks = -(-turns // TURNS)
        after = blocks * TURNS * self.down - length + REACH + 1
        padded = functional.pad(samples, (REACH, after))
        framed = padded.unfold(1, self._matrix.shape[1], TURNS * self.down)
        return functional.linear(framed, self._matrix).flatten(1)[:, : turns * self.up]
