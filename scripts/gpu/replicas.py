"""Several instances on one GPU, taking turns, by MPS, or one with a pipeline: rate, latency, memory, cores.

    python scripts/gpu/replicas.py | tee scripts/gpu/replicas.txt
    python scripts/gpu/replicas.py --profile mine.json     # for `chatterbox-deploy advise --profile mine.json`
    python scripts/gpu/replicas.py --built-in              # writes it to src/chatterbox_deploy/sizing/measured.json

Weights are random at full size (scripts/tiny_model.py). Every server and the MPS daemon get exactly the Environment=,
EnvironmentFile=, ExecStart= and ExecStartPost= of the units that `chatterbox-deploy render` wrote, beside what this
machine needs to find Python packages and the driver. Each instance has one client that asks again as soon as it is
answered; the one with a pipeline has two. In between the daemon is killed, as systemd would have it die. Fails if 4 by
MPS are not 3.9 times one, or if somebody was no client of the daemon. mps_sandboxed.py beside this has the sandbox of
the units, and a context that breaks.
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from stock_server import CHECKOUT, FROM_THIS_MACHINE, TEXT, Server, gpu_memory_bytes

from chatterbox_deploy.sizing import profile

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

FIRST_PORT = 7100
TURNS = {8: 20.0, 4: 20.0, 2: 20.0, 1: 40.0}
"""Instances → seconds for which they are watched. From many to few: each next one is what is left after some ended."""

BY_MPS = {8: 25.0, 4: 45.0, 2: 20.0}
BY_MPS_ANEW = {1: 30.0}
"""After the death of the daemon."""

PIPELINED = {1: 40.0}
NEEDED = 3.9
MEASURED_FILE = CHECKOUT / "src/chatterbox_deploy/sizing/measured.json"

Unit = dict[str, list[str]]


# The units, as the kit writes them.


def render(
    count: int, weights: Path, directory: Path, *, mps: bool, cpus: int = 0, server: str = ""
) -> dict[str, Unit]:
    """Settings of each unit of a fleet of so many instances on GPU 0, by the unit's name; ``server``: of [server]."""
    ports = list(range(FIRST_PORT, FIRST_PORT + count))
    (directory / "fleet.toml").write_text(
        f"[gpus]\n0 = {ports if count > 1 else ports[0]}\n"
        f"[unit]\nmps = {str(mps).lower()}\ncpus_per_instance = {cpus}\n"
        f"[server]\nweights = '{weights}'\npython = '{sys.executable}'\nlongest_utterance_s = 600\n"
        f"check_duration = false\n{server}\n"
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
    """The MPS daemon of GPU 0, started as its unit starts it; ``wrap`` comes before its command, which is ``uid``'s."""

    def __init__(
        self, unit: Unit, wrap: Sequence[str] = (), more: Mapping[str, str] | None = None, uid: int = 0
    ) -> None:
        self.unit = unit
        self.environment = environment(unit) | dict(more or {})
        self.directory = Path(self.environment["CUDA_MPS_PIPE_DIRECTORY"])
        shutil.rmtree(self.directory, ignore_errors=True)
        self.logs = Path(self.environment["CUDA_MPS_LOG_DIRECTORY"])
        for directory in (self.directory, self.logs):
            directory.mkdir(mode=0o700)
            os.chown(directory, uid, uid)
        self.wrap = wrap
        self.last_words = ""
        """Once it has ended."""

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
            self.end()
            print(f"the daemon does not answer; its last words:\n{self.last_words}")
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
        """The end of what it printed, and of each of its logs."""
        self.log.seek(0)
        told = [self.log.read(), *(path.read_bytes() for path in sorted(self.logs.glob("*.log")))]
        return "\n".join(line for each in told for line in each.decode(errors="replace").splitlines()[-lines:])

    def end(self) -> None:
        """Ends it and its servers, also when it is dead already."""
        servers = self.servers() if self.process.poll() is None else []
        for command in self.unit["ExecStop"]:
            with suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    [*self.wrap, *words(command)], env=self.environment, check=False, timeout=10,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )  # fmt: skip
        with suppress(subprocess.TimeoutExpired):
            # What it printed is there once it has ended by itself.
            self.process.wait(5)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.last_words = self.says(12)
        for server in servers:
            with suppress(ProcessLookupError):
                os.kill(server, signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)


# Load.


