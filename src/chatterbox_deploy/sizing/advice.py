"""How many instances a GPU should have, by a small queueing model of what was measured. Decides; asks nobody.

Instances that speak all the time are the customers of a closed network: part of an instance's time passes on its own
core and on the GPU beside the others, the rest on the GPU alone, where one waits for the other. docs/replicas.md has
the formulas, and how far they are from the measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from chatterbox_deploy.config.values import MAX_INSTANCES_PER_GPU

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatterbox_deploy.sizing.profile import Point, Profile

GROWTH = 1.25
"""Memory of an instance over what it had after 10 s of speech: longer texts and more voices need more."""

RESERVED_CORES = 1
"""For nginx, and the rest of the machine."""

CORES_EACH = 1.0
"""Of an instance that speaks all the time, where nobody counted: one core launches its kernels."""

SATURATED = 0.95
"""More instances are not worth it once so much of the best rate is reached."""

LOAD = 0.8
"""Share of the best rate at which waits are compared."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What a second of sound asks for."""

    time_s: float
    """Seconds it takes one instance that is alone."""

    exclusive: float
    """Share of them in which the GPU can serve nobody else, 0 to 1."""


def rate(demand: Demand, replicas: int) -> float:
    """Seconds of sound per second of so many instances, cores enough: exact mean value analysis of a closed network.

    One station with a queue (Reiser and Lavenberg, "Mean-value analysis of closed multichain queuing networks", 1980).
    """
    alone = demand.exclusive * demand.time_s
    elsewhere = demand.time_s - alone
    queue, throughput = 0.0, 0.0
    for customers in range(1, replicas + 1):
        passage = alone * (1 + queue)
        throughput = customers / (elsewhere + passage)
        queue = throughput * passage
    return throughput


def fit(points: Sequence[Point]) -> Demand:
    """The demand whose rates come nearest to the points, by the squares of relative errors."""
    best, least = Demand(1.0, 0.0), float("inf")
    for step in range(201):
        exclusive = step / 200
        shapes = [rate(Demand(1.0, exclusive), point.replicas) / point.audio_s_per_s for point in points]
        scale = sum(shapes) / sum(shape**2 for shape in shapes)
        error = sum((shape * scale - 1) ** 2 for shape in shapes)
        if error < least:
            best, least = Demand(1 / scale, exclusive), error
    return best


def wait_s(replicas: int, service_s: float, load: float) -> float:
    """Mean wait before a turn at so many equal servers: Erlang's C, for requests that come at random (M/M/n)."""
    offered = load * replicas
    term = total = 1.0
    for servers in range(1, replicas):
        term *= offered / servers
        total += term
    last = term * offered / replicas / (1 - load)
    return last / (total + last) * service_s / (replicas * (1 - load))


@dataclass(frozen=True, slots=True)
class Row:
    """So many instances on one GPU."""

    replicas: int
    mps: bool
    audio_s_per_s: float
    gain: float
    """Over one instance."""

    latency_s: float
    """To speak one utterance while all the others speak, too."""

    wait_s: float
    """Mean wait for its turn before that, at ``LOAD``."""

    gpu_memory_bytes: int
    cores: float
    fits: bool
    """Whether memory and cores are there."""

    measured: float | None
    """``audio_s_per_s`` as measured; ``None`` where nobody did."""


@dataclass(frozen=True, slots=True)
class Advice:
    """For one GPU."""

    rows: tuple[Row, ...]
    best: Row | None
    """``None`` where not even one fits."""

    memory_holds: int | None
    cores_carry: int
    measured_up_to: int
    scaled_from: str | None
    """The model whose instances were seen to share a GPU, where this one's were not."""

    pipeline: float | None
    """Rate of an instance whose T3 and S3Gen work at the same time, over one that has them take turns: at most this,
    on one GPU by two streams or over two GPUs. ``None`` where nobody knows T3's share."""

    long_text: float | None
    """The same for the time of one text of ``PIECES`` pieces alone. One of a single piece gains nothing."""


PIECES = 10


