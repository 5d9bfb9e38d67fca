"""The laws of a plan, over pairs of fleets: what is planned is carried out on a host that objects when a law is broken.

The host (``support.scripted``) watches every change: no unit starts on a port that another holds; nothing that the
front lists, or that still speaks, is stopped; no more than ``max_unavailable`` are away; somebody is in service;
nothing restarts, and nginx reloads nothing, before it was judged.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from chatterbox_deploy import render, systemd
from chatterbox_deploy.change import apply, blueprint, deploy, draining, facts, ledger, observe, plan, removal
from chatterbox_deploy.change.deploy import Author, Proposal, WentBack
from chatterbox_deploy.change.difference import Change
from chatterbox_deploy.change.steps import Run, ShowFront, StartUnits, StopUnits, WriteFiles
from chatterbox_deploy.errors import CommandFailed
from chatterbox_deploy.fleet import MPS_PROGRAM, Upstream
from chatterbox_deploy.render import RenderedFile
from support import fleets
from support.fleets import Pair
from support.scripted import Killed, ScriptedHost, scripted_host

if TYPE_CHECKING:
    from collections.abc import Callable

    from chatterbox_deploy.change.blueprint import Blueprint
    from chatterbox_deploy.change.steps import Step
    from support.scripted import Fault

SOURCE = "/etc/chatterbox-tts/fleet.toml"
ADA = Author("ada", "apply")


def laws(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def untold(total: int, title: str | None = None) -> Callable[[int, Step], None]:
    """Nobody listens to the progress."""
    return lambda number, step: None


def propose(host: ScriptedHost, table: dict[str, Any], max_unavailable: int = 1, *, source: str = SOURCE) -> Proposal:
    """A plan for a fleet whose programs are all there; nothing speaks against it."""
    asked = blueprint.of_file(host, source=source, fleet_toml=fleets.to_toml(table), templates={})
    for instance in blueprint.want(asked).fleet.instances:
        host.place(instance.command[0])
    host.place(f"/usr/bin/{MPS_PROGRAM}")
    return proposal_for(host, asked, max_unavailable)


def proposal_for(host: ScriptedHost, asked: Blueprint, max_unavailable: int = 1) -> Proposal:
    proposal = deploy.propose(host, asked, max_unavailable=max_unavailable)
    assert not proposal.plan.problems
    return proposal


def watch(host: ScriptedHost, proposal: Proposal, max_unavailable: int = 1) -> None:
    """Have the host object to what must not happen on the way to what is proposed."""
    names = {instance.name for instance in proposal.wanted.fleet.instances}
    together = starting_anew_together(host, proposal)
    others = names - proposal.state.drained - together.keys()
    host.promise(
        proposal.wanted,
        lasting=names & host.running().keys(),
        max_unavailable=max_unavailable,
        somebody=len(host.in_service()) > 1
        and len(names - proposal.state.drained) > 1
        and (not together or bool(others & host.in_service())),
        together=together,
    )


def starting_anew_together(host: ScriptedHost, proposal: Proposal) -> dict[str, str]:
    """Instances whose MPS daemon runs and has to start anew: by name, the daemon."""
    wanted = {file.path.name: systemd.mps_digest(file.text) for file in proposal.wanted.files}
    anew = {
        unit
        for unit, daemon in proposal.state.mps_daemons.items()
        if daemon.digest is not None and wanted.get(unit) != daemon.digest
    }
    daemons = {name: systemd.mps_unit_of(text) for name, text in host.running().items()}
    return {name: unit for name, unit in daemons.items() if unit in anew}


def carry_out(host: ScriptedHost, proposal: Proposal) -> None:
    with ledger.lock(host, ADA.command):
        deploy.carry_out(host, proposal, ADA, untold)


def change(host: ScriptedHost, table: dict[str, Any], max_unavailable: int = 1, *, source: str = SOURCE) -> Proposal:
    """``apply``, watched."""
    proposal = propose(host, table, max_unavailable, source=source)
    watch(host, proposal, max_unavailable)
    carry_out(host, proposal)
    return proposal


def set_up(host: ScriptedHost, pair: Pair) -> None:
    """The host as it is before."""
    change(host, pair.before)
    if pair.drained:
        with ledger.lock(host, ADA.command):
            draining.drain(host, pair.drained, ADA, untold, drained=True, force=True)


def assert_is_as_wanted(host: ScriptedHost, again: Proposal) -> None:
    """The host holds exactly what was asked, and ``again``, proposed after it was applied, finds nothing to do."""
    wanted, drained = again.wanted, again.state.drained
    instances = wanted.fleet.instances
    front = wanted.front([Upstream(i.name, i.host, i.port, drained=i.name in drained) for i in instances])
    texts = {file.path: file.text for file in wanted.files} | {render.FRONT_PATH: front}

    assert [str(step) for step in again.plan.steps] == []
    assert observe.files(host, wanted.files) == texts
    assert host.front == front
    assert again.state.enabled
    assert again.state.active
    assert host.in_service() == {instance.name for instance in instances} - drained
    assert (systemd.MONITOR_UNIT in host.active_units()) == (wanted.fleet.monitoring.textfile is not None)
    assert host.instances() == {instance.name: "active" for instance in instances}
    assert {unit: (daemon.active, daemon.digest) for unit, daemon in again.state.mps_daemons.items()} == {
        file.path.name: ("active", systemd.mps_digest(file.text))
        for file in wanted.files
        if systemd.is_mps_unit(file.path.name)
    }
    marks = {name: systemd.find_mark(text) for name, text in host.running().items()}
    assert marks == {
        name: systemd.find_mark(texts[render.UNIT_DIR / systemd.unit_name(name)]) for name in host.running()
    }


# 1, and on the way 2 to 5

SHARED = {"0": [6100, 6101], "1": 6102}


@laws(60)
@given(pair=fleets.related_pairs(), source=st.sampled_from([SOURCE, "/home/ada/fleet.toml"]))
# Each takes the port of the next: the last one that speaks has to move, too.
@example(pair=Pair({"gpus": {"0": 6100, "1": 6101}}, {"gpus": {"1": 6100, "2": 6101}}), source=SOURCE)
@example(pair=Pair({"gpus": {"0": 6100, "1": 6101}}, {"gpus": {"0": 6101, "1": 6100}}), source=SOURCE)
# Who shares a GPU by MPS goes and comes with the daemon.
@example(pair=Pair({"gpus": SHARED}, {"gpus": SHARED, "unit": {"user": "_tts"}}), source=SOURCE)
@example(pair=Pair({"gpus": SHARED}, {"gpus": {"0": [6101, 6100]}, "unit": {"user": "_tts"}}, ("gpu1",)), source=SOURCE)
@example(pair=Pair({"gpus": SHARED, "unit": {"mps": False}}, {"gpus": SHARED}), source=SOURCE)
def test_applied_a_plan_leaves_nothing_to_do_and_breaks_no_law_on_the_way(pair: Pair, source: str) -> None:
    with scripted_host() as host:
        set_up(host, pair)

        change(host, pair.after, pair.max_unavailable, source=source)

        assert_is_as_wanted(host, propose(host, pair.after, source=source))


@laws(20)
@given(pair=fleets.related_pairs())
def test_where_only_comments_change_nothing_restarts(pair: Pair) -> None:
    with scripted_host() as host:
        set_up(host, pair)
        before, moved = len(host.history), "/home/ada/fleet.toml"

        change(host, pair.before, source=moved)

        assert_is_as_wanted(host, propose(host, pair.before, source=moved))
        # The one who looks is told where the fleet file lies.
        others = [what for what in host.history[before:] if systemd.MONITOR_UNIT not in what]
        assert not [what for what in others if what.startswith(("start ", "stop "))]


@laws(20)
@given(pair=fleets.related_pairs())
def test_a_plan_is_a_function_of_what_is_wanted_and_what_is_there(pair: Pair) -> None:
    with scripted_host() as host:
        set_up(host, pair)
        first, second = propose(host, pair.after), propose(host, pair.after)

        assert first.state == second.state
        for each in (first, second):
            made = plan.plan(each.wanted, each.state, max_unavailable=pair.max_unavailable)
            assert made == plan.plan(first.wanted, first.state, max_unavailable=pair.max_unavailable)


@laws(20)
@given(pair=fleets.related_pairs(), data=st.data())
def test_instances_that_crashed_are_started_and_the_others_left_alone(pair: Pair, data: st.DataObject) -> None:
    with scripted_host() as host:
        set_up(host, pair)
        crashed = data.draw(st.sets(st.sampled_from(sorted(host.running()))))
        for name in crashed:
            host.crash(name)
        alive = host.running()
        before = len(host.history)

        change(host, pair.before)

        assert_is_as_wanted(host, propose(host, pair.before))
        assert not [what for what in host.history[before:] if what.startswith("stop ")]
        assert alive.items() <= host.running().items()


# 5


REFUSED = [("units", "server", "environment", {"X_1": "refused"}), ("front", "nginx", "max_upload_mb", 77)]


@pytest.mark.parametrize(("what", "section", "key", "value"), REFUSED, ids=["units", "front"])
@laws(20)
@given(pair=fleets.related_pairs())
def test_refused_text_is_put_back_and_nothing_restarts(
    what: str, section: str, key: str, value: object, pair: Pair
) -> None:
    after = {**pair.after, section: {**pair.after.get(section, {}), key: value}}
    with scripted_host() as host:
        set_up(host, pair)
        host.refuses = {"X_1=refused": "Unknown key", "client_max_body_size 77m": '"client_max_body_size" is too large'}
        disk, processes, front, before = host.contents("/etc", "/proc"), host.running(), host.front, len(host.history)

        with pytest.raises(WentBack, match="refuses"):
            change(host, after, pair.max_unavailable)

        assert host.contents("/etc", "/proc") == disk
        assert host.running() == processes
        assert host.front == front
        assert not [what for what in host.history[before:] if what.startswith(("start ", "stop "))]


@pytest.mark.parametrize(("what", "section", "key", "value"), REFUSED, ids=["units", "front"])
def test_what_is_refused_at_the_first_install_leaves_nothing_behind(
    what: str, section: str, key: str, value: object
) -> None:
    with scripted_host() as host:
        host.refuses = {"X_1=refused": "Unknown key", "client_max_body_size 77m": '"client_max_body_size" is too large'}

        with pytest.raises(CommandFailed, match="refuses"):
            change(host, {"gpus": {"0": 6093}, section: {key: value}})

        assert host.contents("/etc", "/proc", "/run") == {}


# 6


def interrupted(host: ScriptedHost, proposal: Proposal, changes: int, later_s: float) -> bool:
    """Whether carrying it out was cut short after so many changes; somebody comes ``later_s`` later."""
    host.interrupt_after(changes)
    try:
        carry_out(host, proposal)
    except Killed:
        return True
    finally:
        host.revive(later_s)
    return False


@laws(60)
@given(
    pair=fleets.related_pairs(),
    cuts=st.lists(st.tuples(st.integers(0, 90), st.sampled_from([0.0, 3.0, 60.0])), min_size=1, max_size=3),
    undone=st.booleans(),
)
def test_interrupted_anywhere_the_next_one_finishes_the_job_or_undoes_it(
    pair: Pair, cuts: list[tuple[int, float]], undone: bool
) -> None:
    with scripted_host() as host:
        set_up(host, pair)
        proposal = propose(host, pair.after, pair.max_unavailable)
        watch(host, proposal, pair.max_unavailable)
        for changes, later_s in cuts:
            interrupted(host, proposal, changes, later_s)
            proposal = propose(host, pair.after, pair.max_unavailable)
        if undone and ledger.read(host).begun is not None:
            proposal = proposal_for(host, blueprint.previous(host), pair.max_unavailable)
            watch(host, proposal, pair.max_unavailable)

        carry_out(host, proposal)

        assert_is_as_wanted(host, proposal_for(host, proposal.blueprint))


ONE, TWO = {"0": 6100, "1": 6101}, {"0": 6100, "1": 6101, "2": 6102}
CUT_EVERYWHERE = {
    "the first install": Pair({}, {"gpus": TWO}),
    "two swap their ports, a third takes another model": Pair(
        {"gpus": TWO}, {"gpus": {"0": 6101, "1": 6100, "2": 6102}, "server": {"model": "turbo"}}
    ),
    "a GPU goes, one is shared, one comes": Pair({"gpus": TWO}, {"gpus": {"0": [6101, 6104], "3": 6102, "2": 6103}}),
    "a server of one's own": Pair(
        {"gpus": ONE}, {"gpus": ONE, "server": {"command": ["/programs/serve", "--port={port}"]}}
    ),
    "a GPU is shared by MPS, whose user changes": Pair({"gpus": SHARED}, {"gpus": SHARED, "unit": {"user": "_tts"}}),
    "two at a time, and the front moves": Pair(
        {"gpus": TWO}, {"gpus": TWO, "nginx": {"listen": "127.0.0.1:7000"}, "unit": {"user": "_tts"}}, (), 2
    ),
}


@pytest.mark.parametrize("later_s", [0.0, 60.0], ids=["at once", "a minute later"])
@pytest.mark.parametrize("pair", CUT_EVERYWHERE.values(), ids=CUT_EVERYWHERE.keys())
def test_interrupted_after_every_single_change_the_next_one_finishes_the_job(pair: Pair, later_s: float) -> None:
    changes = 0
    cut = True
    while cut:
        with scripted_host() as host:
            if pair.before:
                set_up(host, pair)
            proposal = propose(host, pair.after, pair.max_unavailable)
            watch(host, proposal, pair.max_unavailable)

            cut = interrupted(host, proposal, changes, later_s)
            carry_out(host, propose(host, pair.after, pair.max_unavailable))

            assert_is_as_wanted(host, propose(host, pair.after))
        changes += 1
    assert changes > 20


# What goes wrong


@laws(20)
@given(pair=fleets.related_pairs(), fault=st.sampled_from(["crash", "never ready", "silent"]))
@example(pair=Pair({"gpus": {"0": 6100}}, {"gpus": {"0": 6100, "1": 6101}}), fault="crash")
def test_a_fleet_that_does_not_come_up_gives_way_to_the_old_one_which_serves_throughout(
    pair: Pair, fault: Fault
) -> None:
    own = "command" in pair.after.get("server", {})
    server = {**pair.after.get("server", {}), "environment": {"X_1": "broken"}}
    with scripted_host() as host:
        set_up(host, pair)
        # Whether a server of the operator's own speaks, nobody asks.
        host.faults = {"X_1=broken": "crash" if own and fault == "silent" else fault}

        with pytest.raises(WentBack, match="went back to revision 1, which serves as before"):
            change(host, {**pair.after, "server": server}, pair.max_unavailable)

        assert_is_as_wanted(host, propose(host, pair.before))


# What is not ours

FOREIGN = {
    "/etc/nginx/conf.d/site.conf": "server { listen 80; }\n",
    "/etc/nginx/conf.d/chatterbox-tts-mine.conf": "# by hand\n",
    "/etc/systemd/system/site.service": "[Service]\nExecStart=/bin/true\n",
    "/etc/systemd/system/chatterbox-tts-gpu9.service": "[Service]\nExecStart=/programs/mine --port=6999\n",
    "/etc/systemd/system/chatterbox-tts-backup.timer": "[Timer]\nOnCalendar=daily\n",
    "/etc/systemd/system/site.service.d/more.conf": "[Service]\nNice=5\n",
}


@laws(20)
@given(pair=fleets.related_pairs(), purge=st.booleans())
def test_what_others_wrote_is_the_same_after_install_change_and_uninstall(pair: Pair, purge: bool) -> None:
    with scripted_host() as host:
        for path, text in FOREIGN.items():
            host.place(path, text)
        host.run(("systemctl", "start", "site.service"), timeout_s=1)
        set_up(host, pair)
        change(host, pair.after, pair.max_unavailable)
        assert host.contents("/etc").items() >= FOREIGN.items()
        host.promise(None)

        with ledger.lock(host, ADA.command):
            removal.carry_out(host, removal.propose(host, purge=purge, force=False), ADA, untold)

        assert host.contents("/etc", "/proc", "/run") == FOREIGN
        assert host.instances() == {}
        assert host.front is None
        assert removal.propose(host, purge=False, force=False).plan.steps == ()
        assert purge != bool(host.contents("/var/lib/chatterbox-deploy"))


@pytest.mark.parametrize("later_s", [0.0, 60.0], ids=["at once", "a minute later"])
def test_an_uninstall_interrupted_after_every_single_change_is_finished_by_the_next(later_s: float) -> None:
    def uninstall(host: ScriptedHost) -> None:
        with ledger.lock(host, ADA.command):
            removal.carry_out(host, removal.propose(host, purge=True, force=False), ADA, untold)

    for changes in range(40):
        with scripted_host() as host:
            change(host, {"gpus": TWO})
            host.crash("gpu2")
            host.promise(None)
            host.interrupt_after(changes)
            with suppress(Killed):
                uninstall(host)
            host.revive(later_s)

            uninstall(host)

            assert host.contents("/etc", "/proc", "/run", "/var") == {}
            assert host.instances() == {}
            assert host.front is None


# The host objects: what it is told to do by hand, and what it says


def objected(host: ScriptedHost, *steps: Step) -> str:
    with pytest.raises(AssertionError) as found:
        apply.carry_out(steps, host, untold(0))
    return str(found.value).partition(". What happened before")[0]


GPU0, GPU1 = systemd.unit_name("gpu0"), systemd.unit_name("gpu1")


@pytest.fixture
def served() -> Any:
    """A host that serves two GPUs, and the plan's own words for what it wants."""
    with scripted_host() as host:
        change(host, {"gpus": ONE})
        proposal = propose(host, {"gpus": ONE})
        watch(host, proposal)
        yield host, proposal.wanted


