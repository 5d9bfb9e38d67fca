"""The stock engine's stages on this GPU: one after another, in a pipeline, and over two GPUs where there are two.

    python scripts/gpu/stages.py | tee scripts/gpu/stages.txt
    python scripts/gpu/stages.py turbo        # another model
    python scripts/gpu/stages.py --tiny       # on a CPU with small weights: whether the script runs, no number counts

Weights are random at full size (scripts/tiny_model.py): the arithmetic, memory and time of the real model, noise for
speech that lasts as its text does. Requests go through the server's own queue, without HTTP. All modes share weights.
Fails if, with deterministic kernels and without TF32, a pipeline or two GPUs change a bit of what is said.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import functools
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
# Read when they are imported.
os.environ["TQDM_DISABLE"] = os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "2"

import numpy as np
import torch

from chatterbox_server import speaker
from chatterbox_server.engine import Errand, Sampling, Utterance
from chatterbox_server.engines import stock
from chatterbox_server.engines.stock import KINDS, Placement, StockEngine
from chatterbox_server.engines.stock.lanes import Apart
from chatterbox_server.engines.stock.silence import silenced
from chatterbox_server.order import order
from chatterbox_server.queue import EngineQueue
from chatterbox_server.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from numpy.typing import NDArray

SHORT = "The quick brown fox jumps over the lazy dog."
"""44 characters: about 3 s of sound."""

PIECE = "Then it sits down in the shade of an old tree to listen to the river."
"""69 characters: about 5 s."""

CLAIM = (0.20, 0.30)
"""What a pipeline is said to take off the latency."""


@dataclass(frozen=True)
class Work:
    """``clients`` that ask again as soon as they have heard, each ``rounds`` times, for ``pieces``."""

    name: str
    clients: int
    rounds: int
    pieces: tuple[str, ...]


WORKS = (
    Work("short, one client", 1, 5, (SHORT,)),
    Work("text of 6 pieces, one client", 1, 1, (PIECE,) * 6),
    Work("short, 2 clients", 2, 3, (SHORT,)),
    Work("short, 4 clients", 4, 2, (SHORT,)),
    Work("short, 8 clients", 8, 2, (SHORT,)),
)


@dataclass(frozen=True)
class Measured:
    audio_per_s: float
    whole_s: list[float]
    first_s: list[float]
    reserved_bytes: int
    cores: float

    def row(self) -> str:
        several = len(self.whole_s) > 1
        p95 = f"{statistics.quantiles(self.whole_s, n=20, method='inclusive')[-1]:.2f}" if several else "-"
        return (
            f"{self.audio_per_s:9.2f} {statistics.median(self.whole_s):7.2f} {p95:>7} "
            f"{statistics.median(self.first_s):7.2f} {self.reserved_bytes / 2**30:8.2f} {self.cores:6.2f}"
        )


HEADING = f"{'':<30} {'mode':<22} {'audio-s/s':>9} {'p50 s':>7} {'p95 s':>7} {'first s':>7} {'GPU GiB':>8} {'cores':>6}"
NOTES = """
audio-s/s: seconds of sound per second. p50, p95: from the request to its last sound; first: to its first, at p50.
GPU: the most that torch had reserved on all cards, of which the weights are shared by all modes. Cores: CPU time of the
whole process per second.
"""


def an_utterance(text: str, seed: int, sampling: Sampling) -> Utterance:
    return Utterance(text=text, voice=None, language="en", speed=1.0, sampling=sampling, seed=seed)


@contextlib.asynccontextmanager
async def a_queue(engine: StockEngine) -> AsyncIterator[EngineQueue]:
    queue = EngineQueue(
        lambda: engine,
        functools.partial(speaker.speak, check_duration=False),
        order=order("size", max_wait_s=600),
        size=100,
        max_wait_s=600,
        longest_utterance_s=600,
    )
    await queue.start()
    try:
        yield queue
    finally:
        await queue.close(patience_s=10)


async def said(queue: EngineQueue, utterances: Sequence[Utterance]) -> list[NDArray[np.float32]]:
    """All at once, each a request of its own."""

    async def one(utterance: Utterance) -> NDArray[np.float32]:
        async with queue.admit([utterance]) as place:
            return np.concatenate([spoken.samples async for spoken in place])

    return list(await asyncio.gather(*map(one, utterances)))


async def measure(queue: EngineQueue, work: Work) -> Measured:
    whole_s: list[float] = []
    first_s: list[float] = []
    samples = 0

    async def client(number: int) -> None:
        nonlocal samples
        for turn in range(work.rounds):
            utterances = [
                an_utterance(text, 1000 * number + 10 * turn + place, queue.engine.defaults)
                for place, text in enumerate(work.pieces)
            ]
            asked_s = time.perf_counter()
            heard_s: list[float] = []
            async with queue.admit(utterances, client=str(number)) as place:
                async for spoken in place:
                    heard_s.append(time.perf_counter() - asked_s)
                    samples += spoken.samples.size
            first_s.append(heard_s[0])
            whole_s.append(heard_s[-1])

    for card in cards():
        torch.cuda.reset_peak_memory_stats(card)
    begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
    await asyncio.gather(*map(client, range(work.clients)))
    elapsed_s, cpu_s = time.perf_counter() - begin_s, time.process_time() - begin_cpu_s
    reserved = sum(torch.cuda.max_memory_reserved(card) for card in cards())
    audio_s = samples / queue.engine.sample_rate_hz
    return Measured(audio_s / elapsed_s, whole_s, first_s, reserved, cpu_s / elapsed_s)


def cards() -> range:
    return range(torch.cuda.device_count())


# -- the questions ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def strict() -> Any:
    """What may change a bit from one run to the next is off."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32
    cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = False, True, False, False
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = before


