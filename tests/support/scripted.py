"""A host that is a directory tree, with a systemd, an nginx and a clock of its own; it objects when a plan does harm.

It answers in systemd 252's words. It starts no process and knows nothing of plans, only of what must never happen.
"""

from __future__ import annotations

import array
import io
import json
import math
import re
import shlex
import shutil
import tempfile
import wave
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from chatterbox_deploy import nginx, render, systemd
from chatterbox_deploy.errors import CommandFailed
from chatterbox_deploy.host import Answer, LocalHost, Piece, Ran

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from chatterbox_deploy.change.facts import Wanted
    from chatterbox_deploy.render import RenderedFile

START_S = 8.0
"""From the start of a process until it is ready."""

STOP_S = 1.0
FINISH_S = 2.0
"""For which an instance still speaks once the front lists it no more."""

GIVE_UP_S = 30.0
"""From a first crash until systemd calls it a loop."""

Fault = Literal["never ready", "crash", "silent"]

_BEFORE_OURS = 1000
"""Process ids below are taken."""

_LISTED = re.compile(r"^\s*server (\S+):([0-9]+)([^;]*);", re.MULTILINE)
_VARIABLE = re.compile(r'^Environment=(?:"((?:[^"\\]|\\.)*)"|(\S*))$', re.MULTILINE)


class Killed(BaseException):
    """``kill -9`` of whoever changes the host: it dies here, and clears nothing up."""


@dataclass
class _Unit:
    name: str
    loaded: str
    """Text that systemd knows; none, where the file is gone."""

    active: str = "inactive"
    sub: str = "dead"
    result: str = "success"
    restarts: int = 0
    since_s: float = 0.0
    due_s: float | None = None
    """When what is under way has come to its end."""

    invocation: str = ""
    pid: int = 0
    running: str = ""
    """Text that the process was started by."""

    keys: bytes = b""
    """The copy of the API keys that it was given."""

    binds_s: float = math.inf
    """When it begins to listen."""

    idle_s: float = 0.0
    """When it has answered all that it was asked before it left the front."""

    @property
    def kind(self) -> str:
        return _setting(self.loaded, "Type") or self.name.rpartition(".")[2]

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", _port(self.running)

    @property
    def instance(self) -> str:
        return systemd.instance_name(self.name) or ""

    @property
    def is_daemon(self) -> bool:
        return systemd.is_mps_unit(self.name)


@dataclass(frozen=True)
class _Promise:
    """What those who look on expect of the change that comes."""

    wanted: Wanted | None
    lasting: frozenset[str]
    max_unavailable: int
    somebody: bool
    together: Mapping[str, str]


