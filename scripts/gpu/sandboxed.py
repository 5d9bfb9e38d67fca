"""Does the GPU still work under the hardening of a rendered unit? Each setting by itself, then all, without systemd.

    sudo python scripts/gpu/sandboxed.py | tee scripts/gpu/sandboxed.txt
    sudo python scripts/gpu/sandboxed.py /etc/systemd/system/chatterbox-tts-gpu0.service

Puts on what a process can put on itself (hardening.py beside this) and says what it cannot. Under each: memory from
CUDA, a matrix product, a convolution that cuDNN searches an algorithm for, pinned host memory, kernels compiled by
NVRTC, by the driver from PTX and by torch.compile. Under all of them, where chatterbox-tts is installed: the server,
started as its unit starts it, speaks. Nothing of it may lie in /tmp, /home or /root, which the settings hide. Changes
nothing on this machine; fails if the GPU works only without the unit's settings. Without a GPU it says what it could
put on.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import hardening
from stock_server import CHECKOUT, FROM_THIS_MACHINE, Case, Server, render_unit, speak

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

UNIT = CHECKOUT / "tests/golden/memory-guard/rendered/etc/systemd/system/chatterbox-tts-gpu0.service"

# fmt: off
NOT_HARDENING = frozenset((
    "Type", "NotifyAccess", "WatchdogSec", "WorkingDirectory", "ExecStart", "ExecReload", "SyslogIdentifier",
    "TimeoutStartSec", "TimeoutStopSec", "KillMode", "Restart", "RestartSec", "RestartPreventExitStatus", "Environment",
    "EnvironmentFile", "ExecStopPost", "CPUAffinity",
    "SystemCallErrorNumber",  # put on with SystemCallFilter=, always as EPERM
))
# fmt: on

ONLY_SYSTEMD = {
    "DynamicUser": "gives the user a name and takes it back; the user itself is tried",
    "StateDirectory": "directories of its own stand in for it",
    "CacheDirectory": "directories of its own stand in for it",
    "RuntimeDirectory": "made before the process starts",
    "RuntimeDirectoryMode": "made before the process starts",
    "RuntimeDirectoryPreserve": "kept after it ended",
    "ReadWritePaths": "the pipes of an MPS daemon; mps_sandboxed.py beside this tries it with one",
    "RemoveIPC": "cleans up after the process ended",
    "LoadCredential": "read by systemd before the process starts",
    "IPAddressDeny": "a BPF program of the control group",
    "IPAddressAllow": "a BPF program of the control group",
}

NOT_IN_THE_UNIT = (
    "MemoryDenyWriteExecute=yes",
    "PrivateDevices=yes",
    "PrivateUsers=yes",
    "ProcSubset=pid",
    "SystemCallFilter=~@resources",
)

AT_ONCE = 8
TRIAL_S = 90


# What runs inside: this file again, which then imports torch.

PTX = """
.version 7.0
.target sm_75
.address_size 64
.visible .entry answer(.param .u64 where) {{
  .reg .u64 %p; .reg .u32 %v;
  ld.param.u64 %p, [where]; cvta.to.global.u64 %p, %p; mov.u32 %v, {answer}; st.global.u32 [%p], %v; ret;
}}
"""


def work() -> None:
    """Print a line of JSON for each thing tried on the GPU: its name, and the error or null."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("torch.cuda.is_available() is false")
    torch.backends.cudnn.benchmark = True

    def memory() -> None:
        assert torch.cuda.mem_get_info()[0] > 0
        torch.ones(10**9, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()

    def matrix_product() -> None:
        left, right = torch.rand(256, 256), torch.rand(256, 256)
        assert torch.allclose((left.cuda() @ right.cuda()).cpu(), left @ right, rtol=1e-2)

    def convolution() -> None:
        assert torch.nn.Conv1d(64, 64, 7).cuda()(torch.rand(4, 64, 4000, device="cuda")).isfinite().all()

    def pinned() -> None:
        host = torch.ones(2**26, dtype=torch.uint8).pin_memory()
        assert host.to("cuda", non_blocking=True).sum().item() == 2**26

    def nvrtc() -> None:
        # The number is new each time, so no cache holds the kernel.
        source = f"template <typename T> T shifted(T x) {{ return x + T({os.getpid()}); }}"
        shifted = torch.cuda.jiterator._create_jit_fn(source)  # noqa: SLF001, the one way to NVRTC that torch shows
        assert shifted(torch.zeros(1, device="cuda")).item() == os.getpid()

    def ptx() -> None:
        cuda = ctypes.CDLL("libcuda.so.1")
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        place = torch.zeros(1, dtype=torch.int32, device="cuda")
        where = ctypes.c_uint64(place.data_ptr())
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(where))
        code = PTX.format(answer=os.getpid()).encode()
        assert cuda.cuModuleLoadData(ctypes.byref(module), code) == 0, "cuModuleLoadData"
        assert cuda.cuModuleGetFunction(ctypes.byref(function), module, b"answer") == 0, "cuModuleGetFunction"
        launched = cuda.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, None, arguments, None)
        assert launched == 0, "cuLaunchKernel"
        assert place.item() == os.getpid()

    def compiled() -> None:
        numbers = torch.rand(1000, device="cuda")
        assert torch.allclose(torch.compile(lambda x: x.sin() + x.cos())(numbers), numbers.sin() + numbers.cos())

    tries: tuple[tuple[str, Callable[[], None]], ...] = (
        ("memory", memory),
        ("matrix product", matrix_product),
        ("convolution", convolution),
        ("pinned memory", pinned),
        ("NVRTC", nvrtc),
        ("PTX", ptx),
        ("torch.compile", compiled),
    )
    for what, run in tries:
        error = None
        try:
            run()
        except Exception as failed:  # noqa: BLE001, whatever it is, it is the answer
            error = f"{type(failed).__name__}: {failed}".strip().splitlines()[0]
        print(json.dumps({"what": what, "error": error}), flush=True)