def compared(name: str, sounds: Sequence[NDArray[np.float32]], expected: Sequence[NDArray[np.float32]]) -> bool:
    equal = sum(np.array_equal(one, other) for one, other in zip(sounds, expected, strict=True))
    off = [
        float(np.abs(one - other).max()) if one.shape == other.shape else math.inf
        for one, other in zip(sounds, expected, strict=True)
    ]
    print(f"  {name:<46} {equal} of {len(sounds)} bit-equal, at most {max(off):.1e} off", flush=True)
    return equal == len(sounds)


def by_the_package(model: Any, kind: str, utterance: Utterance, conditionals: Any) -> NDArray[np.float32]:
    model.conds = copy.deepcopy(conditionals)
    torch.manual_seed(utterance.seed)
    told = {"language_id": utterance.language} if kind == "multilingual" else {}
    with torch.inference_mode(), silenced():
        sound: NDArray[np.float32] = model.generate(utterance.text, **told).squeeze(0).numpy()
    return sound


def stage_times(stages: Any, device: str, kind: str, conditionals: Any) -> None:
    """Of one utterance of 5 s, alone; and T3's with S3Gen at work beside it, for both launch from one process."""
    lanes = [Apart(name, torch.cuda.Stream(device) if device != "cpu" else None) for name in ("t3", "s3gen")]
    utterance = an_utterance(PIECE, 1, KINDS[kind].defaults)

    def timed(work: Callable[[], Any]) -> float:
        times_s = []
        for _ in range(3):
            begin_s = time.perf_counter()
            work()
            times_s.append(time.perf_counter() - begin_s)
        return statistics.median(times_s)

    def to_tokens() -> Any:
        return lanes[0].do(lambda: stages.tokens(utterance, Errand()))

    def to_sound() -> Any:
        return lanes[1].do(lambda: stages.sound(tokens))

    with silenced():
        tokens = to_tokens()
        sound = to_sound()
        stages.marked(sound)
        alone_s = {
            "T3": timed(to_tokens),
            "S3Gen": timed(to_sound),
            "watermark": timed(lambda: stages.marked(sound)),
        }
        rest = threading.Event()

        def keep_on() -> None:
            while not rest.is_set():
                to_sound()

        beside = threading.Thread(target=keep_on)
        beside.start()
        both_s = timed(to_tokens)
        rest.set()
        beside.join()
    package_s = timed(lambda: by_the_package(stages.model, kind, utterance, conditionals))
    whole_s, longest_s = sum(alone_s.values()), max(alone_s.values())
    print(f"stages of {len(PIECE)} characters, {tokens.speech.numel()} tokens, {sound.size / 24_000:.1f} s of sound:")
    print("  " + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in alone_s.items()), end="")
    print(f"; together {whole_s:.2f} s, the package's own generate {package_s:.2f} s")
    print(f"  T3 while S3Gen never rests: {both_s:.2f} s, {both_s / alone_s['T3']:.2f} times as long")
    print(f"  no pipeline of them can win more than {whole_s / longest_s:.2f} times the throughput\n", flush=True)


