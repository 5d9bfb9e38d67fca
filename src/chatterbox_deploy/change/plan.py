"""The ordered steps from what is on a host to what a fleet wants, without a lost request. Decides; touches nothing."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from chatterbox_deploy import nginx, render, systemd
from chatterbox_deploy.change import difference, obstacles
from chatterbox_deploy.change.steps import (
    PointLink,
    Purge,
    RemoveFile,
    Run,
    ShowFront,
    Speak,
    StartUnits,
    StopUnits,
    VerifyUnits,
    WaitIdle,
    WaitReady,
    WriteFiles,
)
from chatterbox_deploy.config.values import split_listen
from chatterbox_deploy.fleet import Upstream

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import PurePosixPath

    from chatterbox_deploy.change.difference import Change
    from chatterbox_deploy.change.facts import HostState, Wanted
    from chatterbox_deploy.change.steps import Step
    from chatterbox_deploy.render import RenderedFile
    from chatterbox_deploy.systemd import Mark


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps, and why."""

    steps: tuple[Step, ...] = ()
    reasons: tuple[tuple[str, str], ...] = ()
    """(instance, why it starts, restarts or stops), in the order in which it happens."""

    notes: tuple[str, ...] = ()
    """What an operator ought to know before."""

    problems: tuple[str, ...] = ()
    """Why it cannot be carried out."""

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.steps or self.problems)

    def changed_files(self) -> list[Change]:
        """Every file as it is now and as it will be in the end, in the order of their paths; those that change."""
        first: dict[PurePosixPath, str | None] = {}
        last: dict[PurePosixPath, RenderedFile] = {}
        for step in self.steps:
            for change in step.changes if isinstance(step, WriteFiles | ShowFront) else ():
                first.setdefault(change.file.path, change.before)
                last[change.file.path] = change.file
        return [difference.Change(last[path], first[path]) for path in sorted(last) if first[path] != last[path].text]

    def removed_files(self) -> list[PurePosixPath]:
        """Everything that goes."""
        return [step.path for step in self.steps if isinstance(step, RemoveFile | Purge)]


def plan(
    wanted: Wanted,
    state: HostState,
    *,
    restart: Mapping[str, str] | None = None,
    only: Collection[str] | None = None,
    last: Collection[str] = (),
    max_unavailable: int = 1,
    link: PointLink | None = None,
) -> Plan:
    """Smallest ordered set of steps that takes ``state`` to ``wanted``.

    Instances change one at a time (``max_unavailable`` at a time): out of the front, idle, stopped, its new unit
    written, started, ready, heard, back in the front. No unit starts on a port that another still holds: where
    instances swap ports, one of them takes the way over a spare port. The front never lists one that is stopped.

    ``restart`` gives the instances to restart though nothing of them changed, and why. ``only`` those are touched,
    and no file but theirs and the front. Those to start ``last`` are not waited for by the others.
    """
    compared = difference.compare(wanted.files, state.files)
    if problems := obstacles.find(wanted, state, compared.foreign):
        return Plan(problems=tuple(problems))
    work = _Work(
        wanted,
        state,
        restart=dict(restart or {}),
        max_unavailable=max_unavailable,
        link=link,
        only=only,
        last=last,
    )
    return work.plan()


def plan_removal(
    state: HostState, *, keep: Collection[PurePosixPath] = (), edited: Collection[PurePosixPath] = ()
) -> Plan:
    """Steps after which nothing of ours is installed, but for files to ``keep``; voices and weights are not touched.

    ``edited`` are ours, too, though somebody took away the line that says so.
    """
    ours = {
        path: text
        for path, text in state.files.items()
        if (render.is_ours(text) or path in edited) and path not in keep
    }
    steps: list[Step] = []
    if render.FRONT_PATH in ours:
        steps.append(RemoveFile(render.FRONT_PATH, ours[render.FRONT_PATH]))
    if render.FRONT_PATH in ours or (state.interrupted and render.FRONT_PATH not in state.files):
        steps.append(FORGET_FRONT)
    running = sorted(name for name, unit in state.instances.items() if unit.has_process or unit.active != "inactive")
    mine = [
        name
        for name in running
        if _unit_path(name) in ours or _unit_path(name) in keep or _unit_path(name) not in state.files
    ]
    if state.enabled and render.UNIT_DIR / systemd.TARGET in ours:
        steps.append(Run(("systemctl", "disable", systemd.TARGET), "the fleet no longer starts at boot"))
    failed = [name for name in mine if state.instances[name].active == "failed"]
    if to_stop := [name for name in mine if name not in failed]:
        steps.append(StopUnits(tuple(systemd.unit_name(name) for name in to_stop)))
    units = tuple(path for path in sorted(ours) if path.parent == render.UNIT_DIR)
    others = tuple(
        path.name for path in units if path.name not in {systemd.unit_name(name) for name in state.instances}
    )
    if others:
        steps.append(StopUnits(others))
    steps += [RemoveFile(path, text) for path, text in sorted(ours.items()) if path != render.FRONT_PATH]
    if units or state.interrupted:
        steps.append(DAEMON_RELOAD)
    if failed:
        steps.append(_forget_failure(*(systemd.unit_name(name) for name in failed)))
    return Plan(tuple(steps), reasons=tuple((name, "the fleet is uninstalled") for name in mine))


