"""Does bench say what others say? `python scripts/bench_agrees.py | tee scripts/bench_agrees.txt`.

Needs Debian's wrk and hey. Four servers with an engine of fixed time (scripts/timed_server.py) behind real nginx with
the file that `render` writes. In each round `chatterbox-deploy bench`, wrk and hey have eight clients ask in a closed
loop, one tool after the other; nginx' access log has every request of each. Fails when a ratio of rates, or of median
latencies, is off by more than 2 %, or when a count is off by one. Takes five minutes.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Final, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts import timed_server

from chatterbox_deploy.bench import loads, results, stats

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chatterbox_deploy.bench.stats import Estimate

SERVICE_S: Final = 0.05
COUNT: Final = 4
CLIENTS: Final = 8
ROUNDS: Final = 6
WINDOW_S: Final = 12
WITHIN: Final = 0.02
TEXT: Final = "Hello."
BODY: Final = f'{{"input":"{TEXT}","response_format":"wav"}}'
SPEECH: Final = "/v1/audio/speech"

LUA: Final = f"""
wrk.method = "POST"
wrk.body = '{BODY}'
wrk.headers["Content-Type"] = "application/json"
done = function(summary, latency, requests)
  io.write(string.format("%d %d %f %f\\n", summary.requests, summary.duration, latency:percentile(50), latency.mean))
end
"""


class Said(NamedTuple):
    """What a tool says of one load."""

    rate_per_s: float
    p50_s: float
    mean_s: float


def bench(url: str, directory: Path) -> tuple[Said, loads.Run]:
    """A window of WINDOW_S, after a second of warm-up."""
    saved, texts = directory / "run.json", directory / "texts.txt"
    # The same as the others send: a longer text has several pieces, each of which takes the engine its time.
    texts.write_text(f"{TEXT}\n")
    argv = [sys.executable, "-m", "chatterbox_deploy", "bench", "--url", url, "--texts", str(texts)]
    argv += [
        "--concurrency",
        str(CLIENTS),
        "--window",
        str(WINDOW_S),
        "--warmup",
        "1",
        "--repeat",
        "1",
        "-o",
        str(saved),
        "--overwrite",
    ]
    subprocess.run(argv, capture_output=True, check=True)
    run = loads.from_json(saved.read_text(), source=str(saved))
    figures = {figure.name: results.values(run.trials[0], figure) for figure in results.FIGURES}
    return Said(figures["requests_per_s"][0], figures["latency_p50_s"][0], figures["latency_mean_s"][0]), run


def wrk(url: str, directory: Path) -> Said:
    """Of all requests that it completed."""
    script = directory / "post.lua"
    script.write_text(LUA)
    argv = ["wrk", "-t1", f"-c{CLIENTS}", f"-d{WINDOW_S}s", "--timeout", "30s", "-s", str(script), url + SPEECH]
    said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    requests, took_us, p50_us, mean_us = map(float, said.splitlines()[-1].split())
    return Said(requests / took_us * 1e6, p50_us / 1e6, mean_us / 1e6)


def hey(url: str, directory: Path) -> Said:
    """Its percentiles are of all requests; it prints four places."""
    argv = ["hey", "-z", f"{WINDOW_S}s", "-c", str(CLIENTS), "-m", "POST", "-T", "application/json", "-d", BODY]
    said = subprocess.run([*argv, url + SPEECH], capture_output=True, text=True, check=True, cwd=directory).stdout
    patterns = r"Requests/sec:\s+([\d.]+)", r"50% in ([\d.]+) secs", r"Average:\s+([\d.]+)"
    return Said(*(_number(pattern, said) for pattern in patterns))


def _number(pattern: str, said: str) -> float:
    found = re.search(pattern, said)
    assert found is not None, said
    return float(found[1])


class Log:
    """nginx' access log, read on from where it was."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0

    def new(self) -> list[dict[str, Any]]:
        """Requests since the last time; nginx may log a moment after it answers."""
        time.sleep(1)
        rows = self._path.read_text().splitlines()
        fresh, self._at = rows[self._at :], len(rows)
        # Before it begins, bench asks whoever is at an address of no fleet file for /metrics, too.
        return [row for row in map(json.loads, fresh) if row["uri"] == SPEECH]


