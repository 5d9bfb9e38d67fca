"""Bodies in; an answer, or the routes' own view of the connection, out."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, File, UploadFile
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from chatterbox_server.limits import BodyLimit, longest_json
from server.fakes import PATIENCE_S, run, until

JSON_BYTES = 1_000
UPLOAD_BYTES = 200_000
UPLOADS = ("/upload",)


def an_app() -> FastAPI:
    app = FastAPI()

    @app.post("/json")
    async def echo(body: dict[str, str]) -> int:
        return len(body["input"])

    @app.post("/upload")
    async def upload(file: UploadFile = File()) -> int:  # noqa: B008 (FastAPI's way)
        return len(await file.read())

    @app.post("/waits")
    async def waits(request: Request) -> None:
        """Reads the body, then listens until the client has left."""
        await request.body()
        app.state.waiting = True
        while (await request.receive())["type"] != "http.disconnect":
            pass
        app.state.left = True

    app.state.waiting = app.state.left = False
    app.add_middleware(BodyLimit, json_bytes=JSON_BYTES, upload_bytes=UPLOAD_BYTES, upload_paths=UPLOADS)
    return app


@asynccontextmanager
async def a_server(app: FastAPI) -> AsyncIterator[int]:
    """A real port; nothing is loaded, for no engine is needed."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_config=None, timeout_graceful_shutdown=5))
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await serving


@asynccontextmanager
async def a_caller(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        a_server(app) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client,
    ):
        yield client


def body_of(size_bytes: int) -> bytes:
    """JSON of exactly that size."""
    empty = json.dumps({"input": ""}).encode()
    return empty.replace(b'""', b'"' + b"x" * (size_bytes - len(empty)) + b'"')


async def in_pieces(body: bytes) -> AsyncIterator[bytes]:
    """Sent chunked: nobody says beforehand how long it will be."""
    for start in range(0, len(body), 100):
        yield body[start : start + 100]


def post(
    path: str, content: bytes, *, chunked: bool = False, headers: Mapping[str, str] | None = None
) -> httpx.Response:
    async def scenario() -> httpx.Response:
        async with a_caller(an_app()) as client:
            sent = in_pieces(content) if chunked else content
            kind = {"content-type": "application/json"}
            return await client.post(path, content=sent, headers=kind | dict(headers or {}))

    return run(scenario())


TOO_LARGE = {
    "error": {
        "message": "the body is larger than 1000 bytes, the most that a body other than an upload may have",
        "type": "invalid_request_error",
        "param": None,
        "code": "request_too_large",
    }
}


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_just_the_limit_is_read(chunked: bool) -> None:
    answer = post("/json", body_of(JSON_BYTES), chunked=chunked)

    assert (answer.status_code, answer.json()) == (200, JSON_BYTES - len('{"input": ""}'))
    assert "connection" not in answer.headers


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size_bytes", [JSON_BYTES + 1, 5_000_000])
def test_one_byte_more_is_refused_and_so_is_much_more(size_bytes: int, chunked: bool) -> None:
    """The client, which sends all before it reads, gets the answer and not a reset connection."""
    answer = post("/json", body_of(size_bytes), chunked=chunked)

    assert (answer.status_code, answer.json()) == (413, TOO_LARGE)
    assert answer.headers["connection"] == "close"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/multipart"])
def test_whatever_is_no_upload_has_the_small_limit(kind: str) -> None:
    assert post("/json", body_of(JSON_BYTES + 1), headers={"content-type": kind}).status_code == 413


def test_uploads_have_a_limit_of_their_own() -> None:
    async def scenario() -> None:
        async with a_caller(an_app()) as client:
            fits = await client.post("/upload", files={"file": b"x" * (UPLOAD_BYTES - 1_000)})
            assert (fits.status_code, fits.json()) == (200, UPLOAD_BYTES - 1_000)
            # What calls itself an upload is one only where recordings are taken.
            disguised = await client.post("/json", files={"file": b"x" * (UPLOAD_BYTES - 1_000)})
            assert disguised.status_code == 413
            too_large = await client.post("/upload", files={"file": b"x" * UPLOAD_BYTES})
            assert too_large.status_code == 413
            assert (
                too_large.json()["error"]["message"]
                == "the body is larger than 200000 bytes, the most that an upload may have"
            )
            # The connection was closed; the client opens another and is served.
            assert (await client.post("/json", json={"input": "hello"})).json() == 5

    run(scenario())


def test_a_chunked_upload_is_refused_in_the_middle_of_a_file() -> None:
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    content = head + b"x" * UPLOAD_BYTES + b"\r\n--b--\r\n"

    answer = post("/upload", content, chunked=True, headers={"content-type": "Multipart/Form-Data; boundary=b"})

    assert answer.status_code == 413


@pytest.mark.parametrize(
    "encoding", ["gzip", "br", "deflate", "zstd", "gzip, gzip", "identity, gzip", "identity, identity", "x-new"]
)
def test_a_compressed_body_is_refused_for_it_may_be_a_bomb(encoding: str) -> None:
    answer = post("/json", body_of(100), headers={"content-encoding": encoding})

    assert answer.status_code == 415
    assert answer.headers["accept-encoding"] == "identity"
    assert answer.json()["error"]["message"] == "the body must not be compressed: send it without Content-Encoding"
    assert answer.json()["error"]["code"] == "unsupported_content_encoding"


