"""How much sooner does a stream begin than it ends? `python scripts/bench_first_byte.py`.

Texts of 1, 5 and 20 sentences as mp3, to the espeak engine and to the tiny model of the real chatterbox-tts classes,
the whole server as a process, one client. One sentence comes whole, so its first byte is its last; of more the first
byte leaves when the first piece is spoken. A busy machine slows both, so look at the share. Fails when 20 sentences
take more than a fifth of their time to begin.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts import tiny_server

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SENTENCES: Final = (
    "The quick brown fox jumps over the lazy dog.",
    "Then it sits down in the shade of an old tree to listen to the river below it.",
    "Nobody had told it that the dog was not asleep.",
    "So it stayed there until the evening, when the wind turned and the first lamps were lit in the town.",
    "What a day that was!",
)
COUNTS: Final = (1, 5, 20)
REPEATS: Final = 5
LARGEST_SHARE: Final = 0.2
"""Of the whole time of the longest text, until its first byte."""

ENGINES: Final[dict[str, tuple[Sequence[str], Mapping[str, object]]]] = {
    "espeak": (tiny_server.MAIN, {"engine": "espeak"}),
    "chatterbox, tiny": (tiny_server.tiny(), {"device": "cpu"}),
}


@dataclass(frozen=True, slots=True)
class Heard:
    first_byte_s: float
    whole_s: float
    content: int
    """Bytes of mp3."""

    @property
    def share(self) -> float:
        return self.first_byte_s / self.whole_s


def text(count: int) -> str:
    return " ".join(SENTENCES[number % len(SENTENCES)] for number in range(count))


def listen(server: tiny_server.Server, said: str) -> Heard:
    connection = server.connect()
    connection.connect()
    body = json.dumps({"input": said, "seed": 1})
    began_s = time.perf_counter()
    connection.request("POST", "/v1/audio/speech", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    first = answer.read(1)
    first_byte_s = time.perf_counter() - began_s
    rest = answer.read()
    whole_s = time.perf_counter() - began_s
    assert answer.status == 200, first + rest
    connection.close()
    return Heard(first_byte_s, whole_s, len(first + rest))


def row(engine: str, count: int, heard: Sequence[Heard]) -> str:
    said = text(count)
    first_s, whole_s, share = (
        statistics.median(getattr(one, name) for one in heard) for name in ("first_byte_s", "whole_s", "share")
    )
    shares = [one.share for one in heard]
    return (
        f"| {engine} | {count} | {len(said):,} | {heard[0].content / 1000:.0f} | {first_s:.3f} | {whole_s:.3f} "
        f"| {share:.1%} ({min(shares):.1%} to {max(shares):.1%}) |"
    )


def main() -> int:
    """Print one table; 1 if the longest text begins too late."""
    print(f"python scripts/bench_first_byte.py: {tiny_server.machine()}")
    print(f"Medians of {REPEATS}, after one that is not counted.\n")
    print("| engine | sentences | characters | kB of mp3 | first byte s | whole s | first / whole |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    late = []
    for engine, (argv, settings) in ENGINES.items():
        with tiny_server.Server(argv, settings) as server:
            listen(server, text(1))
            for count in COUNTS:
                heard = [listen(server, text(count)) for _ in range(REPEATS)]
                print(row(engine, count, heard), flush=True)
            share = statistics.median(one.share for one in heard)
            if share > LARGEST_SHARE:
                late.append(f"{engine}: {share:.1%}")
    print(f"\n{COUNTS[-1]} sentences begin within {LARGEST_SHARE:.0%} of their time: {'; '.join(late) or 'met'}")
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
