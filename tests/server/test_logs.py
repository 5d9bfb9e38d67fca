"""Records in, lines out."""

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatterbox_server import logs


def written(message: str, *args: object, level: int = logging.INFO, journal: bool = False, **more: object) -> str:
    """What one record becomes."""
    made = logging.makeLogRecord({"msg": message, "args": args, "levelno": level} | more)
    made.levelname = logging.getLevelName(level)
    return logs.Lines(journal=journal).format(made)


def test_a_record_is_a_line_that_begins_with_its_level() -> None:
    assert written("%s speaks", "chatterbox") == "INFO chatterbox speaks"


@pytest.mark.parametrize(
    ("level", "prefix"),
    [
        (logging.DEBUG, "<7>"),
        (logging.INFO, "<6>"),
        (25, "<6>"),
        (logging.WARNING, "<4>"),
        (logging.ERROR, "<3>"),
        (logging.CRITICAL, "<2>"),
    ],
)
def test_the_journal_is_told_the_priority(level: int, prefix: str) -> None:
    assert written("hello", level=level, journal=True) == f"{prefix}hello"


@pytest.mark.parametrize(
    ("sent", "line"),
    [
        ("one\n<0>two", "INFO one\\n<0>two"),
        ("one\r\ntwo", "INFO one\\r\\ntwo"),
        ("\x1b[2Jgone", "INFO \\x1b[2Jgone"),
        ("tab\there", "INFO tab\\there"),
        ("next\u2028line", "INFO next\\u2028line"),
        ("right\u202eto left", "INFO right\\u202eto left"),
        ("lone \udc80", "INFO lone \\udc80"),
        ("naïve ünïcode 你好", "INFO naïve ünïcode 你好"),
        ("Exception in ASGI application\n", "INFO Exception in ASGI application"),
    ],
)
def test_no_message_becomes_two_records_or_moves_the_cursor(sent: str, line: str) -> None:
    assert written("%s", sent) == line


def test_a_traceback_is_indented_and_each_of_its_lines_has_the_priority() -> None:
    try:
        dict[str, str]()["first\n<0>INFO forged\r\x1b[2J"]
    except KeyError as error:
        wrong = ValueError(error.args[0]).with_traceback(error.__traceback__)
    lines = written(
        "it failed", level=logging.ERROR, journal=True, exc_info=(ValueError, wrong, wrong.__traceback__)
    ).split("\n")

    assert lines[:2] == ["<3>it failed", "<3>  Traceback (most recent call last):"]
    assert lines[-2:] == ["<3>  ValueError: first", "<3>  <0>INFO forged\\r\\x1b[2J"]
    assert all(line.startswith("<3>  ") for line in lines[1:])


def test_a_stack_is_told_like_a_traceback() -> None:
    lines = written("here", stack_info="Stack (most recent call last):\n  File x").split("\n")

    assert lines == ["INFO here", "INFO   Stack (most recent call last):", "INFO     File x"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "-"),
        ("-", '"-"'),
        ("", '""'),
        (200, "200"),
        (True, "True"),
        (0.12345, "0.123"),
        ("/v1/audio/speech", "/v1/audio/speech"),
        ("two words", '"two words"'),
        ('a "quote"', r'"a \"quote\""'),
        ("back\\slash", r'"back\\slash"'),
        ("a=b", '"a=b"'),
        ("line\nstatus=200", r'"line\nstatus=200"'),
        ("\x00\x7f", r'"\u0000\u007f"'),
        ("żółć", r'"\u017c\u00f3\u0142\u0107"'),
        ("\udcff", r'"\udcff"'),
        (Path("/srv/voices"), "/srv/voices"),
    ],
)
def test_a_value_is_quoted_where_it_must_be(value: object, expected: str) -> None:
    assert logs.pairs(key=value) == f"key={expected}"


def test_pairs_keep_their_order() -> None:
    assert logs.pairs(method="POST", status=None, seconds=1.0) == "method=POST status=- seconds=1.000"


@given(text=st.text())
def test_whatever_a_client_sends_is_one_printable_line_that_can_be_read_back(text: str) -> None:
    line = logs.pairs(key=text)
    value = line.removeprefix("key=")

    assert line.isascii()
    assert line.isprintable()
    assert written(line) == f"INFO {line}"
    assert (json.loads(value) if value.startswith('"') else value) == text


@given(text=st.text(st.characters()))
def test_any_message_is_one_line(text: str) -> None:
    assert written("%s", text).isprintable()


def test_only_a_stream_that_is_the_journals_is_the_journal(tmp_path: Path) -> None:
    with (tmp_path / "journal").open("w") as journal, (tmp_path / "file").open("w") as file:
        about = os.fstat(journal.fileno())
        environ = {"JOURNAL_STREAM": f"{about.st_dev}:{about.st_ino}"}

        assert logs.is_journal(environ, journal)
        assert not logs.is_journal(environ, file)
        assert not logs.is_journal({}, journal)
        assert not logs.is_journal({"JOURNAL_STREAM": "nonsense"}, journal)
    assert not logs.is_journal(environ, journal), "closed"
    assert not logs.is_journal(environ, io.StringIO())


SPEAKS = """
import logging, os, sys, warnings
from chatterbox_server import logs
assert not logging.getLogger().handlers
for _ in range(2):
    logs.setup(os.environ, sys.stderr)
logging.getLogger("some.library").info("not said")
logging.getLogger("some.library").warning("said once")
warnings.warn_explicit("old", UserWarning, "file.py", 7)
"""


def test_records_and_warnings_reach_the_stream_once(tmp_path: Path) -> None:
    with (tmp_path / "journal").open("w+") as journal:
        about = os.fstat(journal.fileno())
        environ = os.environ | {"JOURNAL_STREAM": f"{about.st_dev}:{about.st_ino}", "PYTHONWARNINGS": "default"}
        subprocess.run([sys.executable, "-c", SPEAKS], stderr=journal, env=environ, check=True)

    assert (tmp_path / "journal").read_text() == "<4>said once\n<4>file.py:7: UserWarning: old\n"
