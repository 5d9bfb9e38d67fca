"""Does giving cached GPU memory back at rest slow the next utterance down? The engine alone, no server.

    python scripts/gpu/idle_cache.py | tee scripts/gpu/idle_cache.txt

Full-size random weights. Rests of 8 s with and without `engine.free()`, in turn, so that whatever else a rest does
(clocks fall, caches cool) is in both; and no rest at all. What is printed is the synthesis of the same text after each.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from stock_server import CHECKOUT, TEXT

from chatterbox_server.engine import Errand, Utterance
from chatterbox_server.engines import stock
from chatterbox_server.settings import Settings

ROUNDS = 8
REST_S = 8.0


def main() -> None:
    print(subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout.strip())
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}; full-size random weights, model chatterbox\n")
    os.environ["OMP_NUM_THREADS"] = "2"
    with tempfile.TemporaryDirectory() as name:
        weights = Path(name) / "weights"
        subprocess.run(
            [sys.executable, CHECKOUT / "scripts/tiny_model.py", "full", weights, "--kind", "chatterbox",
             "--eos-per-text", "1.7"],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        engine = stock.load(Settings(weights=weights))
    utterance = Utterance(text=TEXT, voice=None, language="en", speed=1.0, sampling=engine.defaults, seed=1)

    def spoken_s() -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        engine.synthesize(utterance, Errand())
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    for _ in range(3):
        spoken_s()
    took_s: dict[str, list[float]] = {"no rest": [], "rest": [], "rest, memory given back": []}
    for _ in range(ROUNDS):
        took_s["no rest"].append(spoken_s())
        time.sleep(REST_S)
        took_s["rest"].append(spoken_s())
        begin = time.perf_counter()
        engine.free()
        freeing_s = time.perf_counter() - begin
        time.sleep(REST_S)
        took_s["rest, memory given back"].append(spoken_s())
    print(f"{'before':<24} {'median s':>8} {'min-max':>11}   of {ROUNDS}; giving back took {freeing_s * 1000:.0f} ms")
    for before, times_s in took_s.items():
        print(f"{before:<24} {statistics.median(times_s):8.2f} {min(times_s):5.2f}-{max(times_s):.2f}")


if __name__ == "__main__":
    main()
