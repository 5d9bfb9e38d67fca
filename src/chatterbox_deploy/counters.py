"""What an instance has counted since it started, read from its /metrics. Asks nobody.

Only the few counters that a benchmark takes the difference of (``chatterbox_server.metrics`` explains each).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

SPEECH = "/v1/audio/speech"

# NAME{LABELS} VALUE [TIMESTAMP], as prometheus.io/docs/instrumenting/exposition_formats has it.
_LINE = re.compile(r'([a-zA-Z_:][\w:]*)(?:\{((?:[^"}]|"(?:[^"\\]|\\.)*")*)\})?\s+(\S+)(?:\s+\d+)?\s*')
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


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
    """One scrape; a line that is none of the format's is passed over."""
    plain: dict[str, float] = {}
    ended: Counter[str] = Counter()
    for line in text.splitlines():
        found = _LINE.fullmatch(line)
        if found is None:
            continue
        try:
            value = float(found[3])
        except ValueError:
            continue
        if found[2] is None:
            plain[found[1]] = value
        elif found[1] == "chatterbox_requests_total":
            labels = dict(_LABEL.findall(found[2]))
            if labels.get("route") == SPEECH:
                ended[labels.get("outcome", "")] += int(value)
    return Reading(
        at_s=at_s,
        started_s=plain.get("process_start_time_seconds"),
        ended=dict(ended),
        audio_s=plain.get("chatterbox_audio_seconds_total"),
        synthesis_s=plain.get("chatterbox_synthesis_seconds_total"),
        tokens=plain.get("chatterbox_speech_tokens_total"),
        cpu_s=plain.get("process_cpu_seconds_total"),
    )


def grown(before: float | None, after: float | None) -> float | None:
    """``None`` where it was not counted. The first token of an engine makes its counter appear: that grew from 0."""
    if after is None:
        return None
    return after - (before or 0.0)


def same_process(one: Reading, other: Reading) -> bool:
    """Whether nothing was forgotten in between."""
    return one.started_s == other.started_s
