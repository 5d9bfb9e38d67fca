"""The routes over a fake engine: what a client sends, what it gets."""

import asyncio
import base64
import io
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from chatterbox_server import audio
from chatterbox_server.app import WARM_UP, create_app
from chatterbox_server.engine import Errand, OutOfMemory, Sampling, Utterance
from chatterbox_server.joints import Joints
from chatterbox_server.settings import Settings
from server.fakes import FakeEngine, a_client, a_port, noise, run, until

SPEECH = "/v1/audio/speech"


def post(body: object, *, engine: FakeEngine | None = None, told: Settings | None = None) -> httpx.Response:
    async def scenario() -> httpx.Response:
        async with a_client(engine or FakeEngine(), told) as client:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return await client.post(SPEECH, content=content, headers={"Content-Type": "application/json"})

    return run(scenario())


def get(path: str, *, told: Settings | None = None) -> httpx.Response:
    async def scenario() -> httpx.Response:
        async with a_client(FakeEngine(), told) as client:
            return await client.get(path)

    return run(scenario())


def fake_told(**changed: Any) -> Settings:
    """A fake's sound lasts as long for every text, so nobody asks for it twice."""
    return Settings(check_duration=False, **changed)


def sound_of(*utterances: Utterance) -> bytes:
    """What a client gets of the fake's noises, as pcm."""
    joints = Joints(24_000)
    return b"".join(audio.encode(joints.join(noise(utterance), 0.0), 24_000, "pcm") for utterance in utterances)


# -- speech -----------------------------------------------------------------------------------------------


def test_an_openai_request_gets_its_sound() -> None:
    engine = FakeEngine()
    answer = post(
        {
            "model": "gpt-4o-mini-tts",
            "input": "Hello.",
            "voice": {"id": "alloy"},
            "response_format": "pcm",
            "speed": 1,
            "instructions": "Speak like a pirate.",
            "some_new_field": {"of": "theirs"},
        },
        engine=engine,
    )

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "audio/pcm"
    assert answer.content == sound_of(engine.heard[-1])
    assert engine.heard[-1].text == "Hello."
    assert answer.headers["x-audio-duration"] == "0.100"
    assert answer.headers["content-length"] == str(len(answer.content))
    assert answer.headers["x-queue-position"] == "0"
    assert answer.headers["x-places"] == "1"
    assert float(answer.headers["x-time-to-first-byte"]) >= 0
    assert answer.headers["x-instance"] == "local"
    assert float(answer.headers["x-queue-wait"]) >= 0
    assert float(answer.headers["x-real-time-factor"]) >= 0
    assert int(answer.headers["x-seed"]) == engine.heard[-1].seed


@pytest.mark.parametrize(
    ("audio_format", "media_type"),
    [
        (None, "audio/mpeg"),
        ("mp3", "audio/mpeg"),
        ("opus", "audio/ogg"),
        ("flac", "audio/flac"),
        ("wav", "audio/wav"),
    ],
)
def test_every_format_decodes_and_lasts_as_long_as_its_header_says(audio_format: str | None, media_type: str) -> None:
    chosen = {} if audio_format is None else {"response_format": audio_format}
    answer = post({"input": "Hello."} | chosen)

    assert answer.headers["content-type"] == media_type
    decoded, rate_hz = soundfile.read(io.BytesIO(answer.content))
    assert decoded.size / rate_hz == pytest.approx(float(answer.headers["x-audio-duration"]), abs=0.1)


def test_every_parameter_reaches_the_engine_and_the_rest_is_its_own() -> None:
    engine = FakeEngine()
    engine.defaults = Sampling(repetition_penalty=2.0, exaggeration=0.7)
    given = {"cfg_weight": 0, "temperature": 1.5, "min_p": 0.1, "top_p": 0.9, "top_k": 0}
    post({"input": "Hello.", "language": "DE", "seed": 7} | given, engine=engine)

    heard = engine.heard[-1]
    assert (heard.language, heard.seed, heard.voice) == ("de", 7, None)
    assert heard.sampling == Sampling(
        exaggeration=0.7, cfg_weight=0, temperature=1.5, min_p=0.1, top_p=0.9, top_k=0, repetition_penalty=2.0
    )


def test_a_request_without_a_seed_gets_a_new_one_that_repeats_it() -> None:
    async def scenario() -> None:
        async with a_client(FakeEngine()) as client:
            body: dict[str, Any] = {"input": "Hello.", "response_format": "pcm"}
            first, second = await client.post(SPEECH, json=body), await client.post(SPEECH, json=body)
            assert first.headers["x-seed"] != second.headers["x-seed"]
            again = await client.post(SPEECH, json=body | {"seed": int(first.headers["x-seed"])})
            assert again.content == first.content != second.content

    run(scenario())


