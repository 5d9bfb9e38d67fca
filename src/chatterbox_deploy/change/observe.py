"""Ask a host what is there. Decides nothing."""

from __future__ import annotations

import hashlib
import re
from itertools import chain
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from chatterbox_deploy import nginx, render, systemd
from chatterbox_deploy.change.facts import HostState, MpsState, UnitState
from chatterbox_deploy.config.values import split_listen
from chatterbox_deploy.errors import CommandFailed
from chatterbox_deploy.fleet import MPS_PROGRAM
from chatterbox_deploy.gpu import query

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from chatterbox_deploy.change.ledger import Ledger
    from chatterbox_deploy.fleet import Fleet
    from chatterbox_deploy.host import Host
    from chatterbox_deploy.render import RenderedFile


def files(host: Host, wanted: Iterable[RenderedFile], remembered: Iterable[str] = ()) -> dict[PurePosixPath, str]:
    """Text of every file that is wanted, that has a name we give to files, or that we remember; whoever wrote it."""
    paths = chain(
        (file.path for file in wanted),
        map(PurePosixPath, remembered),
        host.glob(render.UNIT_DIR, "chatterbox-tts*.service"),
        host.glob(render.UNIT_DIR, "chatterbox-tts*.target"),
        host.glob(render.UNIT_DIR, "chatterbox-tts*.timer"),
        host.glob(render.FRONT_PATH.parent, "chatterbox-tts*.conf"),
    )
    contents = {path: host.read_bytes(path) for path in paths}
    # Whoever wrote bytes that are no text, it was not us.
    return {path: content.decode(errors="replace") for path, content in contents.items() if content is not None}


PROPERTIES = ("Id", "ActiveState", "MainPID", "NeedDaemonReload", "UnitFileState")
SHOW_TIMEOUT_S = 30.0


def state(host: Host, ledger: Ledger, *, wanted: Iterable[RenderedFile] = (), fleet: Fleet | None = None) -> HostState:
    """Everything that a plan has to know.

    Raises:
        CommandFailed: systemd does not answer, or a file cannot be read.
    """
    on_disk = files(host, wanted, ledger.paths)
    paths = {path.name for path in on_disk if path.parent == render.UNIT_DIR} | {systemd.TARGET, systemd.RECYCLE_TIMER}
    # The glob is for what runs though its file is gone.
    shown = _show(host, [*sorted(paths), "chatterbox-tts-*.service"])
    instances = {
        name: _unit_state(host, unit, on_disk.get(render.UNIT_DIR / unit_name))
        for unit_name, unit in shown.items()
        if (name := systemd.instance_name(unit_name)) is not None
    }
    target = shown.get(systemd.TARGET, {})
    needed = () if fleet is None else tuple(path for path in needs(fleet) if not exists(host, path))
    taken = listening(host)
    absent = () if fleet is None else tuple(name for name in _programs(fleet) if not _is_installed(host, name))
    named = () if fleet is None else fleet.key_files
    keys = {path: digest for path in named if (digest := _key_digest(host, path)) is not None}
    return HostState(
        files=on_disk,
        instances=instances,
        mps_daemons={
            unit_name: _mps_state(host, unit, on_disk.get(render.UNIT_DIR / unit_name))
            for unit_name, unit in shown.items()
            if systemd.is_mps_unit(unit_name)
        },
        gpus=gpus(host) if fleet is not None and fleet.service.uses_gpu else (),
        cpus=cpus(host),
        enabled=target.get("UnitFileState") == "enabled",
        active=target.get("ActiveState") == "active",
        timed=shown.get(systemd.RECYCLE_TIMER, {}).get("ActiveState") == "active",
        watched=shown.get(systemd.MONITOR_UNIT, {}).get("ActiveState", "inactive") not in ("inactive", "failed"),
        listening=taken,
        strangers={} if fleet is None else _strangers(host, _front_ports(fleet) & taken, on_disk),
        edited=frozenset(path for path, text in on_disk.items() if ledger.wrote(path, text) is False),
        keys=keys,
        changed_keys=frozenset(path for path in named if path in ledger.keys and ledger.keys[path] != keys.get(path)),
        missing=frozenset([*needed, *absent]),
        drained=frozenset(ledger.drained),
        interrupted=None if ledger.begun is None else ledger.begun.command,
        stale=any(unit.get("NeedDaemonReload") == "yes" for unit in shown.values()),
    )


def _show(host: Host, units: Sequence[str]) -> dict[str, dict[str, str]]:
    """What systemd tells of units, by name."""
    try:
        said = host.run(systemd.show_argv(units, PROPERTIES), timeout_s=SHOW_TIMEOUT_S).stdout
    except CommandFailed as error:
        if systemd.is_absent(str(error)):
            msg = (
                "cannot ask systemd: none runs here; `chatterbox-deploy up` runs a fleet without it, and "
                "`chatterbox-deploy apply --root DIR` installs one into a directory tree, for where it does"
            )
            raise CommandFailed(msg) from None
        raise
    return {unit["Id"]: unit for unit in systemd.parse_show(said) if "Id" in unit}


