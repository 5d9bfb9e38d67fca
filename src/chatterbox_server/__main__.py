"""One instance as a process: the environment in, a port that answers out, systemd told of every step."""

import asyncio
import contextlib
import functools
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, Final

from chatterbox_server import engines, logs, notify
from chatterbox_server.app import create_app, lifetime
from chatterbox_server.engine import Engine, EngineError, Refused, Unable
from chatterbox_server.keys import Keys, KeysError
from chatterbox_server.server import Server, end_process
from chatterbox_server.settings import Settings, SettingsError

log = logging.getLogger("chatterbox_server")

FAILED: Final = 1
MISCONFIGURED: Final = 2
"""The unit's RestartPreventExitStatus: starting again would read the same environment, and miss the same package."""


def main(load: Callable[[Settings], Engine] | None = None) -> int:
    """Serve until told to stop; returns the exit status. ``load`` builds another engine than the settings name."""
    logs.setup(os.environ, sys.stderr)
    for speaker in (log, logging.getLogger("uvicorn.error")):
        speaker.setLevel(logging.INFO)
    # The model remarks on single tokens at WARNING.
    logging.getLogger("chatterbox").setLevel(logging.ERROR)
    try:
        settings = Settings.from_environ(os.environ)
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return MISCONFIGURED
    try:
        status = asyncio.run(serve(settings, os.environ, functools.partial(load or engines.load, settings)))
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    if any(thread.daemon for thread in threading.enumerate()):
        # Of the crew, or an engine's own: still at an utterance nobody waits for, or stuck. Finalizing Python beneath
        # it would crash.
        end_process(status)
    return status


async def serve(settings: Settings, environ: Mapping[str, str], load: Callable[[], Engine]) -> int:
    """Load, bind, serve. The engine speaks before the port is bound: a refused port is retried elsewhere."""
    try:
        keys = None if settings.api_keys_file is None else Keys(settings.api_keys_file)
    except KeysError as error:
        log.error("cannot start: %s", error)  # noqa: TRY400 (no traceback: the file is wrong, not we)
        return MISCONFIGURED
    app = create_app(load, settings, keys=keys)
    service = app.state.service
    notify.send(environ, notify.status(f"loading {settings.model}, engine {settings.engine}"))
    server = Server(app, service, environ)
    try:
        async with lifetime(app), _beside(server.look_after_itself()):
            if keys is not None:
                asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _reload, keys)
            # The model's objects, a million of them, stay for good. Looking through them again takes Python half a
            # second, in which nothing runs, not even a health check.
            gc.collect()
            gc.freeze()
            await server.serve()
    except (EngineError, Refused) as error:
        log.error("cannot start: %s", " ".join(str(error).split()))  # noqa: TRY400 (one clear line)
        return MISCONFIGURED if isinstance(error, Unable) else FAILED
    except SystemExit:
        # uvicorn could not bind, and has said so; its status changes with its version.
        return FAILED
    return server.status


def _reload(keys: Keys) -> None:
    try:
        keys.reload()
    except KeysError as error:
        log.error("cannot reload the API keys, going on with the old ones: %s", "; ".join(error.problems))  # noqa: TRY400
    else:
        log.info("reloaded the API keys")


@contextlib.asynccontextmanager
async def _beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


if __name__ == "__main__":
    sys.exit(main())
