"""nginx's words: quoting. Runs nothing."""

from __future__ import annotations

MAX_PASSES = 9
"""nginx follows ten internal redirects (``NGX_HTTP_MAX_URI_CHANGES``); the last one is for the error."""


def passes(instances: int) -> int:
    """How many instances a request may be offered to in turn: all of up to 9, and up to 4 of them twice."""
    return min(MAX_PASSES, 2 * instances)


def quote(text: str) -> str:
    """One parameter of a directive. A ``$`` cannot be escaped where nginx knows variables: ``config`` refuses it."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
