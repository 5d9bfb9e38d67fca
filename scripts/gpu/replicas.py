"""Several instances on one GPU, taking turns and by MPS, as their units start them: rate, latency, memory, cores.

    sudo python scripts/gpu/replicas.py | tee scripts/gpu/replicas.txt
    sudo python scripts/gpu/replicas.py --profile mine.json     # for `chatterbox-deploy advise --profile mine.json`
    sudo python scripts/gpu/replicas.py --built-in              # writes it to src/chatterbox_deploy/measured.json

Weights are random at full size (scripts/tiny_model.py). Every server and the MPS daemon get exactly the Environment=,
EnvironmentFile=, ExecStart= and ExecStartPost= of the units that `chatterbox-deploy render` wrote, beside what this
machine needs to find Python packages and the driver. Each instance has one client that asks again as soon as it is
answered. In the end the daemon is killed, as systemd would have it die. Fails if 4 by MPS are not 3.9 times one, or if
somebody was no client of the daemon.

Before that the daemon and small clients work under the hardening of their units, put on as hardening.py beside this
does, and one of them breaks the context that they share. Needs root, and neither systemd nor a network.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import hardening
from stock_server import CHECKOUT, FROM_THIS_MACHINE, TEXT, Server, gpu_memory_bytes

from chatterbox_deploy import profile

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

FIRST_PORT = 7100
COUNTS = (8, 4, 2, 1)
"""From many to few: each next one is what is left after some have ended."""

WINDOW_S = 15.0
NEEDED = 3.9
MEASURED_FILE = CHECKOUT / "src/chatterbox_deploy/measured.json"

Unit = dict[str, list[str]]


# The units, as the kit writes them.


def render(count: int, weights: Path, directory: Path, *, mps: bool, cpus: int) -> dict[str, Unit]:
    """Settings of each unit of a fleet of so many instances on GPU 0, by the unit's name."""
    ports = list(range(FIRST_PORT, FIRST_PORT + count))
    (directory / "fleet.toml").write_text(
        f"[gpus]\n0 = {ports if count > 1 else ports[0]}\n"
        f"[unit]\nmps = {str(mps).lower()}\ncpus_per_instance = {cpus}\n"
        f"[server]\nweights = '{weights}'\npython = '{sys.executable}'\nlongest_utterance_s = 600\n"
        "check_duration = false\n"
    )
    shutil.rmtree(directory / "out", ignore_errors=True)
    subprocess.run(
        [sys.executable, "-m", "chatterbox_deploy", "render", directory / "fleet.toml", "--output", directory / "out"],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    found: dict[str, Unit] = {}
    for path in sorted((directory / "out/etc/systemd/system").glob("chatterbox-tts-*.service")):
        settings: Unit = {}
        for line in path.read_text().splitlines():
            if "=" in line and not line.startswith("#"):
                name, _, value = line.partition("=")
                settings.setdefault(name, []).append(value)
        found[path.name.removeprefix("chatterbox-tts-").removesuffix(".service")] = settings
    return found


def words(value: str) -> list[str]:
    """A command line as systemd reads it."""
    return [word.replace("$$", "$").replace("%%", "%") for word in shlex.split(value)]


def environment(unit: Unit) -> dict[str, str]:
    """What a process of the unit is told, beside what this machine needs."""
    told = (word.split("=", 1) for value in unit["Environment"] for word in words(value))
    return {name: os.environ[name] for name in FROM_THIS_MACHINE if name in os.environ} | dict(told)


class Daemon:
    """The MPS daemon of GPU 0, started as its unit starts it; ``wrap`` comes before its command."""

    def __init__(self, unit: Unit, wrap: Sequence[str] = (), more: Mapping[str, str] | None = None) -> None:
        self.unit = unit
        self.environment = environment(unit) | dict(more or {})
        self.directory = Path(self.environment["CUDA_MPS_PIPE_DIRECTORY"])
        shutil.rmtree(self.directory, ignore_errors=True)
        for directory in (self.directory, Path(self.environment["CUDA_MPS_LOG_DIRECTORY"])):
            directory.mkdir(mode=0o700)
            if wrap:
                os.chown(directory, hardening.free_uid(), hardening.free_uid())
        self.wrap = wrap
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  as long as the daemon
        self.process = subprocess.Popen(
            [*wrap, *words(unit["ExecStart"][0])],
            env=self.environment,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )
        try:
            for command in unit["ExecStartPost"]:
                subprocess.run([*wrap, *words(command)], env=self.environment, check=True, timeout=30)
        except BaseException:
            print(f"the daemon does not answer; its last words:\n{self.says(12)}")
            self.end()
            raise

    def clients_file(self) -> dict[str, str]:
        """What its clients are told beside their own environment."""
        lines = (self.directory / "clients.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def ask(self, command: str) -> list[str]:
        done = subprocess.run(
            [*self.wrap, "nvidia-cuda-mps-control"],
            input=f"{command}\n", env=self.environment, capture_output=True, text=True, check=False, timeout=30,
        )  # fmt: skip
        return done.stdout.split()

    def servers(self) -> list[int]:
        return [int(word) for word in self.ask("get_server_list") if word.isdigit()]

    def clients(self) -> list[int]:
        return [int(word) for server in self.servers() for word in self.ask(f"get_client_list {server}")]

    def says(self, lines: int) -> str:
        self.log.seek(0)
        return "\n".join(self.log.read().decode(errors="replace").splitlines()[-lines:])

    def end(self) -> None:
        """Ends it and its servers, also when it is dead already."""
        servers = self.servers() if self.process.poll() is None else []
        for command in self.unit["ExecStop"]:
            with suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    [*self.wrap, *words(command)], env=self.environment, check=False, timeout=10,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )  # fmt: skip
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for server in servers:
            with suppress(ProcessLookupError):
                os.kill(server, signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)


# Load.


@dataclass
class Instance:
    """A server, and the one client that never lets it rest."""

    name: str
    port: int
    server: Server
    asked: list[tuple[float, float, float]] = field(default_factory=list)
    """Begin and end of each request that was answered, and the seconds of sound that it got."""

    resting: threading.Event = field(default_factory=threading.Event)
    client: threading.Thread | None = None

    def speak(self, seed: int = 0, timeout_s: float = 300) -> tuple[int, float]:
        """Status (0: no answer) and seconds of sound."""
        body = json.dumps({"input": TEXT, "response_format": "pcm", "seed": seed}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/audio/speech", data=body, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return response.status, len(response.read()) / 48_000
        except urllib.error.HTTPError as error:
            return error.code, 0.0
        except OSError:
            return 0, 0.0

    def keep_busy(self) -> None:
        def ask() -> None:
            while not self.resting.is_set():
                begin = time.monotonic()
                status, audio_s = self.speak(len(self.asked))
                if status != 200:
                    break
                self.asked.append((begin, time.monotonic(), audio_s))

        self.client = threading.Thread(target=ask)
        self.client.start()

    def cpu_s(self) -> float:
        """CPU seconds so far of all its threads."""
        return cpu_s(self.server.process.pid)


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start(units: Mapping[str, Unit], directory: Path, told: Mapping[str, str]) -> list[Instance]:
    """All instances of a fleet, started at once."""
    instances: list[Instance] = []
    for number, (name, unit) in enumerate(item for item in units.items() if item[0].startswith("gpu0")):
        own = directory / name
        own.mkdir(exist_ok=True)
        pinned = [f"taskset --cpu-list {cpus} " for cpus in unit.get("CPUAffinity", [])]
        started = unit | {
            "Environment": [*unit["Environment"], *(shlex.quote(f"{key}={value}") for key, value in told.items())],
            "ExecStart": ["".join([*pinned, unit["ExecStart"][0]])],
        }
        instances.append(Instance(name, FIRST_PORT + number, Server(started, own)))
    try:
        for instance in instances:
            instance.server.wait_ready()
    except BaseException:
        for instance in instances:
            instance.server.process.kill()
        raise
    return instances


def stop(instances: Sequence[Instance]) -> None:
    for instance in instances:
        instance.resting.set()
    for instance in instances:
        if instance.client is not None:
            instance.client.join()
    for instance in instances:
        with suppress(subprocess.TimeoutExpired):
            instance.server.end()
        if instance.server.process.poll() is None:
            instance.server.process.kill()


@dataclass(frozen=True)
class Row:
    replicas: int
    mps: bool
    audio_s_per_s: float
    p50_s: float
    p95_s: float
    requests: int
    gpu_bytes: int
    cores: float

    def show(self, one: Row) -> str:
        how = "-" if self.replicas == 1 else "MPS" if self.mps else "turns"
        return (
            f"{self.replicas:>9}  {how:<5} {self.audio_s_per_s:9.2f} {self.audio_s_per_s / one.audio_s_per_s:6.2f} x "
            f"{self.p50_s:7.2f} {self.p95_s:7.2f} {self.requests:9} {self.gpu_bytes / 2**30:9.2f} {self.cores:6.2f}"
        )


HEADING = (
    f"{'instances':>9}  {'share':<5} {'audio s/s':>9} {'gain':>8} {'p50 s':>7} {'p95 s':>7} {'requests':>9} "
    f"{'GPU GiB':>9} {'cores':>6}"
)


@dataclass(frozen=True)
class Window:
    """A while in which these instances spoke; the requests at its ends may still have to be answered."""

    instances: list[Instance]
    mps: bool
    begin: float
    end: float
    cores: float
    gpu_bytes: int

    def row(self) -> Row:
        """Of each request, as much counts as lies within."""
        met = [each for one in self.instances for each in one.asked if each[1] > self.begin and each[0] < self.end]
        audio_s = sum(
            sound * (min(end, self.end) - max(begin, self.begin)) / (end - begin) for begin, end, sound in met
        )
        took_s = sorted(end - begin for begin, end, _ in met)
        return Row(
            replicas=len(self.instances),
            mps=self.mps,
            audio_s_per_s=audio_s / (self.end - self.begin),
            p50_s=statistics.median(took_s),
            p95_s=took_s[min(len(took_s) - 1, round(0.95 * len(took_s)))],
            requests=len(met),
            gpu_bytes=self.gpu_bytes,
            cores=self.cores,
        )


def watch(instances: Sequence[Instance], others: Sequence[int], *, mps: bool, idle_bytes: int) -> Window:
    """Looks on while all speak, from when each was answered once; ``others`` are more processes whose CPU counts."""
    while not all(instance.asked for instance in instances):
        assert all(instance.client is not None and instance.client.is_alive() for instance in instances), "no 200"
        time.sleep(0.1)
    longest_s = max(end - begin for instance in instances for begin, end, _ in instance.asked[-1:])
    pids = [*(instance.server.process.pid for instance in instances), *others]
    begin, before = time.monotonic(), sum(map(cpu_s, pids))
    time.sleep(max(WINDOW_S, 1.5 * longest_s))
    end, used = time.monotonic(), sum(map(cpu_s, pids)) - before
    return Window(list(instances), mps, begin, end, used / (end - begin), gpu_memory_bytes() - idle_bytes)


def measure(instances: list[Instance], counts: Sequence[int], others: Sequence[int], **how: Any) -> list[Row]:
    """A row for each count, from many to few; the instances of the last count still speak."""
    for instance in instances:
        instance.keep_busy()
    windows: list[Window] = []
    for count in counts:
        stop(instances[count:])
        del instances[count:]
        windows.append(watch(instances, others, **how))
    for instance in instances:
        instance.resting.set()
        assert instance.client is not None
        instance.client.join()
    return [each.row() for each in windows]


# What becomes of the clients when the daemon dies.


PATIENCE_S = 40.0
"""A hung one would be killed by systemd after unit.watchdog_s, 30."""


def kill_daemon(daemon: Daemon, instances: Sequence[Instance], units: Mapping[str, Unit], directory: Path) -> None:
    busy, idle = instances
    answer: list[tuple[int, float]] = []
    asking = threading.Thread(target=lambda: answer.append(busy.speak(timeout_s=PATIENCE_S)))
    asking.start()
    time.sleep(1)
    servers = daemon.servers()
    daemon.process.kill()
    time.sleep(1)
    alive = [each.server.process.poll() is None for each in instances]
    print(
        f"the daemon is killed: after 1 s its clients live: {alive}; its server {servers} is killed, as systemd would"
    )
    for server in servers:
        with suppress(ProcessLookupError):
            os.kill(server, signal.SIGKILL)
    begin = time.monotonic()
    asking.join()
    answered_s = time.monotonic() - begin
    ended = wait(busy, 20)
    said = f"status {answer[0][0] or 'none'} after {answered_s:.1f} s"
    print(f"  the client with a request in flight: {said}; exit status {ended} after {time.monotonic() - begin:.1f} s")
    print(
        f"  the idle client lives after {time.monotonic() - begin:.1f} s: {idle.server.process.poll() is None}", end=""
    )
    status, _ = idle.speak(timeout_s=PATIENCE_S)
    print(f"; asked to speak: status {status or 'none'}; exit status {wait(idle, 20)}")
    for each in instances:
        each.server.process.kill()
    daemon.end()
    begin = time.monotonic()
    again = Daemon(daemon.unit)
    try:
        fresh = start(units, directory, again.clients_file())
        status, audio_s = fresh[0].speak()
        print(f"  daemon and clients started anew: they speak after {time.monotonic() - begin:.1f} s, status {status}")
        assert status == 200
        assert audio_s > 0
        stop(fresh)
    finally:
        again.end()


def wait(instance: Instance, timeout_s: float) -> int | None:
    """Exit status; ``None`` if it lives on."""
    try:
        return instance.server.process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None


# Small clients, under the hardening of the units.

CLIENT = """
import sys, torch
print(torch.cuda.device_count(), torch.ones(8, device="cuda").sum().item(), flush=True)
for line in sys.stdin:
    try:
        if line.strip() == "break":
            torch.zeros(10, device="cuda")[torch.full((4,), 1000, device="cuda")].sum().item()
        left = torch.rand(256, 256, device="cuda")
        print("works" if (left @ left).sum().isfinite().item() else "computes nonsense", flush=True)
    except Exception as error:
        print(str(error).splitlines()[0], flush=True)
"""


ANSWER_S = 15.0
START_S = 60.0
"""For the first words: torch is imported, perhaps from a cold disk."""


class Client:
    def __init__(self, wrap: Sequence[str], told: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [*wrap, sys.executable, "-c", CLIENT], env=dict(told), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
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

    def tell(self, word: str) -> str:
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.write(f"{word}\n")
            self.process.stdin.flush()
        return self.read(ANSWER_S)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def lines_of(unit: Unit) -> list[str]:
    return [f"{key}={value}" for key, values in unit.items() for value in values if key in hardening.SETTINGS] + [
        f"{key}={value}" for key in ("DeviceAllow", "AmbientCapabilities") for value in unit.get(key, [])
    ]


@contextmanager
def hardened(units: Mapping[str, Unit]) -> Iterator[tuple[Daemon, list[str], dict[str, str]]]:
    """The daemon under the settings of its unit; how to start a client under those of its own, and what it is told."""
    script = [sys.executable, str(CHECKOUT / "scripts/gpu/hardening.py")]
    pipes = environment(units["mps-gpu0"])["CUDA_MPS_PIPE_DIRECTORY"]
    client = next(unit for name, unit in units.items() if name.startswith("gpu0"))
    with tempfile.TemporaryDirectory(dir="/opt", prefix="replicas-") as own:
        Path(own).chmod(0o777)
        daemon = Daemon(
            units["mps-gpu0"],
            [*script, f"own={pipes}", *lines_of(units["mps-gpu0"]), "--"],
            {"HOME": own},
        )
        wrap = [*script, f"own={own}", f"own={pipes}", *lines_of(client), "--"]
        caches = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "CUDA_CACHE_PATH", "TRITON_CACHE_DIR"), own)
        try:
            yield daemon, wrap, environment(client) | daemon.clients_file() | caches
        finally:
            daemon.end()


def under_hardening(units: Mapping[str, Unit]) -> bool:
    """Whether MPS works under the settings of both units; tells what one broken context does to the others."""
    with hardened(units) as (daemon, wrap, told):
        clients = [Client(wrap, told) for _ in range(2)]
        greetings = [client.read() for client in clients]
        pids = daemon.clients()
        print(
            f"under the units' hardening, user {hardening.free_uid()}: two clients each see GPUs and sum: {greetings}"
        )
        print(f"  {told['CUDA_VISIBLE_DEVICES']}; the daemon counts {len(pids)} clients; they compute: "
              f"{[client.tell('compute') for client in clients]}")  # fmt: skip
        if len(pids) != 2:
            print(daemon.says(12))
        print(f"  one breaks its context: {clients[0].tell('break')}")
        print(f"  the other, which did nothing: {clients[1].tell('compute')}")
        clients[0].end()
        late = Client(wrap, told)
        print(f"  a new one, while the other lives: {late.read()}")
        for client in (clients[1], late):
            client.end()
        after = Client(wrap, told)
        print(f"  a new one, once all are gone: {after.read()}\n")
        after.end()
        return len(pids) == 2


# All of it.


def write_profile(path: Path, rows: Sequence[Row], machine: str, *, built_in: bool) -> None:
    """For `chatterbox-deploy advise`; T3's share, which is not measured here, is kept."""
    known = profile.built_in()
    one = next(row for row in rows if row.replicas == 1)
    made = profile.Profile(
        model="chatterbox",
        machine=machine,
        source=f"python scripts/gpu/replicas.py, {len(TEXT)} characters a request",
        gpu_memory_bytes=one.gpu_bytes,
        t3_share=known["chatterbox"].t3_share,
        points=tuple(
            profile.Point(
                replicas=row.replicas, mps=row.mps, audio_s_per_s=round(row.audio_s_per_s, 2), cores=round(row.cores, 2)
            )
            for row in rows
        ),
    )
    told = made.model_dump()
    whole = [told if name == "chatterbox" else each.model_dump() for name, each in known.items()] if built_in else told
    path.write_text(json.dumps(whole, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path, help="write what was measured there")
    parser.add_argument(
        "--built-in", action="store_true", help=f"write it to {MEASURED_FILE.name}, which the kit reads"
    )
    parser.add_argument("--cpus-per-instance", type=int, default=0, help="as [unit] cpus_per_instance")
    asked = parser.parse_args()
    gpu = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "--id=0"],
                         capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    begun_s = time.monotonic()
    print(f"{gpu}, {os.cpu_count()} cores, Python {sys.version.split()[0]}; full-size random weights, chatterbox; "
          f"{len(TEXT)} characters a request\n", flush=True)  # fmt: skip
    idle_bytes = gpu_memory_bytes()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        weights = directory / "weights"
        writing = subprocess.Popen(
            [sys.executable, CHECKOUT / "scripts/tiny_model.py", "full", weights, "--kind", "chatterbox",
             "--eos-per-text", "1.7"], stdout=subprocess.DEVNULL,
        )  # fmt: skip

        def units(count: int, *, mps: bool) -> dict[str, Unit]:
            return render(count, weights, directory, mps=mps, cpus=asked.cpus_per_instance)

        try:
            holds = under_hardening(units(2, mps=True))
        except (OSError, subprocess.SubprocessError) as error:
            # What costs more time is still worth measuring.
            print(f"under the units' hardening: {error}\n")
            holds = False
        status = writing.wait()
        assert status == 0
        sys.stdout.flush()
        rows = take_turns(units(8, mps=False), directory, idle_bytes)
        one = rows[-1]
        print(HEADING)
        for each in reversed(rows):
            print(each.show(one), flush=True)
        shared = units(8, mps=True)
        daemon = Daemon(shared["mps-gpu0"])
        instances: list[Instance] = []
        try:
            instances = start(shared, directory, daemon.clients_file())
            clients = daemon.clients()
            by_mps = measure(instances, COUNTS[:-1], daemon.servers(), mps=True, idle_bytes=idle_bytes)
            for each in reversed(by_mps):
                print(each.show(one), flush=True)
            print(f"\nof 8 instances {len(clients)} were clients of the daemon; its server used "
                  f"{sum(map(cpu_s, daemon.servers())):.1f} s of CPU")  # fmt: skip
            kill_daemon(daemon, instances, units(2, mps=True), directory)
        finally:
            for instance in instances:
                instance.server.process.kill()
            daemon.end()
    rows += by_mps
    for path in filter(None, [asked.profile, MEASURED_FILE if asked.built_in else None]):
        write_profile(path, rows[::-1], f"{gpu}, {os.cpu_count()} cores", built_in=path == MEASURED_FILE)
    gain = next(row for row in by_mps if row.replicas == 4).audio_s_per_s / one.audio_s_per_s
    good = gain >= NEEDED and len(clients) == 8 and holds
    print(f"\n4 by MPS are {gain:.2f} x one, {NEEDED} x are needed: {'good' if good else 'NOT GOOD'}; "
          f"{time.monotonic() - begun_s:.0f} s in all")  # fmt: skip
    sys.exit(0 if good else 1)


def take_turns(units: Mapping[str, Unit], directory: Path, idle_bytes: int) -> list[Row]:
    """Rows of instances without MPS, from many to one."""
    instances = start(units, directory, {})
    try:
        rows = measure(instances, COUNTS, (), mps=False, idle_bytes=idle_bytes)
    finally:
        stop(instances)
    return rows


if __name__ == "__main__":
    main()
