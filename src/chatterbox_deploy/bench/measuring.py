"""Put a load on a fleet, and keep what came of it: repetitions of a window under load. Concludes and prints nothing.

The clock of every latency begins when a request was due, not when it was sent: a client that waits for a slow server
before it asks again would leave out just the requests that had to wait longest (coordinated omission).
"""

from __future__ import annotations

import asyncio
import itertools
import os
import resource
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Protocol

from chatterbox_deploy.bench import asking, counters, loads
from chatterbox_deploy.bench.asking import Asker, pause
from chatterbox_deploy.bench.loads import CardUse, Counted, Repetition, Trial, Use
from chatterbox_deploy.errors import CommandFailed
from chatterbox_deploy.gpu import nvml

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import aiohttp

    from chatterbox_deploy.bench.aims import Aim, Door
    from chatterbox_deploy.bench.counters import Reading
    from chatterbox_deploy.bench.loads import Load, Sample
    from chatterbox_deploy.gpu.cards import Card

METRICS_TIMEOUT_S = 5.0

REFUSED_PAUSE_S = 0.25
"""How long a client of a closed loop waits after a failure: else it would do nothing but be refused."""

CARDS_EVERY_S = 1.0
TICK_S = 0.25


class Watcher(Protocol):
    """Is told how far it is."""

    def begins(self, label: str, number: int, of: int, length_s: float) -> None:
        """A repetition that lasts ``length_s``, its warm-up included, and then until the last answer."""
        ...

    def ticks(self, passed_s: float, samples: Sequence[Sample], in_flight: int) -> None:
        """A few times a second, with all samples so far."""
        ...


@dataclass(frozen=True, slots=True)
class Stop:
    """How a benchmark is stopped: asked, it sends nothing more and waits for what is out; insisted, it drops that."""

    asked: asyncio.Event
    insisted: asyncio.Event


async def settle(session: aiohttp.ClientSession, aim: Aim) -> Aim:
    """Know which doors of unknown kind are an instance: those with /metrics of their own."""
    doors = []
    for door in aim.doors:
        by_itself = door.by_itself
        if by_itself is None and await asking.metrics(session, door, timeout_s=METRICS_TIMEOUT_S) is not None:
            by_itself = True
        doors.append(replace(door, by_itself=by_itself))
    known = {door.url: door for door in doors if door.by_itself is not None}
    instances = [known.get(each.url, each) for each in aim.instances]
    return replace(aim, doors=tuple(doors), instances=tuple(each for each in instances if each.by_itself))


async def probe(session: aiohttp.ClientSession, doors: Iterable[Door], load: Load) -> int:
    """One request through each door; how many there were.

    Raises:
        CommandFailed: not every one is answered with sound; every reason at once.
    """
    problems, count = [], 0
    for door in doors:
        now = time.perf_counter()
        sample = await Asker(session, load, (door,)).ask("Hello.", seed=0, due=now, origin=now)
        count += 1
        if sample.failure is not None:
            reason = f"it answered {sample.failure}" if sample.failure.isdigit() else sample.failure
            problems.append(f"{door.name} ({door.url}): {reason}{_advice(door, sample)}")
    if problems:
        raise CommandFailed("\n  ".join(["cannot begin, for not everybody speaks:", *problems]))
    return count


def _advice(door: Door, sample: Sample) -> str:
    if sample.status in (401, 403):
        return "; give an API key: --api-key-file FILE, or $CHATTERBOX_API_KEY"
    return "; is the fleet running? `chatterbox-deploy status`" if sample.status is None and door.here else ""