DAEMON_RELOAD = Run(("systemctl", "daemon-reload"), "systemd reads the units")
FORGET_FRONT = Run(("systemctl", "try-reload-or-restart", systemd.NGINX_UNIT), "nginx forgets the front")


MPS_START_TIMEOUT_S = 60
"""As in its unit."""


def _forget_failure(*units: str) -> Run:
    return Run(("systemctl", "reset-failed", *units), "systemd forgets that it failed")


def _unit_path(name: str) -> PurePosixPath:
    return render.UNIT_DIR / systemd.unit_name(name)


class _Work:
    """One plan in the making: what runs where, as the steps so far will have left it."""

    def __init__(
        self,
        wanted: Wanted,
        state: HostState,
        *,
        restart: dict[str, str],
        max_unavailable: int,
        link: PointLink | None,
        only: Collection[str] | None,
        last: Collection[str],
    ) -> None:
        self.wanted = wanted
        self.state = state
        self.max_unavailable = max(1, max_unavailable)
        self.link = link
        self.only = only
        self.last = last
        self.steps: list[Step] = []
        self.reasons: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self.disk = {path: text for path, text in state.files.items() if render.is_ours(text)}
        self.units = {file.path: file for file in wanted.files if systemd.find_mark(file.text) is not None}
        self.marks = {mark.name: mark for file in self.units.values() if (mark := systemd.find_mark(file.text))}
        self.instances = {instance.name: instance for instance in wanted.fleet.instances}
        self.running = {name: unit.running for name, unit in state.instances.items() if unit.running is not None}
        self.gone = [
            name
            for name, unit in state.instances.items()
            if name not in self.instances
            and only is None
            and (self._path(name) in self.disk or unit.has_process)
            and (self._path(name) not in state.files or self._path(name) in self.disk)
        ]
        # Who can speak now: only they stand in the front from the first step on.
        self.up = {
            name: (mark.host, mark.port)
            for name, mark in self.running.items()
            if state.instances[name].active == "active"
            and mark.port in state.listening
            and (name in self.instances or name in self.gone)
            and not self._is_unheard(name)
        }
        # Of whoever is not to be touched nothing is asked: the front goes on to list them, heard or not.
        self.untouched = {
            each.name: (each.host, each.port)
            for each in nginx.find_upstreams(self.disk.get(render.FRONT_PATH, ""))
            if only is not None and each.name in self.instances and each.name not in only
        }
        # MPS daemons that do not run as they are to: before one starts, all who shared a GPU through it have gone.
        self.stale_daemons = {
            file.path.name
            for file in wanted.files
            if systemd.is_mps_unit(file.path.name) and not self._runs_as_wanted(file)
        }
        self.why = {
            name: why for name in self.instances if (only is None or name in only) and (why := self._why(name, restart))
        }
        self.cleared: set[str] = set()
        self.watched = state.watched

    def plan(self) -> Plan:
        """See ``plan``."""
        self._begin()
        todo = list(self.why)
        gone = list(self.gone)
        while todo or gone:
            self._advance(todo, gone)
        self._end()
        if not self.steps and not self.state.interrupted:
            return Plan(notes=tuple(self.notes))
        return Plan(tuple(self.steps), tuple(self.reasons), tuple(self.notes))

    # What is to be done

    def _is_unheard(self, name: str) -> bool:
        """Whether a plan that was cut short left an instance out of the front: it may be active, and silent."""
        if self.state.interrupted is None or name in self.state.drained:
            return False
        listed = nginx.find_upstreams(self.disk.get(render.FRONT_PATH, ""))
        return not any(each.name == name and not (each.drained or each.leaving) for each in listed)

    def _why(self, name: str, restart: Mapping[str, str]) -> str | None:
        """Why an instance has to start or restart; ``None`` if it may run on."""
        unit = self.state.instances.get(name)
        if unit is None or unit.active == "inactive":
            return "it does not run" if self._path(name) in self.disk else "it is new"
        if unit.active != "active":
            return f"its unit is {unit.active}"
        return (
            self._why_not_run_on(name, unit.running)
            or ("it was out of the front when that ended" if self._is_unheard(name) else None)
            or ("the MPS daemon of its GPU starts anew" if self._daemon(name) in self.stale_daemons else None)
            or restart.get(name)
        )

    def _why_not_run_on(self, name: str, running: Mark | None) -> str | None:
        mark = self.marks.get(name)
        if running is None or mark is None:
            return "it runs something that no unit of ours started"
        if running.port != mark.port:
            return f"it moves from port {running.port} to {mark.port}"
        if running.digest != mark.digest:
            return self._what_changed(name, running)
        if systemd.is_edited(self.disk.get(self._path(name), "")):
            return "its unit was edited by hand"
        if mark.port not in self.state.listening:
            return f"nothing listens on its port {mark.port}"
        keys = self.wanted.fleet.service.api_keys_file
        return f"the keys in {keys} changed" if keys in self.state.changed_keys else None

    def _what_changed(self, name: str, running: Mark) -> str:
        before = self.disk.get(self._path(name))
        if before is None or systemd.find_mark(before) != running:
            return "it runs another unit"
        settings = systemd.changed_settings(before, self.units[self._path(name)].text)
        shown = ", ".join(settings[:3]) + (" and more" if len(settings) > 3 else "")
        return f"its unit changes: {shown}"

    @staticmethod
    def _path(name: str) -> PurePosixPath:
        return _unit_path(name)

    # Steps

    def _begin(self) -> None:
        """Everything that may be refused, before anything restarts."""
        units = tuple(
            file
            for file in self.wanted.files
            if file.path.parent == render.UNIT_DIR and (self.only is None or self._name(file.path) in self.only)
        )
        if any(self.disk.get(file.path) != file.text for file in units):
            self.steps.append(VerifyUnits(units))
        # Before anything that it is for: cut short from here on, the next plan goes on with this version.
        if self.link is not None:
            self.steps.append(self.link)
        # A drain that nobody asked for is left over from a plan that was cut short: it ends here.
        self._show_front(force=self.state.interrupted is not None or bool(self._front_keys()), first=True)
        if self.only is not None:
            return
        common = [file for file in units if file.path not in self.units and file.path.name not in self.stale_daemons]
        # Where nothing restarts for it, a changed comment, say, can be written at once.
        quiet = [file for path, file in self.units.items() if self._name(path) not in self.why]
        self.watched = self._look_away(common)
        written = self._write([*common, *quiet])
        others = [f for f in self.wanted.files if f.path.parent != render.UNIT_DIR and f.path != render.FRONT_PATH]
        if self._write(others):
            self.notes.append("a Prometheus reads its files again when it is told to: systemctl reload prometheus")
        if written or self.state.stale or self.state.interrupted:
            self.steps.append(DAEMON_RELOAD)

    def _front_keys(self) -> str | None:
        keys = self.wanted.fleet.front.api_keys_file
        return keys if keys in self.state.changed_keys else None

    def _name(self, path: PurePosixPath) -> str:
        mark = systemd.find_mark(self.units[path].text) if path in self.units else None
        return "" if mark is None else mark.name

    def _advance(self, todo: list[str], gone: list[str]) -> None:
        """The next thing that can be done without harm: more who speak first, fewer last."""
        idle = [name for name in todo if name not in self.up]
        # None of the last before nothing else is left to be done.
        starts = self._free([name for name in idle if name not in self.last], gone) or self._free(
            idle if set(todo) <= set(self.last) else [], gone
        )
        renewals = self._free([name for name in todo if name in self.up], ())
        stops = [name for name in gone if self._in_the_way(name, todo)] or ([] if todo else gone)
        hops = self._hops(todo, gone)
        blocking = sorted({daemon for name in todo if (daemon := self._blocked_by(name)) is not None})
        # Whoever is away already, cut short before or crashed, and waits for a port, counts.
        away = [name for name in idle if name not in self.last and self._path(name) in self.state.files]
        if now := starts or self._spared(renewals)[: max(0, self.max_unavailable - len(away))]:
            self._renew(now)
            todo[:] = [name for name in todo if name not in now]
        elif now := self._spared(stops)[:1]:
            self._stop(now[0])
            gone.remove(now[0])
        elif now := self._spared(hops)[:1]:
            self._renew(now, port=self._spare_port())
        elif now := [daemon for daemon in blocking if self._speaking() - set(self._clients(daemon))][:1]:
            self._clear(now[0], gone)
        # Whatever comes next, nobody speaks meanwhile.
        elif renewals:
            self._renew(renewals[:1])
            todo.remove(renewals[0])
        elif stops:
            self._stop(stops[0])
            gone.remove(stops[0])
        elif blocking:
            self._clear(blocking[0], gone)
        else:
            self._renew([hops[0]], port=self._spare_port())

    def _free(self, names: Sequence[str], gone: Sequence[str]) -> list[str]:
        """Those whose port nobody else holds, and whose GPU nobody fills who leaves and can be spared."""
        return [
            name
            for name in names
            if not any(mark.port == self.instances[name].port for other, mark in self.running.items() if other != name)
            and not self._filled(gone) & set(self.instances[name].gpus)
            and self._blocked_by(name) is None
        ]

    def _filled(self, gone: Iterable[str]) -> set[str]:
        return {gpu for name in gone if self._speaking() - {name} for gpu in self._gpus(name)}

    def _hops(self, todo: Sequence[str], gone: Sequence[str]) -> list[str]:
        """Where each waits for another's port, those who can go over a spare one."""
        wanted = {self.instances[name].port for name in todo}
        # One that does not speak yet can stand in for the last one that does, unless it is to be the only one.
        stand_in = [
            name
            for name in todo
            if name not in self.up
            and len(self.instances) > 1
            and not self._filled(gone) & set(self.instances[name].gpus)
        ]
        held = [name for name in todo if name in self.running and self.running[name].port in wanted]
        return [name for name in stand_in + held if self._blocked_by(name) is None]

    def _speaking(self) -> set[str]:
        return set(self.up) - self.state.drained

    def _spared(self, names: Iterable[str]) -> list[str]:
        """Those who may all be away at once, for somebody else speaks."""
        spared: list[str] = []
        for name in names:
            if name not in self._speaking() or self._speaking() - {*spared, name}:
                spared.append(name)
        return spared

    def _in_the_way(self, name: str, todo: Iterable[str]) -> bool:
        """Whether an instance that leaves holds the port or the GPU of one that is to start."""
        port = self.running[name].port if name in self.running else None
        return any(
            self.instances[other].port == port or set(self._gpus(name)) & set(self.instances[other].gpus)
            for other in todo
        )

    def _gpus(self, name: str) -> tuple[str, ...]:
        return systemd.visible_gpus(self.disk.get(self._path(name), ""))

    # MPS daemons

    def _runs_as_wanted(self, file: RenderedFile) -> bool:
        daemon = self.state.mps_daemons.get(file.path.name)
        return daemon is not None and daemon.active == "active" and daemon.digest == systemd.mps_digest(file.text)

    def _daemon(self, name: str) -> str | None:
        """Unit of the daemon through which an instance is to share its GPU."""
        return systemd.mps_unit_of(self.units[self._path(name)].text)

    def _clients(self, daemon: str) -> list[str]:
        """Who runs and shares a GPU through a daemon now, wanted or not."""
        return [name for name in self.running if systemd.mps_unit_of(self.disk.get(self._path(name), "")) == daemon]

    def _blocked_by(self, name: str) -> str | None:
        """The daemon that has to start anew before an instance can, and that others still use."""
        daemon = self._daemon(name)
        return daemon if daemon in self.stale_daemons and self._clients(daemon) else None

    def _clear(self, daemon: str, gone: list[str]) -> None:
        """All who share a GPU through a daemon leave at once; then it can start anew, and they after it."""
        clients = self._clients(daemon)
        for name in set(clients) & set(gone):
            self._stop(name)
            gone.remove(name)
        back = [name for name in clients if name in self.instances]
        self._take_out(back)
        if back:
            self.steps.append(StopUnits(tuple(systemd.unit_name(name) for name in back)))
        for name in back:
            self.running.pop(name, None)
        self.cleared.update(back)

    def _start_daemons(self, names: Iterable[str]) -> None:
        """Those that the instances about to start need and that do not run as they are to; nobody uses them now."""
        needed = {self._daemon(name) for name in names} & self.stale_daemons
        for file in self.wanted.files:
            if file.path.name not in needed:
                continue
            daemon = self.state.mps_daemons.get(file.path.name)
            if daemon is not None and daemon.active not in ("inactive", "failed"):
                self.steps.append(StopUnits((file.path.name,)))
            if self._write([file]):
                self.steps.append(DAEMON_RELOAD)
            self.steps.append(StartUnits((file.path.name,), MPS_START_TIMEOUT_S))
            self.stale_daemons.remove(file.path.name)

    def _spare_port(self) -> int:
        """The next one that nobody has or wants."""
        taken = {instance.port for instance in self.instances.values()} | self.state.listening
        taken |= {mark.port for mark in self.running.values()} | {split_listen(self.wanted.fleet.front.listen)[1]}
        highest = max(instance.port for instance in self.instances.values())
        return next(port for port in chain(range(highest + 1, 65536), range(1024, 65536)) if port not in taken)

    def _renew(self, names: Sequence[str], port: int | None = None) -> None:
        """Take instances out, stop them, write their units, start them, hear them, put them back."""
        service = self.wanted.fleet.service
        files: list[RenderedFile] = []
        for name in names:
            why = self.why[name] if port is None else f"{self.why[name]}, over port {port}, since another holds its own"
            self.reasons.append((name, why))
            files.append(self.units[self._path(name)] if port is None else self.wanted.unit_on(name, port))
        self._take_out(names)
        held = tuple(name for name in names if name in self.running or self._has_process(name))
        if held:
            self.steps.append(StopUnits(tuple(systemd.unit_name(name) for name in held)))
        for name in held:
            self.running.pop(name, None)
        self._start_daemons(names)
        if self._write(files):
            self.steps.append(DAEMON_RELOAD)
        self.steps.append(StartUnits(tuple(systemd.unit_name(name) for name in names), service.start_timeout_s))
        for name, file in zip(names, files, strict=True):
            mark = systemd.find_mark(file.text)
            assert mark is not None  # noqa: S101  self.units holds units with a mark only
            self.steps.append(
                WaitReady(
                    name, systemd.unit_name(name), mark.host, mark.port, service.start_timeout_s, service.speaks_notify
                )
            )
            if service.speaks_notify:
                self.steps.append(Speak(name, mark.host, mark.port, service.stop_timeout_s, service.api_keys_file))
            self.running[name] = mark
            self.up[name] = (mark.host, mark.port)
        self._show_front()

    def _has_process(self, name: str) -> bool:
        unit = self.state.instances.get(name)
        return unit is not None and unit.has_process and name not in self.cleared

    def _take_out(self, names: Sequence[str]) -> None:
        """Nobody asks them any more, and they have answered everything."""
        service = self.wanted.fleet.service
        out = {name: self.up.pop(name) for name in names if name in self.up}
        if out:
            if not set(self.up) - self.state.drained:
                who = " and ".join(out)
                self.notes.append(f"nobody else speaks while {who} restarts: requests get 503 with Retry-After")
            self._show_front(out)
        # Out of the front already, one may still be at work.
        quiet = {
            name: (self.running[name].host, self.running[name].port)
            for name in names
            if name in self.running and self._is_active(name) and name not in out
        }
        # As it was started, whatever is to follow it: another server may not tell how busy it is.
        self.steps += [
            WaitIdle(name, host, port, service.stop_timeout_s, systemd.is_notify(self.disk.get(self._path(name), "")))
            for name, (host, port) in {**out, **quiet}.items()
        ]

    def _is_active(self, name: str) -> bool:
        unit = self.state.instances.get(name)
        return unit is not None and unit.active == "active"

    def _stop(self, name: str) -> None:
        self.reasons.append((name, "the fleet file asks for it no longer"))
        self._take_out([name])
        active = self.state.instances[name].active
        if active == "failed":
            self.steps.append(_forget_failure(systemd.unit_name(name)))
        elif active != "inactive":
            self.steps.append(StopUnits((systemd.unit_name(name),)))
        self.running.pop(name, None)
        path = self._path(name)
        if path in self.disk:
            self.steps += [RemoveFile(path, self.disk.pop(path)), DAEMON_RELOAD]

    def _show_front(
        self, out: Mapping[str, tuple[str, int]] | None = None, *, force: bool = False, first: bool = False
    ) -> None:
        """The front with those who can speak, in the fleet's order; ``out`` are being taken out."""
        listed = {**self.untouched, **self.up, **(out or {})}
        order = [*self.instances, *(name for name in self.gone if name in listed)]
        upstreams = [
            Upstream(
                name,
                *listed[name],
                drained=name in self.state.drained,
                leaving=name in (out or {}) and name not in self.state.drained,
            )
            for name in order
            if name in listed
        ]
        text = self.wanted.front(upstreams)
        final = next(file for file in self.wanted.files if file.path == render.FRONT_PATH)
        if (
            all(listed.get(name) == (i.host, i.port) for name, i in self.instances.items())
            and len(upstreams) == len(self.instances)
            and not any(upstream.drained or upstream.leaving for upstream in upstreams)
        ):
            # Word for word what the fleet renders, also where that was rendered by an older version of ours.
            text = final.text
        if self.steps and isinstance(last := self.steps[-1], ShowFront):
            # One reload is enough: whoever comes back does so as the next one goes.
            self.steps.pop()
            force = True
            if last.change.before is None:
                del self.disk[render.FRONT_PATH]
            else:
                self.disk[render.FRONT_PATH] = last.change.before
        before = self.disk.get(render.FRONT_PATH)
        if text == before and not force:
            return
        if first and self._front_keys():
            self.notes.append(f"the keys in {self._front_keys()} changed: nginx reads them again")
        self.steps.append(
            ShowFront(
                difference.Change(render.RenderedFile(render.FRONT_PATH, text, final.mode), before), tuple(upstreams)
            )
        )
        self.disk[render.FRONT_PATH] = text

    def _write(self, files: Iterable[RenderedFile]) -> bool:
        """Whether anything had to be written."""
        written = tuple(
            difference.Change(file, self.disk.get(file.path)) for file in files if self.disk.get(file.path) != file.text
        )
        if written:
            self.steps.append(WriteFiles(written))
            self.disk |= {change.file.path: change.file.text for change in written}
        return bool(written)

    def _end(self) -> None:
        if self.only is not None:
            self._show_front()
            return
        wanted = {file.path for file in self.wanted.files}
        stale = [path for path in sorted(self.disk) if path not in wanted]
        if others := tuple(path.name for path in stale if path.parent == render.UNIT_DIR):
            self.steps.append(StopUnits(others))
        self.steps += [RemoveFile(path, self.disk[path]) for path in stale]
        if others:
            self.steps.append(DAEMON_RELOAD)
        self._show_front()
        if not self.state.enabled:
            self.steps.append(Run(("systemctl", "enable", systemd.TARGET), "the fleet starts at boot"))
        if not self.state.active:
            self.steps.append(Run(("systemctl", "start", systemd.TARGET), "the fleet counts as started"))
        elif render.UNIT_DIR / systemd.RECYCLE_TIMER in wanted and not self.state.timed:
            self.steps.append(Run(("systemctl", "start", systemd.RECYCLE_TIMER), "instances are recycled from now on"))
        if render.UNIT_DIR / systemd.MONITOR_UNIT in wanted and not self.watched:
            start = ("systemctl", "start", systemd.MONITOR_UNIT)
            self.steps.append(Run(start, "GPUs and front are looked at from now on"))
        for path in sorted(self.state.edited):
            if path in wanted:
                self.notes.append(f"{path} was edited by hand: that edit goes")

    def _look_away(self, units: Iterable[RenderedFile]) -> bool:
        """Whether somebody looks on. Who does so by an old unit is stopped before that changes: cut short, the next
        plan starts it again.
        """
        path = render.UNIT_DIR / systemd.MONITOR_UNIT
        outdated = any(
            file.path == path and systemd.digest(file.text) != systemd.digest(self.disk.get(path, "")) for file in units
        )
        if outdated and self.state.watched:
            self.steps.append(StopUnits((systemd.MONITOR_UNIT,)))
        return self.state.watched and not outdated
