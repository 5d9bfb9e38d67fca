"""The one model that is loaded, as OpenAI lists models."""

from fastapi import APIRouter

from chatterbox_server.service import Shared

router = APIRouter(prefix="/v1", tags=["models"])


@router.get("/models")
async def models(service: Shared) -> dict[str, object]:
    """What speaks here, whatever name a request gives as ``model``."""
    engine = service.queue.engine
    owner = "espeak-ng" if engine.name == "espeak" else "resemble-ai"
    model = {"id": engine.model, "object": "model", "created": service.started_at, "owned_by": owner}
    return {"object": "list", "data": [model]}
