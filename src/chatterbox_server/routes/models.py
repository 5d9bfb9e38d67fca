"""The one model that is loaded, as OpenAI lists models."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from chatterbox_server.service import Shared

router = APIRouter(prefix="/v1", tags=["models"])


class Model(BaseModel):
    """OpenAI's shape of a model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    """OpenAI's shape of a list."""

    object: Literal["list"] = "list"
    data: list[Model]


@router.get("/models", summary="List models")
async def models(service: Shared) -> ModelList:
    """What speaks here, whatever name a request gives as ``model``."""
    engine = service.queue.engine
    owner = "espeak-ng" if engine.name == "espeak" else "resemble-ai"
    return ModelList(data=[Model(id=engine.model, created=service.started_at, owned_by=owner)])
