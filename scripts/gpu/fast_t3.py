"""The fast engine's T3 on this GPU: whether it chooses what the package chooses, what bf16 changes, and how fast it is.

    python scripts/gpu/fast_t3.py | tee scripts/gpu/fast_t3.txt
    python scripts/gpu/fast_t3.py turbo --only equality,precision,speed | tee scripts/gpu/fast_t3_turbo.txt
    python scripts/gpu/fast_t3.py multilingual --only equality,precision,agreement,speed \
        | tee scripts/gpu/fast_t3_multilingual.txt
    python scripts/gpu/fast_t3.py --only agreement,speed

Weights are random at full size: the arithmetic, memory and time of the real model. Every utterance is as long as it is
told to be; multilingual's end also where its alignment says so, by weights that make it say so. Beside each step's time
stands its floor: the bytes of weights, keys and values that it has to read, over the bandwidth of a large copy,
measured here. Fails if in float32 a token differs from the package's own loop, or if in bfloat16 a step in one launch
is not the same twice, or much further from float32 than one by many.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import re
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
os.environ["TQDM_DISABLE"] = os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from chatterbox.models import t3 as package
from chatterbox.models.t3.inference import alignment_stream_analyzer
from scripts import tiny_model

from chatterbox_server.engine import Sampling
from chatterbox_server.engines.fast import noise
from chatterbox_server.engines.fast.t3 import backbone as backbones
from chatterbox_server.engines.fast.t3 import slots
from chatterbox_server.engines.fast.t3.graphs import T3
from chatterbox_server.engines.fast.t3.slots import Prompt, Slots
from chatterbox_server.engines.stock.kinds import KINDS

if TYPE_CHECKING:
    from collections.abc import Callable

TEXT_TOKENS = 141
SHORT_TEXT_TOKENS = 12
"""So few are said within the tokens that are compared."""
SIZES = (1, 2, 4, 8, 16, 32, 64)
AT_ONCE = SIZES[:3]
"""For so many utterances all layers go in one launch."""
POSITIONS = (0, 5, 63, 64, 65, 255, 256, 304, 999)
WORSE = 1.5
"""Times as far from float32 that one launch may be."""
ROUNDING = 4e-2
"""Between two ways in bfloat16."""
STATE = ("last", "count", "position", "done", "seen")
WATCHING = ("reached", "complete", "lingered", "again", "before", "verdicts")
GUIDED = (
    Sampling(),
    Sampling(temperature=1.0, cfg_weight=0.0, min_p=0.0, repetition_penalty=1.0),
    Sampling(temperature=1.3, cfg_weight=1.0, min_p=0.2, repetition_penalty=2.0),
    Sampling(temperature=0.6, top_p=0.8),
)
# Cold and without a penalty it says the same token twice.
WATCHED = (*GUIDED, Sampling(temperature=0.01, repetition_penalty=1.0))
TURBO = (
    Sampling(top_p=0.95, top_k=1000),
    Sampling(top_p=1.0, top_k=0, temperature=1.2),
    Sampling(top_p=0.7, top_k=50, repetition_penalty=2.0),
    Sampling(top_p=1.0, top_k=5),
)


class Counted(torch.overrides.TorchFunctionMode):  # type: ignore[misc,unused-ignore]
    """Within it ``torch.multinomial`` chooses by ``noise`` for ``seed``, a step later each time."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed, self._step = seed, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.multinomial:
            return func(*args, **(kwargs or {}))
        likely = args[0]
        at = torch.tensor([self._step], device=likely.device)
        clocks = noise.exponential(torch.full_like(at, self._seed), noise.TOKENS, at, likely.shape[-1])
        self._step += 1
        return (likely / clocks).argmax(dim=-1, keepdim=True)


