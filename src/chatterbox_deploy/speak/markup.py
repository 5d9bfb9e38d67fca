"""Plain text or Markdown into headings, paragraphs and scene breaks. Good enough for books, and no CommonMark."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from chatterbox_deploy.speak.sentences import says

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Heading:
    text: str
    level: int
    """1 is the highest. ``Chapter 1`` and its like are 2."""


@dataclass(frozen=True, slots=True)
class Paragraph:
    text: str
    """In one line."""
    is_item: bool = False
    """Of a list."""


@dataclass(frozen=True, slots=True)
class SceneBreak:
    """A line of signs alone."""


Block = Heading | Paragraph | SceneBreak


@dataclass(frozen=True, slots=True)
class Document:
    blocks: tuple[Block, ...]
    title: str | None = None
    author: str | None = None
    """Both from a Markdown file's front matter."""


LONGEST_TITLE: Final = 80
"""Characters; a longer line is a sentence."""

_HARD_WRAP: Final = 140
"""A plain text's line with more characters was not wrapped: it is a paragraph of its own."""

_UNWRAPPED: Final = 0.1
"""Where so many of a plain text's lines are that long, every line is a paragraph."""

# Not the soft hyphen, which is not meant to be seen; control characters are no letters.
_INVISIBLE: Final = re.compile(r"[\u00ad\ufeff]")
_LINES: Final = re.compile(r"\r\n|[\n\r\v\x1c-\x1e\x85\u2028\u2029]")
_PAGE: Final = "\f"

_ATX: Final = re.compile(r"(#{1,6})[ \t]+(.*?)[ \t]*#*$")
_UNDERLINE: Final = re.compile(r"(={2,}|-{2,})$")
_FENCE: Final = re.compile(r"(```|~~~)")
_BULLET: Final = re.compile(r"([-*+•‣◦▪])\s+(?=\S)")
_NUMBERED: Final = re.compile(r"\d{1,3}[.)]\s+(?=\S)")
_SENTENCE_END: Final = re.compile(r"[.!?…:。！？][\"'”’»)\]」』]*$")
_NO_TITLE: Final = re.compile(r"[.,;\"”»-]$")
_NO_SPACES: Final = re.compile(r"[\u3001-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]")
"""Scripts whose lines are joined without a space."""

_DIVISIONS: Final = (
    "chapter|part|book|volume|section|canto|act|letter|chapitre|partie|livre|tome|kapitel|teil|buch|band|cap[ií]tulo|parte"
    "|libro|livro|capitolo|hoofdstuk|deel|del|rozdział|część|глава|часть|книга|розділ"
)
_NUMERALS: Final = (
    "one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen"
    "|eighteen|nineteen|(?:twenty|thirty|forty|fifty)(?:[- ](?:one|two|three|four|five|six|seven|eight|nine))?"
    "|the (?:first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|last)"
    "|un|une|deux|trois|quatre|cinq|premi[eè]re?|eins|zwei|drei|vier|fünf|uno|dos|tres|primer[oa]?|um|dois|três"
)
# "Chapter 1", "CHAPTER IV. Down", "Part Two: The Road", "12. Kapitel", "Erstes Kapitel", "第三章"; after the number
# nothing, or what begins like a title: "part one of the plan" is a sentence.
_CHAPTER: Final = re.compile(
    rf"(?:(?:(?i:{_DIVISIONS})[ \t]+(?:\d{{1,3}}|[IVXLCDM]{{1,8}}|[ivxlcdm]{{1,8}}|(?i:{_NUMERALS}))"
    r"|\d{1,3}\.[ \t]+(?:Kapitel|Teil)|[A-ZÄÖÜ][a-zäöü]+(?:es|er)[ \t]+(?:Kapitel|Teil|Buch)"
    r"|第[\d〇一二三四五六七八九十百]+[章部回話话])"
    r"(?:[ \t]*[.:—–-]+)?(?P<title>[ \t]+[^a-zß-öø-ÿ\s].*|[ \t]*)"
    r"|(?i:prologue|epilogue|foreword|preface|introduction|afterword|interlude|prolog|epilog|vorwort|nachwort"
    r"|pr[oó]logo|ep[ií]logo|épilogue|avant-propos)[.:]?)$"
)

_FRONT_MATTER: Final = re.compile(
    r"\A---[ \t]*\n((?:[ \t]*[\w-]+:.*\n|[ \t]+.*\n|#.*\n)+)(?:---|\.\.\.)[ \t]*(?:\n|\Z)"
)
_FIELD: Final = re.compile(r"^(title|author):[ \t]*(['\"]?)(.+?)\2[ \t]*$", re.MULTILINE)

