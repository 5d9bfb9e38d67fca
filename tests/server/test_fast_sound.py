"""The fast engine's S3Gen: what the package says, whoever shares the batch; in chunks; with the package's watermark."""

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from chatterbox_server.engines.stock import KINDS as KINDS_KNOWN
from server import tiny
from server.tiny import KINDS, Models

if TYPE_CHECKING:
    from chatterbox_server.engines.fast.s3gen.sound import Sound, Take

pytestmark = [*tiny.warnings, *tiny.model]

CLOSE = 1e-4
"""Relative, in float32."""


class Studio:
    """S3Gen of one kind, whose vocoder passes on what it hears, and voices of several lengths."""

    def __init__(self, kind: str, *, hertz: float = 150.0) -> None:
        import torch

        # ``Models`` has loaded it, and set torch to one thread.
        same_noise, tiny_model = script("same_noise"), sys.modules["tiny_model"]
        torch.manual_seed(3)
        self.s3gen = tiny_model.tiny_s3gen(meanflow=kind == "turbo")
        same_noise.make_audible(self.s3gen, hertz=hertz)
        self.steps = KINDS_KNOWN[kind].flow_steps
        self._package = same_noise.inference
        self.voices = [tiny_model.random_voice(prompt_tokens=25, reference_tokens=count).gen for count in (25, 9, 40)]
        # Half a token more than its tokens: a recording need not end with one.
        self.voices[2]["prompt_feat"] = torch.randn(1, 81, 80)

    def sound(self, **how: Any) -> "Sound":
        from chatterbox_server.engines.fast.s3gen.sound import How, Sound

        watermarker = how.pop("watermarker", None)
        return Sound(
            self.s3gen, device="cpu", flow_steps=self.steps, how=How(**how) if how else None, watermarker=watermarker
        )

    def take(self, tokens: int, *, voice: int = 0, seed: int = 1) -> "Take":
        import torch

        from chatterbox_server.engines.fast.s3gen.sound import Take

        dice = torch.Generator().manual_seed(1000 * tokens + seed % 1000)
        spoken = torch.randint(0, 6561, (tokens,), generator=dice)
        return Take(tokens=spoken, voice=self.voices[voice], seed=seed)

    def package(self, take: "Take") -> Any:
        return self._package(self.s3gen, take.tokens, take.voice, seed=take.seed, steps=self.steps)

    def in_chunks(self, sound: "Sound", take: "Take", *ends: int) -> list[Any]:
        from chatterbox_server.engines.fast.s3gen.sound import Stream

        stream = Stream()
        said = [
            dataclasses.replace(take, tokens=take.tokens[:end], final=end == len(take.tokens), stream=stream)
            for end in ends
        ]
        return [sound.speak([one])[0] for one in said]


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def studios(models: Models) -> dict[str, Studio]:
    assert models
    return {kind: Studio(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def breathing(studios: dict[str, Studio]) -> Studio:
    """Its pitch is too low to hum: no phase, of which a small error grows."""
    assert studios
    return Studio("chatterbox", hertz=0.0)


def apart(one: Any, other: Any) -> float:
    """Relative to the other."""
    assert one.shape == other.shape
    return float((one - other).norm() / other.norm())


def decibels(one: Any, other: Any) -> float:
    return 20 * float(np.log10(max(apart(one, other), 1e-12)))


# -- as the package --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "voice", "seed"), [(1, 0, 0), (20, 1, 2**32 - 1), (33, 2, 7), (58, 0, 2**63 + 5)])
def test_it_says_what_the_package_says_under_the_same_noise(
    kind: str, tokens: int, voice: int, seed: int, studios: dict[str, Studio]
) -> None:
    studio = studios[kind]
    take = studio.take(tokens, voice=voice, seed=seed)
    assert apart(studio.sound().speak([take])[0], studio.package(take)) < CLOSE


@pytest.mark.parametrize("kind", ["chatterbox", "turbo"])
@pytest.mark.parametrize("lengths", [(3, 60), (60, 3, 41, 7, 20), (16, 17, 18), (5, 4, 3, 2, 1)], ids=str)
def test_who_shares_the_batch_does_not_matter(kind: str, lengths: tuple[int, ...], studios: dict[str, Studio]) -> None:
    studio = studios[kind]
    sound = studio.sound()
    takes = [studio.take(tokens, voice=place % 3, seed=place) for place, tokens in enumerate(lengths)]
    for take, said in zip(takes, sound.speak(takes), strict=True):
        assert apart(said, sound.speak([take])[0]) < CLOSE


def test_a_seed_makes_the_noise_of_an_utterance(studios: dict[str, Studio]) -> None:
    studio = studios["chatterbox"]
    sound, take = studio.sound(), studio.take(9, seed=1)
    other = dataclasses.replace(take, seed=2)
    first, again, changed = (sound.speak([one])[0] for one in (take, take, other))
    assert apart(again, first) < CLOSE
    assert apart(changed, first) > 0.1


@pytest.mark.parametrize(
    ("how", "limit_db"),
    [
        ({"encoder": "bfloat16"}, -25),
        ({"estimator": "bfloat16"}, -20),
        ({"estimator": "float16"}, -40),
        ({"vocoder": "bfloat16"}, -20),
        ({"vocoder": "float16"}, -38),
    ],
    ids=str,
)
def test_fewer_bits_say_nearly_the_same(how: dict[str, str], limit_db: float, studios: dict[str, Studio]) -> None:
    import torch

    studio = studios["chatterbox"]
    take = studio.take(12)
    half = studio.sound(**{part: getattr(torch, dtype) for part, dtype in how.items()})
    assert decibels(half.speak([take])[0], studio.sound().speak([take])[0]) < limit_db


def test_more_than_can_be_padded_to_is_refused(studios: dict[str, Studio]) -> None:
    with pytest.raises(ValueError, match="cannot speak 2025 tokens or rows at once: at most 1536"):
        studios["turbo"].sound().speak([studios["turbo"].take(2000)])


# -- in chunks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [(8, 20, 45, 60), (15, 60), (3, 4, 5, 6, 7, 8, 9, 60), (59, 60)], ids=str)
@pytest.mark.parametrize("kind", ["chatterbox", "turbo"])
def test_chunks_are_as_long_as_one_go(kind: str, ends: tuple[int, ...], studios: dict[str, Studio]) -> None:
    studio = studios[kind]
    sound, take = studio.sound(), studio.take(60)
    said = studio.in_chunks(sound, take, *ends)
    assert sum(map(len, said)) == len(sound.speak([take])[0])


def test_a_chunk_goes_on_as_the_one_before_would_have(studios: dict[str, Studio]) -> None:
    from chatterbox_server.engines.fast.s3gen.sound import Stream

    studio = studios["chatterbox"]
    sound, take, stream = studio.sound(), studio.take(60), Stream()
    for end in (15, 40, 60):
        before = stream.tail
        one = dataclasses.replace(take, tokens=take.tokens[:end], final=end == 60, stream=stream)
        said = sound.speak([one])[0]
        if before is not None:
            assert float(said[0]) == pytest.approx(float(before[0]), abs=1e-6)
            # Half-way through the fade, the mean of both.
            assert abs(float(said[1] - said[0])) < 2 * float((before[1:] - before[:-1]).abs().max())


def test_the_last_chunk_ends_as_one_go_does(breathing: Studio) -> None:
    from chatterbox_server.engines.fast.s3gen.sound import FADE

    sound, take = breathing.sound(), breathing.take(60, voice=2)
    *_, last = breathing.in_chunks(sound, take, 15, 40, 60)
    right = sound.speak([take])[0][-len(last) :]
    assert apart(last[FADE * 480 :], right[FADE * 480 :]) < CLOSE


def test_all_tokens_as_one_chunk_are_one_go(studios: dict[str, Studio]) -> None:
    studio = studios["turbo"]
    sound, take = studio.sound(), studio.take(30)
    assert apart(studio.in_chunks(sound, take, 30)[0], sound.speak([take])[0]) == 0


def test_chunks_of_several_utterances_share_a_batch(studios: dict[str, Studio]) -> None:
    from chatterbox_server.engines.fast.s3gen.sound import Stream

    studio = studios["chatterbox"]
    sound = studio.sound()
    takes = [studio.take(50, voice=0, seed=4), studio.take(44, voice=1, seed=5), studio.take(36, voice=2, seed=6)]
    ends = [(12, 30, 50), (20, 44), (25, 36)]
    alone = [studio.in_chunks(sound, take, *each) for take, each in zip(takes, ends, strict=True)]
    streams = [Stream() for _ in takes]
    together: list[list[Any]] = [[] for _ in takes]
    for turn in range(3):
        now = [place for place, each in enumerate(ends) if turn < len(each)]
        said = sound.speak(
            [
                dataclasses.replace(
                    takes[place],
                    tokens=takes[place].tokens[: ends[place][turn]],
                    final=turn == len(ends[place]) - 1,
                    stream=streams[place],
                )
                for place in now
            ]
        )
        for place, one in zip(now, said, strict=True):
            together[place].append(one)
    for one, other in zip(together, alone, strict=True):
        for chunk, right in zip(one, other, strict=True):
            assert apart(chunk, right) < CLOSE


def test_a_piece_of_a_spectrum_sounds_as_it_does_within_the_whole(studios: dict[str, Studio]) -> None:
    import torch

    from chatterbox_server.engines.fast.s3gen.sound import CONTEXT
    from chatterbox_server.engines.fast.s3gen.vocoder import Heard, Vocoder

    vocoder = Vocoder(studios["chatterbox"].s3gen.mel2wav, dtype=torch.float32)
    mel, seeds = torch.randn(1, 90, 80), torch.tensor([5])
    none = torch.zeros(1, dtype=torch.int64)
    silent = torch.zeros(1, 9, dtype=torch.float64)
    with torch.inference_mode():
        whole, phases = vocoder(Heard(mel, none + 90, none, none, silent, seeds))
        begin = 40
        piece, _ = vocoder(
            Heard(mel[:, begin:], none + 50, none + begin, none + CONTEXT, phases[:, begin + CONTEXT], seeds)
        )
    assert apart(piece[:, CONTEXT * 480 :], whole[:, (begin + CONTEXT) * 480 :]) < CLOSE


# -- recordings ------------------------------------------------------------------------------------------------


def test_as_many_recordings_are_kept_as_may_be() -> None:
    import torch

    from chatterbox_server.engines.fast.s3gen.recorded import Recordings

    recordings, made = Recordings(device="cpu", kept=2), list[int]()

    def blank(size: int) -> Any:
        made.append(size)
        return torch.zeros(size)

    for size in (1, 2, 1, 3, 1, 2):
        recording = recordings.find(size, lambda numbers: numbers + 1, lambda size=size: blank(size))  # type: ignore[misc]
        recording.inputs.fill_(size)
        assert recording.play().tolist() == [size + 1] * size
    assert made == [1, 2, 3, 2]
    assert (len(recordings), recordings.refused) == (2, 0)


# -- the watermark ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def watermarker() -> Any:
    import perth

    return perth.PerthImplicitWatermarker()


def hum(frames: int, hertz: float) -> Any:
    """With the rhythm of syllables, after 20 ms of nothing."""
    time_s = np.arange(480 * frames) / 24_000
    sines = sum((np.sin(2 * np.pi * hertz * part * time_s) / part for part in range(1, 12)), np.zeros(time_s.size))
    sound = 0.15 * sines * (0.55 + 0.45 * np.sin(2 * np.pi * 3.5 * time_s))
    sound += 0.003 * np.random.default_rng(frames).standard_normal(time_s.size)
    sound[:480] = 0
    return sound.astype(np.float32)


def test_a_batch_is_marked_as_the_package_marks_each_of_it(watermarker: Any) -> None:
    import torch

    from chatterbox_server.engines.fast.s3gen.watermark import Sounds, Watermark

    rows = [hum(100, 110), hum(37, 220), hum(6, 300), hum(128, 150)]
    samples = torch.full((4, 480 * 128), 0.3)
    for row, sound in zip(samples, rows, strict=True):
        row[: len(sound)] = torch.from_numpy(sound)
    mark = Watermark(watermarker, sample_rate_hz=24_000, device="cpu")
    with torch.inference_mode():
        marked = mark(Sounds(samples, torch.tensor([len(sound) for sound in rows])))
        for sound, row in zip(rows, marked, strict=True):
            package = torch.from_numpy(watermarker.apply_watermark(sound, sample_rate=24_000))
            assert apart(row[: len(sound)], package) < 1e-5
            assert apart(torch.from_numpy(sound), package) > 0.1


def test_what_is_said_is_marked(studios: dict[str, Studio], watermarker: Any) -> None:
    import torch

    studio = studios["turbo"]
    takes = [studio.take(40), studio.take(33, voice=1)]
    plain, marked = studio.sound().speak(takes), studio.sound(watermarker=watermarker).speak(takes)
    for one, other in zip(plain, marked, strict=True):
        with torch.inference_mode():
            package = torch.from_numpy(watermarker.apply_watermark(one.numpy(), sample_rate=24_000))
        assert apart(other, package) < CLOSE


def test_chunks_are_marked_as_well_as_one_go(studios: dict[str, Studio], watermarker: Any) -> None:
    studio = studios["turbo"]
    sound, take = studio.sound(watermarker=watermarker), studio.take(120)
    import torch

    said = [torch.cat(studio.in_chunks(sound, take, 15, 30, 60, 120)), sound.speak([take])[0]]
    with torch.inference_mode():
        chunked, at_once = (
            float(watermarker.get_watermark(one.numpy(), sample_rate=24_000, round=False)) for one in said
        )
    assert chunked == pytest.approx(at_once, abs=0.1)
