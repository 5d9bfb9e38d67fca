"""One look, and what was counted in the window, as the rows of a picture: GPUs, instances, front. Asks nobody."""

from __future__ import annotations

from collections import Counter
from statistics import quantiles
from typing import TYPE_CHECKING

from chatterbox_deploy import exposition, systemd
from chatterbox_deploy.fleet import SPEECH_ROUTES
from chatterbox_deploy.monitor.picture import FRONT, Front, FrontRow, GpuRow, InstanceRow
from chatterbox_deploy.status.found import readiness_word

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chatterbox_deploy.exposition import Exposition
    from chatterbox_deploy.fleet import Fleet, Instance
    from chatterbox_deploy.gpu.cards import Card
    from chatterbox_deploy.monitor.story import Look, Step
    from chatterbox_deploy.nginx import Request

REQUESTS = "chatterbox_requests_total"
OUTCOMES = ("answered", "refused", "busy", "failed", "left", "cut")
"""Of a request, as the instances' own help of that metric explains them."""


def gpu_row(card: Card) -> GpuRow:
    """A GPU, as its driver tells."""
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


def instance_row(instance: Instance, look: Look, steps: Sequence[Step]) -> InstanceRow:
    """An instance: what it says of itself now, and what it counted in ``steps``, those of the window."""
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
        restarts=restarts(instance, look),
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
    return None if unit is None else unit.state


def _ready(instance: Instance, look: Look) -> str | None:
    if instance.name not in look.found.readiness:
        return None
    return readiness_word(look.found.readiness[instance.name])


def restarts(instance: Instance, look: Look) -> int | None:
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


def front(fleet: Fleet, look: Look, requests: Sequence[Request] | None) -> Front:
    """The front; ``requests`` are those of the window."""
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
