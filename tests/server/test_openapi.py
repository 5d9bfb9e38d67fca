"""The OpenAPI document: schemathesis asks what it promises, and each answer has to be one that it names."""

import asyncio
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from typing import Any, Final

import httpx
import jsonschema
import pytest
import requests
import schemathesis

from chatterbox_server.app import create_app
from chatterbox_server.keys import OPEN, Keys
from chatterbox_server.settings import Settings
from server.fakes import PATIENCE_S, FakeEngine, a_client, a_port, run

KEY: Final = "sk-0123456789abcdef"


def keys() -> Keys:
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(f"schemathesis {KEY}\n")
        file.flush()
        return Keys(Path(file.name))


# pytest has to know the routes before there is any fixture.
DOCUMENT = create_app(FakeEngine, Settings(), keys=keys()).openapi()
PROMISES = schemathesis.openapi.from_dict(
    DOCUMENT,
    config=schemathesis.Config.from_dict(
        {
            "headers": {"Authorization": f"Bearer {KEY}"},
            "generation": {"deterministic": True, "max-examples": 60, "database": "none"},
            # Which voices, languages and speeds there are, and what can be decoded, no schema says.
            "checks": {"positive_data_acceptance": {"enabled": False}},
            # Forms hold nothing but text, so these routes take for a number whatever reads like one.
            "operations": [{"include-tag": "compatibility", "checks": {"negative_data_rejection": {"enabled": False}}}],
        }
    ),
)


@pytest.fixture(scope="module")
def base_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that has everything: keys, voices and results."""
    folder = tmp_path_factory.mktemp("openapi")
    (folder / "voices").mkdir()
    told = Settings(check_duration=False, voices_dir=folder / "voices", results_dir=folder / "results")
    app = create_app(FakeEngine, told, keys=keys())
    ports: Queue[int] = Queue()
    loop, over = asyncio.new_event_loop(), asyncio.Event()

    async def serve() -> None:
        async with a_port(app) as port:
            ports.put(port)
            await over.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    yield f"http://127.0.0.1:{ports.get(timeout=PATIENCE_S)}"
    loop.call_soon_threadsafe(over.set)
    thread.join()
    loop.close()


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        yield session


@PROMISES.parametrize()
def test_whatever_is_asked_the_answer_is_one_that_the_document_names(
    case: schemathesis.Case[Any], base_url: str, session: requests.Session
) -> None:
    case.call_and_validate(base_url=base_url, session=session)


OPERATIONS: Final = [
    pytest.param(path, operation, id=f"{method.upper()} {path}")
    for path, operations in DOCUMENT["paths"].items()
    for method, operation in operations.items()
]
WITH_BODY: Final = [
    pytest.param(operation, id=f"{method.upper()} {path}")
    for path, operations in DOCUMENT["paths"].items()
    for method, operation in operations.items()
    if "requestBody" in operation
]


@pytest.mark.parametrize(("path", "operation"), OPERATIONS)
def test_every_operation_says_what_it_is_for_and_how_it_refuses(path: str, operation: dict[str, Any]) -> None:
    assert operation["summary"]
    assert operation["description"]
    assert {tag["name"] for tag in DOCUMENT["tags"]} >= set(operation["tags"])
    assert "422" not in operation["responses"]
    assert ("401" in operation["responses"]) == ("security" in operation) == (path not in OPEN)
    for status, response in operation["responses"].items():
        assert response["description"]
        assert (status == "503") == ("Retry-After" in response.get("headers", {}))
        refuses = status[0] in "45" and path not in {"/readyz", "/health"}
        shape = response.get("content", {}).get("application/json", {}).get("schema", {}).get("$ref", "")
        assert refuses == (shape.rpartition("/")[2] in {"Problem", "Failed"})


@pytest.mark.parametrize("operation", WITH_BODY)
def test_every_body_has_an_example_that_fits(operation: dict[str, Any]) -> None:
    for content in operation["requestBody"]["content"].values():
        schema = content["schema"]
        if "$ref" in schema:
            schema = DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        examples = schema.get("examples", []) + [content[key] for key in ("example",) if key in content]
        assert examples
        for example in examples:
            jsonschema.validate(example, {**schema, "components": DOCUMENT["components"]})


def test_the_examples_of_speech_are_spoken() -> None:
    async def scenario() -> list[int]:
        async with a_client(FakeEngine()) as client:
            examples = DOCUMENT["components"]["schemas"]["SpeechRequest"]["examples"]
            return [(await client.post("/v1/audio/speech", json=example)).status_code for example in examples]

    assert run(scenario()) == [200, 200]


def test_the_page_of_the_document_leads_to_it_and_names_no_version() -> None:
    async def scenario() -> tuple[httpx.Response, httpx.Response]:
        async with a_client(FakeEngine()) as client:
            return await client.get("/docs"), await client.get("/openapi.json")

    page, document = run(scenario())
    assert page.headers["content-type"].startswith("text/html")
    assert "'/openapi.json'" in page.text
    assert document.json()["info"]["version"] == "1"
    assert "securitySchemes" not in document.json()["components"]


def test_where_a_key_is_needed_the_document_needs_one_too(base_url: str, session: requests.Session) -> None:
    for path in ("/docs", "/openapi.json"):
        assert session.get(base_url + path).status_code == 401
        assert session.get(base_url + path, headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


def test_a_method_that_is_not_there_is_told_which_are(base_url: str, session: requests.Session) -> None:
    for path, allowed in {
        "/v1/audio/voices": "GET, POST",
        "/v1/audio/voices/anna": "GET, PATCH, DELETE",
        "/v1/audio/speech": "POST",
    }.items():
        answer = session.put(base_url + path, headers={"Authorization": f"Bearer {KEY}"})
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
        assert answer.json()["error"]["code"] == "method_not_allowed"
