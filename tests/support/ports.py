"""Ports on loopback for those whom a test starts."""

from __future__ import annotations

import random
import socket
from contextlib import suppress


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago.

    Below the range from which the kernel takes ports for outgoing connections: one of those could sit on the port
    of a dead instance when it wants to come back.
    """
    ports: list[int] = []
    for port in random.sample(range(20_000, 32_000), 1_000):
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            break
    return ports
