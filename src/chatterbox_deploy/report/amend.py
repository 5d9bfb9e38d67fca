"""Change single keys of a fleet file's text, and leave every other line as it is. Writes no file."""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_HEADER = re.compile(r"^\s*\[+\s*([^\]]+?)\s*\]+\s*(?:#.*)?$")
_KEY = re.compile(r"""^\s*(?P<key>"(?:[^"\\]|\\.)*"|'[^']*'|[A-Za-z0-9_-]+)\s*=\s*(?P<value>.*)$""")
_COMMENT = re.compile(r"^(?P<value>(?:\"(?:[^\"\\]|\\.)*\"|'[^']*'|[^#\"'])*?)(?P<comment>\s*#.*)?$")


def amend(text: str, changes: Mapping[tuple[str, str], str]) -> str | None:
    """``text`` with each (table, key) set to what is TOML for its new value; a key that is not there is added.

    ``None`` where the text is written in a way that this cannot follow (a value over several lines, an inline table).
    """
    lines = text.splitlines()
    for (table, key), value in changes.items():
        lines = _set(lines, table, key, value)
    after = "\n".join(lines) + "\n"
    return after if _reads_as(after, text, changes) else None


def _set(lines: list[str], table: str, key: str, value: str) -> list[str]:
    begin = next((at for at, line in enumerate(lines) if (found := _HEADER.match(line)) and found[1] == table), None)
    if begin is None:
        gap = [""] if lines and lines[-1].strip() else []
        return [*lines, *gap, f"[{table}]", f"{_spelt(key)} = {value}"]
    end = next((at for at in range(begin + 1, len(lines)) if _HEADER.match(lines[at])), len(lines))
    for at in range(begin + 1, end):
        found = _KEY.match(lines[at])
        if found and found["key"].strip("\"'") == key:
            return [*lines[:at], _with_value(lines[at], found, value), *lines[at + 1 :]]
    # After the last key, before the blank lines and comments that belong to the next table.
    last = max((at for at in range(begin, end) if at == begin or _KEY.match(lines[at])), default=begin)
    return [*lines[: last + 1], f"{_spelt(key)} = {value}", *lines[last + 1 :]]


def _with_value(line: str, found: re.Match[str], value: str) -> str:
    rest = _COMMENT.match(found["value"])
    comment = (rest["comment"] or "") if rest else ""
    return f"{line[: found.start('value')]}{value}{comment}"


def _spelt(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else f'"{key}"'


def _reads_as(after: str, before: str, changes: Mapping[tuple[str, str], str]) -> bool:
    """Whether the new text means the old one with the changes, and nothing else."""
    meant = tomllib.loads(before)
    for (table, key), value in changes.items():
        within = meant.setdefault(table, {})
        if not isinstance(within, dict):
            return False
        within[key] = tomllib.loads(f"value = {value}")["value"]
    try:
        return tomllib.loads(after) == meant
    except tomllib.TOMLDecodeError:
        return False
