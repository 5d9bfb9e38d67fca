"""What a single value of ``fleet.toml`` may be: narrow types, and what is said of a value that is none of theirs."""

from __future__ import annotations

import ipaddress
import re
import string
from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

_UUID = r"(?:GPU|MIG)-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_GPU = rf"(?:0|[1-9][0-9]?|{_UUID})"

MAX_INSTANCES_PER_GPU = 16
"""More replicas than this share a GPU badly: even a tiny model spends its time switching contexts."""

RESERVED_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE",
    "CUDA_MPS_LOG_DIRECTORY",
    "CUDA_MPS_PIPE_DIRECTORY",
    "FLEET_INSTANCE",
    "FLEET_MPS",
    "INVOCATION_ID",
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
)
"""Environment the unit itself decides; an operator's value would silently break pinning or readiness."""


SMALLEST_MEMORY_MB = 256
"""Any engine holds as much from the start: with less it would be recycled, or killed, for ever."""


def _absolute_path(value: str) -> str:
    """A path that means the same to systemd, nginx and the shell, quoted or not."""
    if not re.fullmatch(r"/[A-Za-z0-9._/+@:=,~-]*", value) or ".." in PurePosixPath(value).parts:
        raise PydanticCustomError(
            "path",
            "should be an absolute path without spaces, '..' or characters special to nginx or systemd",
        )
    return value


def _printable(value: str) -> str:
    if not value.isprintable():
        raise PydanticCustomError("printable", "should be one line of printable characters")
    return value


def _listen(value: str) -> str:
    try:
        split_listen(value)
    except ValueError:
        raise PydanticCustomError(
            "listen", "should be ADDRESS:PORT, such as '127.0.0.1:6095', '0.0.0.0:80' or '[::1]:6095'"
        ) from None
    return value


def split_listen(listen: str) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]:
    """Address and port of ``ADDRESS:PORT``.

    Raises:
        ValueError: not an IP address (IPv6 in brackets), or a port outside 1..65535.
    """
    host, _, port_text = listen.rpartition(":")
    if "%" in host:
        # A zone (fe80::1%eth0) may hold any text at all, and nginx listens on none.
        msg = f"an address with a zone: {host}"
        raise ValueError(msg)
    bracketed = host.startswith("[") and host.endswith("]")
    address = ipaddress.IPv6Address(host[1:-1]) if bracketed else ipaddress.IPv4Address(host)
    if not re.fullmatch(r"[1-9][0-9]{0,4}", port_text) or int(port_text) > 65535:
        msg = f"not a port: {port_text}"
        raise ValueError(msg)
    return address, int(port_text)


def _argument(value: str) -> str:
    """One argument of ``server.command``; ``{port}`` and ``{host}`` are filled in, ``{{`` is a brace."""
    _printable(value)
    if not placeholders(value) <= {"port", "host"}:
        raise PydanticCustomError(
            "placeholder",
            "may hold only {placeholders}; write a plain brace twice",
            {"placeholders": "{port} and {host}"},
        )
    return value


def placeholders(argument: str) -> set[str]:
    """Names in braces; ``""`` stands for anything that is more than a name, or not closed."""
    try:
        parts = list(string.Formatter().parse(argument))
    except ValueError:
        return {""}
    return {"" if spec or conversion else name for _, name, spec, conversion in parts if name is not None}


def _variable_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
        raise PydanticCustomError("variable", "should be a name of letters, digits and '_'")
    if value.startswith("CHATTERBOX_") or value in RESERVED_VARIABLES:
        raise PydanticCustomError("variable", "is set by the unit itself and cannot be given here")
    return value


def _voice(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", value):
        raise PydanticCustomError("voice", "should be a voice's name: 1 to 64 letters, digits, '_' and '-'")
    return value


def _host_name(value: str) -> str:
    label = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
    if len(value) > 253 or not re.fullmatch(rf"{label}(\.{label})*", value):
        raise PydanticCustomError("host_name", "should be a host's name in lower case, such as 'tts.example.com'")
    return value


def _origin(value: str) -> str:
    """An origin as a browser writes it: the header is compared letter for letter."""
    if value != "*" and not re.fullmatch(r"https?://(?:[a-z0-9.-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?", value):
        raise PydanticCustomError(
            "origin", "should be '*' or like 'https://example.com' or 'http://localhost:3000': lower case, no path"
        )
    return value


def _none_or_enough(value: int) -> int:
    if 0 < value < SMALLEST_MEMORY_MB:
        raise PydanticCustomError("memory", "should be 0 (none) or at least {least}", {"least": SMALLEST_MEMORY_MB})
    return value


def _one_or_many(value: object) -> str:
    return "#many" if isinstance(value, (list, tuple)) else "#one"


GpuKey = Annotated[str, Field(pattern=rf"^{_GPU}(?:,{_GPU})?$")]
"""A GPU's index as nvidia-smi shows it, its UUID, or two of them with a comma (one instance over both)."""

Port = Annotated[int, Field(ge=1024, le=65535)]
Ports = Annotated[
    Annotated[Port, Tag("#one")]
    | Annotated[list[Port], Field(min_length=1, max_length=MAX_INSTANCES_PER_GPU), Tag("#many")],
    Discriminator(_one_or_many),
]
AbsolutePath = Annotated[str, AfterValidator(_absolute_path)]
Argument = Annotated[str, AfterValidator(_argument)]
VariableName = Annotated[str, AfterValidator(_variable_name)]
Variable = Annotated[str, AfterValidator(_printable)]
HostName = Annotated[str, AfterValidator(_host_name)]
Voice = Annotated[str, AfterValidator(_voice)]
Origin = Annotated[str, AfterValidator(_origin)]
Listen = Annotated[str, AfterValidator(_listen)]
MemoryMb = Annotated[int, Field(ge=0, le=10_000_000), AfterValidator(_none_or_enough)]
