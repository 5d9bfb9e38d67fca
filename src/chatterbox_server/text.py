"""A long text into pieces that an engine can say one after the other. Knows no engine, and changes no word."""

import itertools
import math
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import sentencex

PARAGRAPH_PAUSE_S: Final = 0.7
SENTENCE_PAUSE_S: Final = 0.3
CLAUSE_PAUSE_S: Final = 0.1
"""After a comma, a colon, a dash. Where nothing was written, nothing is paused."""

_WINDOW: Final = 1000
"""Characters given to sentencex at once: its time grows with their square (5 s for 100,000 Chinese ones)."""

_DENSITY: Final = 3
"""How much longer it takes to say an ideograph, a syllable or a digit than a letter."""

# Kana, ideographs, Hangul; whatever Unicode calls a digit.
_DENSE: Final = re.compile(r"[\d\u3041-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]")
_NO_SPACES: Final = re.compile(r"[\u3001-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]")
"""Scripts whose lines are joined without a space."""

_BULLET: Final = re.compile(r"[-*+•‣◦▪–—]\s")
_NUMBERED: Final = re.compile(r"\d{1,2}[.)]\s")

# "M. Dupont", "т. е. тест", "1. First": what sentencex ends after a lone letter or number is seldom an end.
_LONE: Final = re.compile(r"(?:^|\s)(?!I\.)(?:[^\W\d_]|\d{1,2})\.$")

_CLOSERS: Final = r"[\"'”’»)\]」』）】]*"
# Not after an initial, nor after "p.m", "Mr" and their like.
_SENTENCE_END: Final = re.compile(rf"(?<![ .][^\W\d_])(?<! [A-Z][a-z])[.!?…؟۔।॥]+{_CLOSERS}(?= )|[。！？…]+{_CLOSERS}")
_CLAUSE_END: Final = re.compile(rf"[;:؛]{_CLOSERS}(?= )|[；：]{_CLOSERS}| [–—-]{{1,3}}(?= )|[–—](?=\w)")
_COMMA: Final = re.compile(rf"[,،]{_CLOSERS}(?= )|[，、]{_CLOSERS}")
_CONJUNCTION: Final = re.compile(
    r" (?=(?:and|or|but|because|which|that|when|while|if|und|oder|aber|weil|dass|et|ou|mais|que|y|o|pero|e|ma|и|или"
    r"|но|что) )"
)
# A name stays with its initial or its "Mr."; French writes a space before "!" and "»", and nothing may begin with them.
_SPACE: Final = re.compile(r"(?<![A-Z]\.)(?<![A-Z][a-z]\.) (?![!?;:»])")
_ANY_SPACE: Final = re.compile(" ")
# Between two ideographs or kana, though not before a small or long one; before a vowel that opens a Thai syllable.
_SYLLABLE: Final = re.compile(
    r"(?<=[\u3041-\u30ff\u3400-\u9fff])(?=[\u3042\u3044\u3046\u3048\u304a-\u3062\u3064-\u3082\u3084\u3086\u3088-\u308d"
    r"\u308f-\u3093\u30a2\u30a4\u30a6\u30a8\u30aa-\u30c2\u30c4-\u30e2\u30e4\u30e6\u30e8-\u30ed\u30ef-\u30f3\u3400-\u9fff])"
    r"|(?=[เ-ไເ-ໄ])"
)

# Where a sentence that is too long is cut, the best place first, and the pause that fits there.
_BREAKS: Final = (
    (_SENTENCE_END, SENTENCE_PAUSE_S),
    (_CLAUSE_END, CLAUSE_PAUSE_S),
    (_COMMA, CLAUSE_PAUSE_S),
    (_CONJUNCTION, 0.0),
    (_SPACE, 0.0),
    (_ANY_SPACE, 0.0),
    (_SYLLABLE, 0.0),
)

_FLAG_LETTERS: Final = "".join(map(chr, range(0x1F1E6, 0x1F200)))
"""Two of them are one flag."""


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    pause_s: float
    """Silence that follows it; 0.0 after the last."""


@dataclass(frozen=True, slots=True)
class _Span:
    """Part of a block, without the spaces around it."""

    start: int
    end: int
    pause_s: float


