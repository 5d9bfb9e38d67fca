"""What an operator wants to know of a fleet: a row an instance, and what is wrong in words. Decides; asks nobody."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from chatterbox_deploy import nginx, render, systemd
from chatterbox_deploy.status.found import Unit, readiness_word

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import PurePosixPath

    from chatterbox_deploy.fleet import Fleet, Instance, Upstream
    from chatterbox_deploy.render import RenderedFile
    from chatterbox_deploy.status.found import Found, Readiness
    from chatterbox_deploy.systemd import Mark


APPLY = "chatterbox-deploy apply"
PLAN = "chatterbox-deploy plan"


@dataclass(frozen=True, slots=True)
class Row:
    """One instance, or one that the fleet file no longer names. ``None`` is unknown, never 0."""

    instance: str
    gpus: tuple[str, ...] | None
    port: int | None
    unit: str | None
    """``ActiveState/SubState`` as systemd has them, or ``not installed``."""

    ready: str | None
    """``ready``, ``draining``, ``not ready``, ``no answer``; ``None`` for a server that does not tell."""

    waiting: int | None
    running: int | None
    spoken: int | None
    restarts: int | None
    active_s: float | None
    memory_bytes: int | None
    gpu_memory_bytes: int | None
    front: str | None
    """``serving``, ``drained``, ``leaving`` (about to restart, or a change was cut short), ``not listed``."""

    wrong: tuple[str, ...]

    @property
    def serves(self) -> bool:
        """Whether it gets requests and would speak them, as far as can be known."""
        by_itself = self.unit == "not installed" and self.ready == "ready"
        active = self.unit is None or self.unit.startswith("active/") or by_itself
        return active and self.ready in {None, "ready"} and self.front in {None, "serving"}


@dataclass(frozen=True, slots=True)
class Report:
    """The whole fleet."""

    rows: tuple[Row, ...]
    nginx: str | None
    """ActiveState of the host's nginx."""

    listen: str
    front_answers: bool | None
    wrong: tuple[str, ...]
    """What is wrong with no instance in particular."""

    @property
    def well(self) -> bool:
        """Whether all is as the fleet file says."""
        return not self.wrong and not any(row.wrong for row in self.rows)

    def sentence(self) -> str:
        """The fleet in one sentence."""
        count, serving = len(self.rows), sum(row.serves for row in self.rows)
        behind = f"behind {self.listen}"
        who = f"{serving} of {count} instance{'s' * (count != 1)} serve{'s' * (serving == 1)} {behind}"
        answers = {True: "the front answers", False: "the front does not answer", None: "the front was not asked"}
        return f"{who}; nginx is {self.nginx or 'unknown'}, {answers[self.front_answers]}"

    def as_json(self) -> dict[str, Any]:
        """The same for programs; sizes are bytes, times seconds."""
        told = asdict(self)
        return {"well": self.well, "instances": told.pop("rows"), **told}


def instance_units(fleet: Fleet, texts: Mapping[PurePosixPath, str | None], loaded: Collection[str]) -> dict[str, str]:
    """Name of the unit, by instance: of the fleet's, then of those that only the host still has."""
    units = {instance.name: systemd.unit_name(instance.name) for instance in fleet.instances}
    # A unit that runs though its file is gone is still ours: nobody else gives such names.
    orphans = {unit for unit in loaded if texts.get(render.UNIT_DIR / unit) is None}
    ours = {path.name for path, text in texts.items() if text is not None and render.is_ours(text)}
    for unit in sorted(ours | orphans):
        name = systemd.instance_name(unit)
        if name is not None:
            units.setdefault(name, unit)
    return units


def address(fleet: Fleet, found_text: str | None, running: Mark | None, name: str) -> tuple[str, int] | None:
    """Where an instance listens: where its process says, where its unit on disk says, where the fleet file says."""
    mark = running or systemd.find_mark(found_text or "")
    if mark is not None:
        return mark.host, mark.port
    return next(((instance.host, instance.port) for instance in fleet.instances if instance.name == name), None)


