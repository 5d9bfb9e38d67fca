"""Counts in, Prometheus' text out."""

import threading
from pathlib import Path
from typing import get_args

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import ASGIApp, Receive, Scope, Send

from chatterbox_server.engine import Failure
from chatterbox_server.metrics import Gauges, Metrics, count_start, outcome_of, route_of
from server.fakes import FakeEngine, a_client, run


def scraped(metrics: Metrics) -> dict[str, float]:
    """Every sample as Prometheus reads it, by its name and labels."""
    text, _ = metrics.exposition()
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return samples


def now(**known: int) -> Gauges:
    return Gauges(waiting=2, running=1, ready=True, **known)


def test_requests_are_counted_by_route_and_outcome() -> None:
    metrics = Metrics()
    for outcome in ("answered", "answered", "busy"):
        metrics.request_ended(route="/v1/audio/speech", outcome=outcome)

    samples = scraped(metrics)

    assert samples["chatterbox_requests_total{outcome=answered,route=/v1/audio/speech}"] == 2
    assert samples["chatterbox_requests_total{outcome=busy,route=/v1/audio/speech}"] == 1


def test_what_was_spoken_adds_up() -> None:
    metrics = Metrics()
    metrics.spoke(synthesis_s=1.0, audio_s=4.0, tokens=100)
    metrics.spoke(synthesis_s=2.0, audio_s=1.0, tokens=25.0)

    samples = scraped(metrics)

    assert samples["chatterbox_synthesis_seconds_total"] == 3.0
    assert samples["chatterbox_audio_seconds_total"] == 5.0
    assert samples["chatterbox_speech_tokens_total"] == 125
    assert samples["chatterbox_real_time_factor_sum"] == 2.25
    assert samples["chatterbox_real_time_factor_bucket{le=0.3}"] == 1
    assert samples["chatterbox_real_time_factor_bucket{le=1.5}"] == 1
    assert samples["chatterbox_real_time_factor_bucket{le=2.0}"] == 2


def test_silence_has_no_real_time_factor() -> None:
    metrics = Metrics()
    metrics.spoke(synthesis_s=1.0, audio_s=0.0, tokens=None)

    assert scraped(metrics)["chatterbox_real_time_factor_count"] == 0


def test_waits_and_first_bytes_fall_into_their_buckets() -> None:
    metrics = Metrics()
    metrics.waited(0.0)
    metrics.waited(301.0)
    metrics.first_byte(0.2)

    samples = scraped(metrics)

    assert samples["chatterbox_queue_wait_seconds_bucket{le=0.05}"] == 1
    assert samples["chatterbox_queue_wait_seconds_bucket{le=300.0}"] == 1
    assert samples["chatterbox_queue_wait_seconds_bucket{le=+Inf}"] == 2
    assert samples["chatterbox_time_to_first_byte_seconds_bucket{le=0.1}"] == 0
    assert samples["chatterbox_time_to_first_byte_seconds_bucket{le=0.25}"] == 1


def test_a_kind_of_failure_that_never_happened_is_zero_so_that_its_first_time_shows() -> None:
    metrics = Metrics()
    metrics.engine_failed("out_of_memory")

    samples = scraped(metrics)

    kinds = {kind: samples[f"chatterbox_engine_failures_total{{kind={kind}}}"] for kind in get_args(Failure)}
    assert kinds == {"out_of_memory": 1, "broken": 0, "stuck": 0, "odd_piece": 0, "recycled": 0}


def test_what_is_true_now_is_read_at_each_scrape() -> None:
    metrics = Metrics()
    moments = iter([now(), Gauges(waiting=0, running=0, ready=False)])
    metrics.watch(lambda: next(moments))

    names = ("chatterbox_queue_waiting", "chatterbox_running", "chatterbox_ready")
    first, second = scraped(metrics), scraped(metrics)

    assert [first[name] for name in names] == [2, 1, 1]
    assert [second[name] for name in names] == [0, 0, 0]


def test_gpu_memory_is_told_as_far_as_it_is_known() -> None:
    metrics = Metrics()
    metrics.watch(lambda: now(gpu_memory_allocated_bytes=0, gpu_memory_free_bytes=7_000_000_000))

    memory = {name: value for name, value in scraped(metrics).items() if "memory_bytes{" in name}

    assert memory == {
        "chatterbox_gpu_memory_bytes{kind=allocated}": 0,
        "chatterbox_gpu_memory_bytes{kind=free}": 7_000_000_000,
    }


@pytest.mark.parametrize("name", ["gpu_memory_bytes", "restarts", "speech_tokens", "model_info{"])
def test_what_is_not_known_is_absent_and_not_zero(name: str) -> None:
    metrics = Metrics()
    metrics.watch(now)
    metrics.spoke(synthesis_s=1.0, audio_s=1.0, tokens=None)

    assert not [sample for sample in scraped(metrics) if name in sample]


