"""Grafana's words: the fleet's dashboard, as the JSON that it imports or provisions. Writes nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

BEGINS = '{\n  "description": "'
"""Every dashboard of ours; what it describes comes next."""

_SPEECH = 'route=~"/v1/audio/speech|/synthesize|/synthesize-json"'
_OF = 'job="chatterbox-tts",instance=~"$instance"'
_RATE = "[$__rate_interval]"


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph: quantities over time."""

    title: str
    unit: str
    """Grafana's name of it: ``s``, ``percentunit``, ``reqps``, ``bytes`` …"""

    series: tuple[tuple[str, str], ...]
    """(expression, legend)."""

    about: str
    line_at: float | None = None
    """Beyond which it is not well."""


PANELS = (
    Panel(
        "Instances that are ready",
        "short",
        ((f"sum(chatterbox_ready{{{_OF}}})", "ready"), (f"count(up{{{_OF}}})", "all")),
        "An instance that is not ready or not there gets no requests: chatterbox-deploy status.",
    ),
    Panel(
        "Requests to speak, by outcome",
        "reqps",
        ((f"sum by (outcome) (rate(chatterbox_requests_total{{{_OF},{_SPEECH}}}{_RATE}))", "{{outcome}}"),),
        "busy: its queue was full, and the front asked another one. failed, cut: chatterbox-deploy logs.",
    ),
    Panel(
        "Speech",
        "none",
        ((f"sum by (instance) (rate(chatterbox_audio_seconds_total{{{_OF}}}{_RATE}))", "{{instance}}"),),
        "Seconds of sound per second: what the fleet brings.",
    ),
    Panel(
        "Real-time factor",
        "none",
        (
            (
                f"sum by (instance) (rate(chatterbox_synthesis_seconds_total{{{_OF}}}{_RATE}))"
                f" / sum by (instance) (rate(chatterbox_audio_seconds_total{{{_OF}}}{_RATE}))",
                "{{instance}}",
            ),
        ),
        "Seconds of synthesis per second of sound; above 1 a listener waits.",
        line_at=1,
    ),
    Panel(
        "Wait for the engine, 95th percentile",
        "s",
        (
            (
                "histogram_quantile(0.95, sum by (instance, le)"
                f" (rate(chatterbox_queue_wait_seconds_bucket{{{_OF}}}{_RATE})))",
                "{{instance}}",
            ),
        ),
        "Where all wait there are too few instances: chatterbox-deploy advise.",
    ),
    Panel(
        "Time to first byte, 95th percentile",
        "s",
        (
            (
                "histogram_quantile(0.95, sum by (instance, le)"
                f" (rate(chatterbox_time_to_first_byte_seconds_bucket{{{_OF}}}{_RATE})))",
                "{{instance}}",
            ),
        ),
        "From the arrival of a request until its first sound left.",
    ),
    Panel(
        "In the queue",
        "short",
        ((f"chatterbox_queue_waiting{{{_OF}}}", "{{instance}}"),),
        "Requests that wait for the engine now.",
    ),
    Panel(
        "Engine at work",
        "percentunit",
        ((f"rate(chatterbox_synthesis_seconds_total{{{_OF}}}{_RATE})", "{{instance}}"),),
        "Share of time in which it spoke; above 1 where it speaks several at a time.",
    ),
    Panel(
        "Speech tokens while at work",
        "none",
        (
            (
                f"rate(chatterbox_speech_tokens_total{{{_OF}}}{_RATE})"
                f" / rate(chatterbox_synthesis_seconds_total{{{_OF}}}{_RATE})",
                "{{instance}}",
            ),
        ),
        "Tokens per second as the engine counts them; nothing for an engine that counts none.",
    ),
    Panel(
        "Engine failures",
        "short",
        (
            (
                f"sum by (instance, kind) (increase(chatterbox_engine_failures_total{{{_OF}}}{_RATE})) > 0",
                "{{instance}} {{kind}}",
            ),
        ),
        "chatterbox-deploy logs says more.",
    ),
    Panel(
        "GPU memory by instance",
        "bytes",
        ((f'chatterbox_gpu_memory_bytes{{{_OF},kind="reserved"}}', "{{instance}}"),),
        "Held by each process.",
    ),
    Panel(
        "Host memory by instance",
        "bytes",
        ((f"process_resident_memory_bytes{{{_OF}}}", "{{instance}}"),),
        "One that only ever grows is recycled by unit.recycle_memory_mb.",
    ),
    Panel(
        "GPU utilisation and SM activity",
        "percentunit",
        (
            ("chatterbox_monitor_gpu_utilisation_ratio", "GPU {{gpu}}"),
            ("chatterbox_monitor_gpu_sm_active_ratio", "GPU {{gpu}}, SM"),
        ),
        "From chatterbox-deploy monitor --prometheus. Utilisation is time with any kernel; SM activity is work.",
    ),
    Panel(
        "GPU memory in use",
        "percentunit",
        (
            (
                "chatterbox_monitor_gpu_memory_used_bytes / chatterbox_monitor_gpu_memory_total_bytes",
                "GPU {{gpu}}",
            ),
        ),
        "By all processes, ours and others'.",
    ),
    Panel(
        "GPU temperature",
        "celsius",
        (("chatterbox_monitor_gpu_temperature_celsius", "GPU {{gpu}}"),),
        "Cards slow themselves down from 83 to 90 °C on, by model.",
        line_at=85,
    ),
    Panel(
        "GPU power",
        "watt",
        (
            ("chatterbox_monitor_gpu_power_watts", "GPU {{gpu}}"),
            ("chatterbox_monitor_gpu_power_limit_watts", "GPU {{gpu}}, limit"),
        ),
        "At its limit a busy card is where it should be.",
    ),
    Panel(
        "Front: requests by who answered",
        "reqps",
        (("chatterbox_monitor_front_requests_per_second", "{{instance_name}}"),),
        "As nginx logged them; unequal under load: chatterbox-deploy status.",
    ),
    Panel(
        "Front: errors, requests refused and passed on",
        "reqps",
        (
            ("chatterbox_monitor_front_errors_per_second", "{{instance_name}}: 5xx"),
            ("chatterbox_monitor_front_refused_per_second", "{{instance_name}}: 503"),
            ("chatterbox_monitor_front_passed_on_per_second", "{{instance_name}}: asked in vain"),
        ),
        "503: nobody had room. Asked in vain: another instance was asked, and the client noticed nothing.",
    ),
)

