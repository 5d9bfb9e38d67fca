"""The HTTP application around one engine. Nothing happens until its lifetime begins."""

import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatterbox_server import problems
from chatterbox_server.engine import Engine, EngineBroken, Utterance
from chatterbox_server.queue import EngineQueue
from chatterbox_server.routes import health, models, speech, voices
from chatterbox_server.service import Service
from chatterbox_server.settings import Settings
from chatterbox_server.voices import Library

log = logging.getLogger(__name__)

WARM_UP: Final = "Ready to speak."
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_PROBES: Final = ("/healthz", "/readyz")


def create_app(
    load: Callable[[], Engine],
    settings: Settings,
    *,
    on_broken: Callable[[EngineBroken], None] | None = None,
) -> FastAPI:
    """An app whose lifetime loads the engine, lets it speak once, and only then takes requests.

    Args:
        load: called once, on the thread that will own the engine.
        settings: what this instance was told.
        on_broken: called when the engine can never speak again; without it the app stays and answers 503.
    """
    queue = EngineQueue(load, size=settings.queue_size, max_wait_s=settings.max_wait_s, on_broken=on_broken)
    app = FastAPI(title="Chatterbox speech server", lifespan=lifetime)
    app.state.service = Service(settings, queue, Library(settings.voices_dir), int(time.time()))
    for routes in (speech, voices, models, health):
        app.include_router(routes.router)
    problems.install(app)
    app.add_middleware(Envelope, instance=settings.instance)
    return app


@asynccontextmanager
async def lifetime(app: FastAPI) -> AsyncIterator[None]:
    """Load, warm up; serve; let the engine's thread go."""
    service: Service = app.state.service
    began_s = time.monotonic()
    engine = await service.queue.start()
    try:
        loaded_s = time.monotonic()
        # First words take longest (kernels are chosen, caches filled): better now than in a request.
        await service.queue.speak(warm_up(engine))
        log.info(
            "%s speaks: loaded in %.1f s, first words in %.1f s",
            engine.model,
            loaded_s - began_s,
            time.monotonic() - loaded_s,
        )
        yield
    finally:
        await service.queue.close()


def warm_up(engine: Engine) -> Utterance:
    """The utterance that proves that the engine speaks."""
    return Utterance(
        text=WARM_UP,
        voice=None,
        language=engine.languages[0],
        speed=1.0,
        sampling=engine.defaults,
        seed=0,
    )


class Envelope:
    """What every answer carries (instance, request id) and the one log line of every request.

    Plain ASGI, for a middleware that wraps ``receive`` would hide from the routes that a client has left.
    """

    def __init__(self, app: ASGIApp, *, instance: str) -> None:
        self._app = app
        self._instance = instance

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        began_s = time.monotonic()
        status: int | None = None
        wait = "-"

        async def send_enveloped(message: Message) -> None:
            nonlocal status, wait
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Instance"] = self._instance
                headers["X-Request-Id"] = request_id
                status, wait = message["status"], headers.get("x-queue-wait", "-")
            await send(message)

        try:
            await self._app(scope, receive, send_enveloped)
        except Exception:
            # Our bug: the traceback is for us, the shape for the client.
            log.exception("%s %s failed, request %s", scope["method"], scope["path"], request_id)
            if status is not None:
                raise
            answer = problems.problem(500, "the server has a bug; its log has more", code="internal_error")
            await answer(scope, receive, send_enveloped)
        finally:
            quiet = scope["path"] in _PROBES and status == 200
            log.log(
                logging.DEBUG if quiet else logging.INFO,
                '%s %s %s request=%s queue_wait=%s seconds=%.3f outcome="%s"',
                scope["method"],
                scope["path"].encode("unicode_escape").decode(),
                status or "-",
                request_id,
                wait,
                time.monotonic() - began_s,
                state.get("outcome", _outcome(status)),
            )


def _outcome(status: int | None) -> str:
    if status is None:
        return "no answer"
    return "answered" if status < 400 else "refused" if status < 500 or status == 503 else "failed"