def test_an_encoding_in_a_second_header_is_seen() -> None:
    async def scenario() -> httpx.Response:
        async with a_caller(an_app()) as client:
            headers = [("content-type", "application/json"), ("content-encoding", "identity")]
            return await client.post("/json", content=b"{}", headers=[*headers, ("content-encoding", "gzip")])

    assert run(scenario()).status_code == 415


@pytest.mark.parametrize("encoding", ["identity", "Identity", ""])
def test_a_body_said_to_be_as_it_is_is_read(encoding: str) -> None:
    assert post("/json", body_of(100), headers={"content-encoding": encoding}).status_code == 200


async def spoken_raw(port: int, said: bytes) -> bytes:
    """Everything the server answers until it closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(said)
    try:
        return await reader.read()
    finally:
        writer.close()


def test_a_declared_length_is_refused_before_a_byte_of_the_body_is_sent() -> None:
    async def scenario() -> bytes:
        async with a_server(an_app()) as port:
            head = b"POST /json HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 99999999999\r\n\r\n"
            return await spoken_raw(port, head)

    answer = run(scenario())

    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"100 Continue" not in answer
    assert answer.endswith(json.dumps(TOO_LARGE, separators=(",", ":")).encode())


def test_a_body_that_never_ends_is_answered_and_then_no_longer_listened_to() -> None:
    async def scenario() -> bytes:
        async with a_server(an_app()) as port:
            chunk = b"400\r\n" + b"x" * 1024 + b"\r\n"
            head = b"POST /json HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            return await spoken_raw(port, head + 2 * chunk)

    answer = run(scenario())

    assert answer.count(b"HTTP/1.1 ") == 1
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_what_follows_a_refused_body_is_not_taken_for_a_request() -> None:
    async def scenario() -> bytes:
        async with a_server(an_app()) as port:
            body = body_of(JSON_BYTES + 1)
            head = f"POST /json HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            return await spoken_raw(port, head + body + b"POST /json HTTP/1.1\r\nHost: x\r\n\r\n")

    assert run(scenario()).count(b"HTTP/1.1 ") == 1


def test_a_route_still_hears_that_its_client_has_left() -> None:
    async def scenario() -> None:
        app = an_app()
        async with a_server(app) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST /waits HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
            await until(lambda: app.state.waiting)
            assert not app.state.left
            writer.close()
            await until(lambda: app.state.left)

    run(scenario())


async def told(app: BodyLimit, messages: list[Message], headers: list[tuple[bytes, bytes]]) -> list[Message]:
    """What the server would send for a request that arrives as ``messages``."""
    arriving = iter(messages)
    sent: list[Message] = []

    async def receive() -> Message:
        return next(arriving)

    async def send(message: Message) -> None:
        sent.append(message)

    await app({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive, send)
    return sent


def test_every_message_reaches_the_route_as_it_came() -> None:
    arriving: list[Message] = [
        {"type": "http.request", "body": b"x" * JSON_BYTES, "more_body": True},
        {"type": "http.request", "body": b"", "more_body": False},
        {"type": "http.disconnect"},
    ]
    heard: list[Message] = []

    async def listening(scope: Scope, receive: Receive, send: Send) -> None:
        heard.extend([await receive() for _ in arriving])

    run(told(BodyLimit(listening, json_bytes=JSON_BYTES, upload_bytes=0, upload_paths=()), list(arriving), []))

    assert heard == arriving


def test_a_route_that_has_begun_to_answer_is_not_interrupted_by_a_second_answer() -> None:
    async def eager(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        assert await receive() == {"type": "http.disconnect"}
        assert await receive() == {"type": "http.disconnect"}
        await send({"type": "http.response.body", "body": b"done"})

    arriving: list[Message] = [{"type": "http.request", "body": b"x" * (JSON_BYTES + 1), "more_body": True}]
    sent = run(told(BodyLimit(eager, json_bytes=JSON_BYTES, upload_bytes=0, upload_paths=()), arriving, []))

    assert sent == [
        {"type": "http.response.start", "status": 200, "headers": []},
        {"type": "http.response.body", "body": b"done"},
    ]


def test_the_route_of_a_refused_body_speaks_to_nobody() -> None:
    async def insistent(scope: Scope, receive: Receive, send: Send) -> None:
        assert await receive() == {"type": "http.disconnect"}
        await send({"type": "http.response.start", "status": 400, "headers": []})
        await send({"type": "http.response.body", "body": b"cannot read"})

    arriving: list[Message] = [{"type": "http.request", "body": b"x" * (JSON_BYTES + 1), "more_body": False}]
    sent = run(told(BodyLimit(insistent, json_bytes=JSON_BYTES, upload_bytes=0, upload_paths=()), arriving, []))

    assert [message.get("status") for message in sent] == [413, None, None]


@pytest.mark.parametrize("length", [b"", b"-1", b"1e9", b"\xb2", b"many"])
def test_a_length_that_is_no_number_is_left_to_counting(length: bytes) -> None:
    async def quiet(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()

    arriving: list[Message] = [{"type": "http.request", "body": b"x" * (JSON_BYTES + 1), "more_body": False}]
    app = BodyLimit(quiet, json_bytes=JSON_BYTES, upload_bytes=0, upload_paths=())
    sent = run(told(app, arriving, [(b"content-length", length)]))

    assert sent[0]["status"] == 413


def test_the_longest_text_fits_however_json_writes_it() -> None:
    text = "\N{GRINNING FACE}" * 1_000

    assert len(json.dumps({"input": text})) <= longest_json(len(text))
