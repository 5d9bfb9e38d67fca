"""An utterance whose beginning is heard before its end is there: through the queue, the joints, and HTTP."""

import asyncio

import numpy as np
import pytest
from numpy.typing import NDArray

from chatterbox_server import speaker
from chatterbox_server.app import create_app
from chatterbox_server.engine import EngineError, Errand, OutOfMemory, Utterance
from chatterbox_server.joints import InParts, Joints
from chatterbox_server.place import Spoken
from chatterbox_server.settings import Settings
from server.fakes import FakeEngine, a_client, a_port, a_queue, an_utterance, noise, run

RATE_HZ = 24_000
JOINTS = Joints(RATE_HZ)


def loud(seconds: float) -> NDArray[np.float32]:
    return np.full(round(seconds * RATE_HZ), 0.5, np.float32)


def quiet(seconds: float) -> NDArray[np.float32]:
    return np.zeros(round(seconds * RATE_HZ), np.float32)


# -- the queue --------------------------------------------------------------------------------------------


async def heard(engine: FakeEngine, *texts: str, listens: bool) -> tuple[list[Spoken], list[Spoken]]:
    """What a reader hears of a request, and what is told of its utterances."""
    told: list[Spoken] = []
    utterances = [an_utterance(text) for text in texts]
    async with a_queue(engine, on_spoken=told.append) as queue, queue.admit(utterances, listens=listens) as place:
        return [spoken async for spoken in place], told


def test_who_listens_hears_the_first_utterance_in_parts_and_the_others_whole() -> None:
    spoken, told = run(heard(FakeEngine(in_parts=True), "one", "two", listens=True))

    assert [one.last for one in spoken] == [False, False, True, True]
    assert np.array_equal(np.concatenate([one.samples for one in spoken[:3]]), noise(an_utterance("one")))
    assert np.array_equal(spoken[3].samples, noise(an_utterance("two")))
    # Metrics hear of all of it, once.
    assert [one.given + one.samples.size for one in told] == [2400, 2400]


def test_who_does_not_listen_hears_everything_whole() -> None:
    spoken, _ = run(heard(FakeEngine(in_parts=True), "one", listens=False))
    assert [one.last for one in spoken] == [True]


def test_a_part_is_heard_while_the_engine_goes_on() -> None:
    async def scenario() -> None:
        engine = FakeEngine(held=True, in_parts=True)
        async with a_queue(engine) as queue, queue.admit([an_utterance("one")], listens=True) as place:
            parts = aiter(place)
            engine.let_go()
            first = await anext(parts)
            assert not first.last
            assert queue.running == 1

    run(scenario())


def test_what_breaks_off_is_heard_as_far_as_it_came() -> None:
    async def scenario() -> None:
        utterances = [an_utterance("break off")]
        async with a_queue(FakeEngine(in_parts=True)) as queue, queue.admit(utterances, listens=True) as place:
            parts = aiter(place)
            assert not (await anext(parts)).last
            with pytest.raises(EngineError, match="the fan is stuck"):
                await anext(parts)

    run(scenario())


def test_what_was_heard_is_not_said_again_for_its_length() -> None:
    """Its length, a tenth of a second, is implausible for its text; whole, it would be spoken twice."""

    async def scenario() -> None:
        for stream, times in (("audio", 1), (None, 2)):
            engine = FakeEngine(in_parts=True)
            async with a_client(engine, Settings(check_duration=True)) as client:
                asked = {"input": "A sentence that takes far longer.", "response_format": "pcm"}
                answer = await client.post(
                    "/v1/audio/speech", json=asked | ({"stream_format": stream} if stream else {})
                )
                assert answer.status_code == 200
            said = [one for one in engine.heard if one.text == asked["input"]]
            assert len(said) == times

    run(scenario())


# -- spoken again -----------------------------------------------------------------------------------------


class Unsteady(FakeEngine):
    """What it says at first is wrong, before anybody has heard of it; then it gives the beginning before the end."""

    def __init__(self, first: NDArray[np.float32] | OutOfMemory, second: NDArray[np.float32]) -> None:
        super().__init__(in_parts=True)
        self._first, self._second = first, second

    def synthesize(self, utterance: Utterance, errand: Errand) -> NDArray[np.float32]:
        self.heard.append(utterance)
        if len(self.heard) > 1:
            begin, end = np.split(self._second, 2)
            if not errand.listens:
                return self._second
            errand.give(begin)
            return end
        if isinstance(self._first, OutOfMemory):
            raise self._first
        return self._first


def listened(engine: FakeEngine, text: str) -> NDArray[np.float32]:
    """All that a listener of one utterance hears."""
    parts: list[NDArray[np.float32]] = []
    sound = speaker.speak(engine, an_utterance(text), Errand(on_sound=parts.append), lambda: None)
    return np.concatenate((*parts, sound.samples))


def test_who_listens_to_a_second_try_hears_nothing_of_the_first() -> None:
    """Half of the second try, the end alone, would be too short for its text; all of it is not."""
    right = np.linspace(-0.5, 0.5, 2 * RATE_HZ, dtype=np.float32)
    assert np.array_equal(listened(Unsteady(loud(0.1), right), "A sentence that takes longer than that."), right)


