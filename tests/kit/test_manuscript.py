"""A text becomes chapters and pieces: nothing lost, nothing twice, in order."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from chatterbox_deploy.errors import ManuscriptError
from chatterbox_deploy.speak import manuscript, sentences
from chatterbox_deploy.speak.manuscript import Manuscript, Pauses


def read(text: str, *, markdown: bool = False, language: str = "en", longest: int = 280) -> Manuscript:
    return manuscript.read(text, source="book.txt", markdown=markdown, language=language, longest=longest)


def outline(text: str, *, markdown: bool = False) -> list[tuple[str | None, list[str]]]:
    """Title and spoken paragraphs of each chapter."""
    return [
        (chapter.title, [piece.text for piece in chapter.pieces]) for chapter in read(text, markdown=markdown).chapters
    ]


def letters(text: str) -> str:
    return "".join(filter(str.isalnum, text))


LINES = st.one_of(
    st.sampled_from(
        [
            "",
            "",
            "Chapter 1",
            "CHAPTER II.",
            "Part Two: Home",
            "The title",
            "=====",
            "---",
            "* * *",
            "\f",
            "# One",
            "## Two",
        ]
    ),
    st.sampled_from(
        ["- item", "* item", "1. First", "2) Second", "> quoted", "    indented", "exam-", "```", "第一章", "| a | b |"]
    ),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60),
    st.lists(
        st.sampled_from(["Mr.", "word", "Go!", "“Who?”", "3.5", "_so_", "*it*", "J.", "他说。", "—", "e.g."]),
        max_size=40,
    ).map(" ".join),
)
TEXTS = st.lists(st.tuples(LINES, st.sampled_from(["\n", "\r\n", "\n\n", "\r", "\f"])), max_size=20).map(
    lambda rows: "".join(line + end for line, end in rows)
)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS, longest=st.integers(20, 400))
@example(text="Chapter 1\nIt was\n\nA\n==\nb\n---\n", longest=20)
@example(text="x" * 3000 + " y" * 900, longest=280)
@example(text="Chapter 1\nChapter 2\n\nChapter 1\n\nSo.", longest=280)
def test_every_letter_is_said_once_and_in_order(text: str, longest: int) -> None:
    if not letters(text):
        with pytest.raises(ManuscriptError, match="nothing to say"):
            read(text)
        return

    pieces = read(text, longest=longest).pieces

    assert "".join(letters(piece.text) for piece in pieces) == letters(text)
    assert all(letters(piece.text) for piece in pieces)
    assert pieces[-1].pause_s == 0.0


@settings(max_examples=200, deadline=None)
@given(text=TEXTS.filter(letters))
def test_of_a_markdown_text_too_but_for_addresses_comments_and_front_matter(text: str) -> None:
    assume(not re.search(r"\]\(|\]\[|<!--|\A\W*---", text))

    assert "".join(letters(piece.text) for piece in read(text, markdown=True).pieces) == letters(text)


WORDS = st.sampled_from(
    [
        "a",
        "word",
        "Mr.",
        "J.",
        "U.S.",
        "said,",
        "“Go!”",
        "it;",
        "(so)",
        "—then",
        "3.50",
        "what?!",
        "end.",
        "é…",
        "好。",
        "I.",
    ]
)


@settings(max_examples=300, deadline=None)
@given(words=st.lists(WORDS, min_size=1, max_size=120), longest=st.integers(20, 300))
def test_of_a_paragraph_every_sign_is_kept_and_only_spaces_go(words: list[str], longest: int) -> None:
    paragraph = " ".join(words)

    pieces = sentences.pieces(paragraph, language="en", longest=longest)

    assert "".join(pieces).replace(" ", "") == paragraph.replace(" ", "")
    assert all(len(piece) <= longest for piece in pieces)
    assert all(map(sentences.says, pieces))


def test_pieces_are_whole_sentences_of_like_size() -> None:
    paragraph = " ".join(f"Mr. Smith said sentence number {number} to Dr. Jones." for number in range(20))

    pieces = sentences.pieces(paragraph, language="en", longest=280)

    assert all(re.fullmatch(r"Mr\. .* Jones\.", piece) for piece in pieces)
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 60
    assert len(pieces) == 4


def test_a_sentence_that_is_too_long_is_cut_where_it_breathes() -> None:
    sentence = "They went on and on for what seemed like hours to them, " * 3 + "and then, they stopped."

    pieces = manuscript.read(sentence, source="x", markdown=False, longest=120).pieces

    assert [(piece.text[-5:], piece.pause_s) for piece in pieces] == [("them,", 0.1), ("pped.", 0.0)]


def test_chapters_of_a_plain_text() -> None:
    text = """\ufeff
CONTENTS

CHAPTER I. Down the Rabbit-Hole
CHAPTER II. The Pool of Tears

CHAPTER I.
Down the Rabbit-Hole

Alice was beginning to get very tired of sitting by her
sister on the bank.

“Oh dear!” she said. Part one of the plan.

  * * *

Part one of the plan was simple.

Chapter 2
The Pool of Tears

Curiouser and
\fcuriouser!

Epilogue

The end.
"""
    assert outline(text.removeprefix("\ufeff")) == [
        (None, ["CONTENTS", "CHAPTER I. Down the Rabbit-Hole CHAPTER II. The Pool of Tears"]),
        (
            "CHAPTER I. Down the Rabbit-Hole",
            [
                "CHAPTER I. Down the Rabbit-Hole",
                "Alice was beginning to get very tired of sitting by her sister on the bank.",
                "“Oh dear!” she said. Part one of the plan.",
                "Part one of the plan was simple.",
            ],
        ),
        ("Chapter 2. The Pool of Tears", ["Chapter 2. The Pool of Tears", "Curiouser and curiouser!"]),
        ("Epilogue", ["Epilogue", "The end."]),
    ]


def test_chapters_of_a_markdown_text() -> None:
    text = """---
