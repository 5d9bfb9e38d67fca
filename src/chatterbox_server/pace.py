"""How long a text can take to say. Listens to nothing: it knows durations and characters.

Chatterbox sometimes stops early, or rambles on after the last word; both show in the duration. The bounds are
wide on purpose: a reading that is right must practically never be thrown away.
"""

import unicodedata
from typing import Final

SPARE_S: Final = 4.0
"""Beyond the slowest reading: breaths, and the drawl of a single word."""

# Seconds that one character takes, quickest and slowest. English is read at about 15 characters a second, Chinese at
# 4 to 6, Hindi at 13. A digit is part of a word at the quickest ("2000") and two words at the slowest ("1,234,567").
_LETTER: Final = (0.033, 0.14)
_CAPITAL: Final = (0.033, 0.6)  # "WWW"
_VOWELLESS: Final = (0.04, 0.25)  # Arabic and Hebrew write consonants
_MANY_VOWELS: Final = (0.03, 0.25)  # scripts without case: Devanagari, Thai …
_KANA: Final = (0.06, 0.4)
_HANGUL: Final = (0.08, 0.5)
_IDEOGRAPH: Final = (0.08, 0.9)
_DIGIT: Final = (0.04, 1.0)
_MARK: Final = (0.0, 0.2)
_SPACE: Final = (0.0, 0.06)
_PUNCTUATION: Final = (0.0, 0.6)  # a pause, or "comma", "dot"
_SYMBOL: Final = (0.0, 3.0)  # "grinning face with smiling eyes"
_UNHEARD: Final = (0.0, 0.0)

_BY_CATEGORY: Final = {"M": _MARK, "Z": _SPACE, "P": _PUNCTUATION, "S": _SYMBOL, "N": _DIGIT, "C": _UNHEARD}
_BY_NAME: Final = {
    "HIRAGANA": _KANA,
    "KATAKANA": _KANA,
    "KATAKANA-HIRAGANA": _KANA,
    "HANGUL": _HANGUL,
    "CJK": _IDEOGRAPH,
}


def implausible(text: str, audio_s: float, *, speed: float = 1.0) -> str | None:
    """``None`` if a reading of ``text`` can last ``audio_s`` at ``speed``, else why not, in one line."""
    paces = [_pace(character) for character in text]
    quickest_s = sum(quickest for quickest, _ in paces) / speed
    slowest_s = (sum(slowest for _, slowest in paces) + SPARE_S) / speed
    if quickest_s <= audio_s <= slowest_s:
        return None
    what = "stopped early" if audio_s < quickest_s else "rambled"
    return f"{audio_s:.1f} s for {len(text)} characters: {what}"


def _pace(character: str) -> tuple[float, float]:
    category = unicodedata.category(character)
    if category in {"Ll", "Lu", "Lt"}:
        return _LETTER if category == "Ll" else _CAPITAL
    if category[0] != "L":
        return _BY_CATEGORY[category[0]]
    if unicodedata.bidirectional(character) in {"R", "AL"}:
        return _VOWELLESS
    return _BY_NAME.get(unicodedata.name(character, "").partition(" ")[0], _MANY_VOWELS)
