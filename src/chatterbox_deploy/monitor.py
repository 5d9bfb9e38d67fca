"""What a fleet does from one look to the next: rows, events, curves. Decides; asks nobody, prints nothing.

Whatever happens in time is told of a window: of the last ``WINDOW_S`` seconds, or of as many as were seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from statistics import quantiles
from typing import TYPE_CHECKING, Any, Literal

from chatterbox_deploy import exposition, status, systemd
from chatterbox_deploy.exposition import Exposition, Gauge
from chatterbox_deploy.fleet import SPEECH_ROUTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime

    from chatterbox_deploy.cards import Card
    from chatterbox_deploy.fleet import Fleet, Instance
    from chatterbox_deploy.nginx import Request

WINDOW_S = 60.0
HISTORY_S = 600.0
"""For which curves are kept."""

LATEST = 100
"""Events that are kept."""

Severity = Literal["critical", "warning", "note"]
Phase = Literal["begins", "ends", "happens"]

FRONT = "front"
ADVISE = "chatterbox-deploy advise"
REQUESTS = "chatterbox_requests_total"
OUTCOMES = ("answered", "refused", "busy", "failed", "left", "cut")
"""Of a request, as the instances' own help of that metric explains them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Beyond which something is an event."""

    temperature_c: float = 85.0
    """Of a GPU. NVIDIA's data center cards slow themselves down from 83 to 90 °C on, by model."""

    gpu_memory_percent: float = 95.0
    rtf: float = 1.0
    """Seconds of synthesis per second of sound; above 1 a listener waits."""

    wait_s: float = 10.0
    """Mean wait for the engine, of one instance."""

    error_percent: float = 1.0
    """Of the front's answers, 5xx other than 503, which only says that all queues are full."""

    refused_percent: float = 5.0
    """Of the front's answers, 503."""


def limits(given: Mapping[str, str]) -> Limits:
    """The defaults, but for those that are given, as an operator types them.

    Raises:
        ValueError: there is no such limit, or it is no number.
    """
    names = [each.name for each in fields(Limits)]
    numbers: dict[str, float] = {}
    for name, text in given.items():
        if name not in names:
            msg = f"there is no limit {name!r}; there are {', '.join(names)}"
            raise ValueError(msg)
        try:
            numbers[name] = float(text)
        except ValueError:
            msg = f"{name} should be a number, got {text!r}; write it like temperature_c=80"
            raise ValueError(msg) from None
    return Limits(**numbers)


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
class GpuRow:
    """One GPU now. ``None`` is unknown, never 0."""

    gpu: str
    """Its index, as nvidia-smi counts."""

    uuid: str | None
    name: str
    """Of one that does not answer: the reason."""

    memory_used_bytes: int | None
    memory_total_bytes: int | None
    utilisation_percent: float | None
    sm_active_percent: float | None
    temperature_c: float | None
    power_w: float | None
    power_limit_w: float | None
    p_state: str | None
    throttled_by: tuple[str, ...] | None

    @property
    def memory_percent(self) -> float | None:
        if self.memory_used_bytes is None or not self.memory_total_bytes:
            return None
        return 100 * self.memory_used_bytes / self.memory_total_bytes


@dataclass(frozen=True, slots=True)
class InstanceRow:
    """One instance now, and in the window. ``None`` is unknown, never 0."""

    instance: str
    gpus: tuple[str, ...]
    port: int
    unit: str | None
    """``ActiveState/SubState``; ``None`` where systemd knows no such unit, as below ``up``."""

    ready: str | None
    """``ready``, ``draining``, ``not ready``, ``no answer``; ``None`` for a server that does not tell."""

    waiting: int | None
    running: int | None
    restarts: int | None
    window_s: float | None
    """How long was seen of what follows."""

    requests_per_s: float | None
    """To speak."""

    wait_s: float | None
    """Mean from admission until the engine began; ``None``, as all that follow, where there was nothing to measure."""

    first_byte_s: float | None
    """Mean from arrival until the first sound was sent."""

    first_byte_p95_s: float | None
    rtf: float | None
    audio_s_per_s: float | None
    tokens_per_s: float | None
    """Of speech, while the engine worked; ``None`` too where the engine counts none."""

    busy_percent: float | None
    """Share of time in which the engine spoke; above 100 where it speaks several at a time."""

    outcomes: Mapping[str, int] | None
    """Requests to speak by outcome since the process started."""

    gpu_memory_bytes: int | None

    @property
    def lost(self) -> bool:
        """Whether it can speak for nobody, as far as is known."""
        down = self.unit is not None and not self.unit.startswith("active/")
        return self.ready == "no answer" or (self.ready is None and down)


