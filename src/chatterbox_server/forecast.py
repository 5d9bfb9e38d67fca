"""What the last utterances foretell of the next: how long it takes, and when it is stuck. Reads no clock."""

from collections import deque
from typing import Final

RECENT: Final = 32
"""Utterances whose pace foretells the next one's."""

FAR_BEYOND: Final = 10
"""An utterance that takes so many times what its length foretells is stuck …"""

SHORTEST_PATIENCE_S: Final = 30.0
"""… but not before this: a voice that is heard first, or shapes new to cuDNN, take seconds."""


class Forecast:
    """The pace of the last utterances, which an engine may have had in hand several at once.

    ``work_s`` of an utterance is how long somebody worked on it; ``share_s`` is its part of the engine's time, which
    all that are in hand share evenly. They are the same where it takes one after another.
    """

    def __init__(self) -> None:
        self._works = _Pace()
        self._shares = _Pace()

    def measured(self, chars: int, *, work_s: float, share_s: float) -> None:
        """What an utterance of ``chars`` characters took."""
        self._works.add(chars, work_s)
        self._shares.add(chars, share_s)

    def work_s(self, chars: int) -> float:
        """From the begin to the end of an utterance of ``chars`` characters."""
        return self._works.expected_s(chars)

    def share_s(self, chars: int) -> float:
        """Of the engine's time, for so many characters in any number of utterances."""
        return self._shares.expected_s(chars)

    def patience_s(self, chars: int, *, longest_s: float) -> float:
        """Seconds of work after which an utterance counts as stuck; at most ``longest_s``.

        Until a full set of recent ones is known, the pace is a guess, and only ``longest_s`` counts.
        """
        if len(self._works) < RECENT:
            return longest_s
        return min(longest_s, max(SHORTEST_PATIENCE_S, FAR_BEYOND * self.work_s(chars)))


class _Pace:
    """Seconds per character of the last few."""

    def __init__(self) -> None:
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT)
        # Summed as they come: asked for far more often, for each of those that wait whenever one begins.
        self._chars, self._seconds = 0, 0.0

    def __len__(self) -> int:
        return len(self._recent)

    def add(self, chars: int, seconds: float) -> None:
        self._recent.append((chars, seconds))
        self._chars = sum(known for known, _ in self._recent)
        self._seconds = sum(seconds for _, seconds in self._recent)

    def expected_s(self, chars: int) -> float:
        return chars * self._seconds / self._chars if self._chars else 1.0


class SharedTime:
    """The engine's time, shared evenly by the utterances that are in hand: theirs add up to the time it had any."""

    def __init__(self) -> None:
        self._each_s = 0.0
        """What one utterance that had been there from the start would have had."""
        self._changed_s = 0.0
        self._in_hand = 0

    def come(self, now_s: float) -> float:
        """One more; returns what ``leave`` wants."""
        self._change(now_s, 1)
        return self._each_s

    def leave(self, came: float, now_s: float) -> float:
        """One less; returns its seconds."""
        self._change(now_s, -1)
        return self._each_s - came

    def _change(self, now_s: float, by: int) -> None:
        if self._in_hand:
            self._each_s += (now_s - self._changed_s) / self._in_hand
        self._changed_s = now_s
        self._in_hand += by
