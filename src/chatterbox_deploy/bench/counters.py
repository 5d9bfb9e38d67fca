"""What an instance has counted since it started, read from its /metrics. Asks nobody.

Only the few counters that a benchmark takes the difference of (``chatterbox_server.metrics`` explains each).
"""

from __future__ import annotations

from dataclasses import dataclass

from chatterbox_deploy import exposition
from chatterbox_deploy.exposition import Exposition
from chatterbox_deploy.fleet import SPEECH


@dataclass(frozen=True, slots=True)
class Reading:
    """Counters at one moment; ``None`` where the instance does not have one."""

    at_s: float
    """When, on the reader's clock."""
    started_s: float | None
    """Since the epoch: another start counts from 0 again."""
    ended: dict[str, int]
    """Requests to speak that have ended, by outcome."""
    audio_s: float | None
    synthesis_s: float | None
    tokens: float | None
    cpu_s: float | None


def parse(text: str, at_s: float) -> Reading:
    """One scrape; what is no scrape tells nothing."""
    told = exposition.parse(text) or Exposition()
    ended = told.only("chatterbox_requests_total", "route", (SPEECH,)).by("chatterbox_requests_total", "outcome")
    return Reading(
        at_s=at_s,
        started_s=told.value(exposition.STARTED),
        ended={outcome: int(count) for outcome, count in ended.items()},
        audio_s=told.value("chatterbox_audio_seconds_total"),
        synthesis_s=told.value("chatterbox_synthesis_seconds_total"),
        tokens=told.value("chatterbox_speech_tokens_total"),
        cpu_s=told.value("process_cpu_seconds_total"),
    )


def grown(before: float | None, after: float | None) -> float | None:
    """``None`` where it was not counted. The first token of an engine makes its counter appear: that grew from 0."""
    if after is None:
        return None
    return after - (before or 0.0)


def same_process(one: Reading, other: Reading) -> bool:
    """Whether nothing was forgotten in between."""
    return one.started_s == other.started_s
