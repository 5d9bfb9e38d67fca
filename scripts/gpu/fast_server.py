"""The fast engine as a server on this GPU, the stock engine beside it: rate, first byte, memory, growth, by HTTP.

    python scripts/gpu/fast_server.py --keep docs/h200 | tee scripts/gpu/fast_server.txt
    python scripts/gpu/fast_server.py --model turbo --only streams,together | tee scripts/gpu/fast_server_turbo.txt

Weights are random at full size (scripts/tiny_model.py): the arithmetic, memory and time of the real model, noise for
speech that lasts as its text does. Each server gets exactly the Environment= and ExecStart= of a unit that
`chatterbox-deploy render` wrote (scripts/gpu/stock_server.py); requests come over HTTP from this process and get WAV,
with the watermark. Fails where a figure is worse than LIMITS allow.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import aiohttp
import stock_server
from stock_server import CHECKOUT, PORT, TEXT, Case, Server

SETTINGS = "queue_size = 600\nmax_wait_s = 600"
URL = f"http://127.0.0.1:{PORT}/v1/audio/speech"
HEADER_BYTES = 44
BYTES_PER_S = 48_000

WORDS = TEXT.split()


@dataclass(frozen=True)
class Heard:
    first_s: float
    """Until its first byte of sound."""
    whole_s: float
    audio_s: float


async def ask(client: aiohttp.ClientSession, *, text: str = TEXT, seed: int = 1, stream: bool = False) -> Heard:
    body: dict[str, Any] = {"input": text, "response_format": "wav", "seed": seed}
    if stream:
        body["stream_format"] = "audio"
    begin_s = time.perf_counter()
    first_s, size = 0.0, 0
    async with client.post(URL, json=body) as answer:
        assert answer.status == 200, await answer.text()
        async for chunk in answer.content.iter_any():
            size += len(chunk)
            if not first_s and size > HEADER_BYTES:
                first_s = time.perf_counter() - begin_s
    return Heard(first_s, time.perf_counter() - begin_s, (size - HEADER_BYTES) / BYTES_PER_S)


async def at_once(client: aiohttp.ClientSession, count: int, **told: Any) -> tuple[list[Heard], float]:
    """So many requests together, and seconds until the last was answered."""
    begin_s = time.perf_counter()
    heard = await asyncio.gather(*(ask(client, seed=seed, **told) for seed in range(count)))
    return list(heard), time.perf_counter() - begin_s


def rate(heard: list[Heard], wall_s: float) -> float:
    return sum(one.audio_s for one in heard) / wall_s


def p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]


def text_of(seconds: float) -> str:
    """About so long when spoken: 1.7 tokens a letter, 25 a second."""
    letters = max(4, round(seconds * 25 / 1.7))
    words: list[str] = []
    while sum(map(len, words)) + len(words) < letters:
        words.append(WORDS[len(words) % len(WORDS)])
    return " ".join(words)[:letters] + "."


def by_the_kit(name: str, directory: Path, clients: int, keep: Path) -> None:
    """What ``bench`` says of the same server; and, meanwhile, what ``report`` and ``monitor`` see."""
    kit = [sys.executable, "-m", "chatterbox_deploy"]
    load = [*kit, "bench", "run", "--url", f"http://127.0.0.1:{PORT}", "--concurrency", str(clients)]
    load += ["--texts", "short", "--window", "8", "--warmup", "3", "--repeat", "2"]
    with (keep / f"bench-{name}.txt").open("w") as file:
        file.write("$ chatterbox-deploy " + " ".join(load[3:]) + "\n\n")
        file.flush()
        bench = subprocess.Popen(load, stdout=file, stderr=subprocess.DEVNULL)
        time.sleep(6)
        for words in (["report", "fleet.toml"], ["monitor", "fleet.toml", "--once"]):
            seen = subprocess.run([*kit, *words], cwd=directory, capture_output=True, text=True, check=False)
            told = f"$ chatterbox-deploy {' '.join(words)}\n\n{seen.stdout}\n{seen.stderr}"
            (keep / f"{words[0]}-{name}.txt").write_text(told)
        bench.wait(120)


class Report:
    def __init__(self, name: str) -> None:
        self.name = name
        self.figures: dict[str, float] = {}

    def say(self, what: str, value: float, unit: str, note: str = "") -> None:
        self.figures[what] = value
        print(f"{self.name:<6} {what:<58} {value:9.2f} {unit:<12} {note}", flush=True)


async def measure(report: Report, only: list[str], *, stock: bool) -> None:
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as client:
        for seed in range(1 if stock else 3):
            await ask(client, seed=seed)
        alone = [await ask(client, seed=seed) for seed in range(3 if stock else 5)]
        report.say("one request, whole: p50 latency", statistics.median(one.whole_s for one in alone), "s")
        spoken_s, took_s = sum(one.audio_s for one in alone), sum(one.whole_s for one in alone)
        report.say("one request, whole: rate", spoken_s / took_s, "audio-s/s", f"{alone[0].audio_s:.1f} s of sound")
        if stock:
            return
        await at_once(client, 16, stream=True)
        if "streams" in only:
            firsts = [(await ask(client, seed=seed, stream=True)).first_s * 1000 for seed in range(20)]
            report.say("one stream: first byte, p50", statistics.median(firsts), "ms", f"p95 {p95(firsts):.0f} ms")
            await at_once(client, 32, stream=True)
            for _ in range(2):
                heard, wall_s = await at_once(client, 32, stream=True)
                firsts = [one.first_s * 1000 for one in heard]
                report.say("32 streams at once: first byte, p95", p95(firsts), "ms",
                           f"p50 {statistics.median(firsts):.0f} ms, {rate(heard, wall_s):.0f} audio-s/s")  # fmt: skip
        if "together" in only:
            await at_once(client, 64)
            rates = []
            for _ in range(3):
                heard, wall_s = await at_once(client, 64)
                rates.append(rate(heard, wall_s))
            report.say("64 requests at once: rate, median of 3", statistics.median(rates), "audio-s/s",
                       f"{min(rates):.0f} to {max(rates):.0f}; the last took {wall_s:.2f} s")  # fmt: skip
        if "growth" in only:
            for count in (1, 4, 16, 64, 256):
                await at_once(client, count)
                heard, wall_s = await at_once(client, count)
                whole = [one.whole_s for one in heard]
                report.say(f"{count} at once: rate", rate(heard, wall_s), "audio-s/s",
                           f"p50 {statistics.median(whole):.2f} s, p95 {p95(whole):.2f} s")  # fmt: skip
            for seconds in (1, 5, 20, 60):
                await ask(client, text=text_of(seconds))
                one = await ask(client, text=text_of(seconds), seed=2)
                report.say(
                    f"{seconds} s of sound alone: latency",
                    one.whole_s,
                    "s",
                    f"{one.audio_s:.1f} s, {one.audio_s / one.whole_s:.1f} audio-s/s",
                )


def serve(name: str, case: Case, weights: Path, *, only: list[str], idle_bytes: int, keep: Path | None) -> Report:
    report = Report(name)
    server = Server(stock_server.render_unit(case, weights, weights.parent), weights.parent)
    try:
        report.say("from start to ready", server.wait_ready(), "s")
        asyncio.run(measure(report, only, stock=name == "stock"))
        if keep is not None:
            by_the_kit(name, weights.parent, 32 if name == "fast" else 2, keep)
        ready = stock_server.get("/readyz")
        report.say(
            "GPU memory",
            (stock_server.gpu_memory_bytes() - idle_bytes) / 2**30,
            "GiB",
            f"T3 in {ready['facts'].get('t3', 'float32')}",
        )
        report.say("host memory", server.resident_bytes() / 2**30, "GiB")
        return report
    finally:
        server.end()


LIMITS = (
    ("64 requests at once: rate, median of 3", 300.0, 100.0, 1),
    ("one stream: first byte, p50", 150.0, 300.0, -1),
    ("32 streams at once: first byte, p95", 500.0, 1000.0, -1),
)
"""What, its goal, what is not done, and whether more is better."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="chatterbox", choices=("chatterbox", "turbo", "multilingual"))
    parser.add_argument("--only", default="streams,together,growth,stock")
    parser.add_argument("--keep", type=Path, help="a directory for what bench, report and monitor say of the servers")
    asked = parser.parse_args()
    only = asked.only.split(",")
    print(subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout.strip())
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}; {asked.model}, full-size random weights; "
          f"{len(TEXT)} characters a request\n")  # fmt: skip
    idle_bytes = stock_server.gpu_memory_bytes()
    with tempfile.TemporaryDirectory() as name:
        weights = Path(name) / asked.model
        subprocess.run(
            [sys.executable, CHECKOUT / "scripts/tiny_model.py", "full", weights, "--kind", asked.model,
             "--eos-per-text", "1.7"],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        fast = serve(
            "fast",
            Case(asked.model, f"engine = 'fast'\n{SETTINGS}"),
            weights,
            only=only,
            idle_bytes=idle_bytes,
            keep=asked.keep,
        )
        if "stock" in only:
            serve("stock", Case(asked.model, SETTINGS), weights, only=only, idle_bytes=idle_bytes, keep=asked.keep)
    failed = False
    for what, goal, least, sign in LIMITS:
        if what in fast.figures:
            value = fast.figures[what]
            word = "reached" if sign * value >= sign * goal else "missed"
            failed |= sign * value < sign * least
            print(f"{what}: {value:.0f}, goal {goal:.0f}: {word}")
    if failed:
        sys.exit("cannot call this done: see above")


if __name__ == "__main__":
    main()
