"""Rules, scrape configuration and dashboard: judged by promtool, and every command in them is one of ours."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_deploy import fleet, grafana, render
from chatterbox_deploy.cli import main
from chatterbox_deploy.config import reading
from chatterbox_deploy.templates import Templates
from support import golden

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

NEEDS_PROMTOOL = pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool (apt-get install prometheus)")

FILES = {file.path: file.text for file in golden.render_case("monitored")}
RULES = FILES[PurePosixPath("/etc/prometheus/chatterbox-tts.rules.yml")]
SCRAPE = FILES[PurePosixPath("/etc/prometheus/chatterbox-tts.scrape.yml")]
DASHBOARD = FILES[PurePosixPath("/var/lib/grafana/dashboards/chatterbox-tts.json")]
ALERTS = re.findall(r"- alert: (\w+)", RULES)


def promtool(*argv: str | Path) -> str:
    done = subprocess.run(["promtool", *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@NEEDS_PROMTOOL
def test_promtool_accepts_the_rules(tmp_path: Path) -> None:
    (tmp_path / "rules.yml").write_text(RULES)

    assert f"SUCCESS: {len(ALERTS)} rules found" in promtool("check", "rules", tmp_path / "rules.yml")


@NEEDS_PROMTOOL
@pytest.mark.parametrize("with_key", [True, False])
def test_promtool_accepts_the_scrape_configuration(with_key: bool, tmp_path: Path) -> None:
    text = SCRAPE
    if not with_key:
        asked = reading.load("[gpus]\n0 = 6093\n'2,3' = 6094\n[monitoring]\nscrape_file = '/s.yml'\n", source="f")
        files = render.render(fleet.resolve(asked), Templates(), source="f")
        text = next(file.text for file in files if file.path.name == "s.yml")
        assert "authorization" not in text
        assert '{instance: "gpu2-gpu3", gpu: "2,3"}' in text
    # That a file like prometheus.yml may be made of it, too, lets an older promtool judge it.
    (tmp_path / "prometheus.yml").write_text(text)
    assert text.count("- targets:") == (3 if with_key else 2)
    promtool("check", "config", "--syntax-only", tmp_path / "prometheus.yml")


def test_every_alert_says_what_to_type_and_each_of_our_commands_exists() -> None:
    commands = re.findall(r'^          do: "?(.+?)"?$', RULES, re.MULTILINE)

    assert len(commands) == len(ALERTS) == RULES.count("          summary: ") == RULES.count("          description: ")
    ours = {command.split()[1] for command in commands if command.startswith("chatterbox-deploy ")}
    assert ours
    assert ours <= set(main.commands)


# What fires an alert, and what nearly does: series by name, a value a minute (a+bxn: from a on, b more each minute),
# and the minute after which one looks.
UP = 'up{job="chatterbox-tts",instance="gpu%d"}'
REQUESTS = 'chatterbox_requests_total{instance="gpu0",route="/v1/audio/speech",outcome="%s"}'
WAITS = 'chatterbox_queue_wait_seconds_bucket{instance="gpu0",le="%s"}'
GPU = 'chatterbox_monitor_gpu_%s{gpu="0",name="RTX 3090"}'
CASES: dict[str, tuple[Mapping[str, str], Mapping[str, str], int]] = {
    "ChatterboxFleetDown": ({UP % 0: "0x20", UP % 1: "0x20"}, {UP % 0: "0x20", UP % 1: "1x20"}, 5),
    "ChatterboxInstanceDown": ({UP % 0: "0x20", UP % 1: "1x20"}, {UP % 0: "1 0 0 0 0 1x20", UP % 1: "1x20"}, 6),
    "ChatterboxInstanceNotReady": (
        {'chatterbox_ready{instance="gpu0"}': "0x20"},
        {'chatterbox_ready{instance="gpu0"}': "1 0 0 0 1x20"},
        6,
    ),
    "ChatterboxRestarting": (
        {'process_start_time_seconds{job="chatterbox-tts",instance="gpu0"}': "1x5 2x5 3x5 4x5"},
        {'process_start_time_seconds{job="chatterbox-tts",instance="gpu0"}': "1x5 2x5 3x20"},
        25,
    ),
    "ChatterboxEngineFailing": (
        {'chatterbox_engine_failures_total{instance="gpu0",kind="out_of_memory"}': "0x5 1x20"},
        {
            'chatterbox_engine_failures_total{instance="gpu0",kind="out_of_memory"}': "1x20",
            'chatterbox_engine_failures_total{instance="gpu0",kind="odd_piece"}': "0+1x20",
        },
        12,
    ),
    "ChatterboxFailures": (
        {REQUESTS % "answered": "0+98x30", REQUESTS % "failed": "0+2x30"},
        {REQUESTS % "answered": "0+100x30", REQUESTS % "busy": "0+50x30", REQUESTS % "failed": "0x30"},
        20,
    ),
    "ChatterboxBusy": (
        {REQUESTS % "answered": "0+90x30", REQUESTS % "busy": "0+10x30"},
        {REQUESTS % "answered": "0+96x30", REQUESTS % "busy": "0+4x30"},
        20,
    ),
    "ChatterboxWaiting": (
        {WAITS % "10.0": "0+9x40", WAITS % "20.0": "0+10x40", WAITS % "+Inf": "0+10x40"},
        {WAITS % "10.0": "0+96x40", WAITS % "20.0": "0+100x40", WAITS % "+Inf": "0+100x40"},
        30,
    ),
    "ChatterboxSlow": (
        {
            'chatterbox_synthesis_seconds_total{instance="gpu0"}': "0+60x40",
            'chatterbox_audio_seconds_total{instance="gpu0"}': "0+50x40",
        },
        {
            'chatterbox_synthesis_seconds_total{instance="gpu0"}': "0+50x40",
            'chatterbox_audio_seconds_total{instance="gpu0"}': "0+60x40",
        },
        30,
    ),
    "ChatterboxMonitorStopped": (
        {"chatterbox_monitor_last_look_timestamp_seconds": "0x20"},
        {"chatterbox_monitor_last_look_timestamp_seconds": "0+60x20"},
        6,
    ),
    "ChatterboxFrontDown": (
        {"chatterbox_monitor_front_up": "0x20"},
        {"chatterbox_monitor_front_up": "1 0 1x20"},
        4,
    ),
    "ChatterboxFrontErrors": (
        {
            'chatterbox_monitor_front_errors_per_second{instance_name="gpu0"}': "0.2x20",
            'chatterbox_monitor_front_requests_per_second{instance_name="gpu0"}': "5x20",
            'chatterbox_monitor_front_requests_per_second{instance_name="gpu1"}': "5x20",
        },
        {
            'chatterbox_monitor_front_errors_per_second{instance_name="gpu0"}': "0x20",
            'chatterbox_monitor_front_requests_per_second{instance_name="gpu0"}': "0x20",
        },
        10,
    ),
    "ChatterboxGpuHot": ({GPU % "temperature_celsius": "85x20"}, {GPU % "temperature_celsius": "84x20"}, 8),
    "ChatterboxGpuThrottled": (
        {'chatterbox_monitor_gpu_throttled{gpu="0",name="x",reason="hw_thermal_slowdown"}': "1x20"},
        {'chatterbox_monitor_gpu_throttled{gpu="0",name="x",reason="sw_power_cap"}': "1x20"},
        8,
    ),
    "ChatterboxGpuFull": (
        {GPU % "memory_used_bytes": "96x20", GPU % "memory_total_bytes": "100x20"},
        {GPU % "memory_used_bytes": "94x20", GPU % "memory_total_bytes": "100x20"},
        15,
    ),
}


def test_each_alert_has_a_case() -> None:
    assert list(CASES) == ALERTS


@NEEDS_PROMTOOL
def test_each_alert_fires_when_it_should_and_only_then(tmp_path: Path) -> None:
    def case(alert: str, series: Mapping[str, str], minute: int, expected: int) -> dict[str, Any]:
        return {
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in series.items()],
            "promql_expr_test": [
                {
                    "expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) or vector(0)',
                    "eval_time": f"{minute}m",
                    "exp_samples": [{"labels": "{}", "value": expected}],
                }
            ],
        }

    tests = [
        made
        for alert, (fires, calm, minute) in CASES.items()
        for made in (case(alert, fires, minute, 1), case(alert, calm, minute, 0))
    ]
    (tmp_path / "rules.yml").write_text(RULES)
    # JSON is YAML.
    told = {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "test.yml").write_text(json.dumps(told))

    promtool("test", "rules", tmp_path / "test.yml")


def expressions() -> list[str]:
    """Of the dashboard, as Grafana would send them."""
    found = [target["expr"] for panel in json.loads(DASHBOARD)["panels"] for target in panel["targets"]]
    return [expr.replace("$__rate_interval", "1m").replace("$instance", ".*") for expr in found]


@NEEDS_PROMTOOL
def test_promtool_can_read_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{number}", "expr": expr} for number, expr in enumerate(expressions())]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))

    assert f"SUCCESS: {len(rules)} rules found" in promtool("check", "rules", tmp_path / "rules.yml")


def test_the_dashboard_is_whole_and_no_panel_lies_on_another() -> None:
    made = json.loads(DASHBOARD)

    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in made["panels"]}
    assert len(places) == len(made["panels"]) == len(grafana.PANELS) == len({panel["id"] for panel in made["panels"]})
    assert all(panel["description"] and panel["title"] for panel in made["panels"])
    assert {variable["name"] for variable in made["templating"]["list"]} == {"datasource", "instance"}
    assert made["description"].startswith("Written by chatterbox-deploy ")
    assert render.is_ours(DASHBOARD)
