"""What is asked for, what is there, where each piece sounds: values in, values out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatterbox_deploy.config import reading
from chatterbox_deploy.speak import narration, subtitles, tally, wav
from chatterbox_deploy.speak.manuscript import Chapter, Manuscript, Piece
from chatterbox_deploy.speak.narration import Manner, Span, Take
from chatterbox_deploy.speak.tally import Summary, Tally

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

MANNER = Manner(voice="anna", seed=1)
MODEL = {"model": "chatterbox"}


def book(*texts: str) -> Manuscript:
    return Manuscript(None, None, (Chapter("One", tuple(Piece(text, 0.5) for text in texts)),))


def take(text: str, manner: Manner = MANNER, spoken_by: Mapping[str, Any] = MODEL) -> Take:
    return narration.takes(book(text), manner, spoken_by=spoken_by)[0]


def test_the_request_says_what_was_chosen_and_leaves_the_rest_to_the_server() -> None:
    asked = take("Hello.").request

    assert asked == {"input": "Hello.", "response_format": "wav", "seed": asked["seed"], "voice": "anna"}
    assert 0 <= asked["seed"] < 2**32


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "x"}, {"voice": "bob"}, {"language": "de"}, {"speed": 1.1}, {"exaggeration": 0.6},
        {"cfg_weight": 0.4}, {"temperature": 0.7}, {"seed": 2},
    ],
    ids=str,
)  # fmt: skip
def test_whatever_changes_the_sound_changes_the_name(changed: dict[str, Any]) -> None:
    assert take("Hello.", replace(MANNER, **changed)).name != take("Hello.").name


def test_another_model_or_another_recording_of_the_voice_is_another_sound() -> None:
    assert len({take("Hello.", spoken_by=told).name for told in ({}, MODEL, {**MODEL, "recording": ["anna", 1]})}) == 3


@given(before=st.lists(st.sampled_from("abcdef")), after=st.lists(st.sampled_from("abcdef")))
def test_of_a_changed_text_only_what_is_new_is_spoken(before: list[str], after: list[str]) -> None:
    there = {take.name for take in narration.takes(book(*before), MANNER, spoken_by=MODEL)}
    wanted = narration.takes(book(*after), MANNER, spoken_by=MODEL)

    todo = [take.text for take in narration.missing(wanted, there)]

    assert todo == [text for text in dict.fromkeys(after) if text not in before]


def test_each_piece_has_a_seed_of_its_own_that_is_always_the_same() -> None:
    seeds = [take(text).request["seed"] for text in ("a", "b", "a")]

    assert seeds[0] == seeds[2] != seeds[1]


def test_the_timeline_has_no_gap_and_cues_leave_the_silence_out() -> None:
    manuscript = Manuscript(
        None, None, (Chapter(None, (Piece("a", 0.5), Piece("b", 1.0))), Chapter("Two", (Piece("a", 0.0),)))
    )
    wanted = narration.takes(manuscript, MANNER, spoken_by=MODEL)

    whole = narration.timeline(
        manuscript, wanted, {wanted[0].name: 100, wanted[1].name: 200}, sample_rate_hz=100, untitled="Book"
    )

    assert whole.chapters == (Span("Book", 0, 450), Span("Two", 450, 550))
    assert whole.cues == (Span("a", 0, 100), Span("b", 150, 350), Span("a", 450, 550))
    assert whole.duration_s == 5.5


def test_subtitles_are_numbered_and_say_hours_and_milliseconds() -> None:
    said = "It was a bright cold day in April, and the clocks were striking thirteen, as they ever had."
    cues = [Span("Hello.", 0, 36_000), Span(said, 86_400_012, 86_424_000)]

    told = subtitles.srt(cues, 24_000)

    assert told.splitlines() == [
        "1",
        "00:00:00,000 --> 00:00:01,500",
        "Hello.",
        "",
        "2",
        "01:00:00,000 --> 01:00:01,000",
        "It was a bright cold day in April, and the clocks were",
        "striking thirteen, as they ever had.",
    ]


@pytest.mark.parametrize(
    ("toml", "requests"),
    [
        ("[gpus]\n0 = 6093", 2),
        ("[gpus]\n0 = 6093\n1 = [6094, 6096]", 6),
        ('[gpus]\n"0,1" = 6093', 3),
        ("[gpus]\n0 = 6093\n1 = 6094\n[server]\nqueue_size = 0", 2),
        ("[gpus]\n0 = 6093\n1 = 6094\n[server]\npipeline = 'on'", 6),
        ("[gpus]\n0 = 6093\n1 = 6094\n[server]\nengine = 'fast'", 4),
    ],
)
def test_as_many_requests_are_in_flight_as_keep_the_fleet_busy_and_its_queues_hold(toml: str, requests: int) -> None:
    assert narration.in_flight(reading.load(toml, source="fleet.toml")) == requests


def tallied(*pieces: tuple[int, float, str]) -> Tally:
    counts = Tally(pieces=10, characters=1000, kept=3)
    for piece in pieces:
        counts.spoken(*piece)
    return counts


def test_progress_is_a_dash_until_something_is_known() -> None:
    assert tallied().line(2.0) == "3 of 13 pieces, - left, - s of sound a second"


def test_progress_reckons_by_characters() -> None:
    counts = tallied((100, 8.0, "gpu0"), (150, 12.0, "gpu1"))
    counts.retries = 1

    assert counts.line(5.0) == "5 of 13 pieces, 0:15 left, 4.0 s of sound a second, 1 retry"


def test_the_last_line_says_how_long_how_fast_and_who_spoke() -> None:
    summary = Summary("b.m4b", 2, 13, 3725.4, tallied((900, 90.0, "gpu0"), (100, 10.0, "gpu1")), 20.0, 25.0)

    assert summary.line() == (
        "b.m4b: 1:02:05 of sound in 2 chapters and 13 pieces; 1:40 spoken in 20.0 s, 5.0 times as fast as it sounds; "
        "gpu0 90%, gpu1 10%; 3 pieces kept from before; 25.0 s in all"
    )
    assert summary.as_json() == {
        "file": "b.m4b", "chapters": 2, "pieces": 13, "duration_s": 3725.4, "spoken": 2, "kept": 3, "retries": 0,
        "spoken_audio_s": 100.0, "speaking_s": 20.0, "wall_s": 25.0, "real_time": 5.0,
        "instances": [
            {"instance": "gpu0", "pieces": 1, "audio_s": 90.0}, {"instance": "gpu1", "pieces": 1, "audio_s": 10.0},
        ],
    }  # fmt: skip


def test_who_had_nothing_to_speak_tells_no_speed() -> None:
    told = Summary("a.wav", 1, 1, 7.0, Tally(pieces=0, characters=0, kept=1), 0.0, 1.0)

    assert told.line() == "a.wav: 0:07 of sound in 1 chapter and 1 piece; 1 piece kept from before; 1.0 s in all"
    assert told.as_json()["real_time"] is None
    assert tally.clock(59.7) == "1:00"


SOUND = wav.Sound(24_000, bytes(range(200)))


def test_a_wav_comes_back_as_it_went_also_with_the_header_of_a_stream() -> None:
    whole = wav.encode(SOUND)

    assert wav.decode(whole) == SOUND
    for placeholder in (b"\xff\xff\xff\xff", b"\x00\xf0\xff\x7f"):
        assert wav.decode(whole[:4] + placeholder + whole[8:40] + placeholder + whole[44:]) == SOUND


def stereo() -> bytes:
    whole = bytearray(wav.encode(SOUND))
    whole[22:24], whole[32:34] = b"\2\0", b"\4\0"
    return bytes(whole)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no WAV: it ends early"),
        (b"ID3\3" + bytes(100), "no WAV: file does not start with RIFF id"),
        (wav.encode(SOUND)[:-2], "a WAV cut short: 99 of 100 samples"),
        (wav.encode(wav.Sound(24_000, b"")), "a WAV without a sample"),
        (stereo(), "a WAV of 2 channels and 16 bits, not of 1 and 16"),
    ],
)
def test_what_is_no_whole_wav_of_one_channel_is_told(content: bytes, said: str) -> None:
    with pytest.raises(wav.NotWav) as refused:
        wav.decode(content)

    assert str(refused.value) == said
