"""The real chatterbox-tts, unpatched, one complete utterance at a time.

The package keeps state between calls (the last voice, its exaggeration, the random generator, forward hooks);
this module sets all of it for every utterance, so that none hears the one before.
"""

import contextlib
import copy
import gc
import importlib
import logging
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from chatterbox_server import recordings
from chatterbox_server.engine import EngineBroken, EngineError, GpuMemory, OutOfMemory, Refused, Sampling, Utterance
from chatterbox_server.recordings import NotARecording
from chatterbox_server.settings import Settings

log = logging.getLogger(__name__)

LONGEST_PIECE: Final = 280
"""Characters: about 20 s of sound, half of the 40 s (1000 tokens) after which the model stops without a word."""

TOKENS_PER_AUDIO_S: Final = 25.0
"""960 samples a token at 24 kHz."""

TINY_CFG_WEIGHT: Final = 1e-6
"""Stands for a ``cfg_weight`` of 0, which the package crashes on: its loop always expects two rows."""

FATAL: Final = (
    "CUBLAS_STATUS",
    "CUDNN_STATUS",
    "CUFFT",
    "device-side assert",
    "illegal memory access",
    "unspecified launch",
)
"""Words of errors after which no later call can be trusted, wherever they were noticed."""

VOICES_KEPT: Final = 32
"""Conditionals of recordings kept ready; each holds some memory of the GPU, so their number has an end."""

LONGEST_RECORDING_S: Final = 120.0
"""The package reads 10 s of a recording for the sound and all of it for the likeness."""

SHORTEST_RECORDING_S: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """How one of the package's models differs from the others."""

    module: str
    class_name: str
    keywords: tuple[str, ...]
    """Fields of ``Sampling`` that its ``generate`` takes and heeds."""
    defaults: Sampling
    languages: tuple[str, ...] = ("en",)
    speaks_language_id: bool = False
    shortest_recording_s: float = SHORTEST_RECORDING_S


_GUIDED: Final = ("exaggeration", "cfg_weight", "temperature", "min_p", "top_p", "repetition_penalty")

# chatterbox.mtl_tts.SUPPORTED_LANGUAGES of 0.1.7, English first: it is spoken unless another is named.
# fmt: off
_MULTILINGUAL: Final = (
    "en", "ar", "da", "de", "el", "es", "fi", "fr", "he", "hi", "it", "ja",
    "ko", "ms", "nl", "no", "pl", "pt", "ru", "sv", "sw", "tr", "zh",
)
# fmt: on

KINDS: Final[dict[str, Kind]] = {
    "chatterbox": Kind(
        module="chatterbox.tts",
        class_name="ChatterboxTTS",
        keywords=_GUIDED,
        defaults=Sampling(),
    ),
    "turbo": Kind(
        module="chatterbox.tts_turbo",
        class_name="ChatterboxTurboTTS",
        # Exaggeration, cfg_weight and min_p it would only warn about.
        keywords=("temperature", "top_p", "top_k", "repetition_penalty"),
        defaults=Sampling(exaggeration=0.0, cfg_weight=0.0, min_p=0.0, top_p=0.95),
        # Its own assertion: "Audio prompt must be longer than 5 seconds!"
        shortest_recording_s=5.01,
    ),
    "multilingual": Kind(
        module="chatterbox.mtl_tts",
        class_name="ChatterboxMultilingualTTS",
        keywords=_GUIDED,
        defaults=Sampling(repetition_penalty=2.0),
        languages=_MULTILINGUAL,
        speaks_language_id=True,
    ),
}


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the two halves of a model live; inside a unit CUDA counts from 0 whatever cards those are."""

    t3: str
    """T3 and the voice encoder: text and voice to speech tokens."""
    s3gen: str
    """Speech tokens to sound."""

    @property
    def split(self) -> bool:
        return self.t3 != self.s3gen


def place(device: Literal["cuda", "cpu"], visible_gpus: tuple[str, ...]) -> Placement:
    """One GPU takes all of it; of two, the first takes T3 and the second S3Gen.

    Raises:
        EngineError: more than two GPUs, of which a model cannot make use.
    """
    if device == "cpu":
        return Placement("cpu", "cpu")
    if len(visible_gpus) > 2:
        given = ",".join(visible_gpus)
        msg = f"cannot place one model on {len(visible_gpus)} GPUs (CUDA_VISIBLE_DEVICES={given}): name one or two"
        raise EngineError(msg)
    if len(visible_gpus) == 2:
        return Placement("cuda:0", "cuda:1")
    return Placement("cuda:0", "cuda:0")


class Elsewhere:
    """An S3Gen on a device of its own, for a model that believes everything is on one.

    What comes in is brought over; what goes out the model itself takes to where it needs it.
    """

    def __init__(self, s3gen: Any, device: str) -> None:
        self._s3gen = s3gen.to(device)
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._s3gen, name)

    def embed_ref(self, ref_wav: Any, ref_sr: int, device: object = None, **more: Any) -> Any:  # noqa: ARG002
        """The caller's ``device`` is where T3 lives, and of no use here."""
        return self._s3gen.embed_ref(ref_wav, ref_sr, device=self._device, **more)

    def inference(self, speech_tokens: Any, **more: Any) -> Any:
        """``ref_dict`` needs no help: S3Gen brings it over itself."""
        return self._s3gen.inference(speech_tokens.to(self._device), **more)


