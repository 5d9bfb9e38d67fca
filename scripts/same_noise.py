"""The package's own S3Gen under the noise that the fast engine draws, so that what both say can be compared."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from chatterbox_server.engines.fast import noise
from chatterbox_server.engines.fast.s3gen.vocoder import DRAWN_AT_ONCE


class Given(TorchFunctionMode):  # type: ignore[misc,unused-ignore]
    """Within it the package draws what it is given, by the shape that it asks for."""

    def __init__(self, normal: Mapping[tuple[int, ...], torch.Tensor], uniform: torch.Tensor) -> None:
        super().__init__()
        self._normal = normal
        self._uniform = uniform

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.rand:
            return self._uniform
        if func is torch.randn_like:
            return self._normal[tuple(args[0].shape)].clone()
        if func is torch.randn:
            return self._normal[args].clone()
        if func is torch.cumsum:
            # Its source's phase. The CPU adds float32 up in float64, a GPU does not, and ends whole turns away.
            return func(args[0].double(), *args[1:], **(kwargs or {})).float()
        return func(*args, **(kwargs or {}))


def inference(s3gen: Any, tokens: torch.Tensor, voice: Mapping[str, Any], *, seed: int, steps: int | None) -> Any:
    """What the package's ``inference`` says: samples, (count,)."""
    device = tokens.device
    prompt, own = 2 * voice["prompt_token"].shape[1], 2 * len(tokens)
    frames = prompt + own - voice["prompt_feat"].shape[1]
    source = s3gen.mel2wav.m_source
    seeds = torch.tensor([(seed + 2**63) % 2**64 - 2**63], device=device)
    harmonics = source.l_sin_gen.harmonic_num + 1
    begin = noise.normal(seeds[:, None], noise.FLOW, torch.arange(prompt + own, device=device)[None], 80)
    begin = begin.transpose(1, 2)
    each = round(s3gen.mel2wav.f0_upsamp.scale_factor)
    positions = torch.arange(frames * each // DRAWN_AT_ONCE, device=device)[None]
    breath = noise.normal(seeds[:, None], noise.SOURCE, positions, DRAWN_AT_ONCE).flatten(1)
    phases = noise.uniform(noise.drawn(seeds, noise.PHASES, torch.zeros_like(seeds), harmonics))
    # The package draws one noise for each harmonic, and adds them up by these weights; ours is their sum.
    weight = source.l_linear.weight.detach()[0]
    given: dict[tuple[int, ...], Any] = {
        (1, 80, prompt + own): begin,
        (1, 80, own): begin[..., prompt:],
        (1, harmonics, frames * each): breath[:, None] * (weight / weight.norm())[None, :, None],
        (1, frames * each, 1): torch.zeros(1, frames * each, 1, device=device),
    }
    with torch.inference_mode(), Given(given, phases[..., None].cpu()):
        sound, _ = s3gen.inference(tokens[None], ref_dict=dict(voice), n_cfm_timesteps=steps)
        return sound[0]


def make_audible(s3gen: Any, *, hertz: float = 150.0) -> None:
    """Fresh weights of a vocoder hum whatever they are told: these pass on what they hear, at about ``hertz``."""
    with torch.no_grad():
        for module in s3gen.mel2wav.modules():
            if torch.nn.utils.parametrize.is_parametrized(module, "weight"):
                norm, direction = module.parametrizations.weight.original0, module.parametrizations.weight.original1
                transposed = isinstance(module, torch.nn.ConvTranspose1d)
                heard = direction[:, 0].numel() / module.stride[0] if transposed else direction[0].numel()
                norm.mul_(0.92 * heard**-0.5 / direction.std())
        s3gen.mel2wav.conv_post.parametrizations.weight.original0.mul_(0.3)
        s3gen.mel2wav.f0_predictor.classifier.bias.fill_(hertz)
