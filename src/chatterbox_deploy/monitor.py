"""What a fleet does from one look to the next: its picture, its events, its curves. Decides; asks nobody."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from statistics import quantiles
from typing import TYPE_CHECKING

from chatterbox_deploy import conditions, exposition, status, systemd
from chatterbox_deploy.fleet import SPEECH_ROUTES
from chatterbox_deploy.picture import FRONT, WINDOW_S, Event, Front, FrontRow, GpuRow, InstanceRow, Picture

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from datetime import datetime

    from chatterbox_deploy.conditions import Condition, Limits
    from chatterbox_deploy.exposition import Exposition
    from chatterbox_deploy.fleet import Fleet, Instance
    from chatterbox_deploy.gpu.cards import Card
    from chatterbox_deploy.nginx import Request
    from chatterbox_deploy.picture import Severity

HISTORY_S = 600.0
"""For which curves are kept."""

LATEST = 100
"""Events that are kept."""

REQUESTS = "chatterbox_requests_total"
OUTCOMES = ("answered", "refused", "busy", "failed", "left", "cut")
"""Of a request, as the instances' own help of that metric explains them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What a host told at one moment."""

    time: datetime
    found: status.Found
    """Its ``monotonic_s`` is when."""

    counts: Mapping[str, Exposition] = field(default_factory=dict)
    """What each instance has counted; of those that told."""

    cards: tuple[Card, ...] | None = None
    """``None`` where there is no GPU, or nobody who tells of it."""

    requests: tuple[Request, ...] | None = None
    """New in the front's log; ``None`` where that cannot be read."""

    notes: tuple[str, ...] = ()
    """What could not be asked, and why."""


@dataclass(frozen=True, slots=True)
class Step:
    """What an instance counted between two looks."""

    ended_s: float
    seconds: float
    grown: Exposition


@dataclass(frozen=True, slots=True)
class GoingOn:
    """What has begun and not ended."""

    since_s: float
    last_s: float
    """When it was so last."""

    lingers_s: float
    begun: Event


@dataclass(frozen=True, slots=True)
class Story:
    """Everything that the next look is compared with."""

    look: Look | None = None
    picture: Picture | None = None
    counts: Mapping[str, tuple[float, Exposition]] = field(default_factory=dict)
    """When each instance last told what it has counted, and what that was."""

    steps: Mapping[str, tuple[Step, ...]] = field(default_factory=dict)
    requests: tuple[Request, ...] | None = None
    """Of the window."""

    events: tuple[Event, ...] = ()
    """The latest, in order."""

    going_on: Mapping[str, GoingOn] = field(default_factory=dict)
    """By condition."""

    seen_gpus: tuple[str, ...] = ()
    curves: tuple[tuple[float, Mapping[str, float]], ...] = ()
    """(when, quantities by name): ``gpu 0``, ``instance gpu0``, ``front``, ``audio``."""