def front(wanted: facts.Wanted, *down: str) -> ShowFront:
    upstreams = tuple(Upstream(i.name, i.host, i.port, drained=i.name in down) for i in wanted.fleet.instances)
    return ShowFront(Change(RenderedFile(render.FRONT_PATH, wanted.front(upstreams)), None), upstreams)


def test_the_host_objects_when_the_front_lists_whom_nobody_hears(served: tuple[ScriptedHost, facts.Wanted]) -> None:
    host, wanted = served
    host.crash("gpu0")

    assert objected(host, front(wanted)) == "the front lists port 6100, where nobody listens"


def test_a_front_that_nginx_refuses_is_put_back_by_the_step_itself(served: tuple[ScriptedHost, facts.Wanted]) -> None:
    host, wanted = served
    before = host.contents("/etc")
    shown = front(wanted, "gpu0")
    put = replace(shown, change=replace(shown.change, before=before[str(render.FRONT_PATH)]))
    host.refuses = {", leaving": "it likes nobody to leave", ", drained": "it likes nobody to be drained"}

    with pytest.raises(CommandFailed, match="cannot use a front that nginx refuses; it was put back"):
        apply.carry_out([put], host, untold(1))

    assert host.contents("/etc") == before


def test_the_host_objects_when_somebody_stops_whom_the_front_lists(served: tuple[ScriptedHost, facts.Wanted]) -> None:
    host, _ = served

    assert objected(host, StopUnits((GPU0,))) == f"{GPU0} is stopped, and the front lists its port 6100"


