"""Where dashboards and alerts meet the server: each metric that they name is one that is told."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import PurePosixPath

import pytest

from chatterbox_deploy import exposition, fleet
from chatterbox_deploy.gpu.cards import Card
from chatterbox_deploy.monitor import following, gauges
from chatterbox_deploy.monitor.conditions import Limits
from chatterbox_deploy.monitor.story import Look, Story
from chatterbox_deploy.nginx import Request
from chatterbox_deploy.status.found import Found, Readiness
from chatterbox_server.metrics import Gauges, Metrics
from support import golden

FILES = {file.path: file.text for file in golden.render_case("monitored")}
NAMES = re.compile(r"\b(?:chatterbox|process)_[a-z_0-9]+\b")


def told_by_an_instance() -> exposition.Exposition:
    """By one of which everything is known."""
    metrics = Metrics(restarts=1)
    metrics.loaded(model="chatterbox", engine="stock", instance="gpu0")
    metrics.watch(
        lambda: Gauges(
            waiting=1,
            running=1,
            ready=True,
            gpu_memory_allocated_bytes=1,
            gpu_memory_reserved_bytes=1,
            gpu_memory_free_bytes=1,
            gpu_memory_total_bytes=1,
        )
    )
    metrics.waited(0.5)
    metrics.first_byte(1.5)
    metrics.spoke(synthesis_s=2, audio_s=4, tokens=100)
    for route in fleet.SPEECH_ROUTES:
        metrics.request_ended(route=route, outcome="answered")
    found = exposition.parse(metrics.exposition()[0].decode())
    assert found is not None
    return found


def told_by_the_monitor() -> exposition.Exposition:
    """Of a host of which everything is known."""
    resolved = golden.resolve("two-gpus")
    names = [instance.name for instance in resolved.instances]
    ready = Readiness(
        ready=True, draining=False, waiting=0, running=0, spoken=0, gpu_memory_bytes=1, invocation_id=None
    )
    card = Card(
        index="0",
        uuid="GPU-1",
        name="a card",
        memory_total_bytes=2,
        memory_used_bytes=1,
        utilisation_percent=1,
        sm_active_percent=1,
        temperature_c=1,
        power_w=1,
        power_limit_w=2,
        throttled_by=("sw_power_cap",),
    )
    now = datetime.now(UTC)
    found = Found(units=None, texts={}, readiness=dict.fromkeys(names, ready), front_answers=True)
    look = Look(
        time=now,
        found=found,
        counts=dict.fromkeys(names, told_by_an_instance()),
        cards=(card,),
        requests=(Request(now, 200, names[0], 1.0),),
    )
    story = Story()
    for at_s in (0.0, 2.0):
        story = following.follow(story, replace(look, found=replace(found, monotonic_s=at_s)), resolved, Limits())
    assert story.picture is not None
    read = exposition.parse(exposition.write(gauges.of(story.picture)))
    assert read is not None
    return read


@pytest.mark.parametrize("name", ["chatterbox-tts.rules.yml", "chatterbox-tts.json"])
def test_every_metric_that_is_named_is_told(name: str) -> None:
    (text,) = [text for path, text in FILES.items() if path.name == name]
    wanted = set(NAMES.findall(text))

    told = {*told_by_an_instance().samples, *told_by_the_monitor().samples}

    assert wanted
    assert wanted - told == set()


def test_labels_that_rules_and_monitor_ask_for_are_those_of_the_server() -> None:
    told = told_by_an_instance()

    assert set(told.by("chatterbox_requests_total", "outcome")) == {"answered"}
    assert set(told.by("chatterbox_requests_total", "route")) == set(fleet.SPEECH_ROUTES)
    assert set(told.by("chatterbox_engine_failures_total", "kind")) >= {"broken", "stuck", "out_of_memory"}
    assert set(told.by("chatterbox_gpu_memory_bytes", "kind")) >= {"reserved"}


def test_the_monitor_reads_what_the_server_writes() -> None:
    """No quantity is a dash of an instance that tells everything."""
    resolved = golden.resolve("two-gpus")
    found = Found(units=None, texts={}, readiness={}, front_answers=True)
    story = Story()
    counted = [told_by_an_instance(), exposition.add([told_by_an_instance()] * 2)]
    start: dict[str, dict[exposition.Labels, float]] = {exposition.STARTED: {(): 1.0}}
    for at_s, each in enumerate(counted):
        told = exposition.Exposition(dict(each.samples) | start, each.counted)
        look = Look(
            time=datetime.now(UTC), found=replace(found, monotonic_s=float(at_s)), counts={"gpu0": told}, requests=()
        )
        story = following.follow(story, look, resolved, Limits())
    assert story.picture is not None
    row = story.picture.instances[0]

    assert (row.wait_s, row.first_byte_s, row.rtf, row.audio_s_per_s) == (0.5, 1.5, 0.5, 4.0)
    assert (row.tokens_per_s, row.busy_percent, row.requests_per_s) == (50.0, 200.0, 3.0)


def test_the_scrape_configuration_names_every_instance() -> None:
    text = FILES[PurePosixPath("/etc/prometheus/chatterbox-tts.scrape.yml")]

    for instance in golden.resolve("monitored").instances:
        assert f'targets: ["{instance.host}:{instance.port}"]' in text
        assert f'instance: "{instance.name}"' in text