def throughput(profile: Profile, reference: Profile, *, replicas: int, mps: bool, cores: float | None) -> float:
    """Seconds of sound per second of so many instances on one GPU; ``cores`` is ``None`` where they are no limit."""
    seen = profile if any(point.replicas > 1 for point in profile.points) else reference
    # One alone has nobody to share with, and is reckoned as without MPS.
    demand = _demand(profile, seen, mps=mps and replicas > 1)
    slowed = 1.0 if cores is None else min(1.0, cores / (replicas * _cores_each(seen)))
    return rate(demand, replicas) * slowed


def advise(
    profile: Profile, reference: Profile, *, memory_bytes: int | None, cores: float, utterance_s: float
) -> Advice:
    """How many instances of the profile's model to run on a GPU of that memory with so many cores for it.

    ``reference`` lends its way of sharing a GPU where the profile has one instance only. ``memory_bytes`` is ``None``
    where nobody knows; then memory is no limit.
    """
    shared = any(point.replicas > 1 for point in profile.points)
    seen = profile if shared else reference
    each = round(profile.gpu_memory_bytes * GROWTH)
    cores_each = _cores_each(seen)
    holds = None if memory_bytes is None else memory_bytes // each
    # A GPU is worth one instance however few the cores: it is slower where it has no whole one, and reckoned so.
    carry = max(1, int((cores - RESERVED_CORES) / cores_each))
    measured_up_to = max(point.replicas for point in seen.points)
    demands = {mps: _demand(profile, seen, mps=mps) for mps in (False, True)}
    base = rate(demands[False], 1)
    rows: list[Row] = []
    for replicas in _ladder(max(measured_up_to, min(carry, holds or carry, 2 * measured_up_to))):
        for mps in (False, True) if replicas > 1 else (False,):
            slowed = min(1.0, cores / (replicas * cores_each))
            reached = rate(demands[mps], replicas) * slowed
            service_s = utterance_s * replicas / reached
            rows.append(
                Row(
                    replicas=replicas,
                    mps=mps,
                    audio_s_per_s=reached,
                    gain=reached / base,
                    latency_s=service_s,
                    wait_s=wait_s(replicas, service_s, LOAD),
                    gpu_memory_bytes=replicas * each,
                    cores=replicas * cores_each,
                    fits=replicas <= min(carry, replicas if holds is None else holds, MAX_INSTANCES_PER_GPU),
                    measured=_measured(profile, replicas, mps=mps),
                )
            )
    return Advice(
        rows=tuple(rows),
        best=_best(rows, measured_up_to),
        memory_holds=holds,
        cores_carry=carry,
        measured_up_to=measured_up_to,
        scaled_from=None if shared else seen.model,
        pipeline=None if profile.t3_share is None else 1 / max(profile.t3_share, 1 - profile.t3_share),
        long_text=None if profile.t3_share is None else _long_text(profile.t3_share),
    )


def _long_text(t3_share: float) -> float:
    """Of ``PIECES`` equal pieces, one stage works at the next piece while the other finishes the last."""
    slow, fast = max(t3_share, 1 - t3_share), min(t3_share, 1 - t3_share)
    return PIECES / (PIECES * slow + fast)


@cache
def _demand(profile: Profile, seen: Profile, *, mps: bool) -> Demand:
    """As fitted; where nobody measured this way of sharing, as the other way, which is the safe side."""
    points = [point for point in seen.points if point.mps == mps]
    fitted = fit(points if any(point.replicas > 1 for point in points) else seen.points)
    if seen is profile:
        return fitted
    return Demand(fit(profile.points).time_s, fitted.exclusive)


def _cores_each(profile: Profile) -> float:
    counted = [point.cores / point.replicas for point in profile.points if point.cores is not None]
    return max(counted, default=CORES_EACH)


def _measured(profile: Profile, replicas: int, *, mps: bool) -> float | None:
    found = [each.audio_s_per_s for each in profile.points if (each.replicas, each.mps) == (replicas, mps)]
    return found[0] if found else None


def _ladder(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16: as far as ``most``."""
    return [count for count in (1, 2, 3, 4, 6, 8, 12, 16) if count <= max(1, min(most, MAX_INSTANCES_PER_GPU))]


def _best(rows: Sequence[Row], measured_up_to: int) -> Row | None:
    """The fewest that come near the best rate; never more than somebody measured."""
    able = [row for row in rows if row.fits and row.replicas <= measured_up_to]
    highest = max((row.audio_s_per_s for row in able), default=0.0)
    return next((row for row in able if row.audio_s_per_s >= SATURATED * highest), None)
