"""The one model that is loaded, as OpenAI lists models."""

from typing import Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from chatterbox_server.problems import documented, problem
from chatterbox_server.service import Service, Shared

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
    return ModelList(data=[_loaded(service)])


@router.get("/models/{model}", summary="Look at a model", response_model=Model, responses=documented(404))
async def model(model: str, service: Shared) -> Model | JSONResponse:
    """The model that is loaded, if that is the one."""
    loaded = _loaded(service)
    if model != loaded.id:
        message = f"no model {model[:64]!r} is loaded here; {loaded.id} is"
        return problem(404, message, param="model", code="not_found")
    return loaded


def _loaded(service: Service) -> Model:
    engine = service.queue.engine
    owner = "espeak-ng" if engine.name == "espeak" else "resemble-ai"
    return Model(id=engine.model, created=service.started_at, owned_by=owner)