def report(
    fleet: Fleet, wanted: Sequence[RenderedFile], found: Found, *, front: Callable[[Sequence[Upstream]], str]
) -> Report:
    """Compare what a host told with what the fleet file says.

    ``front`` is the front's text with those behind it: whoever is drained there is no difference.
    """
    front_text = found.texts.get(render.FRONT_PATH)
    listed = {upstream.name: upstream for upstream in nginx.find_upstreams(front_text or "")}
    texts = {file.path.name: file.text for file in wanted}
    instances = {instance.name: instance for instance in fleet.instances}
    loaded = () if found.units is None else found.units
    by_hand = _by_hand(fleet, found)
    rows: list[Row] = []
    for name, unit_name in instance_units(fleet, found.texts, loaded).items():
        seen = _Seen(
            fleet=fleet,
            name=name,
            unit_name=unit_name,
            instance=instances.get(name),
            unit=None if found.units is None else found.units.get(unit_name, Unit()),
            path=render.UNIT_DIR / unit_name,
            found=found,
            wanted_text=texts.get(unit_name),
            listed=listed.get(name),
            by_hand=by_hand,
        )
        rows.append(seen.row())
    return Report(
        rows=tuple(rows),
        nginx=None if found.units is None else found.units.get(systemd.NGINX_UNIT, Unit()).active,
        listen=fleet.front.listen,
        front_answers=found.front_answers,
        wrong=tuple(
            _wrong_by_hand(fleet, found)
            if by_hand
            else _wrong_with_the_fleet(fleet, _as_listed(wanted, front_text, front), found)
        ),
    )


def _by_hand(fleet: Fleet, found: Found) -> bool:
    """Whether the fleet runs as ``up`` has it: instances answer, and not one of them is installed."""
    names = [systemd.unit_name(instance.name) for instance in fleet.instances]
    loaded = [unit for name in names if (unit := (found.units or {}).get(name)) is not None and unit.state is not None]
    there = [name for name in names if found.texts.get(render.UNIT_DIR / name, "") is not None]
    return not loaded and not there and any(found.readiness.get(instance.name) for instance in fleet.instances)


def _wrong_by_hand(fleet: Fleet, found: Found) -> list[str]:
    wrong = [
        f"nothing is installed: it runs by `chatterbox-deploy up`, or by hand, until that ends; to install it: {APPLY}"
    ]
    if found.front_answers is False:
        wrong.append(f"the front does not answer on {fleet.front.listen}")
    return wrong


def _as_listed(
    wanted: Sequence[RenderedFile], front_text: str | None, front: Callable[[Sequence[Upstream]], str]
) -> list[RenderedFile]:
    """``wanted`` with the front listing who it lists now: that is told row by row."""
    if front_text is None:
        return list(wanted)
    text = front(nginx.find_upstreams(front_text))
    return [replace(file, text=text) if file.path == render.FRONT_PATH else file for file in wanted]