def test_the_host_objects_when_one_is_stopped_that_still_speaks(served: tuple[ScriptedHost, facts.Wanted]) -> None:
    host, wanted = served

    said = objected(host, front(wanted, "gpu0"), StopUnits((GPU0,)))

    assert said == f"{GPU0} is stopped before it has answered what it was asked"


def test_the_host_objects_when_too_many_are_away(served: tuple[ScriptedHost, facts.Wanted]) -> None:
    host, wanted = served

    said = objected(host, front(wanted, "gpu0"), front(wanted, "gpu0", "gpu1"))

    assert said == "gpu0, gpu1 are away, more than 1 at once"


def test_the_host_objects_when_nobody_speaks(served: tuple[ScriptedHost, facts.Wanted]) -> None:
    host, wanted = served
    host.promise(wanted, max_unavailable=2, somebody=True)

    assert objected(host, front(wanted, "gpu0", "gpu1")) == "nobody is in service"


def test_the_host_objects_when_one_starts_on_a_port_that_is_held(served: tuple[ScriptedHost, facts.Wanted]) -> None:
    host, wanted = served
    host.promise(None)
    gpu2 = RenderedFile(render.UNIT_DIR / systemd.unit_name("gpu2"), wanted.unit_on("gpu0", 6101).text)

    said = objected(host, WriteFiles((Change(gpu2, None),)), StartUnits((gpu2.path.name,), 300))

    assert said == f"{gpu2.path.name} starts on port 6101, which {GPU1} holds"