def test_a_recording_in_the_directory_is_what_the_engine_is_given(tmp_path: Path) -> None:
    (tmp_path / "anna.wav").touch()
    engine = FakeEngine()
    post({"input": "Hello.", "voice": "anna"}, engine=engine, told=fake_told(voices_dir=tmp_path))
    assert engine.heard[-1].voice == tmp_path / "anna.wav"


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "input", "input: field required"),
        ({"input": ""}, "input", "input: string should have at least 1 character, got ''"),
        ({"input": " \n"}, "input", "input: there is nothing to say, got ' \\n'"),
        ({"input": "a\0b"}, "input", "input: a zero byte cannot be spoken, got 'a\\x00b'"),
        ({"input": None}, "input", "input: input should be a valid string, got None"),
        ({"input": "x" * 100_001}, "input", "input has 100001 characters, and this server accepts 100000"),
        ({"input": "… ***"}, "input", "input: there is nothing to say in it, only signs"),
        (
            {"input": "x", "response_format": "ogg"},
            "response_format",
            "response_format: input should be 'mp3', 'opus', 'aac', 'flac', 'wav' or 'pcm', got 'ogg'",
        ),
        (
            {"input": "x", "stream_format": "websocket"},
            "stream_format",
            "stream_format: input should be 'audio' or 'sse', got 'websocket'",
        ),
        ({"input": "x", "max_wait_s": 0}, "max_wait_s", "max_wait_s: input should be greater than 0, got 0"),
        ({"input": "x", "speed": 2}, "speed", "fake-1 speaks at speed 1, not 2"),
        ({"input": "x", "speed": "1"}, "speed", "speed: input should be a valid number, got '1'"),
        ({"input": "x", "speed": 9}, "speed", "speed: input should be less than or equal to 4, got 9"),
        ({"input": "x", "voice": "bob"}, "voice", "unknown voice 'bob'; known: default"),
        ({"input": "x", "voice": "../default"}, "voice", None),
        ({"input": "x", "voice": {"id": "bob"}}, "voice", "unknown voice 'bob'; known: default"),
        ({"input": "x", "voice": {"name": "alloy"}}, "voice", None),
        ({"input": "x", "voice": {"id": 1}}, "voice", None),
        (
            {"input": "x", "language": "tlh"},
            "language",
            "fake-1 does not speak language 'tlh'; it speaks: en, de",
        ),
        (
            {"input": "x", "temperature": 0},
            "temperature",
            "temperature: input should be greater than 0, got 0",
        ),
        ({"input": "x", "exaggeration": -1}, "exaggeration", None),
        ({"input": "x", "cfg_weight": 1.1}, "cfg_weight", None),
        ({"input": "x", "min_p": 2}, "min_p", None),
        ({"input": "x", "top_p": 0}, "top_p", None),
        ({"input": "x", "top_k": 1.5}, "top_k", None),
        ({"input": "x", "repetition_penalty": 0}, "repetition_penalty", None),
        ({"input": "x", "seed": True}, "seed", "seed: input should be a valid integer, got True"),
        ({"input": "x", "seed": -1}, "seed", None),
        (
            b'{"input": "x", "temperature": NaN}',
            "temperature",
            "temperature: input should be a finite number, got nan",
        ),
        (b'{"input": "\\ud800"}', "input", None),
        (b'{"input": ', None, "the body is not JSON: Expecting value"),
        (b"", None, None),
        ([], None, None),
        ({"input": "refuse"}, "voice", "that recording is silent"),
    ],
)
def test_what_cannot_be_done_says_what_to_change(body: object, param: str | None, message: str | None) -> None:
    answer = post(body)

    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert message is None or error["message"] == message


def test_a_form_is_told_to_be_json() -> None:
    async def scenario() -> httpx.Response:
        async with a_client(FakeEngine()) as client:
            return await client.post(SPEECH, data={"input": "x"})

    answer = run(scenario())
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message == "the body must be JSON, sent with Content-Type: application/json"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fail", "the fan is stuck"),
        ("bug", "cannot speak: ZeroDivisionError: division by zero"),
        ("nan", "the engine returned 1 samples that are no number"),
        ("nothing", "the engine returned samples of shape (0,)"),
    ],
)
def test_an_engine_that_fails_is_a_500_and_the_next_request_is_fine(text: str, message: str) -> None:
    async def scenario() -> None:
        async with a_client(FakeEngine()) as client:
            answer = await client.post(SPEECH, json={"input": text})
            assert answer.status_code == 500
            error = {"message": message, "type": "server_error", "param": None, "code": "engine_error"}
            assert answer.json() == {"error": error}
            assert (await client.post(SPEECH, json={"input": "fine"})).status_code == 200

    run(scenario())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