class Lab:
    def __init__(self, kind: str) -> None:
        self.kind = kind
        torch.manual_seed(0)
        begin_s = time.perf_counter()
        with torch.device("cuda"):
            self.t3 = package.T3(tiny_model.t3_config(kind)).eval()
        if kind == "turbo":
            del self.t3.tfmr.wte
        self.samplings = {"turbo": TURBO, "multilingual": WATCHED}.get(kind, GUIDED)
        self.text_tokens = TEXT_TOKENS
        voice = tiny_model.random_voice(prompt_tokens=self.t3.hp.speech_cond_prompt_len, reference_tokens=125)
        self.voice = voice.t3.to(device="cuda")
        print(f"{kind}, full-size random weights, there after {time.perf_counter() - begin_s:.0f} s")
        source, target = (torch.empty(2**30, dtype=torch.uint8, device="cuda") for _ in range(2))
        source.random_()
        self.bytes_per_s = 2 * 2**30 / (timed(lambda: target.copy_(source), 20) / 1000)
        print(f"a copy of 1 GiB moves {self.bytes_per_s / 1e12:.2f} TB/s, read and written\n", flush=True)

    def watchful(self) -> Lab:
        """Of multilingual: weights and texts by which its alignment analyser has something to decide."""
        other = copy.copy(self)
        other.t3, other.text_tokens = copy.deepcopy(self.t3), SHORT_TEXT_TOKENS
        tiny_model.teach_to_stop(other.t3, 1.7)
        tiny_model.make_watchful(other.t3, sharp=3.0)
        return other

    def text(self, seed: int) -> torch.Tensor:
        dice = torch.Generator().manual_seed(seed)
        row = torch.randint(1, 250, (1, self.text_tokens), generator=dice).cuda()
        if self.kind == "turbo":
            return row
        row = torch.nn.functional.pad(row, (1, 0), value=self.t3.hp.start_text_token)
        row = torch.nn.functional.pad(row, (0, 1), value=self.t3.hp.stop_text_token)
        return torch.cat([row, row])

    def prompt(self, seed: int) -> Prompt:
        return slots.prompt(self.t3, self.text(seed), slots.embedded(self.t3, copy.copy(self.voice)))

    def by_the_package(self, seed: int, sampling: Sampling, most: int) -> list[int]:
        told = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        told |= {"repetition_penalty": sampling.repetition_penalty}
        with Counted(seed), torch.inference_mode():
            if self.kind == "turbo":
                chosen = self.t3.inference_turbo(
                    copy.copy(self.voice), self.text(seed), top_k=sampling.top_k, max_gen_len=most - 1, **told
                )
            else:
                chosen = self.t3.inference(
                    t3_cond=copy.copy(self.voice), text_tokens=self.text(seed), max_new_tokens=most,
                    min_p=sampling.min_p, cfg_weight=max(sampling.cfg_weight, 1e-6), **told,
                )  # fmt: skip
        if self.kind == "multilingual":
            # Its alignment analyser leaves three behind at each call.
            for layer in self.t3.tfmr.layers:
                layer.self_attn._forward_hooks.clear()  # noqa: SLF001 (there is no public way)
        return [int(token) for token in chosen.flatten()]


class Rules(logging.Handler):
    """How often multilingual's alignment analyser forced the end, by the rule that it names."""

    def __init__(self) -> None:
        super().__init__()
        self.used = dict.fromkeys(("long_tail", "alignment_repetition", "token_repetition"), 0)
        logger = logging.getLogger(alignment_stream_analyzer.__name__)
        logger.addHandler(self)
        logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        for rule in self.used:
            self.used[rule] += bool(re.search(rf"{rule}=(True|tensor\(True)", record.getMessage()))


def timed(work: Callable[[], Any], repeats: int) -> float:
    """Milliseconds, the median of ``repeats``, by the GPU's own clock."""
    for _ in range(3):
        work()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(float(begin.elapsed_time(end)) for begin, end in events)


def say(t3: T3, asked: list[tuple[Prompt, int, Sampling]], most: int, *, sort: bool) -> list[list[int]]:
    """All of them together."""
    said = [list[int]() for _ in asked]
    t3.slots.begin([(n, prompt, seed, sampling, most) for n, (prompt, seed, sampling) in enumerate(asked)])
    for number, (prompt, _, _) in enumerate(asked):
        for begin in range(0, prompt.length, slots.CHUNK):
            for slot, token, _ in t3.read([slots.Bite(number, prompt, begin)], sort=sort).wait():
                said[slot].append(token)
    for _ in range(most - 1):
        for slot, token, _ in t3.step(range(len(asked)), sort=sort).wait():
            said[slot].append(token)
    return said


# -- the questions ----------------------------------------------------------------------------------------


