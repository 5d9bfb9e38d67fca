"""First come, first served against our size order, for one engine: `python scripts/bench_queue_order.py [--real]`.

Simulated: Poisson arrivals, three mixes of requests cut into pieces of at most 10 engine seconds; every order meets the
same arrivals. `--real` sends the first of them through the real queue and its thread, to an engine that sleeps 20 ms
for each second. Runs two to four minutes; prints a Markdown table.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
import sys
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal, cast

import numpy as np

from chatterbox_server.engine import Errand, Sampling, Utterance
from chatterbox_server.order import DUE, PAUSE_S, Claim, Order, order
from chatterbox_server.queue import EngineQueue
from chatterbox_server.speaker import Sound

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.random import Generator
    from numpy.typing import NDArray

    from chatterbox_server.engine import Engine

PIECE_S: Final = 10.0
REQUESTS: Final = 20_000
SEEDS: Final = (1, 2, 3, 4, 5)
PLACES: Final = 8 + 1
MAX_WAIT_S: Final = 60.0
PLACELESS: Final = (math.inf, math.inf)

REAL_REQUESTS: Final = 1_000
SCALE: Final = 0.02
"""Real seconds of an engine second."""
CHARS_PER_S: Final = 100

COLUMNS: Final = (
    "mean wait",
    "p95",
    "p99",
    "with pauses",
    "… of the largest 10 %",
    "longest pause",
    "refused, full %",
    "refused, waited %",
)


@dataclass(frozen=True)
class Mix:
    draw: Callable[[Generator, int], NDArray[np.float64]]
    mean_s: float


def lognormal(rng: Generator, count: int) -> NDArray[np.float64]:
    return rng.lognormal(math.log(5.0) - 0.5, 1.0, count)


def bimodal(rng: Generator, count: int) -> NDArray[np.float64]:
    return np.where(rng.random(count) < 0.9, 1.0, 20.0)


def books(rng: Generator, count: int) -> NDArray[np.float64]:
    return np.where(rng.random(count) < 0.001, 600.0, bimodal(rng, count))


MIXES: Final = {
    "lognormal": Mix(lognormal, 5.0),
    "bimodal": Mix(bimodal, 2.9),
    "with books": Mix(books, 0.999 * 2.9 + 0.6),
}


class Shortest:
    """The least remaining work, however long anybody waits: what ageing costs."""

    def choose(self, claims: Sequence[Claim], now_s: float) -> int:  # noqa: ARG002
        return min(range(len(claims)), key=lambda index: (claims[index].remaining_s, claims[index].admitted_s))

    def served(self, claim: Claim, engine_s: float, now_s: float) -> None:
        pass


class Shrinking:
    """Remaining work, shrunk evenly by waiting: what we did not choose."""

    def __init__(self, max_wait_s: float) -> None:
        self._begin_s = DUE * max_wait_s

    def choose(self, claims: Sequence[Claim], now_s: float) -> int:
        pause_s = PAUSE_S * sum(claim.begun for claim in claims)

        def place(index: int) -> tuple[bool, float, float, float]:
            claim = claims[index]
            patience_s = pause_s if claim.begun else self._begin_s
            left = max(0.0, 1.0 - (now_s - claim.waiting_since_s) / patience_s)
            due_s = claim.waiting_since_s + patience_s
            return not (claim.begun and left == 0.0), claim.remaining_s * left, due_s, claim.admitted_s

        return min(range(len(claims)), key=place)

    def served(self, claim: Claim, engine_s: float, now_s: float) -> None:
        pass


@dataclass(slots=True)
class Request:
    claim: Claim
    size_s: float
    left_s: float
    off: float = 1.0
    """The estimate is this many times the truth."""
    begun_s: float = math.nan
    paused_s: float = 0.0
    longest_pause_s: float = 0.0

    @property
    def wait_s(self) -> float:
        return self.begun_s - self.claim.admitted_s

    @property
    def all_s(self) -> float:
        return self.wait_s + self.paused_s

    def begin_piece(self, now_s: float) -> float:
        """Seconds that the piece takes."""
        if self.claim.begun:
            pause_s = now_s - self.claim.waiting_since_s
            self.paused_s += pause_s
            self.longest_pause_s = max(self.longest_pause_s, pause_s)
        else:
            self.begun_s = now_s
        return min(PIECE_S, self.left_s)

    def end_piece(self, piece_s: float, now_s: float) -> None:
        self.left_s -= piece_s
        self.claim = Claim(self.claim.client, self.claim.admitted_s, now_s, self.left_s * self.off, begun=True)


@dataclass(slots=True)
class Outcome:
    served: list[Request] = field(default_factory=list)
    full: int = 0
    expired: int = 0


def arrivals(
    mix: Mix, load: float, seed: int, *, off: float = 1.0, clients: int = 1, count: int = REQUESTS
) -> deque[Request]:
    rng = np.random.default_rng(seed)
    sizes_s = mix.draw(rng, count)
    at_s = np.cumsum(rng.exponential(mix.mean_s / load, count))
    offs = off ** rng.uniform(-1.0, 1.0, count)
    return deque(
        Request(Claim(f"{number % clients}", came_s, came_s, size_s * times, begun=False), size_s, size_s, times)
        for number, (came_s, size_s, times) in enumerate(
            zip(at_s.tolist(), sizes_s.tolist(), offs.tolist(), strict=True)
        )
    )


def simulate(coming: deque[Request], chosen_by: Order, *, places: float, max_wait_s: float) -> Outcome:
    """One engine; a piece once begun is finished; nobody leaves but whom the queue refuses."""
    outcome, waiting, now_s = Outcome(), list[Request](), 0.0

    def expire(at_s: float) -> None:
        late = [one for one in waiting if not one.claim.begun and one.claim.admitted_s + max_wait_s <= at_s]
        outcome.expired += len(late)
        for one in late:
            waiting.remove(one)

    def admit(until_s: float, running: int) -> None:
        while coming and coming[0].claim.admitted_s <= until_s:
            one = coming.popleft()
            expire(one.claim.admitted_s)
            if len(waiting) + running < places:
                waiting.append(one)
            else:
                outcome.full += 1
        expire(until_s)

    while coming or waiting:
        if not waiting:
            now_s = max(now_s, coming[0].claim.admitted_s)
        admit(now_s, running=0)
        claims = [one.claim for one in waiting]
        one = waiting.pop(chosen_by.choose(claims, now_s))
        piece_s = one.begin_piece(now_s)
        now_s += piece_s
        admit(now_s, running=1)
        chosen_by.served(one.claim, piece_s, now_s)
        one.end_piece(piece_s, now_s)
        if one.left_s > 1e-9:
            waiting.append(one)
        else:
            outcome.served.append(one)
    return outcome


@dataclass(frozen=True)
class Scaled:
    """Our order at the pace of a hurried clock."""

    inner: Order

    def choose(self, claims: Sequence[Claim], now_s: float) -> int:
        return self.inner.choose([self._true(claim) for claim in claims], now_s / SCALE)

    def served(self, claim: Claim, engine_s: float, now_s: float) -> None:
        self.inner.served(self._true(claim), engine_s / SCALE, now_s / SCALE)

    def _true(self, claim: Claim) -> Claim:
        return replace(
            claim,
            admitted_s=claim.admitted_s / SCALE,
            waiting_since_s=claim.waiting_since_s / SCALE,
            remaining_s=claim.remaining_s / SCALE,
            piece_s=claim.piece_s / SCALE,
        )


class Sleeper:
    """All that the queue itself asks of an engine."""

    places = 1
    frees_beside = True
    broken = None

    def memory(self) -> None:
        pass

    def free(self) -> None:
        pass


def sleep(_engine: Engine, utterance: Utterance, _errand: Errand, _free: Callable[[], None]) -> Sound:
    time.sleep(len(utterance.text) / CHARS_PER_S * SCALE)
    return Sound(np.zeros(1, np.float32))


async def drive(coming: deque[Request], chosen_by: Order) -> Outcome:
    """The same requests through the real queue; a request's text is as long as its work."""
    outcome = Outcome()
    queue = EngineQueue(
        lambda: cast("Engine", Sleeper()),
        sleep,
        order=Scaled(chosen_by),
        size=len(coming),
        max_wait_s=math.inf,
        longest_utterance_s=math.inf,
    )
    await queue.start()
    start_s = time.monotonic()

    async def ask(one: Request) -> None:
        await asyncio.sleep(start_s + one.claim.admitted_s * SCALE - time.monotonic())
        whole, part_s = divmod(one.size_s, PIECE_S)
        texts = ["x" * round(size_s * CHARS_PER_S) for size_s in ([PIECE_S] * int(whole) + [part_s]) if size_s > 0]
        admitted_s = ended_s = time.monotonic()
        place = queue.admit(
            [
                Utterance(text=text or "x", voice=None, language="en", speed=1.0, sampling=Sampling(), seed=0)
                for text in texts
            ],
            client=one.claim.client,
        )
        async with place:
            async for spoken in place:
                now_s = time.monotonic()
                if math.isnan(one.begun_s):
                    one.begun_s = one.claim.admitted_s + place.queue_wait_s / SCALE
                else:
                    pause_s = max(0.0, now_s - ended_s - spoken.synthesis_s) / SCALE
                    one.longest_pause_s = max(one.longest_pause_s, pause_s)
                ended_s = now_s
        one.paused_s = (ended_s - admitted_s) / SCALE - one.wait_s - one.size_s
        outcome.served.append(one)

    await asyncio.gather(*(ask(one) for one in coming))
    await queue.close()
    return outcome


