"""The stock engine's stages: what ``generate`` says, to the last bit; on two devices; several utterances at once."""

import asyncio
import contextlib
import copy
import dataclasses
import random
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from chatterbox_server.engine import Dropped, EngineError, Errand, OutOfMemory, Refused, Utterance
from chatterbox_server.engines.stock import KINDS as KINDS_KNOWN
from chatterbox_server.engines.stock import Placement
from chatterbox_server.engines.stock.lanes import Apart
from chatterbox_server.engines.stock.silence import Silence
from chatterbox_server.queue import EngineQueue
from server import tiny
from server.fakes import PATIENCE_S, a_queue, an_utterance, run, until
from server.tiny import KINDS, Build, Models, but, changed, said, same

if TYPE_CHECKING:
    from chatterbox_server.engines.stock.stages import Stages

pytestmark = tiny.warnings

APART = Placement("cpu", "cpu:0")


# -- without the package ----------------------------------------------------------------------------------


def test_a_lane_does_what_it_is_asked_in_order_and_raises_to_whoever_asked() -> None:
    lane, done = Apart("lane"), list[int]()

    def fails() -> None:
        raise KeyError("mine")

    for number in range(3):
        lane.do(lambda number=number: done.append(number))  # type: ignore[misc]
    with pytest.raises(KeyError, match="mine"):
        lane.do(fails)
    assert lane.do(lambda: threading.current_thread().name) == "lane"
    assert done == [0, 1, 2]


def test_a_lane_that_is_forgotten_lets_its_thread_go() -> None:
    lane = Apart("forgotten")
    thread = lane.do(threading.current_thread)
    del lane
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_silence_lasts_until_the_last_thread_is_out_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    silence = Silence()
    heard = sys.stdout
    with silence():
        other = silence()
        other.__enter__()
        print("first")
    # Its neighbour is still inside, and what it printed would be a failure on a file that is closed.
    print("second")
    assert sys.stdout is not heard
    other.__exit__(None, None, None)
    assert sys.stdout is heard
    assert capsys.readouterr().out == ""


# -- as generate ------------------------------------------------------------------------------------------


def generated(model: Any, utterance: Utterance) -> NDArray[np.float32]:
    """What the package itself says, told the same."""
    import torch

    heeded = {
        "turbo": ("temperature", "top_p", "top_k", "repetition_penalty"),
    }.get(kind_of(model), ("exaggeration", "cfg_weight", "temperature", "min_p", "top_p", "repetition_penalty"))
    told: dict[str, Any] = {name: getattr(utterance.sampling, name) for name in heeded}
    if kind_of(model) == "multilingual":
        told["language_id"] = utterance.language
    built_in = model.conds
    model.conds = copy.deepcopy(built_in)
    try:
        if utterance.voice is not None:
            model.prepare_conditionals(str(utterance.voice), exaggeration=utterance.sampling.exaggeration)
        torch.manual_seed(utterance.seed)
        sound: NDArray[np.float32] = model.generate(utterance.text, **told).squeeze(0).numpy()
    finally:
        model.conds = built_in
        if kind_of(model) == "multilingual":
            for layer in model.t3.tfmr.layers:
                layer.self_attn._forward_hooks.clear()
    return sound


def kind_of(model: Any) -> str:
    return next(name for name, kind in KINDS_KNOWN.items() if kind.class_name == type(model).__name__)


