"""systemd's words: unit names, quoting, and the decisions that only its unit files have. Runs nothing."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatterbox_deploy.fleet import Fleet

TARGET = "chatterbox-tts.target"
FRONT_UNIT = "chatterbox-tts-nginx.service"
NODES_UNIT = "chatterbox-tts-gpu-nodes.service"

_NEEDS_NO_QUOTES = re.compile(r"[A-Za-z0-9_=./:,@+~-]+")
_HOMES = ("/home/", "/root/", "/run/user/")


def unit_name(instance_name: str) -> str:
    """``chatterbox-tts-gpu0.service`` for ``gpu0``."""
    return f"chatterbox-tts-{instance_name}.service"


def quote(text: str) -> str:
    """One word of a setting such as ``Environment=`` (systemd.syntax(7), "Quoting"; ``%``: systemd.unit(5))."""
    if _NEEDS_NO_QUOTES.fullmatch(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


def quote_command(argv: Sequence[str]) -> str:
    """``ExecStart=``'s value: as ``quote``, and ``$`` is not a variable (systemd.service(5), "Command lines")."""
    return " ".join(quote(argument).replace("$", "$$") for argument in argv)


def protect_home(fleet: Fleet) -> Literal["yes", "read-only"]:
    """``read-only`` if the fleet runs or reads something below a home directory, else the homes are hidden."""
    words = [fleet.service.directory or ""]
    for instance in fleet.instances:
        words += [*instance.command, *instance.environment.values()]
    # After "=" as well: --config=/home/…
    paths = [path for word in words for path in (word, word.partition("=")[2])]
    return "read-only" if any(f"{path}/".startswith(_HOMES) for path in paths) else "yes"
