"""Run a fleet in the foreground: the rendered environment and front, without root or systemd.

Does what the units would: an instance that ends is started again, one that crashes in a loop is left
down, and none takes another with it. Has no watchdog and no sandbox: those are systemd's.
"""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from chatterbox_deploy import process
from chatterbox_deploy.config import values
from chatterbox_deploy.errors import CommandFailed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from chatterbox_deploy.fleet import Fleet, Instance, Service
    from chatterbox_deploy.process import Process

FRONT = "nginx"


class Tell(Protocol):
    """Shows a line to the operator, under the name of who says it."""

    def __call__(self, who: str, line: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Foreground:
    """What ``run`` needs beside the fleet."""

    nginx_conf: Path
    """Main configuration of nginx, already written."""

    runtime_dir: Path
    """Private, short-lived: sockets, nginx's temporary files, the access log."""

    nginx: str = "nginx"


async def run(fleet: Fleet, foreground: Foreground, tell: Tell) -> None:
    """Start everything, and end it in order on SIGINT, SIGTERM or SIGHUP; a second signal ends it at once.

    Raises:
        CommandFailed: a port is taken, nginx refuses its configuration or ends, or no instance is left.
    """
    _check_ports(fleet)
    await _check_front(foreground, tell)
    ending = _Ending()
    # Set only once the front has ended: until then every request it accepted finds its instance alive.
    stop = asyncio.Event()
    ready = {instance.name: asyncio.Event() for instance in fleet.instances}
    front = await process.start(
        _front_argv(foreground),
        environment=os.environ,
        directory=None,
        on_line=lambda line: tell(FRONT, line),
    )
    front_end: asyncio.Future[int] = asyncio.create_task(front.wait())
    keepers = [
        asyncio.create_task(
            _Keeper(instance, fleet.service, foreground.runtime_dir, ready[instance.name], stop, ending, tell).run()
        )
        for instance in fleet.instances
    ]
    announcer = asyncio.create_task(_announce(fleet, ready, tell))
    all_down: asyncio.Future[Any] = asyncio.gather(*keepers)
    asked: asyncio.Future[Any] = asyncio.create_task(ending.asked.wait())
    try:
        await asyncio.wait({front_end, all_down, asked}, return_when=asyncio.FIRST_COMPLETED)
        announcer.cancel()
        if front_end.done() and not asked.done():
            msg = f"nginx ended by itself, with status {front_end.result()}"
            raise CommandFailed(msg)
        if all_down.done() and not asked.done():
            msg = "no instance is left running; the lines above say why"
            raise CommandFailed(msg)
        tell("up", "ending: what was accepted is finished first; Ctrl-C again ends it at once")
    finally:
        # The front first: it takes no new request and waits for the answers of those it passed on.
        front.send(signal.SIGQUIT)
        await _or_at_once(front_end, ending, front)
        stop.set()
        await all_down
        asked.cancel()
        ending.close()


class _Ending:
    """A signal to end: once asks, twice insists."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.insisted = asyncio.Event()
        for number in self.SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._signal)

    def _signal(self) -> None:
        (self.insisted if self.asked.is_set() else self.asked).set()

    def close(self) -> None:
        for number in self.SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)
            # All is ended; a signal more would only spoil the exit status.
            signal.signal(number, signal.SIG_IGN)


def _front_argv(foreground: Foreground) -> tuple[str, ...]:
    # -e: nginx opens its built-in error log, where only root may write, before it reads any configuration.
    return (
        foreground.nginx,
        "-e",
        "stderr",
        "-p",
        f"{foreground.runtime_dir}/",
        "-c",
        str(foreground.nginx_conf),
    )


def _check_ports(fleet: Fleet) -> None:
    """Say at once what is taken: nginx tries for seconds, and whoever sits there would answer in our name."""
    address, port = values.split_listen(fleet.front.listen)
    wanted = [(str(address), port), *((instance.host, instance.port) for instance in fleet.instances)]
    taken = [f"\n  {host}:{port}: {reason}" for host, port in wanted if (reason := process.refuses_to_bind(host, port))]
    if taken:
        msg = f"cannot listen where the fleet file says; `ss -ltnp` shows who does:{''.join(taken)}"
        raise CommandFailed(msg)


async def _check_front(foreground: Foreground, tell: Tell) -> None:
    said: list[str] = []
    checking = await process.start(
        (*_front_argv(foreground), "-t", "-q"), environment=os.environ, directory=None, on_line=said.append
    )
    if await checking.wait() != 0:
        for line in said:
            tell(FRONT, line)
        msg = "nginx refuses the configuration; its reason is above"
        raise CommandFailed(msg)


@dataclass(frozen=True, slots=True)
class _Keeper:
    """Keeps one instance running until the end, or until it crashes in a loop."""

    instance: Instance
    service: Service
    runtime_dir: Path
    ready: asyncio.Event
    stop: asyncio.Event
    ending: _Ending
    tell: Tell

    async def run(self) -> None:
        service, name = self.service, self.instance.name
        starts: list[float] = []
        loop = asyncio.get_running_loop()
        while not self.stop.is_set():
            starts = [start for start in starts if start > loop.time() - service.restart_window_s] + [loop.time()]
            try:
                status = await self._run_once()
            except CommandFailed as error:
                self.tell(name, f"{error}; left down")
                return
            self.ready.clear()
            if self.stop.is_set():
                return
            ended = f"ended with status {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}"
            if status == service.config_error_status:
                self.tell(name, f"{ended}; left down")
                return
            if len(starts) >= service.restart_limit:
                self.tell(name, f"{ended}, start {len(starts)} of {service.restart_limit}; left down")
                return
            self.tell(name, f"{ended}; starting again in {service.restart_delay_s} s")
            with suppress(TimeoutError):
                await asyncio.wait_for(self.stop.wait(), service.restart_delay_s)

    async def _run_once(self) -> int:
        """Exit status of one life of the instance."""
        with self._notify_socket() as socket_path:
            child = await process.start(
                self.instance.command,
                environment={**os.environ, **self.instance.environment, **self._keys(), **socket_path},
                directory=self.service.directory,
                on_line=lambda line: self.tell(self.instance.name, line),
            )
            watcher = None if socket_path else asyncio.create_task(self._wait_for_port())
            ended = asyncio.create_task(child.wait())
            stopped = asyncio.create_task(self.stop.wait())
            await asyncio.wait({ended, stopped}, return_when=asyncio.FIRST_COMPLETED)
            for task in filter(None, (stopped, watcher)):
                task.cancel()
            child.send(signal.SIGTERM)
            return await _or_at_once(ended, self.ending, child)

    def _keys(self) -> dict[str, str]:
        """The key file itself: there is no systemd to make a copy."""
        path = self.service.api_keys_file
        return {} if path is None else {"CHATTERBOX_API_KEYS_FILE": path}

    @contextmanager
    def _notify_socket(self) -> Iterator[dict[str, str]]:
        """The environment that tells a server where to report; empty for one that does not."""
        if not self.service.speaks_notify:
            yield {}
            return
        path = self.runtime_dir / f"{self.instance.name}.notify"
        notify = process.NotifySocket(path, self._now_ready)
        try:
            yield {"NOTIFY_SOCKET": str(path)}
        finally:
            notify.close()

    async def _wait_for_port(self) -> None:
        """For a server that does not say when it is ready: it is when its port answers."""
        while not await process.accepts(self.instance.host, self.instance.port):
            await asyncio.sleep(0.2)
        self._now_ready()

    def _now_ready(self) -> None:
        self.ready.set()
        self.tell(self.instance.name, "ready")


async def _or_at_once(ended: asyncio.Future[int], ending: _Ending, child: Process) -> int:
    """Wait for a child that was asked to end; kill it if the operator insists."""
    insisted: asyncio.Future[Any] = asyncio.create_task(ending.insisted.wait())
    await asyncio.wait({ended, insisted}, return_when=asyncio.FIRST_COMPLETED)
    insisted.cancel()
    if not ended.done():
        child.send(signal.SIGKILL)
    return await ended


async def _announce(fleet: Fleet, ready: dict[str, asyncio.Event], tell: Tell) -> None:
    """Say when the whole fleet can speak, on a line that begins with ``ready`` so that scripts can wait for it."""
    for event in ready.values():
        await event.wait()
    count = len(ready)
    tell("ready", f"{count} instance{'s' * (count != 1)} behind http://{fleet.front.listen}  (Ctrl-C ends all)")
    tell("up", f"`chatterbox-deploy monitor FLEET --access-log {fleet.front.access_log}` shows what it does")
