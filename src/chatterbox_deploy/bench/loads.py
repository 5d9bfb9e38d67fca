"""What a benchmark is: a load, whom it goes to, what came of each request, and the file that keeps all of it.

Values only: sends nothing, and draws no conclusion. Times are seconds, and those of a sample count from the beginning
of its repetition's window, so that what belongs to the warm-up before it is negative.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Literal

from pydantic import TypeAdapter, ValidationError

from chatterbox_deploy.bench.heard import Format  # noqa: TC001  pydantic reads it
from chatterbox_deploy.errors import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TEXT_SETS = ("short", "mixed", "book")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How requests come, and what they ask for. Two equal loads send the same texts, and at the same moments."""

    concurrency: int | None
    """Closed loop: so many clients, each of whom asks again as soon as it has its answer."""
    rate_per_s: float | None
    """Open loop: requests come at random (Poisson) at this rate, whatever became of those before them."""
    window_s: float
    """Length of what is measured, in each repetition."""
    warmup_s: float
    """Under the same load, just before: the window begins with as much in flight as it ends with."""
    repetitions: int
    seed: int
    texts: str
    """Name of a text set, or the file of one's own."""
    audio_format: Format
    voice: str | None
    stream: bool
    timeout_s: float
    """After so long a request without its last byte is a failure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One request."""

    due_s: float
    """When it ought to have been sent: the moment from which everybody waits."""
    sent_s: float
    first_byte_s: float | None
    """When the first byte of sound came, a header of its format not counted; ``None``: none came."""
    done_s: float
    """When the last byte came, or it was clear that none would."""
    chars: int
    status: int | None
    """``None``: nobody answered."""
    failure: str | None
    """Why it does not count as answered: ``503``, ``cut short`` …; ``None``: the whole sound came."""
    instance: str | None
    """Who answered, by X-Instance; the one address asked, where nobody says it."""
    size_bytes: int
    audio_s: float | None
    """Sound in the bytes that came; ``None`` where they do not say."""
    queue_wait_s: float | None
    """As the server told (X-Queue-Wait)."""
    stalls: int | None
    """As ``heard.Playback``; ``None`` where the format does not tell what had come when."""
    stalled_s: float | None
    longest_gap_s: float | None

    @property
    def latency_s(self) -> float:
        """From the moment it was due to the last byte; infinite for a failure, which is never fast."""
        return float("inf") if self.failure is not None else self.done_s - self.due_s

    @property
    def to_first_byte_s(self) -> float:
        """The same to the first byte of sound."""
        if self.failure is not None or self.first_byte_s is None:
            return float("inf")
        return self.first_byte_s - self.due_s

    @property
    def lag_s(self) -> float:
        """How late we were to send it."""
        return self.sent_s - self.due_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """What one instance counted by itself (/metrics)."""

    ended: dict[str, int]
    """Requests to speak by outcome, over the whole repetition: from before its warm-up until all had ended."""
    over_s: float
    """Seconds between the two readings at the ends of the window, between which the rest was counted."""
    audio_s: float | None
    synthesis_s: float | None
    tokens: float | None
    """``None`` where the engine does not count any."""
    cpu_s: float | None
    """Of its process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CardUse:
    """Means of one GPU over the window; ``None`` is what its driver does not tell."""

    index: str
    name: str
    utilisation_percent: float | None
    sm_active_percent: float | None
    memory_used_bytes: float | None
    power_w: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What the window took, beside what the instances tell."""

    machine_cores: float | None
    """Cores busy with anything, of this machine; ``None`` where the kernel does not say."""
    generator_cores: float
    """Of our own process: near 1, it is we who are measured."""
    cards: tuple[CardUse, ...] | None
    """``None``: no driver answers here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Repetition:
    """One time through a load, from an idle fleet to an idle fleet."""

    seed: int
    window_s: float
    """As it was: shorter than planned where somebody stopped it."""
    samples: tuple[Sample, ...]
    """Every request, also those of the warm-up."""
    counted: dict[str, Counted]
    """By instance; of whoever has no /metrics, nothing."""
    use: Use

    @property
    def measured(self) -> tuple[Sample, ...]:
        """Those that were due within the window."""
        return tuple(sample for sample in self.samples if 0 <= sample.due_s < self.window_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One load on one set of instances."""

    label: str
    """``front``, ``gpu0``, ``4 instances`` …"""
    instances: tuple[str, ...]
    """Who could answer."""
    gpus: int | None
    """How many GPUs they have together; ``None`` where no fleet file says."""
    load: Load
    repetitions: tuple[Repetition, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A promise: a share ``quantile`` of all requests get ``what`` within ``limit_s``."""

    what: Literal["first-byte", "latency"]
    quantile: float
    limit_s: float

    def __str__(self) -> str:
        return f"p{self.quantile * 100:g} {self.what} <= {self.limit_s:g} s"

    def met_by(self, sample: Sample) -> bool:
        """Whether ``sample`` was fast enough; a failure never is."""
        taken_s = sample.to_first_byte_s if self.what == "first-byte" else sample.latency_s
        return taken_s <= self.limit_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """What a rate did to a target."""

    rate_per_s: float
    late: tuple[int, ...]
    """Requests of each repetition that missed the target."""
    of: tuple[int, ...]
    """Requests of each repetition."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """How the highest rate that holds a target was looked for, in order."""

    target: Target
    tried: tuple[Tried, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What ``bench`` saves."""

    format: Literal[1]
    """Another number is another meaning."""
    version: str
    """Of the kit."""
    command: str
    """As it was typed."""
    began: str
    """ISO 8601, UTC."""
    machine: str
    cores: int
    probes: int
    """Requests before the first repetition, one for each address, which count nowhere else."""
    partial: bool
    """Somebody stopped it: what is here is whole, but not all that was asked for."""
    trials: tuple[Trial, ...]
    search: Search | None


@cache
def _file() -> TypeAdapter[Run]:
    return TypeAdapter(Run)


def to_json(run: Run) -> str:
    """One line for each value would make a megabyte of spaces: compact."""
    return _file().dump_json(run).decode() + "\n"


def from_json(text: str, *, source: str) -> Run:
    """What ``to_json`` wrote; ``source`` names it in messages.

    Raises:
        BenchmarkError: with every problem found.
    """
    try:
        return _file().validate_json(text)
    except ValidationError as error:
        if not _says_format(text):
            raise BenchmarkError([f"{source} is no file of `bench -o`"]) from None
        problems = [
            f"{'.'.join(map(str, each['loc'])) or 'the file'}: {each['msg'].lower()}" for each in error.errors()
        ]
        raise BenchmarkError([f"{source}: {problem}" for problem in problems]) from None


def _says_format(text: str) -> bool:
    try:
        read = json.loads(text)
    except ValueError:
        return False
    return isinstance(read, dict) and "format" in read


def read_texts(name: str, own: str | None = None) -> tuple[str, ...]:
    """The texts of a set that came with us, or those of ``own``, the contents of a file: one a line, empty ones not."""
    if own is None:
        own = resources.files("chatterbox_deploy.bench").joinpath(f"texts/{name}.txt").read_text(encoding="utf-8")
    return tuple(line.strip() for line in own.splitlines() if line.strip())


def in_turn(texts: Sequence[str], seed: int) -> Iterator[str]:
    """Texts without end: each once in a random order, then again in another, so that no run has luck with lengths."""
    dice = random.Random(f"texts {seed}")  # noqa: S311  a benchmark, no secret
    while True:
        yield from dice.sample(texts, len(texts))


def arrivals(load: Load, seed: int) -> tuple[float, ...]:
    """When each request of an open loop is due, from the beginning of the warm-up to the end of the window."""
    assert load.rate_per_s is not None  # noqa: S101  told by the caller's branch
    dice = random.Random(f"arrivals {seed}")  # noqa: S311  a benchmark, no secret
    due: list[float] = []
    at_s = -load.warmup_s
    while (at_s := at_s + dice.expovariate(load.rate_per_s)) < load.window_s:
        due.append(at_s)
    return tuple(due)
