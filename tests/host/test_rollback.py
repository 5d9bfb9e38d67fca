"""What ``rollback`` brings back, on a real systemd and a real nginx, under a steady load."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from host.live import FLEET_TOML, VERSIONS, LiveFleet, fleet_toml

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.sandbox import Sandbox

pytestmark = pytest.mark.systemd

LINK = "/opt/chatterbox-tts/venv"


@pytest.fixture(scope="module")
def fleet(boot: Callable[[], Sandbox]) -> LiveFleet:
    installed = LiveFleet(boot())
    installed.install()
    return installed


def running(fleet: LiveFleet) -> set[tuple[str, str]]:
    """(version, model) of every process."""
    found = set()
    for name in ("gpu0", "gpu1"):
        process = fleet.sandbox.show(f"chatterbox-tts-{name}.service", "MainPID")
        program = fleet.sandbox.run("cat", f"/proc/{process}/cmdline").split("\0")[0]
        environ = dict(
            entry.split("=", 1)
            for entry in fleet.sandbox.run("cat", f"/proc/{process}/environ").split("\0")
            if "=" in entry
        )
        found.add((program.removeprefix(f"{VERSIONS}/").partition("/")[0], environ["CHATTERBOX_MODEL"]))
    return found


def history(fleet: LiveFleet) -> list[str]:
    return fleet.sandbox.run("chatterbox-deploy", "history").splitlines()


def test_rollback_brings_back_the_version_and_the_settings_that_were(fleet: LiveFleet) -> None:
    first = running(fleet)
    fleet.write(fleet_toml(server='model = "turbo"'))

    forth = fleet.change("upgrade", f"chatterbox-deploy rollout {FLEET_TOML} --version second")
    upgraded, link = running(fleet), fleet.sandbox.run("readlink", LINK)
    back = fleet.change("rollback", "chatterbox-deploy rollback")

    assert (forth.status, back.status) == (0, 0), forth.said + back.said
    assert first == {("first", "chatterbox")}
    assert upgraded == {("second", "turbo")}
    assert running(fleet) == first
    assert (forth.lost, back.lost) == (0, 0)
    assert (link, fleet.sandbox.run("readlink", LINK)) == ("versions/second\n", "versions/first\n")
    one, two = history(fleet)
    assert one.startswith("*    1  ")
    assert two.startswith("     2  ")
    assert f"  second  chatterbox-deploy rollout {FLEET_TOML} --version second" in two
    # The fleet file is the operator's: it asks for turbo still.
    assert fleet.plan_status() == 1
    print(f"upgrade, rollback: {forth.requests + back.requests} requests, 0 lost")


def test_rollback_goes_forth_again_to_a_revision_by_its_number(fleet: LiveFleet) -> None:
    forth = fleet.change("rollback 2", "chatterbox-deploy rollback 2")

    assert (forth.status, forth.lost) == (0, 0), forth.said
    assert running(fleet) == {("second", "turbo")}
    assert history(fleet)[1].startswith("*    2  ")
    assert fleet.plan_status() == 0
    refused = fleet.sandbox.run("sh", "-c", "chatterbox-deploy rollback 9 2>&1; echo $?")
    assert refused == "error: cannot find revision 9; there are: 1, 2 (`chatterbox-deploy history`)\n3\n"
