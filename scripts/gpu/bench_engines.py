"""Engines on this GPU, measured by `chatterbox-deploy bench`, and the second over the first.

    python scripts/gpu/bench_engines.py "" "engine = 'fast'" | tee scripts/gpu/bench_engines.txt
    python scripts/gpu/bench_engines.py "" "tf32 = false" --model turbo --concurrency 1 4 --keep runs

Each argument is lines of [server], "" for its defaults. Each server is one instance, started as its unit starts it
(scripts/gpu/stock_server.py), with full-size random weights: the arithmetic, memory and time of the real model, noise
for speech. For each number of clients a closed loop; then, with --find-rate, the highest rate that holds that target.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import stock_server
from stock_server import CHECKOUT, PORT, Case, Server

KIT = (sys.executable, "-m", "chatterbox_deploy", "bench")


def make_weights(model: str, directory: Path) -> Path:
    weights = directory / model
    script = CHECKOUT / "scripts/tiny_model.py"
    argv = [sys.executable, str(script), "full", str(weights), "--kind", model, "--eos-per-text", "1.7"]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    return weights


def show(*argv: str) -> None:
    """Run a command of bench's; what it says on standard error comes through. A failed request is no reason to stop."""
    print("$ chatterbox-deploy bench " + " ".join(argv), flush=True)
    done = subprocess.run([*KIT, *argv], stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, flush=True)
    assert done.returncode in (0, 1), done.returncode


def measure(case: Case, number: int, options: argparse.Namespace, directory: Path, weights: Path) -> None:
    print(f"### {chr(ord('A') + number)}: {case.name}\n", flush=True)
    server = Server(stock_server.render_unit(case, weights, directory), directory)
    try:
        print(f"ready after {server.wait_ready():.0f} s\n", flush=True)
        asked = ["--url", f"http://127.0.0.1:{PORT}", "--texts", options.texts, "--window", options.window]
        asked += ["--warmup", options.warmup, "--repeat", options.repeat, "--overwrite"]
        for clients in options.concurrency:
            show(*asked, "--concurrency", str(clients), "-o", str(options.keep / f"{number}-{clients}.json"))
        if options.find_rate is not None:
            show(*asked, "--find-rate", options.find_rate, "-o", str(options.keep / f"{number}-rate.json"))
    finally:
        server.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="+", help="lines of [server]; \\n between them")
    parser.add_argument("--model", default="chatterbox", help="chatterbox, turbo or multilingual")
    parser.add_argument("--weights", type=Path, help="a checkpoint, instead of random weights")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4], help="clients of the closed loops")
    parser.add_argument("--texts", default="mixed", help="as bench takes it")
    parser.add_argument("--window", default="30", help="seconds")
    parser.add_argument("--warmup", default="10", help="seconds")
    parser.add_argument("--repeat", default="3", help="repetitions")
    parser.add_argument("--find-rate", help="such as 'p95 first-byte <= 10'")
    parser.add_argument("--keep", type=Path, help="a directory for the samples")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        options.keep = options.keep or directory
        options.keep.mkdir(exist_ok=True)
        weights = options.weights or make_weights(options.model, directory)
        cases = [Case(options.model, lines.replace("\\n", "\n")) for lines in options.servers]
        for number, case in enumerate(cases):
            measure(case, number, options, directory, weights)
        for number in range(1, len(cases)):
            for clients in options.concurrency:
                show("compare", *(str(options.keep / f"{which}-{clients}.json") for which in (0, number)))


if __name__ == "__main__":
    main()
