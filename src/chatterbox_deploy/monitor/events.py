"""What begins, ends and happens from one look to the next. Decides; asks nobody."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from chatterbox_deploy import exposition
from chatterbox_deploy.monitor import rows
from chatterbox_deploy.monitor.picture import Event
from chatterbox_deploy.monitor.story import GoingOn

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from chatterbox_deploy.fleet import Fleet, Instance
    from chatterbox_deploy.monitor.conditions import Condition
    from chatterbox_deploy.monitor.picture import Severity
    from chatterbox_deploy.monitor.story import Look, Step, Story


def going_on(story: Story, look: Look, so_now: Mapping[str, Condition]) -> dict[str, GoingOn]:
    """By condition: what went on before and has not ended, and what holds ``so_now``."""
    at_s = look.found.monotonic_s
    kept = {key: each for key, each in story.going_on.items() if key in so_now or at_s - each.last_s < each.lingers_s}
    for key, each in so_now.items():
        event = Event(look.time, "begins", each.severity, each.about, each.text, each.do)
        before = kept.get(key)
        kept[key] = GoingOn(at_s, at_s, each.lingers_s, event) if before is None else replace(before, last_s=at_s)
    return kept


def turns(story: Story, look: Look, going_on: Mapping[str, GoingOn]) -> Iterator[Event]:
    """What ends, in words of its beginning, and what begins."""
    for key, each in story.going_on.items():
        if key not in going_on:
            # At the first look without it, unless it lingered.
            ended_s = each.last_s if each.lingers_s else look.found.monotonic_s
            yield replace(each.begun, time=look.time, phase="ends", do=None, lasted_s=ended_s - each.since_s)
    for key, each in going_on.items():
        if key not in story.going_on:
            yield each.begun


_FAILURES: Mapping[str, str] = {
    "out_of_memory": "ran out of GPU memory",
    "broken": "its engine broke, and it starts afresh",
    "stuck": "an utterance did not end, and it starts afresh",
    "odd_piece": "spoke a piece again whose length did not fit its text",
    "recycled": "ended itself above a memory limit",
}


def happened(story: Story, look: Look, steps: Mapping[str, Sequence[Step]], fleet: Fleet) -> Iterator[Event]:
    """What has no duration: restarts, and failures of the engine."""
    at_s = look.found.monotonic_s
    for instance in fleet.instances:
        name = instance.name
        log = f"chatterbox-deploy logs {name}"
        if _restarted(story, look, instance):
            yield Event(look.time, "happens", "warning", name, "has restarted", log)
        for step in steps.get(name, ()):
            if step.ended_s != at_s:
                continue
            for kind, count in step.grown.by("chatterbox_engine_failures_total", "kind").items():
                if count:
                    often = "" if count == 1 else f" ({count:.0f} times)"
                    grave: Severity = "note" if kind == "odd_piece" else "warning"
                    text = f"{_FAILURES.get(kind, kind)}{often}"
                    yield Event(look.time, "happens", grave, name, text, log)


def _restarted(story: Story, look: Look, instance: Instance) -> bool:
    """Whether it is another process than the one that told before."""
    name = instance.name
    if name in look.counts and name in story.counts:
        before, now = (counted.value(exposition.STARTED) for counted in (story.counts[name][1], look.counts[name]))
        if before is not None and now is not None:
            return before != now
    if story.look is None or instance.name in look.found.readiness:
        return False
    # A server of the operator's own: by what systemd counts.
    was, is_now = rows.restarts(instance, story.look), rows.restarts(instance, look)
    return was is not None and is_now is not None and is_now > was
