"""nginx's words: quoting. Runs nothing."""

from __future__ import annotations


def quote(text: str) -> str:
    """One parameter of a directive. A ``$`` cannot be escaped where nginx knows variables: ``config`` refuses it."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
