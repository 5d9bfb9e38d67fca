"""The process around one app: tells systemd how it is, drains, and ends itself when it ought to be replaced."""

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Final

import uvicorn
from fastapi import FastAPI

from chatterbox_server import notify
from chatterbox_server.engine import EngineBroken, GpuMemory
from chatterbox_server.queue import STUCK
from chatterbox_server.service import Service
from chatterbox_server.settings import Settings

log = logging.getLogger(__name__)

STOPPED: Final = 0
BROKEN: Final = 70
"""The CUDA context is poisoned: only a new process speaks again (sysexits(3): internal software error)."""
RECYCLED: Final = 75
"""Memory grew past its threshold; everything begun was finished (sysexits(3): temporary failure)."""

KEEP_ALIVE_S: Final = 75
"""Longer than nginx keeps an idle connection to us (60 s), so it never picks one that is just closing."""

LAST_WORDS_S: Final = 5.0
"""How long a broken process may take to tell its clients so."""

BEAT_S: Final = 0.5
"""How often the process looks after itself; well below half of the shortest watchdog (5 s)."""

MEGABYTE: Final = 1_000_000

LINGER_S: Final = 30.0
"""How long a stop waits for clients when nothing is spoken any more; enough to read what is left."""

EXTENSION_S: Final = 15
"""What a stop asks systemd for, again and again, while something that was begun is still spoken."""


class Server(uvicorn.Server):
    """uvicorn, which tells systemd when the port answers and when it stops, and knows when to stop by itself."""

    def __init__(self, app: FastAPI, service: Service, environ: Mapping[str, str]) -> None:
        settings = service.settings
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                # We live through the lifetime ourselves, so that what it raises is ours to word.
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                # A stop waits for whatever was begun, as long as systemd lets it: see look_after_itself.
            )
        )
        self._service = service
        self._environ = environ
        self._watched = notify.is_watched(environ)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told = ""
        self._stuck = False
        self._at_work_s = 0.0
        self.status = STOPPED

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._tell(notify.READY)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 (uvicorn's signature)
        """Finish what was begun; a second Ctrl-C does not.

        uvicorn's own would raise the signal again afterwards, and the process would end as killed.
        """
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True
        # A signal interrupts anything; the queue is only ever touched between two steps of the loop.
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop, "the server is stopping")

    async def look_after_itself(self) -> None:
        """Ping the watchdog while the engine is healthy; end the process in order when it ought to be replaced."""
        while True:
            try:
                self._look()
            except OSError as error:
                # No file can be opened, say: it may pass, and meanwhile whoever watches goes on watching.
                log.warning("cannot look after the process: %s", error)
            await asyncio.sleep(BEAT_S)

    def _look(self) -> None:
        queue, settings = self._service.queue, self._service.settings
        if queue.healthy and self._watched:
            notify.send(self._environ, notify.WATCHDOG)
        if queue.broken is not None and self.status != BROKEN:
            self._give_up(queue.broken)
        if queue.overdue:
            queue.hand_back(STUCK)
        if queue.overdue and not self._stuck:
            log.error("the engine is stuck: an utterance takes far longer than its length foretells")
            self._service.metrics.engine_failed("stuck")
        self._stuck = queue.overdue
        if not queue.draining and (why := outgrown(settings, queue.memory)):
            log.warning("starting afresh: %s", why)
            self._service.metrics.engine_failed("recycled")
            self.status = RECYCLED
            self._stop(why)
        if queue.draining:
            self._drain()
        if status_words(self._service) != self._told:
            self._tell()

    def _drain(self) -> None:
        """Ask for time while something that was begun is spoken or heard; then wait for nobody for ever."""
        now_s = time.monotonic()
        if self._service.queue.at_work:
            self._at_work_s = now_s
            if self._service.queue.healthy:
                notify.send(self._environ, notify.extend_timeout(EXTENSION_S))
        elif now_s - self._at_work_s > LINGER_S:
            # A client that sends no body, or reads no answer, holds no stop up.
            self.force_exit = True

    def _give_up(self, error: EngineBroken) -> None:
        """Whoever waited has been told to ask elsewhere: let the answers leave, then end."""
        log.critical("the engine is broken, ending the process: %s", " ".join(str(error).split()))
        self._service.metrics.engine_failed("broken")
        self.status = BROKEN
        self._stop("the engine is broken")
        # A client that does not read its answer holds nobody up.
        asyncio.get_running_loop().call_later(LAST_WORDS_S, end_process, BROKEN)

    def _stop(self, why: str) -> None:
        self.should_exit = True
        self._at_work_s = time.monotonic()
        self._service.queue.drain(why)
        self._tell(notify.STOPPING)

    def _tell(self, *states: str) -> None:
        self._told = status_words(self._service)
        notify.send(self._environ, *states, notify.status(self._told))


def outgrown(settings: Settings, memory: GpuMemory | None) -> str | None:
    """Why the process ought to be replaced before memory runs out; ``None``: it need not."""
    if settings.recycle_host_mb and (held_bytes := resident_bytes()) > settings.recycle_host_mb * MEGABYTE:
        return f"the process holds {held_bytes // MEGABYTE} MB, and recycle_host_mb is {settings.recycle_host_mb}"
    if settings.recycle_gpu_mb and memory is not None and memory.reserved_bytes > settings.recycle_gpu_mb * MEGABYTE:
        reserved_mb = memory.reserved_bytes // MEGABYTE
        return f"{reserved_mb} MB of the GPU are reserved, and recycle_gpu_mb is {settings.recycle_gpu_mb}"
    return None


def resident_bytes() -> int:
    """Memory of this process that lies in RAM (proc(5), statm)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def status_words(service: Service) -> str:
    """One line for an operator: what it does now, and how much it has done."""
    queue = service.queue
    doing = {0: "idle", 1: "speaking"}.get(queue.running, f"speaking {queue.running} at once")
    parts = [doing, f"{queue.waiting} waiting", f"{queue.spoken} spoken"]
    if queue.draining:
        parts.insert(0, "stopping")
    if not queue.healthy:
        parts.insert(0, "engine broken" if queue.broken else "engine stuck")
    return ", ".join(parts)


def end_process(status: int) -> None:
    """At once, without finalizing Python beneath a thread that is still inside the engine."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)
