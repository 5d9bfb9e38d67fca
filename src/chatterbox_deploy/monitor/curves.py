"""How a fleet's quantities go over the last minutes. Asks nobody."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatterbox_deploy.monitor.picture import FRONT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from chatterbox_deploy.monitor.picture import GpuRow
    from chatterbox_deploy.monitor.story import Look, Step, Story

HISTORY_S = 600.0
"""For which curves are kept."""


def quantities(
    story: Story, look: Look, gpus: Sequence[GpuRow] | None, steps: Mapping[str, Sequence[Step]]
) -> Iterator[tuple[str, float]]:
    """Of the time since the last look, by name; what is unknown is missing."""
    at_s = look.found.monotonic_s
    for row in gpus or ():
        if row.utilisation_percent is not None:
            yield f"gpu {row.gpu}", row.utilisation_percent
    audio: list[float] = []
    for name, own in steps.items():
        for step in own[-1:]:
            spoken = step.grown.total("chatterbox_audio_seconds_total")
            if step.ended_s == at_s and spoken is not None and step.seconds > 0:
                audio.append(spoken / step.seconds)
                yield f"instance {name}", audio[-1]
    if audio:
        yield "audio", sum(audio)
    if look.requests is not None and story.look is not None and at_s > story.look.found.monotonic_s:
        yield FRONT, len(look.requests) / (at_s - story.look.found.monotonic_s)


def curve(story: Story, name: str, *, cells: int, span_s: float) -> tuple[float | None, ...]:
    """Means of a quantity over the last ``span_s`` seconds, in so many parts, the oldest first."""
    if not story.curves or cells <= 0:
        return (None,) * cells
    end_s = story.curves[-1][0]
    width_s = span_s / cells
    parts: list[list[float]] = [[] for _ in range(cells)]
    for when_s, values in story.curves:
        part = cells - 1 - int((end_s - when_s) / width_s)
        if part >= 0 and name in values:
            parts[part].append(values[name])
    return tuple(sum(part) / len(part) if part else None for part in parts)