def follow(story: Story, look: Look, fleet: Fleet, allowed: Limits) -> Story:
    """The story with one more look."""
    at_s = look.found.monotonic_s
    steps, counts = _count(story, look)
    requests = _in_window(story, look)
    gpus = None if look.cards is None else tuple(_gpu_row(card) for card in look.cards)
    instances = tuple(_instance_row(instance, look, steps.get(instance.name, ())) for instance in fleet.instances)
    front = _front(fleet, look, requests)
    seen = tuple(sorted({*story.seen_gpus, *(row.gpu for row in gpus or ())}))
    so_now = {
        **dict(conditions.of_gpus(gpus or (), seen, story.going_on, allowed)),
        **dict(conditions.of_instances(fleet, instances, allowed)),
        **dict(conditions.of_front(front, allowed)),
    }
    going_on = _going_on(story, look, so_now)
    new = (*_happened(story, look, steps, fleet), *_turns(story, look, going_on))
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
    point = (at_s, dict(_quantities(story, look, gpus, steps)))
    return Story(
        look=look,
        picture=picture,
        counts=counts,
        steps=steps,
        requests=requests,
        events=(*story.events, *new)[-LATEST:],
        going_on=going_on,
        seen_gpus=seen,
        curves=(*(kept for kept in story.curves if kept[0] > at_s - HISTORY_S), point),
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


def _gpu_row(card: Card) -> GpuRow:
    return GpuRow(
        gpu=card.index,
        uuid=card.uuid or None,
        name=card.name,
        memory_used_bytes=card.memory_used_bytes,
        memory_total_bytes=card.memory_total_bytes,
        utilisation_percent=card.utilisation_percent,
        sm_active_percent=card.sm_active_percent,
        temperature_c=card.temperature_c,
        power_w=card.power_w,
        power_limit_w=card.power_limit_w,
        p_state=card.p_state,
        throttled_by=card.throttled_by,
    )


def _instance_row(instance: Instance, look: Look, steps: Sequence[Step]) -> InstanceRow:
    readiness = look.found.readiness.get(instance.name)
    counted = look.counts.get(instance.name)
    # Of one that does not tell now, what it did a while ago is no answer.
    grown = exposition.add(step.grown for step in steps) if steps and counted is not None else None
    seconds = sum(step.seconds for step in steps) if grown is not None else None

    def rate(name: str) -> float | None:
        total = None if grown is None else grown.total(name)
        return None if total is None or not seconds else total / seconds

    audio, synthesis = rate("chatterbox_audio_seconds_total"), rate("chatterbox_synthesis_seconds_total")
    tokens = rate("chatterbox_speech_tokens_total")
    first_byte = "chatterbox_time_to_first_byte_seconds"
    return InstanceRow(
        instance=instance.name,
        gpus=instance.gpus,
        port=look.found.places.get(instance.name, (instance.host, instance.port))[1],
        unit=_unit(instance, look),
        ready=_ready(instance, look),
        waiting=None if readiness is None else readiness.waiting,
        running=None if readiness is None else readiness.running,
        restarts=_restarts(instance, look),
        window_s=seconds,
        requests_per_s=None if grown is None or not seconds else sum(_outcomes(grown).values()) / seconds,
        wait_s=None if grown is None else exposition.mean(grown, "chatterbox_queue_wait_seconds"),
        first_byte_s=None if grown is None else exposition.mean(grown, first_byte),
        first_byte_p95_s=None if grown is None else exposition.quantile(grown, first_byte, 0.95),
        rtf=synthesis / audio if synthesis is not None and audio else None,
        audio_s_per_s=audio,
        tokens_per_s=tokens / synthesis if tokens is not None and synthesis else None,
        busy_percent=None if synthesis is None else 100 * synthesis,
        outcomes=None if counted is None else _outcomes(counted),
        gpu_memory_bytes=None if readiness is None else readiness.gpu_memory_bytes,
    )


def _unit(instance: Instance, look: Look) -> str | None:
    unit = (look.found.units or {}).get(systemd.unit_name(instance.name))
    if unit is None or (unit.load == "not-found" and unit.active == "inactive"):
        return None
    return f"{unit.active}/{unit.sub}"


def _ready(instance: Instance, look: Look) -> str | None:
    if instance.name not in look.found.readiness:
        return None
    readiness = look.found.readiness[instance.name]
    if readiness is None:
        return "no answer"
    if readiness.draining:
        return "draining"
    return "ready" if readiness.ready else "not ready"


def _restarts(instance: Instance, look: Look) -> int | None:
    """As systemd counts them; else as the instance does."""
    unit = (look.found.units or {}).get(systemd.unit_name(instance.name))
    if unit is not None and unit.load != "not-found" and unit.restarts is not None:
        return unit.restarts
    counted = look.counts.get(instance.name)
    told = None if counted is None else counted.value("chatterbox_restarts")
    return None if told is None else int(told)


def _outcomes(counted: Exposition) -> dict[str, int]:
    """Requests to speak by outcome, in our order; one that never happened has no series, and is 0."""
    by = counted.only(REQUESTS, "route", SPEECH_ROUTES).by(REQUESTS, "outcome")
    return {outcome: int(by.get(outcome, 0)) for outcome in (*OUTCOMES, *sorted(set(by) - set(OUTCOMES)))}


def _front(fleet: Fleet, look: Look, requests: Sequence[Request] | None) -> Front:
    unit = (look.found.units or {}).get(systemd.NGINX_UNIT)
    known = unit is not None and unit.load != "not-found"
    return Front(
        listen=fleet.front.listen,
        answers=look.found.front_answers,
        nginx=unit.active if known and unit is not None else None,
        requests=None if requests is None else len(requests),
        errors=None if requests is None else sum(_is_error(request) for request in requests),
        refused=None if requests is None else sum(request.status == 503 for request in requests),
        retried=None if requests is None else sum(len(request.asked) > 1 for request in requests),
        rows=None if requests is None else tuple(_front_rows(fleet, look, requests)),
    )


def _is_error(request: Request) -> bool:
    return request.status >= 500 and request.status != 503


def _front_rows(fleet: Fleet, look: Look, requests: Sequence[Request]) -> Iterator[FrontRow]:
    addresses = {f"{instance.host}:{instance.port}": instance.name for instance in fleet.instances}
    addresses |= {f"{host}:{port}": name for name, (host, port) in look.found.places.items()}
    in_vain = Counter(addresses.get(address, address) for request in requests for address, _ in request.asked[:-1])
    answered: dict[str, list[Request]] = {instance.name: [] for instance in fleet.instances}
    for request in requests:
        answered.setdefault(request.instance or FRONT, []).append(request)
    for name in [*answered, *sorted(set(in_vain) - set(answered))]:
        own = answered.get(name, [])
        p50_s, p95_s = _percentiles([request.duration_s for request in own])
        yield FrontRow(
            instance=name,
            requests=len(own),
            share_percent=100 * len(own) / len(requests) if requests else None,
            errors=sum(_is_error(request) for request in own),
            refused=sum(request.status == 503 for request in own),
            passed_on=in_vain[name],
            p50_s=p50_s,
            p95_s=p95_s,
        )


def _percentiles(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The 50th and the 95th."""
    if len(values) < 2:
        return (values[0], values[0]) if values else (None, None)
    cuts = quantiles(values, n=20, method="inclusive")
    return cuts[9], cuts[18]


# Events


def _going_on(story: Story, look: Look, so_now: Mapping[str, Condition]) -> dict[str, GoingOn]:
    at_s = look.found.monotonic_s
    kept = {key: each for key, each in story.going_on.items() if key in so_now or at_s - each.last_s < each.lingers_s}
    for key, each in so_now.items():
        event = Event(look.time, "begins", each.severity, each.about, each.text, each.do)
        before = kept.get(key)
        kept[key] = GoingOn(at_s, at_s, each.lingers_s, event) if before is None else replace(before, last_s=at_s)
    return kept


def _turns(story: Story, look: Look, going_on: Mapping[str, GoingOn]) -> Iterator[Event]:
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


def _happened(story: Story, look: Look, steps: Mapping[str, Sequence[Step]], fleet: Fleet) -> Iterator[Event]:
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
    was, is_now = _restarts(instance, story.look), _restarts(instance, look)
    return was is not None and is_now is not None and is_now > was


# Curves


def _quantities(
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