def row(outcomes: Sequence[Outcome]) -> list[str]:
    """Mean over the seeds, and the standard deviation between them for the mean wait."""
    waits, cells = list[float](), list[list[float]]()
    for outcome in outcomes:
        wait_s = np.array([one.wait_s for one in outcome.served])
        largest = sorted(outcome.served, key=lambda one: one.size_s)[-len(outcome.served) // 10 :]
        came = len(outcome.served) + outcome.full + outcome.expired
        waits.append(float(wait_s.mean()))
        cells.append(
            [
                float(np.quantile(wait_s, 0.95)),
                float(np.quantile(wait_s, 0.99)),
                statistics.fmean(one.all_s for one in outcome.served),
                statistics.fmean(one.all_s for one in largest),
                max(one.longest_pause_s for one in outcome.served),
                100 * outcome.full / came,
                100 * outcome.expired / came,
            ]
        )
    *seconds, pause_s, full, expired = (list(column) for column in zip(*cells, strict=True))
    spread = f" ± {statistics.stdev(waits):.1f}" if len(waits) > 1 else ""
    return [
        f"{statistics.fmean(waits):.1f}{spread}",
        *(f"{statistics.fmean(column):.1f}" for column in seconds),
        f"{max(pause_s):.0f}",
        f"{statistics.fmean(full):.1f}",
        f"{statistics.fmean(expired):.1f}",
    ]


def tell(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def simulated() -> None:
    orders: dict[str, Callable[[float], Order]] = {
        "fifo": lambda max_wait_s: order("fifo", max_wait_s=max_wait_s),
        "size": lambda max_wait_s: order("size", max_wait_s=max_wait_s),
        "shrinking": Shrinking,
        "shortest": lambda _: Shortest(),
    }
    cases = [
        *((load, PLACELESS, 1.0, 1, tuple(orders)) for load in (0.7, 0.95)),
        (0.95, PLACELESS, 2.0, 1, ("size",)),
        (0.95, PLACELESS, 1.0, REQUESTS, ("size",)),
        *((load, (PLACES, MAX_WAIT_S), 1.0, 1, tuple(orders)) for load in (0.7, 0.95, 1.2)),
        (0.95, (PLACES, MAX_WAIT_S), 2.0, 1, ("size",)),
        (0.95, (PLACES, MAX_WAIT_S), 1.0, REQUESTS, ("size",)),
    ]
    for mix_name, mix in MIXES.items():
        for load, (places, max_wait_s), off, clients, names in cases:
            for name in names:
                outcomes = [
                    simulate(
                        arrivals(mix, load, seed, off=off, clients=clients),
                        orders[name](max_wait_s),
                        places=places,
                        max_wait_s=max_wait_s,
                    )
                    for seed in SEEDS
                ]
                note = (", estimates off by up to 2x" if off > 1 else "") + (", each its own client" * (clients > 1))
                tell(mix_name, f"{load}", f"{places:g}", name + note, *row(outcomes))


async def real() -> None:
    """All at once, each with its own queue and thread: they mostly sleep."""
    names: tuple[Literal["fifo", "size"], ...] = ("fifo", "size")
    cells = [(mix_name, name) for mix_name in MIXES for name in names]

    def coming(mix_name: str) -> deque[Request]:
        return arrivals(MIXES[mix_name], 0.95, SEEDS[0], count=REAL_REQUESTS)

    driven = await asyncio.gather(
        *(drive(coming(mix_name), order(name, max_wait_s=math.inf)) for mix_name, name in cells)
    )
    for (mix_name, name), outcome in zip(cells, driven, strict=True):
        calculated = simulate(coming(mix_name), order(name, max_wait_s=math.inf), places=math.inf, max_wait_s=math.inf)
        tell(mix_name, "0.95", "inf", f"{name}, real", *row([outcome]))
        tell(mix_name, "0.95", "inf", f"{name}, simulated", *row([calculated]))


def main() -> None:
    """Print one row per mix, load, places and order; seconds are engine seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", action="store_true", help="Drive the real queue.")
    asked = parser.parse_args()
    began_s = time.monotonic()
    tell("mix", "load", "places", "order", *COLUMNS)
    tell(*["---"] * 4, *["---:"] * len(COLUMNS))
    if asked.real:
        asyncio.run(real())
    else:
        simulated()
    print(f"\n{time.monotonic() - began_s:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
