"""Is the process there, and would it speak? Both answer at once, whatever the engine does."""

from typing import Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict

from chatterbox_server.engine import GpuMemory
from chatterbox_server.problems import documented
from chatterbox_server.service import Shared

router = APIRouter(tags=["health"])


class Alive(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """What an instance is, and what it is doing."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    ready: bool
    instance: str
    engine: str
    model: str
    sample_rate_hz: int
    visible_gpus: tuple[str, ...]
    invocation_id: str | None
    """Tells a fresh process from the one it replaced on the same port."""
    draining: bool
    """It stops, and finishes what it began."""
    places: int
    """Pieces of text that the engine may have in hand at once."""
    waiting: int
    running: int
    """Pieces of text that the engine has in hand."""
    spoken: int
    """Pieces since the start."""
    max_input_chars: int
    gpu_memory: GpuMemory | None
    """As of the last utterance."""
    facts: dict[str, object]
    """What the engine tells of itself."""


@router.get("/healthz", summary="Is the process there?")
async def healthz() -> Alive:
    """The process answers; nothing is said about the engine."""
    return Alive()


@router.get("/readyz", summary="Would it speak?", responses=documented(503, model=Readiness))
async def readyz(service: Shared, response: Response) -> Readiness:
    """200 while a request would be spoken; 503 while stopping, or while the engine is dead or stuck."""
    settings, queue = service.settings, service.queue
    if not service.ready:
        response.status_code = 503
        response.headers["Retry-After"] = str(queue.retry_after_s())
    return Readiness(
        ready=service.ready,
        instance=settings.instance,
        engine=queue.engine.name,
        model=queue.engine.model,
        sample_rate_hz=queue.engine.sample_rate_hz,
        visible_gpus=settings.visible_gpus,
        invocation_id=settings.invocation_id,
        draining=queue.draining,
        places=queue.engine.places,
        waiting=queue.waiting,
        running=queue.running,
        spoken=queue.spoken,
        max_input_chars=settings.max_input_chars,
        gpu_memory=queue.memory,
        facts=dict(queue.engine.facts()),
    )
