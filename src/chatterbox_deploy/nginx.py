"""nginx's words: quoting, who is listed in a front's text, and what its access log tells. Runs nothing."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from itertools import zip_longest
from typing import TYPE_CHECKING

from chatterbox_deploy.fleet import SPEECH_ROUTES, Upstream

if TYPE_CHECKING:
    from collections.abc import Mapping

_SERVER = re.compile(r"^ *server (\S+):([0-9]+)([^;]*); # ([a-z0-9-]+)(, leaving)?", re.MULTILINE)

_LISTEN = re.compile(r"^ *listen \S*?([0-9]+)(?: [^;]*)?;", re.MULTILINE)

PROGRAM = "nginx"

MAX_PASSES = 9
"""nginx follows ten internal redirects (``NGX_HTTP_MAX_URI_CHANGES``); the last one is for the error."""


def passes(instances: int) -> int:
    """How many instances a request may be offered to in turn: up to 9, fewer than 5 of them twice; at least one."""
    return min(MAX_PASSES, max(1, 2 * instances))


def find_upstreams(front: str) -> tuple[Upstream, ...]:
    """Who is listed in the text of a front that we wrote."""
    return tuple(
        Upstream(name, host, int(port), drained=" down" in how and not leaving, leaving=bool(leaving))
        for host, port, how, name, leaving in _SERVER.findall(front)
    )


def find_ports(front: str) -> frozenset[int]:
    """On which it listens."""
    return frozenset(int(port) for port in _LISTEN.findall(front))


@dataclass(frozen=True, slots=True)
class Request:
    """One request that the front has answered, as its access log has it."""

    ended: datetime
    """To the second."""

    status: int
    instance: str | None
    """Who was asked last, by the front's own list; ``None`` where nobody was asked."""

    duration_s: float
    asked: tuple[tuple[str, int | None], ...] = ()
    """(address, status) of every pass in its order; ``None``: it was cut short before there was one."""

    route: str = ""
    """The path that was asked for, without its query."""


# nginx separates those asked in one pass by commas, and passes by colons.
_PASSES = re.compile(r" : |, ")


def parse_request(line: bytes) -> Request | None:
    """One line of the access log; ``None`` for one that is none of ours, or not whole."""
    try:
        said = json.loads(line)
        asked = [one for one in _PASSES.split(said["tried"]) if one]
        statuses = [int(one) if one.isdigit() else None for one in _PASSES.split(said["tries"])[: len(asked)]]
        return Request(
            ended=datetime.fromisoformat(said["time"]),
            status=int(said["status"]),
            instance=said["instance"] or None,
            duration_s=float(said["duration_s"]),
            asked=tuple(zip_longest(asked, statuses)),
            route=said["uri"].partition("?")[0],
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def quote(text: str) -> str:
    """One parameter of a directive. A ``$`` cannot be escaped where nginx knows variables: ``config`` refuses it."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


@dataclass(frozen=True, slots=True)
class Block:
    """An upstream in anybody's configuration."""

    path: str
    name: str
    ports: tuple[int, ...]
    least_conn: bool
    zone: bool
    """Whether all workers count together."""


_COMMENT = re.compile(r"(?m)(?:^|(?<=[\s;{}]))#.*$")
_BLOCK = re.compile(r"(?<![\w$-])upstream\s+(\S+)\s*\{([^{}]*)\}")


def find_blocks(text: str, path: str) -> tuple[Block, ...]:
    """Every upstream of a configuration file that lists servers by their ports."""
    found: list[Block] = []
    for name, inside in _BLOCK.findall(_COMMENT.sub("", text)):
        directives = [words for line in inside.split(";") if (words := line.split())]
        addresses = [words[1] for words in directives if words[0] == "server" and len(words) > 1]
        ports = tuple(int(port) for address in addresses if (port := address.rpartition(":")[2]).isdecimal())
        names = {words[0] for words in directives}
        found.append(Block(path, name.strip("\"'"), ports, "least_conn" in names, "zone" in names))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Traffic:
    """What the access log of a front of ours tells of who answered."""

    answered: Mapping[str, int]
    """Requests that made an instance speak, and that it answered with 200; by instance."""

    first: str
    last: str
    """Times of the first and the last of them, as the log has them."""


def read_log(log: bytes) -> Traffic | None:
    """Lines of ``log_format chatterbox``; what is none of them (the log may begin in the middle of one) does not count.

    ``None`` where no instance answered.
    """
    requests = [request for line in log.splitlines() if (request := parse_request(line)) is not None]
    heard = [each for each in requests if each.status == 200 and each.instance and each.route in SPEECH_ROUTES]
    if not heard:
        return None
    answered = Counter(each.instance for each in heard if each.instance)
    return Traffic(dict(answered), heard[0].ended.isoformat(), heard[-1].ended.isoformat())
