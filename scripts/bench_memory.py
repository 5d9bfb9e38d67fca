"""Does memory stay flat over 5,000 requests to the real chatterbox-tts classes? `python scripts/bench_memory.py`.

    python scripts/bench_memory.py --plot scripts/bench_memory.svg | tee scripts/bench_memory.txt
    python scripts/bench_memory.py --model multilingual --requests 500

The tiny model on the CPU, the whole server as a process, four clients: every format, streams, voices (more than are
kept, so that some are always read again), and requests that go wrong: bad ones, clients that hang up, a voice that is
no sound. RSS after every 50 requests. Fails when memory grows by more than MOST_GROWTH after the first fifth.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts import tiny_server

from chatterbox_server import audio

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SPEECH: Final = "/v1/audio/speech"
CLIENTS: Final = 4
EVERY: Final = 50
VOICES: Final = 12
VOICES_KEPT: Final = 8
WARM_UP: Final = 0.2
"""Share of the requests that come before memory is judged: caches fill, the allocator finds its size."""

MOST_GROWTH: Final = 0.01
"""Of the mean of the first quarter that is judged to that of the last, as a share of the former."""

Point = tuple[int, float]
"""Requests answered, MB held."""


@dataclass(frozen=True, slots=True)
class Asked:
    body: str
    path: str = SPEECH
    hangs_up: bool = False


def requests(count: int, seed: int) -> Iterator[Asked]:
    """Of 100: 70 short, 6 with a recording as their voice, 5 streams, 4 that hang up, 10 bad, 5 that ask how it is."""
    dice = random.Random(seed)  # noqa: S311 (no secret)

    def speech(text: str, **more: object) -> str:
        return json.dumps({"input": text, "response_format": dice.choice(audio.FORMATS), **more})

    bad = (
        "{",
        "[" * 5000,
        speech(""),
        speech("…"),
        speech("Hi.", voice="nobody"),
        speech("Hi.", voice="broken"),
        speech("Hi.", temperature=0),
        speech("Hi.", response_format="ogg"),
        speech("Hi.", language="xx"),
        speech("Hi.", speed=2),
    )
    for _ in range(count):
        kind = dice.random()
        short = dice.choice(("Hi.", "No.", "Yes!", "Oh…"))
        if kind < 0.70:
            yield Asked(speech(short))
        elif kind < 0.76:
            yield Asked(speech(short, voice=f"voice{dice.randrange(VOICES)}"))
        elif kind < 0.81:
            pieces = [short] * dice.randint(2, 5)
            yield Asked(speech("\n\n".join(pieces), stream_format=dice.choice(("audio", "sse"))))
        elif kind < 0.85:
            yield Asked(speech(f"{short}\n\n{short}"), hangs_up=True)
        elif kind < 0.95:
            yield Asked(dice.choice(bad))
        else:
            yield Asked("", dice.choice(("/healthz", "/readyz", "/metrics", "/v1/audio/voices", "/nothing")))


class Load:
    """Clients that share one list of requests; memory is read by whoever ends a 50th one."""

    def __init__(self, server: tiny_server.Server, asked: Iterator[Asked]) -> None:
        self._server = server
        self._asked = asked
        self._lock = threading.Lock()
        self._ended = itertools.count(1)
        self.outcomes: Counter[str] = Counter()
        self.points: list[Point] = [(0, server.resident_bytes() / 1e6)]

    def run(self) -> None:
        with ThreadPoolExecutor(CLIENTS) as pool:
            for client in [pool.submit(self._client) for _ in range(CLIENTS)]:
                client.result()

    def _client(self) -> None:
        connection = self._server.connect()
        while True:
            with self._lock:
                asked = next(self._asked, None)
            if asked is None:
                connection.close()
                return
            outcome = ask(connection, asked)
            with self._lock:
                self.outcomes[outcome] += 1
                number = next(self._ended)
                if number % EVERY == 0:
                    self.points.append((number, self._server.resident_bytes() / 1e6))


def ask(connection: http.client.HTTPConnection, asked: Asked) -> str:
    method = "POST" if asked.body else "GET"
    connection.request(method, asked.path, asked.body or None, {"Content-Type": "application/json"})
    if asked.hangs_up:
        time.sleep(0.02)
        connection.close()
        return "hung up"
    answer = connection.getresponse()
    with contextlib.suppress(http.client.IncompleteRead):
        answer.read()
        return str(answer.status)
    connection.close()
    return "cut"


def write_voices(directory: Path) -> None:
    """Recordings of noise, six seconds each, and one file that is no sound."""
    for number in range(VOICES):
        noise = np.random.default_rng(number).normal(0, 0.1, 6 * 24_000).astype(np.float32)
        (directory / f"voice{number}.wav").write_bytes(audio.encode(noise, 24_000, "wav"))
    (directory / "broken.wav").write_bytes(b"RIFF, but no sound")


def slope(points: Sequence[Point]) -> float:
    """MB per 1,000 requests, by least squares."""
    numbers, held = zip(*points, strict=True)
    return statistics.linear_regression(numbers, held).slope * 1000


def quarters(points: Sequence[Point]) -> list[list[Point]]:
    size = len(points) // 4
    return [list(points[len(points) - size * left :][:size]) for left in (4, 3, 2, 1)]


def verdict(points: Sequence[Point]) -> bool:
    """Print the table; whether memory is flat."""
    judged = [point for point in points if point[0] > WARM_UP * points[-1][0]]
    print("\n| requests | mean MB | lowest | highest | MB per 1,000 requests |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for part in quarters(judged):
        held = [megabytes for _, megabytes in part]
        print(
            f"| {part[0][0]:,} to {part[-1][0]:,} | {statistics.mean(held):.1f} | {min(held):.1f} | {max(held):.1f} "
            f"| {slope(part):+.2f} |"
        )
    first, last = (statistics.mean(megabytes for _, megabytes in quarters(judged)[place]) for place in (0, -1))
    slopes = [slope(part) for part in quarters(judged)]
    growth = last / first - 1
    # Between quarters, for points that follow each other are no independent measurements.
    print(
        f"\nslope over all of them {slope(judged):+.2f} MB per 1,000 requests (standard deviation between quarters "
        f"{statistics.stdev(slopes):.2f}); first to last quarter {last - first:+.1f} MB, {growth:+.2%}"
    )
    flat = growth <= MOST_GROWTH
    print(f"{'flat' if flat else 'NOT FLAT'}: at most {MOST_GROWTH:+.0%} is allowed")
    return flat


WIDTH, HEIGHT, LEFT, BOTTOM = 800, 320, 60, 40


def plot(points: Sequence[Point], title: str) -> str:
    """RSS over requests from 0 MB up, as SVG."""
    most, tallest = points[-1][0], max(megabytes for _, megabytes in points) * 1.15

    def x(number: float) -> float:
        return LEFT + number / most * (WIDTH - LEFT - 20)

    def y(megabytes: float) -> float:
        return HEIGHT - BOTTOM - megabytes / tallest * (HEIGHT - BOTTOM - 40)

    line = " ".join(f"{x(number):.1f},{y(megabytes):.1f}" for number, megabytes in points)
    step = 10 ** (len(str(int(tallest))) - 1)
    rows = [
        f'<line x1="{LEFT}" x2="{WIDTH - 20}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#ddd"/>'
        f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick}</text>'
        for tick in range(0, int(tallest) + 1, step)
    ]
    columns = [
        f'<text x="{x(most * part / 5):.1f}" y="{HEIGHT - 22}" text-anchor="middle">{most * part // 5:,}</text>'
        for part in range(6)
    ]
    judged = x(WARM_UP * most)
    return "\n".join((
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="14">{title}</text>',
        *rows,
        *columns,
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">requests</text>',
        f'<text x="{LEFT - 8}" y="38" text-anchor="end">MB</text>',
        f'<path d="M{judged:.1f} 40V{HEIGHT - BOTTOM}" stroke="#888" stroke-dasharray="4"/>',
        f'<text x="{judged + 6:.1f}" y="52" fill="#666">judged from here</text>',
        f'<polyline points="{line}" fill="none" stroke="#1f77b4" stroke-width="1.5"/>',
        "</svg>\n",
    ))  # fmt: skip


def main() -> int:
    """Print one table; 1 if memory grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("chatterbox", "turbo", "multilingual"), default="chatterbox")
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--plot", type=Path, help="write an SVG here")
    asked = parser.parse_args()
    print(f"{' '.join(['python', 'scripts/bench_memory.py', *sys.argv[1:]])}: {tiny_server.machine()}", flush=True)
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        write_voices(Path(name))
        settings = {"device": "cpu", "model": asked.model, "voices_dir": name, "check_duration": "false"}
        argv = tiny_server.tiny("--eos-per-text", "0.25", "--voices-kept", str(VOICES_KEPT))
        with tiny_server.Server(argv, settings) as server:
            load = Load(server, requests(asked.requests, seed=1))
            load.run()
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in load.outcomes.most_common())
    print(f"{asked.model}, {asked.requests:,} requests in {time.monotonic() - began_s:.0f} s: {outcomes}")
    tenth = max(1, len(load.points) // 10)
    print("MB: " + ", ".join(f"{megabytes:.0f} after {number:,}" for number, megabytes in load.points[::tenth]))
    flat = verdict(load.points)
    if asked.plot is not None:
        asked.plot.write_text(plot(load.points, f"RSS of the server, {asked.model} (tiny, CPU)"))
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
