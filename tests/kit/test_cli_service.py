"""status, logs, start, stop and restart as an operator types them, where no fleet is installed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

from chatterbox_deploy.cli import main

if TYPE_CHECKING:
    from pathlib import Path

# On GPUs that no machine of a developer has: nothing here may start or stop a real fleet.
FLEET_TOML = """
[gpus]
97 = 64997
98 = [64998, 64999]
[nginx]
listen = "127.0.0.1:64990"
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands run in an empty directory that holds fleet.toml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fleet.toml").write_text(FLEET_TOML)
    return tmp_path


def run(*argv: str) -> Result:
    return CliRunner().invoke(main, argv)


def test_status_of_a_fleet_that_is_not_installed_says_so_and_exits_1() -> None:
    result = run("status")

    assert result.exit_code == 1
    assert "not installed: chatterbox-deploy apply" in result.stdout
    assert "0 of 3 instances serve behind 127.0.0.1:64990" in result.stdout
    assert "the front does not answer" in result.stdout
    assert result.stderr == ""


def test_a_pipe_gets_whole_lines_and_watch_gets_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    whole = run("status").stdout
    monkeypatch.setenv("COLUMNS", "60")
    narrow = run("status").stdout

    assert "GPU memory" in whole
    assert "gpu97: not installed: chatterbox-deploy apply\n" in narrow
    assert "GPU memory" not in narrow


def test_status_as_json_is_one_object_with_a_row_for_each_instance() -> None:
    result = run("status", "--json")

    told = json.loads(result.stdout)
    assert result.exit_code == 1
    assert [row["instance"] for row in told["instances"][:3]] == ["gpu97", "gpu98-a", "gpu98-b"]
    assert {row["memory_bytes"] for row in told["instances"][:3]} == {None}
    assert told["front_answers"] is False


@pytest.mark.parametrize("command", ["logs", "start", "stop", "restart"])
def test_an_instance_that_the_fleet_has_not_got_is_answered_with_those_it_has(command: str) -> None:
    result = run(command, "7")

    assert result.exit_code == 2
    assert "error: cannot find instance '7'; the fleet has gpu97, gpu98-a, gpu98-b\n" in result.stderr


@pytest.mark.parametrize("command", ["start", "stop", "restart"])
@pytest.mark.parametrize(
    ("who", "named"),
    [([], "gpu97, gpu98-a, gpu98-b"), (["98"], "gpu98-a, gpu98-b"), (["gpu98-b", "97"], "gpu97, gpu98-b")],
)
def test_what_is_not_installed_is_neither_started_nor_stopped(command: str, who: list[str], named: str) -> None:
    result = run(command, *who)

    assert result.exit_code == 3
    assert f"error: cannot {command} {named}: not installed; chatterbox-deploy apply\n" in result.stderr


def test_the_fleet_file_may_lie_elsewhere(here: Path) -> None:
    (here / "fleet.toml").rename(here / "other.toml")

    assert run("stop").exit_code == 2
    assert "gpu97, gpu98-a, gpu98-b" in run("stop", "7", "--fleet", "other.toml").stderr
