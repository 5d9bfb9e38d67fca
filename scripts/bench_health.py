"""How long do /healthz, /readyz and /metrics take while the engine works flat out? `python scripts/bench_health.py`.

    python scripts/bench_health.py | tee scripts/bench_health.txt
    python scripts/bench_health.py --device cuda --weights /tmp/weights     # a full-size model on a GPU

The whole server around the real chatterbox-tts classes, which hold Python's lock as they do with real weights; without
``--weights`` the tiny model, on one thread of the CPU. Clients keep the queue full: mp3 streams, sounds that come
whole, a book of 100,000 characters, recordings as voices, and one that uploads them. A process of its own asks, on a
kept connection as nginx does, and on new ones. "control" is a bare server beside it that does nothing else: what it
shows is the machine's. Fails when the p99 of /healthz is 50 ms or more.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import io
import itertools
import json
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts import tiny_server

from chatterbox_server import audio

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from multiprocessing.connection import Connection

GOAL_S: Final = 0.050
EVERY_S: Final = 0.01
"""Between two questions; they take turns."""

SENTENCE: Final = "The quick brown fox jumps over the lazy dog, and then it sits down in the shade. "
BOOK_CHARS: Final = 100_000
NEW: Final = "/healthz, new connection"
CONTROL: Final = "control"
ASKED: Final = ("/healthz", "/readyz", "/healthz", "/metrics", "/healthz", NEW, CONTROL)


# -- who asks ---------------------------------------------------------------------------------------------


def ask_for(seconds: float, port: int, control_port: int, told: Connection) -> None:
    """In a process of its own: seconds from each question to the last byte of its answer, by name."""
    kept = {True: _connect(control_port), False: _connect(port)}
    took_s: dict[str, list[float]] = {name: [] for name in ASKED}
    ends_s = time.monotonic() + seconds
    for name in itertools.cycle(ASKED):
        if time.monotonic() > ends_s:
            break
        began_s = time.perf_counter()
        connection = _connect(port) if name == NEW else kept[name == CONTROL]
        connection.request("GET", name.split(",")[0] if name.startswith("/") else "/")
        answer = connection.getresponse()
        answer.read()
        took_s[name].append(time.perf_counter() - began_s)
        assert answer.status == 200, (name, answer.status)
        if name == NEW:
            connection.close()
        time.sleep(EVERY_S)
    told.send(took_s)


def _connect(port: int) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", port, timeout=60)


def serve_control(port: int) -> None:
    """In a process of its own: the least that an asyncio server can do."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Our questions are short enough to come in one piece.
        while await reader.read(65536):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async def serve() -> None:
        await (await asyncio.start_server(answer, "127.0.0.1", port)).serve_forever()

    asyncio.run(serve())


# -- who keeps the queue full -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Client:
    """Sends the same request for ever, after a pause."""

    name: str
    body: Mapping[str, object]
    pause_s: float = 0.0


