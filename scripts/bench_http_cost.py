"""What does a request cost the server beside the engine? `python scripts/bench_http_cost.py`.

The whole server as a process, around an engine that has 64 pieces in hand and sleeps for each
(scripts/timed_server.py), and 64 clients at once, each with a text of 139 characters, answered with 9.6 s of sound:
what a full fast engine asks of the server. Counted is the processor time that the process has used (proc(5), stat), for
which it matters less who else is at work, and how much longer than the sleep a round takes, for which it does.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts import tiny_server

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

AT_ONCE: Final = 64
SERVICE_S: Final = 1.0
SOUND_S: Final = 9.6
ROUNDS: Final = 8
VOICES: Final = 20
TEXT: Final = (
    "The quick brown fox jumps over the lazy dog, and then it sits down in the shade of an old tree to listen to the "
    "river below it for a while."
)
FORMATS: Final[tuple[Mapping[str, object], ...]] = (
    {"response_format": "wav"},
    {"response_format": "wav", "stream_format": "audio"},
    {"response_format": "pcm"},
)
ENVIRONMENT: Final = {"SERVICE_S": str(SERVICE_S), "SOUND_S": str(SOUND_S), "PLACES": str(AT_ONCE)}
SETTINGS: Final = {"queue_size": AT_ONCE}


def used_s(pid: int) -> float:
    """Processor time of the process and all of its threads, in user and kernel mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def speak(session: aiohttp.ClientSession, url: str, asked: Mapping[str, object]) -> int:
    async with session.post(url, json={"input": TEXT, "seed": 1, **asked}) as answer:
        content = await answer.read()
        assert answer.status == 200, content
        return len(content)


async def measure(server: tiny_server.Server, asked: Mapping[str, object], rounds: int) -> tuple[list[float], float]:
    """Seconds of each round beyond the engine's, and processor time of a request."""
    url = f"http://127.0.0.1:{server.port}/v1/audio/speech"
    beyond_s = []
    connections = aiohttp.TCPConnector(limit=AT_ONCE)
    async with aiohttp.ClientSession(connector=connections) as session:
        # The first round opens the connections, and is not counted.
        for number in range(rounds + 1):
            if number == 1:
                before_s = used_s(server.process.pid)
            began_s = time.perf_counter()
            await asyncio.gather(*(speak(session, url, asked) for _ in range(AT_ONCE)))
            beyond_s.append(time.perf_counter() - began_s - SERVICE_S)
    return beyond_s[1:], (used_s(server.process.pid) - before_s) / (rounds * AT_ONCE)


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of 64 requests, for each format")
    asked = parser.parse_args()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("numpy", "uvicorn", "fastapi", "av"))
    print(
        f"python scripts/bench_http_cost.py: {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before; "
        f"Python {sys.version.split()[0]}, {versions}"
    )
    print(
        f"{asked.rounds} rounds of {AT_ONCE} requests at once, {SOUND_S} s of sound each; {VOICES} recordings there.\n"
    )
    print("| asked for | processor ms a request | a round beyond the engine's time, s: median (all) |")
    print("| --- | ---: | ---: |", flush=True)
    os.environ.update(ENVIRONMENT)
    argv = (sys.executable, str(Path(__file__).with_name("timed_server.py")))
    with tempfile.TemporaryDirectory() as voices:
        for number in range(VOICES):
            # Nobody speaks with them: they are only looked through.
            Path(voices, f"voice-{number}.wav").touch()
        compare(argv, {**SETTINGS, "voices_dir": voices}, asked.rounds)


def compare(argv: Sequence[str], settings: Mapping[str, object], rounds: int) -> None:
    with tiny_server.Server(argv, settings) as server:
        for one in FORMATS:
            beyond_s, each_s = asyncio.run(measure(server, one, rounds))
            print(
                f"| {', '.join(str(value) for value in one.values())} | {each_s * 1000:.2f} "
                f"| {statistics.median(beyond_s):.3f} ({min(beyond_s):.3f} to {max(beyond_s):.3f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
