"""The real chatterbox-tts classes, small and with random weights, behind the real server."""

import asyncio
import importlib
import inspect
import os
import random
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from chatterbox_server import engines
from chatterbox_server.app import warm_up
from chatterbox_server.engine import EngineBroken, EngineError, OutOfMemory, Utterance
from chatterbox_server.engines import stock
from chatterbox_server.engines.stock import Placement, StockEngine, failures, place
from chatterbox_server.settings import Settings
from server import tiny
from server.fakes import a_client, run
from server.tiny import CPU, KINDS, Build, Models, but, changed, record, said, same

SPEECH = "/v1/audio/speech"

pytestmark = tiny.warnings
model = tiny.model


def heard(engine: StockEngine, plain: Utterance, **changes: Any) -> list[Utterance]:
    """``plain`` and its changed twin under the first seed that lets them sound different.

    Random weights listen faintly: under many a seed, the same tokens are drawn.
    """
    for seed in range(1, 31):
        twins = [but(plain, seed=seed), but(plain, seed=seed, **changes)]
        if not same(*map(partial(said, engine), twins)):
            return twins
    pytest.fail(f"never heard: {changes}")


# -- without the package ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "visible_gpus", "expected"),
    [
        ("cpu", (), Placement("cpu", "cpu")),
        ("cpu", ("2", "3"), Placement("cpu", "cpu")),
        # Inside a unit, the first visible card is always cuda:0, whatever its number outside.
        ("cuda", (), Placement("cuda:0", "cuda:0")),
        ("cuda", ("3",), Placement("cuda:0", "cuda:0")),
        ("cuda", ("2", "3"), Placement("cuda:0", "cuda:1")),
        ("cuda", ("GPU-8f3c2a1b", "GPU-11112222"), Placement("cuda:0", "cuda:1")),
    ],
)
def test_a_model_is_placed_on_what_it_can_see(device: Any, visible_gpus: tuple[str, ...], expected: Placement) -> None:
    assert place(device, visible_gpus) == expected


def test_three_gpus_are_one_too_many() -> None:
    with pytest.raises(EngineError, match=r"3 GPUs \(CUDA_VISIBLE_DEVICES=0,1,2\): name one or two"):
        place("cuda", ("0", "1", "2"))


def test_every_kind_of_the_settings_is_known() -> None:
    kinds = Settings.model_fields["model"].annotation
    assert getattr(kinds, "__args__", ()) == tuple(stock.KINDS)


# -- the real classes -------------------------------------------------------------------------------------


