"""One more look at a fleet: the story goes on with what it shows, its events, its curves. Decides; asks nobody."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatterbox_deploy import exposition
from chatterbox_deploy.monitor import conditions, curves, events, rows
from chatterbox_deploy.monitor.picture import WINDOW_S, Picture
from chatterbox_deploy.monitor.story import Step, Story

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chatterbox_deploy.exposition import Exposition
    from chatterbox_deploy.fleet import Fleet
    from chatterbox_deploy.monitor.conditions import Limits
    from chatterbox_deploy.monitor.picture import Severity
    from chatterbox_deploy.monitor.story import Look
    from chatterbox_deploy.nginx import Request

LATEST = 100
"""Events that are kept."""


def follow(story: Story, look: Look, fleet: Fleet, allowed: Limits) -> Story:
    """The story with one more look."""
    at_s = look.found.monotonic_s
    steps, counts = _count(story, look)
    requests = _in_window(story, look)
    gpus = None if look.cards is None else tuple(rows.gpu_row(card) for card in look.cards)
    instances = tuple(rows.instance_row(instance, look, steps.get(instance.name, ())) for instance in fleet.instances)
    front = rows.front(fleet, look, requests)
    seen = tuple(sorted({*story.seen_gpus, *(row.gpu for row in gpus or ())}))
    so_now = {
        **dict(conditions.of_gpus(gpus or (), seen, story.going_on, allowed)),
        **dict(conditions.of_instances(fleet, instances, allowed)),
        **dict(conditions.of_front(front, allowed)),
    }
    going_on = events.going_on(story, look, so_now)
    new = (*events.happened(story, look, steps, fleet), *events.turns(story, look, going_on))
    told = [row.audio_s_per_s for row in instances if row.audio_s_per_s is not None]
    picture = Picture(
        time=look.time,
        monotonic_s=at_s,
        window_s=max((row.window_s for row in instances if row.window_s is not None), default=None),
        gpus=gpus,
        instances=instances,
        front=front,
        audio_s_per_s=sum(told) if told else None,
        now=tuple(sorted((each.begun for each in going_on.values()), key=lambda event: _GRAVITY[event.severity])),
        new=new,
        notes=look.notes,
    )
    point = (at_s, dict(curves.quantities(story, look, gpus, steps)))
    return Story(
        look=look,
        picture=picture,
        counts=counts,
        steps=steps,
        requests=requests,
        events=(*story.events, *new)[-LATEST:],
        going_on=going_on,
        seen_gpus=seen,
        curves=(*(kept for kept in story.curves if kept[0] > at_s - curves.HISTORY_S), point),
    )


_GRAVITY: Mapping[Severity, int] = {"critical": 0, "warning": 1, "note": 2}


def _count(story: Story, look: Look) -> tuple[dict[str, tuple[Step, ...]], dict[str, tuple[float, Exposition]]]:
    """The window's steps of each instance with the newest, and what was counted last."""
    at_s = look.found.monotonic_s
    steps: dict[str, tuple[Step, ...]] = {}
    counts = dict(story.counts)
    for name in {*story.steps, *look.counts}:
        kept = [step for step in story.steps.get(name, ()) if step.ended_s > at_s - WINDOW_S]
        if name in look.counts:
            if name in counts:
                before_s, before = counts[name]
                kept.append(Step(at_s, at_s - before_s, exposition.increase(before, look.counts[name])))
            counts[name] = (at_s, look.counts[name])
        steps[name] = tuple(kept)
    return steps, counts


def _in_window(story: Story, look: Look) -> tuple[Request, ...] | None:
    if look.requests is None:
        return None
    requests = (*(story.requests or ()), *look.requests)
    return tuple(request for request in requests if (look.time - request.ended).total_seconds() <= WINDOW_S)
