"""One instance as a process: the environment in, a port that answers out, systemd told of every step."""

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Mapping
from types import FrameType
from typing import Final

import uvicorn

from chatterbox_server import engines, notify
from chatterbox_server.app import create_app, lifetime
from chatterbox_server.engine import EngineBroken, EngineError, Refused
from chatterbox_server.service import Service
from chatterbox_server.settings import Settings, SettingsError

log = logging.getLogger("chatterbox_server")

STOPPED: Final = 0
FAILED: Final = 1
MISCONFIGURED: Final = 2
"""The unit's RestartPreventExitStatus: starting again would read the same environment."""

KEEP_ALIVE_S: Final = 75
"""Longer than nginx keeps an idle connection to us (60 s), so it never picks one that is just closing."""


def main() -> int:
    """Serve until told to stop; returns the exit status."""
    # The journal has its own clock and levels.
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(message)s")
    log.setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.INFO)
    # The model remarks on single tokens at WARNING.
    logging.getLogger("chatterbox").setLevel(logging.ERROR)
    try:
        settings = Settings.from_environ(os.environ)
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return MISCONFIGURED
    try:
        status = asyncio.run(serve(settings, os.environ))
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    if any(thread.name == "engine" for thread in threading.enumerate()):
        # Still inside an utterance nobody waits for, or stuck: finalizing Python beneath it would crash.
        _exit(status)
    return status


async def serve(settings: Settings, environ: Mapping[str, str]) -> int:
    """Load, bind, serve. The engine speaks before the port is bound: a refused port is retried elsewhere."""
    app = create_app(functools.partial(engines.load, settings), settings, on_broken=_end)
    service: Service = app.state.service
    notify.send(environ, notify.status(f"loading {settings.model}, engine {settings.engine}"))
    try:
        async with lifetime(app), _beating(service, environ):
            await _Server(_config(app, settings), service, environ).serve()
    except (EngineError, Refused) as error:
        log.error("cannot start: %s", " ".join(str(error).split()))  # noqa: TRY400 (one clear line)
        return FAILED
    except SystemExit:
        # uvicorn could not bind, and has said so; its status changes with its version.
        return FAILED
    return STOPPED


def _config(app: object, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]  # FastAPI, whose scope types are wider than uvicorn's
        host=settings.host,
        port=settings.port,
        # We live through the lifetime ourselves, so that what it raises is ours to word.
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=settings.max_wait_s + settings.longest_utterance_s,
    )


class _Server(uvicorn.Server):
    """uvicorn, which tells systemd when the port answers and when it stops."""

    def __init__(self, config: uvicorn.Config, service: Service, environ: Mapping[str, str]) -> None:
        super().__init__(config)
        self._service = service
        self._environ = environ

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            notify.send(self._environ, notify.READY, notify.status(status_words(self._service)))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 (uvicorn's signature)
        """Finish what was accepted; a second Ctrl-C does not.

        uvicorn's own would raise the signal again afterwards, and the process would end as killed.
        """
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True
        self._service.queue.draining = True
        notify.send(self._environ, notify.STOPPING, notify.status(status_words(self._service)))


@contextlib.asynccontextmanager
async def _beating(service: Service, environ: Mapping[str, str]) -> AsyncIterator[None]:
    task = asyncio.create_task(_beat(service, environ))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _beat(service: Service, environ: Mapping[str, str]) -> None:
    """Ping the watchdog while the engine is sound; keep the words of ``systemctl status`` true."""
    interval_s = notify.watchdog_interval_s(environ)
    told = ""
    while True:
        if interval_s is not None and service.queue.sound(service.settings.longest_utterance_s):
            notify.send(environ, notify.WATCHDOG)
        words = status_words(service)
        if words != told:
            notify.send(environ, notify.status(words))
            told = words
        await asyncio.sleep(min(1.0, interval_s or 1.0))


def status_words(service: Service) -> str:
    """One line for an operator: what it does now, and how much it has done."""
    queue = service.queue
    doing = "speaking" if queue.running else "idle"
    parts = [doing, f"{queue.waiting} waiting", f"{queue.spoken} spoken"]
    if queue.draining:
        parts.insert(0, "stopping")
    if not queue.sound(service.settings.longest_utterance_s):
        parts.insert(0, "engine stuck")
    return ", ".join(parts)


def _end(error: EngineBroken) -> None:
    # At once, without answering: nginx sees the connection break and asks another GPU, systemd starts us anew.
    log.critical("the engine is broken, ending the process: %s", " ".join(str(error).split()))
    _exit(FAILED)


def _exit(status: int) -> None:
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