async def main_of(kind: str, model: Any, *, first: str, second: str | None) -> bool:
    conditionals = model.conds
    together = Placement(first, first)
    sequential = StockEngine(model, kind, placement=together)
    pipelined = StockEngine(model, kind, placement=together, pipeline=True)
    modes: dict[str, StockEngine] = {"one after another": sequential, "pipeline": pipelined}
    with strict():
        utterances = [an_utterance((SHORT, PIECE)[seed % 2], seed, sequential.defaults) for seed in range(6)]
        print("with deterministic kernels, without TF32:")
        async with a_queue(sequential) as queue:
            expected = [(await said(queue, [one]))[0] for one in utterances]
            again = await said(queue, utterances)
        own = [by_the_package(model, kind, one, conditionals) for one in utterances[:2]]
        async with a_queue(pipelined) as queue:
            overlapped = await said(queue, utterances)
        same = compared("one after another, a second time", again, expected)
        same &= compared("the package's own generate", own, expected[:2])
        same &= compared("pipeline, all requests at once", overlapped, expected)
    print("with the settings of a unit (TF32, cudnn.benchmark):")
    async with a_queue(sequential) as queue:
        usual = await said(queue, utterances[:4])
        compared("one after another, a second time", await said(queue, utterances[:4]), usual)
    async with a_queue(pipelined) as queue:
        compared("pipeline, all requests at once", await said(queue, utterances[:4]), usual)
    print()
    stage_times(pipelined.stages, first, kind, conditionals)
    results = await compare_modes(modes)
    if second is not None:
        # The weights move, so this comes last.
        apart = Placement(first, second)
        split = {
            "two GPUs, one by one": StockEngine(model, kind, placement=apart),
            "two GPUs, pipeline": StockEngine(model, kind, placement=apart, pipeline=True),
        }
        with strict():
            print("\nover two GPUs, with deterministic kernels, without TF32:")
            for name, engine in split.items():
                async with a_queue(engine) as queue:
                    same &= compared(name, await said(queue, utterances), expected)
        for name, measured in (await compare_modes(split)).items():
            results[name] = measured
    print(NOTES)
    verdicts(results)
    return same


async def compare_modes(modes: dict[str, StockEngine]) -> dict[str, dict[str, Measured]]:
    """The same work in each mode before the next work, so that whatever else the machine does is in all of them."""
    results: dict[str, dict[str, Measured]] = {name: {} for name in modes}
    async with AsyncExitStack() as stack:
        queues = {name: await stack.enter_async_context(a_queue(engine)) for name, engine in modes.items()}
        for queue in queues.values():
            # Kernels are chosen, for each thread anew.
            for text in (SHORT, PIECE):
                await said(queue, [an_utterance(text, seed, queue.engine.defaults) for seed in range(2)])
        print(HEADING, flush=True)
        for work in WORKS:
            for name, queue in queues.items():
                for card in cards():
                    with torch.cuda.device(card):
                        torch.cuda.empty_cache()
                results[name][work.name] = await measure(queue, work)
                print(f"{work.name:<30} {name:<22} {results[name][work.name].row()}", flush=True)
    return results


def verdicts(results: dict[str, dict[str, Measured]]) -> None:
    """What each mode takes off the latency of one after another on one GPU."""
    low, high = CLAIM
    print(f"the claim: a pipeline takes {low:.0%} to {high:.0%} off the latency")
    (_, base), *others = results.items()
    for name, measured in others:
        for work in WORKS:
            before, after = base[work.name], measured[work.name]
            whole = 1 - statistics.median(after.whole_s) / statistics.median(before.whole_s)
            first = 1 - statistics.median(after.first_s) / statistics.median(before.first_s)
            word = "confirmed" if whole >= low else "refuted"
            more = after.audio_per_s / before.audio_per_s
            print(
                f"  {name:<22} {work.name:<30} {whole:+6.1%} off the whole, {first:+6.1%} off the first sound, "
                f"{more:.2f}x the throughput: {word}"
            )


# -- the models -------------------------------------------------------------------------------------------


def full_size(kind: str, directory: Path) -> Any:
    begin_s = time.perf_counter()
    subprocess.run(
        [sys.executable, Path(__file__).parents[1] / "tiny_model.py", "full", directory, "--kind", kind,
         "--eos-per-text", "1.7"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    engine = stock.load(Settings(model=kind, weights=directory, pipeline="off", visible_gpus=("0",)))
    print(f"{kind}, full-size random weights, there after {time.perf_counter() - begin_s:.0f} s\n", flush=True)
    return engine.stages.model


def small(kind: str, directory: Path) -> Any:
    from scripts import tiny_model

    torch.set_num_threads(1)
    return tiny_model.tiny(kind, directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=["chatterbox"], metavar="MODEL", help=", ".join(KINDS))
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    first, second = ("cpu", "cpu:0") if asked.tiny else ("cuda:0", "cuda:1" if len(cards()) > 1 else None)
    if not asked.tiny:
        print(subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout.strip())
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, torch {torch.__version__}")
    same = True
    for kind in asked.kinds:
        with tempfile.TemporaryDirectory() as name:
            model = small(kind, Path(name)) if asked.tiny else full_size(kind, Path(name) / kind)
            same &= asyncio.run(main_of(kind, model, first=first, second=second))
    if not same:
        sys.exit("cannot confirm that all modes say the same: see what is not bit-equal above")


if __name__ == "__main__":
    main()