@dataclass(frozen=True, slots=True)
class _Seen:
    """All that is known of one instance."""

    fleet: Fleet
    name: str
    unit_name: str
    instance: Instance | None
    """``None`` for one that the fleet file does not name."""

    unit: Unit | None
    path: PurePosixPath
    found: Found
    wanted_text: str | None
    listed: Upstream | None
    by_hand: bool
    """Whether the fleet runs without its units."""

    def row(self) -> Row:
        unit, readiness = self.unit, self._readiness()
        place = address(self.fleet, self.found.texts.get(self.path), self.found.running.get(self.unit_name), self.name)
        active = unit is not None and unit.active == "active"
        return Row(
            instance=self.name,
            gpus=None if self.instance is None else self.instance.gpus,
            port=None if place is None else place[1],
            unit=self._state(),
            ready=self._ready(),
            waiting=None if readiness is None else readiness.waiting,
            running=None if readiness is None else readiness.running,
            spoken=None if readiness is None else readiness.spoken,
            restarts=None if unit is None else unit.restarts if self._installed() else None,
            active_s=(
                self.found.monotonic_s - unit.active_at_s
                if unit is not None and active and unit.active_at_s is not None
                else None
            ),
            memory_bytes=None if unit is None else unit.memory_bytes,
            gpu_memory_bytes=None if readiness is None else readiness.gpu_memory_bytes,
            front=self._front(),
            wrong=tuple(self._wrong()),
        )

    def _installed(self) -> bool:
        return self.unit is not None and self.unit.state is not None

    def _state(self) -> str | None:
        if self.unit is None:
            return None if self.found.texts.get(self.path, "") is not None else "not installed"
        return self.unit.state or "not installed"

    def _readiness(self) -> Readiness | None:
        """What its own process says, not one that happens to have its port."""
        return None if self._somebody_else() else self.found.readiness.get(self.name)

    def _somebody_else(self) -> bool:
        said = self.found.readiness.get(self.name)
        if self.by_hand:
            return False
        return said is not None and self.unit is not None and said.invocation_id != self.unit.invocation_id

    def _ready(self) -> str | None:
        if self.name not in self.found.readiness:
            return None
        return readiness_word(self._readiness())

    def _front(self) -> str | None:
        if render.FRONT_PATH not in self.found.texts:
            return None
        if self.listed is None:
            # `up` has an nginx of its own.
            return None if self.by_hand else "not listed"
        if self.listed.leaving:
            return "leaving"
        return "drained" if self.listed.drained else "serving"

    def _wrong(self) -> list[str]:
        if self.instance is None:
            return [f"the fleet file no longer names it: {APPLY}"]
        if self._state() == "not installed" and self.by_hand:
            return [] if self._ready() == "ready" else [f"{self._ready()}: look where it was started"]
        if self._state() == "not installed":
            return [f"not installed: {APPLY}"]
        text = self.found.texts.get(self.path)
        if text is not None and not render.is_ours(text):
            return [f"{self.path} is not ours: move it away, then {APPLY}"]
        return [*self._wrong_with_the_unit(), *self._wrong_with_the_process(), *self._wrong_with_the_front()]

    def _wrong_with_the_unit(self) -> list[str]:
        unit = self.unit
        if unit is not None and unit.load == "masked":
            return [f"masked: systemctl unmask {self.unit_name}"]
        if self._outdated():
            running = unit is not None and unit.active == "active"
            return [f"{'runs another unit' if running else 'its unit is another'} than the fleet file asks for: {PLAN}"]
        if self.path not in self.found.texts or self.found.texts[self.path] is None:
            return [f"its unit file is missing: {APPLY}"]
        if unit is not None and unit.needs_reload:
            return ["systemd has not read its changed unit: systemctl daemon-reload"]
        return []

    def _outdated(self) -> bool:
        """Whether its unit, on disk or as it was when the process started, is not what the fleet file asks for."""
        wanted = self.wanted_text or ""
        text = self.found.texts.get(self.path)
        running = self.found.running
        if text is not None and systemd.digest(text) != systemd.digest(wanted):
            return True
        return self.unit_name in running and running[self.unit_name] != systemd.find_mark(wanted)

    def _wrong_with_the_process(self) -> list[str]:
        unit = self.unit
        log = f"`journalctl -u {self.unit_name}`"
        if unit is None or unit.active == "active":
            return self._wrong_with_the_answer(log)
        if unit.active == "failed":
            return [f"{self._failure(unit)}: {log}"]
        if unit.active == "activating":
            again = unit.restarts or 0
            if again >= _LOOP:
                return [f"crash loop, {_restarts(again)} so far: {log}"]
            return [f"it ended, and starts again soon: {log}" if unit.sub == "auto-restart" else "it is starting"]
        if unit.active == "deactivating":
            return ["it is stopping"]
        return [f"stopped: chatterbox-deploy start {self.name}"]

    def _failure(self, unit: Unit) -> str:
        if unit.exit_status is not None and unit.exit_status == self.fleet.service.config_error_status:
            return "its settings are wrong, or something is not installed"
        if unit.restarts:
            return f"crash loop, left down after {_restarts(unit.restarts)}"
        return f"its unit is failed ({unit.result})"

    def _wrong_with_the_answer(self, log: str) -> list[str]:
        if self._somebody_else():
            return [f"another process answers on its port: `ss -ltnp` shows which, {log}"]
        return {
            "no answer": [f"it does not answer: {log}"],
            "not ready": [f"not ready, its engine is dead or stuck: {log}"],
            "draining": ["it ends, and finishes what it began"],
        }.get(self._ready() or "", [])

    def _wrong_with_the_front(self) -> list[str]:
        assert self.instance is not None  # noqa: S101  asked only of an instance in the fleet file
        if self._front() == "leaving":
            return [f"out of the front while it restarts; if nobody changes the fleet now: {APPLY}"]
        if self._front() == "drained":
            return [f"drained: chatterbox-deploy undrain {self.name}"]
        if self._front() == "not listed":
            return [f"nginx does not list it: {APPLY}"]
        if self.listed is not None and self.listed.port != self.instance.port:
            return [f"nginx asks for it on port {self.listed.port}: {APPLY}"]
        return []


