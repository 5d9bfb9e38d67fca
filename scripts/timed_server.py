"""The whole server around an engine that takes so many seconds for each piece, whatever it says: for benchmarks.

Settings come from the environment, as in a unit; SERVICE_S says how long, SOUND_S how much it says (2), PLACES how
many pieces it has in hand at once (1). The engine sleeps, so that two cores carry many such servers; all else is what
runs in a unit. Says a tone, and counts 25 tokens for each second of it.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from chatterbox_server import logs
from chatterbox_server.__main__ import serve
from chatterbox_server.engine import Errand, Sampling, Utterance
from chatterbox_server.settings import Settings
from host import front_lab, front_text
from host.front_lab import Front
from support.ports import free_ports

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

SOUND_S: Final = 2.0
RATE_HZ: Final = 24_000
START_TIMEOUT_S: Final = 60


class TimedEngine:
    """Each piece in the same time, whoever else is there."""

    name = "timed"
    model = "timed-1"
    sample_rate_hz = RATE_HZ
    longest_piece = 300
    tokens_per_audio_s: float | None = 25.0
    speeds = (1.0, 1.0)
    languages: tuple[str, ...] = ("en",)
    defaults = Sampling()
    frees_beside = True
    broken = None

    def __init__(self, service_s: float, *, sound_s: float = SOUND_S, places: int = 1) -> None:
        self._service_s = service_s
        self.places = places
        self._tone: NDArray[np.float32] = 0.5 * np.sin(
            2 * np.pi * 440 / RATE_HZ * np.arange(round(sound_s * RATE_HZ)), dtype=np.float32
        )

    def facts(self) -> Mapping[str, object]:
        return {"service_s": self._service_s}

    def memory(self) -> None:
        """It has no GPU."""

    def free(self) -> None:
        """It has nothing to free."""

    def synthesize(self, utterance: Utterance, errand: Errand) -> NDArray[np.float32]:  # noqa: ARG002  any takes as long
        began_s = time.monotonic()
        errand.make_way()
        with errand.at_work():
            time.sleep(max(0.0, began_s + self._service_s - time.monotonic()))
        return self._tone


@contextmanager
def fleet(count: int, service_s: float, directory: Path) -> Iterator[tuple[Front, Mapping[str, int]]]:
    """``count`` such servers behind nginx with the front that `render` writes, and their ports by name."""
    ports = {f"gpu{number}": port for number, port in enumerate(free_ports(count))}
    listen = free_ports(1)[0]
    with tempfile.TemporaryFile("w+") as log:
        servers = [_start(name, port, service_s, log.fileno()) for name, port in ports.items()]
        try:
            for port in ports.values():
                _wait(port)
            prefix = directory / f"nginx-{count}"
            text = front_text.render(ports, listen, prefix / "access.log", read_timeout_s=600)
            with Front(prefix, text, listen) as front:
                yield front, ports
        finally:
            for server in servers:
                server.terminate()
            for server in servers:
                server.wait(30)


def _start(name: str, port: int, service_s: float, log: int) -> subprocess.Popen[bytes]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("CHATTERBOX_")}
    environment |= {
        "SERVICE_S": str(service_s),
        "CHATTERBOX_INSTANCE": name,
        "CHATTERBOX_PORT": str(port),
        "CHATTERBOX_ORDER": "fifo",
        "CHATTERBOX_QUEUE_SIZE": "1000",
        "CHATTERBOX_MAX_WAIT_S": "600",
        "CHATTERBOX_CHECK_DURATION": "false",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen([sys.executable, __file__], env=environment, stdout=log, stderr=log)


def _wait(port: int) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as response:
                if response.status == 200:
                    return
        except OSError:
            if time.monotonic() > deadline_s:
                sys.exit(f"cannot start a server on port {port}")
            time.sleep(0.1)


def machine() -> str:
    nginx = subprocess.run([str(front_lab.NGINX), "-v"], capture_output=True, text=True, check=True).stderr
    nginx = nginx.strip().rpartition(" ")[2]
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} cores, load {load:.1f} before; {nginx}, Python {sys.version.split()[0]}"


async def _main() -> int:
    settings = Settings.from_environ(os.environ)
    service_s = float(os.environ["SERVICE_S"])
    sound_s, places = float(os.environ.get("SOUND_S", SOUND_S)), int(os.environ.get("PLACES", "1"))
    return await serve(settings, os.environ, lambda: TimedEngine(service_s, sound_s=sound_s, places=places))


if __name__ == "__main__":
    logs.setup(os.environ, sys.stderr)
    sys.exit(asyncio.run(_main()))
