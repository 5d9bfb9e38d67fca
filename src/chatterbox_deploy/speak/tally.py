"""How far a job of speaking is, and how it reads. Prints nothing, and looks at no clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Share:
    """What one instance did."""

    pieces: int = 0
    audio_s: float = 0.0


@dataclass(slots=True)
class Tally:
    """Counts of one run; what lay there from an earlier one is in ``kept`` alone."""

    pieces: int
    """To be spoken in this run."""
    characters: int
    """Of those."""
    kept: int = 0
    """Pieces that were there already."""
    done: int = 0
    done_characters: int = 0
    audio_s: float = 0.0
    retries: int = 0
    shares: dict[str, Share] = field(default_factory=dict)
    """By instance, as the front names it; "" is one that has no name."""

    def spoken(self, characters: int, audio_s: float, instance: str) -> None:
        """One more piece is kept."""
        self.done += 1
        self.done_characters += characters
        self.audio_s += audio_s
        share = self.shares.setdefault(instance, Share())
        share.pieces += 1
        share.audio_s += audio_s

    def left_s(self, elapsed_s: float) -> float | None:
        """Seconds until the last piece, at this run's pace by characters; ``None`` before the first one."""
        if not self.done_characters:
            return None
        return elapsed_s * (self.characters - self.done_characters) / self.done_characters

    def line(self, elapsed_s: float) -> str:
        """``12 of 40 pieces, 0:45 left, 3.2 s of sound a second``; a dash is what is not known yet."""
        pace = f"{self.audio_s / elapsed_s:.1f}" if self.done and elapsed_s > 0 else "-"
        left = self.left_s(elapsed_s)
        said = [
            f"{self.kept + self.done} of {self.kept + self.pieces} pieces",
            f"{'-' if left is None else clock(left)} left",
            f"{pace} s of sound a second",
        ]
        if self.retries:
            said.append("1 retry" if self.retries == 1 else f"{self.retries} retries")
        return ", ".join(said)


@dataclass(frozen=True, slots=True)
class Summary:
    """What became of a job that is done."""

    file: str
    chapters: int
    pieces: int
    duration_s: float
    """Of the whole, pauses included."""
    tally: Tally
    speaking_s: float
    """Wall time of this run, from the first request to the last answer."""
    wall_s: float
    """Of this run in all."""

    def as_json(self) -> dict[str, Any]:
        """For programs; times in seconds."""
        tally, real_time = self.tally, self._real_time()
        return {
            "file": self.file,
            "chapters": self.chapters,
            "pieces": self.pieces,
            "duration_s": round(self.duration_s, 3),
            "spoken": tally.done,
            "kept": tally.kept,
            "retries": tally.retries,
            "spoken_audio_s": round(tally.audio_s, 3),
            "speaking_s": round(self.speaking_s, 3),
            "wall_s": round(self.wall_s, 3),
            "real_time": None if real_time is None else round(real_time, 3),
            "instances": [
                {"instance": name or None, "pieces": share.pieces, "audio_s": round(share.audio_s, 3)}
                for name, share in sorted(tally.shares.items())
            ],
        }

    def line(self) -> str:
        """One sentence: how long, how fast, who spoke it, and how long all of it took."""
        tally = self.tally
        said = [
            f"{self.file}: {clock(self.duration_s)} of sound in {count(self.chapters, 'chapter')} and "
            f"{count(self.pieces, 'piece')}"
        ]
        if tally.done:
            real_time = self._real_time()
            said.append(
                f"{clock(tally.audio_s)} spoken in {_took(self.speaking_s)}"
                + (f", {real_time:.1f} times as fast as it sounds" if real_time else "")
            )
            audio_s = tally.audio_s or 1.0
            if any(tally.shares):
                said.append(
                    ", ".join(
                        f"{name or '-'} {share.audio_s / audio_s:.0%}" for name, share in sorted(tally.shares.items())
                    )
                )
        if tally.kept:
            said.append(f"{count(tally.kept, 'piece')} kept from before")
        if tally.retries:
            said.append(f"{tally.retries} asked again")
        said.append(f"{_took(self.wall_s)} in all")
        return "; ".join(said)

    def _real_time(self) -> float | None:
        return self.tally.audio_s / self.speaking_s if self.tally.done and self.speaking_s > 0 else None


def _took(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else clock(seconds)


def clock(seconds: float) -> str:
    """``0:07``, ``12:34``, ``1:02:03``."""
    whole = round(seconds)
    minutes = f"{whole // 60 % 60:02}" if whole >= 3600 else f"{whole // 60}"
    return f"{whole // 3600}:{minutes}:{whole % 60:02}" if whole >= 3600 else f"{minutes}:{whole % 60:02}"


def count(number: int, what: str) -> str:
    """``1 piece``, ``2,000 pieces``."""
    return f"{number:,} {what}{'s' * (number != 1)}"
