"""The whole server around the tiny real model, on port 6093: `.venv-tests/bin/python scripts/tiny_server.py`.

`scripts/test` makes that environment; another needs chatterbox-tts, too. Settings come from the environment, as in a
unit: CHATTERBOX_PORT is another port, CHATTERBOX_ENGINE is ``stock`` (default) or ``fast``, CHATTERBOX_MODEL is
``chatterbox`` (default), ``turbo`` or ``multilingual``. Ctrl-C ends it. The classes are chatterbox-tts' own
(scripts/tiny_model.py), the weights random, so it babbles; no weights are on disk, so the one thing of ``python -m
chatterbox_server`` that is left out is loading.
"""

from __future__ import annotations

import argparse
import functools
import http.client
import os
import socket
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Self

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chatterbox_server.__main__ import main as serve
from chatterbox_server.engine import EngineError, Unable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chatterbox_server.engine import Engine
    from chatterbox_server.settings import Settings

START_TIMEOUT_S = 300

MAIN = (sys.executable, "-m", "chatterbox_server")
"""The server as its unit starts it."""


def tiny(*options: str) -> tuple[str, ...]:
    """This script as a server."""
    return (sys.executable, str(Path(__file__).resolve()), *options)


class Server:
    """One life of a server on a free port of 127.0.0.1, told ``settings`` (without their prefix) and nothing else."""

    def __init__(self, argv: Sequence[str], settings: Mapping[str, object]) -> None:
        self._argv = argv
        self.port = free_port()
        # One thread: more of them only wait for each other at this size. The hub cannot be asked here.
        self._environ = {name: value for name, value in os.environ.items() if not name.startswith("CHATTERBOX_")}
        self._environ |= {
            "OMP_NUM_THREADS": "1",
            "TQDM_DISABLE": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
        }
        self._environ |= {f"CHATTERBOX_{name.upper()}": str(value) for name, value in settings.items()}
        self._environ |= {"CHATTERBOX_PORT": str(self.port)}

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(self._argv, env=self._environ, stdout=self._log, stderr=self._log)
        began_s = time.monotonic()
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() - began_s > START_TIMEOUT_S:
                self.process.kill()
                self._log.seek(0)
                sys.exit(f"cannot start the server:\n{self._log.read()[-4000:]}")
            time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()

    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)

    def _answers(self) -> bool:
        connection = self.connect()
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        port: int = asked.getsockname()[1]
        return port


def machine() -> str:
    """Versions that matter here, and how busy the machine is with other work."""
    names = ("torch", "chatterbox-tts", "uvicorn", "fastapi", "av")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} cores, load {load:.1f} before; Python {sys.version.split()[0]}, {versions}"


def build(settings: Settings, *, eos_per_text: float, voices_kept: int) -> Engine:
    """The engine that ``settings`` name, if it could be heard.

    Raises:
        EngineError: the port is taken; ``Unable``, a package is missing.
    """
    # At once, not when the model is made.
    with socket.socket() as asked:
        asked.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            asked.bind((settings.host, settings.port))
        except OSError as error:
            msg = (
                f"cannot listen on {settings.host}:{settings.port}: {error.strerror}; `ss -ltnp` shows who does, and "
                "CHATTERBOX_PORT=6193 takes another port"
            )
            raise EngineError(msg) from None
    try:
        import torch
        from scripts import tiny_model
    except ImportError as error:
        msg = f"cannot import chatterbox-tts ({error}); `scripts/test` makes .venv-tests, which has it"
        raise Unable(msg) from error

    from chatterbox_server.engines.fast import FastEngine
    from chatterbox_server.engines.stock import Placement, StockEngine

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        model = tiny_model.tiny(settings.model, Path(name), eos_per_text=eos_per_text)
    if settings.engine == "fast":
        return FastEngine(
            model, settings.model, device="cpu", max_batch=settings.max_batch, source="tiny", voices_kept=voices_kept
        )
    return StockEngine(model, settings.model, placement=Placement("cpu", "cpu"), voices_kept=voices_kept)


def main() -> int:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eos-per-text", type=float, default=1.7, help="speech tokens for each token of text")
    parser.add_argument("--voices-kept", type=int, default=32, help="recordings whose conditionals are kept ready")
    asked = parser.parse_args()
    return serve(functools.partial(build, eos_per_text=asked.eos_per_text, voices_kept=asked.voices_kept))


if __name__ == "__main__":
    sys.exit(main())
