"""systemd's words: unit names, quoting, and the decisions that only its unit files have. Runs nothing."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatterbox_deploy.fleet import Fleet, MpsDaemon

TARGET = "chatterbox-tts.target"
FRONT_UNIT = "chatterbox-tts-nginx.service"
NODES_UNIT = "chatterbox-tts-gpu-nodes.service"
NGINX_UNIT = "nginx.service"
"""The distribution's: it serves our front beside whatever else it serves."""

RECYCLE_UNIT = "chatterbox-tts-recycle.service"
RECYCLE_TIMER = "chatterbox-tts-recycle.timer"
MONITOR_UNIT = "chatterbox-tts-monitor.service"
"""Looks at GPUs and front for node_exporter."""

STARTS_AT_BOOT = PurePosixPath(f"/etc/systemd/system/multi-user.target.wants/{TARGET}")
"""The link that ``systemctl enable`` makes."""

_MPS_UNIT = re.compile(r"chatterbox-tts-(mps-[a-z0-9-]+)\.service")
"""The daemon through which the instances on a GPU share it."""

MPS_MARK_VARIABLE = "FLEET_MPS"
"""Tells from the environment of such a daemon which text of its unit it was started by."""

_MPS_MARK = re.compile(rf"(?:^|[\0\n=]){MPS_MARK_VARIABLE}=([0-9a-f]{{12}})(?=[\0\n]|$)")

_CLIENT_OF = re.compile(r"^PartOf=(chatterbox-tts-mps-[a-z0-9-]+\.service)$", re.MULTILINE)

_NEEDS_NO_QUOTES = re.compile(r"[A-Za-z0-9_=./:,@+~-]+")
_HOMES = ("/home/", "/root/", "/run/user/")


_INSTANCE_UNIT = re.compile(r"chatterbox-tts-((?:gpu|mig-)[a-z0-9-]+)\.service")
"""Names of instances begin with ``gpu`` or ``mig-``; those of the other units do not, except the nodes of all GPUs."""

MARK_VARIABLE = "FLEET_INSTANCE"
"""Tells from a process's environment which text of its unit it was started by, and where it listens."""

_MARK = re.compile(rf"(?:^|[\0\n= \"]){MARK_VARIABLE}=([a-z0-9-]+)/([0-9.]+):([0-9]+)/([0-9a-f]{{12}})(?=[\0\n \"]|$)")


@dataclass(frozen=True, slots=True)
class Mark:
    """What an instance unit says of itself, and passes to its process."""

    name: str
    host: str
    port: int
    digest: str
    """Of the unit's text without comments: two texts that differ in them alone are the same unit."""

    def __str__(self) -> str:
        """As the variable's value."""
        return f"{self.name}/{self.host}:{self.port}/{self.digest}"


def digest(text: str) -> str:
    """Of what systemd reads of a unit: comments and empty lines make no difference."""
    lines = (line.strip() for line in text.splitlines())
    return hashlib.sha256("\n".join(line for line in lines if line and line[0] not in "#;").encode()).hexdigest()[:12]


def find_mark(text: str) -> Mark | None:
    """The mark in a unit's text, or in ``/proc/PID/environ``; ``None`` where there is none."""
    found = _MARK.search(text)
    return None if found is None else Mark(found[1], found[2], int(found[3]), found[4])


def is_edited(text: str) -> bool:
    """Whether somebody changed a unit after it was marked: its process may then run what no text of ours says."""
    mark = find_mark(text)
    return mark is not None and digest(text.replace(str(mark), str(replace(mark, digest="")))) != mark.digest


def mps_digest(text: str) -> str | None:
    """The digest in the unit of an MPS daemon, or in its ``/proc/PID/environ``; ``None`` where there is none."""
    found = _MPS_MARK.search(text)
    return None if found is None else found[1]


def mps_unit_of(text: str) -> str | None:
    """The unit of the MPS daemon that an instance's unit is tied to; ``None`` where it is tied to none."""
    found = _CLIENT_OF.search(text)
    return None if found is None else found[1]


def show_argv(units: Sequence[str], properties: Sequence[str]) -> tuple[str, ...]:
    """Command that prints properties of units; globs match what is loaded."""
    return ("systemctl", "show", f"--property={','.join(properties)}", "--", *units)


_ABSENT = re.compile(
    r"not been booted with systemd|Failed to connect to .*bus.*: (?:Host is down|No such file or directory)"
    r"|cannot run `systemctl .*`: no such file or directory",
)


def is_absent(said: str) -> bool:
    """Whether what came of a ``systemctl`` means that no systemd runs here, or that there is none."""
    return _ABSENT.search(said) is not None


