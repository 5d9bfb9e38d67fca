"""The fast engine with tiny real models: whoever speaks beside, every utterance is what it is alone."""

import asyncio
import contextlib
import functools
import gc
import logging
import random
import shutil
import sys
import threading
import time
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from chatterbox_server import speaker
from chatterbox_server.engine import (
    Dropped,
    EngineBroken,
    EngineError,
    Errand,
    OutOfMemory,
    Refused,
    Sampling,
    Utterance,
)
from chatterbox_server.joints import Joints
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
    from chatterbox_server.engines.fast.s3gen.sound import Take
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
    from chatterbox_server.engines.fast.s3gen.sound import Take
    from chatterbox_server.engines.fast.s3gen.sounding import Sounding

    class Held:
        """S3Gen as far as it is asked here: it begins a batch, and is let go on."""

        def __init__(self) -> None:
            self.begun: list[int] = []
            self.go = threading.Semaphore(0)
            self.flowed = None

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


class Noted:
    """S3Gen as far as ``Sounding`` asks it: notes who was done when a batch began; its flow lasts as long as told."""

    class Flowed:
        def __init__(self) -> None:
            self.over = threading.Event()

        def synchronize(self) -> None:
            assert self.over.wait(PATIENCE_S)

    def __init__(self) -> None:
        self.flowed = self.Flowed()
        self.begun: list[tuple[int, list[bool]]] = []
        self.asked: list[Any] = []

    def speak(self, takes: Any) -> Any:
        import torch

        self.flowed = self.Flowed()
        self.begun.append((takes[0].seed, [one.done() for one in self.asked]))
        return [torch.zeros(24) for _ in takes]

    def until(self, begun: int) -> None:
        while len(self.begun) < begun:
            time.sleep(0.001)


def a_take(seed: int, *, tokens: int = 1, stream: Any = None) -> Any:
    import torch

    from chatterbox_server.engines.fast.s3gen.sound import Take

    return Take(tokens=[1] * tokens, voice={"prompt_token": torch.zeros(1, 5)}, seed=seed, stream=stream)


def test_the_next_batch_begins_once_the_flow_of_the_last_is_over_and_before_its_sound_is_handed_out() -> None:
    from chatterbox_server.engines.fast.s3gen.sounding import Sounding

    noted = Noted()
    sounding = Sounding(noted)  # type: ignore[arg-type]
    noted.asked.append(sounding.ask(a_take(1)))
    noted.until(1)
    # Later, but more urgent: the third.
    noted.asked += [sounding.ask(a_take(2, tokens=50), due_s=time.monotonic() + 9)]
    noted.asked += [sounding.ask(a_take(3), due_s=0)]
    for place, seed in enumerate((1, 3, 2), 1):
        assert noted.begun[-1][0] == seed
        noted.flowed.over.set()
        noted.until(min(3, place + 1))
    assert [one.result(PATIENCE_S).size for one in noted.asked] == [24, 24, 24]
    assert noted.begun[1:] == [(3, [False, False, False]), (2, [True, False, False])]
    sounding.close()


def test_a_streams_chunk_is_handed_out_before_the_next_batch_begins_and_is_known_from_when_it_is_asked_for() -> None:
    from chatterbox_server.engines.fast.s3gen.sound import Stream
    from chatterbox_server.engines.fast.s3gen.sounding import Sounding

    noted = Noted()
    sounding = Sounding(noted)  # type: ignore[arg-type]
    assert sounding.no_stream(0)
    noted.asked.append(sounding.ask(a_take(1)))
    noted.until(1)
    assert sounding.no_stream(0)
    noted.asked.append(sounding.ask(a_take(2, tokens=50, stream=Stream())))
    assert not sounding.no_stream(0)
    noted.asked.append(sounding.ask(a_take(3)))
    noted.flowed.over.set()
    noted.until(3)
    assert noted.begun[1:] == [(2, [False, False, False]), (3, [True, True, False])]
    assert sounding.no_stream(PATIENCE_S)
    noted.flowed.over.set()
    assert noted.asked[2].result(PATIENCE_S).size == 24
    sounding.close()


