"""Does MPS work under the hardening of its units, and what does a broken context of one client do to the others?

    sudo python scripts/gpu/mps_sandboxed.py | tee scripts/gpu/mps_sandboxed.txt

The daemon and small clients of it get the Environment=, EnvironmentFile=, ExecStart= and ExecStartPost= of the units
that `chatterbox-deploy render` wrote for two instances on GPU 0, under settings of these units that hardening.py
beside this puts on: none, those of one side, of both; where all of both fail, each by itself and all but each. With the
daemon's own words wherever a client fails. Then one of three clients breaks its context. Fails if MPS does not work
under all settings. Needs root, and neither systemd, weights nor a network.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import hardening
from replicas import Daemon, Unit, environment, render
from stock_server import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

PROBE = """
import ctypes, sys
cuda = ctypes.CDLL("libcuda.so.1")
def call(name, *arguments):
    if status := getattr(cuda, name)(*arguments):
        said = ctypes.c_char_p()
        cuda.cuGetErrorString(status, ctypes.byref(said))
        sys.exit(f"{name}: error {status}, {(said.value or b'').decode()}")
device, context, place, back = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64(), ctypes.c_uint32()
call("cuInit", 0)
call("cuDeviceGet", ctypes.byref(device), 0)
call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
call("cuCtxSetCurrent", context)
call("cuMemAlloc_v2", ctypes.byref(place), ctypes.c_size_t(4))
call("cuMemsetD32_v2", place, 42, ctypes.c_size_t(1))
call("cuMemcpyDtoH_v2", ctypes.byref(back), place, ctypes.c_size_t(4))
print(back.value, flush=True)
sys.stdin.readline()
"""
"""A number that the GPU wrote, without torch: it is there in a second."""

PTX = """
.version 7.0
.target sm_75
.address_size 64
.visible .entry stray() {
  .reg .u64 %p; .reg .u32 %v;
  mov.u64 %p, 16; mov.u32 %v, 1; st.global.u32 [%p], %v; ret;
}
"""

CLIENT = f"""
import ctypes, sys, time, torch
print(torch.cuda.device_count(), torch.ones(8, device="cuda").sum().item(), flush=True)
def compute():
    left = torch.rand(256, 256, device="cuda")
    return (left @ left).sum().isfinite().item()
for line in sys.stdin:
    try:
        if line.strip() == "index beyond the end":
            torch.zeros(10, device="cuda")[torch.full((4,), 1000, device="cuda")].sum().item()
        elif line.strip() == "write to memory of nobody":
            cuda, module, function = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_void_p()
            assert cuda.cuModuleLoadData(ctypes.byref(module), {PTX.encode()!r}) == 0
            assert cuda.cuModuleGetFunction(ctypes.byref(function), module, b"stray") == 0
            assert cuda.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, None, None, None) == 0
            torch.cuda.synchronize()
        until = time.monotonic() + (3 if line.strip() == "keep on" else 0)
        good = compute()
        while time.monotonic() < until:
            good = compute() and good
        print("works" if good else "computes nonsense", flush=True)
    except Exception as error:
        print(str(error).splitlines()[0], flush=True)