_LOOP = 3
"""Restarts of a unit that is not active, from which on it is called a crash loop."""


def _restarts(count: int) -> str:
    return f"{count} restart{'s' * (count != 1)}"


def _wrong_with_the_fleet(fleet: Fleet, wanted: Sequence[RenderedFile], found: Found) -> list[str]:
    wrong: list[str] = []
    if found.units is None:
        wrong.append("no systemd answers here, so nothing is known of the units")
    wrong += [f"{path} {how}" for path, how in _outdated_files(fleet, wanted, found)]
    if found.units is not None:
        target, front = (found.units.get(name, Unit()) for name in (systemd.TARGET, systemd.NGINX_UNIT))
        if target.load != "not-found" and target.file_state != "enabled":
            wrong.append(f"nothing starts the fleet at boot: systemctl enable {systemd.TARGET}")
        if front.active != "active":
            wrong.append(f"nginx is {front.active}: `journalctl -u {systemd.NGINX_UNIT}`")
        timer = found.units.get(systemd.RECYCLE_TIMER, Unit())
        if fleet.service.recycles and timer.load != "not-found" and timer.active != "active":
            wrong.append(f"nothing recycles the instances: systemctl start {systemd.RECYCLE_TIMER}")
        looker = found.units.get(systemd.MONITOR_UNIT, Unit())
        if fleet.monitoring.textfile is not None and looker.load != "not-found" and looker.active != "active":
            wrong.append(f"nobody looks at GPUs and front for Prometheus: `journalctl -u {systemd.MONITOR_UNIT}`")
        for daemon in fleet.mps_daemons:
            name = systemd.unit_name(daemon.name)
            unit = found.units.get(name, Unit())
            if unit.load != "not-found" and unit.active != "active":
                where = f"GPU {' and '.join(daemon.gpus)}"
                wrong.append(
                    f"the MPS daemon of {where} is {unit.active}, and its clients wait: `journalctl -u {name}`"
                )
    if found.front_answers is False:
        wrong.append(f"the front does not answer on {fleet.front.listen}: `journalctl -u {systemd.NGINX_UNIT}`")
    return wrong


def _outdated_files(fleet: Fleet, wanted: Sequence[RenderedFile], found: Found) -> list[tuple[PurePosixPath, str]]:
    """Files that belong to no instance and are not as the fleet file says. Comments do not count."""
    of_instances = {systemd.unit_name(instance.name) for instance in fleet.instances}
    outdated: list[tuple[PurePosixPath, str]] = []
    for file in wanted:
        if file.path.name in of_instances or file.path not in found.texts:
            continue
        text = found.texts[file.path]
        if text is None:
            outdated.append((file.path, f"is missing: {APPLY}"))
        elif not render.is_ours(text):
            outdated.append((file.path, f"is not ours; move it away, then: {APPLY}"))
        elif systemd.digest(text) != systemd.digest(file.text):
            outdated.append((file.path, f"is not as the fleet file asks: {PLAN}"))
    return outdated