def split(text: str, *, language: str, longest: int, first: int | None = None) -> list[Piece]:
    """Pieces of at most ``longest`` characters, about two thirds of it where sentences allow.

    Blocks that are full of ideographs, syllables or digits get pieces up to three times shorter, which last as
    long. The first piece has at most about ``first`` characters if a sentence or a clause ends there, so that its
    sound can leave early. What has no letter and no digit in any script is said only beside something that has
    one; a text of nothing else has no pieces.

    ``language`` is a code such as ``de`` or ``pt-BR``; for one that sentencex does not know, the ends of English
    sentences hold. 100,000 characters take well under a second, whatever they are, where ``longest`` is 20 or more.
    """
    pieces: list[Piece] = []
    for block, pause_s in _blocks(text):
        if not _says(block):
            if pieces:
                pieces[-1] = Piece(pieces[-1].text, max(pieces[-1].pause_s, pause_s))
            continue
        density = 1 + (_DENSITY - 1) * len(_DENSE.findall(block)) / len(block)
        early = None if pieces or first is None else max(1, int(first / density))
        spans = _spans(block, language, max(1, int(longest / density)), early)
        spoken = [Piece(block[span.start : span.end], span.pause_s) for span in spans]
        pieces += [*spoken[:-1], Piece(spoken[-1].text, pause_s)]
    if pieces:
        pieces[-1] = Piece(pieces[-1].text, 0.0)
    return pieces


def _says(text: str) -> bool:
    return any(map(str.isalnum, text))


# -- blocks: paragraphs and list items ------------------------------------------------------------------------


def _blocks(text: str) -> Iterator[tuple[str, float]]:
    """Paragraphs and the items of lists, each in one line, and the pause after each."""
    # Half of a surrogate pair is no character; a soft hyphen or a byte order mark is not meant to be seen.
    text = text.encode(errors="ignore").decode().replace("\u00ad", "").replace("\ufeff", "")
    lines: list[str] = []
    for line in (" ".join(raw.split()) for raw in text.splitlines()):
        if lines and (not line or _opens_item(lines, line)):
            yield _joined(lines), SENTENCE_PAUSE_S if line else PARAGRAPH_PAUSE_S
            lines = []
        if line:
            lines.append(line)
    if lines:
        yield _joined(lines), PARAGRAPH_PAUSE_S


def _opens_item(before: list[str], line: str) -> bool:
    """A number opens an item only where a list is likely: "am\\n3. Mai" is a date that was wrapped."""
    listing = _NUMBERED.match(before[0]) or _BULLET.match(before[0]) or before[-1].endswith((":", ".", "!", "?"))
    return bool(_BULLET.match(line) or (listing and _NUMBERED.match(line)))


def _joined(lines: list[str]) -> str:
    parts = [lines[0]]
    for before, line in itertools.pairwise(lines):
        wrapped = _NO_SPACES.match(before[-1]) and _NO_SPACES.match(line[0])
        parts.append(line if wrapped else f" {line}")
    return "".join(parts)


# -- spans of one block ---------------------------------------------------------------------------------------


def _spans(block: str, language: str, longest: int, first: int | None) -> list[_Span]:
    ends = _sentence_ends(block, language)
    spans: list[_Span] = []
    start = 0
    if first is not None and (head := _head(block, ends, longest, min(first, longest))):
        spans.append(head)
        start = head.end
        ends = [end for end in ends if end > start]
    sentences: list[_Span] = []
    for end in ends:
        sentence = _trimmed(block, _Span(start, end, SENTENCE_PAUSE_S))
        sentences += _cut(block, sentence, longest)
        start = end
    said = [span for span in sentences if _says(block[span.start : span.end])]
    return spans + _merged(said, longest)


def _sentence_ends(block: str, language: str) -> list[int]:
    """Where sentences end, the last at the end of ``block``; what says nothing belongs to the one before it."""
    language = language.lower().partition("-")[0]
    ends: list[int] = []
    start = window = 0
    says = False
    while window < len(block):
        found = sentencex.segment(language, block[window : window + _WINDOW])
        if window + _WINDOW < len(block):
            # The last may go on beyond the window; a sentence that fills it does.
            if len(found) == 1:
                space = block.rfind(" ", window, window + _WINDOW)
                after = space if space > window else window + _WINDOW
                says = says or _says(block[window:after])
                window = after
                continue
            found = found[:-1]
        for sentence in found:
            window += len(sentence)
            says = says or _says(sentence)
            if says and not _goes_on(block, start, window):
                ends.append(window)
            elif not says and ends:
                ends[-1] = window
            else:
                continue
            start, says = window, False
    if says or not ends:
        ends.append(len(block))
    return [*ends[:-1], len(block)]


