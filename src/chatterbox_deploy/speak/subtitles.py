"""What is said when, as SubRip (srt). Writes no file."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chatterbox_deploy.speak.narration import Span

_WIDTH: Final = 60
"""Characters of a line."""


def srt(cues: Iterable[Span], sample_rate_hz: int) -> str:
    """A numbered cue for each piece, its times in milliseconds, its text in lines of about 60 characters."""
    return "\n".join(
        f"{number}\n{_time(cue.start, sample_rate_hz)} --> {_time(cue.end, sample_rate_hz)}\n{_lines(cue.text)}\n"
        for number, cue in enumerate(cues, 1)
    )


def _lines(text: str) -> str:
    # Of like length: a last line of one word reads badly.
    count = -(-len(text) // _WIDTH)
    width = max(_WIDTH // 2, -(-len(text) // count) + 8)
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def _time(sample: int, sample_rate_hz: int) -> str:
    milliseconds = round(sample * 1000 / sample_rate_hz)
    seconds, milliseconds = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02},{milliseconds:03}"
