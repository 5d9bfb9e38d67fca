"""The fast engine's S3Gen on this GPU: does it say what the package says, how exactly, and how soon.

    python scripts/gpu/fast_sound.py | tee scripts/gpu/fast_sound.txt
    python scripts/gpu/fast_sound.py --only whole first      # some of the parts, which --help names
    python scripts/gpu/fast_sound.py --tiny                  # on a CPU with small weights: whether the script runs

Weights are random at full size, made on the GPU: the arithmetic, memory and time of the real model, noise for speech.
What fails is told and left out. The floor beside a time is what the card's data sheet allows for the flow's products.
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

from chatterbox_server.engines.fast.s3gen.encoder import Encoder
from chatterbox_server.engines.fast.s3gen.recorded import Recordings
from chatterbox_server.engines.fast.s3gen.sound import FADE, HELD, How, Sound, Stream, Take, how_for
from chatterbox_server.engines.fast.s3gen.watermark import Sounds, Watermark
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

        with silenced():
            self.package = perth.PerthImplicitWatermarker()

    def sound(self, how: How) -> Sound:
        return Sound(self.s3gen, device=self.device, flow_steps=self.steps, how=how)

    def marking(self, how: How) -> Sound:
        return Sound(self.s3gen, device=self.device, flow_steps=self.steps, how=how, watermarker=self.package)

    def tokens(self, count: int) -> int:
        return max(4, count // self.scale)

    def synchronize(self) -> None:
        if not self.tiny:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any], times: int = 3) -> float:
        """The median of some, after one that is called and one that is recorded; by the clock on the wall."""
        work()
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
    for _ in range(2):
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
    plain, fast = How(), fastest(bench)
    right = bench.sound(plain)
    mels, sounds = right.mels(takes), right.speak(takes)
    flow = replace(fast, encoder=torch.float32, vocoder=torch.float32)
    variants = {
        "encoder bf16": replace(plain, encoder=HALF),
        "estimator bf16, torch": replace(plain, estimator=HALF),
        "estimator bf16, triton": flow,
        "estimator fp16, triton": replace(flow, estimator=torch.float16),
        "vocoder bf16": replace(fast, encoder=torch.float32, estimator=torch.float32, vocoder=HALF),
        "vocoder fp16": replace(fast, encoder=torch.float32, estimator=torch.float32),
        "how_for: encoder, estimator bf16, vocoder fp16": fast,
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

        print(f"  {name:<47} {attempt(name, partial(measure, how))}", flush=True)


# -- how soon --------------------------------------------------------------------------------------------------


def flow_flops(rows: int, frames: int, steps: int) -> float:
    """Of the estimator: 56 transformer blocks, 14 resnets, 256 channels, 512 in attention."""
    block = 2 * frames * (256 * 1536 + 512 * 256 + 2 * 256 * 1024) + 4 * frames * frames * 512
    resnet = 2 * frames * (6 * 256 * 256 + 256 * 256)
    return rows * steps * (56.0 * block + 14.0 * resnet)


def requests(bench: Bench, batch: int) -> list[Take]:
    return takes_of([bench.tokens(SPOKEN)] * batch, bench.device, prompt=bench.tokens(PROMPT))


def fastest(bench: Bench) -> How:
    return how_for(bench.device) if not bench.tiny else How(encoder=HALF, estimator=HALF, vocoder=HALF)


def row(took_s: float, batch: int, name: str) -> str:
    return f"  {batch:3} {1e3 * took_s:8.2f} {1e3 * took_s / batch:8.2f}   {name}"


def whole(bench: Bench) -> None:
    spoken, prompt = bench.tokens(SPOKEN), bench.tokens(PROMPT)
    print(
        f"\n== whole: {spoken} tokens after {prompt} of a voice, to marked sound: batch, ms, ms a request", flush=True
    )
    fast, most = fastest(bench), 2 if bench.tiny else 16
    ways = {
        "how_for": fast,
        "how_for, but for torch's kernels": replace(fast, kernels="torch"),
    }
    runs = [(most, name) for name in ways] + [(batch, "how_for") for batch in ((1,) if bench.tiny else (1, 2, 4, 8))]
    for batch, name in runs:
        attempt(name, partial(timed, bench, batch, name, ways[name]))
    attempt("parts", partial(parts, bench, most, fast))


def timed(bench: Bench, batch: int, name: str, how: How) -> None:
    begin = time.perf_counter()
    sound, takes = bench.marking(how), requests(bench, batch)
    for _ in range(2):
        sound.speak(takes)
    bench.synchronize()
    ready_s = time.perf_counter() - begin
    took = bench.seconds(partial(sound.speak, takes))
    begin = time.perf_counter()
    sound.speak(takes)
    free_ms = 1e3 * (time.perf_counter() - begin)
    bench.synchronize()
    # Without a wait between them, as a server that has enough to do speaks them.
    in_a_row_ms = 1e3 * bench.seconds(lambda: [sound.speak(takes) for _ in range(4)]) / 4 / batch
    memory = "-" if bench.tiny else f"{torch.cuda.memory_reserved() / 2**30:.1f}"
    told = f"{name}; in a row {in_a_row_ms:.2f}; ready after {ready_s:.1f} s, CPU free after {free_ms:.1f} ms"
    print(row(took, batch, f"{told}, {memory} GiB reserved"), flush=True)


def parts(bench: Bench, batch: int, how: How) -> None:
    """Of the whole: its recordings, one by one."""
    sound, takes = bench.marking(how), requests(bench, batch)
    took = bench.seconds(sound.ready_flow(takes).play)
    rows = batch * (1 if bench.s3gen.meanflow else 2)
    flops = flow_flops(rows, 2 * (bench.tokens(PROMPT) + bench.tokens(SPOKEN)), bench.steps)
    rate = f"{flops / took / 1e12:.0f} TFLOP/s, floor {1e3 * flops / PEAK_FLOPS / batch:.2f} ms a request"
    print(row(took, batch, f"of that encoder and flow: {rate}"), flush=True)
    print(row(bench.seconds(sound.ready_vocoder(takes).play), batch, "of that vocoder"), flush=True)
    tokens = bench.tokens(PROMPT) + bench.tokens(SPOKEN)
    kernels = "torch" if bench.tiny else how.kernels
    encoder = Encoder(bench.s3gen.flow.encoder, dtype=how.encoder, device=bench.device, kernels=kernels)
    x = torch.randn(batch, tokens, bench.s3gen.flow.input_embedding.weight.shape[1], device=bench.device)
    lengths = torch.full((batch,), tokens, device=bench.device)
    recordings = Recordings(device=bench.device, kept=2)
    mark = Watermark(bench.package, sample_rate_hz=24_000, device=bench.device)
    sounds = Sounds(torch.randn(batch, 960 * bench.tokens(SPOKEN), device=bench.device), lengths * 0 + 960)
    with torch.inference_mode():
        encoding = recordings.find("encoder", lambda given: encoder(*given), lambda: (x, lengths))
        print(row(bench.seconds(encoding.play), batch, "of that encoder"), flush=True)
        marking = recordings.find("mark", mark, lambda: sounds)
        print(row(bench.seconds(marking.play), batch, "of that watermark"), flush=True)


def kernels(bench: Bench) -> None:
    """Where the time of the flow goes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    batch, times = 2 if bench.tiny else 16, 3
    print(f"\n== kernels: of encoder and flow, a batch of {batch}: ms a request, launches, kernel", flush=True)
    sound, takes = bench.sound(fastest(bench)), requests(bench, batch)
    recording = sound.ready_flow(takes)
    bench.seconds(recording.play)
    with profiled(activities=[ProfilerActivity.CPU if bench.tiny else ProfilerActivity.CUDA]) as seen:
        for _ in range(times):
            recording.play()
        bench.synchronize()
    for one in sorted(seen.key_averages(), key=lambda row: -row.device_time_total)[:20]:
        print(f"  {one.device_time_total / 1e3 / times / batch:8.3f} {one.count / times:7.0f}   {one.key[:110]}")


