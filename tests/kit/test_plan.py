"""Plans read like this: what is there, what is wanted, and every step between."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_deploy import render, systemd
from chatterbox_deploy.change import apply, facts, observe, plan
from chatterbox_deploy.change.facts import HostState, MpsState, UnitState
from chatterbox_deploy.change.ledger import Ledger
from chatterbox_deploy.change.steps import PointLink
from chatterbox_deploy.config import reading
from chatterbox_deploy.templates import Templates
from support.scripted import scripted_host

if TYPE_CHECKING:
    from chatterbox_deploy.change.facts import Wanted
    from chatterbox_deploy.change.plan import Plan

ONE = "[gpus]\n0 = 6093\n"
TWO = "[gpus]\n0 = 6093\n1 = 6094\n"
SWAPPED = "[gpus]\n0 = 6094\n1 = 6093\n"
KEYS = "/etc/chatterbox-tts/api-keys"


def want(toml: str, source: str = "/etc/chatterbox-tts/fleet.toml") -> Wanted:
    return facts.want(reading.load(toml, source=source), Templates(), source=source)


def serving(toml: str, **changes: Any) -> HostState:
    """A host on which that fleet serves."""
    wanted = want(toml)
    marks = {found.name: found for file in wanted.files if (found := systemd.find_mark(file.text))}
    return replace(
        HostState(
            mps_daemons={
                file.path.name: MpsState("active", systemd.mps_digest(file.text))
                for file in wanted.files
                if systemd.is_mps_unit(file.path.name)
            },
            files={file.path: file.text for file in wanted.files},
            instances={name: UnitState("active", running, has_process=True) for name, running in marks.items()},
            enabled=True,
            active=True,
            listening=frozenset(running.port for running in marks.values()),
        ),
        **changes,
    )


def read(made: Plan) -> str:
    """A line for each step, reason, note and problem; what every name begins with is left out."""
    lines = [str(step) for step in made.steps]
    lines += [f"{name}: {why}" for name, why in made.reasons]
    lines += [f"note: {note}" for note in made.notes] + [f"problem: {problem}" for problem in made.problems]
    text = "\n".join(lines)
    for said in ("/etc/systemd/system/", "chatterbox-tts-", " (systemd-analyze verify)", "; nginx -t, reload"):
        text = text.replace(said, "")
    return text.replace(" (systemd reads the units)", "")


def test_a_host_that_serves_is_seen_like_this() -> None:
    with scripted_host() as host:
        wanted = want(TWO)
        apply.carry_out(plan.plan(wanted, HostState()).steps, host, lambda number, step: None)

        assert observe.state(host, Ledger(), wanted=wanted.files, fleet=wanted.fleet) == serving(
            TWO, missing=frozenset({"/opt/chatterbox-tts/venv/bin/python"})
        )


def crashed() -> HostState:
    before = serving(TWO)
    instances = {**before.instances, "gpu1": UnitState("failed", None)}
    return replace(before, instances=instances, listening=frozenset({6093}))


def failed_daemon() -> HostState:
    before = serving("[gpus]\n0 = [6093, 6094]\n")
    return replace(before, mps_daemons={"chatterbox-tts-mps-gpu0.service": MpsState("failed", None)})


TURBO = "[server]\nmodel = 'turbo'\n"
KEYS = "/etc/chatterbox-tts/api-keys"
KEYS_AT_INSTANCES = f"[server]\napi_keys_file = '{KEYS}'\n"
KEYS_AT_FRONT = f"[nginx]\napi_keys_file = '{KEYS}'\n"

READS = {
    "the first install of two GPUs": (
        HostState(),
        TWO,
        """
