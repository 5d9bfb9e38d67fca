"""How a job of speaking reads while it runs. Prints; decides nothing."""

from __future__ import annotations

import re
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.text import Text

from chatterbox_deploy.speak.tally import clock, count

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.progress import Task

    from chatterbox_deploy.speak.manuscript import Manuscript
    from chatterbox_deploy.speak.narration import Take
    from chatterbox_deploy.speak.sending import Tell
    from chatterbox_deploy.speak.tally import Tally
    from chatterbox_deploy.speak.wav import Sound

LONG_S = 3.0
"""Silence after which somebody wonders whether anything goes on."""

_REQUEST_ID = re.compile(r" ?\(request id [^)]*\)")


class _Line(ProgressColumn):
    """What the tally says, also while nothing comes."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self._tally = tally

    def render(self, task: Task) -> Text:
        return Text(self._tally.line(task.elapsed or 0.0), no_wrap=True, overflow="ellipsis")


class _Watch:
    """Counts what comes, and says what goes wrong: each reason once, not each time."""

    def __init__(self, counts: Tally, progress: Progress) -> None:
        self._counts = counts
        self._progress = progress
        self._task = progress.add_task("", total=counts.kept + counts.pieces, completed=counts.kept)
        self._told: set[str] = set()

    def spoken(self, take: Take, sound: Sound, instance: str) -> None:
        self._counts.spoken(len(take.text), sound.samples / sound.sample_rate_hz, instance)
        self._progress.update(self._task, completed=self._counts.kept + self._counts.done)

    def again(self, take: Take, reason: str, wait_s: float) -> None:  # noqa: ARG002  as speak.Tell
        self._counts.retries += 1
        reason = _REQUEST_ID.sub("", reason)
        if reason not in self._told:
            self._told.add(reason)
            self._progress.console.print(Text(f"asking again: {reason}"), soft_wrap=True)


class Show:
    """On standard error: bars on a terminal, nothing but troubles elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)

    @contextmanager
    def speaking(self, counts: Tally) -> Iterator[Tell]:
        """As ``production.Show``."""
        progress = self._bar(_Line(counts))
        with progress:
            yield _Watch(counts, progress)

    @contextmanager
    def writing(self, doing: str, duration_s: float) -> Iterator[Callable[[float], None]]:
        """As ``production.Show``; where there is no bar, a line once it takes long."""
        progress = self._bar(TextColumn(escape(doing)))
        task = progress.add_task("", total=duration_s)
        lines = [] if self._console.is_terminal else [f"{doing}: {clock(duration_s)} of sound"]
        begun_s = time.monotonic()

        def on_way(written_s: float) -> None:
            progress.update(task, completed=written_s)
            if lines and time.monotonic() - begun_s > LONG_S:
                self._console.print(Text(lines.pop()), soft_wrap=True)

        with progress:
            yield on_way

    def _bar(self, says: ProgressColumn) -> Progress:
        live = self._console.is_terminal
        return Progress(BarColumn(bar_width=16), says, console=self._console, transient=True, disable=not live)


def outline(manuscript: Manuscript, untitled: str) -> str:
    """Every chapter, and below it every piece with the silence that follows."""
    lines: list[str] = []
    number = 0
    for chapter in manuscript.chapters:
        characters = sum(len(piece.text) for piece in chapter.pieces)
        lines.append(f"{chapter.title or untitled}  ({count(len(chapter.pieces), 'piece')}, {characters:,} characters)")
        for piece in chapter.pieces:
            number += 1
            lines.append(f"{number:>6}  {piece.text}  [{piece.pause_s:g} s]")
    return "\n".join(lines)
