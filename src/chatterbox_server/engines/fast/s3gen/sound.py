"""Speech tokens to sound for many utterances at once, each spoken in one go or in chunks as its tokens come.

A batch is padded to one of a few shapes, so that each shape is recorded once. What an utterance sounds like depends on
its tokens, voice and seed, and not on who shares its batch.
"""

import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from chatterbox_server.engines.fast import noise
from chatterbox_server.engines.fast.pinned import sent
from chatterbox_server.engines.fast.s3gen.flow import BANDS, Asked, Flow
from chatterbox_server.engines.fast.s3gen.layers import Attention, Kernels
from chatterbox_server.engines.fast.s3gen.recorded import Recording, Recordings
from chatterbox_server.engines.fast.s3gen.vocoder import Heard, Vocoder
from chatterbox_server.engines.fast.s3gen.watermark import Sounds, Watermark

SAMPLE_RATE_HZ: Final = 24_000

CONTEXT: Final = 24
"""Frames before a chunk that are vocoded again for it: the vocoder hears 19 to the left of what it says."""
HELD: Final = 8
"""Frames at the end of a chunk that wait for the next one, as the vocoder cannot yet hear what follows them."""
FADE: Final = 4
"""Frames, of those held, over which one chunk passes into the next."""

WIDTHS: Final = (64, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024, 1280, 1536)
"""Tokens, or frames of the vocoder by twos, that a batch is padded to; multiples of 16 suit attention's kernels."""
BATCHES: Final = (1, 2, 4, 8, 16)
UNEVEN: Final = 1.5
"""Times that one utterance may be longer than another of its batch."""
RECORDINGS_KEPT: Final = 3 * len(WIDTHS) * len(BATCHES)
"""All there can be, of flow, vocoder and watermark: to record one again takes far longer than it saves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """In which numbers, and by which of several ways that say nearly the same."""

    encoder: Any = torch.float32
    estimator: Any = torch.float32
    vocoder: Any = torch.float32
    attention: Attention = "mask"
    kernels: Kernels = "torch"
    """Where parts compute in 16 bits on CUDA; elsewhere torch's."""
    graphs: bool = True


def how_for(device: str) -> How:
    """On CUDA in 16 bits, the fastest that was measured (scripts/gpu/fast_sound.txt); elsewhere as the package does."""
    if torch.device(device).type != "cuda":
        return How()
    has_triton = importlib.util.find_spec("triton") is not None
    return How(
        encoder=torch.bfloat16,
        estimator=torch.bfloat16,
        vocoder=torch.float16,
        attention="triton" if has_triton else "flash",
        kernels="triton" if has_triton else "torch",
    )


@dataclass(slots=True)
class Stream:
    """Of one utterance that is spoken in chunks: where it stopped. Made new for each, and changed by ``speak``."""

    spoken: int = 0
    """Frames."""
    tail: Any = None
    """Sound of the frames that follow, as the last chunk would have gone on."""
    phase: Any = None
    """Of the source's harmonics, there."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Take:
    """An utterance's, or a chunk's, share of a batch."""

    tokens: Any
    """All speech tokens so far, (count,), int64, on any device."""
    voice: Mapping[str, Any]
    """The package's conditionals of S3Gen, on this device."""
    seed: int
    final: bool = True
    """Otherwise more tokens will come, and the last three are only looked at."""
    stream: Stream | None = None
    """``None``: spoken at once."""


@dataclass(frozen=True, slots=True)
class _Share:
    """A take, measured."""

    index: int
    take: Take
    tokens: int
    """The prompt's and its own."""
    prompt: int
    """Frames."""
    frames: int
    """To be made, after the prompt."""
    begin: int
    """Frame from which it is vocoded."""
    said: int
    """Frame up to which it was spoken."""
    end: int
    """Frame up to which it will be."""

    @property
    def heard(self) -> int:
        return self.frames - self.begin


