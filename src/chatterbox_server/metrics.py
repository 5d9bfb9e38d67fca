"""What an instance counts and measures, in Prometheus' words. Decides nothing, and keeps nothing outside its object."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import Scope

from chatterbox_server.engine import Failure

Outcome = Literal["answered", "refused", "busy", "failed", "left", "cut"]
"""How a request ended; what each means stands in the help of ``chatterbox_requests_total``."""

OTHER: Final = "other"
"""The route of every path that is nobody's: a scanner's guesses must not become labels."""

SECONDS: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0)
"""From a short sentence on a fast GPU to a wait that nobody sits out."""

FACTORS: Final = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 1.0, 1.25, 1.5, 2.0, 4.0, 8.0)
"""Finest around 1.0, where an engine begins to fall behind the listener."""

STARTS: Final = "starts"
"""The file in which ``count_start`` counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauges:
    """What is true at this moment; ``None`` where nobody knows."""

    waiting: int
    running: int
    ready: bool
    gpu_memory_allocated_bytes: int | None = None
    gpu_memory_reserved_bytes: int | None = None
    gpu_memory_free_bytes: int | None = None
    gpu_memory_total_bytes: int | None = None


class Metrics:
    """One app's metrics, with a registry of their own: two apps in one process never share a number.

    Everything may be called from any thread.
    """

    def __init__(self, *, restarts: int | None = None) -> None:
        """``restarts`` is what ``count_start`` returned."""
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "chatterbox_requests",
            "Requests that have ended, by the template of their path ('other' where no route has the path) and outcome:"
            " answered; refused: the request was wrong (4xx); busy: come back later, or ask another instance (503);"
            " failed: any other 5xx; left: the client hung up first; cut: broke off after the answer had begun.",
            ("route", "outcome"),
            registry=self._registry,
        )
        self._waits = Histogram(
            "chatterbox_queue_wait_seconds",
            "Seconds from admission until the engine began with a request.",
            buckets=SECONDS,
            registry=self._registry,
        )
        self._first_bytes = Histogram(
            "chatterbox_time_to_first_byte_seconds",
            "Seconds from the arrival of a speech request until its first sound was sent.",
            buckets=SECONDS,
            registry=self._registry,
        )
        self._factors = Histogram(
            "chatterbox_real_time_factor",
            "Seconds of synthesis per second of sound, of each piece; below 1 the engine keeps ahead of the listener.",
            buckets=FACTORS,
            registry=self._registry,
        )
        self._synthesis = Counter(
            "chatterbox_synthesis_seconds",
            "Seconds the engine has spent speaking; its rate is the share of time in which it is busy.",
            registry=self._registry,
        )
        self._audio = Counter(
            "chatterbox_audio_seconds",
            "Seconds of sound that the engine has made.",
            registry=self._registry,
        )
        # Registered with the first count: of an engine that counts no tokens, 0 would be untrue.
        self._tokens = Counter(
            "chatterbox_speech_tokens",
            "Speech tokens that the engine has made, 25 for each second of sound; over the rate of"
            " chatterbox_synthesis_seconds_total it is tokens per second. Absent where the engine does not count them.",
            registry=None,
        )
        self._failures = Counter(
            "chatterbox_engine_failures",
            "Failures of the engine by kind: out_of_memory; broken: can never speak again in this process;"
            " stuck: an utterance that did not end; odd_piece: too short or too long for its text, and spoken again;"
            " recycled: ended itself above a memory limit.",
            ("kind",),
            registry=self._registry,
        )
        for kind in get_args(Failure):
            # From 0, for increase() cannot see a count that begins with 1.
            self._failures.labels(kind)
        self._model = Gauge(
            "chatterbox_model_info",
            "Always 1; its labels say which model speaks, through which engine, in which instance.",
            ("model", "engine", "instance"),
            registry=self._registry,
        )
        if restarts is not None:
            Gauge(
                "chatterbox_restarts",
                "Restarts of this instance since it was last stopped: by systemd after an end that nobody asked for,"
                " or by `systemctl restart`.",
                registry=self._registry,
            ).set(restarts)
        # process_resident_memory_bytes, process_cpu_seconds_total, process_start_time_seconds … as everywhere.
        ProcessCollector(registry=self._registry)

    def loaded(self, *, model: str, engine: str, instance: str) -> None:
        """The engine is loaded, and has told its model's name."""
        self._model.labels(model, engine, instance).set(1)

    def request_ended(self, *, route: str, outcome: Outcome) -> None:
        """``route`` as ``route_of`` gives it, ``outcome`` as ``outcome_of`` does, or ``cut``."""
        self._requests.labels(route, outcome).inc()

    def waited(self, seconds: float) -> None:
        self._waits.observe(seconds)

    def first_byte(self, seconds: float) -> None:
        self._first_bytes.observe(seconds)

    def spoke(self, *, synthesis_s: float, audio_s: float, tokens: float | None) -> None:
        """The engine has spoken one piece; ``tokens`` is ``None`` where it does not count them."""
        self._synthesis.inc(synthesis_s)
        self._audio.inc(audio_s)
        if audio_s > 0:
            self._factors.observe(synthesis_s / audio_s)
        if tokens is not None:
            self._tokens.inc(tokens)
            with contextlib.suppress(ValueError):  # registered already
                self._registry.register(self._tokens)

    def engine_failed(self, kind: Failure) -> None:
        self._failures.labels(kind).inc()

    def watch(self, read: Callable[[], Gauges]) -> None:
        """Ask ``read`` at each scrape; it must answer at once, whatever the engine does. To be called once."""
        self._registry.register(_Now(read))

    def exposition(self) -> tuple[bytes, str]:
        """The text that Prometheus scrapes, and its media type."""
        encode, media_type = choose_encoder("")
        return encode(_Plain(self._registry)), media_type


