"""The queueing model beside what was measured, and what an operator is told."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from chatterbox_deploy import fleet
from chatterbox_deploy.cli import main
from chatterbox_deploy.config import reading
from chatterbox_deploy.errors import ProfileError
from chatterbox_deploy.sizing import advice, profile
from chatterbox_deploy.sizing.advice import Demand

if TYPE_CHECKING:
    from pathlib import Path

GIB = 2**30
MEASURED = {(1, False): 1.45, (2, False): 2.44, (4, False): 3.53, (1, True): 1.34, (4, True): 5.51}
CHATTERBOX = profile.Profile(
    model="chatterbox",
    machine="a machine",
    source="a test",
    gpu_memory_bytes=round(4.07 * GIB),
    t3_share=0.92,
    points=tuple(
        profile.Point(replicas=replicas, mps=mps, audio_s_per_s=rate, cores=None)
        for (replicas, mps), rate in MEASURED.items()
    ),
)
demands = st.builds(Demand, st.floats(0.01, 100), st.floats(0, 1))


@pytest.mark.parametrize("mps", [False, True], ids=["taking turns", "by MPS"])
@pytest.mark.parametrize("known", [CHATTERBOX, profile.built_in()["chatterbox"]], ids=["before", "built in"])
def test_the_model_comes_near_every_point_that_was_measured(known: profile.Profile, mps: bool) -> None:
    points = [point for point in known.points if point.mps == mps]
    demand = advice.fit(points)

    off = {point.replicas: advice.rate(demand, point.replicas) / point.audio_s_per_s - 1 for point in points}

    # One alone differed by 16 % within the run that the profile is from.
    assert len(off) >= 2
    assert all(abs(error) < 0.12 for error in off.values()), off


@given(demand=demands, replicas=st.integers(1, 32))
def test_rates_stay_between_what_must_hold_of_any_closed_system(demand: Demand, replicas: int) -> None:
    reached = advice.rate(demand, replicas)
    ideal = replicas / demand.time_s
    alone_s = demand.exclusive * demand.time_s
    ceiling = 1 / alone_s if alone_s else math.inf

    assert reached <= min(ideal, ceiling) * (1 + 1e-9)
    assert reached >= ideal / (1 + (replicas - 1) * demand.exclusive) * (1 - 1e-9)
    assert advice.rate(demand, replicas + 1) >= reached * (1 - 1e-9)


@given(demand=demands)
def test_a_demand_is_found_again_in_the_rates_that_it_makes(demand: Demand) -> None:
    made = [profile.Point(replicas=n, mps=True, audio_s_per_s=advice.rate(demand, n), cores=None) for n in (1, 2, 4, 8)]

    found = advice.fit(made)

    assert found.time_s == pytest.approx(demand.time_s, rel=0.02)
    assert found.exclusive == pytest.approx(demand.exclusive, abs=0.005)


def test_waits_are_erlangs() -> None:
    # One server: load / (1 - load) service times. Two: load² / (1 - load²).
    assert advice.wait_s(1, 10.0, 0.8) == pytest.approx(40.0)
    assert advice.wait_s(2, 10.0, 0.5) == pytest.approx(10.0 / 3)


def advise(**given: Any) -> advice.Advice:
    return advice.advise(
        CHATTERBOX, CHATTERBOX, **{"memory_bytes": 140 * GIB, "cores": 16, "utterance_s": 10.0, **given}
    )


def test_with_room_enough_the_most_that_was_measured_is_best_where_each_still_adds() -> None:
    best = advise().best

    assert best is not None
    assert best.mps
    assert best.replicas == max(point.replicas for point in CHATTERBOX.points)
    assert best.measured is not None


@pytest.mark.parametrize(
    ("given", "replicas"),
    [({"memory_bytes": 16 * GIB}, 3), ({"memory_bytes": 8 * GIB}, 1), ({"cores": 3}, 2), ({"memory_bytes": None}, 4)],
)
def test_no_more_than_memory_and_cores_allow(given: dict[str, Any], replicas: int) -> None:
    best = advise(**given).best

    assert best is not None
    assert best.replicas == replicas


@pytest.mark.parametrize("cores", [0.5, 1, 2])
def test_a_gpu_has_one_instance_however_few_the_cores(cores: float) -> None:
    # Of the built-in profile each wants a little more than a core.
    known = profile.built_in()["chatterbox"]
    made = advice.advise(known, known, memory_bytes=24 * GIB, cores=cores, utterance_s=10.0)

    assert (made.cores_carry, made.best and made.best.replicas) == (1, 1)
    assert [row.replicas for row in made.rows if row.fits] == [1]


def test_nothing_is_best_where_not_even_one_fits() -> None:
    assert advise(memory_bytes=4 * GIB).best is None


def test_a_pipeline_gains_what_the_shorter_stage_takes_and_no_more() -> None:
    half = CHATTERBOX.model_copy(update={"t3_share": 0.5})

    made = advice.advise(half, half, memory_bytes=None, cores=16, utterance_s=10.0)

    assert made.pipeline == 2.0
    assert made.long_text == pytest.approx(10 / 5.5)
    assert advise().pipeline == pytest.approx(1 / 0.92)


def test_a_model_that_was_measured_alone_is_scaled_from_one_that_shared() -> None:
    turbo = profile.built_in()["turbo"]

    made = advice.advise(turbo, CHATTERBOX, memory_bytes=None, cores=16, utterance_s=10.0)

    assert made.scaled_from == "chatterbox"
    four = next(row for row in made.rows if (row.replicas, row.mps) == (4, False))
    like = next(row for row in advise().rows if (row.replicas, row.mps) == (4, False))
    assert four.gain == pytest.approx(like.gain)
    assert four.measured is None


def run(tmp_path: Path, *words: str) -> str:
    (tmp_path / "mine.json").write_text(CHATTERBOX.model_dump_json())
    done = CliRunner().invoke(main, ["advise", "--profile", str(tmp_path / "mine.json"), *words])
    assert done.exit_code == 0, done.output
    return done.output


def test_the_lines_it_ends_with_are_a_fleet_file(tmp_path: Path) -> None:
    said = run(tmp_path, "--gpu-memory-mib", "143771", "--cores", "16")

    made = fleet.resolve(reading.load(said[said.index("[gpus]") :], source="f"))
    assert len(made.instances) == 4
    assert len(made.mps_daemons) == 1


def test_one_core_is_one_core_and_where_nothing_fits_there_is_no_fleet_file(tmp_path: Path) -> None:
    said = run(tmp_path, "--gpu-memory-mib", "2400", "--cores", "1")

    assert "GPU 0: GPU as given, 2.5 GB, 1 core for it\n" in said
    assert said.endswith("\nno lines of fleet.toml: not even one instance fits\n")


def test_json_has_what_the_table_was_made_from(tmp_path: Path) -> None:
    said = json.loads(run(tmp_path, "--gpu-memory-mib", "24576", "--cores", "4", "--json"))

    (gpu,) = said["gpus"]
    assert gpu["memory_bytes"] == 24 * GIB
    assert gpu["best"]["replicas"] == 3
    assert said["profile"]["machine"] == "a machine"


def test_every_model_has_a_profile_built_in() -> None:
    assert list(profile.built_in()) == ["chatterbox", "turbo", "multilingual"]
    done = CliRunner().invoke(main, ["advise", "--model", "turbo", "--gpu-memory-mib", "24576"])
    assert done.exit_code == 0
    assert "scaled from" in done.output


def test_a_profile_that_is_none_is_refused_with_every_problem() -> None:
    with pytest.raises(ProfileError) as refused:
        profile.parse('{"model": "x", "points": []}', source="x.json")

    assert str(refused.value).splitlines()[:2] == ["cannot use the profile x.json:", "  machine: field required"]