fields = st.sampled_from(["model", "voice", "response_format", "speed", "seed", "language", "top_k", "min_p"])


@settings(max_examples=30, deadline=None)
@given(bodies=st.lists(st.dictionaries(fields | st.just("input"), json_values), min_size=1, max_size=10))
def test_any_json_is_answered_in_the_one_shape(bodies: list[dict[str, Any]]) -> None:
    async def scenario() -> None:
        async with a_client(FakeEngine()) as client:
            for body in bodies:
                headers = {"Content-Type": "application/json"}
                answer = await client.post(SPEECH, content=json.dumps(body).encode(), headers=headers)
                assert answer.status_code in {200, 400}, body
                if answer.status_code == 400:
                    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    run(scenario())


# -- streams ----------------------------------------------------------------------------------------------

BOOK = " ".join(f"This is sentence number {number} of a book that nobody has written yet." for number in range(20))


def test_a_long_text_leaves_piece_by_piece_and_the_pieces_are_the_text() -> None:
    async def scenario() -> None:
        engine = FakeEngine(held=True)
        app = create_app(lambda: engine, fake_told())
        async with a_port(app) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            engine.let_go()
            body = {"input": BOOK, "response_format": "pcm"}
            async with client.stream("POST", SPEECH, json=body) as answer:
                assert answer.status_code == 200
                assert "content-length" not in answer.headers
                chunks = answer.aiter_raw()
                first = await anext(chunks)
                # The second piece is not spoken before it is let go: the first has left without it.
                assert len(first) >= 2 * 2400
                engine.let_go(100)
                rest = b"".join([chunk async for chunk in chunks])
            pieces = [heard.text for heard in engine.heard[1:]]
            assert " ".join(pieces) == BOOK
            assert len(pieces) > 5
            assert len({heard.seed for heard in engine.heard[1:]}) == 1
            assert len(first) + len(rest) >= len(pieces) * 2 * 2400

    run(scenario())


def events_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line]


@pytest.mark.parametrize("text", ["Hello.", BOOK])
def test_server_sent_events_carry_the_same_sound(text: str) -> None:
    body = {"input": text, "seed": 1, "response_format": "pcm"}
    plain = post(body)
    answer = post(body | {"stream_format": "sse"})

    assert answer.headers["content-type"].startswith("text/event-stream")
    *deltas, done = events_of(answer.text)
    assert {delta["type"] for delta in deltas} == {"speech.audio.delta"}
    assert b"".join(base64.b64decode(delta["audio"]) for delta in deltas) == plain.content
    assert done["type"] == "speech.audio.done"
    usage = done["usage"]
    assert usage["input_tokens"] + usage["output_tokens"] == usage["total_tokens"]
    assert usage["output_tokens"] > 0


CUT = "This is a fine first sentence that is long enough to be a piece of its own, more or less.\n\nfail\n\n" * 2


def test_a_stream_that_fails_is_cut_short_and_the_client_can_tell() -> None:
    async def scenario() -> None:
        app = create_app(FakeEngine, fake_told())
        async with a_port(app) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            with pytest.raises(httpx.RemoteProtocolError):
                await client.post(SPEECH, json={"input": CUT})
            assert (await client.post(SPEECH, json={"input": "fine"})).status_code == 200
            metrics = (await client.get("/metrics")).text
            assert f'chatterbox_requests_total{{outcome="cut",route="{SPEECH}"}} 1.0' in metrics

    run(scenario())


def test_an_event_stream_that_fails_says_so_in_an_event() -> None:
    *_, last = events_of(post({"input": CUT, "stream_format": "sse"}).text)
    assert (last["type"], last["error"]["code"]) == ("error", "cut_short")
    assert last["error"]["message"] == "the fan is stuck"


