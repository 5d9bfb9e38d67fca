"""The fast engine: utterances at once on one device, T3's steps and S3Gen's batches each on a thread of their own."""

import contextlib
import functools
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from chatterbox_server.engine import LOOK_UP_S, EngineBroken, EngineError, Errand, GpuMemory, TooLong, Unable, Utterance
from chatterbox_server.engines import stock
from chatterbox_server.engines.stock import cards, failures, kinds
from chatterbox_server.engines.stock.engine import LONGEST_PIECE, TOKENS_PER_AUDIO_S, VOICES_KEPT
from chatterbox_server.engines.stock.kinds import KINDS, MOST_TOKENS
from chatterbox_server.engines.stock.placement import Placement
from chatterbox_server.engines.stock.silence import silenced
from chatterbox_server.settings import Settings

if TYPE_CHECKING:
    from chatterbox_server.engines.fast.s3gen.sound import Take
    from chatterbox_server.engines.fast.t3.batch import Line
    from chatterbox_server.engines.stock import StockEngine
    from chatterbox_server.engines.stock.voices import Voice

log = logging.getLogger(__name__)

MOST_AT_ONCE: Final = 64
"""Utterances, where memory allows: of more of them each becomes slower and the whole hardly faster."""

AT_ONCE_WITHOUT_GPU: Final = 4
"""Utterances, for tests: enough to share batches."""

FIRST_CHUNK: Final = 15
"""Tokens of an utterance before its first sound: 0.6 s, of which 0.32 s is left when S3Gen has looked 3 tokens ahead
and held 8 frames back."""
GROWTH: Final = 2.0
"""Each chunk is longer than the one before: whoever listens has more in hand, and less is computed anew."""

WARM: Final = (FIRST_CHUNK, 60, 120, 240, 360, 500)
"""Tokens of what is spoken before anybody asks, at every size of batch: chunks as they grow, and up to 20 s at once."""

MANNERS_KEPT: Final = 64
"""Of voices, as T3 reads them: a voice and its exaggeration."""

SHARE_FOR_CACHE: Final = 0.5
"""Of the memory that is free once the weights are there; the rest is S3Gen's, whose batches come and go."""

LEAST_FOR_S3GEN: Final = 2**30
"""Bytes: an utterance alone, weights aside (scripts/gpu/fast_sound.txt: 1.1 GiB reserved with them)."""
AMPLE_FOR_S3GEN: Final = 6 * 2**30
"""Bytes, of all that is captured: 39.13 GiB on an H200 (scripts/gpu/fast_server.txt) less 65 caches and the weights."""