_WIDTH, _HEIGHT = 12, 8
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard(description: str) -> str:
    """Text of the dashboard; ``description`` says whose it is."""
    made = {
        "description": description,
        "uid": "chatterbox-tts",
        "title": "Chatterbox TTS",
        "tags": ["chatterbox-tts"],
        "editable": False,
        "refresh": "10s",
        "schemaVersion": 38,
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": [_panel(number, panel) for number, panel in enumerate(PANELS)],
    }
    return json.dumps(made, indent=2, ensure_ascii=False) + "\n"


def _variables() -> list[dict[str, Any]]:
    return [
        {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
        {
            "name": "instance",
            "label": "Instance",
            "type": "query",
            "datasource": _DATASOURCE,
            "query": 'label_values(up{job="chatterbox-tts"}, instance)',
            "refresh": 2,
            "includeAll": True,
            "multi": True,
            "current": {"text": "All", "value": "$__all"},
        },
    ]


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.line_at is not None:
        defaults["custom"] = {"thresholdsStyle": {"mode": "line"}}
        defaults["thresholds"] = {
            "mode": "absolute",
            "steps": [{"color": "green", "value": None}, {"color": "red", "value": panel.line_at}],
        }
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.about,
        "datasource": _DATASOURCE,
        "gridPos": {"x": number % 2 * _WIDTH, "y": number // 2 * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + position), "datasource": _DATASOURCE, "expr": expression, "legendFormat": legend}
            for position, (expression, legend) in enumerate(panel.series)
        ],
    }