def test_a_listener_who_leaves_a_stream_stops_it_at_the_next_piece() -> None:
    async def scenario() -> None:
        engine = FakeEngine(held=True)
        app = create_app(lambda: engine, fake_told())
        queue = app.state.service.queue
        async with a_port(app) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            engine.let_go()
            async with client.stream("POST", SPEECH, json={"input": BOOK}) as answer:
                await anext(answer.aiter_raw())
            await until(lambda: not queue._jobs)
            engine.let_go(100)
            await until(lambda: not queue.at_work)
            # The warm-up, the piece that was heard, and the one that was being spoken.
            assert len(engine.heard) == 1 + 2

    run(scenario())


# -- healing ----------------------------------------------------------------------------------------------


def test_out_of_memory_is_tried_once_more_in_smaller_bites() -> None:
    class Small(FakeEngine):
        def synthesize(self, utterance: Utterance, errand: Errand) -> NDArray[np.float32]:
            if len(utterance.text) > 45:
                self.heard.append(utterance)
                raise OutOfMemory("the GPU is out of memory")
            return super().synthesize(utterance, errand)

    engine = Small()
    text = "This one sentence is too long for the memory, its halves are not."
    answer = post({"input": text}, engine=engine)

    assert answer.status_code == 200
    assert engine.freed == 1
    _, whole, *bites = [heard.text for heard in engine.heard]
    assert whole == text
    assert " ".join(bites) == text


def test_out_of_memory_that_stays_is_a_503_for_another_gpu() -> None:
    answer = post({"input": "memory"})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "out_of_memory"
    assert answer.headers["retry-after"] == "1"
    assert "x-engine" not in answer.headers


def test_a_broken_engine_is_a_503_that_says_whose_request_it_was() -> None:
    async def scenario() -> None:
        engine = FakeEngine(held=True)
        async with a_client(engine, fake_told()) as client:
            breaks = asyncio.create_task(client.post(SPEECH, json={"input": "break"}))
            await until(lambda: len(engine.heard) == 2)
            waits = asyncio.create_task(client.post(SPEECH, json={"input": "waits"}))
            while (await client.get("/readyz")).json()["waiting"] < 1:
                await asyncio.sleep(0.001)
            engine.let_go()
            assert (await breaks).status_code == (await waits).status_code == 503
            assert (await breaks).headers["x-engine"] == "broken"
            assert "x-engine" not in (await waits).headers
            assert (await client.get("/readyz")).status_code == 503

    run(scenario())


def test_a_piece_of_an_odd_length_is_spoken_again_with_other_dice() -> None:
    class Rambling(FakeEngine):
        def synthesize(self, utterance: Utterance, errand: Errand) -> NDArray[np.float32]:
            sound = super().synthesize(utterance, errand)
            return np.tile(sound, 600) if utterance.seed == 7 else np.tile(sound, 20)

    async def scenario() -> None:
        engine = Rambling()
        async with a_client(engine, Settings()) as client:
            answer = await client.post(SPEECH, json={"input": "How long can this take?", "seed": 7})
            assert answer.headers["x-audio-duration"] == "2.000"
            assert answer.headers["x-seed"] == "7"
            assert [heard.seed for heard in engine.heard[1:]] == [7, 6]
            assert 'kind="odd_piece"} 1.0' in (await client.get("/metrics")).text

    run(scenario())


# -- many at once -----------------------------------------------------------------------------------------


def test_twenty_at_once_get_twenty_right_answers() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with a_client(engine, fake_told(queue_size=20)) as client:
            bodies = [{"input": f"text {n}", "seed": n, "response_format": "pcm"} for n in range(20)]
            answers = await asyncio.gather(*(client.post(SPEECH, json=body) for body in bodies))
            sounds = {heard.seed: sound_of(heard) for heard in engine.heard if heard.text != WARM_UP}
            assert [answer.content for answer in answers] == [sounds[n] for n in range(20)]

    run(scenario())


def test_a_full_queue_answers_503_and_health_answers_meanwhile() -> None:
    async def scenario() -> None:
        engine = FakeEngine(held=True)
        async with a_client(engine, fake_told(queue_size=1)) as client:
            welcome = [asyncio.create_task(client.post(SPEECH, json={"input": text})) for text in ("a", "b")]

            async def waits() -> bool:
                ready = (await client.get("/readyz")).json()
                return bool((ready["running"], ready["waiting"]) == (1, 1))

            while not await waits():
                await asyncio.sleep(0.001)
            full = await client.post(SPEECH, json={"input": "c"})
            assert full.status_code == 503
            assert int(full.headers["retry-after"]) >= 1
            assert full.json()["error"]["code"] == "queue_full"
            assert (await client.get("/healthz")).status_code == 200
            engine.let_go(2)
            assert [answer.status_code for answer in await asyncio.gather(*welcome)] == [200, 200]

    run(scenario())


