"""What the front costs 1, 2, 4, 8 instances: `python scripts/bench_scaling.py | tee scripts/bench_scaling.txt`.

The whole server with an engine of fixed time (scripts/timed_server.py) behind real nginx with the file that `render`
writes, measured by `chatterbox-deploy bench` through the front. Throughput: a closed loop of two clients for each
instance, over one instance; at least 0.99 times as many is required. Waits: an open loop at a load of 0.8 and 0.95,
beside a simulation with the very same arrivals of one queue in the middle, which gives the next request to whoever is
free: no balancer beats that. Takes twenty minutes.

    python scripts/bench_scaling.py --quick        # eight minutes, wide intervals
"""

from __future__ import annotations

import argparse
import heapq
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, variance
from typing import TYPE_CHECKING, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts import timed_server

from chatterbox_deploy.bench import loads, results, stats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatterbox_deploy.bench.loads import Sample, Trial
    from chatterbox_deploy.bench.stats import Estimate

SERVICE_S: Final = 0.25
COUNTS: Final = (1, 2, 4, 8)
LOADS: Final = ((0.8, (2, 4, 8)), (0.95, (8,)))
REPETITIONS: Final = 5
REQUIRED: Final = 0.99


def measure(directory: Path, port: int, window_s: float, *load: str) -> Trial:
    saved = directory / "run.json"
    url = f"http://127.0.0.1:{port}"
    argv = [sys.executable, "-m", "chatterbox_deploy", "bench", "--url", url, "--texts", "short", "--timeout", "600"]
    argv += ["--window", str(window_s), "--warmup", "5", "--repeat", str(REPETITIONS), "-o", str(saved), "--overwrite"]
    done = subprocess.run([*argv, *load], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in done.stderr.splitlines():
        if line.startswith("note: this benchmark"):
            print(line, file=sys.stderr)
    (trial,) = loads.from_json(saved.read_text(), source=str(saved)).trials
    return trial


def ideal_waits(samples: Sequence[Sample], servers: int, service_s: float) -> list[float]:
    """Of each measured request, had all of them stood in one queue in order of arrival."""
    free_at = [float("-inf")] * servers
    waits = []
    for sample in samples:
        begins_s = max(sample.due_s, heapq.heappop(free_at))
        heapq.heappush(free_at, begins_s + service_s)
        waits.append(begins_s - sample.due_s)
    return waits


def wait_row(trial: Trial, count: int, load: float, service_s: float) -> str:
    """Mean wait as the instances told, its ideal, and the first over the second."""
    told, ideals = [], []
    for repetition in trial.repetitions:
        waits = ideal_waits(repetition.samples, count, service_s)
        within = [0 <= sample.due_s < repetition.window_s for sample in repetition.samples]
        told.append(fmean(sample.queue_wait_s or 0.0 for sample in repetition.measured))
        ideals.append(fmean(wait for wait, counts in zip(waits, within, strict=True) if counts))
    # The ratio estimator: repetitions come in pairs of the same arrivals, and what is left over is what is unsure.
    ratio = fmean(told) / fmean(ideals)
    left = [one - ratio * other for one, other in zip(told, ideals, strict=True)]
    reach = stats.student(len(left) - 1) * (variance(left) / len(left)) ** 0.5 / fmean(ideals)
    over = cell(stats.Estimate(ratio, ratio - reach, ratio + reach))
    return f"| {count} | {load} | {fmean(told):.4f} | {fmean(ideals):.4f} | {over} |"


def cell(found: Estimate) -> str:
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def report(count: int, trial: Trial, first: Sequence[float]) -> float:
    """Print a row of the first table; how many times one instance it is."""
    times = stats.ratio(results.values(trial, results.REQUESTS), first)
    rate, latency = results.estimate(trial, results.REQUESTS), results.estimate(trial, results.LATENCY)
    assert times is not None
    assert rate is not None
    assert latency is not None
    told = "1" if count == 1 else cell(times)
    machine_cores = fmean(each.use.machine_cores or 0.0 for each in trial.repetitions)
    row = (
        count,
        f"{rate.value:.3f}",
        told,
        f"{times.value / count:.4f}",
        f"{latency.value:.4f}",
        f"{machine_cores:.2f}",
    )
    print("| " + " | ".join(map(str, row)) + " |", flush=True)
    return times.value


def main() -> int:
    """Print both tables; 1 if the throughput is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short windows")
    quick = parser.parse_args().quick
    window_s, open_window_s = (4.0, 6.0) if quick else (12.0, 30.0)
    began_s = time.monotonic()
    print(f"python scripts/bench_scaling.py{' --quick' if quick else ''}: {timed_server.machine()}")
    print(f"Engine: {SERVICE_S} s for each request. In brackets: 95 % intervals over {REPETITIONS} repetitions.\n")
    first: tuple[float, ...] = ()
    service_s = 0.0
    low, waits = [], []
    print("| instances | requests/s | times one | times / instances | latency p50 s | cores busy with anything |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for count in COUNTS:
        with tempfile.TemporaryDirectory() as name, timed_server.fleet(count, SERVICE_S, Path(name)) as (front, _):
            trial = measure(Path(name), front.port, window_s, "--concurrency", str(2 * count))
            first = first or results.values(trial, results.REQUESTS)
            times = report(count, trial, first)
            if times < REQUIRED * count:
                low.append(f"{count}: {times:.3f}")
            service_s = service_s or 1 / fmean(first)
            for load, counts in LOADS:
                if count in counts:
                    rate = load * count / service_s
                    open_loop = measure(Path(name), front.port, open_window_s, "--rate", str(rate))
                    waits.append(wait_row(open_loop, count, load, service_s))
    print(f"\nOne instance that never rests takes {service_s:.4f} s for a request: load 1. Waits as instances told:\n")
    print("| instances | load | mean wait s | one queue in the middle s | over it |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    print("\n".join(waits))
    print(f"\nAt least {REQUIRED} times as much for each instance: {'; '.join(low) or 'met'}")
    print(f"{(time.monotonic() - began_s) / 60:.0f} minutes", file=sys.stderr)
    return 1 if low else 0


if __name__ == "__main__":
    sys.exit(main())
