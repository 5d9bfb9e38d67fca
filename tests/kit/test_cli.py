"""The command line as an operator types it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from chatterbox_deploy.cli import main
from support import golden

TWO_GPUS = (golden.FOLDER / "two-gpus/fleet.toml").read_text()
UNITS = "etc/systemd/system"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands run in an empty directory that holds fleet.toml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fleet.toml").write_text(TWO_GPUS)
    return tmp_path


def run(*argv: str) -> Result:
    return CliRunner().invoke(main, argv)


def files_below(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


def test_render_writes_units_and_front_and_says_so(here: Path) -> None:
    result = run("render")

    assert result.exit_code == 0
    assert result.stdout == ""
    assert result.stderr == (
        "wrote  rendered/etc/nginx/conf.d/chatterbox-tts.conf (new)\n"
        "wrote  rendered/etc/systemd/system/chatterbox-tts-gpu-nodes.service (new)\n"
        "wrote  rendered/etc/systemd/system/chatterbox-tts-gpu0.service (new)\n"
        "wrote  rendered/etc/systemd/system/chatterbox-tts-gpu1.service (new)\n"
        "wrote  rendered/etc/systemd/system/chatterbox-tts-nginx.service (new)\n"
        "wrote  rendered/etc/systemd/system/chatterbox-tts.target (new)\n"
        "next: read them below rendered, then install them: sudo chatterbox-deploy render --output /\n"
    )
    for path, text in golden.on_disk("two-gpus").items():
        written = (here / "rendered" / path.relative_to("/")).read_text()
        assert written.replace(str(here / "fleet.toml"), golden.SOURCE) == text


def test_rendering_again_touches_nothing(here: Path) -> None:
    run("render")
    before = {path: path.stat().st_mtime_ns for path in (here / "rendered").rglob("*")}

    result = run("render")

    assert result.stderr == "unchanged: all 6 files are as the fleet file says\n"
    assert {path: path.stat().st_mtime_ns for path in (here / "rendered").rglob("*")} == before


def test_only_what_changed_is_written(here: Path) -> None:
    run("render")
    (here / "fleet.toml").write_text(TWO_GPUS.replace("6094", "6194"))

    result = run("render")

    assert result.stderr.splitlines()[:2] == [
        "wrote  rendered/etc/nginx/conf.d/chatterbox-tts.conf",
        "wrote  rendered/etc/systemd/system/chatterbox-tts-gpu1.service",
    ]
    assert "gpu0" not in result.stderr


def test_check_changes_nothing_and_exits_1_when_files_differ(here: Path) -> None:
    assert run("render", "--check").exit_code == 1
    assert not (here / "rendered").exists()

    run("render")
    assert run("render", "--check").exit_code == 0

    (here / "rendered" / UNITS / "chatterbox-tts-gpu0.service").unlink()
    result = run("render", "--check")
    assert result.exit_code == 1
    assert result.stderr == "differs  rendered/etc/systemd/system/chatterbox-tts-gpu0.service (new)\n"


def test_diff_prints_unified_diffs_and_changes_nothing(here: Path) -> None:
    run("render")
    before = files_below(here / "rendered")
    (here / "fleet.toml").write_text(TWO_GPUS.replace("6094", "6194"))

    result = run("render", "--diff")

    assert result.exit_code == 1
    assert "-Environment=CHATTERBOX_PORT=6094\n+Environment=CHATTERBOX_PORT=6194\n" in result.stdout
    assert result.stdout.count("--- a/etc/") == result.stdout.count("+++ b/etc/") == 2
    assert files_below(here / "rendered") == before


def test_a_file_of_a_gpu_that_left_is_named_with_the_command_that_removes_it(here: Path) -> None:
    run("render")
    (here / "fleet.toml").write_text("[gpus]\n0 = 6093\n")

    result = run("render")

    unit = "rendered/etc/systemd/system/chatterbox-tts-gpu1.service"
    assert f"stale  {unit}: the fleet file asks for it no longer; rm {unit}\n" in result.stderr
    assert (here / unit).exists()
    assert run("render", "--check").exit_code == 1


def test_a_hand_written_file_is_refused_and_nothing_is_written(here: Path) -> None:
    mine = here / "rendered" / UNITS / "chatterbox-tts-gpu1.service"
    mine.parent.mkdir(parents=True)
    mine.write_text("[Service]\n")

    result = run("render")

    assert result.exit_code == 3
    assert result.stderr == (
        "error: cannot write over files that chatterbox-deploy did not write; move them away first:\n"
        "  rendered/etc/systemd/system/chatterbox-tts-gpu1.service\n"
    )
    assert files_below(here / "rendered") == {f"{UNITS}/chatterbox-tts-gpu1.service": "[Service]\n"}
    assert run("render", "--check").exit_code == 1


def test_json_lists_each_file_and_what_became_of_it(here: Path) -> None:
    run("render")
    (here / "fleet.toml").write_text("[gpus]\n0 = 6093\n2 = 6096\n")

    rows = json.loads(run("render", "--json").stdout)

    assert {Path(row["path"]).name: row["action"] for row in rows} == {
        "chatterbox-tts.conf": "changed",
        "chatterbox-tts-gpu-nodes.service": "unchanged",
        "chatterbox-tts-gpu0.service": "unchanged",
        "chatterbox-tts-gpu1.service": "stale",
        "chatterbox-tts-gpu2.service": "created",
        "chatterbox-tts-nginx.service": "unchanged",
        "chatterbox-tts.target": "changed",
    }


def test_a_wrong_file_exits_2_with_every_problem_and_writes_nothing(here: Path) -> None:
    (here / "fleet.toml").write_text("[gpus]\n0 = 80\n1 = 6095\n")

    result = run("render")

    assert result.exit_code == 2
    assert result.stderr == (
        "error: fleet.toml has 2 problems\n"
        "  gpus.0: input should be greater than or equal to 1024, got 80\n"
        "  gpus.1: port 6095 is already used by nginx.listen, '127.0.0.1:6095'\n"
    )
    assert not (here / "rendered").exists()


@pytest.mark.parametrize("command", ["render", "up"])
def test_a_missing_file_is_explained(here: Path, command: str) -> None:
    result = run(command, "nowhere.toml")

    assert result.exit_code == 2
    assert result.stderr.startswith("error: nowhere.toml has a problem\n  no such file;")


def test_a_broken_template_exits_2(here: Path) -> None:
    (here / "mine/units").mkdir(parents=True)
    (here / "mine/units/chatterbox-tts.target.j2").write_text("{{ nothing }}")

    result = run("render", "--templates", "mine")

    assert result.exit_code == 2
    assert "'nothing' is undefined" in result.stderr


def test_schema_prints_json() -> None:
    assert json.loads(run("schema").stdout)["properties"]["gpus"]


def test_every_command_teaches_by_an_example_that_can_be_pasted() -> None:
    for name in main.commands:
        text = run(name, "--help").stdout
        assert f"    chatterbox-deploy {name}" in text or f"    sudo chatterbox-deploy {name}" in text, name
        assert not re.search(r"\bTODO\b", text)


# monitor

NOBODY = "[gpus]\n0 = 16193\n1 = 16194\n[nginx]\nlisten = '127.0.0.1:16195'\n"


def test_monitor_once_exits_1_where_nobody_is_there_and_shows_it_all_the_same(here: Path) -> None:
    (here / "fleet.toml").write_text(NOBODY)
    looked = ("monitor", "--once", "--interval", "0.2", "--csv", "looks.csv", "--prometheus", "fleet.prom")

    result = run(*looked, "--json")
    again = run(*looked)

    assert (result.exit_code, again.exit_code) == (1, 1)
    told = json.loads(result.stdout)
    assert {event["text"] for event in told["now"]} >= {"does not answer", "does not answer on 127.0.0.1:16195"}
    assert told["instances"][0]["waiting"] is None
    assert re.search(
        r"^critical for \S+: gpu1 does not answer: chatterbox-deploy logs gpu1$", again.stdout, re.MULTILINE
    )
    assert "chatterbox_monitor_front_up 0.0\n" in (here / "fleet.prom").read_text()
    lines = (here / "looks.csv").read_text().splitlines()
    assert lines[0] == "time,about,name,quantity,value"
    assert sum(line.endswith(",instance,gpu0,ready,no answer") for line in lines) == 2
    assert [line for line in lines if line.endswith(",instance,gpu0,rtf,")]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--limit", "heat=3"), "there is no limit 'heat'; there are temperature_c, "),
        (("--limit", "rtf=fast"), "rtf should be a number, got 'fast'; write it like temperature_c=80"),
        (("--prometheus", "fleet.txt"), "node_exporter reads files whose name ends in .prom only, got 'fleet.txt'"),
        (("--interval", "0"), "0 is not in the range"),
    ],
)
def test_monitor_says_what_it_does_not_take(option: tuple[str, str], said: str) -> None:
    result = run("monitor", "--once", *option)

    assert result.exit_code == 2
    assert said in result.stderr


def test_whoever_has_read_enough_gets_no_complaint() -> None:
    reading, writing = os.pipe()
    os.close(reading)

    done = subprocess.run(
        [sys.executable, "-m", "chatterbox_deploy", "schema"], stdout=writing, stderr=subprocess.PIPE, check=False
    )

    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")
