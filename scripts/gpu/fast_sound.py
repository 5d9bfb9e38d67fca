"""The fast engine's S3Gen on this GPU: does it say what the package says, how exactly in which numbers, and how soon.

    python scripts/gpu/fast_sound.py | tee scripts/gpu/fast_sound.txt
    python scripts/gpu/fast_sound.py --only flows first      # some of the parts, which --help names
    python scripts/gpu/fast_sound.py --tiny                  # on a CPU with small weights: whether the script runs

Weights are random at full size, made on the GPU: the arithmetic, memory and time of the real model, noise for speech.
What fails is told and left out. The floor beside a time is what the card's data sheet allows for its products.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
# Read when they are imported.
os.environ["TQDM_DISABLE"] = os.environ["HF_HUB_OFFLINE"] = "1"

import perth
import torch
from chatterbox.models.s3gen import S3Gen
from chatterbox.models.s3gen.s3gen import (
    CFM_PARAMS,
    S3GEN_SR,
    CausalConditionalCFM,
    CausalMaskedDiffWithXvec,
    ConditionalDecoder,
    ConvRNNF0Predictor,
    HiFTGenerator,
    UpsampleConformerEncoder,
)
from scripts import same_noise

from chatterbox_server.engines.fast.encoder import Encoder
from chatterbox_server.engines.fast.recorded import Recordings
from chatterbox_server.engines.fast.sound import FADE, HELD, How, Sound, Stream, Take
from chatterbox_server.engines.fast.watermark import Sounds, Watermark
from chatterbox_server.engines.stock.silence import silenced

if TYPE_CHECKING:
    from collections.abc import Callable

PEAK_FLOPS = 989e12
"""bf16, dense: NVIDIA's data sheets of H100 SXM and H200."""
HALF = torch.bfloat16
PROMPT, SPOKEN = 125, 250
"""Tokens: 5 s of the voice, 10 s of speech."""


# -- what is measured ------------------------------------------------------------------------------------------


def full_size(device: str, *, meanflow: bool) -> Any:
    """S3Gen without what listens to voices; as scripts/tiny_model.py makes it, but at its real size."""
    with torch.device("meta"):
        s3gen = S3Gen(meanflow=meanflow)
    with torch.device(device):
        encoder = UpsampleConformerEncoder(
            input_size=512, output_size=512, attention_heads=8, linear_units=2048, num_blocks=6, normalize_before=True,
            input_layer="linear", pos_enc_layer_type="rel_pos_espnet", selfattention_layer_type="rel_selfattn",
            use_cnn_module=False, macaron_style=False,
        )  # fmt: skip
        estimator = ConditionalDecoder(
            in_channels=320, out_channels=80, causal=True, channels=[256], dropout=0.0, attention_head_dim=64,
            n_blocks=4, num_mid_blocks=12, num_heads=8, act_fn="gelu", meanflow=meanflow,
        )  # fmt: skip
        flow = CausalConditionalCFM(spk_emb_dim=80, cfm_params=CFM_PARAMS, estimator=estimator)
        s3gen.flow = CausalMaskedDiffWithXvec(encoder=encoder, decoder=flow)
        s3gen.mel2wav = HiFTGenerator(
            sampling_rate=S3GEN_SR, upsample_rates=[8, 5, 3], upsample_kernel_sizes=[16, 11, 7],
            source_resblock_kernel_sizes=[7, 7, 11], source_resblock_dilation_sizes=[[1, 3, 5]] * 3,
            f0_predictor=ConvRNNF0Predictor(),
        )  # fmt: skip
        fade = S3GEN_SR // 50
        ramp = (torch.cos(torch.linspace(torch.pi, 0, fade)) + 1) / 2
        s3gen.trim_fade = torch.cat((torch.zeros(fade), ramp))
        # The package asks its tokenizer where it is.
        s3gen.tokenizer = torch.nn.Linear(1, 1)
        s3gen.speaker_encoder = torch.nn.Identity()
    return s3gen.to(device).eval()