verify 5 units
front: nobody in service
write gpu-nodes.service, nginx.service, chatterbox-tts.target
systemctl daemon-reload
write gpu0.service, gpu1.service
systemctl daemon-reload
systemctl start gpu0.service gpu1.service
wait until gpu0 is ready on port 6093
hear gpu0 speak
wait until gpu1 is ready on port 6094
hear gpu1 speak
front: gpu0 (6093), gpu1 (6094) in service
systemctl enable chatterbox-tts.target (the fleet starts at boot)
systemctl start chatterbox-tts.target (the fleet counts as started)
gpu0: it is new
gpu1: it is new
""",
    ),
    "nothing changed": (
        serving(TWO),
        TWO,
        """

""",
    ),
    "the model changed": (
        serving(TWO),
        TWO + TURBO,
        """
verify 5 units
front: gpu1 (6094) in service; gpu0 leaving
wait until gpu0 is idle
systemctl stop gpu0.service
write gpu0.service
systemctl daemon-reload
systemctl start gpu0.service
wait until gpu0 is ready on port 6093
hear gpu0 speak
front: gpu0 (6093) in service; gpu1 leaving
wait until gpu1 is idle
systemctl stop gpu1.service
write gpu1.service
systemctl daemon-reload
systemctl start gpu1.service
wait until gpu1 is ready on port 6094
hear gpu1 speak
front: gpu0 (6093), gpu1 (6094) in service
gpu0: its unit changes: CHATTERBOX_MODEL
gpu1: its unit changes: CHATTERBOX_MODEL
""",
    ),
    "a GPU came": (
        serving(ONE),
        TWO,
        """
verify 5 units
front: gpu0 (6093) in service
write chatterbox-tts.target
systemctl daemon-reload
write gpu1.service
systemctl daemon-reload
systemctl start gpu1.service
wait until gpu1 is ready on port 6094
hear gpu1 speak
front: gpu0 (6093), gpu1 (6094) in service
gpu1: it is new
""",
    ),
    "a GPU went": (
        serving(TWO),
        ONE,
        """
verify 4 units
front: gpu0 (6093), gpu1 (6094) in service
write chatterbox-tts.target
systemctl daemon-reload
front: gpu0 (6093) in service; gpu1 leaving
wait until gpu1 is idle
systemctl stop gpu1.service
remove gpu1.service
systemctl daemon-reload
front: gpu0 (6093) in service
gpu1: the fleet file asks for it no longer
""",
    ),
    "a GPU is shared": (
        serving(ONE),
        "[gpus]\n0 = [6093, 6094]\n",
        """
verify 6 units
front: gpu0 (6093) in service
write chatterbox-tts.target
systemctl daemon-reload
write mps-gpu0.service
systemctl daemon-reload
systemctl start mps-gpu0.service
write gpu0-b.service
systemctl daemon-reload
systemctl start gpu0-b.service
wait until gpu0-b is ready on port 6094
hear gpu0-b speak
front: gpu0-b (6094) in service; gpu0 leaving
wait until gpu0 is idle
systemctl stop gpu0.service
remove gpu0.service
systemctl daemon-reload
write gpu0-a.service
systemctl daemon-reload
systemctl start gpu0-a.service
wait until gpu0-a is ready on port 6093
hear gpu0-a speak
front: gpu0-a (6093), gpu0-b (6094) in service
gpu0-b: it is new
gpu0: the fleet file asks for it no longer
gpu0-a: it is new
""",
    ),
    "a GPU is shared no longer": (
        serving("[gpus]\n0 = [6093, 6094]\n"),
        ONE,
        """
verify 4 units
front: gpu0-a (6093), gpu0-b (6094) in service
write chatterbox-tts.target
systemctl daemon-reload
front: gpu0-b (6094) in service; gpu0-a leaving
wait until gpu0-a is idle
systemctl stop gpu0-a.service
remove gpu0-a.service
systemctl daemon-reload
write gpu0.service
systemctl daemon-reload
systemctl start gpu0.service
wait until gpu0 is ready on port 6093
hear gpu0 speak
front: gpu0 (6093) in service; gpu0-b leaving
wait until gpu0-b is idle
systemctl stop gpu0-b.service
remove gpu0-b.service
systemctl daemon-reload
systemctl stop mps-gpu0.service
remove mps-gpu0.service
systemctl daemon-reload
front: gpu0 (6093) in service
gpu0-a: the fleet file asks for it no longer
gpu0: it is new
gpu0-b: the fleet file asks for it no longer
""",
    ),
    "two that share a GPU take turns from now on": (
        serving("[gpus]\n0 = [6093, 6094]\n"),
        "[gpus]\n0 = [6093, 6094]\n[unit]\nmps = false\n",
        """
