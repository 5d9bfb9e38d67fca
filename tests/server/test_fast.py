"""The fast engine with tiny real models: whoever speaks beside, every utterance is what it is alone."""

import asyncio
import functools
import logging
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from chatterbox_server.engine import Dropped, EngineError, Errand, Refused, Utterance
from chatterbox_server.settings import Settings
from server import tiny
from server.fakes import PATIENCE_S, a_client, a_queue, an_utterance, run, until
from server.tiny import Models, but

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chatterbox_server.engines.fast import FastEngine

pytestmark = [*tiny.warnings, *tiny.model]

KINDS = ("chatterbox", "turbo")
ASKED = 24
NEAR = 1e-5
"""Of a sample: a sum in another order."""


@pytest.fixture(scope="module", params=KINDS)
def engine(request: pytest.FixtureRequest, models: Models) -> "Iterator[FastEngine]":
    from chatterbox_server.engines.fast import FastEngine

    made = FastEngine(models.lend(request.param), request.param, device="cpu", max_batch=4, keep_t3=True)
    yield made
    made.close()


def near(one: NDArray[np.float32], other: NDArray[np.float32]) -> bool:
    return one.shape == other.shape and float(np.abs(one - other).max()) < NEAR


def plain(engine: "FastEngine", text: str = "Hello.", **changes: Any) -> Utterance:
    return but(an_utterance(text, sampling=engine.defaults), **changes)


def test_mixed_requests_are_what_each_is_alone(engine: "FastEngine", recordings: Path) -> None:
    """With voices, other sampling, clients that leave, recordings that cannot be used, and streams."""
    dice = random.Random(engine.model)  # noqa: S311 (a test that repeats)
    voices = (None, None, recordings / "low.wav", recordings / "high.wav", recordings / "gone.wav")
    asked = [
        plain(
            engine,
            dice.choice(("Yes!", "Hello.", "Go on then.")),
            voice=dice.choice(voices),
            seed=number % 3,
            temperature=dice.choice((0.8, 1.3)),
            top_p=dice.choice((0.8, 1.0)),
        )
        for number in range(ASKED)
    ]
    leaves = {number for number in range(ASKED) if dice.random() < 0.15}
    streams = {number for number in range(ASKED) if dice.random() < 0.2} - leaves

    def one(number: int, *, beside: bool) -> NDArray[np.float32] | type[Exception]:
        parts: list[NDArray[np.float32]] = []
        errand = Errand(on_sound=parts.append if beside and number in streams else None)
        if beside and number in leaves:
            threading.Timer(0.02, errand.drop).start()
        try:
            rest = engine.synthesize(asked[number], errand)
        except (Dropped, Refused) as error:
            return type(error)
        whole: NDArray[np.float32] = np.concatenate((*parts, rest))
        return whole

    with ThreadPoolExecutor(engine.places) as pool:
        together = list(pool.map(functools.partial(one, beside=True), range(ASKED)))
    known: dict[Utterance, NDArray[np.float32] | type[Exception]] = {}
    for number, got in enumerate(together):
        utterance = asked[number]
        if utterance not in known:
            known[utterance] = one(number, beside=False)
        alone = known[utterance]
        if got is Dropped:
            assert number in leaves
        elif isinstance(alone, type) or isinstance(got, type):
            assert got is alone is Refused
        elif number in streams:
            # Spoken in chunks, S3Gen has not yet heard the end when it says the beginning.
            assert got.shape == alone.shape
        else:
            assert near(got, alone), utterance
    assert any(got is Dropped for got in together)
    assert any(got is Refused for got in together)
    # Everybody's slot is free again.
    assert near(known_sound(engine), known_sound(engine))


def known_sound(engine: "FastEngine") -> NDArray[np.float32]:
    return engine.synthesize(plain(engine), Errand())


