"""What is sent when, and what counts as an answer; through HTTP, to small servers."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from chatterbox_deploy import fleet
from chatterbox_deploy.bench import aims, asking, counters, loads, measuring, results
from chatterbox_deploy.bench.aims import Aim, Door
from chatterbox_deploy.bench.loads import Load
from chatterbox_deploy.bench.measuring import Bench, Stop
from chatterbox_deploy.config import reading
from chatterbox_deploy.errors import BenchmarkError, CommandFailed
from support.speaking import Speaker, serving

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatterbox_deploy.bench.loads import Sample, Trial

LOAD = Load(
    concurrency=2, rate_per_s=None, window_s=0.4, warmup_s=0.1, repetitions=1, seed=1, texts="short",
    audio_format="wav", voice=None, stream=False, timeout_s=5.0,
)  # fmt: skip
TEXTS = loads.read_texts("short")


class Silent:
    def begins(self, label: str, number: int, of: int, length_s: float) -> None:
        pass

    def ticks(self, passed_s: float, samples: Sequence[Sample], in_flight: int) -> None:
        pass


def measure(
    load: Load, *speakers: Speaker, stop_after_s: float | None = None, insist_after_s: float | None = None
) -> Trial:
    async def scenario() -> Trial:
        stop = Stop(asyncio.Event(), asyncio.Event())
        loop = asyncio.get_running_loop()
        if stop_after_s is not None:
            loop.call_later(stop_after_s, stop.asked.set)
        if insist_after_s is not None:
            loop.call_later(insist_after_s, stop.insisted.set)
        async with serving(*speakers) as aim, asking.open_session("secret") as session:
            return await Bench(session, TEXTS, Silent(), stop).trial(aim, load)

    return asyncio.run(scenario())


def changed(**how: Any) -> Load:
    return replace(LOAD, **how)


def test_every_request_is_counted_once_by_everybody() -> None:
    speakers = Speaker(), Speaker()
    trial = measure(changed(concurrency=4, repetitions=2), *speakers)
    sent = Counter(sample.instance for each in trial.repetitions for sample in each.samples)

    assert sent == {"gpu0": len(speakers[0].heard), "gpu1": len(speakers[1].heard)}
    for number, name in enumerate(("gpu0", "gpu1")):
        counted = sum(each.counted[name].ended["answered"] for each in trial.repetitions)
        assert counted == len(speakers[number].heard)
    assert all(sample.audio_s == 1.0 for each in trial.repetitions for sample in each.samples)
    assert all(asked["key"] == "Bearer secret" for asked in speakers[0].heard)


def test_the_fewest_in_flight_are_asked_so_that_two_of_two_clients_never_meet() -> None:
    trial = measure(changed(concurrency=2), Speaker(service_s=0.01), Speaker(service_s=0.2))
    shares = {share.instance: share.requests for share in results.shares(trial)}

    assert shares["gpu0"] > 2 * shares["gpu1"]


def test_the_same_seed_asks_the_same() -> None:
    one, same, other = Speaker(), Speaker(), Speaker()
    for speaker, seed in ((one, 1), (same, 1), (other, 2)):
        measure(changed(concurrency=None, rate_per_s=40.0, seed=seed), speaker)

    assert one.heard == same.heard != other.heard
    assert len({asked["seed"] for asked in one.heard}) == len(one.heard)


def test_who_waits_behind_a_slow_answer_is_counted_from_when_it_was_due() -> None:
    """A closed loop of one sends nothing while it waits, and so sees one slow request; an open loop sees them all."""

    class Freezes(Speaker):
        asked = 0

        async def speak(self, request: web.Request) -> web.StreamResponse:
            self.asked += 1
            if self.asked == 5:
                # For whoever comes meanwhile, too.
                async with self._turn:
                    await asyncio.sleep(0.5)
            return await super().speak(request)

    open_loop = measure(
        changed(concurrency=None, rate_per_s=100.0, window_s=1.0, warmup_s=0.0), Freezes(service_s=0.001)
    )
    slow = [sample for sample in open_loop.repetitions[0].measured if sample.latency_s > 0.1]
    assert len(slow) > 15
    closed = measure(changed(concurrency=1, window_s=1.0, warmup_s=0.0), Freezes(service_s=0.001))
    assert 1 <= sum(sample.latency_s > 0.4 for sample in closed.repetitions[0].measured) < len(slow) / 2


def test_an_open_loop_waits_for_no_answer() -> None:
    trial = measure(changed(concurrency=None, rate_per_s=40.0), Speaker(service_s=0.1))
    first, *others = trial.repetitions[0].samples

    assert sum(sample.sent_s < first.done_s for sample in others) >= 2


@pytest.mark.parametrize(
    ("fault", "failure"),
    [("busy", "503"), ("key", "401"), ("empty", "no sound"), ("text", "no sound"), ("cut short", "cut short")],
)
def test_what_is_no_whole_sound_is_a_failure(fault: str, failure: str) -> None:
    trial = measure(changed(window_s=0.3), Speaker(fault=fault))

    assert set(results.failures(trial)) == {failure}
    assert results.estimate(trial, results.REQUESTS).value == 0  # type: ignore[union-attr]
    assert results.estimate(trial, results.LATENCY) is None
    # A client that was refused waits before it asks again.
    assert len(trial.repetitions[0].samples) <= 2 * (1 + 0.4 / 0.25) + 2


def test_nobody_there_is_a_failure_and_so_is_an_answer_that_does_not_end_in_time() -> None:
    trial = measure(changed(timeout_s=0.1, window_s=0.6, concurrency=1), Speaker(service_s=5))
    assert set(results.failures(trial)) == {"timed out"}

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    door = Door("gpu0", f"http://127.0.0.1:{port}", by_itself=True)

    async def ask() -> None:
        async with asking.open_session(None) as session:
            await measuring.probe(session, [door], LOAD)

    with pytest.raises(CommandFailed, match=r"gpu0 \(http://.*\): cannot connect: connection refused; is the fleet"):
        asyncio.run(ask())


def test_a_stall_is_counted_and_the_first_byte_is_one_of_sound() -> None:
    trial = measure(
        changed(stream=True, concurrency=1, window_s=0.5, warmup_s=0.0), Speaker(fault="stalls", service_s=0.0)
    )
    sample = trial.repetitions[0].samples[0]

    assert sample.stalls == 1
    assert sample.stalled_s is not None
    assert sample.stalled_s >= 0.15
    assert sample.longest_gap_s is not None
    assert sample.longest_gap_s >= 0.25
    # The header had come 0.1 s before.
    assert sample.to_first_byte_s >= 0.1
    assert results.stalled_share(trial.repetitions[0]) == 1.0


def test_stopped_it_keeps_what_was_measured_and_waits_for_what_is_out() -> None:
    speaker = Speaker(service_s=0.05)
    trial = measure(changed(window_s=30.0, repetitions=3), speaker, stop_after_s=0.6)
    (repetition,) = trial.repetitions

    assert 0 < repetition.window_s < 10
    assert len(repetition.samples) == len(speaker.heard)
    assert not results.failures(trial)


def test_insisted_it_drops_what_is_out() -> None:
    began_s = time.monotonic()
    trial = measure(changed(window_s=30.0), Speaker(service_s=20), stop_after_s=0.2, insist_after_s=0.3)

    assert trial.repetitions == ()
    assert time.monotonic() - began_s < 10


def test_what_an_instance_counted_before_it_was_replaced_is_not_made_up() -> None:
    class Replaced(Speaker):
        async def metrics(self, request: web.Request) -> web.Response:
            return web.Response(
                text=f"process_start_time_seconds {len(self.heard)}\nchatterbox_audio_seconds_total 1\n"
            )

    trial = measure(LOAD, Replaced())

    assert trial.repetitions[0].counted == {}
    assert any("no /metrics of gpu0" in note for note in results.notes(trial))


SCRAPE = r"""
# HELP chatterbox_requests_total Requests that have ended
# TYPE chatterbox_requests_total counter
chatterbox_requests_total{outcome="answered",route="/v1/audio/speech"} 12.0
chatterbox_requests_total{outcome="answered",route="/metrics"} 99.0
chatterbox_requests_total{outcome="busy",route="/v1/audio/speech"} 3.0
chatterbox_model_info{engine="stock",instance="gpu0",model="a \"b\" {c}"} 1.0
chatterbox_synthesis_seconds_total 1.5e+02
chatterbox_audio_seconds_total 300.25
process_start_time_seconds 1.76e+09
"""


def test_a_scrape_is_read_and_what_is_not_in_it_is_unknown() -> None:
    read = counters.parse(SCRAPE, 7.0)

    assert read == counters.Reading(
        at_s=7.0, started_s=1.76e9, ended={"answered": 12, "busy": 3}, audio_s=300.25, synthesis_s=150.0,
        tokens=None, cpu_s=None,
    )  # fmt: skip


SIX_GPUS = "[gpus]\n" + "".join(f"{gpu} = [{7000 + 2 * gpu}, {7001 + 2 * gpu}]\n" for gpu in range(6))


def test_whom_a_benchmark_asks() -> None:
    nginx = "[nginx]\nlisten = '0.0.0.0:6095'\nallow_anonymous = true\n"
    resolved = fleet.resolve(reading.load(SIX_GPUS + nginx, source="f"))

    front = aims.front(resolved)
    assert [door.url for door in front.doors] == ["http://127.0.0.1:6095"]
    assert (len(front.instances), front.gpus) == (12, 6)
    by_gpu = aims.growing(resolved.instances, "gpus")
    assert [(aim.label, len(aim.doors), aim.gpus) for aim in by_gpu] == [
        ("1 GPU", 2, 1), ("2 GPUs", 4, 2), ("4 GPUs", 8, 4), ("6 GPUs", 12, 6)
    ]  # fmt: skip
    by_instance = aims.growing(resolved.instances[:3], "instances")
    assert [(aim.label, len(aim.doors), aim.gpus) for aim in by_instance] == [
        ("1 instance", 1, None), ("2 instances", 2, None), ("3 instances", 3, None)
    ]  # fmt: skip


def test_a_server_of_no_fleet_file_is_an_instance_if_it_counts() -> None:
    async def scenario() -> list[Aim]:
        settled = []
        async with serving(Speaker(), Speaker(fault="no metrics")) as aim, asking.open_session(None) as session:
            for found in aims.of_doors(aims.at(door.url for door in aim.doors), "each"):
                settled.append(await measuring.settle(session, found))  # noqa: PERF401  awaited one by one
        return settled

    instance, unknown = asyncio.run(scenario())
    assert [door.name for door in instance.instances] == [instance.doors[0].name]
    assert unknown.instances == ()
    with pytest.raises(BenchmarkError, match=r"127\.0\.0\.1:1 is there twice"):
        aims.at(["http://127.0.0.1:1", "http://127.0.0.1:1/v1"])
    with pytest.raises(BenchmarkError, match=r"cannot ask '127\.0\.0\.1:6095'; write it as http://127\.0\.0\.1:6095$"):
        aims.at(["127.0.0.1:6095"])