verify 5 units
front: gpu0-b (6094) in service; gpu0-a leaving
wait until gpu0-a is idle
systemctl stop gpu0-a.service
write gpu0-a.service
systemctl daemon-reload
systemctl start gpu0-a.service
wait until gpu0-a is ready on port 6093
hear gpu0-a speak
front: gpu0-a (6093) in service; gpu0-b leaving
wait until gpu0-b is idle
systemctl stop gpu0-b.service
write gpu0-b.service
systemctl daemon-reload
systemctl start gpu0-b.service
wait until gpu0-b is ready on port 6094
hear gpu0-b speak
front: gpu0-a (6093), gpu0-b (6094) in service
systemctl stop mps-gpu0.service
remove mps-gpu0.service
systemctl daemon-reload
gpu0-a: its unit changes: PartOf, Wants, After and more
gpu0-b: its unit changes: PartOf, Wants, After and more
""",
    ),
    "the user of an MPS daemon changed: its clients restart together": (
        serving("[gpus]\n0 = [6093, 6094]\n1 = 6096\n"),
        "[gpus]\n0 = [6093, 6094]\n1 = 6096\n[unit]\nuser = '_tts'\n",
        """
verify 7 units
front: gpu0-a (6093), gpu0-b (6094) in service; gpu1 leaving
wait until gpu1 is idle
systemctl stop gpu1.service
write gpu1.service
systemctl daemon-reload
systemctl start gpu1.service
wait until gpu1 is ready on port 6096
hear gpu1 speak
front: gpu1 (6096) in service; gpu0-a, gpu0-b leaving
wait until gpu0-a is idle
wait until gpu0-b is idle
systemctl stop gpu0-a.service gpu0-b.service
systemctl stop mps-gpu0.service
write mps-gpu0.service
systemctl daemon-reload
systemctl start mps-gpu0.service
write gpu0-a.service, gpu0-b.service
systemctl daemon-reload
systemctl start gpu0-a.service gpu0-b.service
wait until gpu0-a is ready on port 6093
hear gpu0-a speak
wait until gpu0-b is ready on port 6094
hear gpu0-b speak
front: gpu0-a (6093), gpu0-b (6094), gpu1 (6096) in service
gpu1: its unit changes: User
gpu0-a: its unit changes: User
gpu0-b: its unit changes: User
""",
    ),
    "an MPS daemon failed: its clients cannot go on": (
        failed_daemon(),
        "[gpus]\n0 = [6093, 6094]\n",
        """
front: nobody in service; gpu0-a, gpu0-b leaving
wait until gpu0-a is idle
wait until gpu0-b is idle
systemctl stop gpu0-a.service gpu0-b.service
systemctl start mps-gpu0.service
systemctl start gpu0-a.service gpu0-b.service
wait until gpu0-a is ready on port 6093
hear gpu0-a speak
wait until gpu0-b is ready on port 6094
hear gpu0-b speak
front: gpu0-a (6093), gpu0-b (6094) in service
gpu0-a: the MPS daemon of its GPU starts anew
gpu0-b: the MPS daemon of its GPU starts anew
note: nobody else speaks while gpu0-a and gpu0-b restarts: requests get 503 with Retry-After
""",
    ),
    "two swapped their ports: one goes over a spare one": (
        serving(TWO),
        "[gpus]\n0 = 6094\n1 = 6093\n",
        """
