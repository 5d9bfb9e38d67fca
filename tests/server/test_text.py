"""A text becomes pieces that can be said one by one, and nothing that can be said is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatterbox_server.text import split

READS = [
    (
        "en",
        60,
        None,
        "Dr. Smith paid $1,234.56 to Mr. J. R. Jones at 5 p.m. on Tuesday. “Really? All of it?” she asked. "
        "He nodded… and left.",
        [
            ("Dr. Smith paid $1,234.56 to", 0.0),
            ("Mr. J. R. Jones at 5 p.m. on Tuesday.", 0.3),
            ("“Really? All of it?” she asked.", 0.3),
            ("He nodded… and left.", 0.0),
        ],
    ),
    (
        "en",
        90,
        None,
        "Chapter 1\n\nIt was late; the rain\nhad stopped.\n\n***\n\nNobody came.",
        [("Chapter 1", 0.7), ("It was late; the rain had stopped.", 0.7), ("Nobody came.", 0.0)],
    ),
    (
        "en",
        60,
        None,
        "You need:\n- two eggs\n- a cup of milk\n1. Mix them.\n2. Wait.",
        [("You need:", 0.3), ("- two eggs", 0.3), ("- a cup of milk", 0.3), ("1. Mix them.", 0.3), ("2. Wait.", 0.0)],
    ),
    (
        "en",
        60,
        None,
        "She opened the door, looked at the long dark corridor behind it, and then "
        "she decided to go home, because it was late.",
        [
            ("She opened the door, looked at the long dark corridor", 0.0),
            ("behind it, and then she decided to go home,", 0.1),
            ("because it was late.", 0.0),
        ],
    ),
    (
        "en",
        60,
        None,
        "It was a bright cold day in April and the clocks were striking thirteen when he came home",
        [("It was a bright cold day in April", 0.0), ("and the clocks were striking thirteen when he came home", 0.0)],
    ),
    (
        "de",
        60,
        None,
        "Am 3. Mai kam z. B. Dr. Müller mit ca. 3,5 kg Äpfeln. Das war's! Er blieb bis\n12. Juni.",
        [("Am 3. Mai kam z. B. Dr. Müller mit ca. 3,5 kg Äpfeln.", 0.3), ("Das war's! Er blieb bis 12. Juni.", 0.0)],
    ),
    (
        "fr",
        60,
        None,
        "M. Dupont est là. « Oui ! » dit-il. Il fait beau aujourd’hui, n’est-ce pas ?",
        [("M. Dupont est là. « Oui ! » dit-il.", 0.3), ("Il fait beau aujourd’hui, n’est-ce pas ?", 0.0)],
    ),
    (
        "es",
        60,
        None,
        "¿Cómo estás? ¡Muy bien! El Sr. García llegó a las 5.30 a. m. y se fue.",
        [("¿Cómo estás? ¡Muy bien!", 0.3), ("El Sr. García llegó a las 5.30 a. m. y se fue.", 0.0)],
    ),
    (
        "ru",
        60,
        None,
        "В 2020 г. он приехал в Москву. И. И. Иванов ждал его, т. е. стоял у двери.",
        [("В 2020 г. он приехал в Москву.", 0.3), ("И. И. Иванов ждал его, т. е. стоял у двери.", 0.0)],
    ),
    (
        "ja",
        60,
        None,
        "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。「何でも」と言った。",
        [
            ("吾輩は猫である。", 0.3),
            ("名前はまだ無い。", 0.3),
            ("どこで生れたかとんと見当がつかぬ。", 0.3),
            ("「何でも」と言った。", 0.0),
        ],
    ),
    (
        "zh",
        60,
        None,
        "他说：“你好。我来了。”然后走了。\n第二天下雨了，我们都没有出门，一直在家里看书。",
        [("他说：“你好。我来了。”", 0.3), ("然后走了。", 0.3), ("第二天下雨了，我们都没有出门，一直在家里看书。", 0.0)],
    ),
    (
        "hi",
        60,
        None,
        "यह एक वाक्य है। यह दूसरा वाक्य है। क्या आप ठीक हैं? हाँ, मैं ठीक हूँ।",
        [("यह एक वाक्य है। यह दूसरा वाक्य है।", 0.3), ("क्या आप ठीक हैं? हाँ, मैं ठीक हूँ।", 0.0)],
    ),
    (
        "ar",
        60,
        None,
        "مرحبا بك في بيتنا. كيف حالك اليوم؟ أنا بخير، شكرا لك. نلتقي غدا.",
        [("مرحبا بك في بيتنا. كيف حالك اليوم؟", 0.3), ("أنا بخير، شكرا لك. نلتقي غدا.", 0.0)],
    ),
    (
        "th",
        30,
        None,
        "สวัสดีครับ ผมชื่อจอห์น วันนี้อากาศดีมาก เราไปเที่ยวทะเลกันเถอะ",
        [("สวัสดีครับ ผมชื่อจอห์น", 0.0), ("วันนี้อากาศดีมาก", 0.0), ("เราไปเที่ยวทะเลกันเถอะ", 0.0)],
    ),
    (
        "ko",
        90,
        None,
        "안녕하세요. 저는 학생입니다. 오늘은 날씨가 아주 좋습니다.",
        [("안녕하세요. 저는 학생입니다.", 0.3), ("오늘은 날씨가 아주 좋습니다.", 0.0)],
    ),
    (
        "en",
        300,
        40,
        "When the sun had gone down behind the hills, they lit a fire, "
        "sat around it, and told each other stories. Nobody slept.",
        [
            ("When the sun had gone down behind the hills,", 0.1),
            ("they lit a fire, sat around it, and told each other stories. Nobody slept.", 0.0),
        ],
    ),
    (
        "en",
        300,
        40,
        "Good morning. When the sun had gone down behind the hills they lit a fire "
        "and told each other stories all night.",
        [
            ("Good morning.", 0.3),
            ("When the sun had gone down behind the hills they lit a fire and told each other stories all night.", 0.0),
        ],
    ),
    (
        "en",
        300,
        40,
        "Thank you for your help today. 🙂🙂 See you tomorrow.",
        [("Thank you for your help today. 🙂🙂 See you tomorrow.", 0.0)],
    ),
]


@pytest.mark.parametrize(("language", "longest", "first", "text", "pieces"), READS)
def test_a_text_is_read_like_this(
    language: str, longest: int, first: int | None, text: str, pieces: list[tuple[str, float]]
) -> None:
    said = split(text, language=language, longest=longest, first=first)
    assert [(piece.text, piece.pause_s) for piece in said] == pieces


@pytest.mark.parametrize("text", ["", " ", "\n\n", "***", "…", "\ud800", "“!?”\n\n🙂", "\u0301"])
def test_what_says_nothing_has_no_pieces(text: str) -> None:
    assert split(text, language="en", longest=100, first=20) == []


@pytest.mark.parametrize("language", ["de", "DE", "de-AT"])
def test_a_region_is_no_other_language(language: str) -> None:
    text = "Wir sehen uns am 3. Mai in Bonn bei Dr. Müller. Bis dann."
    assert [piece.text for piece in split(text, language=language, longest=70)] == [text[:47], text[48:]]


def test_a_character_of_several_codes_stays_whole() -> None:
    for character in ("e\u0301", "क्षि", "👩\u200d👩\u200d👧", "🇩🇪", "👍🏽"):
        for piece in split(f"a{character}" * 40, language="xx", longest=20):
            assert piece.text.replace(character, "").strip("a") == "", character


LONG = [
    "a",
    "a. ",
    "A.",
    "漢。",
    "“",
    "“a. ",
    "(a. ",
    "a\n\n",
    "- a\n",
    "! ",
    "e\u0301",
    "a, ",
    "1. ",
    "สวัสดี",
    "🇩🇪",
    "\n",
]


@pytest.mark.parametrize("text", LONG)
def test_a_hundred_thousand_characters_of_anything_are_split(text: str) -> None:
    whole = (text * 100_000)[:100_000]
    assert sayable("".join(piece.text for piece in split(whole, language="en", longest=300, first=80))) == sayable(
        whole
    )


def sayable(text: str) -> str:
    return "".join(filter(str.isalnum, text))


scraps = st.sampled_from(
    [
        *"aZé7.,;:!?…—-\"'“”«»()「」。、漢かカー한ह्कمส🙂🇩\u0301\u200d\u00ad\ufeff\u2028\x85\r\n \u00a0\u3000",
        "\n\n",
        "\n- ",
        "\n1. ",
        "Dr. ",
        "e.g. ",
        "and ",
        "***",
        "word ",
        "A sentence of some length. ",
        "\ud800",
    ]
)
texts = st.lists(scraps, max_size=200).map("".join) | st.text(max_size=400)
limits = st.integers(1, 120)
firsts = st.none() | st.integers(1, 60)
languages = st.sampled_from(["en", "de", "ja", "ar", "hi", "xx", "", "zh-CN"])


@given(text=texts, language=languages, longest=limits, first=firsts)
def test_no_piece_is_too_long_and_each_says_something(
    text: str, language: str, longest: int, first: int | None
) -> None:
    for piece in split(text, language=language, longest=longest, first=first):
        assert 1 <= len(piece.text) <= longest
        assert sayable(piece.text)
        assert piece.text == piece.text.strip(" ")


@given(text=texts, language=languages, longest=limits, first=firsts)
def test_no_letter_and_no_digit_is_lost_or_moved(text: str, language: str, longest: int, first: int | None) -> None:
    pieces = split(text, language=language, longest=longest, first=first)
    assert sayable("".join(piece.text for piece in pieces)) == sayable(text)


@given(text=texts, language=languages, longest=limits, first=firsts)
def test_a_pause_stands_between_pieces_and_never_after_the_last(
    text: str, language: str, longest: int, first: int | None
) -> None:
    pieces = split(text, language=language, longest=longest, first=first)
    assert pieces == split(text, language=language, longest=longest, first=first)
    assert all(0.0 <= piece.pause_s <= 1.0 for piece in pieces)
    assert not pieces or pieces[-1].pause_s == 0.0