def test_what_did_not_fit_together_is_let_go_of_before_each_is_tried_alone() -> None:
    import torch

    from chatterbox_server.engine import OutOfMemory
    from chatterbox_server.engines.fast.s3gen.sounding import Sounding

    class Full:
        flowed = None

        def __init__(self) -> None:
            self.held: Any = None
            self.go = threading.Event()

        def speak(self, takes: Any) -> Any:
            assert self.go.wait(PATIENCE_S)
            if len(takes) > 1:
                activations = torch.zeros(1000)
                self.held = weakref.ref(activations)
                raise OutOfMemory("the GPU is out of memory")
            assert self.held is None or self.held() is None
            return [torch.zeros(24)]

    full = Full()
    sounding = Sounding(full)  # type: ignore[arg-type]
    asked = [sounding.ask(a_take(seed)) for seed in range(4)]
    full.go.set()
    assert [one.result(PATIENCE_S).size for one in asked] == [24] * 4
    assert full.held is not None
    sounding.close()


def test_who_is_spoken_together_is_of_like_length() -> None:
    from concurrent.futures import Future

    from chatterbox_server.engines.fast.s3gen.sounding import Waiting, _alike

    lengths = (100, 149, 151, 70, 100, 101, *[100] * 20)
    waiting = [Waiting(0.0, n, length, a_take(n), Future()) for n, length in enumerate(lengths)]
    assert [one.length for one in _alike(waiting)] == [100, 149, 100, 101, *[100] * 12]


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


