"""A fleet changes under a steady load, on a real systemd and a real nginx, and no request is lost.

``scripts/prove_rollouts.py`` does the same for as long as one likes, and keeps count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from host import live
from host.live import APPLY, FLEET_TOML, TWO, LiveFleet, fleet_toml

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.sandbox import Sandbox

pytestmark = pytest.mark.systemd


@pytest.fixture(scope="module")
def fleet(boot: Callable[[], Sandbox]) -> LiveFleet:
    installed = LiveFleet(boot())
    installed.install()
    return installed


def test_every_kind_of_change_loses_nothing(fleet: LiveFleet) -> None:
    fleet.changes.clear()

    live.every_change(fleet)

    for change in fleet.changes:
        print(f"{change.name:<36} {change.seconds:5.1f} s {change.requests:>5} requests {change.lost:>3} lost")
        assert (change.name, change.status, dict(change.outcomes)) == (change.name, 0, {"ok": change.requests}), (
            change.said
        )
    recycled = next(change for change in fleet.changes if change.name == "recycle")
    assert "gpu0  it holds " in recycled.said
    assert fleet.plan_status() == 0


@pytest.mark.parametrize("step", [13])
def test_killed_at_any_step_the_next_apply_finishes_and_nothing_is_lost(fleet: LiveFleet, step: int) -> None:
    fleet.write(fleet_toml({"0": "6094", "1": "6093"}))

    killed, again = fleet.killed_at(step)

    assert (killed.status, again.status) == (0, 0), killed.said + again.said
    assert (killed.lost, again.lost) == (0, 0), (killed.outcomes, again.outcomes)
    assert fleet.plan_status() == 0
    fleet.write(fleet_toml())
    assert fleet.change("back", APPLY).lost == 0


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("hangs", "cannot run `systemctl start chatterbox-tts-gpu0.service`"),
        ("crashes", "cannot run `systemctl start chatterbox-tts-gpu0.service`"),
        ("silent", "cannot hear gpu0: asked for 'One, two, three.', got silence"),
    ],
)
def test_a_broken_version_is_gone_back_on_while_the_old_fleet_serves(fleet: LiveFleet, version: str, said: str) -> None:
    fleet.write(fleet_toml(unit="start_timeout_s = 10"))
    assert fleet.change("a short patience", APPLY).lost == 0

    change = fleet.change(version, f"chatterbox-deploy rollout {FLEET_TOML} --version {version}")

    assert (change.status, dict(change.outcomes)) == (3, {"ok": change.requests}), change.said
    assert f"error: {said}" in change.said
    assert "which serves as before" in change.said
    assert fleet.plan_status() == 0
    assert fleet.sandbox.run("readlink", "/opt/chatterbox-tts/venv") == "versions/first\n"


def test_what_is_drained_gets_nothing_until_it_is_put_back_also_while_all_change(fleet: LiveFleet) -> None:
    three = {**TWO, "2": "6096"}
    fleet.write(fleet_toml(three))
    fleet.change("a third", APPLY)

    def asked() -> int:
        said = fleet.sandbox.run("sh", "-c", f'grep -c \'"tried":"[^"]*:6094\' {live.FRONT_LOG} || true')
        return int(said)

    drained = fleet.change("drain", "chatterbox-deploy drain 1")
    before, first = asked(), fleet.sandbox.show("chatterbox-tts-gpu1", "InvocationID")
    fleet.write(fleet_toml(three, server='model = "turbo"'))
    change = fleet.change("all change", APPLY)

    assert (drained.status, change.status, drained.lost, change.lost) == (0, 0, 0, 0), drained.said + change.said
    assert asked() == before
    assert fleet.sandbox.show("chatterbox-tts-gpu1", "InvocationID") != first
    assert fleet.plan_status() == 0
    status = fleet.sandbox.run("sh", "-c", f"chatterbox-deploy status {FLEET_TOML}; echo $?")
    assert "chatterbox-deploy undrain gpu1" in status
    assert status.endswith("1\n")
    assert fleet.change("undrain", "chatterbox-deploy undrain 1", "sleep 1").lost == 0
    assert asked() > before


def test_two_at_once_do_not_meet(fleet: LiveFleet) -> None:
    both = fleet.change(
        "two at once", f"(chatterbox-deploy rollout {FLEET_TOML} & sleep 1; {APPLY}; echo second $?; wait)"
    )

    assert "is changing this fleet now" in both.said
    assert "second 3" in both.said
    assert both.lost == 0


def test_the_log_tells_who_did_what_and_how_it_ended(fleet: LiveFleet) -> None:
    fleet.sandbox.run("env", "SUDO_USER=ada", "chatterbox-deploy", "rollout", FLEET_TOML, "--gpu", "0")

    log = fleet.sandbox.run(
        "sh", "-c", "tail -2 /var/lib/chatterbox-deploy/log.jsonl; ls -ld /var/lib/chatterbox-deploy"
    )
    begun, done, directory = log.splitlines()

    assert '"who": "ada", "command": "chatterbox-deploy rollout' in begun
    assert '"result": "begun"' in begun
    assert '"result": "done: revision' in done
    assert directory.startswith("drwx------")