def first(bench: Bench) -> None:
    print("\n== first: a first chunk of one utterance, from its tokens to its marked samples on the CPU")
    fast = fastest(bench)

    def measure(count: int, how: How) -> str:
        sound = bench.marking(how)
        take = takes_of([count], bench.device, prompt=bench.tokens(PROMPT))[0]

        def chunk() -> Any:
            return sound.speak([replace(take, final=False, stream=Stream())])[0].cpu()

        took = bench.seconds(chunk, 9)
        return f"{1e3 * took:7.2f} ms for {len(chunk()) / 24:.0f} ms of sound"

    for count in (15, 25):
        print(f"  {count} tokens: {attempt('first', partial(measure, count, fast))}", flush=True)


def mark(bench: Bench) -> None:
    print("\n== mark: against the package's own watermark, on the CPU")
    takes = requests(bench, 2 if bench.tiny else 4)
    plain, marked = bench.sound(How()).speak(takes), bench.marking(How()).speak(takes)
    begin = time.perf_counter()
    right = [bench.package.apply_watermark(samples.cpu().numpy(), sample_rate=24_000) for samples in plain]
    print(f"  the package: {1e3 * (time.perf_counter() - begin) / len(right):.1f} ms each")
    for one, other in zip(marked, right, strict=True):
        error = 10 ** (decibels(one.cpu(), torch.from_numpy(other)) / 20)
        read = [bench.package.get_watermark(samples, sample_rate=24_000) for samples in (one.cpu().numpy(), other)]
        print(f"  relative error {error:.1e}, read as {read[0]:.1f}, the package's own as {read[1]:.1f}", flush=True)


def chunks(bench: Bench) -> None:
    print(f"\n== chunks: against the same utterance in one go, dB; {HELD} frames held, {FADE} of them faded")
    sound = bench.sound(How())
    marking, package = bench.marking(How()), bench.package
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


def turbo(bench: Bench) -> None:
    print("\n-- turbo: two steps, no guidance")
    small = Bench(tiny=bench.tiny, meanflow=True)
    for part in (same, whole, first):
        part(small)


PARTS = {part.__name__: part for part in (same, whole, kernels, first, exact, mark, chunks, turbo)}


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