class TestTheRealClasses:
    pytestmark = model

    @pytest.mark.parametrize("kind", KINDS)
    def test_they_speak_over_http_and_a_seed_repeats_exactly(self, kind: str, build: Build) -> None:
        async def scenario() -> None:
            async with a_client(build(kind)) as client:
                body = {"input": "Hello world.", "response_format": "pcm", "seed": 7}
                first, again = await client.post(SPEECH, json=body), await client.post(SPEECH, json=body)
                other = await client.post(SPEECH, json=body | {"seed": 8})
                assert first.status_code == 200, first.text
                assert len(first.content) / 2 / 24_000 == pytest.approx(
                    float(first.headers["x-audio-duration"]), abs=1e-3
                )
                assert first.content == again.content
                assert first.content != other.content
                assert (await client.get("/readyz")).json()["facts"]["devices"] == {"t3": "cpu", "s3gen": "cpu"}

        run(scenario())

    @pytest.mark.parametrize(("kind", "weights"), [("chatterbox", False), ("turbo", True), ("multilingual", False)])
    def test_weights_come_from_the_hub_cache_or_from_a_directory(
        self, kind: str, weights: bool, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The package's own loaders want gigabytes; what they return is a tiny model here."""
        made = models.lend(kind)
        asked: list[tuple[object, ...]] = []
        loader = getattr(importlib.import_module(stock.KINDS[kind].module), stock.KINDS[kind].class_name)
        name = "from_local" if weights else "from_pretrained"
        signature = inspect.signature(getattr(loader, name))

        def load(*given: object) -> object:
            signature.bind(*given)
            asked.append(given)
            return made

        monkeypatch.setattr(loader, name, load)

        engine = engines.load(Settings(model=kind, device="cpu", weights=tmp_path if weights else None))

        assert asked == [(tmp_path, "cpu") if weights else ("cpu",)]
        assert said(engine, warm_up(engine)).size > 0

    def test_a_gpu_that_answers_no_more_is_told_from_an_utterance_that_failed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import torch

        error = RuntimeError("a size that does not fit")
        monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)
        failures.check(["cuda:0"], error)
        with pytest.raises(EngineBroken, match="CUBLAS_STATUS_EXECUTION_FAILED"):
            failures.check(["cuda:0"], RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublas"))

        def broken(_device: object) -> None:
            raise error

        monkeypatch.setattr(torch.cuda, "synchronize", broken)
        with pytest.raises(EngineBroken, match="a size that does not fit"):
            failures.check(["cuda:0"], error)

    def test_running_out_of_memory_is_not_the_end(self) -> None:
        import torch

        for error in (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
            RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
            RuntimeError("Triton Error [CUDA]: out of memory"),
        ):
            said = f"the GPU is out of memory: {failures.one_line(error)}"
            # Told once, however many stand around it.
            with pytest.raises(OutOfMemory) as told, failures.told(["cuda:0"]), failures.told(["cuda:0"]):
                raise error
            assert str(told.value) == said

    @pytest.mark.parametrize("kind", KINDS)
    def test_no_voice_and_no_exaggeration_leaks(self, kind: str, build: Build, recordings: Path) -> None:
        """The package alone fails this: without a voice it speaks with the last one's."""
        engine = build(kind)
        low, high = recordings / "low.wav", recordings / "high.wav"
        requests = [changed(engine), changed(engine, voice=low), changed(engine, voice=high)]
        if kind != "turbo":
            requests += heard(engine, requests[0], exaggeration=0.0) + heard(engine, requests[2], exaggeration=0.0)
        alone = [said(build(kind), request) for request in requests]
        assert len({sound.tobytes() for sound in alone}) == len(requests)

        order = [number for number in range(len(requests)) for _ in range(1 if kind == "multilingual" else 3)]
        random.Random(1).shuffle(order)  # noqa: S311
        for number in order:
            assert same(said(engine, requests[number]), alone[number]), (number, order)

    def test_twenty_at_once_get_twenty_right_answers(self, build: Build, recordings: Path) -> None:
        voices = ("default", "low", "high")
        bodies = [{"input": f"Go {n}.", "voice": voices[n % 3], "seed": n, "response_format": "pcm"} for n in range(20)]

        async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> bytes:
            answer = await client.post(SPEECH, json=body)
            assert answer.status_code == 200, answer.text
            return answer.content

        async def scenario() -> None:
            told = Settings(queue_size=20, voices_dir=recordings)
            async with a_client(build("turbo"), told) as client:
                alone = [await ask(client, body) for body in bodies]
                assert len(set(alone)) == 20
                assert await asyncio.gather(*(ask(client, body) for body in bodies)) == alone

        run(scenario())

    @pytest.mark.parametrize("kind", KINDS)
    def test_no_guidance_is_a_number_like_any_other(self, kind: str, build: Build) -> None:
        """``cfg_weight=0`` is a RuntimeError in the package."""
        engine = build(kind)
        none = said(engine, changed(engine, cfg_weight=0.0))
        assert none.size
        assert same(none, said(engine, changed(engine, cfg_weight=1e-7)))
        if kind != "turbo":
            heard(engine, changed(engine, cfg_weight=0.0), cfg_weight=1.0)

    def test_every_parameter_is_heard(self, build: Build) -> None:
        engine = build("chatterbox")
        for change in (
            {"exaggeration": 0.0},
            {"cfg_weight": 1.0},
            {"temperature": 2.0},
            {"min_p": 0.9},
            {"top_p": 0.05},
            {"repetition_penalty": 10.0},
            {"text": "Hello to all of us."},
        ):
            heard(engine, changed(engine), **change)

    def test_turbo_is_told_only_what_it_heeds(self, build: Build, caplog: pytest.LogCaptureFixture) -> None:
        engine = build("turbo")
        plain = said(engine, changed(engine))
        for parameter in ("exaggeration", "cfg_weight", "min_p"):
            assert same(plain, said(engine, changed(engine, **{parameter: 0.3}))), parameter
        assert not same(plain, said(engine, changed(engine, top_k=1)))
        assert "not supported by Turbo" not in caplog.text

    def test_multilingual_leaves_no_hooks_behind(self, build: Build, models: Models) -> None:
        engine = build("multilingual")
        layers = models.lend("multilingual").t3.tfmr.layers
        said(engine, changed(engine, language="fr"))
        assert sum(len(layer.self_attn._forward_hooks) for layer in layers) == 0
        heard(engine, changed(engine), language="fr")

    @pytest.mark.parametrize("text", ["?", "A.", "Oh, no."])
    def test_multilingual_says_a_text_that_is_too_short_for_the_package(self, text: str, models: Models) -> None:
        """Its analyser has an IndexError once five tokens or fewer are said (resemble-ai/chatterbox issue 548)."""
        engine = StockEngine(models.lend_watchful(ends=False), "multilingual", placement=CPU)
        assert said(engine, changed(engine, text=text)).size

    def test_only_so_many_voices_are_kept_and_a_changed_file_is_heard_again(self, build: Build, tmp_path: Path) -> None:
        engine = build("turbo", voices_kept=2)
        sounds = []
        for hertz in (110, 180, 250):
            record(tmp_path / f"{hertz}.wav", hertz=hertz)
            sounds.append(said(engine, changed(engine, voice=tmp_path / f"{hertz}.wav")))
            assert engine.facts()["voices_kept"] == min(len(sounds), 2)
        # Forgotten, not lost.
        assert same(said(engine, changed(engine, voice=tmp_path / "110.wav")), sounds[0])
        record(tmp_path / "110.wav", hertz=250)
        assert same(said(engine, changed(engine, voice=tmp_path / "110.wav")), sounds[2])

    def test_a_bad_recording_is_the_callers_and_the_next_request_is_fine(self, build: Build, tmp_path: Path) -> None:
        record(tmp_path / "short.wav", hertz=110, seconds=3)
        (tmp_path / "noise.wav").write_bytes(os.urandom(1000))

        async def scenario() -> None:
            async with a_client(build("turbo"), Settings(voices_dir=tmp_path)) as client:
                body = {"input": "Hi.", "response_format": "pcm", "seed": 1}
                before = await client.post(SPEECH, json=body)
                for name, words in (
                    ("short", "voice short: the recording lasts 3.00 s; send 5.01 to"),
                    ("noise", "voice noise: the file is no sound"),
                ):
                    answer = await client.post(SPEECH, json=body | {"voice": name})
                    assert answer.status_code == 400
                    assert words in answer.json()["error"]["message"]
                    assert answer.json()["error"]["param"] == "voice"
                assert (await client.post(SPEECH, json=body)).content == before.content

        run(scenario())

    def test_a_checkpoint_without_a_voice_is_refused_at_once(self, models: Models) -> None:
        made = models.lend("turbo")
        made.conds = None
        with pytest.raises(EngineError, match=r"cannot speak without a built-in voice: memory has no conds\.pt"):
            StockEngine(made, "turbo", placement=CPU)

    def test_a_long_text_is_spoken_piece_by_piece(self, build: Build) -> None:
        async def scenario() -> None:
            engine = build("turbo")
            async with a_client(engine) as client:
                text = "This is a sentence of a text that is too long for the model to speak at once. " * 6
                answer = await client.post(SPEECH, json={"input": text, "response_format": "pcm"})
                assert answer.status_code == 200
                # 25 tokens a second, 24 kHz, 16 bit.
                tokens = len(answer.content) / 960 / 2
                assert tokens > 0

        run(scenario())

    def test_loading_says_what_is_missing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import perth
        import torch

        nowhere = Settings(device="cpu", weights=tmp_path / "nowhere")
        with pytest.raises(EngineError, match=r"CHATTERBOX_WEIGHTS=.*nowhere is not a directory"):
            engines.load(nowhere)
        with pytest.raises(EngineError, match=f"cannot load chatterbox from {tmp_path}: FileNotFoundError"):
            engines.load(Settings(device="cpu", weights=tmp_path))
        if not torch.cuda.is_available():
            with pytest.raises(EngineError, match=r"cannot find a CUDA GPU \(CUDA_VISIBLE_DEVICES: 7; torch"):
                engines.load(Settings(visible_gpus=("7",)))
        # What perth does by itself where pkg_resources is missing.
        monkeypatch.setattr(perth, "PerthImplicitWatermarker", None)
        with pytest.raises(EngineError, match="pip install 'setuptools<82'"):
            engines.load(nowhere)

    def test_what_torch_was_told_is_what_it_says(self, tmp_path: Path, build: Build) -> None:
        for asked in (True, False):
            with pytest.raises(EngineError):
                engines.load(Settings(device="cpu", weights=tmp_path / "no", tf32=asked, cudnn_benchmark=asked))
            facts = build("turbo").facts()
            assert facts["tf32"] == {"matmul": asked, "cudnn": asked}
            assert facts["cudnn_benchmark"] is asked
            assert facts["cudnn_deterministic"] is False

    def test_the_warm_up_is_an_utterance_like_any_other(self, build: Build) -> None:
        engine = build("chatterbox")
        assert same(said(engine, warm_up(engine)), said(engine, warm_up(engine)))
