"""Ask a host what is there. Decides nothing."""

from __future__ import annotations

import hashlib
import re
from itertools import chain
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from chatterbox_deploy import nginx, render, systemd
from chatterbox_deploy.config import split_listen
from chatterbox_deploy.errors import CommandFailed
from chatterbox_deploy.facts import HostState, UnitState

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from chatterbox_deploy.fleet import Fleet
    from chatterbox_deploy.host import Host
    from chatterbox_deploy.ledger import Ledger
    from chatterbox_deploy.render import RenderedFile


def files(host: Host, wanted: Iterable[RenderedFile]) -> dict[PurePosixPath, str]:
    """Text of every file that is wanted, or that has a name we give to files; whoever wrote it."""
    paths = chain(
        (file.path for file in wanted),
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
    on_disk = files(host, wanted)
    paths = {path.name for path in on_disk if path.parent == render.UNIT_DIR} | {systemd.TARGET, systemd.RECYCLE_TIMER}
    shown = {
        unit["Id"]: unit
        for unit in systemd.parse_show(
            host.run(
                # The glob is for what runs though its file is gone.
                systemd.show_argv([*sorted(paths), "chatterbox-tts-*.service"], PROPERTIES),
                timeout_s=SHOW_TIMEOUT_S,
            ).stdout
        )
        if "Id" in unit
    }
    instances = {
        name: _unit_state(host, unit, on_disk.get(render.UNIT_DIR / unit_name))
        for unit_name, unit in shown.items()
        if (name := systemd.instance_name(unit_name)) is not None
    }
    target = shown.get(systemd.TARGET, {})
    needed = () if fleet is None else tuple(path for path in needs(fleet) if not exists(host, path))
    taken = listening(host)
    absent = () if fleet is None or _is_installed(host, NGINX_PROGRAM) else (NGINX_PROGRAM,)
    named = () if fleet is None else fleet.key_files
    keys = {path: digest for path in named if (digest := _key_digest(host, path)) is not None}
    return HostState(
        files=on_disk,
        instances=instances,
        enabled=target.get("UnitFileState") == "enabled",
        active=target.get("ActiveState") == "active",
        timed=shown.get(systemd.RECYCLE_TIMER, {}).get("ActiveState") == "active",
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


def _unit_state(host: Host, shown: dict[str, str], text: str | None) -> UnitState:
    process = int(shown.get("MainPID") or 0)
    try:
        environ = host.read_bytes(PurePosixPath(f"/proc/{process}/environ")) if process else None
        mark = None if environ is None else systemd.find_mark(environ.decode(errors="replace"))
    except CommandFailed:
        # Only root may look: then what lies on the disk is the best guess.
        mark = None if text is None else systemd.find_mark(text)
    return UnitState(shown["ActiveState"], mark, has_process=process != 0)


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
        if names and NGINX_PROGRAM not in names:
            found[port] = names[0]
    return found


NGINX_PROGRAM = "nginx"
PROGRAM_DIRS = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
"""Where systemd looks for programs (systemd.exec(5), "PATH")."""


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