class StockEngine:
    """One model of chatterbox-tts that is already built."""

    name = "stock"
    longest_piece = LONGEST_PIECE
    tokens_per_audio_s: float | None = TOKENS_PER_AUDIO_S
    speeds = (1.0, 1.0)

    def __init__(
        self,
        model: Any,
        kind: str,
        *,
        placement: Placement,
        autocast: Literal["off", "fp16", "bf16"] = "off",
        source: str = "memory",
        voices_kept: int = VOICES_KEPT,
    ) -> None:
        """Take ``model`` over: its S3Gen moves where ``placement`` says.

        Raises:
            EngineError: the checkpoint has no built-in voice.
        """
        if model.conds is None:
            msg = f"cannot speak without a built-in voice: {source} has no conds.pt"
            raise EngineError(msg)
        self.model = kind
        self.sample_rate_hz: int = model.sr
        self._kind = KINDS[kind]
        self.languages = self._kind.languages
        self.defaults = self._kind.defaults
        self._chatterbox = model
        self._placement = placement
        self._autocast: Literal["off", "fp16", "bf16"] = autocast
        self._source = source
        self._voices_kept = voices_kept
        self._voices: OrderedDict[tuple[Path, int, int], Any] = OrderedDict()
        if placement.split:
            model.s3gen = Elsewhere(model.s3gen, placement.s3gen)
        self._built_in = copy.deepcopy(model.conds)

    def facts(self) -> Mapping[str, object]:
        """Read back from torch, not from what it was told."""
        import torch

        return {
            "weights": self._source,
            "devices": {"t3": self._placement.t3, "s3gen": self._placement.s3gen},
            "gpus": [torch.cuda.get_device_name(card) for card in self._cards()],
            "tf32": {
                "matmul": torch.backends.cuda.matmul.allow_tf32,
                "cudnn": torch.backends.cudnn.allow_tf32,
            },
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "cudnn_deterministic": torch.backends.cudnn.deterministic,
            "autocast": self._autocast,
            "torch": str(torch.__version__),
            "cuda": torch.version.cuda,
            "chatterbox_tts": metadata.version("chatterbox-tts"),
            "voices_kept": len(self._voices),
        }

    def memory(self) -> GpuMemory | None:
        import torch

        cards = self._cards()
        if not cards:
            return None
        try:
            free_and_total = [torch.cuda.mem_get_info(card) for card in cards]
        except RuntimeError:
            # The context is poisoned; the utterance that did it will say so.
            return None
        return GpuMemory(
            allocated_bytes=sum(torch.cuda.memory_allocated(card) for card in cards),
            reserved_bytes=sum(torch.cuda.memory_reserved(card) for card in cards),
            free_bytes=sum(free for free, _ in free_and_total),
            total_bytes=sum(total for _, total in free_and_total),
        )

    def free(self) -> None:
        """Also lets go of the cycles that an exception leaves, whose frames hold tensors."""
        import torch

        gc.collect()
        if self._cards():
            torch.cuda.empty_cache()

    def synthesize(self, utterance: Utterance) -> NDArray[np.float32]:
        import torch

        keywords = {name: getattr(utterance.sampling, name) for name in self._kind.keywords}
        if "cfg_weight" in keywords:
            keywords["cfg_weight"] = max(keywords["cfg_weight"], TINY_CFG_WEIGHT)
        if self._kind.speaks_language_id:
            keywords["language_id"] = utterance.language
        # inference_mode around the watermark too: outside it, host memory grows with every call.
        with torch.inference_mode(), self._cuda_errors(), self._no_hooks_left(), _silenced():
            # A copy: generate writes into the conditionals it is given.
            self._chatterbox.conds = copy.deepcopy(self._conditionals(utterance.voice))
            # Last, for reading a recording may draw numbers. Seeds every GPU as well.
            torch.manual_seed(utterance.seed)
            with self._precision():
                sound = self._chatterbox.generate(utterance.text, **keywords)
            samples: NDArray[np.float32] = sound.squeeze(0).float().cpu().numpy()
        return samples

    def _cards(self) -> list[Any]:
        import torch

        used = sorted({self._placement.t3, self._placement.s3gen})
        return [torch.device(device) for device in used if device.startswith("cuda")]

    # -- voices -------------------------------------------------------------------------------------------

    def _conditionals(self, voice: Path | None) -> Any:
        """The master copy for ``voice``; a recording is read again when its file changes."""
        if voice is None:
            return self._built_in
        try:
            stat = voice.stat()
        except OSError as error:
            reason = f"voice {voice.stem}: cannot read the recording: {error.strerror}"
            raise Refused(reason, param="voice") from None
        key = (voice, stat.st_mtime_ns, stat.st_size)
        if key not in self._voices:
            self._voices[key] = self._listen(voice)
            while len(self._voices) > self._voices_kept:
                self._voices.popitem(last=False)
        self._voices.move_to_end(key)
        return self._voices[key]

    def _listen(self, voice: Path) -> Any:
        try:
            recordings.check(voice, shortest_s=self._kind.shortest_recording_s, longest_s=LONGEST_RECORDING_S)
        except NotARecording as error:
            reason = f"voice {voice.stem}: {error}"
            raise Refused(reason, param="voice") from error
        try:
            self._chatterbox.prepare_conditionals(str(voice))
        except Exception as error:
            if isinstance(error, ImportError) or _is_of_the_gpu(error):
                raise
            reason = f"voice {voice.stem}: cannot use the recording: {_one_line(error)}"
            raise Refused(reason, param="voice") from error
        return self._chatterbox.conds

    # -- the package's manners ----------------------------------------------------------------------------

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self._autocast == "off":
            return contextlib.nullcontext()
        import torch

        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[self._autocast]
        autocast: contextlib.AbstractContextManager[Any] = torch.autocast(
            self._placement.t3.partition(":")[0], dtype=dtype
        )
        return autocast

    @contextlib.contextmanager
    def _no_hooks_left(self) -> Iterator[None]:
        """Multilingual's alignment analyser hooks three layers at every call and never lets go."""
        modules = list(self._chatterbox.t3.tfmr.modules())
        before = [set(module._forward_hooks) for module in modules]  # noqa: SLF001 (torch has no public list)
        try:
            yield
        finally:
            for module, known in zip(modules, before, strict=True):
                for hook in set(module._forward_hooks) - known:  # noqa: SLF001
                    del module._forward_hooks[hook]  # noqa: SLF001

    @contextlib.contextmanager
    def _cuda_errors(self) -> Iterator[None]:
        """Tell an error that ends this utterance from one that ends the process."""
        import torch

        try:
            yield
        except torch.OutOfMemoryError as error:
            msg = f"the GPU is out of memory: {_one_line(error)}"
            raise OutOfMemory(msg) from error
        except Exception as error:
            if "STATUS_ALLOC_FAILED" in str(error):
                # cuBLAS and cuDNN have words of their own for it.
                msg = f"the GPU is out of memory: {_one_line(error)}"
                raise OutOfMemory(msg) from error
            if self._cards() and not isinstance(error, Refused):
                self._still_works(error)
            raise

    def _still_works(self, error: Exception) -> None:
        """After a device-side assert every later call fails too, even one that waits for nothing.

        cuBLAS and cuDNN may fail for good (a lost handle) while the context lives: those are known by their words.
        """
        import torch

        try:
            for card in self._cards():
                torch.cuda.synchronize(card)
        except RuntimeError:
            raise EngineBroken(_one_line(error)) from error
        if any(fatal in str(error) for fatal in FATAL):
            raise EngineBroken(_one_line(error)) from error


