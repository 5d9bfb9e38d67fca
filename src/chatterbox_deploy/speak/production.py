"""One job from manuscript to file: have spoken what is not there yet, put it together, clear up. Prints nothing."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from chatterbox_deploy.errors import CommandFailed
from chatterbox_deploy.host import save
from chatterbox_deploy.speak import narration, sending, subtitles, tally
from chatterbox_deploy.speak.binding import Binder
from chatterbox_deploy.speak.tally import Summary, Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from chatterbox_deploy.speak.manuscript import Manuscript
    from chatterbox_deploy.speak.narration import Manner, Take, Timeline
    from chatterbox_deploy.speak.parts import Parts
    from chatterbox_deploy.speak.sending import Front, InFlight
    from chatterbox_deploy.speak.wav import Sound


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What is to be made."""

    output: Path
    """Its suffix says the format."""
    subtitles: Path | None
    title: str
    author: str | None
    loudness_lufs: float | None
    keep_parts: bool


class Show(Protocol):
    """Lets somebody watch; each is there for as long as its ``with`` lasts."""

    def speaking(self, counts: Tally) -> AbstractContextManager[sending.Tell]:
        """Whatever it hears, it counts in ``counts``."""
        ...

    def writing(self, doing: str, duration_s: float) -> AbstractContextManager[Callable[[float], None]]:
        """Hears how many seconds of sound are written; ``doing`` is that in words."""
        ...


def make(
    goal: Goal,
    manuscript: Manuscript,
    manner: Manner,
    *,
    front: Front,
    in_flight: InFlight,
    parts: Parts,
    show: Show,
) -> Summary:
    """The file, of ``parts``, which the caller holds.

    Raises:
        CommandFailed: not all could be spoken, or it cannot be written; what was spoken is kept.
    """
    begun_s = time.monotonic()
    wanted = narration.takes(manuscript, manner, spoken_by=asyncio.run(sending.spoken_by(front, manner.voice)))
    there = parts.samples(take.name for take in wanted)
    pauses = [(take, piece.pause_s) for take, piece in zip(wanted, manuscript.pieces, strict=True)]
    try:
        with Binder(goal.output, pauses, parts, there, loudness_lufs=goal.loudness_lufs) as binder:
            counts, speaking_s = _speak(wanted, there, front, in_flight, binder, parts=parts, show=show)
            whole = _write(goal, manuscript, wanted, binder, parts=parts, show=show)
    except CommandFailed as error:
        msg = f"{error}\n{how_to_go_on(parts)}"
        raise CommandFailed(msg) from None
    if not goal.keep_parts:
        parts.clear()
    return Summary(
        file=str(goal.output),
        chapters=len(whole.chapters),
        pieces=len(wanted),
        duration_s=whole.duration_s,
        tally=counts,
        speaking_s=speaking_s,
        wall_s=time.monotonic() - begun_s,
    )


def how_to_go_on(parts: Parts) -> str:
    """What is kept of a job that did not end, and what to type."""
    kept = parts.count()
    if not kept:
        return "nothing was spoken"
    return f"{tally.count(kept, 'piece')} kept in {parts.folder}; type the same again to go on"


def _speak(
    wanted: Sequence[Take],
    there: Collection[str],
    front: Front,
    in_flight: InFlight,
    binder: Binder,
    *,
    parts: Parts,
    show: Show,
) -> tuple[Tally, float]:
    """Have spoken what is not there; what was, and in how many seconds."""
    todo = narration.missing(wanted, there)
    counts = Tally(pieces=len(todo), characters=sum(len(take.text) for take in todo), kept=len(there))

    def keep(name: str, sound: Sound) -> None:
        parts.keep(name, sound)
        binder.spoken(name)

    begun_s = time.monotonic()
    if todo:
        with show.speaking(counts) as tell:
            asyncio.run(sending.speak(front, todo, keep, in_flight=in_flight, tell=tell))
    return counts, time.monotonic() - begun_s


def _write(
    goal: Goal, manuscript: Manuscript, wanted: Sequence[Take], binder: Binder, *, parts: Parts, show: Show
) -> Timeline:
    """The file, and its subtitles."""
    there = parts.samples(take.name for take in wanted)
    rate_hz = next(rate_hz for rate_hz, _ in there.values())
    samples = {name: count for name, (_, count) in there.items()}
    whole = narration.timeline(manuscript, wanted, samples, sample_rate_hz=rate_hz, untitled=goal.title)
    tags = {"title": goal.title, "album": goal.title, "genre": "Audiobook"}
    if goal.author is not None:
        tags["artist"] = goal.author
    doing = f"writing {goal.output.name}"
    if goal.loudness_lufs is not None:
        doing = f"evening out to {goal.loudness_lufs:g} LUFS and {doing}"
    with show.writing(doing, whole.duration_s) as on_way:
        while not binder.wait(0.1):
            on_way(binder.written_s)
        binder.finish(whole.chapters, tags)
    if goal.subtitles is not None:
        save(goal.subtitles, subtitles.srt(whole.cues, whole.sample_rate_hz))
    return whole
