"""Ask a host for everything that a report is made from. Decides nothing, changes nothing.

What may not be read, or is not there, is missing from the answer; where that leaves a question open, it says so.
"""

from __future__ import annotations

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from chatterbox_deploy import nginx, render, systemd
from chatterbox_deploy.change import observe
from chatterbox_deploy.errors import CaptureError, CommandFailed
from chatterbox_deploy.gpu import nvml, smi, usage
from chatterbox_deploy.report import pins, proc, situation
from chatterbox_deploy.report.situation import Pin, Program, Situation, short_name
from chatterbox_deploy.status.survey import ANSWER_TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from chatterbox_deploy.fleet import Instance
    from chatterbox_deploy.gpu.cards import Card, Process
    from chatterbox_deploy.host import Host
    from chatterbox_deploy.report.situation import FleetFile

TIMEOUT_S = 30.0
WATCH_S = 1.0
"""For which CPU use is counted."""

LOG_BYTES = 4 * 2**20
"""Of the end of the access log: some ten thousand requests."""

CODE_BYTES = 2**20
"""A longer file of code was written by a program, not by an operator."""

ACCESS_LOG = "/var/log/nginx/chatterbox-tts.access.log"
"""Where the front of ours logs that no fleet file is known of."""

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_NGINX_FILES = (("/etc/nginx", "*.conf"), ("/etc/nginx/conf.d", "*.conf"), ("/etc/nginx/sites-enabled", "*"))


def cards(host: Host) -> tuple[tuple[Card, ...], str]:
    """Each GPU, and who told: NVML, or nvidia-smi where that is all there is. None where there is no driver."""
    told = nvml.read()
    if told is not None:
        return told, "NVML"
    try:
        said = host.run(smi.ASK_ARGV, timeout_s=TIMEOUT_S).stdout
        return smi.parse(said.encode(), source="`nvidia-smi -q -x`").cards, "`nvidia-smi -q -x`"
    except (CommandFailed, CaptureError):
        return (), "NVML and `nvidia-smi -q -x`, and neither answers"


def investigate(
    host: Host, file: FleetFile | None, ask: Callable[[Host], tuple[tuple[Card, ...], str]] = cards
) -> Situation:
    """The whole situation. Takes about ``WATCH_S``."""
    found, told_by = ask(host)
    on_gpus = {process.pid: process for card in found for process in card.processes or ()}
    listeners = _listeners(host)
    programs = _programs(host, on_gpus, listeners or {})
    scripts = _scripts(programs.values(), file)
    texts = {path: text for path in scripts if (text := _text(host, path)) is not None}
    configuration = _nginx_texts(host)
    log = ACCESS_LOG if file is None else file.fleet.front.access_log
    said = _end_of(host, log)
    return Situation(
        cards=found,
        told_by=told_by,
        taken=host.now().strftime("%Y-%m-%d %H:%M UTC"),
        programs=programs,
        code=tuple(line for path, text in texts.items() for line in pins.find(text, str(path))),
        pins=tuple(_pins(host, programs.values())),
        upstreams=tuple(block for path, text in configuration.items() for block in nginx.find_blocks(text, path)),
        traffic=None if said is None else nginx.read_log(said),
        in_service=tuple(
            upstream.name
            for upstream in nginx.find_upstreams(configuration.get(str(render.FRONT_PATH), ""))
            if not upstream.drained and not upstream.leaving
        ),
        tf32={} if file is None else _tf32(host, file),
        fleet_file=file,
        cores=len(observe.cpus(host) or ()) or None,
        listening=frozenset(listeners or ()),
        unseen=tuple(
            _unseen(
                found,
                programs.values(),
                unread=[str(path) for path in scripts if path not in texts],
                nginx_read=bool(configuration),
                unread_log=log if said is None and str(render.FRONT_PATH) in configuration else None,
                ports_read=listeners is not None,
            )
        ),
    )