def load(settings: Settings) -> StockEngine:
    """Build the model that ``settings`` name, on the GPU (or two) that this process can see.

    Raises:
        EngineError: with one line that says what is missing.
    """
    for name, value in (("HF_HUB_DISABLE_PROGRESS_BARS", "1"), ("TQDM_DISABLE", "1")):
        os.environ.setdefault(name, value)
    try:
        import perth
        import torch

        kind = KINDS[settings.model]
        chatterbox = getattr(importlib.import_module(kind.module), kind.class_name)
    except ImportError as error:
        msg = f"cannot import chatterbox-tts ({_one_line(error)}): pip install 'chatterbox-deploy[server]'"
        raise EngineError(msg) from error
    if perth.PerthImplicitWatermarker is None:
        msg = "cannot load the watermarker (perth), which needs pkg_resources: pip install 'setuptools<82'"
        raise EngineError(msg)
    placement = place(settings.device, settings.visible_gpus)
    if settings.device == "cuda" and not torch.cuda.is_available():
        seen = ",".join(settings.visible_gpus) or "not set"
        msg = f"cannot find a CUDA GPU (CUDA_VISIBLE_DEVICES: {seen}; torch {torch.__version__})"
        raise EngineError(msg)
    torch.backends.cuda.matmul.allow_tf32 = settings.tf32
    torch.backends.cudnn.allow_tf32 = settings.tf32
    torch.backends.cudnn.benchmark = settings.cudnn_benchmark
    torch.backends.cudnn.deterministic = False
    source = "Hugging Face cache" if settings.weights is None else str(settings.weights)
    if settings.weights is not None and not settings.weights.is_dir():
        msg = f"cannot load {settings.model}: CHATTERBOX_WEIGHTS={source} is not a directory"
        raise EngineError(msg)
    try:
        with _silenced():
            if settings.weights is None:
                model = chatterbox.from_pretrained(placement.t3)
            else:
                model = chatterbox.from_local(settings.weights, placement.t3)
    except Exception as error:
        msg = f"cannot load {settings.model} from {source}: {_one_line(error)}"
        raise EngineError(msg) from error
    return StockEngine(model, settings.model, placement=placement, autocast=settings.autocast, source=source)


def _is_of_the_gpu(error: Exception) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in ("CUDA", *FATAL))


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """The package prints progress to stdout, which the journal would keep for ever."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