def cell(found: Estimate | None) -> str:
    assert found is not None
    return f"{found.value:.4f} ({found.low:.4f} to {found.high:.4f})"


def counts(url: str, run: loads.Run, logged: Sequence[dict[str, Any]]) -> list[str]:
    """What does not match between bench and nginx, request by request."""
    samples = run.trials[0].repetitions[0].samples
    wrong = []
    if len(logged) != len(samples) + run.probes:
        wrong.append(f"{url}: {len(samples)} + {run.probes} requests sent, {len(logged)} logged")
    ours = Counter(sample.instance for sample in samples)
    theirs = Counter(row["instance"] for row in logged[run.probes :])
    if ours != theirs:
        wrong.append(f"{url}: instances answered {ours}, and by nginx {theirs}")
    return wrong


def main() -> int:
    """Print what each says and the ratios; 1 if they do not agree."""
    if missing := [tool for tool in ("wrk", "hey") if shutil.which(tool) is None]:
        sys.exit(f"cannot compare without {' and '.join(missing)}: apt-get install {' '.join(missing)}")
    print(f"python scripts/bench_agrees.py: {timed_server.machine()}")
    print(f"{COUNT} servers of {SERVICE_S} s behind nginx, {CLIENTS} clients, {ROUNDS} rounds of {WINDOW_S} s each.")
    print("In brackets: 95 % intervals over the rounds.\n")
    others: dict[str, Callable[[str, Path], Said]] = {"wrk": wrk, "hey": hey}
    said: dict[str, list[Said]] = {name: [] for name in ("bench", *others, "nginx' log")}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name, timed_server.fleet(COUNT, SERVICE_S, Path(name)) as (front, _):
        directory, url = Path(name), f"http://127.0.0.1:{front.port}"
        log = Log(front.access_log)
        for _ in range(ROUNDS):
            own, run = bench(url, directory)
            logged = log.new()
            said["bench"].append(own)
            wrong += counts(url, run, logged)
            within = [row["duration_s"] for row in logged[run.probes :]]
            took = sorted(within)
            said["nginx' log"].append(Said(own.rate_per_s, took[len(took) // 2], fmean(within)))
            for tool, ask in others.items():
                said[tool].append(ask(url, directory))
                log.new()
    print("| | requests/s | latency p50 s | latency mean s |")
    print("| --- | ---: | ---: | ---: |")
    for tool, all_rounds in said.items():
        rate = "-" if tool == "nginx' log" else cell(stats.mean([each.rate_per_s for each in all_rounds]))
        p50, mean = (cell(stats.mean([each[place] for each in all_rounds])) for place in (1, 2))
        print(f"| {tool} | {rate} | {p50} | {mean} |")
    print("\n| bench over | requests/s | latency p50 | latency mean |")
    print("| --- | ---: | ---: | ---: |")
    for tool in (*others, "nginx' log"):
        pairs = [([each[place] for each in said["bench"]], [each[place] for each in said[tool]]) for place in range(3)]
        ratios = [stats.ratio(own, other) for own, other in pairs]
        cells = [cell(found) for found in ratios]
        # nginx knows requests, not when a load began.
        print(f"| {tool} | " + " | ".join(["-", *cells[1:]] if tool == "nginx' log" else cells) + " |")
        wrong += [
            f"{tool}: {each.value:.3f}" for each in ratios[:2] if each is not None and abs(each.value - 1) > WITHIN
        ]
    sent = "every request that bench sent is in nginx' log once, by the same instance"
    print(f"\nWithin {WITHIN:.0%}, and {sent}: {'; '.join(wrong) or 'met'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