def _unseen(
    found: Sequence[Card],
    programs: Iterable[Program],
    *,
    unread: Sequence[str],
    nginx_read: bool,
    unread_log: str | None,
    ports_read: bool,
) -> Iterable[str]:
    """What stays open, and why."""
    yield from situation.unanswering(found)
    blind = [card.index for card in found if card.processes is None and card.uuid]
    if blind:
        yield f"the processes on {usage.named(blind)}: the driver does not tell"
    known = list(programs)
    hidden = [str(each.pid) for each in known if not each.command]
    if hidden:
        yield f"what process {', '.join(hidden)} is: not to be seen from here (another container, or already gone)"
    closed = [each for each in known if each.kind in ("instance", "speech") and not each.environment_read]
    if closed:
        who = ", ".join(each.unit or f"process {each.pid}" for each in closed)
        yield f"the environment of {who}, and where its code lies: only root may read that (sudo)"
    if unread:
        yield f"the code in {', '.join(unread)}: not there, not ours to read, or too long"
    if not nginx_read:
        yield "nginx's configuration: there is none in /etc/nginx that could be read"
    if unread_log is not None:
        yield f"who answered how many requests: {unread_log} is not there, or not ours to read"
    if not ports_read:
        yield "who listens on which port: ss(8) does not answer"


# Processes.


def _programs(
    host: Host, on_gpus: Mapping[int, Process], listeners: Mapping[int, frozenset[int]]
) -> dict[int, Program]:
    commands = {pid: _words(host, pid) for pid in on_gpus}
    for path in host.glob(PurePosixPath("/proc"), "[0-9]*/cmdline"):
        argv = _words(host, int(path.parent.name))
        if proc.is_server(argv):
            commands[int(path.parent.name)] = argv
    before, begun_s = {pid: _ticks(host, pid) for pid in commands}, host.monotonic_s()
    if commands:
        host.sleep(WATCH_S)
    passed_s = max(host.monotonic_s() - begun_s, 1e-3)
    found: dict[int, Program] = {}
    for pid, argv in commands.items():
        first, last = before[pid], _ticks(host, pid)
        cores = None if first is None or last is None else (last - first) / _TICKS_PER_S / passed_s
        ports = tuple(sorted(port for port, pids in listeners.items() if pid in pids))
        found[pid] = _program(host, pid, argv, on_gpus.get(pid), cpu_cores=cores, ports=ports)
    return found


def _program(
    host: Host,
    pid: int,
    argv: tuple[str, ...],
    on_gpu: Process | None,
    *,
    cpu_cores: float | None,
    ports: Sequence[int],
) -> Program:
    environ = _bytes(host, f"/proc/{pid}/environ")
    variables = proc.variables(environ or b"")
    unit = proc.unit_of((_bytes(host, f"/proc/{pid}/cgroup") or b"").decode(errors="replace"))
    directory = host.read_link(PurePosixPath(f"/proc/{pid}/cwd"))
    scripts = proc.script_paths(argv, directory)
    return Program(
        pid=pid,
        name=short_name(argv[0]) if argv else short_name(None if on_gpu is None else on_gpu.name),
        command=argv,
        directory=None if directory is None else str(directory),
        unit=unit,
        kind=proc.recognise(
            argv,
            unit=unit,
            marked=systemd.MARK_VARIABLE in variables,
            gpu_kind=None if on_gpu is None else on_gpu.kind,
            name=None if on_gpu is None else on_gpu.name,
            code="\n".join(text for path in scripts if (text := _text(host, path)) is not None),
        ),
        visible=variables.get("CUDA_VISIBLE_DEVICES"),
        environment_read=bool(environ),
        cpu_cores=cpu_cores,
        ports=tuple(ports),
    )


def _bytes(host: Host, path: str) -> bytes | None:
    """``None`` also where it may not be read, or where the process has gone meanwhile."""
    try:
        return host.read_bytes(PurePosixPath(path))
    except CommandFailed:
        return None


def _words(host: Host, pid: int) -> tuple[str, ...]:
    return proc.words(_bytes(host, f"/proc/{pid}/cmdline") or b"")


def _ticks(host: Host, pid: int) -> int | None:
    return proc.cpu_ticks((_bytes(host, f"/proc/{pid}/stat") or b"").decode(errors="replace"))


