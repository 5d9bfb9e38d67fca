"""What is remembered from one change of a host to the next, whatever cut the first one short."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_deploy import render, systemd
from chatterbox_deploy.change import blueprint, deploy, draining, image, ledger, recycling, removal
from chatterbox_deploy.change.deploy import Author, WentBack
from chatterbox_deploy.errors import CommandFailed
from chatterbox_deploy.host import LocalHost
from chatterbox_deploy.render import RenderedFile
from support import fleets
from support.scripted import Killed, ScriptedHost, scripted_host

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from chatterbox_deploy.change.deploy import Proposal
    from chatterbox_deploy.change.steps import Step

ADA = Author("ada", "chatterbox-deploy apply")
TWO = {"gpus": {"0": 6100, "1": 6101}}
THREE = {"gpus": {"0": 6100, "1": 6101, "2": 6102}}
OTHER = {**TWO, "server": {"max_wait_s": 77}}
THIRD = {**TWO, "server": {"max_wait_s": 78}}
UNIT0 = PurePosixPath("/etc/systemd/system/chatterbox-tts-gpu0.service")
LINK = "/opt/chatterbox-tts/venv"


def untold(total: int, title: str | None = None) -> Callable[[int, Step], None]:
    return lambda number, step: None


@pytest.fixture
def host() -> Iterator[ScriptedHost]:
    with scripted_host() as scripted:
        yield scripted


def propose(host: ScriptedHost, table: dict[str, Any]) -> Proposal:
    asked = blueprint.of_file(host, source="/etc/fleet.toml", fleet_toml=fleets.to_toml(table), templates={})
    for instance in blueprint.want(asked).fleet.instances:
        host.place(instance.command[0])
    return deploy.propose(host, asked)


def carry_out(host: ScriptedHost, proposal: Proposal, author: Author = ADA) -> int:
    assert not proposal.plan.problems
    with ledger.lock(host, author.command):
        return deploy.carry_out(host, proposal, author, untold)


def change(host: ScriptedHost, table: dict[str, Any]) -> int:
    return carry_out(host, propose(host, table))


def roll_back(host: ScriptedHost) -> int:
    return carry_out(host, deploy.propose(host, blueprint.previous(host)), Author("ada", "chatterbox-deploy rollback"))


def drain(host: ScriptedHost, names: Collection[str], *, drained: bool = True, force: bool = False) -> None:
    with ledger.lock(host, "drain"):
        draining.drain(host, names, Author("ada", "chatterbox-deploy drain 0"), untold, drained=drained, force=force)


def uninstall(host: ScriptedHost, *, purge: bool = False, force: bool = False) -> list[str]:
    """What was kept."""
    proposed = removal.propose(host, purge=purge, force=force)
    with ledger.lock(host, "uninstall"):
        removal.carry_out(host, proposed, Author("ada", "chatterbox-deploy uninstall"), untold)
    return [str(kept.file.path) for kept in proposed.kept]


def cut_short(host: ScriptedHost, changes: int, act: Callable[[], object]) -> bool:
    host.interrupt_after(changes)
    try:
        act()
    except Killed:
        return True
    finally:
        host.revive()
    return False


def edit(host: ScriptedHost, path: PurePosixPath) -> None:
    host.place(str(path), host.at(path).read_text() + "# mine\n")


# Drains


@pytest.mark.parametrize("changes", range(9))
def test_a_drain_cut_short_anywhere_is_finished_by_the_next(host: ScriptedHost, changes: int) -> None:
    change(host, TWO)
    cut_short(host, changes, lambda: drain(host, ["gpu0"]))

    drain(host, ["gpu0"])

    assert host.in_service() == {"gpu1"}
    assert propose(host, TWO).plan.steps == ()
    assert removal.propose(host, purge=False, force=False).kept == ()


@pytest.mark.parametrize("changes", range(9))
def test_a_drain_cut_short_anywhere_is_undone_by_apply(host: ScriptedHost, changes: int) -> None:
    change(host, TWO)
    cut_short(host, changes, lambda: drain(host, ["gpu0"]))
    remembered = ledger.read(host).drained

    change(host, TWO)

    assert host.in_service() == {"gpu0", "gpu1"} - set(remembered)


def test_a_drain_that_nginx_refuses_changes_nothing(host: ScriptedHost) -> None:
    change(host, TWO)
    host.refuses = {"gpu0, drained": "no", " down; # gpu0": "no"}

    with pytest.raises(CommandFailed, match="nginx refuses"):
        drain(host, ["gpu0"])

    host.refuses = {}
    assert ledger.read(host).drained == []
    assert propose(host, TWO).plan.steps == ()
    assert "failed: cannot use a front" in host.at(ledger.LOG).read_text()


def test_a_drain_does_not_begin_where_an_apply_did_not_end(host: ScriptedHost) -> None:
    change(host, TWO)
    assert cut_short(host, 20, lambda: change(host, OTHER))

    with pytest.raises(CommandFailed, match="`chatterbox-deploy apply` finishes it, `chatterbox-deploy rollback` undo"):
        drain(host, ["gpu0"])


def test_the_last_that_speaks_is_drained_only_by_force(host: ScriptedHost) -> None:
    change(host, TWO)
    drain(host, ["gpu0"])

    with pytest.raises(CommandFailed, match="cannot drain gpu1: nobody else is in service"):
        drain(host, ["gpu1"])

    assert host.in_service() == {"gpu1"}
    drain(host, ["gpu1"], force=True)
    assert host.in_service() == set()


def test_a_drain_does_not_write_over_what_somebody_wrote_into_the_front(host: ScriptedHost) -> None:
    change(host, TWO)
    edit(host, render.FRONT_PATH)

    with pytest.raises(CommandFailed, match=r"cannot change .*chatterbox-tts.conf, edited by hand"):
        drain(host, ["gpu0"])

    assert host.at(render.FRONT_PATH).read_text().endswith("# mine\n")


def test_a_drain_outlives_a_rollback_to_a_fleet_without_that_gpu(host: ScriptedHost) -> None:
    change(host, TWO)
    change(host, THREE)
    drain(host, ["gpu2"])

    roll_back(host)
    change(host, THREE)

    assert host.in_service() == {"gpu0", "gpu1"}


# What nginx has to say


def test_a_front_that_nginx_does_not_take_does_not_lie_there_at_its_next_start(host: ScriptedHost) -> None:
    host.nginx_fails = {"reload": "bind() to 127.0.0.1:6095 failed (98: Address already in use)"}
    with pytest.raises(CommandFailed, match="Address already in use"):
        change(host, TWO)
    assert not host.at(render.FRONT_PATH).exists()

    host.nginx_fails = {}
    change(host, TWO)
    before = host.at(render.FRONT_PATH).read_text()
    host.nginx_fails = {"reload": "Job for nginx.service failed"}
    with pytest.raises(CommandFailed, match=r"(?s)and cannot go back to revision 1.*finishes it"):
        change(host, {**OTHER, "nginx": {"listen": "127.0.0.1:7000"}})
    assert host.at(render.FRONT_PATH).read_text() == before


def test_where_nginx_refuses_the_files_of_others_nothing_is_begun(host: ScriptedHost) -> None:
    change(host, TWO)
    history = list(host.history)
    host.nginx_fails = {"test": 'nginx: [emerg] unknown directive "nonsense" in /etc/nginx/conf.d/zz.conf:1'}

    with pytest.raises(CommandFailed, match=r"(?s)cannot begin: nginx refuses its files, and not for ours.*zz.conf:1"):
        change(host, OTHER)

    assert host.history == history
    assert ledger.read(host).begun is None


def test_a_program_on_the_fronts_port_is_named_before_anything_begins(host: ScriptedHost) -> None:
    host.strangers = {6095}

    assert propose(host, TWO).plan.problems == (
        "nginx.listen: python3 already listens on port 6095; `ss -tlnp sport = :6095` shows it",
    )


def test_without_nginx_nothing_begins(host: ScriptedHost) -> None:
    host.at(PurePosixPath("/usr/sbin/nginx")).unlink()

    assert propose(host, TWO).plan.problems == ("nginx: missing; apt-get install nginx",)


# Going back


def test_rollback_goes_to_what_served_before_and_not_to_what_was_gone_back_from(host: ScriptedHost) -> None:
    assert change(host, TWO) == 1
    assert change(host, OTHER) == 2
    assert roll_back(host) == 1
    assert change(host, THIRD) == 3

    assert roll_back(host) == 1

    with pytest.raises(CommandFailed, match="no revision was applied before this one"):
        blueprint.previous(host)


@pytest.mark.parametrize("changes", [5, 10, 20])
def test_a_rollback_cut_short_goes_on_to_where_it_went(host: ScriptedHost, changes: int) -> None:
    change(host, TWO)
    change(host, OTHER)
    assert cut_short(host, changes, lambda: roll_back(host))
    told = "`chatterbox-deploy rollback` finishes it, `chatterbox-deploy rollback 2` undoes it"
    assert deploy.advice(host) == told

    assert roll_back(host) == 1

    assert propose(host, TWO).plan.steps == ()
    assert deploy.advice(host) is None


def test_a_first_install_cut_short_has_nothing_to_go_back_to(host: ScriptedHost) -> None:
    assert cut_short(host, 10, lambda: change(host, TWO))

    assert deploy.advice(host) == "`chatterbox-deploy apply` finishes it, `chatterbox-deploy uninstall` undoes it"
    with pytest.raises(CommandFailed, match="cannot go back"):
        blueprint.previous(host)


def test_a_revision_kept_by_one_who_died_then_is_the_next_ones(host: ScriptedHost) -> None:
    change(host, TWO)
    proposal = propose(host, OTHER)
    # Just before it is remembered as the one that serves.
    done = len(host.history)
    change(host, OTHER)
    last = len(host.history) - done
    with scripted_host() as again:
        change(again, TWO)
        assert cut_short(again, last - 3, lambda: carry_out(again, proposal))
        assert [kept.number for kept in ledger.revisions(again)] == [1, 2]

        assert change(again, OTHER) == 2


def test_where_no_version_was_recorded_the_link_goes_back_to_where_it_led(host: ScriptedHost) -> None:
    change(host, TWO)
    versions = host.at(PurePosixPath("/opt/chatterbox-tts/versions"))
    for name in ("first", "new"):
        host.place(f"/opt/chatterbox-tts/versions/{name}/bin/python")
    (host.root / LINK[1:] / "bin/python").unlink()
    (host.root / LINK[1:] / "bin").rmdir()
    (host.root / LINK[1:]).rmdir()
    (host.root / LINK[1:]).symlink_to("versions/first")
    asked = blueprint.Blueprint(
        "/etc/fleet.toml", fleets.to_toml(TWO), version=f"{Path('/') / versions.relative_to(host.root)}/new"
    )
    host.faults = {"versions/new": "crash"}

    with pytest.raises(WentBack):
        carry_out(host, deploy.propose(host, asked))

    assert str(host.read_link(PurePosixPath(LINK))) == "/opt/chatterbox-tts/versions/first"


def test_a_revision_that_no_longer_loads_is_told_with_what_failed_before(host: ScriptedHost) -> None:
    change(host, TWO)
    kept = ledger.REVISIONS / "000001.json"
    content = json.loads(host.at(kept).read_text())
    host.place(str(kept), json.dumps({**content, "fleet_toml": content["fleet_toml"] + "\n[server]\nold_key = 1\n"}))
    host.faults = {"MAX_WAIT_S=77": "crash"}

    with pytest.raises(
        CommandFailed, match=r"(?s)chatterbox-tts-gpu.*and cannot go back to revision 1: .*old_key"
    ) as told:
        change(host, OTHER)

    assert told.value.exit_code == 3
    assert "cannot go back to revision 1" in host.at(ledger.LOG).read_text().splitlines()[-1]


def test_whoever_was_out_of_order_before_does_not_keep_the_others_from_going_back(host: ScriptedHost) -> None:
    change(host, TWO)
    host.crash("gpu0")
    host.faults = {"CUDA_VISIBLE_DEVICES=0": "crash", "MAX_WAIT_S=77": "crash"}
    proposal = propose(host, {"gpus": {"1": 6101}, "server": {"max_wait_s": 77}})

    with pytest.raises(CommandFailed, match="cannot go back to revision 1: "):
        carry_out(host, proposal)

    assert host.in_service() == {"gpu1"}


def test_what_a_newer_version_of_ours_wrote_is_read_for_what_is_known(host: ScriptedHost) -> None:
    change(host, TWO)
    for path in (ledger.REVISIONS / "000001.json", ledger.MANIFEST):
        host.place(str(path), json.dumps({**json.loads(host.at(path).read_text()), "news": 1}))

    assert [kept.number for kept in ledger.revisions(host)] == [1]
    assert ledger.read(host).current == 1


def test_a_damaged_revision_hides_no_other(host: ScriptedHost) -> None:
    change(host, TWO)
    change(host, OTHER)
    damaged = ledger.REVISIONS / "000001.json"
    host.place(str(damaged), "{")

    assert [kept.number for kept in ledger.revisions(host)] == [2]
    assert ledger.unreadable_revisions(host) == [damaged]


def test_without_its_revision_a_host_can_still_be_changed(host: ScriptedHost) -> None:
    change(host, TWO)
    host.remove(ledger.REVISIONS)

    assert change(host, OTHER) == 1
    assert uninstall(host, purge=True) == []
    assert host.contents("/etc", "/var/lib") == {}


# Files edited by hand


def test_an_edited_file_is_kept_by_every_uninstallation_but_a_forced_one(host: ScriptedHost) -> None:
    change(host, TWO)
    edit(host, UNIT0)

    assert uninstall(host) == [str(UNIT0)]
    assert uninstall(host) == [str(UNIT0)]
    assert host.at(UNIT0).exists()
    assert uninstall(host, force=True) == []
    assert not host.at(UNIT0).exists()


@pytest.mark.parametrize("path", [UNIT0, render.UNIT_DIR / systemd.FRONT_UNIT], ids=str)
def test_an_edited_file_is_kept_by_an_uninstallation_cut_short_anywhere(
    host: ScriptedHost, path: PurePosixPath
) -> None:
    for changes in range(1, 12, 2):
        change(host, TWO)
        edit(host, path)
        cut_short(host, changes, lambda: uninstall(host))

        assert uninstall(host) == [str(path)]

        host.remove(path)
        uninstall(host, force=True)


def test_a_file_of_ours_that_lost_its_first_line_is_kept_and_removed_as_any_that_was_edited(host: ScriptedHost) -> None:
    change(host, TWO)
    host.place(str(render.FRONT_PATH), "# mine\n")

    assert [change.file.path for change in removal.propose(host, purge=False, force=False).kept] == [render.FRONT_PATH]
    assert uninstall(host, force=True) == []
    assert not host.at(render.FRONT_PATH).exists()


def test_whoever_has_a_unit_that_is_kept_is_stopped_by_name(host: ScriptedHost) -> None:
    change(host, TWO)
    edit(host, UNIT0)

    assert [name for name, _ in removal.propose(host, purge=False, force=False).plan.reasons] == ["gpu0", "gpu1"]
    uninstall(host)
    assert host.instances() == {}


def test_a_file_edited_before_an_apply_that_was_cut_short_is_still_an_edited_one(host: ScriptedHost) -> None:
    change(host, TWO)
    edit(host, UNIT0)
    assert cut_short(host, 5, lambda: change(host, OTHER))

    assert f"{UNIT0} was edited by hand: that edit goes" in propose(host, OTHER).plan.notes
    assert [kept.file.path for kept in removal.propose(host, purge=False, force=False).kept] == [UNIT0]


def test_what_an_apply_cut_short_wrote_itself_is_not_edited(host: ScriptedHost) -> None:
    for changes in range(10, 60, 5):
        change(host, TWO)
        cut_short(host, changes, lambda: change(host, OTHER))
        cut_short(host, changes // 2, lambda: change(host, THIRD))

        assert removal.propose(host, purge=False, force=False).kept == ()


# Files for those who watch

WATCHED = {**TWO, "monitoring": {"rules_file": "/etc/prometheus/r.yml", "dashboard_file": "/srv/d.json"}}
MOVED = {**TWO, "monitoring": {"rules_file": "/etc/prometheus/rules/r.yml"}}


def watching(host: ScriptedHost) -> set[str]:
    return set(host.contents("/etc/prometheus", "/srv"))


def test_files_for_those_who_watch_come_move_and_go_and_nobody_restarts_for_them(host: ScriptedHost) -> None:
    change(host, TWO)
    before = len(host.history)

    change(host, WATCHED)
    assert watching(host) == {"/etc/prometheus/r.yml", "/srv/d.json"}
    change(host, MOVED)
    assert watching(host) == {"/etc/prometheus/rules/r.yml"}
    change(host, TWO)

    assert watching(host) == set()
    assert not [done for done in host.history[before:] if done.startswith(("start ", "stop "))]
    assert propose(host, TWO).plan.steps == ()


def test_somebody_looks_by_the_unit_as_it_is_while_a_textfile_is_asked_for(host: ScriptedHost) -> None:
    looks = f"start {systemd.MONITOR_UNIT}"
    one = {**TWO, "monitoring": {"textfile": "/var/lib/node/a.prom"}}
    change(host, one)
    assert host.history.count(looks) == 1
    change(host, {**one, "server": {"max_wait_s": 77}})
    assert host.history.count(looks) == 1

    change(host, {**one, "monitoring": {"textfile": "/var/lib/node/b.prom"}, "server": {"max_wait_s": 77}})
    assert [done for done in host.history if systemd.MONITOR_UNIT in done and done.startswith(("start", "stop"))] == [
        looks,
        f"stop {systemd.MONITOR_UNIT}",
        looks,
    ]
    change(host, TWO)
    assert systemd.MONITOR_UNIT not in host.active_units()


def test_files_for_those_who_watch_that_others_wrote_are_never_written_over(host: ScriptedHost) -> None:
    host.place("/srv/d.json", '{\n  "description": "mine"\n}\n')

    proposal = propose(host, WATCHED)

    assert [said for said in proposal.plan.problems if "/srv/d.json: chatterbox-deploy did not write it" in said]


@pytest.mark.parametrize("changes", range(12))
def test_files_for_those_who_watch_are_uninstalled_also_after_an_apply_cut_short(
    host: ScriptedHost, changes: int
) -> None:
    cut_short(host, changes, lambda: change(host, WATCHED))

    uninstall(host)

    assert watching(host) == set()


def test_half_written_files_go_and_an_editors_own_stay(host: ScriptedHost) -> None:
    change(host, TWO)
    host.place("/etc/nginx/conf.d/.chatterbox-tts.conf.swp", "b0VIM")
    host.place("/etc/systemd/system/.chatterbox-tts-gpu0.service.abc_1234", "half")

    change(host, TWO)

    assert host.at(PurePosixPath("/etc/nginx/conf.d/.chatterbox-tts.conf.swp")).exists()
    assert not host.at(PurePosixPath("/etc/systemd/system/.chatterbox-tts-gpu0.service.abc_1234")).exists()


# Keys

KEYS = "/etc/keys"
OLD_KEYS, NEW_KEYS = "a old-old-old-old-old-1\n", "a new-new-new-new-new-1\n"


def with_keys(table: dict[str, Any]) -> dict[str, Any]:
    return {**table, "server": {**table.get("server", {}), "api_keys_file": KEYS}}


def test_keys_that_changed_before_an_apply_that_went_back_are_given_to_all_by_the_next(host: ScriptedHost) -> None:
    host.place(KEYS, OLD_KEYS)
    change(host, with_keys(TWO))
    host.place(KEYS, NEW_KEYS)
    host.faults = {"MAX_WAIT_S=77": "crash"}
    with pytest.raises(WentBack):
        change(host, with_keys(OTHER))
    host.faults = {}

    assert {why for _, why in propose(host, with_keys(TWO)).plan.reasons} == {f"the keys in {KEYS} changed"}


def test_keys_that_change_while_an_apply_runs_are_given_to_all_by_the_next(host: ScriptedHost) -> None:
    host.place(KEYS, OLD_KEYS)
    change(host, with_keys(TWO))
    proposal = propose(host, with_keys(OTHER))
    host.place(KEYS, NEW_KEYS)
    carry_out(host, proposal)

    assert [name for name, _ in propose(host, with_keys(OTHER)).plan.reasons] == ["gpu0", "gpu1"]


# Recycling

AGED = {**TWO, "unit": {"recycle_after_h": 1}}


def recycle(host: ScriptedHost) -> Proposal:
    asked = blueprint.current(host)
    due = recycling.due(host, blueprint.want(asked).fleet)
    return deploy.propose(host, asked, restart=due, only=due)


def test_recycling_touches_nobody_but_those_who_are_due(host: ScriptedHost) -> None:
    change(host, AGED)
    host.sleep(7200)
    host.crash("gpu0")
    host.faults = {"CUDA_VISIBLE_DEVICES=0": "crash"}
    proposal = recycle(host)

    assert [name for name, _ in proposal.plan.reasons] == ["gpu1"]
    carry_out(host, proposal)

    assert host.in_service() == {"gpu1"}
    assert host.instances() == {"gpu0": "failed", "gpu1": "active"}
    assert host.front == propose(host, AGED).wanted.files[0].text


def test_turned_on_for_a_fleet_that_serves_the_timer_runs_at_once(host: ScriptedHost) -> None:
    change(host, TWO)
    change(host, AGED)

    assert systemd.RECYCLE_TIMER in host.active_units()
    assert propose(host, AGED).plan.steps == ()


# Purging, images, the lock


def test_purged_nothing_of_ours_is_left_however_often_it_is_typed(host: ScriptedHost) -> None:
    host.place("/opt/chatterbox-tts/versions/first/bin/python")
    (host.root / LINK[1:]).symlink_to("versions/first")
    host.place("/usr/local/bin/other")
    (host.root / "usr/local/bin/chatterbox-deploy").symlink_to(f"{LINK}/bin/chatterbox-deploy")
    change(host, TWO)
    assert cut_short(host, 5, lambda: change(host, OTHER))
    host.place("/opt/chatterbox-tts/.venv.123")

    for _ in range(2):
        uninstall(host, purge=True)
        host.place("/opt/chatterbox-tts/mine")
        assert not removal.propose(host, purge=True, force=False).plan
        host.remove(PurePosixPath("/opt/chatterbox-tts"))
        assert host.contents("/etc", "/opt", "/proc", "/run", "/usr/local", "/var") == {"/usr/local/bin/other": ""}


def test_an_environment_that_somebody_made_in_the_links_place_stays(host: ScriptedHost) -> None:
    change(host, TWO)

    uninstall(host, purge=True)

    assert host.contents("/opt") == {f"{LINK}/bin/python": ""}


def test_an_image_keeps_to_its_root_where_its_links_are_absolute(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    root = tmp_path / "image"
    (root / "etc/nginx").mkdir(parents=True)
    (root / "etc/nginx/conf.d").symlink_to("/srv/conf")
    (root / "srv").symlink_to("../../../elsewhere")
    host = LocalHost(root)

    host.write_files([RenderedFile(render.FRONT_PATH, "ours")])

    assert (root / "elsewhere/conf/chatterbox-tts.conf").read_text() == "ours"
    assert host.read_bytes(render.FRONT_PATH) == b"ours"
    assert host.glob(render.FRONT_PATH.parent, "*.conf") == [render.FRONT_PATH]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_an_image_is_planned_as_a_machine_is(tmp_path: Path) -> None:
    host = LocalHost(tmp_path)
    asked = blueprint.Blueprint("/etc/fleet.toml", fleets.to_toml(TWO))

    made = image.propose(host, tmp_path, asked).plan

    assert len(made.changed_files()) == 6
    assert str(made.steps[-1]).startswith(f"systemctl --root={tmp_path} enable chatterbox-tts.target")


def test_the_lock_is_had_by_one_at_a_time_also_while_it_is_taken_away(tmp_path: Path) -> None:
    host, another = LocalHost(tmp_path), LocalHost(tmp_path)
    with ledger.lock(host, "chatterbox-deploy apply"):
        told = r"`chatterbox-deploy apply` \(process [0-9]+\) is changing this fleet"
        with pytest.raises(CommandFailed, match=told), ledger.lock(another, "chatterbox-deploy drain 0"):
            pass
        assert host.at(ledger.LOCK).exists()
    assert not host.at(ledger.LOCK).exists()
    with ledger.lock(another, "chatterbox-deploy drain 0"):
        pass
