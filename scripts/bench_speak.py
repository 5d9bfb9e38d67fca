"""How much sooner is one book done on N instances? `python scripts/bench_speak.py`.

The whole command, `chatterbox-deploy speak`, before the whole fleet, `chatterbox-deploy up` with its nginx: first 1, 2
and 4 instances that take the same time for each piece, one at a time, as a GPU does (tests/host/fixed_time_server.py),
for two cores cannot speak four times as much; then espeak-ng, which really speaks, and whose limit is the cores, as is
that of the encoder. Fails when N fixed-time instances are not at least 0.95 N times as fast as one. Three minutes.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.ports import free_ports

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVER: Final = Path(__file__).resolve().parents[1] / "tests/host/fixed_time_server.py"
COUNTS: Final = (1, 2, 4)
SECONDS: Final = 0.25
"""That a piece takes."""
REPEATS: Final = 3
LEAST_SPEEDUP: Final = 0.95
"""Per instance."""

PARAGRAPHS: Final = 76
ESPEAK_PARAGRAPHS: Final = 120
SENTENCES: Final = (
    "The quick brown fox jumps over the lazy dog and sits down in the shade of an old tree.",
    "Nobody had told it that the dog was not asleep, so it stayed there until the evening.",
    "What a day that was!",
)


def book(paragraphs: int) -> str:
    """Four chapters; each paragraph is one piece, and no two are the same."""
    blocks: list[str] = []
    for number in range(paragraphs):
        if number % (paragraphs // 4) == 0:
            blocks.append(f"# Chapter {number * 4 // paragraphs + 1}")
        blocks.append(f"Paragraph {number}. " + " ".join(SENTENCES))
    return "\n\n".join(blocks)


@contextmanager
def fleet(count: int, server: str, folder: Path) -> Iterator[Path]:
    """A running fleet's file."""
    *ports, front = free_ports(count + 1)
    gpus = "".join(f"{gpu} = {port}\n" for gpu, port in enumerate(ports))
    file = folder / "fleet.toml"
    file.write_text(f'[gpus]\n{gpus}[nginx]\nlisten = "127.0.0.1:{front}"\n[server]\n{server}\n')
    log = folder / "up.log"
    with log.open("w") as said:
        running = subprocess.Popen(
            [sys.executable, "-m", "chatterbox_deploy", "up", file], stderr=said, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 60
        while not any(line.startswith("ready") for line in log.read_text().splitlines()):
            assert running.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield file
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait()


def speak(fleet_file: Path, text: str, output: Path) -> dict[str, Any]:
    argv = (
        sys.executable,
        "-m",
        "chatterbox_deploy",
        "speak",
        "-",
        "-o",
        output,
        "--markdown",
        "--json",
        "--overwrite",
    )
    began_s = time.perf_counter()
    done = subprocess.run([*argv, "--fleet", fleet_file], input=text, text=True, check=True, capture_output=True)
    told: dict[str, Any] = json.loads(done.stdout)
    return told | {"command_s": time.perf_counter() - began_s}


def measured(count: int, server: str, text: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as directory, fleet(count, server, Path(directory)) as file:
        return [speak(file, text, Path(directory) / "book.m4b") for _ in range(REPEATS)]


def median(runs: list[dict[str, Any]], name: str) -> float:
    return float(statistics.median(run[name] for run in runs))


def shares(run: dict[str, Any]) -> str:
    return " ".join(str(share["pieces"]) for share in run["instances"])


def main() -> int:
    """Print two tables; 1 if more instances do not bring what they should."""
    machine = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before; Python {platform.python_version()}"
    print(f"python scripts/bench_speak.py: {machine}")
    text = book(PARAGRAPHS)
    command = json.dumps([sys.executable, str(SERVER), "--port", "{port}", "--seconds", str(SECONDS)])
    print(f"\nInstances that take {SECONDS} s for each piece, behind nginx; medians of {REPEATS} runs.\n")
    print(
        "| instances | pieces | speaking s | ideal s | times as fast as one | whole command s | pieces of each, last |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: | --- |", flush=True)
    slow: list[str] = []
    alone_s = 0.0
    for count in COUNTS:
        runs = measured(count, f"command = {command}", text)
        speaking_s, pieces = median(runs, "speaking_s"), runs[0]["pieces"]
        alone_s = alone_s or speaking_s
        print(
            f"| {count} | {pieces} | {speaking_s:.2f} | {pieces * SECONDS / count:.2f} | {alone_s / speaking_s:.2f} "
            f"| {median(runs, 'command_s'):.2f} | {shares(runs[-1])} |",
            flush=True,
        )
        if alone_s / speaking_s < LEAST_SPEEDUP * count:
            slow.append(f"{count} instances: {alone_s / speaking_s:.2f}")
    print(f"\nN instances are at least {LEAST_SPEEDUP} N times as fast as one: {'; '.join(slow) or 'met'}")

    text = book(ESPEAK_PARAGRAPHS)
    print(f"\nespeak-ng behind nginx, {len(text):,} characters into an m4b; medians of {REPEATS} runs.\n")
    print("| instances | pieces | sound s | speaking s | times real time | whole command s | pieces of each, last |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | --- |", flush=True)
    for count in COUNTS[:2]:
        runs = measured(count, 'engine = "espeak"', text)
        print(
            f"| {count} | {runs[0]['pieces']} | {runs[0]['duration_s']:.0f} | {median(runs, 'speaking_s'):.2f} "
            f"| {median(runs, 'real_time'):.0f} | {median(runs, 'command_s'):.2f} | {shares(runs[-1])} |",
            flush=True,
        )
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