def equality(lab: Lab) -> bool:
    """In float32, without TF32."""
    most, same = 48, True
    rules = Rules()
    if lab.kind == "multilingual":
        lab = lab.watchful()
    plain = Slots(lab.t3, slots=16, dtype=torch.float32, most_tokens=64, longest=640)
    asked = [(lab.prompt(n), n, lab.samplings[n % len(lab.samplings)]) for n in range(16)]
    expected = [lab.by_the_package(n, lab.samplings[n], most) for n in range(len(lab.samplings))]
    if lab.kind == "multilingual":
        print(f"  ends that its alignment forced: {rules.used}; lengths {[len(said) for said in expected]}", flush=True)
    ways = {
        "torch, a batch of 16": (T3(plain, capture=False), True),
        "torch, as a CUDA graph": (T3(plain), True),
        "kernels, as a CUDA graph": (T3(plain, by_kernels=True), False),
        "kernels, launched early": (T3(plain, by_kernels=True, early=True), False),
    }
    for name, (t3, sort) in ways.items():
        try:
            takes = [n for n in range(16) if sort or not sorts(lab, asked[n][2])]
            together = say(t3, [asked[n] for n in takes], most, sort=sort)
            alone = say(t3, [asked[takes[1]]], most, sort=sort)[0]
            right = sum(cut(together[takes.index(n)], said) == said for n, said in enumerate(expected) if n in takes)
            whole = sum(n in takes for n in range(len(expected)))
            print(f"  {name:<28} {right} of {whole} as the package says; one alone as in the batch: "
                  f"{alone == together[1]}", flush=True)  # fmt: skip
            same &= right == whole and alone == together[1]
        except Exception:  # noqa: BLE001 (one way that fails must not cost the others)
            traceback.print_exc()
            same = False
    return same


def cut(tokens: list[int], other: list[int]) -> list[int]:
    """A slot goes on saying its last token once it is done."""
    return tokens[: len(other)]


def sorts(lab: Lab, sampling: Sampling) -> bool:
    from chatterbox_server.engines.fast.t3 import sampling as rules

    return rules.sorts(sampling, by_count=lab.kind == "turbo")


def precision(lab: Lab) -> None:
    """Logits of 200 random tokens behind a prompt, all at once, float32 and bfloat16."""
    prompt = lab.prompt(1)
    rows, length, _ = prompt.embeds.shape
    dice = torch.Generator().manual_seed(5)
    spoken = lab.t3.speech_emb(torch.randint(0, 6561, (1, 200), generator=dice).cuda()).float()
    if rows == 2:
        spoken = spoken + lab.t3.speech_pos_emb.emb.weight[1:201]
    x = torch.cat((prompt.embeds, spoken.expand(rows, -1, -1)), dim=1)
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        backbone = backbones.of(lab.t3, dtype=dtype, positions=x.shape[1])
        cache = backbone.cache(rows, x.shape[1])
        at = torch.arange(rows, device="cuda")
        logits[dtype] = backbone.logits(backbone.forward(x, cache, at, torch.zeros_like(at))[:, length:])
    right, rounded = logits[torch.float32], logits[torch.bfloat16]
    error = float((rounded - right).norm() / right.norm())
    agree = float((right.argmax(-1) == rounded.argmax(-1)).float().mean())
    print(f"  bf16 logits are {error:.2e} off (relative), the most likely token is the same in {agree:.1%}", flush=True)


