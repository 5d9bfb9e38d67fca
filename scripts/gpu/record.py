"""What NVML and nvidia-smi say on this machine: idle, under a load, and with two clients of an MPS daemon. Under 60 s.

    python scripts/gpu/record.py H200 tests/recorded

writes tests/recorded/nvml.H200-idle.json and nvidia-smi.H200-idle.xml, the same of -loaded and of -mps. NVML's answers
are as tests/support/recorded_nvml.py reads them. Of the machine they hold the card's own data and nothing else: paths
of programs are cut to their names, serial numbers of the chassis and the like to zeros. Needs torch, and NVIDIA's MPS
daemon for the third.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pynvml

from chatterbox_deploy.errors import CaptureError
from chatterbox_deploy.gpu import nvml, smi

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

LOAD = """
import torch
a = torch.randn(4096, 4096, device="cuda")
print("computes", flush=True)
while True:
    for _ in range(20):
        a = (a @ a).clamp(-1, 1)
    torch.cuda.synchronize()
"""
PRIVATE_TAGS = ("serial", "chassis_serial_number", "cluster_uuid", "host_id", "slot_number", "module_id")


class Recorder:
    """The functions of ``pynvml``; each answer is kept under its call."""

    def __init__(self) -> None:
        self.answers: dict[str, list[Any]] = {}
        self._names: dict[int, str] = {}
        """Of handles of GPUs, by their address."""

    def __getattr__(self, function: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            said = (self._named(each) for each in arguments)
            kept = self.answers.setdefault(f"{function}({', '.join(each for each in said if each is not None)})", [])
            try:
                answer = getattr(pynvml, function)(*arguments)
            except pynvml.NVMLError as error:
                kept.append({"NVMLError": error.value})
                raise
            except (pynvml.NVMLLibraryMismatchError, AttributeError, UnicodeDecodeError):
                kept.append({"NVMLError": pynvml.NVML_ERROR_FUNCTION_NOT_FOUND})
                raise
            if function == "nvmlDeviceGetHandleByIndex":
                self._names[self._address(answer)] = f"gpu{arguments[0]}"
                kept.append(f"gpu{arguments[0]}")
            else:
                kept.append(plain(answer))
            return answer

        return call

    def _named(self, value: Any) -> str | None:
        if isinstance(value, str | int):
            return str(value)
        return self._names.get(self._address(value)) if isinstance(value, ctypes._Pointer) else None  # noqa: SLF001

    @staticmethod
    def _address(handle: Any) -> int:
        return ctypes.cast(handle, ctypes.c_void_p).value or 0


def plain(value: Any) -> Any:
    """As JSON holds it; paths cut to the names of programs."""
    if isinstance(value, ctypes.Structure):
        fields = {name: getattr(value, name) for name, *_ in value._fields_}
        if "numMetrics" in fields:
            fields["metrics"] = list(fields["metrics"])[: fields["numMetrics"]]
        return {name: plain(each) for name, each in fields.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if hasattr(value, "__dict__"):
        return {name: plain(each) for name, each in vars(value).items()}
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, str):
        return program(value)
    return value if isinstance(value, int | float) else None


def program(command: str) -> str:
    """``python`` of ``/a/b/python -m c``."""
    return Path(command.split(maxsplit=1)[0]).name if command.startswith("/") else command


def anonymous(xml: str) -> str:
    """The card's own data and nothing else."""
    for tag in PRIVATE_TAGS:
        xml = re.sub(rf"(<{tag}>)(?!N/A|\[N/A\])[^<]+(</{tag}>)", r"\g<1>0\g<2>", xml)
    return re.sub(
        r"(<process_name>)([^<]+)(</process_name>)", lambda found: found[1] + program(found[2]) + found[3], xml
    )


def record(card: str, situation: str, folder: Path) -> None:
    recorder = Recorder()
    found = nvml.read(recorder)
    xml = anonymous(subprocess.run(smi.ASK_ARGV, capture_output=True, text=True, check=True, timeout=30).stdout)
    (folder / f"nvml.{card}-{situation}.json").write_text(json.dumps(recorder.answers, indent=1) + "\n")
    (folder / f"nvidia-smi.{card}-{situation}.xml").write_text(xml)
    print(f"{situation}\n  NVML        {found}")
    try:
        print(f"  nvidia-smi  {smi.parse(xml.encode(), source=situation).cards}", flush=True)
    except CaptureError as error:
        print(f"  nvidia-smi  {error}")


@contextmanager
def load(more: Mapping[str, str] | None = None) -> Iterator[None]:
    """A process that multiplies matrices on GPU 0 all the time."""
    process = subprocess.Popen(
        [sys.executable, "-c", LOAD], env={**os.environ, **(more or {})}, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "computes\n":
            msg = "cannot compute on GPU 0"
            raise SystemExit(msg)
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def daemon() -> Iterator[dict[str, str]]:
    """An MPS daemon; what its clients are told."""
    with tempfile.TemporaryDirectory(prefix="mps-") as directory:
        told = {"CUDA_MPS_PIPE_DIRECTORY": directory, "CUDA_MPS_LOG_DIRECTORY": directory}
        environment = {**os.environ, **told}
        subprocess.run(["nvidia-cuda-mps-control", "-d"], env=environment, check=True, timeout=30)
        try:
            yield told
        finally:
            subprocess.run(
                ["nvidia-cuda-mps-control"], input="quit -t 5\n", env=environment, text=True, check=False, timeout=30,
                stdout=subprocess.DEVNULL,
            )  # fmt: skip


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    card, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    record(card, "idle", folder)
    with load():
        time.sleep(3)
        record(card, "loaded", folder)
    if shutil.which("nvidia-cuda-mps-control") is None:
        print("mps\n  no nvidia-cuda-mps-control here")
        return
    with daemon() as told, ExitStack() as clients:
        for _ in range(2):
            clients.enter_context(load(told))
        time.sleep(3)
        record(card, "mps", folder)


if __name__ == "__main__":
    main()
