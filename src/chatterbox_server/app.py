"""The HTTP application around one engine. Nothing happens until its lifetime begins."""

import functools
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatterbox_server import logs, problems, speaker
from chatterbox_server.engine import Engine, Utterance
from chatterbox_server.keys import OPEN, Keys, RequireKey
from chatterbox_server.limits import BodyLimit, longest_json
from chatterbox_server.metrics import Gauges, Metrics, count_start, outcome_of, route_of
from chatterbox_server.openapi import TAGS, App
from chatterbox_server.order import order
from chatterbox_server.place import Spoken
from chatterbox_server.queue import EngineQueue
from chatterbox_server.results import Results
from chatterbox_server.routes import compat, health, models, speech, voices
from chatterbox_server.routes import metrics as metrics_route
from chatterbox_server.service import Service
from chatterbox_server.settings import Settings
from chatterbox_server.voices import Library

log = logging.getLogger(__name__)

WARM_UP: Final = "Ready to speak."
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_QUIET: Final = OPEN | {"/metrics"}
"""Asked every few seconds by machines: logged only when something is wrong."""

DESCRIPTION: Final = """One Chatterbox model as OpenAI's speech API.

`curl --json '{"input": "Hello.", "response_format": "wav"}' http://127.0.0.1:6093/v1/audio/speech -o hello.wav`
"""


def create_app(load: Callable[[], Engine], settings: Settings, *, keys: Keys | None = None) -> FastAPI:
    """An app whose lifetime loads the engine, lets it speak once, and only then takes requests.

    Args:
        load: called once, on the thread that will own the engine.
        settings: what this instance was told.
        keys: who may speak; ``None``: anybody.
    """
    queue = EngineQueue(
        load,
        functools.partial(speaker.speak, check_duration=settings.check_duration),
        order=order(settings.order, max_wait_s=settings.max_wait_s),
        size=settings.queue_size,
        max_wait_s=settings.max_wait_s,
        longest_utterance_s=settings.longest_utterance_s,
        on_spoken=lambda spoken: _measure(metrics, queue.engine, spoken),
    )
    metrics = Metrics(restarts=count_start(settings.runtime_dir))
    library = Library(settings.voices_dir, settings.aliases)
    # The version is that of the API: which server this is, is nobody's business.
    app = App(
        title="Chatterbox speech server", version="1", description=DESCRIPTION, openapi_tags=TAGS, lifespan=lifetime
    )
    app.needs_key = keys is not None
    results = Results(settings.results_dir)
    app.state.service = Service(settings, queue, library, results, metrics, int(time.time()))
    for routes in (speech, voices, models, health, metrics_route, compat):
        app.include_router(routes.router)
    problems.install(app)
    upload_bytes = settings.max_upload_mb * 1_000_000
    # The last one added is the outermost.
    app.add_middleware(
        BodyLimit,
        json_bytes=longest_json(settings.max_input_chars),
        upload_bytes=upload_bytes,
        upload_paths=(voices.UPLOADS, compat.UPLOADS),
    )
    if keys is not None:
        app.add_middleware(RequireKey, keys=keys)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    app.add_middleware(Envelope, instance=settings.instance, metrics=metrics)
    return app


@asynccontextmanager
async def lifetime(app: FastAPI) -> AsyncIterator[None]:
    """Load, warm up; serve; let the engine's thread go."""
    service: Service = app.state.service
    began_s = time.monotonic()
    engine = await service.queue.start()
    service.metrics.watch(functools.partial(_gauges, service))
    service.metrics.loaded(model=engine.model, engine=engine.name, instance=service.settings.instance)
    try:
        loaded_s = time.monotonic()
        # First words take longest (kernels are chosen, caches filled): better now than in a request.
        async with service.queue.admit([warm_up(engine)]) as place:
            async for _ in place:
                pass
        log.info(
            "%s speaks: loaded in %.1f s, first words in %.1f s",
            engine.model,
            loaded_s - began_s,
            time.monotonic() - loaded_s,
        )
        yield
    finally:
        await service.queue.close()


def _gauges(service: Service) -> Gauges:
    queue, memory = service.queue, service.queue.memory
    return Gauges(
        waiting=queue.waiting,
        running=queue.running,
        ready=service.ready,
        gpu_memory_allocated_bytes=None if memory is None else memory.allocated_bytes,
        gpu_memory_reserved_bytes=None if memory is None else memory.reserved_bytes,
        gpu_memory_free_bytes=None if memory is None else memory.free_bytes,
        gpu_memory_total_bytes=None if memory is None else memory.total_bytes,
    )


def _measure(metrics: Metrics, engine: Engine, spoken: Spoken) -> None:
    audio_s = (spoken.given + spoken.samples.size) / engine.sample_rate_hz
    tokens = None if engine.tokens_per_audio_s is None else engine.tokens_per_audio_s * audio_s
    metrics.spoke(synthesis_s=spoken.synthesis_s, audio_s=audio_s, tokens=tokens)
    for remark in spoken.remarks:
        metrics.engine_failed(remark)


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
    """What every answer carries (instance, request id), its count in the metrics, and its one line in the log.

    Plain ASGI, for a middleware that wraps ``receive`` would hide from the routes that a client has left.
    """

    def __init__(self, app: ASGIApp, *, instance: str, metrics: Metrics) -> None:
        self._app = app
        self._instance = instance
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        began_s = time.monotonic()
        state = scope.setdefault("state", {})
        state |= {"request_id": request_id, "began_s": began_s, "log": {}}
        status: int | None = None

        async def send_enveloped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Instance"] = self._instance
                headers["X-Request-Id"] = request_id
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_enveloped)
        except ClientDisconnect:
            # In the middle of its own body, or told to stop sending it: there is nobody to answer.
            log.debug("the client left before it had asked, request %s", request_id)
        except Exception:
            # Our bug: the traceback is for us, the shape for the client.
            log.exception("%s %s failed, request %s", scope["method"], scope["path"], request_id)
            if status is not None:
                raise
            answer = problems.problem(500, "the server has a bug; its log has more", code="internal_error")
            await answer(scope, receive, send_enveloped)
        finally:
            outcome = state.get("outcome", outcome_of(status))
            self._metrics.request_ended(route=route_of(scope), outcome=outcome)
            said = {
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "request": request_id,
                "client": state.get("client"),
                "outcome": outcome,
                "seconds": time.monotonic() - began_s,
            }
            quiet = scope["path"] in _QUIET and status == 200
            log.log(logging.DEBUG if quiet else logging.INFO, "%s", logs.pairs(**said, **state["log"]))