def test_multilingual_says_in_each_language_the_tokens_of_the_package(models: Models) -> None:
    """Through the API, several at once, one of them too short for the package."""
    from chatterbox_server.engines.fast import FastEngine
    from chatterbox_server.engines.fast.sound import Take
    from server.test_fast_t3 import by_the_package

    model = models.lend_watchful(ends=True)
    engine = FastEngine(model, "multilingual", device="cpu", max_batch=4, keep_t3=True)
    bodies = [
        {"input": text, "language": language, "seed": seed, "response_format": "pcm"}
        for seed, (text, language) in enumerate(
            [("Bonjour.", "fr"), ("Hallo.", "DE"), ("Hello.", "en"), ("Hello.", "fr"), ("Go on.", "it"), ("A", "en")]
        )
    ]

    async def scenario() -> tuple[list[httpx.Response], httpx.Response]:
        async with a_client(engine, Settings(check_duration=False, queue_size=20)) as client:
            asked = [client.post("/v1/audio/speech", json=body) for body in bodies]
            return await asyncio.gather(*asked), await client.post(
                "/v1/audio/speech", json={"input": "Hello.", "language": "tlh"}
            )

    answers, refused = run(scenario())
    assert [answer.status_code for answer in answers] == [200] * len(bodies)
    assert refused.status_code == 400
    assert "does not speak language 'tlh'" in refused.text
    # The same text, the same seed but another language is another utterance.
    one, other = (plain(engine, seed=2, language=language) for language in ("en", "fr"))
    assert not near(engine.synthesize(one, Errand()), engine.synthesize(other, Errand()))
    for utterance in (one, other):
        tokens = engine._speech(by_the_package(model, "multilingual", utterance))
        take = Take(tokens=tokens, voice=engine.voices.find(None).s3gen, seed=utterance.seed)
        assert near(engine.synthesize(utterance, Errand()), engine._sounds(take, Errand()))
    engine.close()


def test_a_failure_of_one_sound_is_nobody_elses(engine: "FastEngine", monkeypatch: pytest.MonkeyPatch) -> None:
    """S3Gen fails on tokens of one seed, alone and in any batch: the others are spoken."""
    speak = engine._sound.speak

    def fails(takes: Any) -> Any:
        if any(take.seed == 13 for take in takes):
            raise RuntimeError("an unlucky number")
        return speak(takes)

    expected = {seed: engine.synthesize(plain(engine, seed=seed), Errand()) for seed in (11, 12)}
    monkeypatch.setattr(engine._sound, "speak", fails)
    outcomes: dict[int, Any] = {}

    def ask(seed: int) -> None:
        try:
            outcomes[seed] = engine.synthesize(plain(engine, seed=seed), Errand())
        except RuntimeError as error:
            outcomes[seed] = str(error)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(ask, (11, 13, 12)))
    assert outcomes[13] == "an unlucky number"
    assert all(near(outcomes[seed], sound) for seed, sound in expected.items())


def test_a_sound_that_nobody_waits_for_is_not_begun() -> None:
    from chatterbox_server.engines.fast.sound import Take
    from chatterbox_server.engines.fast.sounding import Sounding

    class Held:
        """S3Gen as far as it is asked here: it begins a batch, and is let go on."""

        def __init__(self) -> None:
            self.begun: list[int] = []
            self.go = threading.Semaphore(0)

        def speak(self, takes: Any) -> Any:
            self.begun += [take.seed for take in takes]
            assert self.go.acquire(timeout=PATIENCE_S)
            return [torch.zeros(24) for _ in takes]

    import torch

    held = Held()
    sounding = Sounding(held)  # type: ignore[arg-type]
    voice = {"prompt_token": torch.zeros(1, 5)}
    first = sounding.ask(Take(tokens=[1], voice=voice, seed=1))
    while not held.begun:
        time.sleep(0.001)
    left, second, third = (sounding.ask(Take(tokens=[1], voice=voice, seed=seed)) for seed in (2, 3, 4))
    left.cancel()
    held.go.release(2)
    sounds = [one.result(PATIENCE_S) for one in (first, second, third)]
    assert held.begun == [1, 3, 4]
    # Each is by itself: who keeps one keeps nobody else's.
    assert all(sound.base is None for sound in sounds)
    sounding.close()


def test_a_failure_of_t3_is_told_to_all_in_hand_and_the_next_is_served(
    engine: "FastEngine", monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = known_sound(engine)
    with monkeypatch.context() as patched:

        def fails(*_: Any, **__: Any) -> Any:
            raise RuntimeError("a step into nothing")

        patched.setattr(engine._t3, "step", fails)
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(known_sound, engine) for _ in range(3)]
        for one in asked:
            with pytest.raises(RuntimeError, match="a step into nothing"):
                one.result(PATIENCE_S)
    assert near(known_sound(engine), expected)