@dataclass
class Instance:
    """A server, and the clients that never let it rest."""

    name: str
    port: int
    server: Server
    asked: list[tuple[float, float, float]] = field(default_factory=list)
    """Begin and end of each request that was answered, and the seconds of sound that it got."""

    resting: threading.Event = field(default_factory=threading.Event)
    clients: list[threading.Thread] = field(default_factory=list)

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

    def keep_busy(self, clients: int) -> None:
        def ask() -> None:
            while not self.resting.is_set():
                begin = time.monotonic()
                status, audio_s = self.speak(len(self.asked))
                if status != 200:
                    break
                self.asked.append((begin, time.monotonic(), audio_s))

        self.clients = [threading.Thread(target=ask) for _ in range(clients)]
        for client in self.clients:
            client.start()

    def rest(self) -> None:
        """Once all its clients were answered."""
        self.resting.set()
        for client in self.clients:
            client.join()

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
        instance.rest()
    for instance in instances:
        with suppress(subprocess.TimeoutExpired):
            instance.server.end()
        if instance.server.process.poll() is None:
            instance.server.process.kill()


@dataclass(frozen=True)
class Row:
    replicas: int
    how: str
    """``-``, ``turns``, ``MPS`` or ``pipeline``."""

    audio_s_per_s: float
    p50_s: float
    p95_s: float
    requests: int
    gpu_bytes: int
    cores: float

    def show(self, one: Row) -> str:
        return (
            f"{self.replicas:>9}  {self.how:<8} {self.audio_s_per_s:9.2f} "
            f"{self.audio_s_per_s / one.audio_s_per_s:6.2f} x {self.p50_s:7.2f} {self.p95_s:7.2f} "
            f"{self.requests:9} {self.gpu_bytes / 2**30:9.2f} {self.cores:6.2f}"
        )


HEADING = (
    f"{'instances':>9}  {'share':<8} {'audio s/s':>9} {'gain':>8} {'p50 s':>7} {'p95 s':>7} {'requests':>9} "
    f"{'GPU GiB':>9} {'cores':>6}"
)


@dataclass(frozen=True)
class Window:
    """A while in which these instances spoke; the requests at its ends may still have to be answered."""

    instances: list[Instance]
    how: str
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
            how=self.how,
            audio_s_per_s=audio_s / (self.end - self.begin),
            p50_s=statistics.median(took_s),
            p95_s=took_s[min(len(took_s) - 1, round(0.95 * len(took_s)))],
            requests=len(met),
            gpu_bytes=self.gpu_bytes,
            cores=self.cores,
        )


def watch(
    instances: Sequence[Instance], window_s: float, others: Sequence[int], *, how: str, idle_bytes: int
) -> Window:
    """Looks on while all speak, from when each was answered once; ``others`` are more processes whose CPU counts."""
    while not all(instance.asked for instance in instances):
        assert all(client.is_alive() for instance in instances for client in instance.clients), "no 200"
        time.sleep(0.1)
    longest_s = max(end - begin for instance in instances for begin, end, _ in instance.asked[-1:])
    pids = [*(instance.server.process.pid for instance in instances), *others]
    begin, before = time.monotonic(), sum(map(cpu_s, pids))
    time.sleep(max(window_s, 1.5 * longest_s))
    end, used = time.monotonic(), sum(map(cpu_s, pids)) - before
    return Window(list(instances), how, begin, end, used / (end - begin), gpu_memory_bytes() - idle_bytes)


def measure(
    instances: list[Instance],
    windows_s: Mapping[int, float],
    others: Sequence[int] = (),
    *,
    clients: int = 1,
    **how: Any,
) -> list[Row]:
    """A row for each count of ``windows_s``, in their order; the instances of the last count live on, and rest."""
    for instance in instances:
        instance.keep_busy(clients)
    windows: list[Window] = []
    for count, window_s in windows_s.items():
        stop(instances[count:])
        del instances[count:]
        windows.append(watch(instances, window_s, others, **how))
    for instance in instances:
        instance.rest()
    rows = [each.row() for each in windows]
    # A single one takes no turns.
    return [replace(row, how="-") if row.replicas == 1 and row.how == "turns" else row for row in rows]


# What becomes of the clients when the daemon dies.


PATIENCE_S = 40.0
"""A hung one would be killed by systemd after unit.watchdog_s, 30."""


def kill_daemon(daemon: Daemon, instances: Sequence[Instance]) -> None:
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


def wait(instance: Instance, timeout_s: float) -> int | None:
    """Exit status; ``None`` if it lives on."""
    try:
        return instance.server.process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None


# All of it.


def write_profile(path: Path, rows: Sequence[Row], machine: str, *, built_in: bool) -> None:
    """For `chatterbox-deploy advise`; T3's share, which is not measured here, is kept."""
    known = profile.built_in()
    one = next(row for row in rows if row.how == "-")
    made = profile.Profile(
        model="chatterbox",
        machine=machine,
        source=f"python scripts/gpu/replicas.py, {len(TEXT)} characters a request",
        gpu_memory_bytes=one.gpu_bytes,
        t3_share=known["chatterbox"].t3_share,
        points=tuple(
            profile.Point(
                replicas=row.replicas,
                mps=row.how == "MPS",
                audio_s_per_s=round(row.audio_s_per_s, 2),
                cores=round(row.cores, 2),
            )
            for row in rows
        ),
    )
    told = made.model_dump()
    whole = [told if name == "chatterbox" else each.model_dump() for name, each in known.items()] if built_in else told
    path.write_text(json.dumps(whole, indent=2) + "\n")