verify 5 units
front: gpu1 (6094) in service; gpu0 leaving
wait until gpu0 is idle
systemctl stop gpu0.service
write gpu0.service
systemctl daemon-reload
systemctl start gpu0.service
wait until gpu0 is ready on port 6096
hear gpu0 speak
front: gpu0 (6096) in service; gpu1 leaving
wait until gpu1 is idle
systemctl stop gpu1.service
write gpu1.service
systemctl daemon-reload
systemctl start gpu1.service
wait until gpu1 is ready on port 6093
hear gpu1 speak
front: gpu1 (6093) in service; gpu0 leaving
wait until gpu0 is idle
systemctl stop gpu0.service
write gpu0.service
systemctl daemon-reload
systemctl start gpu0.service
wait until gpu0 is ready on port 6094
hear gpu0 speak
front: gpu0 (6094), gpu1 (6093) in service
gpu0: it moves from port 6093 to 6094, over port 6096, since another holds its own
gpu1: it moves from port 6094 to 6093
gpu0: it moves from port 6093 to 6094
""",
    ),
    "the last one that speaks moves: who is new stands in for it": (
        serving(TWO),
        "[gpus]\n1 = 6093\n2 = 6094\n",
        """
verify 5 units
front: gpu1 (6094), gpu0 (6093) in service
write chatterbox-tts.target
systemctl daemon-reload
front: gpu1 (6094) in service; gpu0 leaving
wait until gpu0 is idle
systemctl stop gpu0.service
remove gpu0.service
systemctl daemon-reload
write gpu2.service
systemctl daemon-reload
systemctl start gpu2.service
wait until gpu2 is ready on port 6096
hear gpu2 speak
front: gpu2 (6096) in service; gpu1 leaving
wait until gpu1 is idle
systemctl stop gpu1.service
write gpu1.service
systemctl daemon-reload
systemctl start gpu1.service
wait until gpu1 is ready on port 6093
hear gpu1 speak
front: gpu1 (6093) in service; gpu2 leaving
wait until gpu2 is idle
systemctl stop gpu2.service
write gpu2.service
systemctl daemon-reload
systemctl start gpu2.service
wait until gpu2 is ready on port 6094
hear gpu2 speak
front: gpu1 (6093), gpu2 (6094) in service
gpu0: the fleet file asks for it no longer
gpu2: it is new, over port 6096, since another holds its own
gpu1: it moves from port 6094 to 6093
gpu2: it is new
""",
    ),
    "there is but one": (
        serving(ONE),
        ONE + TURBO,
        """
verify 4 units
front: nobody in service; gpu0 leaving
wait until gpu0 is idle
systemctl stop gpu0.service
write gpu0.service
systemctl daemon-reload
systemctl start gpu0.service
wait until gpu0 is ready on port 6093
hear gpu0 speak
front: gpu0 (6093) in service
gpu0: its unit changes: CHATTERBOX_MODEL
note: nobody else speaks while gpu0 restarts: requests get 503 with Retry-After
""",
    ),
    "the front moved: nothing restarts": (
        serving(TWO),
        TWO + "[nginx]\nlisten = '127.0.0.1:7000'\n",
        """
verify 5 units
front: gpu0 (6093), gpu1 (6094) in service
write nginx.service, chatterbox-tts.target
systemctl daemon-reload
""",
    ),
    "a unit crashed": (
        crashed(),
        TWO,
        """
front: gpu0 (6093) in service
systemctl start gpu1.service
wait until gpu1 is ready on port 6094
hear gpu1 speak
front: gpu0 (6093), gpu1 (6094) in service
gpu1: its unit is failed
""",
    ),
    "the keys were rotated, and instances check them": (
        serving(TWO + KEYS_AT_INSTANCES, changed_keys=frozenset({KEYS})),
        TWO + KEYS_AT_INSTANCES,
        """