class TestAsGenerate:
    pytestmark = tiny.model

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("voice", [None, "low"])
    def test_the_stages_say_what_generate_says(
        self, kind: str, voice: str | None, build: Build, models: Models, recordings: Path
    ) -> None:
        recording = None if voice is None else recordings / f"{voice}.wav"
        plain = changed(build(kind), voice=recording)
        utterances = [plain, but(plain, text="some  text: “odd” — and… more", seed=2**32 - 1, temperature=1.2)]
        if kind != "turbo":
            utterances.append(but(plain, seed=5, exaggeration=0.9, cfg_weight=0.7, min_p=0.2, top_p=0.8))
        if kind == "multilingual":
            utterances[1:] = [but(plain, text="Ça va: “oui”…", language="fr", seed=6)]
        expected = [generated(models.lend(kind), utterance) for utterance in utterances]
        for told in ({}, {"pipeline": True, "placement": APART}):
            engine = build(kind, **told)
            for utterance, sound in zip(utterances, expected, strict=True):
                assert same(said(engine, utterance), sound), (told, utterance)

    @pytest.mark.parametrize("kind", KINDS)
    def test_only_t3_draws_from_the_default_generator(self, kind: str, build: Build) -> None:
        import torch

        engine = build(kind)
        tokens = engine.stages.tokens(changed(engine), Errand())
        torch.manual_seed(99)
        before = torch.get_rng_state()
        sound = engine.stages.sound(tokens)
        assert torch.equal(torch.get_rng_state(), before)
        engine.stages.marked(sound)
        assert torch.equal(torch.get_rng_state(), before)
        # It does draw: from where T3 stopped, whatever the default generator is at.
        assert same(engine.stages.sound(tokens), sound)
        elsewhere = dataclasses.replace(tokens, drawn={"cpu": before})
        assert not same(engine.stages.sound(elsewhere), sound)

    def test_every_draw_is_that_of_the_default_generator(self) -> None:
        import torch
        from torch.distributions import Uniform

        from chatterbox_server.engines.stock import dice

        like = torch.zeros(3, 5).transpose(0, 1)
        draws: list[Callable[[], Any]] = [
            lambda: torch.randn_like(like),
            lambda: torch.rand_like(like, dtype=torch.float64),
            lambda: torch.randn(1, 80, 7),
            lambda: torch.rand(4, device="cpu"),
            lambda: torch.randint(0, 100, (9,)),
            lambda: torch.randperm(9),
            lambda: torch.normal(like, 2.0),
            lambda: torch.multinomial(torch.ones(9), 4),
            lambda: torch.bernoulli(like + 0.5),
            lambda: Uniform(low=-np.pi, high=np.pi).sample((1, 9, 1)),
            lambda: torch.empty(7).normal_(),
            lambda: torch.empty(7).uniform_(2, 3),
            lambda: torch.empty(7).exponential_(),
            lambda: torch.empty(7).random_(5),
        ]
        torch.manual_seed(5)
        began = dice.taken("cpu")
        expected = [draw() for draw in draws]
        torch.manual_seed(6)
        before = torch.get_rng_state()
        with dice.Drawing(began, "cpu"):
            drawn = [draw() for draw in draws]
        for number, (one, other) in enumerate(zip(drawn, expected, strict=True)):
            assert torch.equal(one, other), number
            assert one.stride() == other.stride(), number
        assert torch.equal(torch.get_rng_state(), before)

    def test_everything_that_s3gen_reads_is_on_its_device(
        self, models: Models, recordings: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With S3Gen on a device without memory: anything left behind on the CPU would mix the two and raise."""
        import torch

        from chatterbox_server.engines.stock.stages import Stages

        real = models.lend("chatterbox").s3gen
        read: list[dict[str, Any]] = []

        class Meta(torch.nn.Module):  # type: ignore[misc,unused-ignore]
            tokenizer = real.tokenizer

            def inference(self, speech_tokens: Any, ref_dict: Any, n_cfm_timesteps: Any) -> Any:
                read.append({"speech_tokens": speech_tokens, **ref_dict})
                return torch.zeros(1, 10), None

            def embed_ref(self, ref_wav: Any, ref_sr: int, device: str) -> Any:
                return {"prompt_feat": torch.as_tensor(ref_wav, device=device) * ref_sr, "prompt_feat_len": None}

        model = copy.copy(models.lend("chatterbox"))
        model.s3gen = Meta()
        stages = Stages(model, KINDS_KNOWN["chatterbox"], Placement("cpu", "meta"), voices_kept=1)
        for voice in (None, recordings / "low.wav"):
            tokens = stages.tokens(an_utterance("Hello.", voice=voice), Errand())
            assert tokens.voice.t3.speaker_emb.device.type == "cpu"
            stages.sound(tokens)
        assert len(read) == 2
        assert {held.device.type for one in read for held in one.values() if torch.is_tensor(held)} == {"meta"}


# -- several at once --------------------------------------------------------------------------------------


def faulty() -> "type[Stages]":
    """Stages in which each can fail, by the text: where the package itself would, if it were broken so."""
    import torch

    from chatterbox_server.engines.stock.stages import Stages, Tokens

    class Faulty(Stages):
        def tokens(self, utterance: Utterance, errand: Errand) -> Tokens:
            if "tongue-tied" in utterance.text:
                raise RuntimeError("T3 is tongue-tied")
            tokens = super().tokens(utterance, errand)
            if "garbled" in utterance.text:
                # S3Gen has no such row.
                return dataclasses.replace(tokens, speech=torch.full_like(tokens.speech, 6562))
            if "mute" in utterance.text:
                return dataclasses.replace(tokens, drawn={**tokens.drawn, "mute": torch.empty(0)})
            return tokens

        def sound(self, tokens: Tokens) -> NDArray[np.float32]:
            sound = super().sound(tokens)
            # There is nothing that could be marked.
            return sound[:0] if "mute" in tokens.drawn else sound

    return Faulty


class Watched(Errand):
    """Calls ``on_check`` with the number of times that the engine has asked whether anybody waits."""

    def __init__(self, on_check: Callable[["Watched", int], None]) -> None:
        super().__init__()
        self.checks = 0
        self._on_check = on_check

    def check(self) -> None:
        self.checks += 1
        self._on_check(self, self.checks)
        super().check()


Outcome = list[bytes | str]


async def outcome(queue: EngineQueue, utterances: list[Utterance], *, leaves_after: int | None = None) -> Outcome:
    """What a client hears: each piece, and why no more comes."""
    heard: Outcome = []
    async with queue.admit(utterances) as place:
        try:
            async for spoken in place:
                heard.append(spoken.samples.tobytes())
                if len(heard) == leaves_after:
                    break
        except (Refused, EngineError) as error:
            heard.append(str(error))
    return heard


def mixed_requests(voices: Path, sampling: Any) -> list[list[Utterance]]:
    dice = random.Random(7)  # noqa: S311
    texts = ("Go on.", "Hello to you.", "Is it so?", "Yes, it is.")
    faults = {4: "tongue-tied", 13: "garbled", 22: "voice", 31: "gone", 40: "mute"}
    requests = []
    for number in range(50):
        pieces = [
            an_utterance(
                f"{dice.choice(texts)} {number}",
                voice=dice.choice([None, None, voices / "low.wav", voices / "high.wav"]),
                seed=dice.randrange(2**32),
                sampling=sampling,
            )
            for _ in range(dice.choice([1, 1, 1, 2, 3]))
        ]
        match faults.get(number):
            case "voice":
                pieces.append(but(pieces[0], voice=voices / "noise.wav"))
            case "gone":
                pieces.append(but(pieces[0], voice=voices / "gone.wav"))
            case str(word):
                pieces.insert(1, but(pieces[0], text=f"I am {word}."))
        requests.append(pieces)
    return requests


class TestSeveralAtOnce:
    pytestmark = tiny.model

    def test_fifty_mixed_requests_sound_as_one_after_another(
        self, build: Build, recordings: Path, tmp_path: Path
    ) -> None:
        for name in ("low.wav", "high.wav"):
            (tmp_path / name).write_bytes((recordings / name).read_bytes())
        (tmp_path / "noise.wav").write_bytes(random.Random(1).randbytes(1000))  # noqa: S311
        told = {"stages": faulty()}
        requests = mixed_requests(tmp_path, build("turbo").defaults)

        async def one_after_another() -> list[Outcome]:
            async with a_queue(build("turbo", **told), size=50) as queue:
                return [await outcome(queue, request) for request in requests]

        async def at_once(**more: Any) -> list[Outcome]:
            # Between them, as many that leave: at once, while waiting, or after their first piece.
            leaving = requests[::3]
            most = 0
            async with a_queue(build("turbo", **told, **more), size=100, max_wait_s=600) as queue:
                tasks, gone = [], []
                for number, request in enumerate(requests):
                    tasks.append(asyncio.create_task(outcome(queue, request)))
                    if number % 3 == 0:
                        gone.append(asyncio.create_task(outcome(queue, leaving[number // 3], leaves_after=1)))
                        gone.append(asyncio.create_task(outcome(queue, leaving[number // 3])))
                        await asyncio.sleep(0.01)
                        gone[-1].cancel()
                while not all(task.done() for task in tasks):
                    most = max(most, queue.running)
                    await asyncio.sleep(0.005)
                await asyncio.gather(*gone, return_exceptions=True)
                await until(lambda: not queue.running)
                assert most > 1
                return [task.result() for task in tasks]

        expected = asyncio.run(one_after_another())
        failed = [said[-1] for said in expected if isinstance(said[-1], str)]
        assert len(failed) == 5, failed
        assert asyncio.run(at_once(pipeline=True)) == expected
        assert asyncio.run(at_once(pipeline=True, placement=APART)) == expected

    @pytest.mark.parametrize("requests", [1, 3])
    def test_t3_begins_the_next_while_s3gen_ends_the_last(self, requests: int, build: Build) -> None:
        """S3Gen waits here for T3 to come to the next one: one after another, it would wait for ever."""
        from chatterbox_server.engines.stock.stages import Stages, Tokens

        count = 3
        ahead = threading.Semaphore(0)

        class Meeting(Stages):
            begun = 0

            def tokens(self, utterance: Utterance, errand: Errand) -> Tokens:
                self.begun += 1
                if self.begun > 1:
                    ahead.release(1 if self.begun < count else 2)
                return super().tokens(utterance, errand)

            def sound(self, tokens: Tokens) -> NDArray[np.float32]:
                assert ahead.acquire(timeout=PATIENCE_S), "T3 rested"
                return super().sound(tokens)

        async def scenario() -> None:
            expected = [said(build("turbo"), utterance).tobytes() for utterance in utterances]
            async with a_queue(build("turbo", pipeline=True, stages=Meeting)) as queue:
                # Pieces of one request are heard in order all the same.
                size = count // requests
                asked = [outcome(queue, utterances[start : start + size]) for start in range(0, count, size)]
                assert [sound for heard in await asyncio.gather(*asked) for sound in heard] == expected

        utterances = [changed(build("turbo"), seed=seed) for seed in range(count)]
        run(scenario())

    def test_t3_gets_ahead_of_s3gen_by_no_more_than_there_are_places(self, build: Build) -> None:
        from chatterbox_server.engines.stock.stages import Stages, Tokens

        go, begun = threading.Semaphore(0), list[str]()

        class Held(Stages):
            def tokens(self, utterance: Utterance, errand: Errand) -> Tokens:
                begun.append(utterance.text)
                return super().tokens(utterance, errand)

            def sound(self, tokens: Tokens) -> NDArray[np.float32]:
                assert go.acquire(timeout=PATIENCE_S)
                return super().sound(tokens)

        async def scenario() -> None:
            engine = build("turbo", pipeline=True, stages=Held)
            async with a_queue(engine) as queue:
                tasks = [asyncio.create_task(outcome(queue, [changed(engine, text=f"{n}.")])) for n in range(5)]
                await until(lambda: (queue.running, queue.waiting) == (3, 2) and len(begun) == 3)
                # Whoever waits for S3Gen inside is not worked on, and S3Gen does not seem stuck for it.
                await until(lambda: sum(not piece.errand.idle_s(1e9) for piece in queue._in_hand) == 1)
                go.release(5)
                await asyncio.gather(*tasks)
                assert begun == [f"{n}." for n in range(5)]

        run(scenario())

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("pipeline", [False, True])
    def test_who_leaves_is_dropped_within_a_token_and_the_next_is_fine(
        self, kind: str, pipeline: bool, build: Build
    ) -> None:
        engine = build(kind, pipeline=pipeline)
        expected = said(engine, changed(engine))

        def leave(errand: Watched, checks: int) -> None:
            if checks == 4:
                errand.drop()

        leaving = Watched(leave)
        with pytest.raises(Dropped):
            engine.synthesize(changed(engine), leaving)
        assert leaving.checks == 4
        assert leaving.in_the_way
        assert same(said(engine, changed(engine)), expected)

    @pytest.mark.parametrize("pipeline", [False, True])
    def test_who_leaves_between_two_stages_is_not_spoken_further(self, pipeline: bool, build: Build) -> None:
        from chatterbox_server.engines.stock.stages import Stages, Tokens

        class Leaving(Stages):
            def tokens(self, utterance: Utterance, errand: Errand) -> Tokens:
                tokens = super().tokens(utterance, errand)
                errand.drop()
                return tokens

            def sound(self, tokens: Tokens) -> NDArray[np.float32]:
                pytest.fail("nobody waits for it")

        engine = build("turbo", pipeline=pipeline, stages=Leaving)
        errand = Errand()
        with pytest.raises(Dropped):
            engine.synthesize(changed(engine), errand)
        assert not errand.in_the_way

    def test_nothing_is_held_of_what_failed(self, build: Build) -> None:
        """Tensors in the frames of an exception would be memory of the GPU that an utterance in halves needs."""
        import torch

        from chatterbox_server.engines.stock.stages import Stages, Tokens

        class Large:
            pass

        held: list[weakref.ref[Large]] = []

        class Short(Stages):
            def sound(self, tokens: Tokens) -> NDArray[np.float32]:
                large = Large()
                held.append(weakref.ref(large))
                raise torch.OutOfMemoryError("CUDA out of memory")

        engine = build("turbo", pipeline=True, stages=Short)
        with contextlib.suppress(OutOfMemory):
            said(engine, changed(engine))
        # The lane has come to its next work, if only to this.
        engine._s3gen.do(lambda: None)
        assert [one() for one in held] == [None]