def parse_show(stdout: str) -> list[dict[str, str]]:
    """What ``systemctl show`` printed: one mapping a unit, in its order."""
    blocks = (block.strip("\n") for block in stdout.split("\n\n"))
    return [dict(line.partition("=")[::2] for line in block.splitlines()) for block in blocks if block]


_VISIBLE = re.compile(r'^Environment="?CUDA_VISIBLE_DEVICES=([^"\n]*)', re.MULTILINE)


def visible_gpus(text: str) -> tuple[str, ...]:
    """GPUs that a unit's text pins its process to."""
    found = _VISIBLE.search(text)
    return tuple(found[1].split(",")) if found else ()


def is_notify(text: str) -> bool:
    """Whether a unit's process tells systemd when it is ready: then it is a server of ours."""
    return "\nType=notify\n" in text


def changed_settings(before: str, after: str) -> list[str]:
    """Names of what differs between two texts of a unit: settings, and variables of the environment."""

    def settings(text: str) -> dict[str, list[str]]:
        named: dict[str, list[str]] = {}
        for line in text.splitlines():
            key, equals, value = line.partition("=")
            if key == "Environment":
                key = value.strip('"').partition("=")[0]
            if equals and line[0] not in "#;[" and key not in (MARK_VARIABLE, "Description"):
                named.setdefault(key, []).append(value)
        return named

    old, new = settings(before), settings(after)
    return [key for key in {**new, **old} if old.get(key) != new.get(key)]


def journal_argv(
    units: Sequence[str], *, lines: int | None = None, since: str | None = None, follow: bool = False
) -> tuple[str, ...]:
    """Command that prints what units wrote, each line with the unit's name where there are several."""
    return (
        "journalctl",
        "--no-pager",
        *(() if len(units) == 1 else ("--output=with-unit",)),
        *(() if lines is None else (f"--lines={lines}",)),
        *(() if since is None else (f"--since={since}",)),
        *(("--follow",) if follow else ()),
        *(f"--unit={unit}" for unit in units),
    )


def unit_name(instance_name: str) -> str:
    """``chatterbox-tts-gpu0.service`` for ``gpu0``."""
    return f"chatterbox-tts-{instance_name}.service"


def instance_name(unit: str) -> str | None:
    """``gpu0`` for ``chatterbox-tts-gpu0.service``; ``None`` for a unit that is no instance."""
    found = _INSTANCE_UNIT.fullmatch(unit)
    return None if found is None or unit == NODES_UNIT else found[1]


def is_mps_unit(unit: str) -> bool:
    """Whether a unit of this name is an MPS daemon of ours."""
    return _MPS_UNIT.fullmatch(unit) is not None


def quote(text: str) -> str:
    """One word of a setting such as ``Environment=`` (systemd.syntax(7), "Quoting"; ``%``: systemd.unit(5))."""
    if _NEEDS_NO_QUOTES.fullmatch(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


def quote_command(argv: Sequence[str]) -> str:
    """``ExecStart=``'s value: as ``quote``, and ``$`` is not a variable (systemd.service(5), "Command lines")."""
    return " ".join(quote(argument).replace("$", "$$") for argument in argv)


def tell_clients_command(daemon: MpsDaemon) -> tuple[str, ...]:
    """Writes what the clients of an MPS daemon are told: each GPU by its UUID, in the daemon's order.

    Fails, and writes nothing, if there is no such GPU.
    """
    names = [f"gpu{number}" for number in range(len(daemon.gpus))]
    found = (
        f"$(nvidia-smi --id={gpu} --query-gpu=uuid --format=csv,noheader)" if gpu.isdigit() else gpu
        for gpu in daemon.gpus
    )
    asked = " && ".join(f"{name}={gpu}" for name, gpu in zip(names, found, strict=True))
    told = ",".join(f"${name}" for name in names)
    return ("/bin/sh", "-c", f"{asked} && echo CUDA_VISIBLE_DEVICES={told} > {daemon.clients_file}")


def protect_home(fleet: Fleet) -> Literal["yes", "read-only"]:
    """``read-only`` if the fleet runs or reads something below a home directory, else the homes are hidden."""
    words = [fleet.service.directory or ""]
    for instance in fleet.instances:
        words += [*instance.command, *instance.environment.values()]
    # After "=" as well: --config=/home/…
    paths = [path for word in words for path in (word, word.partition("=")[2])]
    return "read-only" if any(f"{path}/".startswith(_HOMES) for path in paths) else "yes"
