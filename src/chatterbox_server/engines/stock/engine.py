"""The stock engine: a model of chatterbox-tts, its stages, and the threads on which they run."""

import importlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from chatterbox_server.engine import EngineError, Errand, GpuMemory, Unable, Utterance
from chatterbox_server.engines.stock import cards, failures, lanes
from chatterbox_server.engines.stock.failures import one_line
from chatterbox_server.engines.stock.kinds import KINDS
from chatterbox_server.engines.stock.placement import Placement, place
from chatterbox_server.engines.stock.silence import silenced
from chatterbox_server.settings import Settings

if TYPE_CHECKING:
    from chatterbox_server.engines.stock.stages import Stages, Tokens

log = logging.getLogger(__name__)

LONGEST_PIECE: Final = 280
"""Characters: about 20 s of sound, half of the 40 s (1000 tokens) after which the model stops without a word."""

TOKENS_PER_AUDIO_S: Final = 25.0
"""960 samples a token at 24 kHz."""

VOICES_KEPT: Final = 32
"""Recordings whose conditionals are kept ready; each holds some memory of the GPU, so their number has an end."""

STAGES: Final = 3
"""Utterances at once in a pipeline: T3, S3Gen and the watermark have one each."""


class StockEngine:
    """One model of chatterbox-tts that is already built."""

    name = "stock"
    longest_piece = LONGEST_PIECE
    tokens_per_audio_s: float | None = TOKENS_PER_AUDIO_S
    speeds = (1.0, 1.0)
    frees_beside = False
    """What stages beside hold comes back with their end, and may be most of what there is."""
    broken = None

    def __init__(
        self,
        model: Any,
        kind: str,
        *,
        placement: Placement,
        pipeline: bool = False,
        autocast: Literal["off", "fp16", "bf16"] = "off",
        source: str = "memory",
        voices_kept: int = VOICES_KEPT,
        stages: "type[Stages] | None" = None,
    ) -> None:
        """Take ``model`` over: its S3Gen moves where ``placement`` says.

        In a ``pipeline`` each stage has a thread, and on a GPU a stream: T3 begins the next utterance while S3Gen
        finishes this one. Without it one utterance goes through the same stages after another. ``stages`` are
        others than ours, such as some that fail.

        Raises:
            EngineError: the checkpoint has no built-in voice.
        """
        import torch

        from chatterbox_server.engines.stock.stages import Stages

        make = stages or Stages
        if model.conds is None:
            msg = f"cannot speak without a built-in voice: {source} has no conds.pt"
            raise EngineError(msg)
        self.model = kind
        self.sample_rate_hz: int = model.sr
        self.languages = KINDS[kind].languages
        self.defaults = KINDS[kind].defaults
        self.places = STAGES if pipeline else 1
        self._placement = placement
        self._autocast = autocast
        self._source = source
        if placement.split:
            model.s3gen.to(placement.s3gen)
        self.stages = make(model, KINDS[kind], placement, autocast=autocast, voices_kept=voices_kept)
        self._t3 = self._lane("t3", placement.t3)
        self._s3gen = self._lane("s3gen", placement.s3gen)
        for card in placement.cards:
            # No other stream asks whether the weights are there.
            torch.cuda.synchronize(card)

    def facts(self) -> Mapping[str, object]:
        return {
            "weights": self._source,
            "devices": {"t3": self._placement.t3, "s3gen": self._placement.s3gen},
            "pipeline": self.places > 1,
            "autocast": self._autocast,
            "voices_kept": len(self.stages.voices),
            **cards.facts(self._placement.cards),
        }

    def memory(self) -> GpuMemory | None:
        return cards.memory(self._placement.cards)

    def free(self) -> None:
        cards.let_go(self._placement.cards)

    def synthesize(self, utterance: Utterance, errand: Errand) -> NDArray[np.float32]:
        used = self._placement.cards

        def to_tokens() -> "Tokens":
            with errand.at_work(), failures.told(used):
                tokens = self.stages.tokens(utterance, errand)
            # From this thread, not from ours: T3 rests until the next one is chosen.
            errand.make_way()
            return tokens

        def to_sound() -> NDArray[np.float32]:
            with errand.at_work(), failures.told(used):
                return self.stages.sound(tokens)

        with silenced():
            tokens = self._t3.do(to_tokens)
            sound = self._s3gen.do(to_sound)
            with errand.at_work():
                return self.stages.marked(sound)

    def _lane(self, stage: str, device: str) -> lanes.Lane:
        if self.places == 1:
            return lanes.Here()
        import torch

        return lanes.Apart(f"{self.name}-{stage}", torch.cuda.Stream(device) if device.startswith("cuda") else None)


def load(settings: Settings) -> StockEngine:
    """Build the model that ``settings`` name, on the GPU (or two) that this process can see.

    Raises:
        EngineError: with one line that says what is missing; ``Unable``, a package.
    """
    made = built(settings, tf32=settings.tf32)
    return StockEngine(
        made.model,
        settings.model,
        placement=made.placement,
        # On one card both stages launch from one process, and T3 needs nearly all of it: little to win there.
        pipeline=settings.pipeline == "on" or (settings.pipeline == "auto" and made.placement.split),
        autocast=settings.autocast,
        source=made.source,
    )


@dataclass(frozen=True, slots=True)
class Built:
    """A model as the package loads it."""

    model: Any
    placement: Placement
    source: str


def built(settings: Settings, *, tf32: bool) -> Built:
    """The model that ``settings`` name, where they say.

    Raises:
        EngineError: with one line that says what is missing; ``Unable``, a package.
    """
    for name, value in (("HF_HUB_DISABLE_PROGRESS_BARS", "1"), ("TQDM_DISABLE", "1")):
        os.environ.setdefault(name, value)
    try:
        import perth
        import torch

        kind = KINDS[settings.model]
        chatterbox = getattr(importlib.import_module(kind.module), kind.class_name)
    except ImportError as error:
        msg = f"cannot import chatterbox-tts ({one_line(error)}); in a checkout: pip install '.[server]'"
        raise Unable(msg) from error
    if perth.PerthImplicitWatermarker is None:
        msg = "cannot load the watermarker (perth), which needs pkg_resources: pip install 'setuptools<82'"
        raise Unable(msg)
    placement = place(settings.device, settings.visible_gpus)
    if settings.device == "cuda" and not torch.cuda.is_available():
        seen = ",".join(settings.visible_gpus) or "not set"
        msg = f"cannot find a CUDA GPU (CUDA_VISIBLE_DEVICES: {seen}; torch {torch.__version__})"
        raise EngineError(msg)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = settings.cudnn_benchmark
    torch.backends.cudnn.deterministic = False
    source = "Hugging Face cache" if settings.weights is None else str(settings.weights)
    if settings.weights is not None and not settings.weights.is_dir():
        msg = f"cannot load {settings.model}: CHATTERBOX_WEIGHTS={source} is not a directory"
        raise EngineError(msg)
    try:
        with silenced():
            if settings.weights is None:
                model = chatterbox.from_pretrained(placement.t3)
            else:
                model = chatterbox.from_local(settings.weights, placement.t3)
    except Exception as error:
        msg = f"cannot load {settings.model} from {source}: {one_line(error)}"
        raise EngineError(msg) from error
    return Built(model, placement, source)