def test_the_host_objects_when_something_restarts_that_nobody_judged(served: tuple[ScriptedHost, facts.Wanted]) -> None:
    host, _ = served
    proposal = propose(host, {"gpus": ONE, "server": {"model": "turbo"}})
    watch(host, proposal)

    assert objected(host, StopUnits((GPU0,))).startswith("something restarts, and systemd-analyze never verified")
    proposal = propose(host, {"gpus": ONE, "nginx": {"max_upload_mb": 30}, "server": {"model": "turbo"}})
    watch(host, proposal)
    verify = next(step for step in proposal.plan.steps if "verify" in str(step))
    assert objected(host, verify, StopUnits((GPU0,))) == (
        "something restarts, and nginx -t never passed on a front of the fleet"
    )


def test_the_host_objects_when_nginx_reloads_what_it_never_judged(served: tuple[ScriptedHost, facts.Wanted]) -> None:
    host, wanted = served
    untested = WriteFiles((front(wanted, "gpu0").change,))

    said = objected(host, untested, Run(("systemctl", "reload-or-restart", "nginx.service"), "new front"))

    assert said == "nginx is told to reload a front that nginx -t never passed"


def test_a_unit_runs_the_text_that_systemd_read_last(served: tuple[ScriptedHost, facts.Wanted]) -> None:
    host, _ = served
    old = host.running()
    turbo = propose(host, {"gpus": ONE, "server": {"model": "turbo"}}).wanted
    units = tuple(Change(file, None) for file in turbo.files if file.path.name in (GPU0, GPU1))
    host.promise(None)

    apply.carry_out([front(turbo, "gpu0"), WriteFiles(units)], host, untold(0))
    host.sleep(5)
    apply.carry_out([StopUnits((GPU0,)), StartUnits((GPU0,), 300)], host, untold(0))

    assert host.running() == old
    assert observe.state(host, ledger.read(host), wanted=turbo.files).stale


def test_a_killed_one_cannot_clean_up(served: tuple[ScriptedHost, facts.Wanted]) -> None:
    host, _ = served
    proposal = propose(host, {"gpus": ONE, "server": {"model": "turbo"}})

    assert interrupted(host, proposal, 4, 0.0)

    assert len(host.contents("/run")) == 2
    begun = ledger.read(host).begun
    assert begun is not None
    assert begun.command == "apply"
