"""Single keys of a fleet file change; every other line stays as the operator wrote it."""

from __future__ import annotations

import difflib
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatterbox_deploy.report import amend

FILE = """\
# Our two cards.
[gpus]                  # GPU → port
0 = 6093                # the one by the window
"GPU-8f3c2a1b-5d6e-4f70-8a9b-0c1d2e3f4a5b" = [6097, 6098]

# Who comes in.
[nginx]
listen = "127.0.0.1:6095"   # "#" is no comment here

[unit]
mps = false
"""


@pytest.mark.parametrize(
    ("key", "value", "lines"),
    [
        (("gpus", "0"), "[6093, 6094]", ["-0 = 6093                # the one by the window",
                                         "+0 = [6093, 6094]                # the one by the window"]),
        # After the last key of its table, before what belongs to the next.
        (("gpus", "1"), "6094", ["+1 = 6094"]),
        (("gpus", "GPU-8f3c2a1b-5d6e-4f70-8a9b-0c1d2e3f4a5b"), "6097",
         ['-"GPU-8f3c2a1b-5d6e-4f70-8a9b-0c1d2e3f4a5b" = [6097, 6098]',
          '+"GPU-8f3c2a1b-5d6e-4f70-8a9b-0c1d2e3f4a5b" = 6097']),
        (("gpus", "2,3"), "6099", ['+"2,3" = 6099']),
        (("unit", "mps"), "true", ["-mps = false", "+mps = true"]),
        (("unit", "watchdog_s"), "9", ["+watchdog_s = 9"]),
        (("nginx", "listen"), '"0.0.0.0:80"', ['-listen = "127.0.0.1:6095"   # "#" is no comment here',
                                               '+listen = "0.0.0.0:80"   # "#" is no comment here']),
        (("server", "tf32"), "true", ["+", "+[server]", "+tf32 = true"]),
    ],
)  # fmt: skip
def test_one_key_changes_and_nothing_else(key: tuple[str, str], value: str, lines: list[str]) -> None:
    after = amend.amend(FILE, {key: value})

    assert after is not None
    before, now = FILE.splitlines(), after.splitlines()
    changed = [line for line in difflib.ndiff(before, now) if line[0] in "+-"]
    assert [line[0] + line[2:] for line in changed] == lines
    assert tomllib.loads(after)[key[0]][key[1]] == tomllib.loads(f"x = {value}")["x"]


def test_several_keys_at_once_land_in_their_tables() -> None:
    after = amend.amend(FILE, {("gpus", "1"): "6094", ("gpus", "2"): "6096", ("unit", "mps"): "true"})

    assert after is not None
    assert after.splitlines()[3:7] == [FILE.splitlines()[3], "1 = 6094", "2 = 6096", ""]


@pytest.mark.parametrize(
    "text",
    ["gpus = { 0 = 6093 }\n", "[gpus]\n0 = [\n  6093,\n  6094,\n]\n", "gpus.0 = 6093\n"],
    ids=["an inline table", "a value over several lines", "a dotted key"],
)
def test_a_text_that_cannot_be_followed_is_left_alone(text: str) -> None:
    assert amend.amend(text, {("gpus", "0"): "[6093, 6097]"}) is None


def test_what_only_looks_like_a_table_is_none() -> None:
    text = '[server]\nmodel = "turbo"\ncommand = ["""\n[gpus]\n0 = 1\n"""]\n\n[gpus]\n0 = 6093\n'

    after = amend.amend(text, {("gpus", "1"): "6094"})

    assert after is None or tomllib.loads(after) == tomllib.loads(text) | {"gpus": {"0": 6093, "1": 6094}}


@given(
    before=st.dictionaries(st.integers(0, 9).map(str), st.integers(1024, 65535), min_size=1),
    after=st.dictionaries(st.integers(0, 9).map(str), st.integers(1024, 65535)),
)
def test_the_new_text_means_the_old_one_with_the_changes(before: dict[str, int], after: dict[str, int]) -> None:
    text = "[gpus]\n" + "".join(f"{key} = {port}\n" for key, port in before.items())

    changed = amend.amend(text, {("gpus", key): str(port) for key, port in after.items()})

    assert changed is not None
    assert tomllib.loads(changed) == {"gpus": before | after}
