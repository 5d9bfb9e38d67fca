"""nginx's words: quoting, and who is listed in a front's text. Runs nothing."""

from __future__ import annotations

import re

from chatterbox_deploy.fleet import Upstream

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


def quote(text: str) -> str:
    """One parameter of a directive. A ``$`` cannot be escaped where nginx knows variables: ``config`` refuses it."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
