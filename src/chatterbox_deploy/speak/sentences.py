"""A paragraph into pieces of whole sentences, each of a good size for one request. Changes no word."""

from __future__ import annotations

import math
import re
from typing import Final

import sentencex

_WINDOW: Final = 1000
"""Characters given to sentencex at once: its time grows with their square."""

_DENSITY: Final = 3
"""How much longer it takes to say an ideograph, a syllable or a digit than a letter."""

# Kana, ideographs, Hangul; whatever Unicode calls a digit.
_DENSE: Final = re.compile(r"[\d\u3041-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]")

# "M. Dupont", "J. R. Smith", "1. First": what sentencex ends after a lone letter or number is seldom an end.
_LONE: Final = re.compile(r"(?:^|\s)(?!I\.)(?:[^\W\d_]|\d{1,2})\.$")

# Where a sentence that is too long is cut, the best place first.
_BREAKS: Final = tuple(
    re.compile(pattern)
    for pattern in (
        r"[;:؛][\"'”’»)\]]*(?= )|[；：。！？]|[–—](?=[ \w])",
        r"[,،][\"'”’»)\]]*(?= )|[，、]",
        r" ",
    )
)


def pieces(paragraph: str, *, language: str, longest: int) -> list[str]:
    """Whole sentences together up to ``longest`` characters, of like size; a longer sentence is cut where it breathes.

    Paragraphs that are full of ideographs, syllables or digits get pieces up to three times shorter, which last as
    long. Joined, they are ``paragraph`` but for the spaces between them. ``language`` is a code such as ``de`` or
    ``pt-BR``; for one that sentencex does not know, the ends of English sentences hold.
    """
    if not paragraph.strip():
        return []
    density = 1 + (_DENSITY - 1) * len(_DENSE.findall(paragraph)) / len(paragraph)
    fits = max(1, int(longest / density))
    parts = [part for sentence in _sentences(paragraph, language) for part in _cut(sentence, fits)]
    return [piece.strip() for piece in _gathered(parts, fits)]


def says(text: str) -> bool:
    """Whether there is a letter or a digit of any script in it."""
    return any(map(str.isalnum, text))


def _sentences(paragraph: str, language: str) -> list[str]:
    """The paragraph's sentences; what says nothing, such as a closing quote, belongs to the one before it."""
    sentences: list[str] = []
    for found in _segments(paragraph, language.lower().partition("-")[0]):
        if sentences and (not says(found) or not says(sentences[-1]) or _goes_on(sentences[-1], found)):
            sentences[-1] += found
        else:
            sentences.append(found)
    return sentences


def _segments(paragraph: str, language: str) -> list[str]:
    """What sentencex says, asked about a window at a time; joined, they are ``paragraph``."""
    segments: list[str] = []
    start, carried = 0, ""
    while start < len(paragraph):
        window = paragraph[start : start + _WINDOW]
        found = list(sentencex.segment(language, window))
        if start + _WINDOW < len(paragraph):
            if len(found) == 1:
                # A sentence that fills the window: on from its last space.
                found = [window[: window.rfind(" ") + 1] or window]
                carried += found[0]
                start += len(found[0])
                continue
            # The last may go on beyond the window.
            found = found[:-1]
        segments += [carried + found[0], *found[1:]]
        carried = ""
        start += sum(map(len, found))
    return [*segments, carried] if carried else segments


def _goes_on(before: str, after: str) -> bool:
    """An abbreviation that sentencex took for an end."""
    said = before[-8:].rstrip()
    return said.endswith(".") and (after.lstrip()[:1].islower() or _LONE.search(said) is not None)


def _cut(sentence: str, longest: int) -> list[str]:
    parts: list[str] = []
    while len(sentence.strip()) > longest:
        end = _best_break(sentence, longest)
        parts.append(sentence[:end])
        sentence = sentence[end:]
    return [*parts, sentence]


def _best_break(sentence: str, longest: int) -> int:
    """Nearest to where parts of like size would end."""
    aim = math.ceil(len(sentence) / math.ceil(len(sentence) / longest))
    earliest = max(1, longest // 3)
    for pattern in _BREAKS:
        # A character beyond the latest place, because a pattern looks ahead of where it ends.
        ends = [found.end() for found in pattern.finditer(sentence, earliest, longest + 1)]
        able = [end for end in ends if end <= longest and says(sentence[:end])]
        if able:
            return min(able, key=lambda end: abs(end - aim))
    return longest


def _gathered(parts: list[str], longest: int) -> list[str]:
    """Neighbours together, as near to one size as they come; what says nothing is never alone."""
    total = sum(map(len, parts))
    aim = total / math.ceil(total / longest)
    gathered = parts[:1]
    for part in parts[1:]:
        before = len(gathered[-1])
        grown = before + len(part.rstrip())
        alone = says(part) and says(gathered[-1])
        if alone and (grown > longest or grown - aim > aim - before):
            gathered.append(part)
        else:
            gathered[-1] += part
    return gathered
