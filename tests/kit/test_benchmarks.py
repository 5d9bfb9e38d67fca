"""From samples to figures: what counts, what is unknown, what is compared."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_deploy.bench import comparison, loads, rate_search, results
from chatterbox_deploy.bench.loads import Counted, Load, Repetition, Run, Sample, Search, Target, Trial, Tried, Use
from chatterbox_deploy.errors import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Sequence

LOAD = Load(
    concurrency=1, rate_per_s=None, window_s=10.0, warmup_s=2.0, repetitions=2, seed=1, texts="mixed",
    audio_format="wav", voice=None, stream=False, timeout_s=60.0,
)  # fmt: skip


def sample(due_s: float, done_s: float, **changed: Any) -> Sample:
    whole: dict[str, Any] = {
        "sent_s": due_s, "first_byte_s": due_s + (done_s - due_s) / 2, "chars": 10, "status": 200, "failure": None,
        "instance": "gpu0", "size_bytes": 48_000, "audio_s": 1.0, "queue_wait_s": 0.0, "stalls": 0, "stalled_s": 0.0,
        "longest_gap_s": 0.0,
    }  # fmt: skip
    return Sample(due_s=due_s, done_s=done_s, **(whole | changed))


def repetition(samples: Sequence[Sample], **changed: Any) -> Repetition:
    whole: dict[str, Any] = {
        "seed": 1, "window_s": 10.0, "counted": {}, "use": Use(machine_cores=None, generator_cores=0.1, cards=None)
    }  # fmt: skip
    return Repetition(samples=tuple(samples), **(whole | changed))


def trial(*repetitions: Repetition, **changed: Any) -> Trial:
    whole: dict[str, Any] = {"label": "front", "instances": ("gpu0",), "gpus": 1, "load": LOAD}
    return Trial(repetitions=repetitions, **(whole | changed))


def run(*trials: Trial, **changed: Any) -> Run:
    whole: dict[str, Any] = {
        "format": 1, "version": "0", "command": "bench", "began": "2026-01-01T00:00:00+00:00", "machine": "a machine",
        "cores": 2, "probes": 1, "partial": False, "search": None,
    }  # fmt: skip
    return Run(trials=trials, **(whole | changed))


def steady(service_s: float, *, servers: int = 1, audio_s: float = 1.0) -> Repetition:
    """``servers`` that are never idle, from the warm-up on; each out of step with the others."""
    samples = []
    for server in range(servers):
        at_s = -4.0 + server * service_s / servers
        while at_s < 10.0:
            samples.append(sample(at_s, at_s + service_s, audio_s=audio_s))
            at_s += service_s
    return repetition(samples)


@pytest.mark.parametrize("service_s", [0.3, 0.7, 1.0, 3.3])
@pytest.mark.parametrize("servers", [1, 3])
def test_throughput_has_no_grain_of_whole_requests(service_s: float, servers: int) -> None:
    """Whole requests in 10 s of 3.3 s each would be 3 or 4: off by a tenth."""
    done = steady(service_s, servers=servers, audio_s=2.5)

    assert results.requests_per_s(done) == pytest.approx(servers / service_s)
    assert results.audio_s_per_s(done) == pytest.approx(2.5 * servers / service_s)


def test_latencies_count_from_when_a_request_was_due_and_only_those_of_the_window() -> None:
    done = repetition([sample(-1.0, 99.0), sample(0.0, 1.0, sent_s=0.9), sample(9.9, 13.9), sample(10.0, 99.0)])

    assert [each.latency_s for each in done.measured] == [1.0, 4.0]
    assert done.measured[0].lag_s == 0.9


def test_a_failure_is_never_fast() -> None:
    """One in ten is refused at once; the rest take 1 to 9 s."""
    good = [sample(0.0, float(second)) for second in range(1, 10)]
    done = trial(repetition([*good, sample(0.0, 0.001, failure="503", status=503, audio_s=None)] * 2))
    figures = {figure.name: results.estimate(done, figure) for figure in results.FIGURES}

    assert figures["latency_p50_s"].value == 5.0  # type: ignore[union-attr]
    assert figures["latency_p95_s"] is None, "more than one in twenty never had an answer"
    assert figures["latency_mean_s"].value == 5.0  # type: ignore[union-attr]
    assert figures["failed_share"].value == 0.1  # type: ignore[union-attr]
    assert results.failures(done) == {"503": 2}
    assert "failed: 2 x 503" in results.notes(done)


def test_what_is_not_told_is_unknown_and_never_0() -> None:
    done = trial(repetition([sample(0.0, 1.0, audio_s=None, queue_wait_s=None, stalls=None, stalled_s=None)] * 2))
    known = {each.name for each in results.FIGURES if results.estimate(done, each) is not None}

    assert not known & {
        "audio_s_per_s", "tokens_per_s", "real_time_factor", "wait_mean_s", "wait_p95_s", "stalled_share",
        "server_cores", "machine_cores",
    }  # fmt: skip
    assert results.number(None) == "-"


COUNTED = Counted(ended={"answered": 5}, over_s=10.0, audio_s=50.0, synthesis_s=9.0, tokens=1250.0, cpu_s=2.0)


def test_tokens_and_real_time_factor_are_what_the_servers_counted() -> None:
    done = repetition([sample(0.0, 1.0)], counted={"gpu0": COUNTED, "gpu1": replace(COUNTED, audio_s=40.0)})

    assert results.tokens_per_s(done) == 250.0
    assert results.real_time_factor(done) == 0.2
    assert results.server_cores(done) == pytest.approx(0.4)
    one_is_silent = replace(done, counted={"gpu0": COUNTED, "gpu1": replace(COUNTED, tokens=None)})
    assert results.tokens_per_s(one_is_silent) is None


def test_shares_are_of_all_who_answered_also_strangers() -> None:
    samples = [sample(0.0, 1.0)] * 3 + [
        sample(0.0, 1.0, instance="gpu9"),
        sample(0.0, 1.0, instance=None, failure="cannot connect: connection refused", status=None),
    ]
    rows = results.shares(trial(repetition(samples, counted={"gpu0": COUNTED}), instances=("gpu0", "gpu1")))

    assert [(row.instance, row.requests, row.share) for row in rows] == [
        ("gpu0", 3, 0.75), ("gpu1", 0, 0.0), ("gpu9", 1, 0.25)
    ]  # fmt: skip
    assert rows[0].tokens_per_s == 125.0
    assert rows[1].tokens_per_s is None


def test_a_late_generator_says_so() -> None:
    fine = trial(*[repetition([sample(0.0, 1.0, sent_s=0.009)] * 100)] * 2)
    late = trial(*[repetition([sample(0.0, 1.0, sent_s=0.05)] * 100)] * 2)
    busy = replace(fine.repetitions[0].use, generator_cores=0.95)

    assert not any("fell behind" in note for note in results.notes(fine))
    assert any("fell behind: requests left up to 0.050 s" in note for note in results.notes(late))
    assert any(
        "0.95 of the one core" in note for note in results.notes(trial(*[replace(fine.repetitions[0], use=busy)] * 2))
    )


def scaled(*counts: int) -> tuple[Trial, ...]:
    return tuple(
        trial(
            steady(1.0, servers=count), steady(1.01, servers=count), label=f"{count}", gpus=count,
            instances=tuple(f"gpu{number}" for number in range(count)),
        )
        for count in counts
    )  # fmt: skip


def test_speed_up_and_efficiency_in_one_line() -> None:
    said = comparison.speed_up(scaled(1, 2, 8))

    assert said is not None
    assert said.startswith("8 GPUs speak 8.00 times as much as 1 GPU (95 %: 7.76 to 8.25): ")
    assert said.endswith(": efficiency 100 %")
    assert comparison.speed_up(scaled(1)) is None


def test_two_runs_compare_as_ratios() -> None:
    before = run(trial(*(steady(service_s) for service_s in (1.0, 1.02, 0.98))))
    after = run(trial(*(steady(service_s) for service_s in (0.5, 0.51, 0.49)), label="other"))
    rows = {row.figure.name: row for row in comparison.compare(before, after)}

    sound = rows["audio_s_per_s"]
    assert sound.label == "front → other"
    assert sound.ratio is not None
    assert sound.ratio.value == pytest.approx(2.0, rel=0.01)
    assert sound.says == "better"
    assert rows["latency_mean_s"].says == "better"
    assert rows["failed_share"].says == "both 0"
    assert {row.says for row in comparison.compare(before, before) if row.ratio is not None} == {"unclear"}


def test_a_closed_loop_and_an_open_one_are_shown_beside_each_other_and_not_compared() -> None:
    closed = run(trial(steady(1.0), steady(1.01)))
    of_open = run(trial(steady(2.0), steady(2.01), load=replace(LOAD, concurrency=None, rate_per_s=0.5)))

    rows = comparison.compare(closed, of_open)
    assert {(row.ratio, row.says) for row in rows} == {(None, "not comparable")}
    assert all(row.before is not None and row.after is not None for row in rows)
    assert comparison.gain(closed, of_open) is None
    told, *_ = comparison.differences(closed, of_open)
    assert told.startswith("front: one is a closed loop and one an open one: ")


def test_what_else_differs_between_two_runs_is_said() -> None:
    before, after = (
        run(trial(steady(1.0))),
        run(trial(steady(1.0), load=replace(LOAD, texts="book")), machine="another"),
    )

    assert comparison.differences(before, after) == (
        "the machines differ: a machine / another",
        "front: the loads differ: texts mixed / book",
    )


def test_a_saved_run_is_read_back_as_it_was() -> None:
    whole = run(
        trial(repetition([sample(0.1, 0.7), sample(0.2, 0.9, failure="timed out")], counted={"gpu0": COUNTED})),
        search=Search(
            target=Target(what="latency", quantile=0.95, limit_s=2.0),
            tried=(Tried(rate_per_s=1.0, late=(1,), of=(20,)),),
        ),
    )

    assert loads.from_json(loads.to_json(whole), source="x.json") == whole
    with pytest.raises(BenchmarkError, match=r"x.json: cores: field required\n  x.json: probes: field required"):
        loads.from_json('{"format": 1, "version": "0", "command": "", "began": "", "machine": ""}', source="x.json")


def test_arrivals_are_poissons_and_the_same_with_the_same_seed() -> None:
    load = replace(LOAD, concurrency=None, rate_per_s=50.0, window_s=200.0)
    due = loads.arrivals(load, 7)
    gaps = [later - earlier for earlier, later in itertools.pairwise(due)]

    assert due == loads.arrivals(load, 7) != loads.arrivals(load, 8)
    assert due[0] >= -2.0
    assert due[-1] < 200.0
    # 10,100 expected, give or take 100; of an exponential the spread is the mean.
    assert len(due) == pytest.approx(202 * 50, rel=0.05)
    mean = sum(gaps) / len(gaps)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.1)


def test_every_text_comes_as_often_as_any_other_in_an_order_of_the_seed() -> None:
    texts = [str(number) for number in range(10)]
    first = list(itertools.islice(loads.in_turn(texts, 1), 30))

    assert first == list(itertools.islice(loads.in_turn(texts, 1), 30))
    assert first != list(itertools.islice(loads.in_turn(texts, 2), 30))
    assert all(first.count(text) == 3 for text in texts)


@pytest.mark.parametrize("name", loads.TEXT_SETS)
def test_text_sets_are_texts(name: str) -> None:
    texts = loads.read_texts(name)

    assert len(texts) >= 6
    assert len(set(texts)) == len(texts)
    assert all(text.isprintable() for text in texts)


TARGET = Target(what="first-byte", quantile=0.95, limit_s=2.0)


@pytest.mark.parametrize(
    ("late", "of", "says"),
    [
        pytest.param((0, 0, 0), (20, 20, 20), "unsure", id="too few to show that 5 % are not late"),
        pytest.param((0, 0, 0), (30, 30, 30), "held", id="enough"),
        pytest.param((9, 10, 11), (100, 100, 100), "missed", id="a tenth"),
        pytest.param((0, 0, 30), (100, 100, 100), "unsure", id="repetitions that differ"),
        pytest.param((4, 5, 6), (100, 100, 100), "unsure", id="just about"),
        pytest.param((0,), (0,), "unsure", id="no request at all"),
    ],
)
def test_a_rate_holds_or_misses_only_when_that_is_sure(late: tuple[int, ...], of: tuple[int, ...], says: str) -> None:
    assert rate_search.verdict(Tried(rate_per_s=1.0, late=late, of=of), TARGET).says == says


def test_failures_miss_every_target() -> None:
    assert not TARGET.met_by(sample(0.0, 0.01, failure="503"))
    assert TARGET.met_by(sample(0.0, 3.9))
    assert not TARGET.met_by(sample(0.0, 4.1))


@pytest.mark.parametrize("limit_per_s", [0.05, 0.7, 3.0, 5.5, 9.0, 30.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_search_ends_near_the_highest_rate_that_holds(limit_per_s: float, seed: int) -> None:
    """A fleet that answers 8/s: below the limit 1 % are late, above it more and more."""
    dice = random.Random(seed)  # noqa: S311
    search, rates = Search(target=TARGET, tried=()), []
    while (rate := rate_search.next_rate(search, pace_per_s=8.0, tolerance=0.05, repetitions=3)) is not None:
        rates.append(rate)
        assert len(rates) < 60, rates
        share = 0.01 if rate <= limit_per_s else min(1.0, 0.1 + rate / limit_per_s - 1)
        late = tuple(sum(dice.random() < share for _ in range(200)) for _ in range(3))
        tried = Tried(rate_per_s=rate, late=late, of=(200,) * 3)
        search = replace(search, tried=rate_search.merge(search.tried, tried))

    found = rate_search.answer(search)
    if limit_per_s < 8 / 32:
        assert found.held_per_s is None
        assert "no rate is known" in rate_search.sentence(search)
    elif limit_per_s >= 32:
        assert found.missed_per_s is None
    else:
        assert found.held_per_s is not None
        assert found.held_per_s == pytest.approx(limit_per_s, rel=0.06)
        assert found.missed_per_s is not None
        assert found.held_per_s < found.missed_per_s
        assert f"holds up to {found.held_per_s:.3g} requests/s (95 %:" in rate_search.sentence(search)


@pytest.mark.parametrize("text", ["", "p95", "p95 wait <= 2", "p0 latency <= 2", "p95 latency <= 0", "95 latency 2"])
def test_a_target_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BenchmarkError, match="write it as 'p95 first-byte <= 2'"):
        rate_search.parse_target(text)


def test_a_target_reads_as_it_is_written() -> None:
    assert str(rate_search.parse_target("p99.5 latency <= 10 s")) == "p99.5 latency <= 10 s"