@dataclass(frozen=True, slots=True)
class FrontRow:
    """What the front's log tells of one instance in the window, or of what nginx answered by itself (``front``)."""

    instance: str
    requests: int
    """That it answered last, well or not."""

    share_percent: float | None
    errors: int
    """Of these, 5xx without 503."""

    refused: int
    """Of these, 503: nobody had room, and this one was asked last."""

    passed_on: int
    """Requests that it was asked for in vain, and another one after it."""

    p50_s: float | None
    p95_s: float | None


@dataclass(frozen=True, slots=True)
class Front:
    """The front, and what it answered in the window."""

    listen: str
    answers: bool | None
    nginx: str | None
    """ActiveState of the host's nginx; ``None`` where systemd knows none."""

    requests: int | None
    errors: int | None
    """5xx without 503."""

    refused: int | None
    """503: nobody had room."""

    retried: int | None
    """Requests for which more than one instance was asked."""

    rows: tuple[FrontRow, ...] | None


@dataclass(frozen=True, slots=True)
class Event:
    """Something that begins, ends, or happens once."""

    time: datetime
    phase: Phase
    severity: Severity
    about: str
    """An instance, ``GPU 0``, or ``front``."""

    text: str
    do: str | None
    """What to type."""

    lasted_s: float | None = None
    """Of one that ends."""


@dataclass(frozen=True, slots=True)
class Picture:
    """All that is shown of one moment."""

    time: datetime
    monotonic_s: float
    window_s: float | None
    """Seconds between the first and the last look of the window; ``None`` at the first look."""

    gpus: tuple[GpuRow, ...] | None
    instances: tuple[InstanceRow, ...]
    front: Front
    audio_s_per_s: float | None
    """Of all instances that told."""

    now: tuple[Event, ...]
    """What has begun and not ended, the gravest first."""

    new: tuple[Event, ...]
    """What began, ended or happened since the last look."""

    notes: tuple[str, ...]

    @property
    def well(self) -> bool:
        """Whether nothing critical goes on."""
        return not any(event.severity == "critical" for event in self.now)

    def as_json(self) -> dict[str, Any]:
        """The same for programs: bytes, seconds, percent; ``null`` is unknown."""

        def told(event: Event) -> dict[str, Any]:
            return {**asdict(event), "time": event.time.isoformat(timespec="milliseconds")}

        said: dict[str, Any] = _rounded(
            {
                "time": self.time.isoformat(timespec="milliseconds"),
                "well": self.well,
                "window_s": self.window_s,
                "audio_s_per_s": self.audio_s_per_s,
                "gpus": None if self.gpus is None else [asdict(row) for row in self.gpus],
                "instances": [asdict(row) for row in self.instances],
                "front": asdict(self.front),
                "now": [told(event) for event in self.now],
                "events": [told(event) for event in self.new],
                "notes": list(self.notes),
            }
        )
        return said


