"""A fleet in the foreground: the real ``chatterbox-deploy up``, and what it says."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class Up:
    """A running ``chatterbox-deploy up`` and what it has said so far."""

    def __init__(self, fleet_toml: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "chatterbox_deploy", "up", str(fleet_toml)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Else the voices of whoever runs the tests would be among those of the fleet.
            env=os.environ | {"XDG_STATE_HOME": str(fleet_toml.parent / "state")},
        )
        self._closed = threading.Event()
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        # Unbuffered and with select, so that closing the pipe never waits for a line.
        assert self.process.stdout
        pending = b""
        while not self._closed.is_set():
            if select.select([self.process.stdout], [], [], 0.05)[0]:
                read = os.read(self.process.stdout.fileno(), 65536)
                *lines, pending = (pending + read).split(b"\n")
                self.said.extend(f"{line.decode()}\n" for line in lines)
                if not read:
                    return

    def stop_reading(self) -> None:
        """As ``head`` does when it has seen enough."""
        self._closed.set()
        self._reader.join(timeout=10)
        assert self.process.stdout
        self.process.stdout.close()

    def wait_for(self, pattern: str, *, times: int = 1, limit_s: float = 60) -> None:
        """Until ``times`` lines match; fails with everything said when it ends or takes too long."""
        deadline = time.monotonic() + limit_s
        while sum(bool(re.search(pattern, line)) for line in self.said) < times:
            assert time.monotonic() < deadline, "".join(self.said)
            assert self.process.poll() is None or self._reader.is_alive(), "".join(self.said)
            time.sleep(0.05)

    def end(self) -> int:
        """As Ctrl-C does; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.wait()

    def wait(self) -> int:
        status = self.process.wait(timeout=60)
        self._reader.join(timeout=10)
        assert self.process.stdout
        self.process.stdout.close()
        return status


def get(url: str, body: bytes | None = None) -> tuple[bytes, str]:
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return response.read(), response.headers.get("X-Instance", "")


def processes_on(port: int) -> list[int]:
    found = subprocess.run(["ss", "-Htlnp", f"sport = :{port}"], capture_output=True, text=True, check=True).stdout
    return [int(pid) for pid in re.findall(r"pid=(\d+)", found)]