def _listeners(host: Host) -> dict[int, frozenset[int]] | None:
    """Processes by the TCP port on which they listen; of those of others only root sees which."""
    try:
        said = host.run(("ss", "-Hltnp"), timeout_s=TIMEOUT_S).stdout
    except CommandFailed:
        return None
    found: dict[int, frozenset[int]] = {}
    for line in said.splitlines():
        fields = line.split()
        port = fields[3].rpartition(":")[2] if len(fields) > 3 else ""
        if port.isdecimal():
            pids = frozenset(map(int, re.findall(r"pid=([0-9]+)", line)))
            found[int(port)] = found.get(int(port), frozenset()) | pids
    return found


# What they were told, and what they are.


def _pins(host: Host, programs: Iterable[Program]) -> Iterable[Pin]:
    """Of whoever speaks, or would once it is started: by its process, else by the text of its unit."""
    running = [each for each in programs if each.kind in ("instance", "speech")]
    for each in running:
        if each.visible is not None:
            yield Pin(each.unit or f"process {each.pid}", each.visible)
    known = {each.unit for each in running if each.environment_read}
    for path in host.glob(render.UNIT_DIR, "*.service"):
        text = (_bytes(host, str(path)) or b"").decode(errors="replace")
        ours = systemd.instance_name(path.name) is not None
        if path.name not in known and (ours or proc.is_server(_command(text))):
            visible = systemd.visible_gpus(text)
            if visible:
                yield Pin(path.name, ",".join(visible))


def _command(unit: str) -> tuple[str, ...]:
    found = re.search(r"^ExecStart=[-@:+!]*(.*)", unit, re.MULTILINE)
    return tuple(found[1].replace('"', "").split()) if found else ()


def _scripts(programs: Iterable[Program], file: FleetFile | None) -> list[PurePosixPath]:
    """Code of servers that are not ours: of those that run, and of ``server.command``."""
    paths: list[PurePosixPath] = []
    for each in programs:
        if each.kind in ("speech", "instance"):
            paths += proc.script_paths(each.command, None if each.directory is None else PurePosixPath(each.directory))
    if file is not None and file.config.server.command is not None:
        directory = file.config.server.directory
        paths += proc.script_paths(file.config.server.command, None if directory is None else PurePosixPath(directory))
    return list(dict.fromkeys(paths))


def _text(host: Host, path: PurePosixPath) -> str | None:
    content = _bytes(host, str(path))
    return None if content is None or len(content) > CODE_BYTES else content.decode(errors="replace")


def _nginx_texts(host: Host) -> dict[str, str]:
    paths = (path for directory, pattern in _NGINX_FILES for path in host.glob(PurePosixPath(directory), pattern))
    return {str(path): content.decode(errors="replace") for path in paths if (content := _bytes(host, str(path)))}


def _end_of(host: Host, path: str) -> bytes | None:
    try:
        piece = host.read_on(PurePosixPath(path), {}, limit_bytes=LOG_BYTES)
    except CommandFailed:
        return None
    return None if piece is None else piece.content


def _tf32(host: Host, file: FleetFile) -> dict[str, bool]:
    """Of our own instances that answer, have a GPU, and heed the setting."""
    if not file.fleet.service.speaks_notify:
        return {}

    def ask(instance: Instance) -> bool | None:
        answer = host.request("GET", f"http://{instance.host}:{instance.port}/readyz", timeout_s=ANSWER_TIMEOUT_S)
        return None if answer is None else _says_tf32(answer.body)

    # All at once, so that those that hang are waited for together.
    with ThreadPoolExecutor(len(file.fleet.instances)) as pool:
        told = zip(file.fleet.instances, pool.map(ask, file.fleet.instances), strict=True)
        return {instance.name: on for instance, on in told if on is not None}


def _says_tf32(body: bytes) -> bool | None:
    try:
        said = json.loads(body)
        on = said["facts"]["tf32"]["matmul"]
        # The fast engine is exact where it is not in 16 bits, whatever server.tf32 says (docs/fast.md).
        heeded = said.get("engine") != "fast"
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return on if isinstance(on, bool) and heeded else None