def test_who_leaves_makes_room_for_who_waits(engine: "FastEngine") -> None:
    """All slots are taken by endless utterances; each ends as soon as its client has gone."""
    errands = [Errand() for _ in range(engine.places)]

    def endless(errand: Errand) -> None:
        with pytest.raises(Dropped):
            engine.synthesize(plain(engine, "On and on " * 12), errand)

    threads = [threading.Thread(target=endless, args=(errand,)) for errand in errands]
    for thread in threads:
        thread.start()
    for errand in errands:
        errand.drop()
    assert known_sound(engine).size
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def test_through_the_queue_many_are_in_hand_at_once(engine: "FastEngine") -> None:
    async def scenario() -> None:
        async with a_queue(engine, size=20) as queue:

            async def one(seed: int) -> NDArray[np.float32]:
                async with queue.admit([plain(engine, seed=seed)]) as place:
                    return np.concatenate([spoken.samples async for spoken in place])

            asked = [asyncio.ensure_future(one(seed)) for seed in range(6)]
            await until(lambda: queue.running == engine.places)
            sounds = await asyncio.gather(*asked)
        for seed, sound in enumerate(sounds):
            assert near(sound, engine.synthesize(plain(engine, seed=seed), Errand()))

    run(scenario())


def test_a_text_too_long_to_be_read_is_refused_in_words(engine: "FastEngine") -> None:
    with pytest.raises(Refused, match="can be read at once"):
        engine.synthesize(plain(engine, "word " * 400), Errand())


def test_who_closes_it_is_told_what_was_in_hand(models: Models) -> None:
    from chatterbox_server.engines.fast import FastEngine

    engine = FastEngine(models.lend("chatterbox"), "chatterbox", device="cpu", max_batch=1, keep_t3=True)
    with ThreadPoolExecutor(2) as pool:
        # Of one slot: one is spoken, the other waits for it.
        asked = [pool.submit(engine.synthesize, plain(engine, "On and on " * 12), Errand()) for _ in range(2)]
        while not engine._batch._in_hand:
            time.sleep(0.001)
        engine.close()
        for one in asked:
            with pytest.raises(EngineError, match="closed"):
                one.result(PATIENCE_S)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("made", ["fast", "stock"])
def test_the_coldest_temperature_of_the_api_is_greedy(kind: str, made: str, models: Models) -> None:
    """5e-324 is nothing in float32; all tokens would be no number."""
    from chatterbox_server.engines.fast import FastEngine

    engine: Any
    if made == "fast":
        engine = FastEngine(models.lend(kind), kind, device="cpu", max_batch=1, keep_t3=True)
    else:
        engine = models.build(kind)
    cold, cool = (engine.synthesize(plain(engine, temperature=one), Errand()) for one in (5e-324, 1e-4))
    assert near(cold, cool)
    if made == "fast":
        engine.close()


def test_where_it_cannot_run_the_stock_engine_speaks_and_one_line_says_why(
    models: Models, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The package's loader wants gigabytes; what it returns is a tiny model here."""
    from chatterbox.tts import ChatterboxTTS

    from chatterbox_server.engines import fast

    monkeypatch.setattr(ChatterboxTTS, "from_pretrained", lambda _device: models.lend("chatterbox"))
    caplog.set_level(logging.INFO)
    engine = fast.load(Settings(engine="fast", device="cpu"), lambda _device: "compute capability 7.5")
    assert engine.name == "stock"
    assert engine.synthesize(an_utterance("Hello."), Errand()).size
    assert [record.getMessage() for record in caplog.records if "fast" in record.getMessage()] == [
        "the fast engine cannot run here (compute capability 7.5): speaking through the stock engine"
    ]


def test_what_is_missing_it_says_as_the_stock_engine_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from chatterbox_server.engines import fast

    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(EngineError, match=r"cannot import chatterbox-tts .*: pip install"):
        fast.load(Settings(engine="fast"))


def test_as_many_are_in_hand_as_memory_holds_or_as_are_asked_for() -> None:
    from chatterbox_server.engines.fast.engine import fitting

    gib = 2**30
    # Half of what is free, one cache of it nobody's; never more than 64 by itself.
    assert [fitting(free * gib, gib // 2) for free in (2, 8, 140)] == [1, 7, 64]
    assert [fitting(140 * gib, gib // 2, asked) for asked in (1, 100)] == [1, 100]
    with pytest.raises(EngineError, match=r"cache needs 0\.5 GiB, and 1\.0 GiB are free"):
        fitting(gib, gib // 2)
    with pytest.raises(EngineError, match=r"cannot hold 100 .*set server\.max_batch to 7 or less"):
        fitting(8 * gib, gib // 2, 100)


def test_what_it_cannot_speak_it_says_and_names_who_can() -> None:
    from chatterbox_server.engines import fast

    with pytest.raises(EngineError, match=r"2 GPUs.*server\.engine = .stock"):
        fast.load(Settings(engine="fast", visible_gpus=("0", "1")))
