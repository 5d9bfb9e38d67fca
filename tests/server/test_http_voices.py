"""The voices' routes over a fake engine: upload, list, rename, remove, and what is refused."""

import asyncio
import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile

from chatterbox_server.settings import Settings
from server.fakes import FakeEngine, a_client, run

VOICES = "/v1/audio/voices"


def a_recording(seconds: float = 6.0) -> bytes:
    time_s = np.arange(round(seconds * 16_000)) / 16_000
    file = io.BytesIO()
    soundfile.write(file, 0.2 * np.sin(2 * np.pi * 150 * time_s), 16_000, format="FLAC")
    return file.getvalue()


def ask(directory: Path | None, *requests: tuple[str, str, dict[str, Any]], **told: Any) -> list[httpx.Response]:
    """The answers to ``requests`` (method, path below the voices', what httpx is told), one after another."""

    async def scenario() -> list[httpx.Response]:
        async with a_client(FakeEngine(), Settings(voices_dir=directory, **told)) as client:
            return [await client.request(method, VOICES + path, **more) for method, path, more in requests]

    return run(scenario())


def upload(
    name: str = "anna", content: bytes | None = None, field: str = "file", **fields: str
) -> tuple[str, str, dict[str, Any]]:
    file = {field: ("voice.flac", a_recording() if content is None else content)}
    return ("POST", "", {"data": {"name": name, **fields}, "files": file})


def error(answer: httpx.Response) -> tuple[int, Any, Any, Any]:
    said = answer.json()["error"]
    assert set(said) == {"message", "type", "param", "code"}
    return answer.status_code, said["param"], said["code"], said["message"]


@pytest.mark.parametrize("field", ["file", "audio_sample"])
def test_an_upload_is_a_voice_that_can_be_listed_renamed_and_removed(field: str, tmp_path: Path) -> None:
    created, listed, renamed, found, removed, gone = ask(
        tmp_path,
        upload(field=field),
        ("GET", "", {}),
        ("PATCH", "/anna", {"json": {"name": "bob"}}),
        ("GET", "/bob", {}),
        ("DELETE", "/bob", {}),
        ("GET", "/bob", {}),
    )

    row = created.json()
    assert created.status_code == 201
    assert row["duration_s"] == pytest.approx(6, abs=0.1)
    assert isinstance(row["created"], int)
    rest = {"id": "anna", "name": "anna", "kind": "recording", "means": None, "available": True}
    assert row == rest | {"duration_s": row["duration_s"], "created": row["created"]}
    assert row in listed.json()["voices"]
    assert renamed.status_code == found.status_code == 200
    assert renamed.json() == found.json() == row | {"id": "bob", "name": "bob"}
    assert (removed.status_code, removed.content) == (204, b"")
    assert error(gone) == (404, "name", "not_found", "unknown voice 'bob'; known: default")
    assert not list(tmp_path.iterdir())


def test_what_was_uploaded_is_what_the_engine_is_given(tmp_path: Path) -> None:
    engine = FakeEngine()

    async def scenario() -> None:
        async with a_client(engine, Settings(voices_dir=tmp_path)) as client:
            await client.post(VOICES, data={"name": "anna"}, files={"file": a_recording()})
            await client.post("/v1/audio/speech", json={"input": "Hello.", "voice": "anna"})

    run(scenario())
    assert engine.heard[-1].voice == tmp_path / "anna.wav"


def test_a_taken_name_is_a_409_unless_it_shall_be_replaced(tmp_path: Path) -> None:
    _, again, replaced, twice = ask(tmp_path, upload(), upload(), upload(replace="true"), upload("bob"))
    assert error(again) == (409, "name", "name_taken", "there is a voice 'anna' already")
    assert (replaced.status_code, twice.status_code) == (201, 201)
    (clash,) = ask(tmp_path, ("PATCH", "/anna", {"json": {"name": "bob"}}))
    assert error(clash) == (409, "name", "name_taken", "there is a voice 'bob' already")


MULTIPART = {"Content-Type": "multipart/form-data; boundary=x"}