class Bench:
    """Trials, one after the other, over one session."""

    def __init__(self, session: aiohttp.ClientSession, texts: Sequence[str], watcher: Watcher, stop: Stop) -> None:
        self._session = session
        self._texts = texts
        self._watcher = watcher
        self._stop = stop

    async def trial(self, aim: Aim, load: Load) -> Trial:
        """All repetitions of ``load``, or those that were whole when somebody stopped it."""
        repetitions: list[Repetition] = []
        for number in range(load.repetitions):
            if self._stop.asked.is_set():
                break
            self._watcher.begins(aim.label, number + 1, load.repetitions, load.warmup_s + load.window_s)
            done = await self._repeat(aim, load, load.seed + number)
            # Half a window tells something; less would be noise beside whole ones.
            if done is not None and (done.window_s >= load.window_s / 2 or not repetitions):
                repetitions.append(done)
        return Trial(
            label=aim.label,
            instances=tuple(door.name for door in aim.instances),
            gpus=aim.gpus,
            load=load,
            repetitions=tuple(repetitions),
        )

    async def _repeat(self, aim: Aim, load: Load, seed: int) -> Repetition | None:
        """``None``: stopped before there was anything to measure."""
        before = await self._read(aim)
        asker = Asker(self._session, load, aim.doors)
        samples: list[Sample] = []
        origin = time.perf_counter() + load.warmup_s
        async with asyncio.TaskGroup() as tasks:
            sending = tasks.create_task(self._send(asker, load, seed, origin, samples))
            watching = tasks.create_task(self._window(aim, load, origin))
            ticking = tasks.create_task(self._tick(asker, load, origin, samples))
            insisted = tasks.create_task(self._stop.insisted.wait())
            await asyncio.wait({sending, insisted}, return_when=asyncio.FIRST_COMPLETED)
            whole = sending.done()
            for task in (sending, ticking, insisted):
                task.cancel()
            if not whole:
                watching.cancel()
        if not whole:
            return None
        after = await self._read(aim)
        window_s, begin, end, use = watching.result()
        if window_s <= 0 or not samples:
            return None
        names = [door.name for door in aim.instances]
        return Repetition(
            seed=seed,
            window_s=window_s,
            samples=tuple(sorted(samples, key=lambda sample: sample.due_s)),
            counted={
                name: counted
                for name in names
                if (counted := _counted(before.get(name), begin.get(name), end.get(name), after.get(name))) is not None
            },
            use=use,
        )

    async def _send(self, asker: Asker, load: Load, seed: int, origin: float, samples: list[Sample]) -> None:
        """Ends when everything that was sent has ended."""
        texts, numbers = loads.in_turn(self._texts, seed), itertools.count()

        async def ask(due: float) -> Sample:
            # The seed of each utterance, far from those of the repetition before.
            sample = await asker.ask(next(texts), seed=seed * 100_000 + next(numbers), due=due, origin=origin)
            samples.append(sample)
            return sample

        async def client() -> None:
            while (now := time.perf_counter()) < origin + load.window_s and not self._stop.asked.is_set():
                if (await ask(now)).failure is not None:
                    await pause(REFUSED_PAUSE_S, self._stop.asked)

        async with asyncio.TaskGroup() as tasks:
            if load.concurrency is not None:
                for _ in range(load.concurrency):
                    tasks.create_task(client())
                return
            for due_s in loads.arrivals(load, seed):
                due = origin + due_s
                if not await pause(due - time.perf_counter(), self._stop.asked):
                    return
                tasks.create_task(ask(due))

    async def _window(
        self, aim: Aim, load: Load, origin: float
    ) -> tuple[float, dict[str, Reading], dict[str, Reading], Use]:
        """How long the window was, what was counted at its ends, and what it took."""
        asked = self._stop.asked
        await pause(origin - time.perf_counter(), asked)
        cpu_s, machine = time.process_time(), _machine_cpu()
        began = time.perf_counter()
        begin = await self._read(aim)
        cards: list[tuple[Card, ...]] = []
        at = began
        while at < origin + load.window_s and not asked.is_set():
            seen = await asyncio.to_thread(nvml.read)
            if seen is None:
                at = origin + load.window_s
            else:
                cards.append(seen)
                at = max(at + CARDS_EVERY_S, time.perf_counter())
            await pause(min(at, origin + load.window_s) - time.perf_counter(), asked)
        ended = time.perf_counter()
        use = Use(
            machine_cores=_busy_cores(machine, _machine_cpu()),
            generator_cores=(time.process_time() - cpu_s) / max(ended - began, 1e-9),
            cards=_card_use(cards) if cards else None,
        )
        window_s = min(load.window_s, ended - origin)
        return window_s, begin, await self._read(aim), use

    async def _tick(self, asker: Asker, load: Load, origin: float, samples: list[Sample]) -> None:
        while True:
            self._watcher.ticks(time.perf_counter() - origin + load.warmup_s, samples, asker.in_flight)
            await asyncio.sleep(TICK_S)

    async def _read(self, aim: Aim) -> dict[str, Reading]:
        """All instances at once: what one counts meanwhile would else be missing of another."""

        async def one(door: Door) -> tuple[str, Reading | None]:
            text = await asking.metrics(self._session, door, timeout_s=METRICS_TIMEOUT_S)
            return door.name, None if text is None else counters.parse(text, time.perf_counter())

        read = await asyncio.gather(*(one(door) for door in aim.instances))
        return {name: reading for name, reading in read if reading is not None}


def _counted(
    before: Reading | None, begin: Reading | None, end: Reading | None, after: Reading | None
) -> Counted | None:
    """``None``: it was not there all the time, or another process was."""
    if before is None or begin is None or end is None or after is None:
        return None
    if not counters.same_process(before, after) or end.at_s <= begin.at_s:
        return None
    outcomes = {name: count - before.ended.get(name, 0) for name, count in after.ended.items()}
    return Counted(
        ended={name: count for name, count in outcomes.items() if count},
        over_s=end.at_s - begin.at_s,
        audio_s=counters.grown(begin.audio_s, end.audio_s),
        synthesis_s=counters.grown(begin.synthesis_s, end.synthesis_s),
        tokens=counters.grown(begin.tokens, end.tokens),
        cpu_s=counters.grown(begin.cpu_s, end.cpu_s),
    )


def _card_use(seen: Sequence[tuple[Card, ...]]) -> tuple[CardUse, ...]:
    """Means over all looks; of what a look did not tell, over the others."""

    def mean(index: str, what: str) -> float | None:
        known = [getattr(card, what) for cards in seen for card in cards if card.index == index]
        told = [value for value in known if value is not None]
        return fmean(told) if told else None

    return tuple(
        CardUse(
            index=card.index,
            name=card.name,
            utilisation_percent=mean(card.index, "utilisation_percent"),
            sm_active_percent=mean(card.index, "sm_active_percent"),
            memory_used_bytes=mean(card.index, "memory_used_bytes"),
            power_w=mean(card.index, "power_w"),
        )
        for card in seen[0]
    )


def _machine_cpu() -> tuple[int, int] | None:
    """Ticks of all cores since the start, and those without work (proc_stat(5))."""
    with suppress(OSError, ValueError, IndexError):
        ticks = [int(word) for word in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]]
        return sum(ticks), ticks[3] + ticks[4]
    return None


def _busy_cores(before: tuple[int, int] | None, after: tuple[int, int] | None) -> float | None:
    if before is None or after is None or after[0] <= before[0]:
        return None
    total, idle = after[0] - before[0], after[1] - before[1]
    return (total - idle) / total * (os.cpu_count() or 1)


def allow_many_connections() -> None:
    """Each request out holds a file; the usual soft limit of 1,024 would be ours, not the fleet's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