def test_who_listens_where_memory_is_short_hears_the_halves_in_order() -> None:
    text = "The first half of it is here and quite long, too. The second half of it is here, and as long."
    half = np.concatenate((loud(1.0), 0.5 * loud(1.0)))
    heard = listened(Unsteady(OutOfMemory("the GPU is full"), half), text)
    assert [round(float(heard[round(at_s * RATE_HZ)]), 2) for at_s in (0.5, 1.5, 2.5, 3.5)] == [0.5, 0.25, 0.5, 0.25]


# -- the joints -------------------------------------------------------------------------------------------


def joined(*parts: NDArray[np.float32], pause_s: float = 0.0) -> NDArray[np.float32]:
    piece = InParts(JOINTS)
    return np.concatenate(
        [piece.join(part, last=number == len(parts) - 1, pause_s=pause_s) for number, part in enumerate(parts)]
    )


def test_parts_are_joined_as_the_whole_would_be() -> None:
    parts = (np.concatenate((quiet(0.3), loud(0.2))), loud(0.3), np.concatenate((loud(0.1), quiet(0.4))))
    assert np.array_equal(joined(*parts, pause_s=0.2), JOINTS.join(np.concatenate(parts), 0.2))


def test_one_part_is_the_whole() -> None:
    part = np.concatenate((quiet(0.3), loud(0.2), quiet(0.3)))
    assert np.array_equal(joined(part, pause_s=0.1), JOINTS.join(part, 0.1))


def test_silence_between_two_parts_stays() -> None:
    assert joined(loud(0.1), quiet(0.2), loud(0.1)).size == round(0.4 * RATE_HZ)


def test_a_beginning_of_silence_leaves_the_margin_that_a_whole_keeps() -> None:
    for parts in ((quiet(0.5), loud(0.2)), (quiet(0.013), quiet(0.3), quiet(0.0001), loud(0.2), loud(0.1))):
        assert np.array_equal(joined(*parts), JOINTS.join(np.concatenate(parts), 0.0))


def test_an_end_of_silence_leaves_the_margin_that_a_whole_keeps() -> None:
    """What is faint beside what was heard before is silence, though it is the loudest of its part."""
    for parts in ((loud(0.2), 1e-4 * loud(0.3)), (loud(0.2), quiet(0.02), quiet(0.3))):
        assert np.array_equal(joined(*parts), JOINTS.join(np.concatenate(parts), 0.0))
    # What has left is not taken back.
    assert joined(loud(0.2), quiet(0.2), quiet(0.3)).size == round(0.4 * RATE_HZ)


def test_parts_of_silence_alone_leave_what_a_whole_does() -> None:
    for parts in ((quiet(0.3), quiet(0.4)), (quiet(0.3), quiet(0.0))):
        assert np.array_equal(joined(*parts), JOINTS.join(np.concatenate(parts), 0.0))


# -- HTTP -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", ["audio", "sse"])
def test_a_short_text_is_streamed_to_who_asks_for_it(stream: str) -> None:
    async def scenario() -> None:
        async with a_client(FakeEngine(in_parts=True)) as client:
            asked = {"input": "Hello.", "response_format": "pcm", "seed": 1}
            whole = await client.post("/v1/audio/speech", json=asked)
            streamed = await client.post("/v1/audio/speech", json=asked | {"stream_format": stream})
        assert "content-length" in whole.headers
        assert "x-real-time-factor" in whole.headers
        assert "content-length" not in streamed.headers
        # Nobody knows yet what the whole will cost.
        assert "x-real-time-factor" not in streamed.headers
        if stream == "audio":
            assert abs(len(streamed.content) - len(whole.content)) <= 2 * 2 * RATE_HZ // 100
        else:
            assert streamed.text.count("speech.audio.delta") >= 3
            assert streamed.text.count("speech.audio.done") == 1

    run(scenario())


@pytest.mark.parametrize("end", [quiet(0.3), quiet(0.0)])
def test_a_stream_whose_last_part_is_silence_or_nothing_ends_in_order(end: NDArray[np.float32]) -> None:
    class Ends(FakeEngine):
        def synthesize(self, utterance: Utterance, errand: Errand) -> NDArray[np.float32]:
            if not errand.listens:
                return loud(1.0)
            errand.give(loud(0.5))
            errand.give(loud(0.5))
            return end

    async def scenario() -> None:
        asked = {"input": "Hello.", "response_format": "pcm", "stream_format": "sse"}
        async with a_client(Ends()) as client:
            answer = await client.post("/v1/audio/speech", json=asked)
        assert '"code":"cut_short"' not in answer.text
        assert answer.text.count("speech.audio.done") == 1

    run(scenario())


def test_a_stream_of_nothing_is_an_error() -> None:
    async def scenario() -> None:
        async with a_client(FakeEngine()) as client:
            answer = await client.post("/v1/audio/speech", json={"input": "nothing", "stream_format": "audio"})
        assert answer.status_code == 500

    run(scenario())


def test_the_first_part_leaves_before_the_second_is_there() -> None:
    async def scenario() -> None:
        engine = FakeEngine(held=True, in_parts=True)
        app = create_app(lambda: engine, Settings(check_duration=False))
        async with a_port(app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            body = b'{"input": "Hello.", "response_format": "pcm", "stream_format": "audio"}'
            writer.write(
                b"POST /v1/audio/speech HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
                + str(len(body)).encode() + b"\r\n\r\n" + body
            )  # fmt: skip
            engine.let_go()
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            size = int((await reader.readline()).strip(), 16)
            assert 0 < size <= 2 * 800
            engine.held = False
            engine.let_go(10)
            writer.close()

    run(scenario())
