"""A text into chapters, and chapters into pieces that are one request each. Reads no file, and changes no word.

Plain text and Markdown; what only marks (``#``, underlines, ``* * *``) is not said.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from chatterbox_deploy.errors import ManuscriptError
from chatterbox_deploy.speak import markup, sentences
from chatterbox_deploy.speak.markup import Heading, Paragraph

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LONGEST_PIECE: Final = 280
"""Characters of one request: the longest that the stock engine says in one breath, about 20 s of sound."""

# What people hand in for a book, by how it begins, and the command that makes text of it.
_NO_TEXT: Final = (
    (b"%PDF-", "a PDF", "pdftotext -layout {source} book.txt"),
    (b"PK\x03\x04", "a zip archive, as EPUB and DOCX are", "pandoc --to plain {source} --output book.txt"),
    (b"{\\rtf", "RTF", "pandoc --to plain {source} --output book.txt"),
    (b"\xff\xfe", "UTF-16", "iconv -f UTF-16 -t UTF-8 {source} -o book.txt"),
    (b"\xfe\xff", "UTF-16", "iconv -f UTF-16 -t UTF-8 {source} -o book.txt"),
)

_SENTENCE_END: Final = re.compile(r"[.!?…؟۔।॥。！？][\"'”’»)\]」』）】]*$")


@dataclass(frozen=True, slots=True)
class Pauses:
    """Seconds of silence, by what they follow."""

    clause_s: float = 0.1
    """After a comma, a colon, a dash, where a long sentence was cut."""
    sentence_s: float = 0.3
    paragraph_s: float = 0.7
    heading_s: float = 1.2
    """After a heading, before one within a chapter, and where ``* * *`` parts scenes."""
    chapter_s: float = 2.5
    """Before the next chapter."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one request says."""

    text: str
    pause_s: float
    """Silence that follows it; 0.0 after the last."""


@dataclass(frozen=True, slots=True)
class Chapter:
    title: str | None
    """``None`` for what comes before the first heading of a text that has no title."""
    pieces: tuple[Piece, ...]
    """Never empty; a title is said, too."""


@dataclass(frozen=True, slots=True)
class Manuscript:
    title: str | None
    """As the text itself gives it."""
    author: str | None
    chapters: tuple[Chapter, ...]

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Of all chapters, in their order."""
        return tuple(piece for chapter in self.chapters for piece in chapter.pieces)


def decode(content: bytes, source: str) -> str:
    """The text of a file's bytes; a byte order mark is no part of it.

    Raises:
        ManuscriptError: it is no text, or in another encoding than UTF-8.
    """
    for magic, what, command in _NO_TEXT:
        if content.startswith(magic):
            msg = f"{source} is {what}, not plain text in UTF-8: `{command.format(source=source)}`"
            raise ManuscriptError(msg)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        msg = (
            f"{source} is not UTF-8: byte {error.start + 1}, in line {line}, is 0x{content[error.start]:02x}; "
            f"if it is text from an older Windows: `iconv -f WINDOWS-1252 -t UTF-8 {source} -o book.txt`"
        )
        raise ManuscriptError(msg) from None
    if "\0" in text:
        msg = f"{source} is no text: character {text.index(chr(0)) + 1} is a zero byte"
        raise ManuscriptError(msg)
    return text


def read(
    text: str,
    *,
    source: str,
    markdown: bool,
    language: str = "en",
    longest: int = LONGEST_PIECE,
    pauses: Pauses = Pauses(),
) -> Manuscript:
    """Chapters and pieces of a text.

    Its chapters are its highest headings; if the text opens with one that alone is the highest, it is the title,
    and those of the next level are the chapters. ``markdown`` says that emphasis, links and the like are marks, too.

    Raises:
        ManuscriptError: there is nothing to say in it.
    """
    document = markup.parse(text, markdown=markdown)
    headings = [block for block in document.blocks if isinstance(block, Heading)]
    book, level = _levels(headings, opening=document.blocks[0] if document.blocks else None)
    groups = _chapters(document.blocks, book, level)
    title = document.title or (book.text if book else None)
    chapters = [
        Chapter(group_title or title, pieces)
        for group_title, blocks in groups
        if (pieces := tuple(_pieces(blocks, language, longest, pauses)))
    ]
    if not chapters:
        msg = f"there is nothing to say in {source}"
        raise ManuscriptError(msg)
    last = chapters[-1]
    chapters[-1] = replace(last, pieces=(*last.pieces[:-1], replace(last.pieces[-1], pause_s=0.0)))
    return Manuscript(title, document.author, tuple(chapters))


def _levels(headings: Sequence[Heading], opening: markup.Block | None) -> tuple[Heading | None, int]:
    """The heading that is the title of the whole, if one is, and the level of chapters."""
    if not headings:
        return None, 0
    top = min(heading.level for heading in headings)
    if headings[0] is opening and opening.level == top and sum(heading.level == top for heading in headings) == 1:
        return headings[0], min((heading.level for heading in headings[1:]), default=top)
    return None, top


def _chapters(
    blocks: Sequence[markup.Block], book: Heading | None, level: int
) -> Iterator[tuple[str | None, list[markup.Block]]]:
    """Title and blocks of each chapter; what comes before the first has no title."""
    title: str | None = None
    group: list[markup.Block] = []
    for block in blocks:
        if isinstance(block, Heading) and block.level <= level and block is not book:
            yield title, group
            title, group = block.text, []
        group.append(block)
    yield title, group


def _pieces(blocks: Sequence[markup.Block], language: str, longest: int, pauses: Pauses) -> Iterator[Piece]:
    for block, after in itertools.zip_longest(blocks, blocks[1:]):
        if not isinstance(block, Heading | Paragraph):
            continue
        texts = sentences.pieces(block.text, language=language, longest=longest)
        yield from (Piece(text, _within_s(text, pauses)) for text in texts[:-1])
        if after is None:
            pause_s = pauses.chapter_s
        elif isinstance(block, Heading) or not isinstance(after, Paragraph):
            pause_s = pauses.heading_s
        else:
            pause_s = pauses.sentence_s if block.is_item and after.is_item else pauses.paragraph_s
        yield Piece(texts[-1], pause_s)


def _within_s(text: str, pauses: Pauses) -> float:
    """After a piece within a paragraph; where nothing was written, nothing is paused."""
    if _SENTENCE_END.search(text):
        return pauses.sentence_s
    return 0.0 if text[-1].isalnum() else pauses.clause_s