def _unit_state(host: Host, shown: dict[str, str], text: str | None) -> UnitState:
    environ = _environ(host, shown, text)
    mark = None if environ is None else systemd.find_mark(environ)
    return UnitState(shown["ActiveState"], mark, has_process=_process(shown) != 0)


def _mps_state(host: Host, shown: dict[str, str], text: str | None) -> MpsState:
    environ = _environ(host, shown, text)
    return MpsState(shown["ActiveState"], None if environ is None else systemd.mps_digest(environ))


def _process(shown: dict[str, str]) -> int:
    return int(shown.get("MainPID") or 0)


def _environ(host: Host, shown: dict[str, str], text: str | None) -> str | None:
    """The environment of a unit's process; ``None`` where none runs."""
    if not (process := _process(shown)):
        return None
    try:
        environ = host.read_bytes(PurePosixPath(f"/proc/{process}/environ"))
    except CommandFailed:
        # Only root may look: then what lies on the disk is the best guess.
        return text
    return None if environ is None else environ.decode(errors="replace")


def gpus(host: Host) -> tuple[query.Gpu, ...]:
    """GPUs of the host; none where nvidia-smi is not there, or finds no driver."""
    try:
        return query.parse(host.run(query.ask_argv(), timeout_s=SHOW_TIMEOUT_S).stdout)
    except CommandFailed:
        return ()


def cpus(host: Host) -> frozenset[int] | None:
    """CPUs that are online (cpu(7) of sysfs: ``0-3,8``)."""
    content = host.read_bytes(PurePosixPath("/sys/devices/system/cpu/online"))
    if content is None:
        return None
    spans = (span.partition("-") for span in content.decode().strip().split(","))
    return frozenset(cpu for first, _, last in spans for cpu in range(int(first), int(last or first) + 1))


def _front_ports(fleet: Fleet) -> frozenset[int]:
    listens = (fleet.front.listen, fleet.front.http_listen)
    return frozenset(split_listen(listen)[1] for listen in listens if listen is not None)


def _strangers(host: Host, ports: Iterable[int], on_disk: Mapping[PurePosixPath, str]) -> dict[int, str]:
    """Who but nginx listens on these ports, as far as we may see; a front of ours that listens there is nginx."""
    ours = nginx.find_ports(on_disk.get(render.FRONT_PATH, ""))
    found: dict[int, str] = {}
    for port in sorted(set(ports) - ours):
        try:
            said = host.run(("ss", "-Hltnp", f"sport = :{port}"), timeout_s=SHOW_TIMEOUT_S, check=False).stdout
        except CommandFailed:
            continue
        # users:(("python3",pid=812,fd=3)); of the processes of others only root sees the name.
        names = re.findall(r'\(\("([^"]*)"', said)
        if names and nginx.PROGRAM not in names:
            found[port] = names[0]
    return found


PROGRAM_DIRS = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
"""Where systemd looks for programs (systemd.exec(5), "PATH")."""


def _programs(fleet: Fleet) -> tuple[str, ...]:
    return (nginx.PROGRAM, MPS_PROGRAM) if fleet.mps_daemons else (nginx.PROGRAM,)


def _is_installed(host: Host, program: str) -> bool:
    return any(exists(host, f"{directory}/{program}") for directory in PROGRAM_DIRS)


def needs(fleet: Fleet) -> list[str]:
    """Files without which nothing would start: keys, certificates, and the programs of the instances."""
    programs = {instance.command[0] for instance in fleet.instances}
    tls = [path for path in (fleet.front.tls_certificate, fleet.front.tls_key) if path is not None]
    return [*fleet.key_files, *tls, *sorted(programs)]


def exists(host: Host, path: str) -> bool:
    """Whether there is such a file; what may not be read is there."""
    try:
        return host.read_bytes(PurePosixPath(path)) is not None
    except CommandFailed:
        return True


def _key_digest(host: Host, path: str) -> str | None:
    """Tells a change of a key file, and nothing of the keys; ``None`` if it is not there or not ours to read."""
    try:
        content = host.read_bytes(PurePosixPath(path))
    except CommandFailed:
        return None
    return None if content is None else hashlib.sha256(content).hexdigest()


def first_key(host: Host, path: str) -> str:
    """The first API key in a file of lines ``NAME KEY``; empty if there is none.

    Raises:
        CommandFailed: it cannot be read.
    """
    content = (host.read_bytes(PurePosixPath(path)) or b"").decode(errors="replace")
    words = (line.split() for line in content.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    return next((named[1] for named in words if len(named) == 2), "")


def listening(host: Host) -> frozenset[int]:
    """TCP ports on which something listens (proc_net_tcp: state 0A)."""
    return frozenset(port for port, state in _sockets(host) if state == "0A")


def connections(host: Host, port: int) -> int:
    """How many connections to a port are open (state 01); each is counted once, at the server's end."""
    return sum(1 for local, state in _sockets(host) if local == port and state == "01")


def _sockets(host: Host) -> list[tuple[int, str]]:
    """(local port, state in hexadecimal) of every TCP socket."""
    found: list[tuple[int, str]] = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        content = host.read_bytes(PurePosixPath(table)) or b""
        for line in content.decode().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            found.append((int(local.rpartition(":")[2], 16), state))
    return found