def agreement(lab: Lab) -> bool:
    """One step in one launch and one by many, from the same state, in bfloat16: how far each is from float32."""
    from chatterbox_server.engines.fast.t3 import whole
    from chatterbox_server.engines.fast.t3.stepper import Stepper

    held = Slots(lab.t3, slots=max(AT_ONCE), dtype=torch.bfloat16, most_tokens=400, longest=640)
    held.stop = -1
    exact = backbones.of(lab.t3, dtype=torch.float32, positions=held.cache.positions)
    states = [getattr(held, name) for name in STATE]
    states += [getattr(held.alignment, name) for name in WATCHING] if held.alignment is not None else []
    caches, t3, right = (held.cache.keys, held.cache.values), T3(held, by_kernels=True, at_once=True), True
    for size in AT_ONCE:
        numbers = torch.arange(size, device="cuda")
        rows = (numbers[:, None] * held.rows + torch.arange(held.rows, device="cuda")).flatten()
        many, one = Stepper(held, size), Stepper(held, size, at_once=True, bounded=True)
        if not isinstance(one.whole, whole.Whole):
            print(f"  {size} together: {one.whole}", flush=True)
            right &= lab.kind == "turbo" or torch.cuda.get_device_capability() < (9, 0)
            continue
        held.begin([(n, lab.prompt(1), n, lab.samplings[0], 10**6) for n in range(size)])
        again = chosen = 0
        errors: dict[str, list[float]] = {name: [] for name in ("many", "many, cache", "one", "one, cache", "scores")}
        for position in POSITIONS:
            torch.manual_seed(position)
            for part in caches:
                part.normal_()
            # Each is somewhere else.
            held.position[:size] = position + 7 * numbers
            held.count[:size] = 3
            held.last[:size] = torch.randint(0, 6561, (size,), device="cuda")
            before = [state.clone() for state in states]
            at = held.position[:size].repeat_interleave(held.rows)
            widened = backbones.Cache(*(part.float() for part in caches))

            def step(
                stepper: Stepper, at: torch.Tensor = at, before: list[torch.Tensor] = before
            ) -> list[torch.Tensor]:
                """Tokens, logits, new keys and values, scores."""
                put(states, before)
                for part in caches:
                    part[:, rows, :, at] = float("nan")  # noqa: B023 (called within the turn of the loop)
                tokens = stepper.step(numbers, sort=False)[0]  # noqa: B023
                new = torch.stack([part[:, rows, :, at].float() for part in caches])  # noqa: B023
                return [one.clone() for one in (tokens, stepper.logits.flatten(0, 1), new, stepper.scores)]

            by_many, by_one, once_more = step(many), step(one), step(one)
            if one.whole.stuck:
                print(f"  {size} together at {position}: {one.whole.stuck}", flush=True)
                return False
            again += all(map(torch.equal, by_one[:3], once_more[:3]))
            right_logits = exact.logits(exact.forward(one.x.clone()[:, None], widened, rows, at))[:, 0]
            new = torch.stack([part[:, rows, :, at] for part in (widened.keys, widened.values)])
            for name, said in (("many", by_many), ("one", by_one)):
                errors[name].append(relative(said[1], right_logits))
                errors[f"{name}, cache"].append(relative(said[2], new))
            if held.alignment is not None:
                seen = torch.arange(held.cache.positions, device="cuda") <= at[:: held.rows, None, None]
                errors["scores"].append(relative(by_one[3].where(seen, 0), by_many[3].where(seen, 0)))
            # Now as a CUDA graph, which has to choose the very same.
            put(states, before)
            chosen += [token for _, token, _ in t3.step(range(size), sort=False).wait()] == by_one[0].tolist()
        worst = {name: max(some) for name, some in errors.items() if some}
        print(f"  {size} together: off float32, scores off the others': "
              + ", ".join(f"{name} {off:.2e}" for name, off in worst.items()) + "; "
              f"the same again in {again} of {len(POSITIONS)} steps, as a graph in {chosen}", flush=True)  # fmt: skip
        right &= again == chosen == len(POSITIONS) and worst.get("scores", 0.0) < ROUNDING
        right &= all(worst[f"one{which}"] < WORSE * worst[f"many{which}"] for which in ("", ", cache"))
    return right


