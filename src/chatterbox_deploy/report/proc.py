"""What Linux tells of a process below ``/proc/PID``, and what a process is. Reads nothing."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal

from chatterbox_deploy import systemd

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Kind = Literal["instance", "mps", "speech", "display", "other"]

WORDS: Mapping[Kind, str] = {
    "instance": "an instance of this fleet",
    "mps": "NVIDIA's MPS",
    "speech": "a speech server",
    "display": "the desktop",
    "other": "none of ours",
}

_SPEECH = re.compile(r"chatterbox|xtts|kokoro|orpheus|speech|(?:^|[^a-z])tts(?:[^a-z]|$)", re.IGNORECASE)
_IMPORTS_SPEECH = re.compile(r"^\s*(?:from|import)\s+(?:chatterbox|TTS|kokoro|f5_tts)\b", re.MULTILINE)
_INTERPRETER = re.compile(r"(?:python[0-9.]*|uvicorn|gunicorn|hypercorn)")
_DISPLAY = re.compile(
    r"(?:Xorg|Xwayland|gnome-\S+|kwin\S*|plasmashell|sddm\S*|lightdm|gdm\S*|mutter\S*|sway|weston|firefox\S*|chrom\S+)"
)
_SERVICE = re.compile(r"/([^/]+\.service)(?:/|$)", re.MULTILINE)
_ESCAPED = re.compile(r"\\x([0-9a-f]{2})")


def unit_of(cgroup: str) -> str | None:
    """The innermost service that ``/proc/PID/cgroup`` names (cgroups(7)); ``None`` where there is none.

    A user's session is a service to systemd, too (``user@1000.service``): that is nobody's unit.
    """
    found = [name for name in _SERVICE.findall(cgroup) if not name.startswith("user@")]
    return _ESCAPED.sub(lambda code: chr(int(code[1], 16)), found[-1]) if found else None


def words(content: bytes) -> tuple[str, ...]:
    """``/proc/PID/cmdline`` or ``environ``: what stands between the zero bytes (proc(5))."""
    return tuple(content.decode(errors="replace").rstrip("\0").split("\0")) if content else ()


def variables(environ: bytes) -> dict[str, str]:
    """``/proc/PID/environ``: as it was when the process began."""
    pairs = (word.partition("=") for word in words(environ))
    return {name: value for name, equals, value in pairs if equals}


def cpu_ticks(stat: str) -> int | None:
    """Clock ticks of CPU time so far, of all threads, in user and kernel mode (proc(5): fields 14 and 15)."""
    # The name, in parentheses, may hold anything, also a parenthesis.
    fields = stat.rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12]) if len(fields) > 12 else None


def script_paths(argv: Sequence[str], directory: PurePosixPath | None) -> list[PurePosixPath]:
    """Files of Python code that a command line names: ``python api_server.py``, ``uvicorn api_server:app``."""
    if not argv or not _INTERPRETER.fullmatch(PurePosixPath(argv[0]).name):
        return []
    named = [word for word in argv[1:] if word.endswith(".py")]
    named += [f"{found[1].replace('.', '/')}.py" for word in argv[1:] if (found := re.fullmatch(r"([\w.]+):\w+", word))]
    if directory is None:
        return [PurePosixPath(word) for word in named if word.startswith("/")]
    return [directory / word for word in named]


def is_server(argv: Sequence[str]) -> bool:
    """Whether a command line is that of a speech server, by its words: Python, and not this tool."""
    line = re.sub("chatterbox[-_]deploy", "", " ".join(argv))
    return any(_INTERPRETER.fullmatch(PurePosixPath(word).name) for word in argv[:2]) and bool(_SPEECH.search(line))


def recognise(
    argv: Sequence[str], *, unit: str | None, marked: bool, gpu_kind: str | None, name: str | None, code: str = ""
) -> Kind | None:
    """What a process is; ``None`` where what is known does not say.

    ``marked``: it carries the mark of our units. ``gpu_kind`` and ``name`` are as the GPU's driver tells them; ``code``
    is what of its code could be read.
    """
    program = PurePosixPath(argv[0] if argv else (name or "").partition(" ")[0]).name
    if marked or (unit is not None and systemd.instance_name(unit) is not None):
        return "instance"
    if program.startswith("nvidia-cuda-mps") or (unit is not None and systemd.is_mps_unit(unit)):
        return "mps"
    if "chatterbox_server" in argv or is_server(argv) or _IMPORTS_SPEECH.search(code) or _SPEECH.search(unit or ""):
        return "speech"
    if gpu_kind == "G" or _DISPLAY.fullmatch(program):
        return "display"
    return "other" if argv else None