def test_waiting_too_long_is_a_503() -> None:
    async def scenario() -> None:
        engine = FakeEngine(held=True)
        async with a_client(engine, fake_told(max_wait_s=1)) as client:
            first = asyncio.create_task(client.post(SPEECH, json={"input": "first"}))
            await until(lambda: len(engine.heard) == 2)
            late = await client.post(SPEECH, json={"input": "late"})
            assert late.status_code == 503
            assert int(late.headers["retry-after"]) >= 1
            assert late.json()["error"]["message"] == "not begun after 1 s of waiting"
            engine.let_go()
            assert (await first).status_code == 200

    run(scenario())


def test_a_client_that_hangs_up_frees_its_place() -> None:
    """Over a real socket: an ASGI transport would cancel the handler itself and prove nothing."""

    async def scenario() -> None:
        engine = FakeEngine(held=True)
        app = create_app(lambda: engine, fake_told(queue_size=1))
        queue = app.state.service.queue
        async with a_port(app) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            first = asyncio.create_task(client.post(SPEECH, json={"input": "first"}))
            await until(lambda: len(engine.heard) == 2)
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            body = b'{"input": "leaves"}'
            head = f"POST {SPEECH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            await until(lambda: queue.waiting == 1)
            writer.close()
            await until(lambda: queue.waiting == 0)
            engine.let_go()
            assert (await first).status_code == 200
            engine.let_go()
            await client.post(SPEECH, json={"input": "stays"})
            assert [heard.text for heard in engine.heard] == [WARM_UP, "first", "stays"]

    run(scenario())


def test_an_odd_piece_is_kept_when_there_is_no_memory_for_a_second_try() -> None:
    class Poor(FakeEngine):
        def synthesize(self, utterance: Utterance, errand: Errand) -> NDArray[np.float32]:
            if utterance.seed != 7 and utterance.text != WARM_UP:
                raise OutOfMemory("the GPU is out of memory")
            return super().synthesize(utterance, errand)

    answer = post({"input": "How long can this take?", "seed": 7}, engine=Poor(), told=Settings())
    assert answer.headers["x-audio-duration"] == "0.100"


def test_a_hang_up_in_mid_body_is_nobodys_bug(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        app = create_app(FakeEngine, fake_told())
        async with a_port(app) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            head = "POST /v1/audio/voices HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
            writer.write(f"{head}Content-Length: 999\r\n\r\n--b\r\n".encode())
            await writer.drain()
            await asyncio.sleep(0.1)
            writer.close()
            while 'outcome="left",route="/v1/audio/voices"} 1.0' not in (await client.get("/metrics")).text:
                await asyncio.sleep(0.01)

    run(scenario())
    assert "Traceback" not in caplog.text
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_page_of_another_site_may_read_answers_only_where_it_is_configured() -> None:
    async def scenario(**told: Any) -> httpx.Response:
        async with a_client(FakeEngine(), fake_told(**told)) as client:
            return await client.get("/v1/models", headers={"Origin": "https://a.example"})

    allowed = "access-control-allow-origin"
    assert allowed not in run(scenario()).headers
    assert run(scenario(cors_origins=("https://a.example",))).headers[allowed] == "https://a.example"
    assert allowed not in run(scenario(cors_origins=("https://b.example",))).headers


# -- the other routes -------------------------------------------------------------------------------------


def test_readiness_names_who_answers() -> None:
    told = fake_told(instance="gpu0", visible_gpus=("2", "3"), invocation_id="abc")
    answer = get("/readyz", told=told)

    assert answer.status_code == 200
    assert answer.json() == {
        "ready": True,
        "instance": "gpu0",
        "engine": "fake",
        "model": "fake-1",
        "sample_rate_hz": 24_000,
        "visible_gpus": ["2", "3"],
        "invocation_id": "abc",
        "draining": False,
        "places": 1,
        "waiting": 0,
        "running": 0,
        "spoken": 1,
        "max_input_chars": 100_000,
        "gpu_memory": {"allocated_bytes": 1, "reserved_bytes": 2, "free_bytes": 6, "total_bytes": 8},
        "facts": {"devices": []},
    }


def test_readiness_ends_while_draining_and_whoever_comes_is_sent_elsewhere() -> None:
    async def scenario() -> None:
        app = create_app(FakeEngine, fake_told())
        async with a_port(app) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            app.state.service.queue.drain()
            assert (await client.get("/readyz")).status_code == 503
            late = await client.post(SPEECH, json={"input": "late"})
            assert late.status_code == 503
            assert late.json()["error"]["code"] == "stopping"
            assert int(late.headers["retry-after"]) >= 1

    run(scenario())


def test_a_stuck_engine_is_alive_but_not_ready() -> None:
    async def scenario() -> None:
        engine = FakeEngine(held=True)
        async with a_client(engine, fake_told(longest_utterance_s=1)) as client:
            stuck = asyncio.create_task(client.post(SPEECH, json={"input": "stuck"}))
            while (await client.get("/readyz")).status_code == 200:
                await asyncio.sleep(0.01)
            assert (await client.get("/healthz")).status_code == 200
            engine.let_go()
            assert (await stuck).status_code == 200
            assert (await client.get("/readyz")).status_code == 200

    run(scenario())


def test_the_loaded_model_is_listed_and_can_be_asked_for() -> None:
    (model,) = get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("fake-1", "model")
    assert get("/v1/models/fake-1").json() == model
    other = get("/v1/models/tts-1")
    assert (other.status_code, other.json()["error"]["code"]) == (404, "not_found")
    assert other.json()["error"]["message"] == "no model 'tts-1' is loaded here; fake-1 is"


def test_voices_are_listed_with_their_kind(tmp_path: Path) -> None:
    (tmp_path / "anna.flac").touch()
    (tmp_path / "nova.wav").touch()
    rows = get("/v1/audio/voices", told=fake_told(voices_dir=tmp_path)).json()["voices"]
    assert [(row["name"], row["kind"]) for row in rows[:4]] == [
        ("default", "built-in"),
        ("anna", "recording"),
        ("nova", "recording"),
        ("alloy", "alias"),
    ]


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/nope", 404, "no such path: /nope"),
        ("GET", SPEECH, 405, "GET is not allowed here"),
        ("POST", "/healthz", 405, "POST is not allowed here"),
    ],
)
def test_a_wrong_path_has_the_shape_of_every_error(method: str, path: str, status: int, message: str) -> None:
    async def scenario() -> httpx.Response:
        async with a_client(FakeEngine()) as client:
            return await client.request(method, path)

    answer = run(scenario())
    assert answer.status_code == status
    assert answer.json()["error"]["message"] == message
    assert answer.headers["x-instance"] == "local"