class FastEngine:
    """One model of chatterbox-tts that is already built, taken over: its T3 is left without its layers."""

    name = "fast"
    longest_piece = LONGEST_PIECE
    tokens_per_audio_s: float | None = TOKENS_PER_AUDIO_S
    speeds = (1.0, 1.0)
    frees_beside = True
    """Slots are never given back, and S3Gen's batches end one by one: who runs out of memory waits for nobody's."""

    def __init__(
        self,
        model: Any,
        kind: str,
        *,
        device: str,
        max_batch: int = 0,
        source: str = "memory",
        voices_kept: int = VOICES_KEPT,
        keep_t3: bool = False,
    ) -> None:
        """``max_batch``: utterances at once, 0 for as many as fit. Without a GPU it computes in float32.

        ``keep_t3`` leaves the package's T3 whole, for one who wants to hear it beside.

        Raises:
            EngineError: the checkpoint has no built-in voice, or there is no memory for so many utterances.
        """
        import torch

        from chatterbox_server.engines.fast.s3gen.sound import Sound, how_for
        from chatterbox_server.engines.fast.s3gen.sounding import Sounding
        from chatterbox_server.engines.fast.t3.batch import Batch
        from chatterbox_server.engines.fast.t3.graphs import T3
        from chatterbox_server.engines.fast.t3.slots import Slots
        from chatterbox_server.engines.stock.voices import Voices

        if model.conds is None:
            msg = f"cannot speak without a built-in voice: {source} has no conds.pt"
            raise EngineError(msg)
        began_s = time.monotonic()
        self._on_gpu = device.startswith("cuda")
        self.model = kind
        self.sample_rate_hz: int = model.sr
        self.languages = KINDS[kind].languages
        self.defaults = KINDS[kind].defaults
        self._model, self._kind, self._source, self._device = model, KINDS[kind], source, device
        self._placement = Placement(device, device)
        self._cards = self._placement.cards
        # Around tokenizer and prompts: the package's own modules, which keep state. Voices have a lock of their own.
        self._reads = threading.Lock()
        self.voices = Voices(model, self._kind, self._placement, kept=voices_kept)
        self._manners: OrderedDict[tuple[int, float | None], tuple[Voice, Any]] = OrderedDict()
        dtype = torch.bfloat16 if self._on_gpu else torch.float32
        self.places = self._fitting(model.t3, dtype, max_batch)
        slots = Slots(model.t3, slots=self.places, dtype=dtype)
        if not keep_t3:
            model.t3.tfmr = torch.nn.Identity()
        capable = self._on_gpu and torch.cuda.get_device_capability(device) >= (9, 0)
        self._t3 = T3(slots, by_kernels=self._on_gpu, early=capable, at_once=capable, capture=self._on_gpu)
        self._sound = Sound(
            model.s3gen,
            device=device,
            flow_steps=self._kind.flow_steps,
            how=how_for(device),
            watermarker=model.watermarker,
        )
        self._warm_up()
        told = functools.partial(failures.told, self._cards)
        self._sounding = Sounding(self._sound, around=lambda: self._stream(first=False), told=told)
        self._batch = Batch(
            self._t3,
            by_count=kind == "turbo",
            around=lambda: self._stream(first=True),
            told=told,
            free=self.free,
            gone_before=self._sounding.no_stream,
        )
        memory = self.memory()
        held = "" if memory is None else f", {memory.reserved_bytes / 2**30:.1f} GiB of the GPU"
        log.info(
            "fast engine: %d utterances at once, ready after %.0f s%s", self.places, time.monotonic() - began_s, held
        )

    @property
    def broken(self) -> EngineBroken | None:
        """See ``Engine``: one of the threads is no more."""
        return self._batch.broken or self._sounding.broken

    def facts(self) -> Mapping[str, object]:
        return {
            "weights": self._source,
            "devices": {"t3": self._device, "s3gen": self._device},
            "t3": str(self._t3.slots.backbone.dtype).removeprefix("torch."),
            "voices_kept": len(self.voices),
            **cards.facts(self._cards),
        }

    def memory(self) -> GpuMemory | None:
        return cards.memory(self._cards)

    def free(self) -> None:
        """See ``Engine``; slots and what is captured stay."""
        cards.let_go(self._cards)

    def close(self) -> None:
        """End the threads; what is in hand fails."""
        self._batch.close()
        self._sounding.close()

    def synthesize(self, utterance: Utterance, errand: Errand) -> NDArray[np.float32]:
        """See ``Engine``. What is ready before the rest is given to an ``errand`` that listens."""
        import torch

        from chatterbox_server.engines.fast.s3gen.sound import Take

        errand.make_way()
        with failures.told(self._cards):
            with silenced(), torch.inference_mode():
                voice = self.voices.find(utterance.voice, errand)
            with errand.at_work():
                line = self._begun(utterance, voice)
                try:
                    if errand.listens:
                        return self._in_chunks(utterance, errand, voice, line)
                    tokens = line.wait(errand, enough=line.limit)
                    take = Take(tokens=self._speech(tokens), voice=voice.s3gen, seed=utterance.seed)
                    return self._sounds(take, errand)
                finally:
                    self._batch.leave(line)

    # -- an utterance -------------------------------------------------------------------------------------

    def _begun(self, utterance: Utterance, voice: "Voice") -> "Line":
        """T3 at work.

        Raises:
            TooLong: the text is too long to be read.
        """
        import torch

        from chatterbox_server.engines.fast.t3 import slots

        with silenced(), torch.inference_mode(), self._reads:
            manner = self._manner(utterance, voice)
            prompt = slots.prompt(self._model.t3, self._kind.text(self._model, utterance), manner)
            if self._on_gpu:
                ready = torch.cuda.Event()
                ready.record(torch.cuda.current_stream(self._device))
                prompt = replace(prompt, ready=ready)
        longest = self._t3.slots.longest_prompt
        if prompt.length > longest:
            reason = f"the text and its voice are {prompt.length} tokens, and {longest} can be read at once"
            raise TooLong(reason, param="input")
        return self._batch.ask(prompt, utterance.seed, utterance.sampling, limit=MOST_TOKENS)

    def _manner(self, utterance: Utterance, voice: "Voice") -> Any:
        """T3's conditionals, embedded; the same again for the same voice."""
        from chatterbox_server.engines.fast.t3 import slots

        # The voice itself, so that no other can be where it was; of the sampling what T3 reads before it speaks.
        key = (id(voice), utterance.sampling.exaggeration if self._kind.expressive else None)
        if key not in self._manners:
            conditionals = kinds.conditioned(self._kind, utterance, voice.for_t3())
            self._manners[key] = (voice, slots.embedded(self._model.t3, conditionals))
            while len(self._manners) > MANNERS_KEPT:
                self._manners.popitem(last=False)
        self._manners.move_to_end(key)
        return self._manners[key][1]

    def _speech(self, tokens: Sequence[int]) -> Any:
        """What S3Gen can make sound of."""
        import torch

        return self._kind.speech(torch.tensor(tokens, dtype=torch.int64))

    def _sounds(self, take: "Take", errand: Errand, *, due_s: float | None = None) -> NDArray[np.float32]:
        future = self._sounding.ask(take, due_s=due_s)
        try:
            while not futures.wait((future,), LOOK_UP_S).done:
                errand.check()
        finally:
            # Of one whom nobody waits for, nothing is made that was not begun.
            future.cancel()
        return future.result()

    def _in_chunks(self, utterance: Utterance, errand: Errand, voice: "Voice", line: "Line") -> NDArray[np.float32]:
        import torch

        from chatterbox_server.engines.fast.s3gen.sound import Stream, Take

        stream, enough, began_s = Stream(), float(FIRST_CHUNK), time.monotonic()
        while True:
            tokens = line.wait(errand, enough=int(enough))
            final = line.over and len(tokens) == len(line.tokens)
            known = self._speech(tokens) if final else torch.tensor([one for one in tokens if one < kinds.SOUNDS])
            take = Take(tokens=known, voice=voice.s3gen, seed=utterance.seed, final=final, stream=stream)
            samples = self._sounds(take, errand, due_s=began_s + errand.given / self.sample_rate_hz)
            if final:
                return samples
            if samples.size:
                errand.give(samples)
            enough = max(enough * GROWTH, len(tokens) + 1)

    # -- the device ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _stream(self, *, first: bool) -> Iterator[None]:
        """T3's is ``first`` where both want the GPU: its kernels are short, and each token waits for the last."""
        if not self._on_gpu:
            yield
            return
        import torch

        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.Stream(priority=-1 if first else 0)):
            yield

    def _warm_up(self) -> None:
        import torch

        from chatterbox_server.engines.fast.s3gen.sound import BATCHES

        if not self._on_gpu:
            return
        with self._stream(first=True), torch.inference_mode():
            self._t3.warm_up()
            torch.cuda.synchronize(self._device)
        voice = self._model.conds.gen["prompt_token"].shape[-1]
        with self._stream(first=False), torch.inference_mode():
            self._sound.warm_up([(batch, voice, tokens) for batch in BATCHES for tokens in WARM])
            torch.cuda.synchronize(self._device)

    def _fitting(self, t3: Any, dtype: Any, asked: int) -> int:
        """How many utterances' caches are made: as many as are asked for, or as the memory holds that is free now."""
        import torch

        from chatterbox_server.engines.fast.t3.slots import LONGEST_PROMPT

        if not self._on_gpu:
            return asked or AT_ONCE_WITHOUT_GPU
        config = t3.cfg
        heads = getattr(config, "num_attention_heads", None) or config.n_head
        layers = getattr(config, "num_hidden_layers", None) or config.n_layer
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        rows = 1 if t3.is_gpt else 2
        each = 2 * rows * layers * heads * head_dim * (LONGEST_PROMPT + MOST_TOKENS) * torch.finfo(dtype).bits // 8
        free, _ = torch.cuda.mem_get_info(self._device)
        places = fitting(free, each, asked)
        if said := cramped(free, each, places):
            log.warning("fast engine: %s", said)
        return places


