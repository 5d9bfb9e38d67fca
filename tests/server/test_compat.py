"""The routes of other Chatterbox servers over a fake engine: what their clients send, and what they read."""

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from chatterbox_server.app import create_app
from chatterbox_server.engine import Errand, Sampling, Utterance
from chatterbox_server.results import Results
from chatterbox_server.routes.compat import REFERENCES
from chatterbox_server.settings import Settings
from server.fakes import FakeEngine, a_client, a_port, run, until

FORM, JSON = "/synthesize", "/synthesize-json"

BOOK = " ".join(f"This is sentence number {number} of a book that nobody has written yet." for number in range(20))


def told(directory: Path | None, **changed: Any) -> Settings:
    return Settings(check_duration=False, results_dir=directory, **changed)


def ask(
    directory: Path | None, *requests: tuple[str, str, dict[str, Any]], engine: FakeEngine | None = None, **changed: Any
) -> list[httpx.Response]:
    """The answers to ``requests`` (method, path, what httpx is told), one after another."""

    async def scenario() -> list[httpx.Response]:
        async with a_client(engine or FakeEngine(), told(directory, **changed)) as client:
            return [await client.request(method, path, **more) for method, path, more in requests]

    return run(scenario())


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def a_recording(seconds: float = 6.0) -> bytes:
    time_s = np.arange(round(seconds * 16_000)) / 16_000
    file = io.BytesIO()
    soundfile.write(file, 0.2 * np.sin(2 * np.pi * 150 * time_s), 16_000, format="FLAC")
    return file.getvalue()


# -- synthesize-json, and what it points to ---------------------------------------------------------------


