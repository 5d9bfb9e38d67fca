"""The stock engine on this GPU, started as its unit starts it: what /readyz says, how fast, how much memory.

    python scripts/gpu/stock_server.py | tee scripts/gpu/stock_server.txt
    python scripts/gpu/stock_server.py --sweep chatterbox     # its settings one by one, too

Weights are random at full size (scripts/tiny_model.py): the arithmetic, memory and time of the real model,
noise for speech. Each server gets exactly the Environment= and ExecStart= of a unit that
`chatterbox-deploy render` wrote, beside what this machine needs to find Python packages and the CUDA driver.
Fails if /readyz does not show TF32 and cudnn.benchmark on, or a pinned GPU.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
PORT = 6093

# About 10 s of audio: 1.7 speech tokens for each of these letters, 25 tokens a second.
TEXT = (
    "The quick brown fox jumps over the lazy dog, and then it sits down in the shade of an old tree "
    "to listen to the song of the river below it."
)

FROM_THIS_MACHINE = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "HOME")


@dataclass(frozen=True)
class Case:
    model: str = "chatterbox"
    server: str = ""
    """More lines of [server]."""

    @property
    def name(self) -> str:
        return ", ".join([self.model, *self.server.split("\n")]).rstrip(", ")


SWEEP = (
    Case(server="tf32 = false\ncudnn_benchmark = false"),
    Case(server="autocast = 'fp16'"),
    Case(server="autocast = 'bf16'"),
    Case(server="cpu_threads = 1"),
    Case(server="cpu_threads = 8"),
)

HEADING = (
    f"{'server':<52} {'start s':>7} {'audio s':>7} {'RTF':>6} {'min-max':>11} {'GPU GiB':>8} {'alloc':>6} "
    f"{'reserved':>8} {'host GiB':>8} {'launches/s':>10}  seed repeats"
)
NOTES = """
RTF: seconds of synthesis per second of audio, median of 3 after one warm-up. GPU: the driver's count over an idle
card; alloc and reserved: torch's. Launches/s: how many empty kernels one core of this machine launched just before;
the stock engine is bound by that, and on a shared machine it changes from minute to minute. Seed repeats: whether
the same seed gave the same bytes twice (cuDNN may choose another algorithm the second time).
"""


def render_unit(case: Case, weights: Path, directory: Path) -> dict[str, list[str]]:
    """Settings of the [Service] section that the kit wrote for GPU 0."""
    (directory / "fleet.toml").write_text(
        f"[gpus]\n0 = {PORT}\n[server]\nmodel = '{case.model}'\nweights = '{weights}'\n"
        f"python = '{sys.executable}'\nlongest_utterance_s = 600\ncheck_duration = false\n{case.server}\n"
    )
    subprocess.run(
        [sys.executable, "-m", "chatterbox_deploy", "render", directory / "fleet.toml", "--output", directory / "out"],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    settings: dict[str, list[str]] = {}
    for line in (directory / "out/etc/systemd/system/chatterbox-tts-gpu0.service").read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            settings.setdefault(name, []).append(value)
    return settings


class Server:
    """One life of the server, with the sd_notify socket that systemd would give it."""

    def __init__(self, unit: dict[str, list[str]], directory: Path) -> None:
        notify_path = directory / "notify"
        notify_path.unlink(missing_ok=True)
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(notify_path))
        self._notify.settimeout(1)
        words = chain.from_iterable(shlex.split(value) for value in unit["Environment"])
        environment = {name: os.environ[name] for name in FROM_THIS_MACHINE if name in os.environ}
        environment |= dict(word.split("=", 1) for word in words)
        environment |= {"NOTIFY_SOCKET": str(notify_path), "INVOCATION_ID": "0123456789abcdef"}
        self.process = subprocess.Popen(shlex.split(unit["ExecStart"][0]), env=environment, cwd=CHECKOUT)

    def wait_ready(self) -> float:
        """Seconds until READY=1."""
        begin = time.monotonic()
        said = b""
        while b"READY=1" not in said:
            assert self.process.poll() is None, "the server ended; its reason is above"
            with suppress(TimeoutError):
                said = self._notify.recv(4096)
        return time.monotonic() - begin

    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) * 1024

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self._notify.close()


def get(path: str) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}{path}", timeout=30) as response:
        return json.load(response)


def speak(**fields: object) -> tuple[bytes, float, float]:
    """Audio, its seconds, and seconds of synthesis as the server measured them."""
    body = json.dumps({"input": TEXT, "response_format": "pcm", **fields}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/audio/speech", data=body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        audio_s = float(response.headers["X-Audio-Duration"])
        return response.read(), audio_s, audio_s * float(response.headers["X-Real-Time-Factor"])


def gpu_memory_bytes() -> int:
    """What the driver counts on GPU 0, all processes; ours is the only one here."""
    said = subprocess.run(
        ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(said.stdout) * 1024**2


def launches_per_s() -> float:
    """Median of 5: speed of the core that feeds the GPU."""
    import torch

    number = torch.zeros(1, device="cuda")
    rates: list[float] = []
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(20_000):
            number.add_(1)
        torch.cuda.synchronize()
        rates.append(20_000 / (time.perf_counter() - begin))
    return statistics.median(rates)


def measure(case: Case, weights: Path, directory: Path, idle_bytes: int) -> str:
    launches = launches_per_s()
    server = Server(render_unit(case, weights, directory), directory)
    try:
        start_s = server.wait_ready()
        ready = check_ready(case)
        speak(seed=1)
        runs = [speak(seed=seed) for seed in (2, 3, 4)]
        again = speak(seed=4)[0] == runs[-1][0]
        factor = [synthesis_s / audio_s for _, audio_s, synthesis_s in runs]
        now = get("/readyz")["gpu_memory"]
        if case == Case():
            print(f"/readyz: {json.dumps(ready, indent=2)}\n\n{HEADING}", flush=True)
        return (
            f"{case.name:<52} {start_s:7.1f} {statistics.median(run[1] for run in runs):7.2f} "
            f"{statistics.median(factor):6.3f} {min(factor):6.3f}-{max(factor):.3f} "
            f"{(gpu_memory_bytes() - idle_bytes) / 2**30:8.2f} {now['allocated_bytes'] / 2**30:6.2f} "
            f"{now['reserved_bytes'] / 2**30:8.2f} {server.resident_bytes() / 2**30:8.2f} "
            f"{launches:10.0f}  {'same' if again else 'differs'}"
        )
    finally:
        server.end()


def check_ready(case: Case) -> Any:
    ready = get("/readyz")
    facts = ready["facts"]
    on = "tf32 = false" not in case.server
    assert facts["tf32"] == {"matmul": on, "cudnn": on}, facts
    assert facts["cudnn_benchmark"] is on, facts
    assert facts["cudnn_deterministic"] is False, facts
    assert ready["visible_gpus"] == ["0"], ready
    assert ready["invocation_id"] == "0123456789abcdef", ready
    return ready


def main() -> None:
    models = [word for word in sys.argv[1:] if word != "--sweep"] or ["chatterbox", "turbo", "multilingual"]
    print(subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout.strip())
    print(
        f"{os.cpu_count()} cores, Python {sys.version.split()[0]}; full-size random weights; {len(TEXT)} characters\n"
    )
    launches_per_s()
    idle_bytes = gpu_memory_bytes()
    with tempfile.TemporaryDirectory() as name:
        for model in models:
            weights = Path(name) / model
            subprocess.run(
                [sys.executable, CHECKOUT / "scripts/tiny_model.py", "full", weights, "--kind", model,
                 "--eos-per-text", "1.7"],
                check=True, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            sweep = [case for case in SWEEP if case.model == model and "--sweep" in sys.argv]
            for case in (Case(model), *sweep):
                print(measure(case, weights, Path(name), idle_bytes), flush=True)
    print(NOTES)


if __name__ == "__main__":
    main()