class Sound:
    """S3Gen of one model. For one thread and one stream of CUDA, which need not be the default one."""

    def __init__(
        self,
        s3gen: Any,
        *,
        device: str,
        flow_steps: int | None,
        how: How | None = None,
        watermarker: Any = None,
    ) -> None:
        """``flow_steps`` as the package's ``inference`` takes them: ``None`` for the model's own.

        What is said is marked as ``watermarker`` would, the package's, or not at all. A chunk is marked with what was
        said before it and what is held back after it, so that it goes on as the one before would have.
        """
        how = how or How()
        steps = flow_steps or (2 if s3gen.meanflow else 10)
        self.how = how
        self._device = torch.device(device)
        with torch.inference_mode():
            self._flow = Flow(
                s3gen.flow,
                steps=steps,
                meanflow=s3gen.meanflow,
                encoder_dtype=how.encoder,
                dtype=how.estimator,
                attention=how.attention,
                kernels=self._kernels(how, how.estimator),
            )
            self._vocoder = Vocoder(s3gen.mel2wav, dtype=how.vocoder, kernels=self._kernels(how, how.vocoder))
            self._rise = s3gen.trim_fade.detach().to(device)
            fade = FADE * self._vocoder.samples_per_frame
            self._fade = (1 - torch.cos(torch.linspace(0, torch.pi, fade, device=device))) / 2
        self._watermark = (
            None if watermarker is None else Watermark(watermarker, sample_rate_hz=SAMPLE_RATE_HZ, device=device)
        )
        self.recordings = Recordings(device=device, kept=RECORDINGS_KEPT, record=how.graphs)
        self.flowed: Any = None
        """CUDA's event at the end of the last flow: what ``speak`` has asked for is nearly there, and the CPU may begin
        with what comes next."""

    def warm_up(self, shapes: Iterable[tuple[int, int, int]]) -> None:
        """Record (utterances, tokens of the prompt, tokens of each) before anybody waits for them.

        Raises:
            torch.OutOfMemoryError: as any call may.
        """
        for batch, prompt, tokens in shapes:
            voice = {
                "prompt_token": torch.zeros(1, prompt, dtype=torch.int64, device=self._device),
                "prompt_feat": torch.zeros(1, prompt * self._flow.frames_per_token, BANDS, device=self._device),
                "embedding": torch.ones(1, 192, device=self._device),
            }
            said = torch.zeros(tokens, dtype=torch.int64, device=self._device)
            for _ in range(2):
                self.speak([Take(tokens=said, voice=voice, seed=0)] * batch)

    def speak(self, takes: Sequence[Take]) -> list[Any]:
        """What each take adds to its utterance: float32 samples on the device, not waited for; none if too early."""
        spoken = [torch.zeros(0, device=self._device)] * len(takes)
        with torch.inference_mode():
            for batch in self._batches(takes):
                for share, samples in zip(batch, self._spoken(batch), strict=True):
                    spoken[share.index] = samples
        return spoken

    def mels(self, takes: Sequence[Take]) -> list[Any]:
        """The mel spectrogram of each take so far, (frames, bands), without its prompt; streams stay where they are."""
        made = [torch.zeros(0, BANDS, device=self._device)] * len(takes)
        with torch.inference_mode():
            for batch in self._batches(takes):
                mel = self._mel(batch).play()
                for row, share in enumerate(batch):
                    made[share.index] = mel[row, share.prompt : share.prompt + share.frames].clone()
        return made

    def ready_flow(self, takes: Sequence[Take]) -> Recording[Asked]:
        """What ``speak`` would play for a batch of ``takes``, filled in."""
        with torch.inference_mode():
            return self._mel(next(self._batches(takes)))

    def ready_vocoder(self, takes: Sequence[Take]) -> Recording[Heard]:
        """The same after the flow, whose part is taken by zeros."""
        with torch.inference_mode():
            batch = next(self._batches(takes))
            width = max(share.prompt + share.frames for share in batch)
            mel = torch.zeros(_least(BATCHES, len(batch)), width, BANDS, device=self._device)
            return self._heard(batch, mel)

    # -- who speaks with whom ----------------------------------------------------------------------------------

    def _batches(self, takes: Sequence[Take]) -> Iterator[list[_Share]]:
        """Of like lengths, longest first."""
        shares = (self._share(index, take) for index, take in enumerate(takes))
        batch: list[_Share] = []
        for share in sorted((share for share in shares if share is not None), key=lambda share: -share.tokens):
            if batch and (len(batch) == BATCHES[-1] or share.tokens * UNEVEN < batch[0].tokens):
                yield batch
                batch = []
            batch.append(share)
        if batch:
            yield batch

    def _share(self, index: int, take: Take) -> _Share | None:
        prompt = take.voice["prompt_feat"].shape[1]
        tokens = take.voice["prompt_token"].shape[1] + len(take.tokens)
        known = tokens - (0 if take.final else self._flow.tokens_ahead)
        frames = known * self._flow.frames_per_token - prompt
        said = 0 if take.stream is None else take.stream.spoken
        end = frames if take.final else frames - HELD
        if end <= said or (not take.final and end - said < FADE):
            return None
        return _Share(index, take, tokens, prompt, frames, max(0, said - CONTEXT), said, end)

    # -- one batch ---------------------------------------------------------------------------------------------

    def _spoken(self, batch: Sequence[_Share]) -> list[Any]:
        mel = self._mel(batch).play()
        if self._device.type == "cuda":
            self.flowed = torch.cuda.Event(blocking=True)
            self.flowed.record()
        heard = self._heard(batch, mel)
        samples, phases = heard.play()
        if self._watermark is not None:
            # What is played next may write over it.
            phases = phases.clone()
            samples = self._marked(self._watermark, samples, heard.inputs.frames)
        return [self._cut(share, samples[row], phases[row]) for row, share in enumerate(batch)]

    def _mel(self, batch: Sequence[_Share]) -> Recording[Asked]:
        rows, width = _least(BATCHES, len(batch)), _least(WIDTHS, max(share.tokens for share in batch))
        recording = self.recordings.find(("flow", rows, width), self._flow, lambda: self._flow_blank(rows, width))
        asked = recording.inputs
        full = [*batch, *[batch[0]] * (rows - len(batch))]
        for row, share in enumerate(full):
            voice = share.take.voice
            own = share.tokens - len(share.take.tokens)
            asked.tokens[row, :own].copy_(voice["prompt_token"][0])
            asked.tokens[row, own : share.tokens].copy_(sent(share.take.tokens, self._device))
            asked.heard[row, : share.prompt].copy_(voice["prompt_feat"][0])
            asked.speaker[row].copy_(voice["embedding"][0])
        told = self._sent(
            [(share.tokens, share.prompt, share.prompt + share.frames, noise.word(share.take.seed)) for share in full]
        )
        for target, values in zip((asked.lengths, asked.prompt, asked.frames, asked.seeds), told, strict=True):
            target.copy_(values)
        return recording

    def _heard(self, batch: Sequence[_Share], mel: Any) -> Recording[Heard]:
        rows = len(mel)
        width = 2 * _least(WIDTHS, -(-max(share.heard for share in batch) // 2))
        recording = self.recordings.find(
            ("vocoder", rows, width), self._from_mel, lambda: self._vocoder_blank(rows, width)
        )
        heard = recording.inputs
        full = [*batch, *[batch[0]] * (rows - len(batch))]
        told = self._sent(
            [
                (share.heard, share.begin, share.said - share.begin, noise.word(share.take.seed), share.prompt)
                for share in full
            ]
        )
        for target, values in zip((heard.frames, heard.first, heard.anchor, heard.seeds), told, strict=False):
            target.copy_(values)
        at = (told[4] + told[1])[:, None] + torch.arange(width, device=self._device)
        at = at.clamp(max=mel.shape[1] - 1)[..., None].expand(-1, -1, BANDS)
        torch.gather(mel, 1, at, out=heard.mel)
        heard.phase.zero_()
        for row, share in enumerate(batch):
            if share.take.stream is not None and share.take.stream.phase is not None:
                heard.phase[row].copy_(share.take.stream.phase)
        return recording

    def _marked(self, watermark: Watermark, samples: Any, frames: Any) -> Any:
        def blank() -> Sounds:
            return Sounds(torch.zeros_like(samples), frames * self._vocoder.samples_per_frame)

        recording = self.recordings.find(("mark", *samples.shape), watermark, blank)
        recording.inputs.samples.copy_(samples)
        torch.mul(frames, self._vocoder.samples_per_frame, out=recording.inputs.lengths)
        return recording.play()

    def _from_mel(self, heard: Heard) -> tuple[Any, Any]:
        samples, phases = self._vocoder(heard)
        # As the package does, against what of the prompt spills over into the first frame.
        rise = torch.where(heard.first[:, None] == 0, self._rise, 1.0)
        return torch.cat((samples[:, : len(self._rise)] * rise, samples[:, len(self._rise) :]), dim=1), phases

    def _cut(self, share: _Share, samples: Any, phases: Any) -> Any:
        """What is new of a row, with what the last chunk held back faded into it."""
        each = self._vocoder.samples_per_frame
        begin, end = (share.said - share.begin) * each, (share.end - share.begin) * each
        said, stream = samples[begin:end].clone(), share.take.stream
        if stream is None:
            return said
        if stream.tail is not None:
            said[: len(self._fade)].lerp_(stream.tail, 1 - self._fade)
        stream.spoken = share.end
        stream.tail = stream.phase = None
        if not share.take.final:
            stream.tail = samples[end : end + len(self._fade)].clone()
            stream.phase = phases[share.end - share.begin].clone()
        return said

    def _kernels(self, how: How, dtype: Any) -> Kernels:
        return how.kernels if self._device.type == "cuda" and dtype != torch.float32 else "torch"

    def _sent(self, rows: Sequence[Sequence[int]]) -> Any:
        """To the device in one piece: (values of each row, rows)."""
        return sent(torch.tensor(rows, dtype=torch.int64).T.contiguous(), self._device)

    def _flow_blank(self, rows: int, width: int) -> Asked:
        device, frames = self._device, width * self._flow.frames_per_token
        return Asked(
            tokens=torch.zeros(rows, width, dtype=torch.int64, device=device),
            lengths=torch.full((rows,), width, device=device),
            heard=torch.zeros(rows, frames, BANDS, device=device),
            prompt=torch.zeros(rows, dtype=torch.int64, device=device),
            frames=torch.full((rows,), frames, device=device),
            speaker=torch.ones(rows, 192, device=device),
            seeds=torch.zeros(rows, dtype=torch.int64, device=device),
        )

    def _vocoder_blank(self, rows: int, width: int) -> Heard:
        device = self._device
        return Heard(
            mel=torch.zeros(rows, width, BANDS, device=device),
            frames=torch.full((rows,), width, device=device),
            first=torch.zeros(rows, dtype=torch.int64, device=device),
            anchor=torch.zeros(rows, dtype=torch.int64, device=device),
            phase=torch.zeros(rows, self._vocoder.source.harmonics, dtype=torch.float64, device=device),
            seeds=torch.zeros(rows, dtype=torch.int64, device=device),
        )


def _least(sizes: Sequence[int], count: int) -> int:
    for size in sizes:
        if size >= count:
            return size
    msg = f"cannot speak {count} tokens or rows at once: at most {sizes[-1]}"
    raise ValueError(msg)