def test_a_known_client_gets_its_wav(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with a_client(engine, told(tmp_path)) as client:
            body = {"text": "Direct API test", "speed": 1.0, "temperature": 0.3, "top_k": 20, "top_p": 0.9}
            answer = await client.post(JSON, json=body)
            said = answer.json()
            assert answer.status_code == 200
            assert (said["success"], said["sample_rate"], said["duration"]) == (True, 24_000, 0.1)
            assert said["audio_url"] == f"/audio/{said['filename']}"
            assert said["message"].startswith("spoke 15 characters")
            assert said["parameters"] == {
                "exaggeration": 0.5,
                "cfg_weight": 0.5,
                "temperature": 0.3,
                "min_p": 0.05,
                "top_p": 0.9,
                "top_k": 20,
                "repetition_penalty": 1.2,
                "seed": engine.heard[-1].seed,
                "speed": 1.0,
                "language": "en",
                "format": "wav",
            }
            assert engine.heard[-1].sampling == Sampling(temperature=0.3, top_k=20, top_p=0.9)
            assert answer.headers["x-seed"] == str(engine.heard[-1].seed)
            assert float(answer.headers["x-queue-wait"]) >= 0
            sound = await client.get(said["audio_url"])
            assert sound.headers["content-type"] == "audio/wav"
            decoded, rate_hz = soundfile.read(io.BytesIO(sound.content))
            assert decoded.size / rate_hz == said["duration"]

    run(scenario())


@pytest.mark.parametrize(
    ("audio_format", "media_type"),
    [("mp3", "audio/mpeg"), ("opus", "audio/ogg"), ("flac", "audio/flac"), ("aac", "audio/aac"), ("pcm", "audio/pcm")],
)
def test_another_format_may_be_asked_for(audio_format: str, media_type: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with a_client(FakeEngine(), told(tmp_path)) as client:
            said = (await client.post(JSON, json={"text": "Hello.", "format": audio_format})).json()
            assert said["filename"].endswith(f".{audio_format}")
            assert (await client.get(said["audio_url"])).headers["content-type"] == media_type

    run(scenario())


def test_a_long_text_is_one_file_with_all_of_its_pieces_and_the_sound_of_the_speech_api(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with a_client(FakeEngine(), told(tmp_path)) as client:
            said = (await client.post(JSON, json={"text": BOOK, "seed": 1, "format": "pcm"})).json()
            kept = (await client.get(said["audio_url"])).content
            body = {"input": BOOK, "seed": 1, "response_format": "pcm"}
            assert kept == (await client.post("/v1/audio/speech", json=body)).content
            assert len(kept) / 2 / 24_000 == pytest.approx(said["duration"], abs=0.001)

    run(scenario())


def test_any_instance_of_the_host_serves_a_result(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            a_client(FakeEngine(), told(tmp_path, instance="gpu0")) as one,
            a_client(FakeEngine(), told(tmp_path, instance="gpu1")) as other,
        ):
            said = (await one.post(JSON, json={"text": "Hello."})).json()
            answer = await other.get(said["audio_url"])
            assert (answer.status_code, answer.headers["x-instance"]) == (200, "gpu1")

    run(scenario())


def test_a_result_is_served_in_parts(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with a_client(FakeEngine(), told(tmp_path)) as client:
            url = (await client.post(JSON, json={"text": "Hello."})).json()["audio_url"]
            whole = await client.get(url)
            part = await client.get(url, headers={"Range": "bytes=4-11"})
            assert whole.headers["accept-ranges"] == "bytes"
            assert (part.status_code, part.content) == (206, whole.content[4:12])
            assert part.headers["content-range"] == f"bytes 4-11/{len(whole.content)}"

    run(scenario())


@pytest.mark.parametrize("name", ["x", f"{'0' * 32}.wav", f"{'0' * 32}.", "x%00", "x%0a", "%ff"])
def test_what_is_not_there_says_how_long_results_are_kept(name: str, tmp_path: Path) -> None:
    (answer,) = ask(tmp_path / "results", ("GET", f"/audio/{name}", {}))
    assert answer.status_code == 404
    assert answer.json()["message"] == "no such result: what was spoken is kept for 60 minutes"


@pytest.mark.parametrize("path", ["..%2Fsecret.wav", "%2Fetc%2Fpasswd", "%2e%2e%2f%2e%2e%2fetc/passwd"])
def test_no_path_leads_out_of_the_results(path: str, tmp_path: Path) -> None:
    (tmp_path / "secret.wav").touch()
    (answer,) = ask(tmp_path / "results", ("GET", f"/audio/{path}", {}))
    assert answer.status_code == 404


def test_a_server_that_keeps_nothing_says_so_and_still_sends_sound(tmp_path: Path) -> None:
    sound = {"Accept": "audio/wav"}
    kept, form, heard, cloned = ask(
        None,
        ("POST", JSON, {"json": {"text": "Hello."}}),
        ("POST", FORM, {"data": {"text": "Hello."}}),
        ("POST", FORM, {"data": {"text": "Hello."}, "headers": sound}),
        ("POST", FORM, {"data": {"text": "Hello."}, "files": {"audio_prompt": a_recording()}, "headers": sound}),
    )
    message = "this server keeps no files: its operator has named no directory for results"
    assert [answer.status_code for answer in (kept, form, cloned)] == [501, 501, 501]
    assert (kept.json()["success"], kept.json()["message"]) == (False, message)
    assert (heard.status_code, heard.headers["content-type"]) == (200, "audio/wav")

    (tmp_path / "file").touch()
    (unwritable,) = ask(tmp_path / "file", ("POST", JSON, {"json": {"text": "Hello."}}))
    assert unwritable.status_code == 507
    assert unwritable.json()["message"] == "cannot write to the directory of results: File exists"


# -- synthesize -------------------------------------------------------------------------------------------

SAID = {
    "text": "Hello.",
    "exaggeration": "0.7",
    "cfg_weight": "0",
    "temperature": "1.5",
    "min_p": "0.1",
    "top_p": "0.9",
    "top_k": "0",
    "repetition_penalty": "2",
    "seed": "7",
    "speed": "1.0",
    "language": "DE",
    "engine": "chatterbox",
}


@pytest.mark.parametrize(
    "sent",
    [{"data": SAID}, {"files": {name: (None, value) for name, value in SAID.items()}}, {"json": SAID}],
    ids=["urlencoded", "multipart", "json"],
)
def test_every_field_of_a_form_reaches_the_engine_and_unknown_ones_are_ignored(
    sent: dict[str, Any], tmp_path: Path
) -> None:
    engine = FakeEngine()
    (answer,) = ask(tmp_path, ("POST", FORM, sent), engine=engine)

    assert answer.json()["success"], answer.text
    heard = engine.heard[-1]
    assert (heard.text, heard.language, heard.seed, heard.voice) == ("Hello.", "de", 7, None)
    assert heard.sampling == Sampling(
        exaggeration=0.7, cfg_weight=0, temperature=1.5, min_p=0.1, top_p=0.9, top_k=0, repetition_penalty=2
    )


@pytest.mark.parametrize("route", [FORM, JSON])
def test_fields_go_by_the_names_that_other_servers_gave_them(route: str, tmp_path: Path) -> None:
    (tmp_path / "anna.wav").touch()
    engine = FakeEngine()
    body = {"input": "Hello.", "voice_id": "anna", "language_id": "de", "speech_rate": 1, "output_format": "flac"}
    (answer,) = ask(tmp_path, ("POST", route, {"json": body}), engine=engine, voices_dir=tmp_path)
    heard = engine.heard[-1]
    assert (heard.text, heard.language, heard.voice) == ("Hello.", "de", tmp_path / "anna.wav")
    assert answer.json()["filename"].endswith(".flac")


@pytest.mark.parametrize("nothing", [None, ""])
def test_what_is_null_or_empty_counts_as_left_out(nothing: str | None, tmp_path: Path) -> None:
    engine = FakeEngine()
    body: dict[str, Any] = dict.fromkeys(("voice", "seed", "language_id", "temperature", "format"), nothing)
    ask(tmp_path, ("POST", JSON, {"json": body | {"text": "Hello."}}), engine=engine)
    heard = engine.heard[-1]
    assert (heard.text, heard.voice, heard.language, heard.sampling) == ("Hello.", None, "en", engine.defaults)


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        (None, "application/json"),
        ("*/*", "application/json"),
        # As axios asks, whatever is expected.
        ("application/json, text/plain, */*", "application/json"),
        ("audio/wav", "audio/wav"),
        ("text/html, Audio/*;q=0.9", "audio/wav"),
    ],
)
def test_a_form_is_answered_with_json_unless_the_client_accepts_sound(
    accept: str | None, media_type: str, tmp_path: Path
) -> None:
    headers = {} if accept is None else {"Accept": accept}
    (answer,) = ask(tmp_path, ("POST", FORM, {"data": {"text": "Hello."}, "headers": headers}))
    assert answer.headers["content-type"] == media_type
    if media_type == "audio/wav":
        assert soundfile.info(io.BytesIO(answer.content)).duration == 0.1


class Listening(FakeEngine):
    """Notes whether each recording was there when it was spoken with, and how long it was."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths_s: list[float] = []

    def synthesize(self, utterance: Utterance, errand: Errand) -> NDArray[np.float32]:
        if utterance.voice is not None:
            self.lengths_s.append(soundfile.info(utterance.voice).duration)
        return super().synthesize(utterance, errand)


@pytest.mark.parametrize("field", REFERENCES)
def test_a_recording_that_comes_with_the_text_is_the_voice(field: str, tmp_path: Path) -> None:
    engine = Listening()
    # Whatever voice is named beside it: a web page always names one.
    sent = {"data": {"text": "Hello.", "voice": "gone"}, "files": {field: ("me.flac", a_recording())}}
    first, second = ask(tmp_path, ("POST", FORM, sent), ("POST", FORM, sent), engine=engine)

    assert first.json()["success"]
    assert second.json()["success"]
    assert engine.lengths_s == [pytest.approx(6, abs=0.1)] * 2
    _, one, two = engine.heard
    # An engine remembers voices by their path.
    assert one.voice is not None
    assert one.voice == two.voice
    assert one.voice.parent == tmp_path


def test_the_recording_stays_until_a_stream_ends_and_is_swept_afterwards(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = Listening()
        app = create_app(lambda: engine, told(tmp_path))
        async with a_port(app) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            engine.held = True
            engine.let_go()
            data, files = {"text": BOOK, "format": "pcm"}, {"audio_prompt": a_recording()}
            request = client.build_request("POST", FORM, headers={"Accept": "audio/*"}, data=data, files=files)
            answer = await client.send(request, stream=True)
            chunks = answer.aiter_raw()
            await anext(chunks)
            (voice,) = names(tmp_path)
            crowded = Results(tmp_path, kept_s=-1000)
            crowded.sweep()
            assert names(tmp_path) == {voice}
            engine.let_go(100)
            async for _ in chunks:
                pass
            await answer.aclose()
            assert len(engine.lengths_s) > 5

            def swept() -> bool:
                crowded.sweep()
                return not names(tmp_path)

            await until(swept)

    run(scenario())


@pytest.mark.parametrize(
    ("route", "sent", "param", "message"),
    [
        (JSON, {"json": {}}, "text", "text: field required"),
        (JSON, {"json": {"text": ""}}, "text", "text: string should have at least 1 character, got ''"),
        (JSON, {"json": {"text": " "}}, "text", "text: there is nothing to say, got ' '"),
        (JSON, {"json": {"text": "x", "voice": "bob"}}, "voice", "unknown voice 'bob'; known: default"),
        (JSON, {"json": []}, None, None),
        (JSON, {"content": b"{", "headers": {"Content-Type": "application/json"}}, None, None),
        (JSON, {"data": {"text": "x"}}, None, "the body must be JSON, sent with Content-Type: application/json"),
        (FORM, {}, "text", "the body must be a form or JSON, with text"),
        (FORM, {"content": b"x", "headers": {"Content-Type": "text/plain"}}, "text", None),
        (FORM, {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, None, None),
        (FORM, {"content": b"{", "headers": {"Content-Type": "application/json"}}, None, None),
        (FORM, {"content": b'{"text": "\\ud800"}', "headers": {"Content-Type": "application/json"}}, None, None),
        (FORM, {"json": "x"}, None, "body: input should be an object, got 'x'"),
        (FORM, {"data": {"a": "b"}}, "text", "text: field required"),
        (FORM, {"data": {"text": "x", "speed": "2"}}, "speed", "fake-1 speaks at speed 1, not 2"),
        (FORM, {"data": {"text": "x", "temperature": "hot"}}, "temperature", None),
        (FORM, {"data": {"text": "x", "temperature": "nan"}}, "temperature", None),
        (FORM, {"data": {"text": "x", "format": "ogg"}}, "format", None),
        (
            FORM,
            {"data": {"text": "x", "ref_audio": "me.wav"}},
            "ref_audio",
            "ref_audio: a file is required, not its name",
        ),
        (FORM, {"data": {"text": "x"}, "files": {"ref_audio": b""}}, "ref_audio", "ref_audio: the file is empty"),
        (FORM, {"data": {"text": "x"}, "files": {"audio_file": a_recording(1)}}, "audio_file", None),
        (FORM, {"data": {"text": "x"}, "files": {"a": b"x", "b": b"x"}}, None, None),
        (FORM, {"data": {f"field{number}": "x" for number in range(70)}, "files": {"a": b"x"}}, None, None),
    ],
)
def test_what_cannot_be_done_is_told_to_scripts_of_either_kind(
    route: str, sent: dict[str, Any], param: str | None, message: str | None, tmp_path: Path
) -> None:
    (answer,) = ask(tmp_path, ("POST", route, sent))
    assert answer.status_code == 400, answer.text
    body = answer.json()
    assert body["success"] is False
    assert body["message"] == body["detail"] == body["error"]["message"]
    assert body["error"]["param"] == param
    assert message is None or body["message"] == message
    assert not list(tmp_path.iterdir())


def test_a_field_without_a_file_is_a_page_where_none_was_chosen(tmp_path: Path) -> None:
    boundary = "b"
    lines = (
        *("--b", 'Content-Disposition: form-data; name="text"', "", "Hello."),
        *("--b", 'Content-Disposition: form-data; name="audio_prompt"; filename=""', "", ""),
        *("--b--", ""),
    )
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    engine = FakeEngine()
    (answer,) = ask(tmp_path, ("POST", FORM, {"content": "\r\n".join(lines), "headers": headers}), engine=engine)
    assert answer.json()["success"], answer.text
    assert engine.heard[-1].voice is None


# -- failures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "status", "code"), [("fail", 500, "engine_error"), ("memory", 503, "out_of_memory"), ("nan", 500, None)]
)
def test_a_failure_is_no_success_and_leaves_no_file(text: str, status: int, code: str | None, tmp_path: Path) -> None:
    (answer,) = ask(tmp_path, ("POST", JSON, {"json": {"text": text}}))
    assert (answer.status_code, answer.json()["success"]) == (status, False)
    assert code is None or answer.json()["error"]["code"] == code
    assert ("retry-after" in answer.headers) is (status == 503)
    assert not list(tmp_path.iterdir())


def test_a_broken_engine_still_tells_the_front_whose_request_it_was(tmp_path: Path) -> None:
    (answer,) = ask(tmp_path, ("POST", JSON, {"json": {"text": "break"}}))
    assert (answer.status_code, answer.headers["x-engine"], answer.json()["success"]) == (503, "broken", False)


def test_a_client_that_hangs_up_stops_the_engine_at_the_next_piece_and_leaves_no_file(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = FakeEngine(held=True)
        app = create_app(lambda: engine, told(tmp_path))
        async with a_port(app) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            body = json.dumps({"text": BOOK}).encode()
            head = f"POST {JSON} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            await until(lambda: len(engine.heard) == 2)
            engine.let_go()
            await until(lambda: len(engine.heard) == 3)
            assert names(tmp_path)
            writer.close()
            await until(lambda: not names(tmp_path))
            engine.let_go(100)
            await until(lambda: not app.state.service.queue.at_work)
            assert len(engine.heard) == 3
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
                assert f'{{outcome="left",route="{JSON}"}} 1.0' in (await client.get("/metrics")).text

    run(scenario())


# -- health and model -------------------------------------------------------------------------------------


class OnGpu(FakeEngine):
    """Knows what it runs on."""

    def facts(self) -> dict[str, object]:
        return {"gpus": ["NVIDIA H200"]}


def test_health_reads_as_those_clients_expect_also_while_the_engine_works(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = OnGpu(held=True)
        async with a_client(engine, told(tmp_path)) as client:
            works = asyncio.create_task(client.post(JSON, json={"text": "Hello."}))
            await until(lambda: len(engine.heard) == 2)
            answer = await client.get("/health")
            assert answer.status_code == 200
            assert answer.json() == {
                "status": "healthy",
                "model_loaded": True,
                "gpu_available": True,
                "gpu_name": "NVIDIA H200",
                "gpu_memory_total": 8e-9,
                "gpu_memory_allocated": 1e-9,
                "gpus": ["NVIDIA H200"],
            }
            engine.let_go()
            assert (await works).status_code == 200

    run(scenario())


def test_health_is_503_while_nothing_would_be_spoken(tmp_path: Path) -> None:
    async def scenario() -> None:
        app = create_app(FakeEngine, told(tmp_path))
        async with a_port(app) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            app.state.service.queue.drain()
            answer = await client.get("/health")
            assert (answer.status_code, answer.json()["status"]) == (503, "unhealthy")
            assert int(answer.headers["retry-after"]) >= 1

    run(scenario())


def test_the_model_is_described() -> None:
    (answer,) = ask(None, ("GET", "/models/info", {}))
    assert answer.json() == {
        "model_type": "fake-1",
        "device": "cuda",
        "sample_rate": 24_000,
        "loaded": True,
        "languages": ["en", "de"],
    }


def test_the_document_marks_these_routes_as_deprecated_and_names_what_to_use_instead() -> None:
    (answer,) = ask(None, ("GET", "/openapi.json", {}))
    paths = answer.json()["paths"]
    for path, method in (
        (FORM, "post"),
        (JSON, "post"),
        ("/audio/{name}", "get"),
        ("/health", "get"),
        ("/models/info", "get"),
    ):
        operation = paths[path][method]
        assert operation["deprecated"] is True
        assert operation["tags"] == ["compatibility"]
        _, instead = operation["description"].split("In its place: ")
        named = instead.split("`")[1].split()
        assert named[0].lower() in paths[named[1]]