# Marks around words; what is between stays. Bounded, or a line of nothing but marks would take minutes.
_PLAIN_MARKS: Final = (
    (re.compile(r"(?<![\w_])_(?=\S)([^_]{1,500})(?<=\S)_(?![\w_])"), r"\1"),
    (re.compile(r"(?<![\w*])\*(?=\S)([^*]{1,500})(?<=\S)\*(?![\w*])"), r"\1"),
)
_MARKDOWN_MARKS: Final = (
    (re.compile(r"<!--.{0,1000}?-->"), ""),
    (re.compile(r"!?\[([^\]]{0,500})\]\([^)\s]{0,1000}(?:[ \t]+\"[^\"]{0,500}\")?\)"), r"\1"),
    (re.compile(r"\[([^\]]{1,500})\]\[[^\]]{0,500}\]"), r"\1"),
    (re.compile(r"(?<![\\*])(\*{1,3})(?=[^\s*])(.{1,500}?)(?<=\S)\1"), r"\2"),
    (re.compile(r"(?<![\w\\])(_{1,3})(?=[^\s_])(.{1,500}?)(?<=\S)\1(?!\w)"), r"\2"),
    (re.compile(r"~~(?=[^\s~])(.{1,500}?)(?<=\S)~~"), r"\1"),
    (re.compile(r"(?<!`)(`{1,3})(?=[^`])(.{1,500}?)\1"), r"\2"),
    (re.compile(r"\\([\\`*_{}\[\]()#+.!~>|-])"), r"\1"),
)


def parse(text: str, *, markdown: bool) -> Document:
    """What ``text`` is made of, in its order; ``markdown`` says that emphasis, links, quotes and fences are marks."""
    text = _INVISIBLE.sub("", text)
    told: dict[str, str] = {}
    if markdown and (front := _FRONT_MATTER.match(text := text.replace("\r\n", "\n"))):
        told = {name: value for name, _, value in _FIELD.findall(front[1])}
        text = text[front.end() :]
    # A page may end within a sentence.
    lines = _LINES.split(re.sub(r"\n?\f\n?", "\n\f\n", text))
    longest = 0 if not markdown and _is_unwrapped(lines) else _HARD_WRAP
    blocks = tuple(_tidied(_Reader(markdown=markdown, longest_line=longest).read(lines)))
    return Document(blocks, told.get("title"), told.get("author"))


def _is_unwrapped(lines: list[str]) -> bool:
    filled = [line for line in lines if says(line)]
    return sum(len(line) > _HARD_WRAP for line in filled) > _UNWRAPPED * len(filled)


