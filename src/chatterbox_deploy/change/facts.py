"""What a plan is made from: what is wanted of a host, and what is on it. Decides nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chatterbox_deploy import fleet, render

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import PurePosixPath

    from chatterbox_deploy.config.tables import FleetConfig
    from chatterbox_deploy.fleet import Fleet, Upstream
    from chatterbox_deploy.gpu.query import Gpu
    from chatterbox_deploy.render import RenderedFile
    from chatterbox_deploy.systemd import Mark
    from chatterbox_deploy.templates import Templates


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a host should hold: a fleet and its files, and how to write the texts that stand only for a while."""

    fleet: Fleet
    files: tuple[RenderedFile, ...]
    front: Callable[[Sequence[Upstream]], str]
    """The front with those behind it."""

    unit_on: Callable[[str, int], RenderedFile]
    """The unit of an instance (by name), were it on that port."""


def want(config: FleetConfig, templates: Templates, *, source: str) -> Wanted:
    """What ``config`` asks of a host.

    Raises:
        TemplateError: a template cannot be filled in.
    """
    resolved = fleet.resolve(config)

    def front(upstreams: Sequence[Upstream]) -> str:
        return render.front(resolved, templates, source=source, upstreams=upstreams)

    def unit_on(name: str, port: int) -> RenderedFile:
        before = next(instance.port for instance in resolved.instances if instance.name == name)
        moved = fleet.resolve(config.with_port(before, port))
        instance = next(instance for instance in moved.instances if instance.name == name)
        return render.instance_unit(moved, instance, templates, source=source)

    return Wanted(resolved, render.render(resolved, templates, source=source), front, unit_on)


@dataclass(frozen=True, slots=True)
class UnitState:
    """An instance as systemd knows it, whoever wrote its unit."""

    active: str
    """ActiveState: active, activating, deactivating, failed, inactive."""

    running: Mark | None
    """What its process says of itself; ``None`` where none runs."""

    has_process: bool = False


@dataclass(frozen=True, slots=True)
class MpsState:
    """An MPS daemon as systemd knows it."""

    active: str
    """ActiveState."""

    digest: str | None
    """Of the text of its unit that its process was started by; ``None`` where none runs."""


@dataclass(frozen=True, slots=True)
class HostState:
    """What is on a host."""

    files: Mapping[PurePosixPath, str] = field(default_factory=dict)
    """Texts of the files that are wanted, or have a name that we give to files; whoever wrote them."""

    instances: Mapping[str, UnitState] = field(default_factory=dict)
    """Every unit that is an instance of ours by name, by the instance's name; ours or not."""

    mps_daemons: Mapping[str, MpsState] = field(default_factory=dict)
    """Every MPS daemon of ours, by its unit."""

    gpus: tuple[Gpu, ...] = ()
    """Those that nvidia-smi tells of; none where it does not answer."""

    cpus: frozenset[int] | None = None
    """CPUs that are online, as Linux counts them; ``None`` where that is not known."""

    enabled: bool = False
    """Whether the target starts at boot."""

    active: bool = False
    """Whether the target is active."""

    timed: bool = False
    """Whether the timer that recycles runs."""

    watched: bool = False
    """Whether somebody looks, or tries to, for node_exporter."""

    listening: frozenset[int] = frozenset()
    """TCP ports on which something listens."""

    strangers: Mapping[int, str] = field(default_factory=dict)
    """Programs other than nginx that listen on ports of the wanted front, by port."""

    edited: frozenset[PurePosixPath] = frozenset()
    """Files of ours that somebody changed by hand."""

    keys: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of each file of API keys that the fleet names and that is there, by its path."""

    changed_keys: frozenset[str] = frozenset()
    """Files of API keys whose content is not what was last applied."""

    missing: frozenset[str] = frozenset()
    """What the wanted fleet needs and is not there: files (keys, certificates, programs), or programs by name."""

    drained: frozenset[str] = frozenset()
    """Instances that an operator took out of the front (``drain``)."""

    interrupted: str | None = None
    """The command of a change that was begun and never ended."""

    stale: bool = False
    """systemd has not read a unit file that changed."""
