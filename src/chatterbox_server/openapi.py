"""What the OpenAPI document has to say of every route alike. Says nothing of what a single route does."""

from typing import Any, Final

from fastapi import FastAPI

from chatterbox_server import problems
from chatterbox_server.keys import OPEN

TAGS: Final = [
    {"name": "audio", "description": "OpenAI's speech API: text in, sound out, and the voices to say it in."},
    {"name": "models", "description": "What speaks here."},
    {"name": "health", "description": "For probes, balancers and Prometheus."},
    {"name": "compatibility", "description": "For scripts that were written for other Chatterbox servers."},
]

_KEY: Final = "key"
_NEVER_ANSWERED: Final = "422"
"""FastAPI's own answer to what does not fit; ours is 400, in OpenAI's shape."""


class App(FastAPI):
    """FastAPI, whose document also tells what the middleware answers before a route is reached."""

    needs_key = False
    """Whether it asks for an API key, except at the open paths."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = _completed(super().openapi(), needs_key=self.needs_key)
        return self.openapi_schema


def _completed(document: dict[str, Any], *, needs_key: bool) -> dict[str, Any]:
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas |= problems.schemas()
    if needs_key:
        components["securitySchemes"] = {_KEY: {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            responses = operation["responses"]
            responses.pop(_NEVER_ANSWERED, None)
            if "requestBody" in operation:
                _add(responses, 400, 413, 415)
            if needs_key and path not in OPEN:
                operation["security"] = [{_KEY: []}]
                _add(responses, 401)
    return document


def _add(responses: dict[str, Any], *statuses: int) -> None:
    for status, response in problems.documented(*statuses).items():
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
        described = {key: value for key, value in response.items() if key != "model"}
        responses.setdefault(str(status), {**described, "content": content})