front: gpu1 (6094) in service; gpu0 leaving
wait until gpu0 is idle
systemctl stop gpu0.service
systemctl start gpu0.service
wait until gpu0 is ready on port 6093
hear gpu0 speak
front: gpu0 (6093) in service; gpu1 leaving
wait until gpu1 is idle
systemctl stop gpu1.service
systemctl start gpu1.service
wait until gpu1 is ready on port 6094
hear gpu1 speak
front: gpu0 (6093), gpu1 (6094) in service
gpu0: the keys in /etc/chatterbox-tts/api-keys changed
gpu1: the keys in /etc/chatterbox-tts/api-keys changed
""",
    ),
    "the keys were rotated, and nginx checks them": (
        serving(TWO + KEYS_AT_FRONT, changed_keys=frozenset({KEYS})),
        TWO + KEYS_AT_FRONT,
        """
front: gpu0 (6093), gpu1 (6094) in service
note: the keys in /etc/chatterbox-tts/api-keys changed: nginx reads them again
""",
    ),
    "one is drained: it stays so, and is heard all the same": (
        serving(TWO, drained=frozenset({"gpu1"})),
        TWO + TURBO,
        """
verify 5 units
front: gpu0 (6093) in service; gpu1 drained
wait until gpu1 is idle
systemctl stop gpu1.service
write gpu1.service
systemctl daemon-reload
systemctl start gpu1.service
wait until gpu1 is ready on port 6094
hear gpu1 speak
front: nobody in service; gpu0 leaving; gpu1 drained
wait until gpu0 is idle
systemctl stop gpu0.service
write gpu0.service
systemctl daemon-reload
systemctl start gpu0.service
wait until gpu0 is ready on port 6093
hear gpu0 speak
front: gpu0 (6093) in service; gpu1 drained
gpu1: its unit changes: CHATTERBOX_MODEL
gpu0: its unit changes: CHATTERBOX_MODEL
note: nobody else speaks while gpu0 restarts: requests get 503 with Retry-After
""",
    ),
    "a plan was cut short after its last step": (
        serving(TWO, interrupted="apply"),
        TWO,
        """
front: gpu0 (6093), gpu1 (6094) in service
systemctl daemon-reload
""",
    ),
}


@pytest.mark.parametrize(("state", "toml", "reads"), READS.values(), ids=READS.keys())
def test_a_plan_reads_like_this(state: HostState, toml: str, reads: str) -> None:
    assert read(plan.plan(want(toml), state)) == reads.strip("\n")


def test_where_only_a_comment_changed_nothing_restarts() -> None:
    moved = want(TWO, source="/home/ada/fleet.toml")

    assert (
        read(plan.plan(moved, serving(TWO)))
        == """
verify 5 units
front: gpu0 (6093), gpu1 (6094) in service
write gpu-nodes.service, nginx.service, chatterbox-tts.target, gpu0.service, gpu1.service
systemctl daemon-reload
"""[1:-1]
    )


def test_two_at_a_time_still_leave_one_that_speaks() -> None:
    three = TWO + "2 = 6096\n"

    assert (
        read(plan.plan(want(three + TURBO), serving(three), max_unavailable=3))
        == """
verify 6 units
front: gpu2 (6096) in service; gpu0, gpu1 leaving
wait until gpu0 is idle
wait until gpu1 is idle
systemctl stop gpu0.service gpu1.service
write gpu0.service, gpu1.service
systemctl daemon-reload
systemctl start gpu0.service gpu1.service
wait until gpu0 is ready on port 6093
hear gpu0 speak
wait until gpu1 is ready on port 6094
hear gpu1 speak
front: gpu0 (6093), gpu1 (6094) in service; gpu2 leaving
wait until gpu2 is idle
systemctl stop gpu2.service
write gpu2.service
systemctl daemon-reload
systemctl start gpu2.service
wait until gpu2 is ready on port 6096
hear gpu2 speak
front: gpu0 (6093), gpu1 (6094), gpu2 (6096) in service
gpu0: its unit changes: CHATTERBOX_MODEL
gpu1: its unit changes: CHATTERBOX_MODEL
gpu2: its unit changes: CHATTERBOX_MODEL
"""[1:-1]
    )


def test_a_spare_port_is_one_that_nobody_has() -> None:
    swapped = want("[gpus]\n0 = 6094\n1 = 6093\n")

    made = plan.plan(swapped, serving(TWO, listening=frozenset({6093, 6094, 6096, 6097})))

    # 6095 is the front's.
    assert made.reasons[0] == ("gpu0", "it moves from port 6093 to 6094, over port 6098, since another holds its own")


def test_a_restart_that_was_asked_for_has_its_reason() -> None:
    assert (
        read(plan.plan(want(TWO), serving(TWO), restart={"gpu1": "it holds 9000 MB; 8000 MB are the limit"}))
        == """