"""
FAULTS = ("index beyond the end", "write to memory of nobody")
"""What a client is told to do; the first is a device-side assert, as a token out of range makes one."""

ANSWER_S = 15.0
START_S = 60.0
"""For the first words: torch is imported, perhaps from a cold disk."""


class Client:
    def __init__(self, code: str, wrap: Sequence[str], told: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [*wrap, sys.executable, "-c", code], env=dict(told), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def read(self, timeout_s: float = START_S) -> str:
        """The next line; why it ended, if it did."""
        stdout, stderr = self.process.stdout, self.process.stderr
        assert stdout is not None
        assert stderr is not None
        lines: list[str] = []
        reading = threading.Thread(target=lambda: lines.append(stdout.readline()), daemon=True)
        reading.start()
        reading.join(timeout_s)
        if not lines:
            return f"no answer within {timeout_s:.0f} s"
        return lines[0].strip() or (stderr.read().strip().splitlines() or ["nothing"])[-1]

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.write(f"{word}\n")
            self.process.stdin.flush()

    def ask(self, word: str) -> str:
        self.tell(word)
        return self.read(ANSWER_S)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


# The units' settings, and a daemon and clients under some of them.


@dataclass(frozen=True)
class Sides:
    """Lines (KEY=VALUE) that the daemon and its clients get."""

    daemon: tuple[str, ...]
    client: tuple[str, ...]

    def only(self, *keys: str) -> Sides:
        """Those of these keys."""
        daemon, client = ([line for line in lines if _belongs(line, keys)] for lines in (self.daemon, self.client))
        return Sides(tuple(daemon), tuple(client))

    def without(self, *keys: str) -> Sides:
        return self.only(*(key for key in self.named() if key not in keys))

    def named(self) -> list[str]:
        return [key for key, _ in hardening.grouped([*self.daemon, *self.client])]


def _belongs(line: str, keys: Sequence[str]) -> bool:
    key = line.partition("=")[0]
    return key in keys or any(hardening.SETTINGS[each].with_key == key for each in keys)


def settings_of(unit: Unit) -> tuple[str, ...]:
    known = {*hardening.SETTINGS, *filter(None, (setting.with_key for setting in hardening.SETTINGS.values()))}
    return tuple(f"{key}={value}" for key, values in unit.items() for value in values if key in known)


def client_unit(units: Mapping[str, Unit]) -> Unit:
    return next(unit for name, unit in units.items() if name.startswith("gpu0"))


@contextmanager
def hardened(units: Mapping[str, Unit], sides: Sides) -> Iterator[tuple[Daemon, list[str], dict[str, str]]]:
    """The daemon under its settings; how to start a client under those of its own, and what it is told."""
    script = [sys.executable, str(CHECKOUT / "scripts/gpu/hardening.py")]
    pipes = environment(units["mps-gpu0"])["CUDA_MPS_PIPE_DIRECTORY"]
    with tempfile.TemporaryDirectory(dir="/opt", prefix="mps-") as own:
        Path(own).chmod(0o777)
        uid = hardening.free_uid() if sides.only("User").daemon else os.getuid()
        daemon = Daemon(units["mps-gpu0"], [*script, f"own={pipes}", *sides.daemon, "--"], {"HOME": own}, uid)
        wrap = [*script, f"own={own}", f"own={pipes}", *sides.client, "--"]
        caches = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "CUDA_CACHE_PATH", "TRITON_CACHE_DIR"), own)
        try:
            yield daemon, wrap, environment(client_unit(units)) | daemon.clients_file() | caches
        finally:
            daemon.end()


def works(units: Mapping[str, Unit], sides: Sides, what: str) -> bool:
    """Print whether a client of the daemon can compute."""
    begin = time.monotonic()
    last_words = ""
    try:
        with hardened(units, sides) as (daemon, wrap, told):
            client = Client(PROBE, wrap, told)
            said = client.read(20)
            count = len(daemon.clients()) if said == "42" else 0
            client.end()
        if not count:
            last_words = daemon.last_words
    except (OSError, subprocess.SubprocessError) as error:
        said, count = f"the daemon: {error}", 0
    verdict = "yes" if count == 1 else "no: it computes beside the daemon" if said == "42" else f"no: {said}"
    print(f"{what:<60} {time.monotonic() - begin:4.1f} s  {verdict}", flush=True)
    for line in last_words.splitlines():
        print(f"    {line}", flush=True)
    return count == 1


def find_culprits(units: Mapping[str, Unit], all_of: Sides) -> None:
    """Which settings of both units keep clients from the daemon: each by itself, then all but each."""
    # Without these no filter can be put on by a user, and no daemon finds its pipes.
    always = ("User", "NoNewPrivileges")
    print(f"\neach by itself, and {' and '.join(always)}")
    alone = [key for key in all_of.named() if key not in always and not works(units, all_of.only(*always, key), key)]
    print(f"\nall but {', '.join(alone) or 'none'}, and all but one more")
    rest = all_of.without(*alone)
    if not works(units, rest, "all but those"):
        for key in rest.named():
            works(units, rest.without(key), f"nor {key}")


def break_one(units: Mapping[str, Unit], sides: Sides, fault: str) -> bool:
    """Whether all clients share the daemon; tells what one's fault does to the others, and to who comes later."""
    with hardened(units, sides) as (daemon, wrap, told):
        clients = [Client(CLIENT, wrap, told) for _ in range(3)]
        broken, idle, busy = clients
        greetings = {client.read() for client in clients}
        pids = daemon.clients()
        print(f"\n{fault}: the daemon counts {len(pids)} clients, who see GPUs and sum: {' or '.join(greetings)}; "
              f"{told['CUDA_VISIBLE_DEVICES']}")  # fmt: skip
        busy.tell("keep on")
        time.sleep(1)
        print(f"  the one who does it:                {broken.ask(fault)}")
        print(f"  one who computes meanwhile:         {busy.read(ANSWER_S)}")
        print(f"  one who did nothing, asked then:    {idle.ask('compute')}")
        print(f"  these two, asked again:             {busy.ask('compute')}; {idle.ask('compute')}")
        late = Client(CLIENT, wrap, told)
        print(f"  a new one, before anybody has gone: {late.read()}")
        broken.end()
        late.end()
        late = Client(CLIENT, wrap, told)
        print(f"  a new one, the first one gone:      {late.read()}")
        for client in (busy, idle, late):
            client.end()
    for line in daemon.last_words.splitlines():
        print(f"    {line}")
    return len(pids) == 3


def main() -> None:
    if os.geteuid():
        sys.exit("cannot try it: only root can put the settings on")
    gpu = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"],
                         capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    print(f"{gpu}, Linux {os.uname().release}, Python {sys.version.split()[0]}\n", flush=True)
    with tempfile.TemporaryDirectory() as name:
        units = render(2, Path(name) / "no-weights", Path(name), mps=True)
    daemon, client = settings_of(units["mps-gpu0"]), settings_of(client_unit(units))
    all_of = Sides(daemon, client)
    user = all_of.only("User")
    print(f"{'settings':<60} {'took':>6}  a client of the daemon computes")
    works(units, Sides((), ()), "none, all are root's")
    works(units, user, f"the user, {hardening.free_uid()}")
    works(units, Sides(user.daemon, client), "all of a client's, the daemon's user")
    works(units, Sides(daemon, user.client), "all of the daemon's, a client's user")
    holds = works(units, all_of, "all of both")
    narrower = tuple(line for line in daemon if line != "SystemCallFilter=@setuid")
    works(units, Sides(narrower, client), "all of both, but for SystemCallFilter=@setuid")
    if not holds:
        find_culprits(units, all_of)
    shared = [break_one(units, all_of, fault) for fault in FAULTS]
    sys.exit(0 if holds and all(shared) else 1)


if __name__ == "__main__":
    main()