@pytest.mark.parametrize(("work", "short"), [("step", (0, 1, 2)), ("read", (1, 2))])
def test_where_t3_runs_out_of_memory_the_cache_is_emptied_once_and_whom_it_concerns_is_spoken_again(
    work: str, short: tuple[int, ...], engine: "FastEngine", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, with three in hand: in a step of all of them, or in a bite of two prompts while the first speaks."""
    import torch

    from chatterbox_server.engines.stock import cards

    class Large:
        """As a tensor on the GPU would be."""

    expected = [engine.synthesize(plain(engine, seed=seed), Errand()) for seed in range(4)]
    let_go, step, read = cards.let_go, engine._t3.step, engine._t3.read
    batch, held, emptied = engine._batch, list[Any](), list[Any]()

    def emptying(used: Any) -> None:
        let_go(used)
        emptied.append([one() for one in held])

    def fails() -> None:
        large = Large()
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def stepping(slots: Any, **told: Any) -> Any:
        until_s = time.monotonic() + PATIENCE_S
        while len(batch._in_hand) + len(batch._asked) < 3 and not held and time.monotonic() < until_s:
            time.sleep(0.001)
        if work == "step" and len(slots) == 3 and not held:
            fails()
        return step(slots, **told)

    def reading(bites: Any, **told: Any) -> Any:
        if work == "read" and len(bites) == 2 and not held:
            fails()
        return read(bites, **told)

    monkeypatch.setattr(cards, "let_go", emptying)
    monkeypatch.setattr(engine._t3, "step", stepping)
    monkeypatch.setattr(engine._t3, "read", reading)

    def speak(seed: int) -> speaker.Sound:
        return speaker.speak(engine, plain(engine, seed=seed), Errand(), engine.free, check_duration=False)

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(speak, 0)
        run(until(lambda: any(line.launched for line in batch._in_hand)))
        asked = [first, *(pool.submit(speak, seed) for seed in (1, 2))]
        sounds = [one.result(PATIENCE_S) for one in asked]
    for seed, sound in enumerate(sounds):
        # Of halves, here a single one, the edges are trimmed.
        right = Joints(engine.sample_rate_hz).join(expected[seed], 0.0) if seed in short else expected[seed]
        assert near(sound.samples, right), seed
    assert [number for number, sound in enumerate(sounds) if sound.remarks == ("out_of_memory",)] == list(short)
    # Nothing of what failed was held when it was.
    assert emptied == [[None]]
    assert near(speak(3).samples, expected[3])
    assert len(emptied) == 1


def test_while_no_prompt_can_be_read_whoever_speaks_goes_on(
    engine: "FastEngine", monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is always somebody who asks, and memory for none of them."""
    import torch

    from chatterbox_server.engines.stock import cards

    expected, read, batch = known_sound(engine), engine._t3.read, engine._batch
    begun, over = threading.Event(), threading.Event()

    def reading(bites: Any, **told: Any) -> Any:
        if not begun.is_set() or over.is_set():
            begun.set()
            return read(bites, **told)
        # There are as many who ask as there are places: one of them is not in hand, and soon waits.
        while not (batch._asked or over.wait(0.001)):
            pass
        raise torch.OutOfMemoryError("CUDA out of memory")

    def ask() -> None:
        while not over.is_set():
            with contextlib.suppress(OutOfMemory):
                known_sound(engine)

    monkeypatch.setattr(cards, "let_go", lambda _cards: None)
    monkeypatch.setattr(engine._t3, "read", reading)
    with ThreadPoolExecutor(engine.places + 1) as pool:
        first = pool.submit(known_sound, engine)
        try:
            assert begun.wait(PATIENCE_S)
            others = [pool.submit(ask) for _ in range(engine.places)]
            assert near(first.result(10.0), expected)
        finally:
            over.set()
        for other in others:
            other.result(PATIENCE_S)


def test_what_is_kept_of_having_run_out_of_memory_holds_no_frames() -> None:
    import torch

    from chatterbox_server.engines.fast.t3.batch import Line
    from chatterbox_server.engines.fast.t3.slots import Prompt

    line = Line(Prompt(torch.zeros(1, 1, 1)), 0, Sampling(), limit=9)
    kept = OutOfMemory("the GPU is out of memory", freed=True)
    line.end(kept)
    with pytest.raises(OutOfMemory, match="the GPU is out of memory") as told:
        line.wait(Errand(), enough=1)
    assert told.value.freed
    assert kept.__traceback__ is None


STEPS = {"t3": "step", "s3gen": "speak"}
"""What each of the engine's threads does again and again."""


@pytest.mark.parametrize("thread", STEPS)
def test_who_waits_for_a_thread_that_dies_is_told_and_so_is_the_server(
    thread: str, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chatterbox_server.engines.fast import FastEngine

    engine = FastEngine(models.lend("chatterbox"), "chatterbox", device="cpu", max_batch=1, keep_t3=True)
    assert engine.broken is None

    def dies(*_: Any, **__: Any) -> Any:
        # Of those that are no Exception.
        raise SystemExit("out of its depth")

    monkeypatch.setattr(engine._t3 if thread == "t3" else engine._sound, STEPS[thread], dies)
    with ThreadPoolExecutor(3) as pool:
        # Of one slot: one is in hand, the others wait for it.
        asked = [pool.submit(known_sound, engine) for _ in range(3)]
        for one in asked:
            with pytest.raises(EngineBroken, match=f"thread fast-{thread} has ended: SystemExit: out of its depth"):
                one.result(PATIENCE_S)
    assert engine.broken is not None
    with pytest.raises(EngineBroken):
        known_sound(engine)
    engine.close()


@pytest.mark.parametrize("thread", STEPS)
def test_a_gpu_that_is_lost_is_known_though_who_asked_has_gone(
    thread: str, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chatterbox_server.engines.fast import FastEngine

    engine = FastEngine(models.lend("chatterbox"), "chatterbox", device="cpu", max_batch=1, keep_t3=True)
    errand = Errand()
    begun = threading.Event()

    def fails(*_: Any, **__: Any) -> Any:
        begun.set()
        asking.join(PATIENCE_S)
        raise EngineBroken("device-side assert")

    def ask() -> None:
        with pytest.raises(Dropped):
            engine.synthesize(plain(engine), errand)

    monkeypatch.setattr(engine._t3 if thread == "t3" else engine._sound, STEPS[thread], fails)
    asking = threading.Thread(target=ask)
    asking.start()
    assert begun.wait(PATIENCE_S)
    errand.drop()
    asking.join(PATIENCE_S)
    run(until(lambda: engine.broken is not None))
    assert str(engine.broken) == "device-side assert"
    engine.close()


@pytest.mark.parametrize("recorder", ["recordings", "t3"])
@pytest.mark.parametrize("whole", ["cache", "check"])
def test_while_a_graph_is_recorded_nobody_touches_the_whole_card(
    recorder: str, whole: str, engine: "FastEngine", monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA and torch fail whoever empties the cache or waits for the card meanwhile, and the recording with it."""
    import torch

    from chatterbox_server.engines.fast.s3gen import recorded
    from chatterbox_server.engines.stock import cards, failures

    happened: list[str] = []
    recording = threading.Event()

    class Graph(contextlib.AbstractContextManager[None]):
        """As far as it is asked here; it takes until the other has had its chance."""

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def __enter__(self) -> None:
            happened.append("begun")
            recording.set()
            time.sleep(0.1)

        def __exit__(self, *_: object) -> None:
            happened.append("recorded")

    stream = types.SimpleNamespace(wait_stream=lambda _: None, synchronize=lambda: None)
    for name, fake in {
        "CUDAGraph": object,
        "graph": Graph,
        "current_stream": lambda: stream,
        "empty_cache": lambda: happened.append("touched"),
        "synchronize": lambda _: happened.append("touched"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    # It takes long enough here for a recording to be over.
    monkeypatch.setattr(gc, "collect", lambda: 0)

    def touch() -> None:
        assert recording.wait(PATIENCE_S)
        if whole == "cache":
            cards.let_go(("cuda:0",))
        else:
            failures.check(("cuda:0",), ValueError("of somebody else"))

    touching = threading.Thread(target=touch)
    touching.start()
    if recorder == "t3":
        engine._t3._captured(engine._t3._steps[1], sort=False)
    else:
        studio: Any = types.SimpleNamespace(pool=None, stream=stream)
        recorded.Recording("one", lambda x: x, torch.zeros(1), studio)._record(studio)
    touching.join(PATIENCE_S)
    assert happened == ["begun", "recorded", "touched"]


def test_known_voices_speak_while_a_new_one_is_heard_and_it_is_heard_once(
    engine: "FastEngine", recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = tmp_path / "new.wav"
    shutil.copy(recordings / "low.wav", new)
    known = plain(engine, voice=recordings / "high.wav")
    expected = engine.synthesize(known, Errand())
    hears, heard, go = engine.voices._heard, list[Path](), threading.Event()

    def held(recording: Path) -> Any:
        heard.append(recording)
        assert go.wait(PATIENCE_S)
        return hears(recording)

    monkeypatch.setattr(engine.voices, "_heard", held)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(engine.synthesize, plain(engine, voice=new), Errand()) for _ in range(2)]
        try:
            run(until(lambda: bool(heard)))
            with ThreadPoolExecutor(2) as others:
                spoken = [others.submit(engine.synthesize, one, Errand()) for one in (known, plain(engine))]
                assert near(spoken[0].result(5.0), expected)
                assert spoken[1].result(5.0).size
        finally:
            go.set()
        one, other = (each.result(PATIENCE_S) for each in asked)
    assert near(one, other)
    assert heard == [new]


def test_who_waits_for_others_new_voices_may_leave_and_makes_no_engine_seem_stuck(
    engine: "FastEngine", recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a restart everybody's voice is new at once, and one is heard after another."""
    first, second = (shutil.copy(recordings / "low.wav", tmp_path / f"{name}.wav") for name in ("first", "second"))
    hears, heard, go = engine.voices._heard, list[Path](), threading.Event()

    def held(recording: Path) -> Any:
        heard.append(recording)
        assert go.wait(PATIENCE_S)
        return hears(recording)

    monkeypatch.setattr(engine.voices, "_heard", held)
    works, waits = Errand(), Errand()
    with ThreadPoolExecutor(2) as pool:
        try:
            spoken = pool.submit(engine.synthesize, plain(engine, voice=first), works)
            run(until(lambda: bool(heard)))
            left = pool.submit(engine.synthesize, plain(engine, voice=second), waits)
            run(until(lambda: not waits.in_the_way))
            time.sleep(0.05)
            assert works.idle_s(time.monotonic()) == 0.0
            assert waits.worked_s(time.monotonic()) < 0.05 < waits.idle_s(time.monotonic() + 0.05)
            waits.drop()
            with pytest.raises(Dropped):
                left.result(5.0)
        finally:
            go.set()
        assert spoken.result(PATIENCE_S).size
    assert heard == [first]


def test_what_t3_does_not_read_makes_no_second_manner(engine: "FastEngine") -> None:
    """Turbo ignores exaggeration."""
    engine._manners.clear()
    for exaggeration in (0.1, 0.7, 1.9):
        engine.synthesize(plain(engine, exaggeration=exaggeration), Errand())
    assert len(engine._manners) == (3 if engine.model == "chatterbox" else 1)


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


def test_the_longest_piece_is_spoken_whatever_its_letters_cost(
    engine: "FastEngine", monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turbo reads up to three tokens for a letter that it does not know, and fewer at once than those."""
    text = "ሰላም ለዓለም ሁሉ " * (engine.longest_piece // 13)
    monkeypatch.setattr(engine._t3.slots, "longest_prompt", 120 if engine.model == "chatterbox" else 300)
    with pytest.raises(Refused, match="can be read at once"):
        engine.synthesize(plain(engine, text), Errand())
    read: list[int] = []
    ask = engine._batch.ask

    def short(prompt: Any, *told: Any, **more: Any) -> Any:
        read.append(prompt.length)
        return ask(prompt, *told, **more | {"limit": 5})

    monkeypatch.setattr(engine._batch, "ask", short)
    sound = speaker.speak(engine, plain(engine, text), Errand(), lambda: None, check_duration=False)
    assert sound.samples.size
    assert sound.remarks == ()
    assert len(read) > 1
    assert max(read) <= engine._t3.slots.longest_prompt
    # Where a crumb is too long, there is nothing to split.
    monkeypatch.setattr(engine._t3.slots, "longest_prompt", 10)
    with pytest.raises(Refused, match="can be read at once"):
        speaker.speak(engine, plain(engine, text), Errand(), lambda: None, check_duration=False)


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
    with pytest.raises(EngineError, match=r"cannot import chatterbox-tts .*; in a checkout: pip install"):
        fast.load(Settings(engine="fast"))


def test_as_many_are_in_hand_as_memory_holds_or_as_are_asked_for() -> None:
    from chatterbox_server.engines.fast.engine import fitting

    gib = 2**30
    # Half of what is free, one cache of it nobody's; never more than 64 by itself.
    assert [fitting(free * gib, gib // 2) for free in (2, 8, 140)] == [1, 7, 64]
    assert [fitting(140 * gib, gib // 2, asked) for asked in (1, 100)] == [1, 100]
    with pytest.raises(
        EngineError, match=r"two caches of 0\.5 GiB and 1\.0 GiB for S3Gen are needed, and 1\.0 GiB are free"
    ):
        fitting(gib, gib // 2)
    # Half of what is free holds no cache and a spare one, and yet there is room for them.
    assert fitting(3 * gib, gib) == fitting(3 * gib, gib, 1) == 1
    with pytest.raises(EngineError, match=r"cannot hold 100 .*set server\.max_batch to 7 or less"):
        fitting(8 * gib, gib // 2, 100)


def test_what_leaves_s3gen_no_memory_is_refused_and_what_leaves_it_little_is_said() -> None:
    from chatterbox_server.engines.fast.engine import cramped, fitting

    gib = 2**30
    # 8 GiB: 13 and the spare one leave 1 GiB, 14 half of one.
    assert fitting(8 * gib, gib // 2, 13) == 13
    with pytest.raises(
        EngineError, match=r"cannot hold 14 .* and 1\.0 GiB for S3Gen.* 8\.0 GiB are free.* to 7 or less"
    ):
        fitting(8 * gib, gib // 2, 14)
    with pytest.raises(EngineError, match=r"cannot hold an utterance.* 1\.2 GiB are free"):
        fitting(int(1.2 * gib), gib // 2, 1)
    assert fitting(140 * gib, gib // 16, 1024) == 1024
    assert cramped(8 * gib, gib // 2, 13) == (
        "1.0 GiB are left for S3Gen, which takes up to 6 GiB: long or many utterances may not fit; a smaller "
        "server.max_batch leaves it more"
    )
    assert cramped(140 * gib, gib // 2, 64) is None


def test_what_it_cannot_speak_it_says_and_names_who_can() -> None:
    from chatterbox_server.engines import fast

    with pytest.raises(EngineError, match=r"2 GPUs.*server\.engine = .stock"):
        fast.load(Settings(engine="fast", visible_gpus=("0", "1")))