def made(*, tiny: bool, meanflow: bool) -> Any:
    torch.manual_seed(0)
    if tiny:
        from scripts import tiny_model

        s3gen = tiny_model.tiny_s3gen(meanflow=meanflow)
    else:
        s3gen = full_size("cuda", meanflow=meanflow)
    same_noise.make_audible(s3gen)
    return s3gen


def takes_of(lengths: list[int], device: str, *, prompt: int = PROMPT) -> list[Take]:
    """Each of another voice."""
    dice = torch.Generator().manual_seed(len(lengths))
    takes = []
    for place, length in enumerate(lengths):
        voice = {
            "prompt_token": torch.randint(0, 6561, (1, prompt), generator=dice).to(device),
            "prompt_token_len": torch.tensor([prompt], device=device),
            "prompt_feat": (torch.randn(1, 2 * prompt, 80, generator=dice) * 2 - 6).to(device),
            "prompt_feat_len": None,
            "embedding": torch.randn(1, 192, generator=dice).to(device),
        }
        tokens = torch.randint(0, 6561, (length,), generator=dice).to(device)
        takes.append(Take(tokens=tokens, voice=voice, seed=1000 + place))
    return takes


def decibels(other: Any, right: Any) -> float:
    """Of the difference, against what is right."""
    error = ((other.double() - right.double()).norm() / right.double().norm()).item()
    return 20 * math.log10(max(error, 1e-12))


class Bench:
    """One model on one device."""

    def __init__(self, *, tiny: bool, meanflow: bool = False) -> None:
        self.tiny = tiny
        self.device = "cpu" if tiny else "cuda"
        self.scale = 10 if tiny else 1
        self.s3gen = made(tiny=tiny, meanflow=meanflow)
        self.steps = 2 if meanflow else 10

    def sound(self, how: How) -> Sound:
        return Sound(self.s3gen, device=self.device, flow_steps=self.steps, how=how)

    def tokens(self, count: int) -> int:
        return max(4, count // self.scale)

    def synchronize(self) -> None:
        if not self.tiny:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any], times: int = 3) -> float:
        """The median of some, after one that does not count; by the clock on the wall, for launches count too."""
        work()
        self.synchronize()
        took = []
        for _ in range(times):
            begin = time.perf_counter()
            work()
            self.synchronize()
            took.append(time.perf_counter() - begin)
        return statistics.median(took)


