"""Every refusal and failure in OpenAI's error shape. Decides what is said, never whether to say it."""

import logging
from collections.abc import Mapping
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.routing import Match

from chatterbox_server.audio import NotSound
from chatterbox_server.engine import EngineBroken, EngineError, OutOfMemory, Refused
from chatterbox_server.place import Busy
from chatterbox_server.recordings import NotARecording
from chatterbox_server.results import CannotKeep, KeepsNothing, NoSuchResult
from chatterbox_server.voices import BadName, LibraryFull, LibraryReadOnly, NameTaken, UnknownVoice

log = logging.getLogger(__name__)


class Problem(BaseModel):
    """OpenAI's shape of an error."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "error": {
                        "message": "speed: input should be less than or equal to 4, got 9",
                        "type": "invalid_request_error",
                        "param": "speed",
                        "code": "invalid_value",
                    }
                }
            ]
        }
    )

    class Error(BaseModel):
        """What is wrong, and with which field."""

        model_config = ConfigDict(use_attribute_docstrings=True)

        message: str
        type: str
        """invalid_request_error: change something; server_error: it is not your fault."""
        param: str | None
        """The field to change."""
        code: str | None
        """One word for programs."""

    error: Error


_MEANINGS: Final = {
    400: "What was sent cannot be used; the message says why",
    401: "There is no API key, or none of this server's",
    403: "Voices cannot be kept or removed here",
    404: "It is not there",
    409: "The name is taken, or the library full",
    413: "The body is too large",
    415: "The body is compressed",
    500: "The engine failed at this",
    501: "This server keeps no files",
    503: "Busy, stopping, or out of memory: Retry-After says when to come back",
    507: "The result could not be kept",
}

_HEADERS: Final[Mapping[int, dict[str, Any]]] = {
    401: {"headers": {"WWW-Authenticate": {"schema": {"const": "Bearer"}, "required": True}}},
    503: {"headers": {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "required": True}}},
}


def documented(*statuses: int, model: type[BaseModel] = Problem) -> dict[int | str, dict[str, Any]]:
    """FastAPI's ``responses``: what ``statuses`` mean, and the shape they have."""
    return {
        status: {"model": model, "description": _MEANINGS[status]} | _HEADERS.get(status, {}) for status in statuses
    }


def schemas() -> dict[str, Any]:
    """``Problem`` and its parts, by their names in an OpenAPI document."""
    whole = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    parts: dict[str, Any] = whole.pop("$defs")
    return {"Problem": whole} | parts


class BadRequest(Exception):
    """What was asked is well-formed, yet this server cannot do it."""

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message)
        self.param = param


def problem(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An answer that OpenAI's clients read; ``type`` follows from ``status``."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status, headers)


def unavailable(message: str, *, retry_after_s: int, code: str) -> JSONResponse:
    """503, which always says when to come back."""
    return problem(503, message, code=code, headers={"Retry-After": str(retry_after_s)})


def install(app: FastAPI) -> None:
    """Answer each kind of error in the one shape."""
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    for wrong in (BadRequest, Refused, UnknownVoice):
        app.add_exception_handler(wrong, _refused)
    for kept_out in _OF_FILES:
        app.add_exception_handler(kept_out, _not_kept)
    app.add_exception_handler(Busy, _busy)
    for failed in (EngineError, NotSound):
        app.add_exception_handler(failed, _failed)


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # noqa: S101 (Starlette calls by type)
    said = {404: f"no such path: {request.url.path}", 405: f"{request.method} is not allowed here"}
    codes = {404: "not_found", 405: "method_not_allowed"}
    message = said.get(error.status_code, str(error.detail))
    headers = {"Allow": _allowed(request)} if error.status_code == 405 else error.headers
    return problem(error.status_code, message, code=codes.get(error.status_code), headers=headers)


def _allowed(request: Request) -> str:
    """Starlette names the methods of one route, but a path may have several."""
    methods = ("GET", "HEAD", "POST", "PATCH", "DELETE")
    asked = [{**request.scope, "method": method} for method in methods]
    routes = request.app.routes
    return ", ".join(told["method"] for told in asked if any(route.matches(told)[0] is Match.FULL for route in routes))


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101 (Starlette calls by type)
    if all(wrong["loc"] == ("body",) for wrong in error.errors()) and not is_json(request):
        return problem(400, "the body must be JSON, sent with Content-Type: application/json")
    said: list[str] = []
    params: list[str] = []
    for wrong in error.errors():
        if wrong["type"] == "json_invalid":
            return problem(400, f"the body is not JSON: {wrong['ctx']['error']}")
        where = ".".join(str(part) for part in wrong["loc"] if part != "body")
        message = wrong["msg"].removeprefix("Value error, ")
        given = "" if wrong["type"] == "missing" else f", got {_short(wrong['input'])}"
        said.append(f"{where or 'body'}: {message[:1].lower()}{message[1:]}{given}")
        params.append(where)
    return problem(400, "; ".join(said), param=params[0] or None, code="invalid_value")


def is_json(request: Request) -> bool:
    """Whether the body says that it is JSON."""
    return request.headers.get("content-type", "").split(";")[0].strip().lower().endswith("json")


def _short(value: object) -> str:
    # repr also turns a lone surrogate, which no JSON answer can carry, into its escape.
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


async def _refused(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, UnknownVoice) and "name" in request.path_params:
        return problem(404, str(error), param="name", code="not_found")
    param = "voice" if isinstance(error, UnknownVoice) else getattr(error, "param", None)
    return problem(400, str(error), param=param, code="invalid_value")


# Why a voice could not be kept, renamed or removed, a result neither kept nor found: status, the field to blame, code.
_OF_FILES: Final[dict[type[Exception], tuple[int, str | None, str]]] = {
    NotARecording: (400, "file", "invalid_value"),
    BadName: (400, "name", "invalid_value"),
    NameTaken: (409, "name", "name_taken"),
    LibraryFull: (409, None, "library_full"),
    LibraryReadOnly: (403, None, "read_only"),
    NoSuchResult: (404, "name", "not_found"),
    KeepsNothing: (501, None, "keeps_nothing"),
    CannotKeep: (507, None, "cannot_keep"),
}


async def _not_kept(_request: Request, error: Exception) -> JSONResponse:
    status, param, code = _OF_FILES[type(error)]
    if isinstance(error, CannotKeep):
        # For the operator, whose disk is full, or whose directory is another's.
        log.error("%s", error)
    return problem(status, str(error), param=param, code=code)


async def _busy(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Busy)  # noqa: S101 (Starlette calls by type)
    code = {"QueueFull": "queue_full", "WaitedTooLong": "waited_too_long"}.get(type(error).__name__, "stopping")
    return unavailable(str(error), retry_after_s=error.retry_after_s, code=code)


async def _failed(_request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, EngineBroken):
        # Said to nobody but the one who was being spoken: the front counts how many engines a request breaks.
        answer = unavailable(str(error), retry_after_s=1, code="engine_broken")
        answer.headers["X-Engine"] = "broken"
        return answer
    if isinstance(error, OutOfMemory):
        # Where in the model it ran out tells nobody anything.
        log.error("cannot speak: %s", " ".join(str(error).split()))
        return unavailable(str(error), retry_after_s=1, code="out_of_memory")
    log.error("cannot speak: %s", error, exc_info=error)
    return problem(500, str(error), code="engine_error")