@contextmanager
def scripted_host() -> Iterator[ScriptedHost]:
    """A fresh one: in memory where that can be, for every file is synced."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        yield ScriptedHost(Path(directory))


class ScriptedHost(LocalHost):
    """See the top of this module. nginx runs, and serves no front yet."""

    def __init__(self, root: Path) -> None:
        """``root`` is empty."""
        super().__init__(root)
        self.root = root
        self.history: list[str] = []
        """Every change so far, in words."""

        self.faults: dict[str, Fault] = {}
        """What becomes of processes whose unit holds these words."""

        self.refuses: dict[str, str] = {}
        """Words in a text that ``systemd-analyze verify`` or ``nginx -t`` refuses → what it says of them."""

        self.gpus: str | None = None
        """What nvidia-smi prints; ``None`` where there is none."""

        self.nginx_fails: dict[str, str] = {}
        """What nginx says, whatever our front is, when it is asked to ``test`` or to ``reload`` its files."""

        self.strangers: set[int] = set()
        """Ports on which programs listen that are none of ours."""

        self.front: str | None = None
        """What nginx serves: our file as of its last reload."""

        self._units: dict[str, _Unit] = {}
        self._target_enabled = PurePosixPath(f"/etc/systemd/system/multi-user.target.wants/{systemd.TARGET}")
        self._clock_s = 1000.0
        self._started = 0
        self._verified: set[str] = set()
        self._tested: set[str] = set()
        self._promise = _Promise(None, frozenset(), 1, somebody=False, together={})
        self._served: set[str] = set()
        self.place("/usr/sbin/nginx")
        self._changes_left: int | None = None
        self._dead = False

    # What tests say to it

    def place(self, path: str, text: str = "") -> None:
        """Have a file there, whoever wrote it."""
        self.at(PurePosixPath(path)).parent.mkdir(parents=True, exist_ok=True)
        self.at(PurePosixPath(path)).write_text(text)

    def promise(
        self,
        wanted: Wanted | None,
        *,
        lasting: Collection[str] = (),
        max_unavailable: int = 1,
        somebody: bool = False,
        together: Mapping[str, str] | None = None,
    ) -> None:
        """Object from now on, too, if something restarts before ``wanted`` was judged, if too many of ``lasting`` are
        away at once, or (``somebody``) if nobody speaks. Those that ``together`` gives one word count as one.
        """
        self._promise = _Promise(wanted, frozenset(lasting), max_unavailable, somebody, together or {})
        self._served = self.in_service()

    def interrupt_after(self, changes: int) -> None:
        """Kill whoever changes the host, once that many changes are made; ``revive`` lets the next one in."""
        self._changes_left = changes

    def revive(self, after_s: float = 0.0) -> None:
        """Somebody comes, that much later."""
        self._changes_left, self._dead = None, False
        self.sleep(after_s)

    def crash(self, instance: str) -> None:
        """A process dies, and systemd has given up on it."""
        unit = self._units[systemd.unit_name(instance)]
        self._end_process(unit)
        unit.active, unit.sub, unit.result, unit.due_s = "failed", "failed", "exit-code", None

    def in_service(self) -> set[str]:
        """Instances that the front asks and that answer."""
        return {unit.instance for unit in self._units.values() if self._listens(unit) and unit.address in self._up()}

    def contents(self, *below: str) -> dict[str, str]:
        """Every file and link of the tree, or below these directories."""
        return {
            f"/{path.relative_to(self.root)}": f"→ {path.readlink()}" if path.is_symlink() else path.read_text()
            for directory in below or ("/",)
            for path in sorted(self.at(PurePosixPath(directory)).rglob("*"))
            if path.is_symlink() or path.is_file()
        }

    def running(self) -> dict[str, str]:
        """Which text each instance's process was started by."""
        return {unit.instance: unit.running for unit in self._units.values() if unit.pid and unit.instance}

    def instances(self) -> dict[str, str]:
        """ActiveState of each that systemd knows and that is not at rest."""
        return {u.instance: u.active for u in self._units.values() if u.instance and u.active != "inactive"}

    def active_units(self) -> set[str]:
        """Names of all."""
        return {unit.name for unit in self._units.values() if unit.active == "active"}

    # Host

    def read_bytes(self, path: PurePosixPath) -> bytes | None:
        """See ``Host``."""
        self._live()
        if str(path) == "/proc/net/tcp":
            return self._sockets().encode()
        return super().read_bytes(path)

    def read_on(self, path: PurePosixPath, ends: Mapping[int, int], *, limit_bytes: int) -> Piece | None:
        """See ``Host``."""
        self._live()
        return super().read_on(path, ends, limit_bytes=limit_bytes)

    def write_files(self, files: Sequence[RenderedFile]) -> None:
        """See ``Host``; a kill comes between two of them."""
        for file in files:
            with self._change(f"write {file.path}"):
                super().write_files([file])

    def append(self, path: PurePosixPath, text: str) -> None:
        """See ``Host``."""
        with self._change(f"append to {path}"):
            super().append(path, text)

    def remove(self, path: PurePosixPath) -> None:
        """See ``Host``."""
        with self._change(f"remove {path}"):
            super().remove(path)

    def link(self, path: PurePosixPath, target: PurePosixPath) -> None:
        """See ``Host``."""
        with self._change(f"link {path} to {target}"):
            super().link(path, target)

    def run(self, argv: Sequence[str], *, timeout_s: float, check: bool = True) -> Ran:
        """See ``Host``."""
        self._live()
        ran = self._answer(argv)
        if check and ran.status != 0:
            said = ran.stderr.strip() or ran.stdout.strip() or "no output"
            msg = f"cannot run `{shlex.join(argv)}`: exit status {ran.status}: {said}"
            raise CommandFailed(msg)
        return ran

    def _answer(self, argv: Sequence[str]) -> Ran:  # noqa: PLR0911  one for each program
        match argv:
            case ["systemctl", verb, *rest]:
                return self._systemctl(verb, rest)
            case ["systemd-analyze", "verify", *paths]:
                return self._verify(paths)
            case ["nginx", "-t"]:
                return self._test_front()
            case ["journalctl" | "nvidia-smi" as program, *_]:
                return self._say(program)
            case ["ss", "-Hltnp", port]:
                taken = int(port.rpartition(":")[2]) in self.strangers
                return Ran(0, 'LISTEN 0 5 *:6095 *:* users:(("python3",pid=812,fd=3))\n' if taken else "")
            case ["rmdir", "--ignore-fail-on-non-empty", path]:
                place = self.at(PurePosixPath(path))
                with self._change(f"rmdir {path}"):
                    if not any(place.iterdir()):
                        place.rmdir()
                return Ran(0)
            case ["test", "-e", path, *_]:
                place = self.at(PurePosixPath(path))
                return Ran(0 if place.exists() or place.is_symlink() else 1)
        msg = f"the script has no answer to {shlex.join(argv)}"
        raise AssertionError(msg)

    def _say(self, program: str) -> Ran:
        said = {"journalctl": "its last words\n", "nvidia-smi": self.gpus}[program]
        if said is None:
            msg = f"cannot run `{program}`: no such file or directory"
            raise CommandFailed(msg)
        return Ran(0, said)

    def _systemctl(self, verb: str, rest: Sequence[str]) -> Ran:
        match verb, rest:
            case "show", [properties, "--", *names]:
                return self._show(properties.removeprefix("--property=").split(","), names)
            case "daemon-reload", []:
                with self._change("daemon-reload"):
                    self._read_units()
                return Ran(0)
            case "reload-or-restart" | "try-reload-or-restart", ["nginx.service"]:
                return self._reload_nginx()
            case "enable" | "disable", [systemd.TARGET]:
                return self._enable(verb)
        verbs = {"start": self._start, "stop": self._stop, "reset-failed": self._reset_failed}
        assert verb in verbs, f"the script has no answer to systemctl {verb} {shlex.join(rest)}"
        return verbs[verb](rest)

    def request(  # noqa: PLR0911  one for each path
        self, method: str, url: str, *, headers: Mapping[str, str] | None = None, body: bytes = b"", timeout_s: float
    ) -> Answer | None:
        """See ``Host``; whoever listens on the port answers."""
        self._live()
        place = urlsplit(url)
        unit = next(
            (u for u in self._units.values() if self._listens(u) and u.address == (place.hostname, place.port)), None
        )
        if unit is None:
            return None
        if _setting(unit.running, "Type") != "notify":
            return Answer(404, body=b"<h1>Not Found</h1>")
        match method, place.path:
            case "GET", "/readyz":
                busy = int(self._is_busy(unit))
                told = {"ready": True, "instance": unit.instance, "invocation_id": unit.invocation}
                return Answer(200, body=json.dumps({**told, "waiting": 0, "running": busy, "draining": False}).encode())
            case "GET", "/metrics":
                began_s = unit.binds_s - START_S
                said = f"# TYPE process_start_time_seconds gauge\nprocess_start_time_seconds {began_s}\n"
                return Answer(200, body=said.encode())
            case "POST", "/v1/audio/speech":
                key = (headers or {}).get("Authorization", "").removeprefix("Bearer ").encode()
                if unit.keys and key not in unit.keys.split()[1::2]:
                    return Answer(401, body=b'{"error":{"message":"no known API key was given"}}')
                assert json.loads(body)["response_format"] == "wav"
                return Answer(200, {"content-type": "audio/wav"}, _recording(self._fault(unit.running) == "silent"))
        return Answer(404, body=b'{"detail":"Not Found"}')

    @contextmanager
    def lock(self, path: PurePosixPath, holder: str) -> Iterator[None]:
        """See ``Host``."""
        self._live()
        with super().lock(path, holder):
            yield

    def now(self) -> datetime:
        """See ``Host``."""
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self._clock_s)

    def monotonic_s(self) -> float:
        """See ``Host``."""
        return self._clock_s

    def sleep(self, seconds: float) -> None:
        """See ``Host``; time passes only here and in commands that wait."""
        self._live()
        self._clock_s += seconds
        for unit in list(self._units.values()):
            if unit.due_s is not None and unit.due_s <= self._clock_s:
                self._come_to_its_end(unit)

    # Changes, and what must hold after each

    def _live(self) -> None:
        if self._dead or self._changes_left == 0:
            self._dead = True
            raise Killed

    @contextmanager
    def _change(self, what: str) -> Iterator[None]:
        self._live()
        yield
        if self._changes_left is not None:
            self._changes_left -= 1
        self.history.append(what)
        in_service = self.in_service()
        away = (self._promise.lasting & self._served) - in_service
        if len({self._promise.together.get(name, name) for name in away}) > self._promise.max_unavailable:
            self._object(f"{', '.join(sorted(away))} are away, more than {self._promise.max_unavailable} at once")
        if self._promise.somebody and self._served and not in_service:
            self._object("nobody is in service")
        self._served |= in_service

    def _object(self, law: str) -> None:
        happened = "\n  ".join(self.history[-25:])
        msg = f"{law}. What happened before:\n  {happened}"
        raise AssertionError(msg)

    def _judged(self) -> None:
        """An instance is to stop or to start: what is wanted must have been judged."""
        wanted = self._promise.wanted
        if wanted is None:
            return
        for file in wanted.files:
            if file.path.parent == render.UNIT_DIR and _unported(file.text) not in self._verified:
                self._object(f"something restarts, and systemd-analyze never verified {file.path}")
        if not any(text == wanted.front(nginx.find_upstreams(text)) for text in self._tested):
            self._object("something restarts, and nginx -t never passed on a front of the fleet")

    # systemd

    def _find(self, name: str) -> _Unit | None:
        """A unit; one that is not known yet is read now, as systemd does."""
        if name not in self._units and (text := super().read_bytes(render.UNIT_DIR / name)) is not None:
            self._units[name] = _Unit(name, text.decode())
        return self._units.get(name)

    def _read_units(self) -> None:
        for name, unit in list(self._units.items()):
            text = super().read_bytes(render.UNIT_DIR / name)
            unit.loaded = "" if text is None else text.decode()
            if text is None and unit.active == "inactive":
                del self._units[name]

    def _start(self, names: Iterable[str]) -> Ran:
        units: list[_Unit] = []
        for name in names:
            if (unit := self._find(name)) is None:
                return Ran(5, stderr=f"Failed to start {name}: Unit {name} not found.\n")
            units.append(unit)
        for unit in units:
            self._begin(unit)
        said = ""
        for unit in units:
            if unit.due_s is not None and unit.active in ("activating", "reloading"):
                with self._change(f"{unit.name} has started, or failed"):
                    self.sleep(max(0.0, unit.due_s - self._clock_s))
            if unit.active != "active":
                why = {
                    "timeout": "a timeout was exceeded",
                    "exit-code": "the control process exited with error code",
                }[unit.result]
                said += f"Job for {unit.name} failed because {why}.\n"
                said += f'See "systemctl status {unit.name}" and "journalctl -xeu {unit.name}" for details.\n'
        return Ran(1 if said else 0, stderr=said)

    def _begin(self, unit: _Unit) -> None:
        if unit.active == "deactivating" and unit.due_s is not None:
            self.sleep(unit.due_s - self._clock_s)
        if unit.active == "active" or (unit.active == "activating" and unit.pid):
            return
        for name in _settings(unit.loaded, "Wants"):
            if (other := self._find(name)) is not None:
                self._begin(other)
        if unit.instance:
            self._may_start(unit)
        with self._change(f"start {unit.name}" + (f" on {_port(unit.loaded)}" if unit.instance else "")):
            self._started += 1
            unit.invocation = f"{self._started:032x}"
            unit.active, unit.sub, unit.result, unit.due_s, unit.since_s = "active", "active", "success", None, 0.0
            if unit.name == systemd.FRONT_UNIT:
                # Its command: systemctl reload-or-restart nginx.service, which keeps what it has if it refuses.
                self._serve_front()
            if unit.instance:
                self._begin_process(unit)
            elif unit.is_daemon:
                unit.sub = "running"
                self._give_process(unit)

    def _may_start(self, unit: _Unit) -> None:
        self._judged()
        port = _port(unit.loaded)
        others = [u for u in self._units.values() if u is not unit and u.instance and u.pid]
        holders = [u.name for u in others if _port(u.running) == port]
        if holders:
            self._object(f"{unit.name} starts on port {port}, which {holders[0]} holds")
        if port in self.strangers:
            self._object(f"{unit.name} starts on port {port}, which a stranger holds")
        daemon = self._units.get(systemd.mps_unit_of(unit.loaded) or "")
        if daemon is not None and systemd.mps_digest(daemon.running) != systemd.mps_digest(daemon.loaded):
            self._object(f"{unit.name} starts, and {daemon.name} runs an older unit")

    def _give_process(self, unit: _Unit) -> None:
        unit.pid = _BEFORE_OURS + self._started
        unit.running = unit.loaded
        variables = {**_environment(unit.running), "INVOCATION_ID": unit.invocation}
        self.place(f"/proc/{unit.pid}/environ", "".join(f"{name}={value}\0" for name, value in variables.items()))

    def _begin_process(self, unit: _Unit) -> None:
        self._give_process(unit)
        credential = _setting(unit.running, "LoadCredential").partition(":")[2]
        unit.keys = (super().read_bytes(PurePosixPath(credential)) or b"") if credential else b""
        fault = self._fault(unit.running)
        timeout_s = float(_setting(unit.running, "TimeoutStartSec"))
        unit.binds_s = math.inf if fault in ("never ready", "crash") else self._clock_s + START_S
        unit.due_s = self._clock_s + (timeout_s if fault == "never ready" else START_S)
        if unit.kind == "notify":
            unit.active, unit.sub = "activating", "start"
        else:
            # Active once its program runs, whatever becomes of it; without a word to systemd no timeout ends it.
            unit.sub = "running"
            unit.due_s = self._clock_s + START_S if fault == "crash" else None

    def _come_to_its_end(self, unit: _Unit) -> None:
        unit.due_s = None
        fault = self._fault(unit.running)
        if unit.active == "deactivating":
            self._end_process(unit)
            unit.active, unit.sub = "inactive", "dead"
        elif unit.sub == "auto-restart":
            unit.active, unit.sub = "failed", "failed"
        elif fault in ("crash", "never ready"):
            self._end_process(unit)
            unit.active, unit.sub, unit.result = "activating", "auto-restart", "exit-code"
            if fault == "never ready":
                unit.result = "timeout"
            unit.restarts += 1
            unit.due_s = self._clock_s + GIVE_UP_S
        else:
            unit.active, unit.sub, unit.since_s = "active", "running", self._clock_s

    def _end_process(self, unit: _Unit) -> None:
        shutil.rmtree(self.at(PurePosixPath(f"/proc/{unit.pid}")))
        unit.pid, unit.binds_s = 0, math.inf

    def _stop(self, names: Iterable[str]) -> Ran:
        units: list[_Unit] = []
        for name in names:
            if (unit := self._find(name)) is None:
                return Ran(5, stderr=f"Failed to stop {name}: Unit {name} not loaded.\n")
            units.append(unit)
            units += [other for other in self._units.values() if name in _settings(other.loaded, "PartOf")]
        for unit in units:
            if unit.active in ("inactive", "failed", "deactivating"):
                continue
            if unit.pid:
                self._may_stop(unit)
            with self._change(
                f"stop {unit.name}" + (f" on {_port(unit.running)}" if unit.instance and unit.pid else "")
            ):
                unit.active, unit.sub, unit.due_s = "inactive", "dead", None
                if unit.pid:
                    unit.active, unit.sub = "deactivating", "stop-sigterm"
                    unit.due_s = self._clock_s + STOP_S
        for unit in units:
            if unit.due_s is not None:
                with self._change(f"{unit.name} has stopped"):
                    self.sleep(max(0.0, unit.due_s - self._clock_s))
        return Ran(0)

    def _may_stop(self, unit: _Unit) -> None:
        self._judged()
        if unit.is_daemon:
            if clients := [
                u.name for u in self._units.values() if u.pid and systemd.mps_unit_of(u.running) == unit.name
            ]:
                self._object(f"{unit.name} is stopped, and {clients[0]} shares its GPU through it")
            return
        if unit.address in self._up():
            self._object(f"{unit.name} is stopped, and the front lists its port {unit.address[1]}")
        if self._is_busy(unit) and self._promise.wanted is not None:
            self._object(f"{unit.name} is stopped before it has answered what it was asked")

    def _reset_failed(self, names: Iterable[str]) -> Ran:
        for name in names:
            if (unit := self._find(name)) is None:
                return Ran(1, stderr=f"Failed to reset failed state of unit {name}: Unit {name} not loaded.\n")
            if unit.active == "failed":
                with self._change(f"reset-failed {name}"):
                    unit.active, unit.sub, unit.result = "inactive", "dead", "success"
                    if not unit.loaded:
                        del self._units[name]
        return Ran(0)

    def _enable(self, verb: str) -> Ran:
        """systemctl reads the units afterwards, too."""
        place = self.at(self._target_enabled)
        if verb == "enable" and not self.at(render.UNIT_DIR / systemd.TARGET).is_file():
            return Ran(1, stderr=f"Failed to enable unit: Unit file {systemd.TARGET} does not exist.\n")
        with self._change(f"{verb} {systemd.TARGET}"):
            place.unlink(missing_ok=True)
            if verb == "enable":
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(f"/etc/systemd/system/{systemd.TARGET}")
            self._read_units()
        return Ran(0)

    def _show(self, properties: Sequence[str], names: Iterable[str]) -> Ran:
        blocks: list[str] = []
        for name in names:
            glob = re.compile(name.replace(".", r"\.").replace("*", ".*"))
            known = [unit for unit in self._units.values() if glob.fullmatch(unit.name)] if "*" in name else []
            for unit in known if "*" in name else [self._find(name) or name]:
                facts = self._facts(unit)
                blocks.append("\n".join(f"{key}={facts[key]}" for key in facts if key in properties))
        return Ran(0, "\n\n".join(blocks) + "\n")

    def _facts(self, unit: _Unit | str) -> dict[str, str | int]:
        """In systemd's order."""
        known = unit if isinstance(unit, _Unit) else _Unit(unit, "")
        facts: dict[str, str | int] = {}
        if known.name.endswith(".service"):
            facts |= {"MainPID": known.pid, "Result": known.result, "NRestarts": known.restarts, "ExecMainStatus": 0}
            facts |= {"MemoryCurrent": 50_000_000 if known.pid else "[not set]"}
        enabled = "enabled" if self.at(self._target_enabled).is_symlink() else "disabled"
        file_state = enabled if known.name == systemd.TARGET else "static"
        on_disk = (super().read_bytes(render.UNIT_DIR / known.name) or b"").decode()
        return facts | {
            "Id": known.name,
            "LoadState": "loaded" if known.loaded else "not-found",
            "ActiveState": known.active,
            "SubState": known.sub,
            "UnitFileState": file_state if known.loaded else "",
            "ActiveEnterTimestampMonotonic": int(known.since_s * 1e6),
            "NeedDaemonReload": "no" if on_disk == known.loaded else "yes",
            "InvocationID": known.invocation,
        }

    def _verify(self, paths: Iterable[str]) -> Ran:
        texts = {path: (super(ScriptedHost, self).read_bytes(PurePosixPath(path)) or b"").decode() for path in paths}
        said = "".join(
            f"{path}:7: {says}\n" for path, text in texts.items() for word, says in self.refuses.items() if word in text
        )
        if not said:
            self._verified |= {_unported(text) for text in texts.values()}
        # Also with something to say it exits 0.
        return Ran(0, stderr=said)

    # nginx

    def _test_front(self) -> Ran:
        if "test" in self.nginx_fails:
            return Ran(1, stderr=self.nginx_fails["test"])
        text = self._front_on_disk()
        refused = [says for word, says in self.refuses.items() if word in (text or "")]
        if refused:
            said = f"nginx: [emerg] {refused[0]} in {render.FRONT_PATH}:7\n"
            return Ran(1, stderr=f"{said}nginx: configuration file /etc/nginx/nginx.conf test failed\n")
        if text is not None:
            self._tested.add(text)
        said = "nginx: the configuration file /etc/nginx/nginx.conf syntax is ok\n"
        return Ran(0, stderr=f"{said}nginx: configuration file /etc/nginx/nginx.conf test is successful\n")

    def _reload_nginx(self) -> Ran:
        text = self._front_on_disk()
        if text is not None and text not in self._tested:
            self._object("nginx is told to reload a front that nginx -t never passed")
        if "reload" in self.nginx_fails:
            return Ran(1, stderr=self.nginx_fails["reload"])
        with self._change(f"nginx serves {_summary(text)}"):
            self._serve_front()
        deaf = self._up() - {unit.address for unit in self._units.values() if self._listens(unit)}
        if deaf and self._promise.wanted is not None:
            self._object(f"the front lists port {min(deaf)[1]}, where nobody listens")
        return Ran(0)

    def _serve_front(self) -> None:
        before, text = self._up(), self._front_on_disk()
        if any(word in (text or "") for word in self.refuses):
            return
        self.front = text
        for unit in self._units.values():
            if unit.instance and unit.pid and unit.address in before - self._up():
                unit.idle_s = self._clock_s + FINISH_S

    def _front_on_disk(self) -> str | None:
        text = super().read_bytes(render.FRONT_PATH)
        return None if text is None else text.decode()

    def _up(self) -> set[tuple[str, int]]:
        """Addresses that nginx gives requests to."""
        return {
            (host, int(port)) for host, port, rest in _LISTED.findall(self.front or "") if "down" not in rest.split()
        }

    # Processes

    def _listens(self, unit: _Unit) -> bool:
        return (
            unit.instance != ""
            and unit.pid != 0
            and unit.active in ("active", "deactivating")
            and unit.binds_s <= self._clock_s
        )

    def _is_busy(self, unit: _Unit) -> bool:
        return self._listens(unit) and (unit.address in self._up() or self._clock_s < unit.idle_s)

    def _fault(self, text: str) -> Fault | None:
        return next((fault for words, fault in self.faults.items() if words in text), None)

    def _sockets(self) -> str:
        """As /proc/net/tcp: 0A listens, 01 is connected."""
        rows = [(port, "0A") for port in self.strangers]
        for unit in self._units.values():
            rows += [(unit.address[1], "0A")] if self._listens(unit) else []
            rows += [(unit.address[1], "01")] if self._is_busy(unit) else []
        lines = [
            f"{row:4}: 0100007F:{port:04X} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000     0"
            for row, (port, state) in enumerate(rows)
        ]
        return "\n".join(
            ["  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid", *lines, ""]
        )