def attempt(name: str, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:  # noqa: BLE001 (one variant that fails must not cost the others)
        print(
            f"  {name}: FAILED: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", flush=True
        )
        where = traceback.extract_tb(error.__traceback__)[-3:]
        print("    " + " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(where)))
        return None
    finally:
        # A graph's memory goes with the engine, which knows its own methods: a cycle.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# -- does it say the same --------------------------------------------------------------------------------------


def same(bench: Bench) -> None:
    print("\n== the same: float32, relative error of the samples")
    lengths = [bench.tokens(count) for count in (250, 120, 75, 30)]
    takes = takes_of(lengths, bench.device)
    sound = bench.sound(How())
    alone = [sound.speak([take])[0] for take in takes]
    together = sound.speak(takes)
    print(f"  recorded {len(sound.recordings)}, refused {sound.recordings.refused}")
    eager = bench.sound(How(graphs=False))
    mels = sound.mels(takes)
    for place, (take, one, other) in enumerate(zip(takes, alone, together, strict=True)):
        with silenced():
            package = same_noise.inference(bench.s3gen, take.tokens, take.voice, seed=take.seed, steps=bench.steps)
        called = eager.speak([take])[0]
        row = [10 ** (decibels(said, right) / 20) for said, right in ((other, one), (called, one), (one, package))]
        mel = [10 ** (decibels(said, sound.mels([take])[0]) / 20) for said in (mels[place],)]
        print(
            f"  {len(take.tokens):4} tokens: batched against alone {row[0]:.1e} (mel {mel[0]:.1e}), "
            f"called against recorded {row[1]:.1e}, alone against the package {row[2]:.1e}",
            flush=True,
        )


def exact(bench: Bench) -> None:
    print("\n== exact: error in dB against float32: of the mel spectrogram, of the samples, between their spectra")
    takes = takes_of([bench.tokens(count) for count in (250, 120)], bench.device)
    plain = How()
    right = bench.sound(plain)
    mels, sounds = right.mels(takes), right.speak(takes)
    half = replace(plain, encoder=HALF, estimator=HALF, vocoder=torch.float16)
    variants = {
        "encoder bf16": replace(plain, encoder=HALF),
        "estimator bf16": replace(plain, estimator=HALF),
        "estimator fp16": replace(plain, estimator=torch.float16),
        "estimator bf16, triton, flash": replace(plain, estimator=HALF, kernels="triton", attention="flash"),
        "estimator bf16, triton, cudnn": replace(plain, estimator=HALF, kernels="triton", attention="cudnn"),
        "estimator bf16, triton, lse-cudnn": replace(plain, estimator=HALF, kernels="triton", attention="lse-cudnn"),
        "vocoder bf16": replace(plain, vocoder=HALF),
        "vocoder fp16": replace(plain, vocoder=torch.float16),
        "vocoder fp16, triton": replace(plain, vocoder=torch.float16, kernels="triton"),
        "encoder, estimator bf16, vocoder fp16": replace(half, attention="flash"),
        "the same, triton": replace(half, attention="flash", kernels="triton"),
        "all fp16, triton": replace(
            half, encoder=torch.float16, estimator=torch.float16, attention="flash", kernels="triton"
        ),
    }
    for name, how in variants.items():

        def measure(how: How) -> str:
            sound = bench.sound(how)
            heard, said = sound.mels(takes), sound.speak(takes)
            errors = [
                ", ".join(f"{decibels(one, other):6.1f}" for one, other in zip(*pair, strict=True))
                for pair in ((heard, mels), (said, sounds))
            ]
            apart = ", ".join(f"{spectral(one, other):.2f}" for one, other in zip(said, sounds, strict=True))
            return f"mel {errors[0]}   samples {errors[1]}   spectra {apart}"

        print(f"  {name:<40} {attempt(name, partial(measure, how))}", flush=True)


# -- how soon --------------------------------------------------------------------------------------------------


def flow_flops(rows: int, frames: int, steps: int) -> float:
    """Of the estimator: 56 transformer blocks, 14 resnets, 256 channels, 512 in attention."""
    block = 2 * frames * (256 * 1536 + 512 * 256 + 2 * 256 * 1024) + 4 * frames * frames * 512
    resnet = 2 * frames * (6 * 256 * 256 + 256 * 256)
    return rows * steps * (56.0 * block + 14.0 * resnet)


def requests(bench: Bench, batch: int) -> list[Take]:
    return takes_of([bench.tokens(SPOKEN)] * batch, bench.device, prompt=bench.tokens(PROMPT))


BASE = How(encoder=HALF, estimator=HALF, vocoder=torch.float16, attention="flash")


def told(took_s: float, batch: int, recording: Any, ready_s: float, name: str) -> str:
    how = "called" if recording.graph is None else "recorded"
    each = 1e3 * took_s / batch
    return f"  {batch:3} {1e3 * took_s:8.2f} {each:8.2f}   ready after {ready_s:3.0f} s, {how}: {name}"


def timed_flow(bench: Bench, batch: int, name: str, how: How) -> float:
    begin = time.perf_counter()
    recording = bench.sound(how).ready_flow(requests(bench, batch))
    ready_s = time.perf_counter() - begin
    took = bench.seconds(recording.play)
    rows = batch * (1 if bench.s3gen.meanflow else 2)
    flops = flow_flops(rows, 2 * (bench.tokens(PROMPT) + bench.tokens(SPOKEN)), bench.steps)
    floor_ms = 1e3 * flops / PEAK_FLOPS / batch
    rate = f"{flops / took / 1e12:4.0f} TFLOP/s, floor {floor_ms:.2f} ms"
    print(f"{told(took, batch, recording, ready_s, name)}; {rate}", flush=True)
    return took


def flows(bench: Bench) -> None:
    batches = (1, 2) if bench.tiny else (1, 4, 16, 32)
    print(f"\n== flows: encoder and flow of {SPOKEN} tokens after {PROMPT} of a voice: batch, ms, ms a request")
    torch_s, ours = BASE, replace(BASE, kernels="triton")
    ways = {
        "torch, flash": torch_s,
        "torch, full (no padding kept out)": replace(torch_s, attention="full"),
        "torch, lse-cudnn": replace(torch_s, attention="lse-cudnn"),
        "torch, cudnn": replace(torch_s, attention="cudnn"),
        "triton, flash": ours,
        "triton, cudnn": replace(ours, attention="cudnn"),
        "triton, lse-cudnn": replace(ours, attention="lse-cudnn"),
        "triton, lse-flash": replace(ours, attention="lse-flash"),
        "triton, full (no padding kept out)": replace(ours, attention="full"),
        "triton, fp16, cudnn": replace(ours, estimator=torch.float16, attention="cudnn"),
    }
    for name, how in ways.items():
        attempt(name, partial(timed_flow, bench, batches[-2], name, how))
    for batch in batches:
        for name in ("triton, flash", "triton, cudnn"):
            if batch != batches[-2]:
                attempt(name, partial(timed_flow, bench, batch, name, ways[name]))

    def encoders(dtype: Any, batch: int) -> None:
        tokens = bench.tokens(PROMPT) + bench.tokens(SPOKEN)
        encoder = Encoder(bench.s3gen.flow.encoder, dtype=dtype, device=bench.device)
        x = torch.randn(batch, tokens, bench.s3gen.flow.input_embedding.weight.shape[1], device=bench.device)
        lengths = torch.full((batch,), tokens, device=bench.device)
        recordings = Recordings(device=bench.device, kept=1)
        with torch.inference_mode():
            recording = recordings.find("encoder", lambda given: encoder(*given), lambda: (x, lengths))
            took = bench.seconds(recording.play)
        print(told(took, batch, recording, 0, f"the encoder alone, {dtype}"), flush=True)

    for dtype in (HALF, torch.float32):
        attempt("encoder", partial(encoders, dtype, batches[-2]))


def timed_vocoder(bench: Bench, batch: int, name: str, how: How) -> None:
    begin = time.perf_counter()
    recording = bench.sound(how).ready_vocoder(requests(bench, batch))
    ready_s = time.perf_counter() - begin
    print(told(bench.seconds(recording.play), batch, recording, ready_s, name), flush=True)


def vocoders(bench: Bench) -> None:
    batch = 2 if bench.tiny else 16
    print(f"\n== vocoders: {SPOKEN * 2} frames: batch, ms, ms a request")
    ways = {
        "fp16, torch": BASE,
        "fp16, torch, compiled for all": replace(BASE, compile="dynamic"),
        "fp16, triton": replace(BASE, kernels="triton"),
        "bf16, triton": replace(BASE, vocoder=HALF, kernels="triton"),
    }
    for name, how in ways.items():
        attempt(name, partial(timed_vocoder, bench, batch, name, how))
    for few in (1,) if bench.tiny else (1, 4):
        for name in ("fp16, torch", "fp16, triton"):
            attempt(name, partial(timed_vocoder, bench, few, name, ways[name]))


def whole(bench: Bench) -> None:
    print("\n== whole: from tokens to sound: batch, ms, ms a request")

    def measure(batch: int, how: How) -> None:
        sound = bench.sound(how)
        takes = requests(bench, batch)
        took = bench.seconds(partial(sound.speak, takes))
        begin = time.perf_counter()
        sound.speak(takes)
        free_ms = 1e3 * (time.perf_counter() - begin)
        bench.synchronize()
        memory = "-" if bench.tiny else f"{torch.cuda.memory_reserved() / 2**30:.1f}"
        print(
            f"  {batch:3} {1e3 * took:8.2f} {1e3 * took / batch:8.2f}   the CPU is free after {free_ms:.1f} ms, "
            f"{memory} GiB reserved: {how.attention}",
            flush=True,
        )

    for batch in (1, 2) if bench.tiny else (1, 4, 16, 32):
        for how in (replace(BASE, kernels="triton"), replace(BASE, kernels="triton", attention="cudnn")):
            attempt("whole", partial(measure, batch, how))


def mark(bench: Bench) -> None:
    print("\n== mark: the package's watermark: batch, ms, ms a request; relative error against the package's own")
    takes = requests(bench, 2 if bench.tiny else 16)
    plain = bench.sound(How()).speak(takes)
    with silenced():
        package = perth.PerthImplicitWatermarker()
    ours = Watermark(package, sample_rate_hz=24_000, device=bench.device)
    recordings = Recordings(device=bench.device, kept=1)
    lengths = torch.tensor([len(samples) for samples in plain], device=bench.device)
    sounds = Sounds(torch.stack(plain), lengths)
    with torch.inference_mode():
        recording = recordings.find("mark", ours, lambda: sounds)
        took = bench.seconds(recording.play)
        print(told(took, len(plain), recording, 0, "on the device"), flush=True)
        marked = recording.play().clone()
        called = bench.seconds(partial(ours, sounds))
        print(f"  called: {1e3 * called:.2f} ms")
        begin = time.perf_counter()
        right = [package.apply_watermark(samples.cpu().numpy(), sample_rate=24_000) for samples in plain[:4]]
        print(f"  the package, on the CPU: {1e3 * (time.perf_counter() - begin) / len(right):.1f} ms each")
        for row, (one, other) in enumerate(zip(marked, right, strict=False)):
            error = 10 ** (decibels(one.cpu(), torch.from_numpy(other)) / 20)
            read = [package.get_watermark(samples, sample_rate=24_000) for samples in (one.cpu().numpy(), other)]
            print(f"  {row}: {error:.1e}, read as {read[0]:.1f}, the package's own as {read[1]:.1f}", flush=True)
    how = replace(BASE, compile="off")
    marking = Sound(bench.s3gen, device=bench.device, flow_steps=bench.steps, how=how, watermarker=package)
    for batch in (1, 2) if bench.tiny else (1, 16):
        took = bench.seconds(partial(marking.speak, requests(bench, batch)))
        print(f"  {batch:3} {1e3 * took:8.2f} {1e3 * took / batch:8.2f}   from tokens to marked sound", flush=True)
    take = replace(takes[0], tokens=takes[0].tokens[:15], final=False)

    def chunk() -> Any:
        return marking.speak([replace(take, stream=Stream())])[0].cpu()

    took = bench.seconds(chunk, 9)
    print(f"  {1e3 * took:.2f} ms: a first chunk of 15 tokens, marked")


def first(bench: Bench) -> None:
    print("\n== first: a first chunk of one utterance, from its tokens to its samples on the CPU")

    def measure(count: int, how: How) -> str:
        sound = bench.sound(how)
        take = takes_of([count], bench.device, prompt=bench.tokens(PROMPT))[0]

        def chunk() -> Any:
            return sound.speak([replace(take, final=False, stream=Stream())])[0].cpu()

        took = bench.seconds(chunk, 9)
        return f"{1e3 * took:7.2f} ms for {len(chunk()) / 24:.0f} ms of sound"

    for name, how in (
        ("flash", BASE),
        ("flash, triton", replace(BASE, kernels="triton")),
        ("cudnn, triton", replace(BASE, kernels="triton", attention="cudnn")),
    ):
        for count in (15, 25):
            print(f"  {count} tokens, {name}: {attempt(name, partial(measure, count, how))}", flush=True)


def chunks(bench: Bench) -> None:
    print(f"\n== chunks: against the same utterance in one go, dB; {HELD} frames held, {FADE} of them faded")
    sound = bench.sound(How())
    with silenced():
        package = perth.PerthImplicitWatermarker()
    marking = Sound(bench.s3gen, device=bench.device, flow_steps=bench.steps, watermarker=package)
    take = takes_of([250], bench.device, prompt=bench.tokens(PROMPT))[0]
    right = sound.speak([take])[0]
    mel = sound.mels([take])[0]
    at_once = marking.speak([take])[0].cpu().numpy()
    print(f"  marked in one go, read as {package.get_watermark(at_once, sample_rate=24_000, round=False):.3f}")
    for name, ends in (
        ("growing: 15, 40, 90, 190, 250", (15, 40, 90, 190, 250)),
        ("even: every 25", tuple(range(25, 251, 25))),
        ("late: 125, 250", (125, 250)),
    ):
        stream, other = Stream(), Stream()
        parts, mels, marked = [], [], []
        for end in ends:
            one = replace(take, tokens=take.tokens[:end], final=end == 250, stream=stream)
            mels.append(sound.mels([one])[0])
            parts.append(sound.speak([one])[0])
            marked.append(marking.speak([replace(one, stream=other)])[0])
        said = torch.cat(parts)
        read = package.get_watermark(torch.cat(marked).cpu().numpy(), sample_rate=24_000, round=False)
        errors = ", ".join(f"{decibels(part, mel[: len(part)]):.1f}" for part in mels)
        print(
            f"  {name}: samples {decibels(said, right):.1f} dB, loudness of each 20 ms {contour(said, right):.1f} dB, "
            f"spectra {spectral(said, right):.2f} dB apart; {len(said) - len(right)} samples too many; "
            f"mel so far against mel in the end: {errors}; marked, read as {read:.3f}",
            flush=True,
        )


def contour(said: Any, right: Any) -> float:
    return decibels(*(samples.unfold(0, 480, 480).square().mean(1).sqrt() for samples in (said, right)))


def spectral(said: Any, right: Any) -> float:
    """Log-spectral distance: root of the mean square of the difference of spectra in dB, of 43 ms each."""
    window = torch.hann_window(1024, device=right.device)
    spectra = [
        20 * torch.log10(torch.stft(samples, 1024, 256, window=window, return_complex=True).abs().clamp(min=1e-5))
        for samples in (said, right)
    ]
    return float((spectra[0] - spectra[1]).square().mean(0).sqrt().mean())


def tiles_chosen(_bench: Bench) -> None:
    print("\n== tiles: what Triton's autotune chose")
    from chatterbox_server.engines.fast import tiles

    for line in tiles.chosen():
        print(f"  {line}")


def turbo(bench: Bench) -> None:
    print("\n-- turbo: two steps, no guidance")
    small = Bench(tiny=bench.tiny, meanflow=True)
    for part in (same, flows, whole, first):
        part(small)


PARTS = {
    part.__name__: part for part in (same, flows, vocoders, whole, first, mark, exact, chunks, tiles_chosen, turbo)
}  # what is dear to know first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    asked = parser.parse_args()
    if asked.tiny:
        torch.set_num_threads(1)
    else:
        print(subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout.strip())
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, torch {torch.__version__}")
    begin = time.perf_counter()
    bench = Bench(tiny=asked.tiny)
    bench.synchronize()
    print(f"S3Gen, random weights, after {time.perf_counter() - begin:.1f} s", flush=True)
    for name in asked.only:
        began = time.perf_counter()
        attempt(name, partial(PARTS[name], bench))
        print(f"  ({name}: {time.perf_counter() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