@dataclass(slots=True)
class _Reader:
    """Collects the lines of a block until it ends."""

    markdown: bool
    longest_line: int
    """Of those that may go on in the next."""
    block: list[str] = field(default_factory=list)
    indented: bool = False
    fenced: bool = False

    def read(self, lines: list[str]) -> Iterator[Block]:
        for raw in lines:
            line = " ".join(raw.split())
            if self.markdown:
                if _FENCE.match(line):
                    self.fenced = not self.fenced
                    yield from self.end()
                    continue
                line = re.sub(r"^(?:> ?)+", "", line)
                if not self.fenced and line.startswith("|"):
                    yield from self.row(line)
                    continue
            yield from self.take(line, raw)
        yield from self.end()

    def take(self, line: str, raw: str) -> Iterator[Block]:
        if raw.strip(" \t") == _PAGE:
            if self.block and not _SENTENCE_END.search(self.block[-1]):
                return
            yield from self.end()
        elif not line:
            yield from self.end()
        elif not self.fenced and (found := _ATX.match(line)) and says(found[2]):
            yield from self.end()
            yield Heading(_spoken(found[2], markdown=self.markdown), len(found[1]))
        elif not self.fenced and self.is_title() and (found := _UNDERLINE.match(line)):
            title, self.block = _joined(self.block), []
            yield Heading(_spoken(title, markdown=self.markdown), 1 if found[1][0] == "=" else 2)
        elif not says(line) and not self.block:
            yield SceneBreak()
        elif not says(line) and _UNDERLINE.match(line):
            yield from self.end()
            yield SceneBreak()
        else:
            if self.parts_from(line, raw):
                yield from self.end()
            self.indented = raw[:1] in {" ", "\t"}
            self.block.append(line)

    def row(self, line: str) -> Iterator[Block]:
        """A table's, as an item; nothing of the line between its head and its body."""
        yield from self.end()
        cells = [cell.strip() for cell in line.split("|") if says(cell)]
        if cells:
            yield Paragraph(_spoken(", ".join(cells), markdown=True), is_item=True)

    def is_title(self) -> bool:
        """Whether an underline below would make a heading of what was read last."""
        if not 1 <= len(self.block) <= 2 or not says(joined := _joined(self.block)):
            return False
        return len(joined) <= LONGEST_TITLE and (_NO_TITLE.search(joined) is None or _CHAPTER.match(joined) is not None)

    def parts_from(self, line: str, raw: str) -> bool:
        """Whether ``line`` begins a block of its own: an item, an unwrapped line, a first line that is indented."""
        if not self.block:
            return False
        if self.fenced or _BULLET.match(line):
            return True
        if not self.markdown and max(len(line), len(self.block[-1])) > self.longest_line:
            return True
        listing = _BULLET.match(self.block[0]) or _NUMBERED.match(self.block[0])
        if _NUMBERED.match(line):
            # "am\n3. Mai" is a date that was wrapped.
            return bool(listing) or _SENTENCE_END.search(self.block[-1]) is not None
        if line.startswith(("—", "–")) and _SENTENCE_END.search(self.block[-1]):
            # Somebody else speaks, as French, Spanish and Russian write it.
            return True
        return not (listing or self.markdown or self.indented) and raw.startswith(("  ", "\t", "\u3000"))

    def end(self) -> Iterator[Block]:
        block, self.block = self.block, []
        if not block:
            return
        title, rest = _chapter_lines(block)
        if title:
            # "Chapter 2" and "The Pool of Tears" are not said in one breath.
            stop = "" if title[0].endswith((".", ":", "—", "–", "-")) else "."
            text = f"{title[0]}{stop} {title[1]}" if len(title) == 2 else title[0]
            yield Heading(_spoken(text, markdown=self.markdown), 2)
        if not rest:
            return
        is_item = bool(_BULLET.match(rest[0]) or _NUMBERED.match(rest[0]))
        if self.markdown:
            rest[0] = _BULLET.sub("", rest[0], count=1) if _BULLET.match(rest[0]) else rest[0]
        yield Paragraph(_spoken(_joined(rest), markdown=self.markdown), is_item)


def _chapter_lines(block: list[str]) -> tuple[list[str], list[str]]:
    """The lines of ``Chapter 1`` and its title, and those that follow; no lines of a title where it is a paragraph."""
    found = _CHAPTER.match(block[0]) if len(block[0]) <= LONGEST_TITLE else None
    if found is None:
        return [], block
    if len(block) == 1:
        return block, []
    if found["title"] is None or found["title"].strip() or any(map(_CHAPTER.match, block[1:])):
        # A table of contents, or a sentence that was wrapped.
        return [], block
    if (
        len(block) == 2
        and len(block[1]) <= LONGEST_TITLE
        and not block[1].endswith((".", ",", ";", "!", "?", "”", '"'))
    ):
        return block, []
    return block[:1], block[1:]


def _tidied(blocks: Iterator[Block]) -> Iterator[Block]:
    """No scene breaks at either end, beside headings, or beside each other."""
    before: Block | None = None
    held = False
    for block in blocks:
        # Of a heading or a paragraph that was all marks, such as a picture, nothing is left.
        if isinstance(block, SceneBreak) or not says(block.text):
            held = isinstance(before, Paragraph)
            continue
        if held and isinstance(block, Paragraph):
            yield SceneBreak()
        yield block
        before, held = block, False


def _joined(lines: list[str]) -> str:
    """In one line. A hyphen at the end of a line stays, without a space behind it."""
    parts = [lines[0]]
    for before, line in itertools.pairwise(lines):
        close = _NO_SPACES.match(before[-1]) and _NO_SPACES.match(line[0])
        hyphenated = before[-1] == "-" and before[-2:-1].isalpha() and line[0].islower()
        parts.append(line if close or hyphenated else f" {line}")
    return "".join(parts)


def _spoken(text: str, *, markdown: bool) -> str:
    """Without the marks."""
    for pattern, kept in (*_MARKDOWN_MARKS, *_PLAIN_MARKS) if markdown else _PLAIN_MARKS:
        text = pattern.sub(kept, text)
    return " ".join(text.split())