def route_of(scope: Scope) -> str:
    """The template of the path that a route took (``/audio/{name}``), once the app has been called; else ``other``."""
    path: str = getattr(scope.get("route"), "path", OTHER)
    return path


def outcome_of(status: int | None) -> Outcome:
    """What an answer's ``status`` means; ``None``, and 499 as nginx has it: the client left before it had one."""
    if status is None or status == 499:
        return "left"
    if status == 503:
        return "busy"
    return "answered" if status < 400 else "refused" if status < 500 else "failed"


def count_start(directory: Path | None) -> int | None:
    """Count this start in ``directory``; returns how many came before, which are the restarts.

    The unit's RuntimeDirectory=, kept by RuntimeDirectoryPreserve=restart, is emptied when the unit is stopped
    (systemd.exec(5)). ``None``: there is no directory, or it cannot be written. A file that holds no count is begun
    anew.
    """
    if directory is None:
        return None
    counted = directory / STARTS
    fresh = directory / f"{STARTS}.new"
    try:
        said = counted.read_bytes().strip() if counted.is_file() else b""
        before = int(said) if said.isdigit() and len(said) < 10 else 0
        # Renamed into place: a process that is killed here leaves the old count, never half of one.
        fresh.write_text(f"{before + 1}\n")
        fresh.replace(counted)
    except OSError:
        return None
    return before


class _Now(Collector):
    """Families made at the scrape, and only of what is known."""

    def __init__(self, read: Callable[[], Gauges]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        now = self._read()
        yield _gauge("chatterbox_queue_waiting", "Requests that wait for the engine now.", now.waiting)
        yield _gauge("chatterbox_running", "Pieces of text that the engine has in hand now.", now.running)
        yield _gauge(
            "chatterbox_ready", "1 while a request sent now would be spoken, as /readyz says; else 0.", now.ready
        )
        memory = {
            "allocated": now.gpu_memory_allocated_bytes,
            "reserved": now.gpu_memory_reserved_bytes,
            "free": now.gpu_memory_free_bytes,
            "total": now.gpu_memory_total_bytes,
        }
        family = GaugeMetricFamily(
            "chatterbox_gpu_memory_bytes",
            "GPU memory in bytes: allocated to this process's tensors; reserved by it, allocated or not;"
            " free and total of the whole GPU, whoever uses it. Absent where unknown.",
            labels=("kind",),
        )
        for kind, size_bytes in memory.items():
            if size_bytes is not None:
                family.add_metric((kind,), size_bytes)
        if family.samples:
            yield family


class _Plain(Collector):
    """A registry's families without the ``_created`` samples, of which the text format makes gauges nobody asks for."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


def _gauge(name: str, documentation: str, value: float) -> Metric:
    return GaugeMetricFamily(name, documentation, value=float(value))