CLIENTS: Final = (
    *[Client("mp3 stream", {"input": SENTENCE * 10})] * 3,
    Client("opus events", {"input": SENTENCE * 5, "stream_format": "sse", "response_format": "opus"}),
    *[Client("whole mp3", {"input": SENTENCE})] * 2,
    Client("whole flac", {"input": SENTENCE, "response_format": "flac"}),
    Client("book, wav stream", {"input": SENTENCE * (BOOK_CHARS // len(SENTENCE)), "response_format": "wav"}),
    Client("voice read anew", {"input": "Hello there.", "voice": "anna"}, pause_s=1.0),
    *[Client("short wav", {"input": "Hello there.", "response_format": "wav"})] * 3,
)


class Load:
    """Threads that send ``CLIENTS``' requests and count what came of them."""

    def __init__(self, server: tiny_server.Server) -> None:
        self._server = server
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._send, args=(client,)) for client in CLIENTS]
        self._threads.append(threading.Thread(target=self._upload))
        self.outcomes: Counter[str] = Counter()

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _send(self, client: Client) -> None:
        while not self._stopping.wait(client.pause_s):
            connection = self._server.connect()
            body = json.dumps(client.body)
            connection.request("POST", "/v1/audio/speech", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            while answer.read1(65536) and not self._stopping.is_set():
                pass
            connection.close()
            if answer.status == 503:
                self._stopping.wait(0.2)
            self.outcomes[f"{client.name} {answer.status}"] += 1

    def _upload(self) -> None:
        """The same voice in new words, so that the engine reads it again each time."""
        for number in itertools.count():
            if self._stopping.wait(2.0):
                return
            body, media_type = upload(number)
            connection = self._server.connect()
            connection.request("POST", "/v1/audio/voices", body, {"Content-Type": media_type})
            answer = connection.getresponse()
            answer.read()
            connection.close()
            self.outcomes[f"upload {answer.status}"] += 1


def upload(number: int) -> tuple[bytes, str]:
    """A form with ten seconds of noise in mp3."""
    noise = np.random.default_rng(number).normal(0, 0.1, 10 * 24_000).astype(np.float32)
    form = io.BytesIO()
    for field, value in ((b"name", b"anna"), (b"replace", b"true")):
        form.write(b'--b\r\nContent-Disposition: form-data; name="' + field + b'"\r\n\r\n' + value + b"\r\n")
    form.write(b'--b\r\nContent-Disposition: form-data; name="audio_sample"; filename="a.mp3"\r\n')
    form.write(b"Content-Type: audio/mpeg\r\n\r\n" + audio.encode(noise, 24_000, "mp3") + b"\r\n--b--\r\n")
    return form.getvalue(), "multipart/form-data; boundary=b"


# -- what came of it --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seen:
    took_s: Mapping[str, Sequence[float]]
    busy: float
    """Share of the time in which the engine spoke."""
    waiting: float
    """Requests that waited, on average."""


def measure(server: tiny_server.Server, control_port: int, seconds: float) -> Seen:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    asking = context.Process(target=ask_for, args=(seconds, server.port, control_port, theirs))
    asking.start()
    began_s, spent_s, waiting = time.monotonic(), synthesis_s(server), []
    while not ours.poll(0.5):
        waiting.append(int(json.loads(get(server, "/readyz"))["waiting"]))
        assert asking.is_alive() or ours.poll(0), "who asks has ended; its reason is above"
    busy = (synthesis_s(server) - spent_s) / (time.monotonic() - began_s)
    took_s = ours.recv()
    asking.join()
    return Seen(took_s, busy, statistics.mean(waiting))


def get(server: tiny_server.Server, path: str) -> bytes:
    connection = server.connect()
    connection.request("GET", path)
    said = connection.getresponse().read()
    connection.close()
    return said


def synthesis_s(server: tiny_server.Server) -> float:
    """Seconds that the engine has spoken, of the utterances that have ended."""
    lines = get(server, "/metrics").decode().splitlines()
    return float(next(line for line in lines if line.startswith("chatterbox_synthesis_seconds_total ")).split()[1])


def percentile_ms(took_s: Sequence[float], share: float) -> float:
    return sorted(took_s)[min(len(took_s) - 1, int(len(took_s) * share))] * 1000


def rows(state: str, seen: Seen) -> list[str]:
    columns: tuple[Callable[[Sequence[float]], float], ...] = (
        lambda took_s: percentile_ms(took_s, 0.5),
        lambda took_s: percentile_ms(took_s, 0.9),
        lambda took_s: percentile_ms(took_s, 0.99),
        lambda took_s: max(took_s) * 1000,
    )
    return [
        f"| {state} | {name} | {len(took_s):,} | " + " | ".join(f"{column(took_s):.1f}" for column in columns) + " |"
        for name, took_s in seen.took_s.items()
    ]


def main() -> int:
    """Print one table; 1 if the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="a checkpoint; without it the tiny model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=("chatterbox", "turbo", "multilingual"), default="chatterbox")
    parser.add_argument("--seconds", type=float, default=90.0)
    asked = parser.parse_args()
    argv = tiny_server.tiny() if asked.weights is None else tiny_server.MAIN
    settings: dict[str, object] = {"device": asked.device, "model": asked.model}
    if asked.weights is not None:
        settings["weights"] = asked.weights.resolve()
    print(f"{' '.join(['python', 'scripts/bench_health.py', *sys.argv[1:]])}: {tiny_server.machine()}", flush=True)
    control_port = tiny_server.free_port()
    control = multiprocessing.get_context("spawn").Process(target=serve_control, args=(control_port,), daemon=True)
    control.start()
    with (
        tempfile.TemporaryDirectory() as voices,
        tiny_server.Server(argv, settings | {"voices_dir": voices}) as server,
    ):
        idle = measure(server, control_port, asked.seconds / 6)
        with Load(server) as load:
            time.sleep(5)
            busy = measure(server, control_port, asked.seconds)
    control.terminate()
    print(f"flat out: engine busy {busy.busy:.0%} of {asked.seconds:.0f} s, {busy.waiting:.1f} waiting on average")
    print("answered: " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(load.outcomes.items())))
    print("\n| engine | asked | times | p50 ms | p90 | p99 | max |\n| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    print("\n".join(rows("idle", idle) + rows("flat out", busy)))
    p99_ms = percentile_ms(busy.took_s["/healthz"], 0.99)
    met = p99_ms < GOAL_S * 1000
    print(f"\n/healthz flat out: p99 {p99_ms:.1f} ms, goal below {GOAL_S * 1000:.0f} ms: {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
