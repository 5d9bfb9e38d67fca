"""How much a request may carry, refused before anything of it is parsed. Reads no body, only counts it."""

import asyncio
from collections.abc import Callable, Collection, Mapping
from typing import Final

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatterbox_server import problems

LINGER_S: Final = 5.0
"""How long a refused body is still taken, and dropped, for its sender to read the answer."""

_LEFT: Final[Message] = {"type": "http.disconnect"}


def longest_json(max_input_chars: int) -> int:
    """Bytes of the largest request for speech: an emoji is 12 bytes when JSON writes it as two ``\\uXXXX``."""
    return 12 * max_input_chars + 65_536


class BodyLimit:
    """Answers 413 to a body above its limit, and 415 to one that is compressed: a few bytes may hold gigabytes.

    Plain ASGI: whatever else the connection says, that the client has left above all, reaches the routes unchanged.
    """

    def __init__(self, app: ASGIApp, *, json_bytes: int, upload_bytes: int, upload_paths: Collection[str]) -> None:
        """``upload_bytes`` is for multipart bodies sent to ``upload_paths``, where they go to disk.

        ``json_bytes`` is for all others, which are held in memory.
        """
        self._app = app
        self._json_bytes = json_bytes
        self._upload_bytes = upload_bytes
        self._upload_paths = frozenset(upload_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if _is_encoded(headers):
            message = "the body must not be compressed: send it without Content-Encoding"
            # RFC 9110, 15.5.16: what would have been accepted.
            answer = _closing(
                415, message, code="unsupported_content_encoding", headers={"Accept-Encoding": "identity"}
            )
            await _refuse(answer, scope, receive, send)
            return
        multipart = headers.get("content-type", "").strip().lower().startswith("multipart/")
        upload = multipart and scope["path"] in self._upload_paths
        limit_bytes = self._upload_bytes if upload else self._json_bytes
        what = "an upload" if upload else "a body other than an upload"

        def too_large() -> JSONResponse:
            message = f"the body is larger than {limit_bytes} bytes, the most that {what} may have"
            return _closing(413, message, code="request_too_large")

        # The server has checked that it is a number, and lets no more than that many bytes through.
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit_bytes:
            await _refuse(too_large(), scope, receive, send)
            return
        await _Counted(self._app, limit_bytes, too_large)(scope, receive, send)


class _Counted:
    """One request whose body is counted as it comes.

    Above the limit it is answered here, and what is behind is told that the client has left: whatever it was reading
    ends at once, and whatever it still says is said to nobody.
    """

    def __init__(self, app: ASGIApp, limit_bytes: int, too_large: Callable[[], JSONResponse]) -> None:
        self._app = app
        self._left_bytes = limit_bytes
        self._too_large = too_large
        self._begun = False
        self._refused = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting() -> Message:
            if self._refused:
                return _LEFT
            message = await receive()
            self._left_bytes -= len(message.get("body", b""))
            if self._left_bytes >= 0:
                return message
            self._refused = True
            if not self._begun:
                await _refuse(self._too_large(), scope, receive, send, more=message.get("more_body", False))
            return _LEFT

        async def watching(message: Message) -> None:
            if self._refused and not self._begun:
                return
            self._begun = True
            await send(message)

        await self._app(scope, counting, watching)


async def _refuse(answer: JSONResponse, scope: Scope, receive: Receive, send: Send, *, more: bool = True) -> None:
    """Send the whole ``answer``, then take what the client still sends, for a while, and only then end.

    To close with unread bytes would reset the connection, and with it wipe out the answer that the client has not
    read yet (RFC 9112, 9.6). ``more``: there is more of the body.
    """

    async def sending(message: Message) -> None:
        await send({**message, "more_body": True} if message["type"] == "http.response.body" else message)

    await answer(scope, receive, sending)
    try:
        async with asyncio.timeout(LINGER_S):
            while more:
                more = (await receive()).get("more_body", False)
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _closing(status: int, message: str, *, code: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    # Whatever of the body is still on its way must not be read as the next request.
    return problems.problem(status, message, code=code, headers={"Connection": "close"} | dict(headers or {}))


def _is_encoded(headers: Headers) -> bool:
    codings = [coding.strip().lower() for value in headers.getlist("content-encoding") for coding in value.split(",")]
    return codings not in ([], [""], ["identity"])