def put(states: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    for state, value in zip(states, values, strict=True):
        state.copy_(value)


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    """Infinite where there is anything that is no number."""
    off = float((one - other).norm() / other.norm())
    return off if off == off else float("inf")  # noqa: PLR0124 (a NaN)


def speed(lab: Lab) -> None:
    from chatterbox_server.engines.fast.t3.stepper import Stepper

    held = Slots(lab.t3, slots=64, dtype=torch.bfloat16, most_tokens=400, longest=640)
    weights = sum(one.numel() for layer in held.backbone.layers for one in (layer.qkv, layer.out, layer.up, layer.down))
    weights = (weights + held.backbone.head.numel()) * 2
    prompt = lab.prompt(1)
    positions = prompt.length + 125
    per_position = 2 * 2 * held.backbone.dim * len(held.backbone.layers) * held.rows
    held.stop = -1
    at = torch.full_like(held.position, positions)
    print(f"bfloat16, at {positions} positions:")
    print(f"{'steps by':<10} {'together':>8} {'ms a step':>10} {'floor ms':>9} {'tokens/s':>9}")
    ways: tuple[tuple[str, dict[str, bool], tuple[int, ...]], ...] = (
        ("kernels", {}, SIZES),
        ("early", {"early": True}, SIZES[:1]),
        ("one launch", {"at_once": True}, AT_ONCE),
    )
    for name, how, sizes in ways:
        if "at_once" in how and isinstance(refused := Stepper(held, 1, **how).whole, str):
            print(f"{name:<10} {refused}", flush=True)
            continue
        t3 = T3(held, by_kernels=True, **how)
        for size in sizes:
            held.begin([(n, prompt, n, lab.samplings[0], 10**6) for n in range(size)])

            def one_step(t3: T3 = t3, numbers: range = range(size)) -> None:
                t3.step(numbers, sort=False)
                held.position.copy_(at)
                held.count.fill_(100)

            held.position.copy_(at)
            step_ms = timed(one_step, 60)
            floor_ms = (weights + size * per_position * positions) / lab.bytes_per_s * 1000
            print(f"{name:<10} {size:>8} {step_ms:>10.3f} {floor_ms:>9.3f} {size / step_ms * 1000:>9.0f}", flush=True)
    t3 = T3(held, by_kernels=True)
    for count in (1, 4, 8):
        bites = [slots.Bite(n, prompt, 0) for n in range(count)]
        took_ms = timed(lambda bites=bites: t3.read(bites, sort=False), 30)  # type: ignore[misc]
        print(f"a bite of {slots.CHUNK} positions of {count} prompts: {took_ms:.2f} ms")
    sort_ms = timed(lambda: t3.step([0], sort=True), 30) - timed(lambda: t3.step([0], sort=False), 30)
    print(f"sorting for one: {sort_ms:.3f} ms", flush=True)


def profile(lab: Lab) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    held = Slots(lab.t3, slots=64, dtype=torch.bfloat16, most_tokens=400, longest=640)
    prompt = lab.prompt(1)
    ways: tuple[tuple[int, dict[str, bool]], ...] = ((1, {}), (1, {"early": True}), (1, {"at_once": True}), (64, {}))
    for size, how in ways:
        try:
            t3 = T3(held, by_kernels=True, **how)
            held.begin([(n, prompt, n, lab.samplings[0], 10**6) for n in range(size)])
            for _ in range(4):
                t3.step(list(range(size)), sort=False)
            torch.cuda.synchronize()
            with profiled(activities=[ProfilerActivity.CUDA]) as seen:
                for _ in range(5):
                    t3.step(list(range(size)), sort=False)
                torch.cuda.synchronize()
            rows = sorted(seen.key_averages(), key=lambda row: -row.device_time_total)[:12]
            print(
                f"\n{size} together{''.join(f', {name}' for name in how)}: microseconds a step, launches a step, kernel"
            )
            for row in rows:
                print(f"  {row.device_time_total / 5:8.1f} {row.count / 5:6.1f}  {row.key[:90]}")
        except Exception:  # noqa: BLE001
            traceback.print_exc()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="?", default="chatterbox", choices=KINDS)
    parser.add_argument("--only", default="equality,precision,agreement,speed,profile")
    asked = parser.parse_args()
    print(subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout.strip())
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, torch {torch.__version__}")
    same, agrees, only = True, True, asked.only.split(",")
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
        lab = Lab(asked.kind)
        if "equality" in only:
            print("float32, the same noise:")
            same = equality(lab)
        if "precision" in only:
            precision(lab)
        torch.cuda.empty_cache()
        if "agreement" in only:
            print("bfloat16, a step in one launch beside one by many:")
            agrees = agreement(lab)
        if "speed" in only:
            speed(lab)
        if "profile" in only:
            profile(lab)
    if not same:
        sys.exit("cannot confirm that T3 chooses what the package chooses: see above")
    if not agrees:
        sys.exit("cannot confirm that a step in one launch is what it is by many: see above")


if __name__ == "__main__":
    main()