# What runs outside.


@dataclass(frozen=True)
class Outcome:
    put_on: bool
    errors: dict[str, str | None]
    """What was tried on the GPU, and why it failed."""
    said: str = ""
    """The last line on stderr of one that did not get to its end."""


@dataclass(frozen=True)
class Bench:
    """Directories that stand in for those of the service, and its environment."""

    root: Path
    environment: dict[str, str]
    """As the unit says it, with places that are relative to a trial's own directory still to be filled in."""
    control_group: Path | str
    """One with MemoryMax= set, or why there is none."""

    def trial(self, lines: Sequence[str]) -> Outcome:
        """What the work finds under the settings that ``lines`` ask for."""
        if isinstance(self.control_group, str) and any(line.startswith("MemoryMax=") for line in lines):
            return Outcome(put_on=False, errors={}, said=self.control_group)
        own, argv = self.wrap(lines)
        inside = [sys.executable, str(self.root / "code/gpu/sandboxed.py"), "--work"]
        with subprocess.Popen(
            [*argv, *inside], env=self.environment_in(own), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                stdout, stderr = process.communicate(timeout=TRIAL_S)
            except subprocess.TimeoutExpired:
                process.kill()
                stdout, stderr = process.communicate()
                stderr += f"\ndid not end within {TRIAL_S} s"
        errors = {said["what"]: said["error"] for said in map(json.loads, stdout.splitlines())}
        last = (stderr.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        put_on = not last.startswith(hardening.SAYS)
        return Outcome(put_on, errors, last.removeprefix(hardening.SAYS) if process.returncode else "")

    def wrap(self, lines: Sequence[str]) -> tuple[Path, list[str]]:
        """A directory for one trial, and the start of its command."""
        own = Path(tempfile.mkdtemp(dir=self.root / "own"))
        own.chmod(0o777)
        words = [line for line in lines if not line.startswith("MemoryMax=")]
        if len(words) < len(lines):
            words.append(f"cgroup={self.control_group}")
        return own, [sys.executable, str(CHECKOUT / "scripts/gpu/hardening.py"), f"own={own}", *words, "--"]

    def environment_in(self, own: Path) -> dict[str, str]:
        environment = {name: value.replace("OWN", str(own)) for name, value in self.environment.items()}
        # Trials that run side by side would meet in /tmp.
        return environment | {"TMPDIR": str(own), "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def service_of(unit: Path) -> list[str]:
    """Lines of the [Service] section."""
    section = unit.read_text().split("[Service]\n")[1].split("\n[")[0]
    return [line for line in section.splitlines() if line and line[0] not in "#;"]


def environment_of(lines: Sequence[str], code: Path) -> dict[str, str]:
    values = [line.removeprefix("Environment=") for line in lines if line.startswith("Environment=")]
    words = [word for value in values for word in shlex.split(value)]
    told = dict(word.split("=", 1) for word in words)
    for place in ("/var/cache/chatterbox-tts", "/var/lib/chatterbox-tts"):
        told = {name: value.replace(place, "OWN") for name, value in told.items()}
    here = {name: os.environ[name] for name in FROM_THIS_MACHINE if name in os.environ}
    # As systemd gives them to a dynamic user.
    here |= {"HOME": "/", "USER": "chatterbox", "LOGNAME": "chatterbox"}
    return here | told | {"PYTHONPATH": f"{code}:{here.get('PYTHONPATH', '')}"}


@contextlib.contextmanager
def control_group(lines: Sequence[str], root: Path) -> Iterator[Path | str]:
    """A control group with the unit's MemoryMax=, or why there is none."""
    limit = next((line.removeprefix("MemoryMax=") for line in lines if line.startswith("MemoryMax=")), None)
    if limit is None:
        yield "not set"
        return
    place = root / "cgroup"
    try:
        # Of our own, on a mount that no one else sees.
        group, name = memory_controller(place)
    except OSError as error:
        yield f"cannot: {error}"
        return
    try:
        (group / name).write_text(limit)
        yield group
    finally:
        group.rmdir()
        hardening.call("umount2", str(place).encode(), 2)


def memory_controller(place: Path) -> tuple[Path, str]:
    """A new control group below ``place``, and the file that limits its memory."""
    place.mkdir()
    name = "memory.max"
    hardening.mount("none", place, "cgroup2")
    if "memory" in (place / "cgroup.controllers").read_text().split():
        (place / "cgroup.subtree_control").write_text("+memory")
    else:
        hardening.call("umount2", str(place).encode(), 0)
        name = "memory.limit_in_bytes"
        hardening.mount("none", place, "cgroup", options="memory")
    group = place / f"sandboxed-{os.getpid()}"
    group.mkdir()
    return group, name


@contextlib.contextmanager
def bench(lines: Sequence[str]) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(dir="/opt", prefix="sandboxed-") as name:
        root = Path(name)
        root.chmod(0o755)
        (root / "own").mkdir()
        shutil.copytree(CHECKOUT / "src", root / "code", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(CHECKOUT / "scripts/gpu", root / "code/gpu", ignore=shutil.ignore_patterns("__pycache__"))
        with control_group(lines, root) as group:
            yield Bench(root, environment_of(lines, root / "code"), group)


def verdict(outcome: Outcome, without: Outcome) -> str:
    """Whether what works on the GPU without the settings works with them."""
    works = [what for what, error in without.errors.items() if error is None]
    if not outcome.put_on or not works:
        return "-"
    found = {what: outcome.errors.get(what, outcome.said or "not reached") for what in works}
    failed = [f"{what}: {error}" for what, error in found.items() if error]
    return "yes" if not failed else f"no, {len(failed)} of {len(works)} fail: {failed[0]}"


@dataclass(frozen=True)
class Row:
    setting: str
    lines: list[str]
    how: str

    def show(self, outcome: Outcome, without: Outcome) -> None:
        how = self.how if outcome.put_on else outcome.said
        print(f"{self.setting:<50} {how:<62} {verdict(outcome, without)}", flush=True)


def rows_of(lines: Sequence[str]) -> Iterator[Row]:
    yield from (Row(line, [line], "a control group") for line in lines if line.startswith("MemoryMax="))
    for key, _ in hardening.grouped(lines):
        setting = hardening.SETTINGS[key]
        own = [line for line in lines if line.partition("=")[0] in {key, setting.with_key}]
        # A key that is given twice is said once.
        first, *rest = own
        yield Row(" ".join([first, *(line.removeprefix(f"{key}=") for line in rest)]), own, setting.how)


def speak_under(bench: Bench, lines: Sequence[str], weights: Path, case: Case) -> str:
    """Start the server as its unit starts it, under the settings, and have it say a sentence."""
    own, argv = bench.wrap(lines)
    for path in weights.iterdir():
        # safetensors 0.8 writes files that only their owner may read, and says "no such file" to anyone else.
        path.chmod(0o644)
    directory = bench.root / "server"
    directory.mkdir()
    unit = render_unit(case, weights, directory)
    unit["ExecStart"] = [shlex.join([*argv, *shlex.split(unit["ExecStart"][0])])]
    environment = {name: bench.environment_in(own)[name] for name in ("HOME", "USER", "LOGNAME", "PYTHONPATH")}
    unit["Environment"] = [
        *(value.replace("/var/cache/chatterbox-tts", str(own)) for value in unit["Environment"]),
        f"CHATTERBOX_VOICES_DIR={own}/voices",
        *(f"{name}={value}" for name, value in environment.items()),
    ]
    # systemd's notify socket is everyone's to write to.
    os.umask(0)
    server = Server(unit, directory)
    try:
        ready_s = server.wait_ready()
        _, audio_s, synthesis_s = speak(seed=1)
        user = Path(f"/proc/{server.process.pid}").stat().st_uid
        return f"ready after {ready_s:.1f} s, {audio_s:.1f} s of sound in {synthesis_s:.1f} s, user {user}"
    finally:
        server.end()


def machine() -> str:
    gpus = ""
    if shutil.which("nvidia-smi"):
        gpus = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout.strip()
    return f"{gpus or 'no GPU'}\n{os.cpu_count()} cores, Linux {os.uname().release}, Python {sys.version.split()[0]}"


def print_all(place: Bench, lines: Sequence[str], weights: Path) -> None:
    """The tables."""
    without = place.trial(())
    for what, error in without.errors.items() or {"nothing to try": without.said}.items():
        print(f"without any setting: {what}: {error or 'works'}")
    gpu = any(error is None for error in without.errors.values())
    writing = None
    if gpu and importlib.util.find_spec("chatterbox"):
        model = [sys.executable, str(CHECKOUT / "scripts/tiny_model.py"), "full", str(weights), "--eos-per-text", "1.7"]
        writing = subprocess.Popen(model, stdout=subprocess.DEVNULL)

    rows = list(rows_of(lines))
    more = [Row(line, [line], hardening.SETTINGS[line.partition("=")[0]].how) for line in NOT_IN_THE_UNIT]
    could: list[str] = []
    print(f"\n{'setting':<50} {'put on how, or why not':<62} the GPU works")
    with ThreadPoolExecutor(AT_ONCE if gpu else 1) as pool:
        for row, outcome in zip(rows, pool.map(lambda row: place.trial(row.lines), rows), strict=True):
            row.show(outcome, without)
            could += row.lines if outcome.put_on else []
        together = place.trial(could)
        Row("all of these", could, "together").show(together, without)
        print("\nnot in the unit")
        for row, outcome in zip(more, pool.map(lambda row: place.trial(row.lines), more), strict=True):
            row.show(outcome, without)

    tried = {key for row in rows for key in (line.partition("=")[0] for line in row.lines)}
    print("\nonly systemd can do")
    for key in dict.fromkeys(line.partition("=")[0] for line in lines):
        if key not in tried | NOT_HARDENING:
            print(f"{key:<50} {ONLY_SYSTEMD.get(key, 'not known here: not tried')}")
    if writing and not writing.wait():
        print(f"\nthe server under all of these: {speak_under(place, could, weights, Case())}")
    assert verdict(together, without) in {"yes", "-"}, "the settings together break what works without them"
    assert together.put_on, together.said


def main() -> None:
    if sys.argv[1:] == ["--work"]:
        work()
        return
    unit = Path(sys.argv[1]) if sys.argv[1:] else UNIT
    hidden = [
        path
        for path in (sys.prefix, *sys.path[1:])
        if hardening.is_below(path, (*hardening.TEMPORARY, *hardening.HOMES))
    ]
    if os.geteuid():
        sys.exit("cannot try it: only root can put the settings on")
    if hidden:
        sys.exit(f"cannot try it: the settings would hide {hidden[0]}")
    print(f"{machine()}\n{unit.name}\n", flush=True)
    lines = service_of(unit)
    with bench(lines) as place:
        print_all(place, lines, place.root / "weights")


if __name__ == "__main__":
    main()