front: gpu0 (6093) in service; gpu1 leaving
wait until gpu1 is idle
systemctl stop gpu1.service
systemctl start gpu1.service
wait until gpu1 is ready on port 6094
hear gpu1 speak
front: gpu0 (6093), gpu1 (6094) in service
gpu1: it holds 9000 MB; 8000 MB are the limit
"""[1:-1]
    )


def test_the_link_to_the_server_is_turned_first() -> None:
    link = PointLink(PurePosixPath("/opt/chatterbox-tts/venv"), PurePosixPath("/opt/chatterbox-tts/versions/2"))

    assert plan.plan(want(TWO), serving(TWO), link=link).steps == (link,)


def test_an_uninstallation_reads_like_this() -> None:
    assert (
        read(plan.plan_removal(crashed()))
        == """
remove /etc/nginx/conf.d/chatterbox-tts.conf
systemctl try-reload-or-restart nginx.service (nginx forgets the front)
systemctl disable chatterbox-tts.target (the fleet no longer starts at boot)
systemctl stop gpu0.service
systemctl stop gpu-nodes.service nginx.service chatterbox-tts.target
remove gpu-nodes.service
remove gpu0.service
remove gpu1.service
remove nginx.service
remove chatterbox-tts.target
systemctl daemon-reload
systemctl reset-failed gpu1.service (systemd forgets that it failed)
gpu0: the fleet is uninstalled
gpu1: the fleet is uninstalled
"""[1:-1]
    )


def test_whatever_stands_in_the_way_is_said_at_once() -> None:
    before = serving(TWO, listening=frozenset({6093, 6094, 6096}), missing=frozenset({KEYS}))
    gpu2 = render.UNIT_DIR / systemd.unit_name("gpu2")
    state = replace(before, files={**before.files, gpu2: "[Service]\nExecStart=/mine\n"})

    made = plan.plan(want(TWO + "2 = 6096\n" + KEYS_AT_INSTANCES), state)

    assert made.steps == ()
    assert made.problems == (
        f"{gpu2}: chatterbox-deploy did not write it, and writes over nothing of others; move it away",
        "gpu2: something else listens on its port 6096; `ss -tlnp sport = :6096` names it",
        f"{KEYS}: missing; the fleet needs it",
    )


def test_a_copy_of_a_unit_that_is_not_ours_makes_no_way_for_anybody() -> None:
    before = serving(TWO)
    gpu1 = render.UNIT_DIR / systemd.unit_name("gpu1")
    files = {**before.files, gpu1: before.files[gpu1].partition("\n")[2]}

    made = plan.plan(want("[gpus]\n0 = 6093\n2 = 6094\n"), replace(before, files=files))

    assert made.problems == ("gpu2: something else listens on its port 6094; `ss -tlnp sport = :6094` names it",)


def test_the_front_cannot_take_a_port_that_an_instance_still_holds() -> None:
    made = plan.plan(want("[gpus]\n0 = 6096\n[nginx]\nlisten = '127.0.0.1:6093'\n"), serving(ONE))

    assert made.problems == (
        "nginx.listen: gpu0 still listens on port 6093; apply its new port first, and then the new listen",
    )
