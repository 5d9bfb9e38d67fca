"""The three stages of an utterance: text → tokens → sound → marked sound. Starts no thread.

In turn they do what the package's ``generate`` does, to the last bit (tests/server/test_stages.py), through its own
modules. None of them knows on which thread or stream it runs.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from chatterbox_server.engine import Errand, Utterance
from chatterbox_server.engines.stock import dice, kinds
from chatterbox_server.engines.stock.kinds import Kind
from chatterbox_server.engines.stock.placement import Placement
from chatterbox_server.engines.stock.voices import Voice, Voices

Autocast = Literal["off", "fp16", "bf16"]


@dataclass(frozen=True, slots=True)
class Tokens:
    """What T3's stage hands to S3Gen's, by way of the host: a few kilobytes, for which T3 has waited anyway."""

    speech: torch.Tensor
    """On the CPU, which any stream and any card may read."""
    voice: Voice
    drawn: dice.State
    """The random numbers go on from here."""


class Stages:
    """Of one model. Each stage is for one thread at a time, and all three may be at work at once."""

    def __init__(
        self, model: Any, kind: Kind, placement: Placement, *, autocast: Autocast = "off", voices_kept: int
    ) -> None:
        self.model = model
        self._kind = kind
        self._placement = placement
        self._autocast = autocast
        self.voices = Voices(model, kind, placement, kept=voices_kept)

    def tokens(self, utterance: Utterance, errand: Errand) -> Tokens:
        """Text and a voice to speech tokens. The only stage that draws from torch's default generators.

        Raises:
            Dropped: ``errand`` was, before the last token.
            Refused: the recording cannot be used.
        """
        with torch.inference_mode():
            voice = self.voices.find(utterance.voice)
            # Last, for hearing a recording may draw numbers. Seeds every GPU as well.
            torch.manual_seed(utterance.seed)
            with self._precision(self._placement.t3), _hooked(self.model.t3.tfmr, errand):
                speech = kinds.tokens(self._kind, self.model, utterance, voice.for_t3())
            return Tokens(speech.cpu(), voice, dice.taken(self._placement.t3))

    def sound(self, tokens: Tokens) -> NDArray[np.float32]:
        """Speech tokens to sound: flow and vocoder."""
        device = self._placement.s3gen
        with torch.inference_mode(), dice.Drawing(tokens.drawn, device), self._precision(device):
            sound, _ = self.model.s3gen.inference(
                speech_tokens=tokens.speech.to(device),
                ref_dict=tokens.voice.for_s3gen(),
                n_cfm_timesteps=self._kind.flow_steps,
            )
            samples: NDArray[np.float32] = sound.squeeze(0).detach().cpu().numpy()
            return samples

    def marked(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """With the package's watermark, on the CPU. Keeps no state: any number of threads may be in it."""
        # Outside inference_mode, host memory grows with every call.
        with torch.inference_mode():
            marked = self.model.watermarker.apply_watermark(samples, sample_rate=self.model.sr)
        return np.asarray(marked, np.float32)

    def _precision(self, device: str) -> contextlib.AbstractContextManager[Any]:
        if self._autocast == "off":
            return contextlib.nullcontext()
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[self._autocast]
        autocast: contextlib.AbstractContextManager[Any] = torch.autocast(device.partition(":")[0], dtype=dtype)
        return autocast


@contextlib.contextmanager
def _hooked(backbone: Any, errand: Errand) -> Iterator[None]:
    """Ours asks at every token whether anybody waits; multilingual's alignment analyser never lets its three go."""
    ours = backbone.register_forward_pre_hook(lambda *_: errand.check())
    modules = list(backbone.modules())
    before = [set(module._forward_hooks) for module in modules]  # noqa: SLF001 (torch has no public list)
    try:
        yield
    finally:
        ours.remove()
        for module, known in zip(modules, before, strict=True):
            for hook in set(module._forward_hooks) - known:  # noqa: SLF001
                del module._forward_hooks[hook]  # noqa: SLF001
