"""Is the process there, and would it speak? Both answer at once, whatever the engine does."""

import dataclasses

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from chatterbox_server.service import Shared

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process answers; nothing is said about the engine."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(service: Shared) -> JSONResponse:
    """200 while a request would be spoken; 503 while stopping, or while the engine is dead or stuck.

    ``invocation_id`` tells a fresh process from the one it replaced on the same port.
    """
    settings, queue = service.settings, service.queue
    body = {
        "ready": service.ready,
        "instance": settings.instance,
        "engine": queue.engine.name,
        "model": queue.engine.model,
        "sample_rate_hz": queue.engine.sample_rate_hz,
        "visible_gpus": settings.visible_gpus,
        "invocation_id": settings.invocation_id,
        "draining": queue.draining,
        "waiting": queue.waiting,
        "running": queue.running,
        "spoken": queue.spoken,
        "max_input_chars": settings.max_input_chars,
        "gpu_memory": None if queue.memory is None else dataclasses.asdict(queue.memory),
        "facts": dict(queue.engine.facts()),
    }
    if service.ready:
        return JSONResponse(body)
    return JSONResponse(body, 503, {"Retry-After": str(queue.retry_after_s())})
