"""The sender before a server that misbehaves on purpose, over real HTTP."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from chatterbox_deploy import client, fleet
from chatterbox_deploy.config import reading
from chatterbox_deploy.errors import CommandFailed
from chatterbox_deploy.speak import narration, sending, wav
from chatterbox_deploy.speak.manuscript import Chapter, Manuscript, Piece
from chatterbox_deploy.speak.narration import Manner
from chatterbox_deploy.speak.sending import Front, InFlight, Patience
from chatterbox_deploy.speak.wav import Sound

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from chatterbox_deploy.speak.narration import Take

SOUND = Sound(24_000, bytes(4800))
QUICK = Patience(failures=3, whole_s=30, first_wait_s=0.01, longest_wait_s=0.02)


def problem(status: int, message: str, **headers: str) -> web.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return web.json_response({"error": {"message": message}}, status=status, headers=named)


def sound() -> web.Response:
    return web.Response(body=wav.encode(SOUND))


@dataclass
class Server:
    """Answers as it is told, and counts; told by text and number of the try, from 0. ``None`` cuts the connection."""

    behaves: Callable[[str, int], web.Response | None] = lambda text, number: sound()
    seconds: float = 0.0
    alive: Callable[[], bool] = lambda: True
    voices: Any = None
    asked: Counter[str] = field(default_factory=Counter)
    headers: list[dict[str, str]] = field(default_factory=list)
    instances: int = 1
    places: int | None = None
    load: Counter[str] = field(default_factory=Counter)
    """Requests that each has now."""
    most: int = 0
    """Requests at once."""

    async def speech(self, request: web.Request) -> web.Response:
        text = (await request.json())["input"]
        number = self.asked[text]
        self.asked[text] += 1
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        # As least_conn does.
        instance = min((f"gpu{one}" for one in range(self.instances)), key=self.load.__getitem__)
        self.load[instance] += 1
        self.most = max(self.most, self.load.total())
        await asyncio.sleep(self.seconds)
        self.load[instance] -= 1
        answer = self.behaves(text, number)
        if answer is None:
            assert request.transport
            request.transport.abort()
            return web.Response()
        answer.headers["X-Instance"] = instance
        if self.places is not None:
            answer.headers["X-Places"] = str(self.places)
        return answer

    async def models(self, _request: web.Request) -> web.Response:
        if not self.alive():
            return problem(502, "no instance could answer")
        return web.json_response({"data": [{"id": "fake-model"}]})

    async def list_voices(self, _request: web.Request) -> web.Response:
        return problem(404, "no such path") if self.voices is None else web.json_response({"voices": self.voices})

    @asynccontextmanager
    async def served(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_post("/v1/audio/speech", self.speech)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/v1/audio/voices", self.list_voices)
        runner = web.AppRunner(app)
        await runner.setup()
        listener = socket.create_server(("127.0.0.1", 0))
        await web.SockSite(runner, listener).start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            await runner.cleanup()


@dataclass
class Heard:
    """What the sender told, kept and, at the end, complained of."""

    kept: dict[str, Sound] = field(default_factory=dict)
    instances: Counter[str] = field(default_factory=Counter)
    reasons: list[str] = field(default_factory=list)
    error: str | None = None

    def spoken(self, take: Take, sound: Sound, instance: str) -> None:
        assert self.kept[take.name] == sound
        self.instances[instance] += 1

    def again(self, take: Take, reason: str, wait_s: float) -> None:
        self.reasons.append(reason)


def takes(*texts: str) -> tuple[Take, ...]:
    manuscript = Manuscript(None, None, (Chapter(None, tuple(Piece(text, 0.0) for text in texts)),))
    return narration.takes(manuscript, Manner(), spoken_by={})


def run(
    server: Server, *texts: str, in_flight: int | InFlight = 4, patience: Patience = QUICK, key: str | None = None
) -> Heard:
    heard = Heard()
    how = InFlight(in_flight, more=False, unknown=False) if isinstance(in_flight, int) else in_flight

    async def job() -> None:
        async with server.served() as url:
            front = Front(url, client.authorization(key), answer_s=10)
            keep = heard.kept.__setitem__
            await sending.speak(front, takes(*texts), keep, in_flight=how, tell=heard, patience=patience)

    try:
        asyncio.run(job())
    except CommandFailed as error:
        heard.error = str(error)
    return heard


MANY = tuple(f"Sentence {number}." for number in range(20))


def test_each_is_asked_for_once_and_no_more_at_a_time_than_the_fleet_can_use() -> None:
    server = Server(seconds=0.1)

    heard = run(server, *MANY, in_flight=3)

    assert heard.error is None
    assert heard.kept == {take.name: SOUND for take in takes(*MANY)}
    assert server.asked == Counter(MANY)
    assert server.most == 3


def test_where_nobody_says_how_many_instances_there_are_each_that_answers_makes_room_for_more() -> None:
    server = Server(seconds=0.1, instances=8)

    heard = run(server, *(f"{number}." for number in range(80)), in_flight=InFlight())

    assert len(heard.instances) == 8
    assert 12 <= server.most <= 18


@pytest.mark.parametrize(
    ("how", "seen", "room"),
    [
        (InFlight(3, more=False, unknown=False), (64, 1), 3),
        # The fleet file says how many stock ones there are, and how long their queues are.
        (InFlight(6, unknown=False), (1, 1, 2), 6),
        (InFlight(17, unknown=False), (), 17),
        (InFlight(34, unknown=False), (64, 64), 130),
        (InFlight(), (), 4),
        (InFlight(), (0, 1, 64), 71),
    ],
)
def test_as_many_are_in_flight_as_those_who_answered_say_that_they_speak_at_once(
    how: InFlight, seen: tuple[int, ...], room: int
) -> None:
    assert how.room(seen) == room


def test_an_instance_that_speaks_many_at_once_is_given_many() -> None:
    server = Server(seconds=0.1, places=12)

    heard = run(server, *(f"{number}." for number in range(60)), in_flight=InFlight(2, unknown=False))

    assert heard.error is None
    assert server.most == 13


@pytest.mark.parametrize(
    "trouble",
    [
        lambda: problem(502, "no instance could answer: none is running (request id abc)"),
        lambda: problem(503, "busy", Retry_After="0"),
        lambda: problem(504, "late"),
        lambda: problem(500, "the engine failed"),
        lambda: None,
        lambda: web.Response(body=wav.encode(SOUND)[:-100]),
        lambda: web.Response(body=b"<html>"),
    ],
    ids=["502", "503", "504", "500", "cut", "half", "no sound"],
)
def test_what_goes_wrong_once_is_asked_again(trouble: Callable[[], web.Response | None]) -> None:
    server = Server(lambda text, number: trouble() if number == 0 and text == "b" else sound())

    heard = run(server, "a", "b", "c")

    assert heard.error is None
    assert server.asked == Counter(a=1, b=2, c=1)
    assert len(heard.reasons) == 1
    assert len(heard.kept) == 3


def test_retry_after_is_waited_for() -> None:
    began_s = time.monotonic()
    heard = run(Server(lambda text, number: sound() if number else problem(503, "busy", Retry_After="1")), "a")

    assert heard.reasons == ["503: busy"]
    assert time.monotonic() - began_s >= 1


@pytest.mark.parametrize("status", [429, 503])
def test_who_is_only_busy_is_asked_for_longer_than_one_who_fails(status: int) -> None:
    busy = 4 * QUICK.failures
    heard = run(Server(lambda text, number: sound() if number == busy else problem(status, "", Retry_After="0")), "a")

    assert heard.error is None
    assert len(heard.reasons) == busy


def test_while_no_instance_answers_at_all_no_piece_is_to_blame() -> None:
    tries = 4 * QUICK.failures
    server = Server(lambda text, number: sound() if number == tries else problem(502, "none is running"))
    server.alive = lambda: server.asked["a"] > tries

    heard = run(server, "a")

    assert heard.error is None
    assert server.asked["a"] == tries + 1


def test_a_piece_that_fails_while_others_are_spoken_is_told_with_its_text_after_the_others() -> None:
    server = Server(lambda text, number: problem(502, "two failed with it") if text == "Poison." else sound())

    heard = run(server, "Poison.", *MANY)

    assert heard.error == "cannot speak a piece:\n  502: two failed with it:\n    Poison."
    assert server.asked["Poison."] == QUICK.failures
    assert len(heard.kept) == len(MANY)


def test_after_five_such_pieces_no_more_are_begun() -> None:
    server = Server(lambda text, number: problem(500, "no"))

    heard = run(server, *MANY, in_flight=1)

    assert heard.error is not None
    assert heard.error.startswith("cannot speak 5 pieces:\n")
    assert len(server.asked) == 5


def test_who_is_busy_for_too_long_is_given_up() -> None:
    patience = Patience(failures=3, whole_s=0.3, first_wait_s=0.05, longest_wait_s=0.1)

    heard = run(Server(lambda text, number: problem(503, "busy", Retry_After="0")), "a", patience=patience)

    assert heard.error == "cannot speak a piece:\n  503: busy:\n    a"


def test_what_the_server_refuses_is_told_at_once_and_ends_the_job() -> None:
    server = Server(lambda text, number: problem(400, "voice: there is no voice 'ana'"), seconds=0.02)

    heard = run(server, *MANY, in_flight=2)

    assert heard.error is not None
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+ refuses: 400: voice: there is no voice 'ana'", heard.error)
    assert server.asked.total() <= 4
    assert not heard.reasons


def test_a_piece_that_is_refused_where_others_were_spoken_is_told_with_its_text() -> None:
    server = Server(lambda text, number: problem(400, "nothing to say") if text == MANY[9] else sound())

    heard = run(server, *MANY, in_flight=1)

    assert heard.error is not None
    assert heard.error.endswith(f"refuses: 400: nothing to say\n  the piece was:\n    {MANY[9]}")
    assert len(heard.kept) == 9


def test_who_is_not_let_in_is_told_what_to_give() -> None:
    heard = run(Server(lambda text, number: problem(401, "no known API key")), "a")

    assert heard.error is not None
    assert "401: no known API key; give an API key: --api-key-file FILE, or $CHATTERBOX_API_KEY" in heard.error


def test_requests_carry_the_key_and_an_id_to_be_found_in_the_fronts_log() -> None:
    server = Server(lambda text, number: sound() if number else problem(500, "no"))

    run(server, "a", key="secret")

    assert [headers["authorization"] for headers in server.headers] == ["Bearer secret"] * 2
    name = takes("a")[0].name
    assert [headers["x-request-id"] for headers in server.headers] == [f"speak-{name[:12]}-0", f"speak-{name[:12]}-1"]


ROWS = [
    {"name": "default", "means": None, "created": None},
    {"name": "anna", "means": None, "created": 7, "duration_s": 9.5},
    {"name": "alloy", "means": "anna", "created": None},
]


@pytest.mark.parametrize(
    ("voices", "voice", "told"),
    [
        (ROWS, None, {"model": "fake-model"}),
        (ROWS, "anna", {"model": "fake-model", "recording": ["anna", 7, 9.5]}),
        (ROWS, "alloy", {"model": "fake-model", "recording": ["anna", 7, 9.5]}),
        (ROWS, "nobody", {"model": "fake-model"}),
        (None, "anna", {"model": "fake-model"}),
    ],
)
def test_the_model_and_the_recording_behind_a_voice_are_asked_for(
    voices: Any, voice: str | None, told: dict[str, Any]
) -> None:
    async def ask() -> dict[str, Any]:
        async with Server(voices=voices).served() as url:
            return await sending.spoken_by(Front(url), voice)

    assert asyncio.run(ask()) == told


def test_where_nobody_listens_the_first_question_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

    for here, hint in ((True, "; does the fleet run? `chatterbox-deploy status`"), (False, "")):
        with pytest.raises(CommandFailed) as failed:
            asyncio.run(sending.spoken_by(Front(url, here=here), None))

        assert str(failed.value) == f"cannot reach {url}: connection refused{hint}"


@pytest.mark.parametrize(
    ("nginx", "url", "headers"),
    [
        ('listen = "127.0.0.1:6095"', "http://127.0.0.1:6095", {}),
        ('listen = "0.0.0.0:80"\nallow_anonymous = true', "http://127.0.0.1:80", {}),
        ('listen = "[::]:6095"\nallow_anonymous = true', "http://[::1]:6095", {}),
        (
            'listen = "127.0.0.1:443"\ntls_certificate = "/c"\ntls_key = "/k"\nserver_name = "tts.example"',
            "https://127.0.0.1:443",
            {"Host": "tts.example"},
        ),
    ],
)
def test_the_front_of_a_fleet_on_this_machine(nginx: str, url: str, headers: dict[str, str]) -> None:
    resolved = fleet.resolve(reading.load(f"[gpus]\n0 = 6093\n[nginx]\n{nginx}", source="fleet.toml"))

    front = sending.local_front(resolved, "secret")

    assert (front.url, dict(front.headers)) == (url, {**headers, "Authorization": "Bearer secret"})
    assert front.answer_s == 2 * 190 + 10