def _goes_on(block: str, start: int, end: int) -> bool:
    """An abbreviation that sentencex took for an end."""
    said = block[max(start, end - 8) : end].rstrip()
    after = block[end : end + 2].lstrip()[:1]
    return said.endswith(".") and (after.islower() or _LONE.search(said) is not None)


def _head(block: str, ends: list[int], longest: int, first: int) -> _Span | None:
    """What is said first and alone; ``None`` where nothing ends early enough to be worth it."""
    least = max(1, first // 3)
    if len(block) <= first + least:
        return None
    latest = min(longest, 4 * first, len(block) - least)
    fits: dict[int, float] = {}
    for pattern, pause_s in (
        (_COMMA, CLAUSE_PAUSE_S),
        (_CLAUSE_END, CLAUSE_PAUSE_S),
        (_SENTENCE_END, SENTENCE_PAUSE_S),
    ):
        fits |= {found.end(): pause_s for found in pattern.finditer(block, 0, latest + 1)}
    for end in itertools.takewhile(lambda end: end <= latest + 1, ends):
        fits[_trimmed(block, _Span(0, end, 0.0)).end] = SENTENCE_PAUSE_S
    able = [end for end in fits if least <= end <= latest and _says(block[:end]) and _says(block[end:])]
    # A sentence's end before a clause's, the later of two; beyond `first` only the nearest.
    early = [end for end in able if end <= first]
    if not able:
        return None
    end = max(early, key=lambda end: (fits[end], end)) if early else min(able)
    return _trimmed(block, _Span(0, end, fits[end]))


def _trimmed(block: str, span: _Span) -> _Span:
    start, end = span.start, span.end
    while start < end and block[start] == " ":
        start += 1
    while end > start and block[end - 1] == " ":
        end -= 1
    return _Span(start, end, span.pause_s)


def _cut(block: str, sentence: _Span, longest: int) -> Iterator[_Span]:
    """``sentence`` in parts of at most ``longest`` characters and of like size, cut where it hurts least."""
    rest = sentence
    while rest.end - rest.start > longest:
        end, pause_s = _best_break(block, rest, longest)
        yield _trimmed(block, _Span(rest.start, end, pause_s))
        rest = _trimmed(block, _Span(end, rest.end, rest.pause_s))
    yield rest


def _best_break(block: str, span: _Span, longest: int) -> tuple[int, float]:
    size = span.end - span.start
    aim = span.start + math.ceil(size / math.ceil(size / longest))
    earliest, latest = span.start + max(1, longest // 3), span.start + longest
    for pattern, pause_s in _BREAKS:
        # A few characters beyond the latest place, because a pattern looks ahead of where it ends.
        found = (match.end() for match in pattern.finditer(block, earliest, min(latest + 12, span.end)))
        able = [end for end in found if earliest <= end <= latest]
        if able:
            return min(able, key=lambda end: abs(end - aim)), pause_s
    whole = (end for end in range(latest, earliest - 1, -1) if not _inside_character(block, end))
    return next(whole, latest), 0.0


def _inside_character(block: str, end: int) -> bool:
    """A cut there would part what is seen as one: marks, joiners, skin tones, flags; good enough, not UAX #29."""
    before, after = block[end - 1], block[end]
    near = block[max(0, end - 16) : end]
    flags = len(near) - len(near.rstrip(_FLAG_LETTERS))
    return (
        unicodedata.category(after) in {"Mn", "Mc", "Me"}
        or "\u200d" in (before, after)
        or "\U0001f3fb" <= after <= "\U0001f3ff"
        or (after in _FLAG_LETTERS and flags % 2 == 1)
    )


def _merged(spans: list[_Span], longest: int) -> list[_Span]:
    """Neighbours together up to two thirds of ``longest``; a crumb joins whichever neighbour has room."""
    comfortable, crumb = longest * 2 // 3, longest // 12
    merged = spans[:1]
    for span in spans[1:]:
        last = merged[-1]
        small = min(last.end - last.start, span.end - span.start) <= crumb
        if span.end - last.start <= (longest if small else comfortable):
            merged[-1] = _Span(last.start, span.end, span.pause_s)
        else:
            merged.append(span)
    return merged
