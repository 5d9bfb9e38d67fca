"""The rows of a status as columns, for a terminal of any width. Prints nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chatterbox_deploy.status.rows import Row


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table."""

    title: str
    cell: Callable[[Row], str]
    is_number: bool = False


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


COLUMNS = (
    Column("instance", lambda row: row.instance),
    Column("GPU", lambda row: "-" if row.gpus is None else ",".join(gpu[:12] for gpu in row.gpus)),
    Column("port", lambda row: _or_dash(row.port), is_number=True),
    Column("unit", lambda row: _or_dash(row.unit)),
    Column("ready", lambda row: _or_dash(row.ready)),
    Column("front", lambda row: _or_dash(row.front)),
    Column("waiting", lambda row: _or_dash(row.waiting), is_number=True),
    Column("in flight", lambda row: _or_dash(row.running), is_number=True),
    Column("spoken", lambda row: _or_dash(row.spoken), is_number=True),
    Column("restarts", lambda row: _or_dash(row.restarts), is_number=True),
    Column("since", lambda row: duration(row.active_s), is_number=True),
    Column("memory", lambda row: size(row.memory_bytes), is_number=True),
    Column("GPU memory", lambda row: size(row.gpu_memory_bytes), is_number=True),
)
"""In the order of the table. What is wrong comes last, and is no column where the terminal is too narrow."""

WRONG = Column("wrong", lambda row: "; ".join(row.wrong))

_DISPENSABLE = ("spoken", "GPU memory", "memory", "since", "in flight", "waiting", "restarts", "GPU", "front")
"""Columns that a narrow terminal does without, the first one first."""

GAP = 2
"""Spaces between columns."""


def fitting(rows: Sequence[Row], width: int | None) -> tuple[Column, ...]:
    """The columns for which a terminal of so many cells has room; all for ``None``."""
    columns = list(COLUMNS)
    for title in _DISPENSABLE:
        if width is None or table_width(columns, rows) <= width:
            break
        columns = [column for column in columns if column.title != title]
    return tuple(columns)


def table_width(columns: Sequence[Column], rows: Sequence[Row]) -> int:
    """Cells of the longest line."""
    widths = (max(len(text) for text in (column.title, *map(column.cell, rows))) for column in columns)
    return sum(widths) + GAP * (len(columns) - 1)


def duration(seconds: float | None) -> str:
    """``42s``, ``5m``, ``3h``, ``12d``: how long, at a glance."""
    if seconds is None:
        return "-"
    for unit, name in ((86_400, "d"), (3600, "h"), (60, "m")):
        # Two of a unit before the next one: "90m" says more than "1h".
        if seconds >= 2 * unit:
            return f"{int(seconds // unit)}{name}"
    return f"{int(max(0, seconds))}s"


def size(count: int | None) -> str:
    """Bytes as ``126 MB`` or ``4.1 GB``."""
    if count is None:
        return "-"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
