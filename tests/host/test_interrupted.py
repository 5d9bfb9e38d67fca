"""A change that was cut short (Ctrl-C, ``kill -9``, power) is finished or undone, on a real systemd and a real nginx.

Each step of a plan: ``scripts/prove_rollouts.py``.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from host import live
from host.live import APPLY, FLEET_TOML, LiveFleet, fleet_toml

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.sandbox import Sandbox

pytestmark = pytest.mark.systemd

SWAPPED = {"0": "6094", "1": "6093"}


@pytest.fixture(scope="module")
def fleet(boot: Callable[[], Sandbox]) -> LiveFleet:
    installed = LiveFleet(boot())
    installed.install()
    return installed


def all_active(fleet: LiveFleet) -> None:
    units = "chatterbox-tts-gpu0 chatterbox-tts-gpu1 nginx"
    fleet.sandbox.wait_until(f'test "$(systemctl is-active {units} | uniq)" = active')


def last_results(fleet: LiveFleet, count: int) -> list[str]:
    """What the audit log ends with."""
    lines = fleet.sandbox.run("tail", f"--lines={count}", "/var/lib/chatterbox-deploy/log.jsonl").splitlines()
    return [json.loads(line)["result"] for line in lines]


def test_after_ctrl_c_apply_finishes_what_was_begun(fleet: LiveFleet) -> None:
    fleet.write(fleet_toml(SWAPPED))

    ended = fleet.cut_short(7, "INT", 130)
    meanwhile = fleet.sandbox.run("sh", "-c", "chatterbox-deploy drain 1 2>&1 || echo $?")
    planned = fleet.plan_status()
    again = fleet.change("apply again", APPLY)
    results = last_results(fleet, 4)

    assert ended.status == 0, ended.said
    advice = f"`chatterbox-deploy apply {FLEET_TOML}` finishes it, `chatterbox-deploy rollback` undoes it"
    assert f"interrupted; {advice}" in ended.said
    assert f"cannot begin: a change did not end; {advice}" in meanwhile
    assert meanwhile.endswith("3\n")
    assert planned == 1
    assert (again.status, ended.lost, again.lost) == (0, 0, 0), again.said
    assert fleet.plan_status() == 0
    assert results[:-1] == ["begun", "interrupted", "begun"]
    assert results[-1].startswith("done: revision ")
    print(f"Ctrl-C, apply: {ended.requests + again.requests} requests, 0 lost")


@pytest.mark.parametrize("step", [6])
def test_killed_rollback_undoes_what_was_begun(fleet: LiveFleet, step: int) -> None:
    fleet.write(fleet_toml())
    before = fleet.change("as it was", APPLY)
    assert before.status == 0, before.said
    fleet.write(fleet_toml({**SWAPPED, "2": "6096"}, server='model = "turbo"'))

    killed = fleet.cut_short(step)
    undone = fleet.change("rollback", "chatterbox-deploy rollback")
    fleet.write(fleet_toml())

    assert (killed.status, undone.status) == (0, 0), killed.said + undone.said
    assert (before.lost, killed.lost, undone.lost) == (0, 0, 0), (killed.outcomes, undone.outcomes)
    assert fleet.plan_status() == 0
    print(f"kill -9 at step {step}, rollback: {killed.requests + undone.requests} requests, 0 lost")


@pytest.mark.parametrize("step", [9])
def test_after_a_power_cut_in_the_middle_the_fleet_boots_and_apply_finishes(fleet: LiveFleet, step: int) -> None:
    fleet.write(fleet_toml())
    before = fleet.change("as it was", APPLY)
    assert before.status == 0, before.said
    fleet.write(fleet_toml(SWAPPED))

    killed = fleet.cut_short(step)
    fleet.sandbox.reboot()
    fleet.sandbox.write(live.KEY, "a-first-and-long-key")
    all_active(fleet)
    again = fleet.change("apply again", APPLY)

    assert (killed.status, again.status) == (0, 0), killed.said + again.said
    assert (killed.lost, again.lost) == (0, 0), (killed.outcomes, again.outcomes)
    assert fleet.plan_status() == 0
    print(f"power cut at step {step}, apply: {again.requests} requests, 0 lost")