def _settings(text: str, key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", text, re.MULTILINE)


def _setting(text: str, key: str) -> str:
    return next(iter(_settings(text, key)), "")


@cache
def _environment(text: str) -> dict[str, str]:
    """What a process is told by its unit's ``Environment=`` lines (systemd.syntax(7))."""
    variables: dict[str, str] = {}
    for quoted, plain in _VARIABLE.findall(text):
        name, _, value = (re.sub(r"\\(.)", r"\1", quoted).replace("%%", "%") if quoted else plain).partition("=")
        variables[name] = value
    return variables


@cache
def _port(text: str) -> int:
    """Where a process listens: what it is told, not what its mark says."""
    if (ours := _environment(text).get("CHATTERBOX_PORT")) is not None:
        return int(ours)
    found = re.search(r"^ExecStart=.*--port=([0-9]+)", text, re.MULTILINE)
    assert found is not None, text
    return int(found[1])


def _unported(text: str) -> str:
    """The text of a unit but for its port: over a spare one it was verified as well as on its own."""
    mark = systemd.find_mark(text)
    return text if mark is None else text.replace(mark.digest, "DIGEST").replace(str(mark.port), "PORT")


def _summary(front: str | None) -> str:
    if front is None:
        return "no front"
    listed: dict[bool, list[str]] = defaultdict(list)
    for host, port, rest in _LISTED.findall(front):
        listed["down" in rest.split()].append(f"{host}:{port}")
    return f"{', '.join(listed[False]) or 'nobody'}" + (f"; down: {', '.join(listed[True])}" if listed[True] else "")


@cache
def _recording(silent: bool) -> bytes:
    """A tenth of a second."""
    loudness = 0 if silent else 8000
    samples = array.array("h", (round(loudness * math.sin(n / 8)) for n in range(2400)))
    written = io.BytesIO()
    with wave.open(written, "wb") as recording:
        recording.setnchannels(1)
        recording.setsampwidth(2)
        recording.setframerate(24000)
        recording.writeframes(samples.tobytes())
    return written.getvalue()