@pytest.mark.parametrize(
    ("request_", "param", "message"),
    [
        (upload(content=b""), "file", "the file is empty"),
        (upload(content=a_recording(1)), "file", "the recording lasts 1.00 s; send 5 to 30 s of speech"),
        (upload("a b"), "name", "a voice is called 1 to 64 letters, digits, '_' and '-', not 'a b'"),
        (upload("default"), "name", "'default' is the built-in voice: choose another name"),
        (upload(replace="yes"), "replace", "replace: input should be 'true' or 'false'"),
        (("POST", "", {"files": {"file": b"x"}}), "name", "name: field required"),
        (("POST", "", {"files": {"name": ("a.wav", b"x"), "file": b"x"}}), "name", "name: field required"),
        (("POST", "", {"data": {"name": "anna"}, "files": {"other": b"x"}}), "file", "file: a file is required"),
        (
            ("POST", "", {"json": {"name": "anna"}}),
            "file",
            "the body must be multipart/form-data, with name and file",
        ),
        (
            ("PATCH", "/alloy", {"json": {"name": "bob"}}),
            "name",
            "'alloy' is no recording: it can be neither renamed nor removed",
        ),
        (("PATCH", "/alloy", {"json": {}}), "name", "name: field required"),
        (("DELETE", "/default", {}), "name", "'default' is no recording: it can be neither renamed nor removed"),
    ],
)
def test_what_cannot_be_done_is_a_400_that_names_the_field(
    request_: tuple[str, str, dict[str, Any]], param: str, message: str, tmp_path: Path
) -> None:
    (answer,) = ask(tmp_path, request_)
    assert error(answer) == (400, param, answer.json()["error"]["code"], message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "body", [b"", b"no boundary", b"--x\r\n", b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--\r\n"]
)
def test_a_broken_form_is_a_400(body: bytes, tmp_path: Path) -> None:
    (answer,) = ask(tmp_path, ("POST", "", {"content": body, "headers": MULTIPART}))
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_where_no_voice_can_be_kept_the_built_in_one_is_still_listed() -> None:
    refused, listed = ask(None, upload(), ("GET", "", {}))
    message = "cannot keep voices: this server has no directory for them"
    assert error(refused) == (403, None, "read_only", message)
    assert listed.json()["voices"][0]["name"] == "default"


def test_an_alias_is_listed_with_what_it_means_and_whether_that_exists() -> None:
    (listed,) = ask(None, ("GET", "", {}), aliases={"alloy": "anna"})
    rows = {row["name"]: (row["kind"], row["means"], row["available"]) for row in listed.json()["voices"]}
    assert rows["default"] == ("built-in", None, True)
    assert rows["alloy"] == ("alias", "anna", False)
    assert rows["nova"] == ("alias", "default", True)


def test_a_missing_voice_is_a_404_in_the_path_and_a_400_in_a_request(tmp_path: Path) -> None:
    paths: tuple[tuple[str, dict[str, Any]], ...] = (("GET", {}), ("PATCH", {"json": {"name": "bob"}}), ("DELETE", {}))
    for answer in ask(tmp_path, *((method, "/nobody", more) for method, more in paths)):
        assert error(answer) == (404, "name", "not_found", "unknown voice 'nobody'; known: default")

    async def scenario() -> httpx.Response:
        async with a_client(FakeEngine()) as client:
            return await client.post("/v1/audio/speech", json={"input": "Hello.", "voice": "nobody"})

    assert error(run(scenario()))[:2] == (400, "voice")


def test_others_are_answered_while_an_upload_is_decoded(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with a_client(FakeEngine(), Settings(voices_dir=tmp_path)) as client:
            sending = asyncio.create_task(client.post(VOICES, data={"name": "anna"}, files={"file": a_recording(29)}))
            answered = 0
            while not sending.done():
                assert (await client.get("/healthz")).status_code == 200
                answered += 1
                # A transport without a socket never waits, and would let nobody else have a turn.
                await asyncio.sleep(0.001)
            assert (await sending).status_code == 201
            assert answered > 2

    run(scenario())


def test_every_refusal_is_documented() -> None:
    async def scenario() -> dict[str, Any]:
        async with a_client(FakeEngine()) as client:
            document: dict[str, Any] = (await client.get("/openapi.json")).json()
            return document

    paths = run(scenario())["paths"]
    statuses = {
        f"{method} {path}": set(operation["responses"])
        for path in (VOICES, f"{VOICES}/{{name}}")
        for method, operation in paths[path].items()
    }
    assert statuses == {
        f"get {VOICES}": {"200"},
        f"post {VOICES}": {"201", "400", "403", "409", "413", "415"},
        f"get {VOICES}/{{name}}": {"200", "404"},
        f"patch {VOICES}/{{name}}": {"200", "400", "403", "404", "409", "413", "415"},
        f"delete {VOICES}/{{name}}": {"204", "400", "403", "404"},
    }
