"""Whom a benchmark asks: the front, one instance, each of them, or more and more of them. Asks nobody.

A subset of the instances is asked directly, each request going to whoever has the fewest of ours, as ``least_conn``
does: the front itself knows only the whole fleet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatterbox_deploy import client
from chatterbox_deploy.errors import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from chatterbox_deploy.fleet import Fleet, Instance


@dataclass(frozen=True, slots=True)
class Door:
    """One address that takes requests."""

    name: str
    url: str
    """Without a path: ``http://127.0.0.1:6093``."""

    host: str | None = None
    """The name that it answers to, where that is not in the URL."""

    verified: bool = True
    """Whether its certificate has to be for the name in the URL."""

    by_itself: bool | None = None
    """Whether one instance is behind it, whose answers are then its own; ``None`` until somebody has looked."""

    here: bool = True
    """Whether it is of a fleet file, of which ``status`` tells."""


@dataclass(frozen=True, slots=True)
class Aim:
    """Whom one trial asks."""

    label: str
    doors: tuple[Door, ...]
    """Where its requests go."""

    instances: tuple[Door, ...]
    """Who may answer, each with /metrics of its own."""

    gpus: int | None
    """GPUs they have together; ``None`` where no fleet file says."""


def front(fleet: Fleet) -> Aim:
    """The whole fleet, as its clients have it."""
    # Its certificate is for the name that clients use, and we ask by address.
    door = Door("front", fleet.front.local_url, fleet.front.server_name, verified=False, by_itself=False)
    return Aim("front", (door,), tuple(_door(instance) for instance in fleet.instances), _gpus(fleet.instances))


def each(instances: Sequence[Instance]) -> tuple[Aim, ...]:
    """One after the other, each by itself."""
    return tuple(_of((instance,), instance.name) for instance in instances)


def together(instances: Sequence[Instance]) -> Aim:
    """Some of them at once, without the front."""
    label = instances[0].name if len(instances) == 1 else " + ".join(instance.name for instance in instances)
    return _of(instances, label)


def growing(instances: Sequence[Instance], by: str) -> tuple[Aim, ...]:
    """1, 2, 4, … up to all ``instances``, or those of so many GPUs (``by`` is "instances" or "gpus")."""
    groups: dict[tuple[str, ...], list[Instance]] = {}
    for instance in instances:
        groups.setdefault(instance.gpus if by == "gpus" else (instance.name,), []).append(instance)
    listed = list(groups.values())
    aims = []
    for count in _doubling(len(listed)):
        members = [instance for group in listed[:count] for instance in group]
        what = by if count > 1 else by.removesuffix("s")
        aims.append(_of(members, f"{count} {what.replace('gpu', 'GPU')}", counted_in_gpus=by == "gpus"))
    return tuple(aims)


def at(urls: Iterable[str]) -> tuple[Door, ...]:
    """Servers that are in no fleet file.

    Raises:
        BenchmarkError: one is no address of a server.
    """
    doors, problems = [], []
    for url in urls:
        found = client.base_url(url)
        if found is None:
            meant = f"http://{url}"
            problems.append(
                f"--url: cannot ask {url!r}; write it as {meant if client.base_url(meant) else 'http://127.0.0.1:6093'}"
            )
        else:
            doors.append(Door(found.partition("://")[2], found, here=False))
    names = [door.name for door in doors]
    problems += [f"--url: {name} is there twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    if problems:
        raise BenchmarkError(problems)
    return tuple(doors)


def of_doors(doors: Sequence[Door], by: str | None) -> tuple[Aim, ...]:
    """All of them together; 1, 2, 4, … of them; or each (``by`` is None, "instances" or "each")."""
    if by == "each":
        return tuple(Aim(door.name, (door,), (door,), None) for door in doors)
    counts = [len(doors)] if by is None else _doubling(len(doors))
    return tuple(
        Aim(doors[0].name if count == 1 else f"{count} instances", tuple(doors[:count]), tuple(doors[:count]), None)
        for count in counts
    )


def _doubling(most: int) -> list[int]:
    counts = [1]
    while counts[-1] * 2 < most:
        counts.append(counts[-1] * 2)
    return counts if most == 1 else [*counts, most]


def _of(instances: Sequence[Instance], label: str, *, counted_in_gpus: bool = True) -> Aim:
    doors = tuple(_door(instance) for instance in instances)
    return Aim(label, doors, doors, _gpus(instances) if counted_in_gpus else None)


def _door(instance: Instance) -> Door:
    return Door(instance.name, f"http://{instance.host}:{instance.port}", by_itself=True)


def _gpus(instances: Iterable[Instance]) -> int:
    return len({gpu for instance in instances for gpu in instance.gpus})