@contextmanager
def sharing(units: Mapping[str, Unit], directory: Path) -> Iterator[tuple[Daemon, list[Instance]]]:
    """A daemon and its clients."""
    daemon = Daemon(units["mps-gpu0"])
    instances: list[Instance] = []
    try:
        instances += start(units, directory, daemon.clients_file())
        yield daemon, instances
    finally:
        for instance in instances:
            instance.server.process.kill()
        daemon.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path, help="write what was measured there")
    parser.add_argument(
        "--built-in", action="store_true", help=f"write it to {MEASURED_FILE.name}, which the kit reads"
    )
    parser.add_argument("--cpus-per-instance", type=int, default=0, help="as [unit] cpus_per_instance")
    parser.add_argument("--weights", type=Path, help="what scripts/tiny_model.py wrote; else it writes now")
    asked = parser.parse_args()
    gpu = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "--id=0"],
                         capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    begun_s = time.monotonic()
    print(f"{gpu}, {os.cpu_count()} cores, Python {sys.version.split()[0]}; full-size random weights, chatterbox; "
          f"{len(TEXT)} characters a request\n", flush=True)  # fmt: skip
    idle_bytes = gpu_memory_bytes()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        weights = asked.weights or directory / "weights"
        if asked.weights is None:
            write_weights(weights)

        def units(count: int, *, mps: bool = False, server: str = "") -> dict[str, Unit]:
            return render(count, weights, directory, mps=mps, cpus=asked.cpus_per_instance, server=server)

        print(HEADING, flush=True)
        rows = measure_started(units(8), directory, TURNS, how="turns", idle_bytes=idle_bytes)
        one = rows[-1]
        show(rows, one)
        pipelined = measure_started(
            units(1, server="pipeline = 'on'"), directory, PIPELINED, clients=2, how="pipeline", idle_bytes=idle_bytes
        )
        show(pipelined, one)
        with sharing(units(8, mps=True), directory) as (daemon, instances):
            clients = daemon.clients()
            by_mps = measure(instances, BY_MPS, daemon.servers(), how="MPS", idle_bytes=idle_bytes)
            show(by_mps, one)
            print(f"\nof 8 instances {len(clients)} were clients of the daemon; its server used "
                  f"{sum(map(cpu_s, daemon.servers())):.1f} s of CPU")  # fmt: skip
            kill_daemon(daemon, instances)
        anew_s = time.monotonic()
        with sharing(units(2, mps=True), directory) as (daemon, instances):
            status, _ = instances[0].speak()
            print(f"  daemon and clients started anew: status {status} after {time.monotonic() - anew_s:.1f} s\n")
            again = measure(instances, BY_MPS_ANEW, daemon.servers(), how="MPS", idle_bytes=idle_bytes)
            print(HEADING)
            show(again, one)
            stop(instances)
    for path in filter(None, [asked.profile, MEASURED_FILE if asked.built_in else None]):
        measured = [*rows[::-1], *again[::-1], *by_mps[::-1]]
        write_profile(path, measured, f"{gpu}, {os.cpu_count()} cores", built_in=path == MEASURED_FILE)
    four, alone = by_mps[1].audio_s_per_s, again[-1].audio_s_per_s
    good = four / one.audio_s_per_s >= NEEDED and len(clients) == 8
    gains = f"{four / one.audio_s_per_s:.2f} x one without a daemon, {four / alone:.2f} x one with"
    print(f"\n4 by MPS are {gains}; {NEEDED} x are needed: {'good' if good else 'NOT GOOD'}; "
          f"{time.monotonic() - begun_s:.0f} s in all")  # fmt: skip
    print(NOTES)
    sys.exit(0 if good else 1)


NOTES = """
Gain: over the first row. p50, p95: seconds until a request was answered. Requests: those that the window met, in part
or whole. GPU: the driver's count over an idle card. Cores: CPU seconds per second of the servers and the MPS server."""


def write_weights(place: Path) -> None:
    subprocess.run(
        [sys.executable, CHECKOUT / "scripts/tiny_model.py", "full", place, "--kind", "chatterbox", "--eos-per-text",
         "1.7"], stdout=subprocess.DEVNULL, check=True,
    )  # fmt: skip


def show(rows: Sequence[Row], one: Row) -> None:
    for row in reversed(rows):
        print(row.show(one), flush=True)


def measure_started(
    units: Mapping[str, Unit], directory: Path, windows_s: Mapping[int, float], **how: Any
) -> list[Row]:
    """Rows of instances without a daemon, from many to few."""
    instances = start(units, directory, {})
    try:
        return measure(instances, windows_s, **how)
    finally:
        stop(instances)


if __name__ == "__main__":
    main()
