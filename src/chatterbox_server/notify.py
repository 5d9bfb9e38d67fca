"""sd_notify(3) in a few lines: tells systemd what state this process is in. Silent where nobody listens."""

import os
import socket
from collections.abc import Mapping
from typing import Final

READY = "READY=1"
STOPPING = "STOPPING=1"
WATCHDOG = "WATCHDOG=1"

PATIENCE_S: Final = 0.1


def status(words: str) -> str:
    """The line that ``systemctl status`` shows."""
    return f"STATUS={' '.join(words.split())}"


def extend_timeout(seconds: int) -> str:
    """The start or stop that is under way may take so much longer from now."""
    return f"EXTEND_TIMEOUT_USEC={seconds * 1_000_000}"


def send(environ: Mapping[str, str], *lines: str) -> bool:
    """Send ``lines`` in one datagram to NOTIFY_SOCKET; false when there is none or nobody reads it.

    ``@name`` is a socket in Linux's abstract namespace, whose address begins with a zero byte (unix(7)).
    """
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    except OSError:
        # As many files are open as may be.
        return False
    with datagrams:
        # Were systemd's ear full, waiting for it would stop everybody here.
        datagrams.settimeout(PATIENCE_S)
        try:
            datagrams.sendto("\n".join(lines).encode(), address)
        except OSError:
            return False
    return True


def is_watched(environ: Mapping[str, str], *, pid: int | None = None) -> bool:
    """Whether systemd waits for pings: WATCHDOG_USEC is set, and not for another process (sd_watchdog_enabled(3))."""
    usec = environ.get("WATCHDOG_USEC", "")
    watched = environ.get("WATCHDOG_PID", "")
    if watched and watched != str(os.getpid() if pid is None else pid):
        return False
    return usec.isascii() and usec.isdigit() and int(usec) > 0
