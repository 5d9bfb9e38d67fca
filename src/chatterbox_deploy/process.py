"""Child processes and their signs of life. Decides nothing about when to start or end one."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

from chatterbox_deploy.errors import CommandFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

LINE_LIMIT_BYTES = 1 << 20
"""A longer line of a child's output is cut there, so that a progress bar without newlines costs no memory."""


class Process:
    """A running child in a session of its own: the terminal's Ctrl-C reaches us, not it."""

    def __init__(self, inner: asyncio.subprocess.Process, reader: asyncio.Task[None]) -> None:
        """Use ``start``."""
        self._inner = inner
        self._reader = reader

    async def wait(self) -> int:
        """Its exit status once it has ended and its output was read; -N if signal N ended it.

        What it started itself ends with it: a worker left behind would keep the port and the GPU.
        """
        status = await self._inner.wait()
        with suppress(ProcessLookupError):
            os.killpg(self._inner.pid, signal.SIGKILL)
        await self._reader
        return status

    def send(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if the process has ended."""
        with suppress(ProcessLookupError):
            self._inner.send_signal(number)


async def start(
    argv: Sequence[str],
    *,
    environment: Mapping[str, str],
    directory: str | None,
    on_line: Callable[[str], None],
) -> Process:
    """Start ``argv``; each line it writes to stdout or stderr goes to ``on_line``.

    Raises:
        CommandFailed: the program is not there or may not be run.
    """
    # Should we be killed outright, the kernel ends the child (setpriv(1)): no orphan keeps the port and the GPU.
    leash = ("setpriv", "--pdeathsig", "TERM", "--") if shutil.which("setpriv") else ()
    if not shutil.which(argv[0]):
        msg = f"cannot run {argv[0]}: no such program, or it is not executable"
        raise CommandFailed(msg)
    # A pipe of our own: asyncio's would have wait() wait for every grandchild that holds its other end.
    ours, theirs = os.pipe()
    try:
        inner = await asyncio.create_subprocess_exec(
            *leash,
            *argv,
            env=environment,
            cwd=directory,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
    except OSError as error:
        os.close(ours)
        msg = f"cannot run {argv[0]}: {error.strerror}: {error.filename or directory or argv[0]}"
        raise CommandFailed(msg) from None
    finally:
        os.close(theirs)
    stream = asyncio.StreamReader(limit=LINE_LIMIT_BYTES)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(ours, "rb"))
    return Process(inner, asyncio.create_task(_read_lines(stream, transport, on_line)))


async def _read_lines(
    stream: asyncio.StreamReader, transport: asyncio.BaseTransport, on_line: Callable[[str], None]
) -> None:
    try:
        while True:
            try:
                line = await stream.readuntil(b"\n")
            except asyncio.IncompleteReadError as error:
                if not error.partial:
                    return
                line = error.partial
            except asyncio.LimitOverrunError as error:
                line = await stream.readexactly(error.consumed)
            on_line(line.decode(errors="replace").rstrip("\r\n"))
    finally:
        transport.close()


def hand_over(argv: Sequence[str]) -> NoReturn:
    """Become another program, with this terminal, its Ctrl-C and its exit status.

    Raises:
        CommandFailed: the program is not there or may not be run.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execvp(argv[0], [*argv])  # noqa: S606  argv, and no shell
    except OSError as error:
        msg = f"cannot run {argv[0]}: {(error.strerror or str(error)).lower()}"
        raise CommandFailed(msg) from None


class NotifySocket:
    """What systemd is to a ``Type=notify`` service (sd_notify(3)): tells when READY=1 arrives."""

    def __init__(self, path: Path, on_ready: Callable[[], None]) -> None:
        """Listen at ``path``, replacing what a former run left there."""
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(os.fspath(path))
        self._socket.setblocking(False)
        self._on_ready = on_ready
        asyncio.get_running_loop().add_reader(self._socket, self._receive)

    def _receive(self) -> None:
        with suppress(BlockingIOError):
            if "READY=1" in self._socket.recv(4096).decode(errors="replace").splitlines():
                self._on_ready()

    def close(self) -> None:
        """Stop listening."""
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()


def refuses_to_bind(host: str, port: int) -> str | None:
    """Why a server of ours could not listen there now; ``None`` if it could."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen()
        except OSError as error:
            return (error.strerror or str(error)).lower()
    return None


async def accepts(host: str, port: int) -> bool:
    """Whether something listens on the port."""
    try:
        _, writer = await asyncio.open_connection(host, port)
    except OSError:
        return False
    writer.close()
    return True