def _rounded(value: Any) -> Any:
    """Four places are more than was measured."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list | tuple) else value


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
    conditions = {
        **dict(_gpu_conditions(gpus or (), seen, story.going_on, allowed)),
        **dict(_instance_conditions(fleet, instances, allowed)),
        **dict(_front_conditions(front, allowed)),
    }
    going_on = _going_on(story, look, conditions)
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


@dataclass(frozen=True, slots=True)
class _Condition:
    severity: Severity
    about: str
    text: str
    do: str | None = None
    lingers_s: float = 0.0
    """For how long it may be absent and still goes on: what comes and goes with every look is one event."""


LINGERS_S = 10.0


# What is so now, by a key that stays the same while it lasts.
_Conditions = Iterator[tuple[str, _Condition]]


def _gpu_conditions(
    gpus: Sequence[GpuRow], seen: Sequence[str], going_on: Mapping[str, object], allowed: Limits
) -> _Conditions:
    for gpu in seen:
        if gpu not in {row.gpu for row in gpus if row.uuid is not None}:
            yield f"gpu {gpu} lost", _Condition("critical", f"GPU {gpu}", "does not answer any more", "dmesg")
    for row in gpus:
        about = f"GPU {row.gpu}"
        hot = f"gpu {row.gpu} hot"
        # Some degrees lower at the end than at the beginning, or it would begin and end all the time.
        limit_c = allowed.temperature_c - (3 if hot in going_on else 0)
        if row.temperature_c is not None and row.temperature_c >= limit_c:
            yield (
                hot,
                _Condition("warning", about, f"is hot: {row.temperature_c:.0f} °C", "nvidia-smi -q -d TEMPERATURE"),
            )
        for reason in row.throttled_by or ():
            # At its power limit a busy card is where it should be: worth knowing, and no alarm.
            grave: Severity = "note" if reason == "sw_power_cap" else "warning"
            text = f"is slowed down: {reason}"
            yield f"gpu {row.gpu} {reason}", _Condition(grave, about, text, "nvidia-smi -q -d PERFORMANCE", LINGERS_S)
        if row.memory_percent is not None and row.memory_percent >= allowed.gpu_memory_percent:
            text = f"is full: {row.memory_percent:.0f} % of its memory is used"
            yield f"gpu {row.gpu} full", _Condition("warning", about, text, "nvidia-smi")


def _instance_conditions(fleet: Fleet, rows: Sequence[InstanceRow], allowed: Limits) -> _Conditions:
    for instance, row in zip(fleet.instances, rows, strict=True):
        name = row.instance
        log = f"chatterbox-deploy logs {name}"
        if row.lost:
            state = "" if row.unit is None else f", its unit is {row.unit}"
            yield f"{name} lost", _Condition("critical", name, f"does not answer{state}", log)
        if row.ready == "not ready":
            yield f"{name} not ready", _Condition("critical", name, "not ready: its engine is dead or stuck", log)
        if row.ready == "draining":
            yield f"{name} draining", _Condition("note", name, "ends, and finishes what it began")
        room = _queue_size(instance)
        if row.waiting is not None and room and row.waiting >= room:
            text = f"its queue is full: {row.waiting} wait"
            yield f"{name} full", _Condition("warning", name, text, ADVISE, LINGERS_S)
        if row.wait_s is not None and row.wait_s > allowed.wait_s:
            yield f"{name} waits", _Condition("warning", name, f"requests wait {row.wait_s:.1f} s for it", ADVISE)
        if row.rtf is not None and row.rtf > allowed.rtf:
            text = f"slower than the listener: {row.rtf:.2f} s for 1 s of sound"
            yield f"{name} slow", _Condition("warning", name, text, ADVISE)


def _queue_size(instance: Instance) -> int | None:
    told = instance.environment.get("CHATTERBOX_QUEUE_SIZE", "")
    return int(told) if told.isdigit() else None


def _front_conditions(front: Front, allowed: Limits) -> _Conditions:
    log = f"journalctl -u {systemd.NGINX_UNIT}"
    if front.answers is False:
        yield "front lost", _Condition("critical", FRONT, f"does not answer on {front.listen}", log)
    if not front.requests or front.errors is None or front.refused is None:
        return
    if (percent := 100 * front.errors / front.requests) >= allowed.error_percent:
        text = f"{percent:.1f} % of its answers are errors"
        yield "front errors", _Condition("critical", FRONT, text, "chatterbox-deploy status")
    if (percent := 100 * front.refused / front.requests) >= allowed.refused_percent:
        text = f"{percent:.1f} % of requests find every queue full"
        yield "front refuses", _Condition("warning", FRONT, text, ADVISE)


def _going_on(story: Story, look: Look, conditions: Mapping[str, _Condition]) -> dict[str, GoingOn]:
    at_s = look.found.monotonic_s
    kept = {
        key: each for key, each in story.going_on.items() if key in conditions or at_s - each.last_s < each.lingers_s
    }
    for key, each in conditions.items():
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


# For other programs


def table(picture: Picture) -> Iterator[tuple[str, str, str, float | str | None]]:
    """(what it is about, its name, quantity, value) of all that is shown: a line each of a CSV file."""
    about: list[tuple[str, str, object]] = [
        *(("gpu", row.gpu, row) for row in picture.gpus or ()),
        *(("instance", row.instance, row) for row in picture.instances),
        *(("front", row.instance, row) for row in picture.front.rows or ()),
    ]
    yield "fleet", "", "audio_s_per_s", _rounded(picture.audio_s_per_s)
    for quantity in ("requests", "errors", "refused", "retried"):
        yield "front", "", quantity, getattr(picture.front, quantity)
    for what, name, row in about:
        for each in fields(row):  # type: ignore[arg-type]  # the rows are dataclasses
            value = getattr(row, each.name)
            if each.name in ("gpu", "uuid", "instance", "gpus", "name", "outcomes"):
                continue
            yield what, name, each.name, "+".join(value) if isinstance(value, tuple) else _rounded(value)


PREFIX = "chatterbox_monitor_"


def gauges(picture: Picture) -> tuple[Gauge, ...]:
    """What node_exporter's textfile collector is given: that which no instance can tell of itself."""
    cards, rows = picture.gpus or (), picture.front.rows or ()

    def of_gpus(name: str, documentation: str, values: Iterable[float | None]) -> Gauge:
        series = [((row.gpu, row.name), value) for row, value in zip(cards, values, strict=True)]
        return Gauge(f"{PREFIX}gpu_{name}", documentation, ("gpu", "name"), series)

    def of_front(name: str, documentation: str, values: Iterable[int]) -> Gauge:
        series = [((row.instance,), value / WINDOW_S) for row, value in zip(rows, values, strict=True)]
        return Gauge(f"{PREFIX}front_{name}_per_second", documentation, ("instance_name",), series)

    window = f"over the last {WINDOW_S:.0f} s of the front's log"
    return (
        Gauge(
            f"{PREFIX}last_look_timestamp_seconds",
            "When the monitor last looked; when that is long ago, nothing below is true any more.",
            (),
            [((), picture.time.timestamp())],
        ),
        of_gpus("memory_used_bytes", "GPU memory in use, by whomever.", (row.memory_used_bytes for row in cards)),
        of_gpus("memory_total_bytes", "GPU memory there is.", (row.memory_total_bytes for row in cards)),
        of_gpus(
            "utilisation_ratio",
            "Share of time in which any kernel ran; a GPU of tiny kernels reads 1 and is nearly idle.",
            (_ratio(row.utilisation_percent) for row in cards),
        ),
        of_gpus(
            "sm_active_ratio", "Share of multiprocessors at work.", (_ratio(row.sm_active_percent) for row in cards)
        ),
        of_gpus("temperature_celsius", "Temperature of the GPU.", (row.temperature_c for row in cards)),
        of_gpus("power_watts", "Power it draws.", (row.power_w for row in cards)),
        of_gpus("power_limit_watts", "Power it may draw.", (row.power_limit_w for row in cards)),
        Gauge(
            f"{PREFIX}gpu_throttled",
            "1 for each reason that slows the GPU down now, as nvidia-smi names it (-q -d PERFORMANCE).",
            ("gpu", "name", "reason"),
            [((row.gpu, row.name, reason), 1) for row in cards for reason in row.throttled_by or ()],
        ),
        Gauge(
            f"{PREFIX}instance_up",
            "1 while the instance answers, or of a server that does not tell, while its unit is active; else 0.",
            ("instance_name",),
            [((row.instance,), _up(row)) for row in picture.instances],
        ),
        Gauge(
            f"{PREFIX}instance_restarts",
            "Restarts that nobody asked for, as systemd counts them.",
            ("instance_name",),
            [((row.instance,), row.restarts) for row in picture.instances],
        ),
        Gauge(
            f"{PREFIX}front_up",
            "1 while the front answers; else 0.",
            (),
            [((), None if picture.front.answers is None else float(picture.front.answers))],
        ),
        of_front("requests", f"Requests by who answered, {window}.", (row.requests for row in rows)),
        of_front("errors", f"Of these, those answered with 5xx but 503, {window}.", (row.errors for row in rows)),
        of_front("refused", f"Of these, those answered with 503, {window}.", (row.refused for row in rows)),
        of_front(
            "passed_on", f"Requests that this one was asked for in vain, {window}.", (row.passed_on for row in rows)
        ),
    )


def _ratio(percent: float | None) -> float | None:
    return None if percent is None else percent / 100


def _up(row: InstanceRow) -> float | None:
    if row.ready is None and row.unit is None:
        return None
    return float(not row.lost)
