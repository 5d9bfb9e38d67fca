"""What is wrong with a command line reads as every other error does, and all of it at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from chatterbox_deploy.cli import main

if TYPE_CHECKING:
    from pathlib import Path


def said(*argv: str) -> str:
    result = CliRunner().invoke(main, argv, prog_name="chatterbox-deploy")
    assert (result.exit_code, result.stdout) == (2, "")
    return result.stderr


@pytest.mark.parametrize(
    ("typed", "problem"),
    [
        ("--bogus", "no such option '--bogus': `chatterbox-deploy --help`"),
        (
            "stauts",
            "no such command 'stauts' (did you mean 'restart', 'start', 'status'?): `chatterbox-deploy --help`",
        ),
        ("bench show", "missing argument 'RUN': `chatterbox-deploy bench show --help`"),
        ("speak none.md", "BOOK: file 'none.md' does not exist"),
        ("apply --root none", "--root: directory 'none' does not exist"),
        ("apply --root /", "--root: this machine is no image; leave --root away to apply to it"),
        ("logs -n x", "-n / --lines: 'x' is not a valid integer range"),
        (
            "bench compar a b",
            "there is no 'compar', neither a file nor a command (did you mean 'compare'?): "
            "`chatterbox-deploy bench --help`",
        ),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_type(
    typed: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert said(*typed.split()) == f"error: {problem}\n"


def test_every_wrong_value_is_told_and_what_we_know_beyond_click() -> None:
    assert said("bench", "--url", "http://127.0.0.1:1", "--rate", "-1", "--texts", "none.txt", "--scale", "foo") == (
        "error: cannot do this:\n"
        "  --scale: 'foo' is not one of 'gpus', 'instances'\n"
        "  --rate: -1.0 is not in the range x>0\n"
        "  --texts: cannot read none.txt: no such file or directory; sets are short, mixed, book\n"
    )


def test_typing_nothing_is_no_mistake() -> None:
    assert "error" not in CliRunner().invoke(main, []).output