def fitting(free_bytes: int, each_bytes: int, asked: int = 0) -> int:
    """Utterances at once, each with a cache of so many bytes; one cache more is made, that is nobody's.

    Raises:
        EngineError: not as many as are ``asked`` for fit, or not a single one, beside the least that S3Gen needs.
    """
    each_gib, free_gib, least_gib = (size / 2**30 for size in (each_bytes, free_bytes, LEAST_FOR_S3GEN))
    most = (free_bytes - LEAST_FOR_S3GEN) // each_bytes - 1
    if most < 1:
        msg = (
            f"cannot hold an utterance: two caches of {each_gib:.1f} GiB and {least_gib:.1f} GiB for S3Gen are needed, "
            f"and {free_gib:.1f} GiB are free"
        )
        raise EngineError(msg)
    fit = min(MOST_AT_ONCE, max(1, int(free_bytes * SHARE_FOR_CACHE) // each_bytes - 1))
    if asked > most:
        msg = (
            f"cannot hold {asked} utterances at once, of {each_gib:.1f} GiB each, and {least_gib:.1f} GiB for S3Gen: "
            f"{free_gib:.1f} GiB are free; set server.max_batch to {min(fit, most)} or less, or to 0 for as many as fit"
        )
        raise EngineError(msg)
    return asked or min(fit, most)


def cramped(free_bytes: int, each_bytes: int, places: int) -> str | None:
    """What to say where ``places`` utterances leave S3Gen little memory; ``None``: it has enough."""
    left_bytes = free_bytes - (places + 1) * each_bytes
    if left_bytes >= AMPLE_FOR_S3GEN:
        return None
    left_gib, ample_gib = left_bytes / 2**30, AMPLE_FOR_S3GEN / 2**30
    return (
        f"{left_gib:.1f} GiB are left for S3Gen, which takes up to {ample_gib:.0f} GiB: long or many utterances "
        "may not fit; a smaller server.max_batch leaves it more"
    )


def unfit(device: str) -> str | None:
    """Why this machine's GPU cannot run what the fast engine captures; ``None``: it can, or is not what is asked for.

    Where there is no GPU, or no torch, whoever loads the model says so.
    """
    if device == "cpu":
        return None
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"compute capability {major}.{minor}, and bfloat16 needs 8.0"
    try:
        from chatterbox_server.engines.fast.t3 import kernels

        x = torch.ones(1, 16, device="cuda")
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            graph = torch.cuda.CUDAGraph()
            # Triton compiles with the machine's own C compiler.
            kernels.add_norm[(1,)](x, x, x, D=16, ADD=False, EPS=1e-5, GATED=True)
            stream.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                kernels.add_norm[(1,)](x, x, x, D=16, ADD=False, EPS=1e-5, GATED=True)
            graph.replay()
            stream.synchronize()
    except Exception as error:  # noqa: BLE001 (whatever it is, the stock engine does without)
        return failures.one_line(error)
    return None


def load(settings: Settings, unfit: Callable[[str], str | None] = unfit) -> "FastEngine | StockEngine":
    """Build the model that ``settings`` name; where this machine is ``unfit``, the stock engine around it.

    Raises:
        EngineError: with one line that says what is missing; ``Unable``, a package, or which engine to take instead.
    """
    if settings.device == "cuda" and (count := len(settings.visible_gpus)) > 1:
        msg = (
            f"cannot spread the fast engine over {count} GPUs: give each a port of its own, or set "
            'server.engine = "stock"'
        )
        raise Unable(msg)
    if why := unfit(settings.device):
        log.warning("the fast engine cannot run here (%s): speaking through the stock engine", why)
        return stock.load(settings)
    # What is float32 here has to be exact; all that is heavy is bfloat16.
    built = stock.built(settings, tf32=False)
    return FastEngine(
        built.model, settings.model, device=built.placement.t3, max_batch=settings.max_batch, source=built.source
    )