title: "The Book"
author: Ada L.
---
# The Book

By *me*, see [the **site**](https://x.example/a_b).

First
-----

> Quoted
> text with `code_here` and snake_case.

- one
- two

| a | *b* |
| - | --- |
| 1 | 2   |

### Within

More.

## Second ##

![picture](a.png)

End \\*.
"""
    read_text = read(text, markdown=True)

    assert (read_text.title, read_text.author) == ("The Book", "Ada L.")
    assert outline(text, markdown=True) == [
        ("The Book", ["The Book", "By me, see the site."]),
        (
            "First",
            ["First", "Quoted text with code_here and snake_case.", "one", "two", "a, b", "1, 2", "Within", "More."],
        ),
        ("Second", ["Second", "picture", "End *."]),
    ]


@pytest.mark.parametrize(
    ("line", "is_chapter"),
    [
        ("Chapter 1", True),
        ("chapter twenty-one", True),
        ("CHAPTER XIV. In Which", True),
        ("Part Two: The Road", True),
        ("Kapitel 3", True),
        ("12. Kapitel", True),
        ("Erstes Kapitel", True),
        ("Chapitre premier", True),
        ("Глава 5", True),
        ("第三章 山", True),
        ("PROLOGUE", True),
        ("Part one of the plan was simple.", False),
        ("Book I read yesterday.", False),
        ("Chapter 11 bankruptcy was filed.", False),
        ("Introduction to algebra", False),
    ],
)
def test_what_is_a_heading_by_its_words(line: str, *, is_chapter: bool) -> None:
    chapters = read(f"Before.\n\n{line}\n\nAfter.").chapters

    assert [chapter.title for chapter in chapters] == ([None, line] if is_chapter else [None])


def test_pauses_tell_what_stands_between() -> None:
    text = "Chapter 1\n\nOne was. Two said so, and three.\n\n***\n\nFour:\n\n- a\n- b\n\nChapter 2\n\nFive."

    pieces = manuscript.read(
        text, source="x", markdown=False, longest=12, pauses=Pauses(0.1, 0.3, 0.7, 1.2, 2.5)
    ).pieces

    assert [(piece.text, piece.pause_s) for piece in pieces] == [
        ("Chapter 1", 1.2),
        ("One was.", 0.3),
        ("Two said so,", 0.1),
        ("and three.", 1.2),
        ("Four:", 0.7),
        ("- a", 0.3),
        ("- b", 2.5),
        ("Chapter 2", 1.2),
        ("Five.", 0.0),
    ]


def test_who_speaks_next_begins_a_paragraph_and_a_line_below_speech_is_no_underline() -> None:
    text = "— Oui.\n— Et toi ? dit-il\n— sans rire.\n\n“No,” she said,\n“no.”\n---\nSo."

    assert outline(text) == [(None, ["— Oui.", "— Et toi ? dit-il — sans rire.", "“No,” she said, “no.”", "So."])]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_in_any_way_and_are_joined(end: str) -> None:
    text = end.join(["It was a well-", "known man,", "whom nobody knew.", "", "“No.”"])

    assert outline(text) == [(None, ["It was a well-known man, whom nobody knew.", "“No.”"])]


def test_a_line_that_nobody_wrapped_is_a_paragraph_and_so_is_an_indented_first_line() -> None:
    long = (
        "This line is so long that no one can have wrapped it by hand, and so it has to be a paragraph of its own, " * 2
    )
    long = long.strip(" ,") + "."
    wrapped = "Such a text was wrapped by hand,\nthough not everywhere.\n\n"

    assert outline(f"{long}\n“No.”\n“Yes.”\n{long}") == [(None, [long, "“No.”", "“Yes.”", long])]
    assert outline(wrapped * 9 + f"{long}\n{long}")[0][1][-3:] == [wrapped.replace("\n", " ").strip(), long, long]
    assert outline(f"{long}\nSo.", markdown=True) == [(None, [f"{long} So."])]
    assert outline("    It was so.\nAnd went on.\n    Then it ended.") == [
        (None, ["It was so. And went on.", "Then it ended."])
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"caf\xe9", "book is not UTF-8: byte 4, in line 1, is 0xe9; if it is text from an older Windows: "
                     "`iconv -f WINDOWS-1252 -t UTF-8 book -o book.txt`"),
        (b"%PDF-1.7\n\xe2", "book is a PDF, not plain text in UTF-8: `pdftotext -layout book book.txt`"),
        (b"PK\x03\x04\x14", "book is a zip archive, as EPUB and DOCX are, not plain text in UTF-8: "
                            "`pandoc --to plain book --output book.txt`"),
        ("hello".encode("utf-16"), "book is UTF-16, not plain text in UTF-8: "
                                   "`iconv -f UTF-16 -t UTF-8 book -o book.txt`"),
        (b"ab\0c", "book is no text: character 3 is a zero byte"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_told_with_what_to_type(content: bytes, said: str) -> None:
    with pytest.raises(ManuscriptError) as refused:
        manuscript.decode(content, "book")

    assert str(refused.value) == said


def test_a_byte_order_mark_is_no_text() -> None:
    assert manuscript.decode("\ufeffHello.".encode(), "book") == "Hello."