@pytest.mark.parametrize(("given", "kept"), [("abc-1", True), ("a b", False), ("", False), ("x" * 129, False)])
def test_a_request_id_is_kept_if_it_can_stand_in_a_log(given: str, kept: bool) -> None:
    async def scenario() -> str:
        async with a_client(FakeEngine()) as client:
            answer = await client.get("/nope", headers={"X-Request-Id": given})
            return str(answer.headers["x-request-id"])

    answered = run(scenario())
    assert (answered == given) is kept
    assert len(answered) in {len(given), 32}


def test_one_request_is_one_log_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="chatterbox_server.app")

    async def scenario() -> None:
        async with a_client(FakeEngine()) as client:
            headers = {"X-Request-Id": "abc"}
            await client.post(SPEECH, json={"input": "x", "response_format": "wav"}, headers=headers)
            await client.get("/healthz")

    run(scenario())
    (line,) = [record.getMessage() for record in caplog.records if SPEECH in record.getMessage()]
    said = dict(pair.split("=", 1) for pair in line.split())
    assert (said["method"], said["path"], said["status"], said["request"]) == ("POST", SPEECH, "200", "abc")
    assert (said["outcome"], said["chars"], said["pieces"], said["audio_s"]) == ("answered", "1", "1", "0.100")
    assert float(said["queue_wait_s"]) <= float(said["first_byte_s"]) <= float(said["seconds"])
    assert "/healthz" not in caplog.text


def test_our_own_bug_is_a_500_in_shape(caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(FakeEngine, Settings())

    @app.get("/bug")
    async def bug() -> None:
        raise KeyError("ours")

    async def scenario() -> None:
        async with a_port(app) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            answer = await client.get("/bug")
            assert answer.status_code == 500
            assert answer.json()["error"]["code"] == "internal_error"
            assert answer.headers["x-request-id"]

    run(scenario())
    assert "KeyError: 'ours'" in caplog.text


def test_the_warm_up_comes_before_everything() -> None:
    engine = FakeEngine()

    async def scenario() -> None:
        async with a_client(engine):
            assert [heard.text for heard in engine.heard] == [WARM_UP]

    run(scenario())
    assert np.isfinite(noise(engine.heard[0])).all()
