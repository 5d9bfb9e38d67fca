"""What is kept from one look at a fleet to the next, which is compared with it. Decides nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from chatterbox_deploy.exposition import Exposition
    from chatterbox_deploy.gpu.cards import Card
    from chatterbox_deploy.monitor.picture import Event, Picture
    from chatterbox_deploy.nginx import Request
    from chatterbox_deploy.status.found import Found


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What a host told at one moment."""

    time: datetime
    found: Found
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