def test_the_model_and_the_restarts_are_told() -> None:
    metrics = Metrics(restarts=0)
    metrics.loaded(model="chatterbox", engine="stock", instance="gpu0")

    samples = scraped(metrics)

    assert samples["chatterbox_model_info{engine=stock,instance=gpu0,model=chatterbox}"] == 1
    assert samples["chatterbox_restarts"] == 0


def test_the_process_tells_of_its_memory_its_time_and_its_start() -> None:
    samples = scraped(Metrics())

    assert samples["process_resident_memory_bytes"] > 0
    assert samples["process_cpu_seconds_total"] > 0
    assert samples["process_start_time_seconds"] > 0


def test_every_metric_says_what_it_is_and_in_which_unit() -> None:
    metrics = Metrics(restarts=0)
    metrics.watch(lambda: now(gpu_memory_total_bytes=1))
    metrics.spoke(synthesis_s=1.0, audio_s=1.0, tokens=1)
    text, _ = metrics.exposition()

    ours = [family for family in text_string_to_metric_families(text.decode()) if family.name.startswith("chatterbox_")]

    assert {family.name for family in ours} == {
        "chatterbox_audio_seconds",
        "chatterbox_engine_failures",
        "chatterbox_gpu_memory_bytes",
        "chatterbox_model_info",
        "chatterbox_queue_wait_seconds",
        "chatterbox_queue_waiting",
        "chatterbox_ready",
        "chatterbox_real_time_factor",
        "chatterbox_requests",
        "chatterbox_restarts",
        "chatterbox_running",
        "chatterbox_speech_tokens",
        "chatterbox_synthesis_seconds",
        "chatterbox_time_to_first_byte_seconds",
    }
    for family in ours:
        assert family.documentation.endswith("."), family.name
        for unit in ("seconds", "bytes"):
            assert unit not in family.name or unit in family.documentation.lower(), family.name
    assert b"_created" not in text


def test_two_apps_in_one_process_share_nothing() -> None:
    one, other = Metrics(), Metrics()
    one.waited(1.0)

    assert scraped(other)["chatterbox_queue_wait_seconds_count"] == 0


def test_threads_may_count_at_once() -> None:
    metrics = Metrics()

    def speak() -> None:
        for _ in range(500):
            metrics.spoke(synthesis_s=1.0, audio_s=2.0, tokens=50)

    threads = [threading.Thread(target=speak) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert scraped(metrics)["chatterbox_speech_tokens_total"] == 4 * 500 * 50


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (None, "left"),
        (200, "answered"),
        (307, "answered"),
        (400, "refused"),
        (413, "refused"),
        (499, "left"),
        (500, "failed"),
        (503, "busy"),
        (504, "failed"),
    ],
)
def test_an_outcome_follows_from_the_status(status: int | None, outcome: str) -> None:
    assert outcome_of(status) == outcome


def test_a_route_is_named_by_its_template_and_a_path_of_nobody_is_other() -> None:
    router = APIRouter(prefix="/audio")

    @router.get("/{name}")
    async def audio(name: str) -> str:
        return name

    seen: list[str] = []

    class Watching:
        def __init__(self, app: ASGIApp) -> None:
            self._app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await self._app(scope, receive, send)
            seen.append(route_of(scope))

    app = FastAPI()
    app.include_router(router)
    app.add_middleware(Watching)

    async def scenario() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            await client.get("/audio/one.wav")
            await client.post("/audio/two.wav")
            await client.get("/wp-admin.php")

    run(scenario())

    assert seen == ["/audio/{name}", "/audio/{name}", "other"]


def test_the_first_start_is_no_restart_and_each_later_one_is(tmp_path: Path) -> None:
    assert [count_start(tmp_path) for _ in range(3)] == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["starts"]


@pytest.mark.parametrize("broken", [b"", b"many", b"-3", b"\xff\xfe\x00", b"1.5", b"9" * 5000, b"\xb2"])
def test_a_broken_count_is_begun_anew(broken: bytes, tmp_path: Path) -> None:
    (tmp_path / "starts").write_bytes(broken)

    assert [count_start(tmp_path), count_start(tmp_path)] == [0, 1]


def test_without_a_place_to_count_in_the_count_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "starts").mkdir(parents=True)

    assert count_start(None) is None
    assert count_start(tmp_path / "nowhere") is None
    assert count_start(tmp_path / "file") is None
    assert count_start(tmp_path / "taken") is None


def test_prometheus_scrapes_the_app() -> None:
    async def scenario() -> httpx.Response:
        async with a_client(FakeEngine()) as client:
            return await client.get("/metrics")

    answer = run(scenario())

    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert 'chatterbox_model_info{engine="fake",instance="local",model="fake-1"} 1.0' in answer.text
