"""A picture of the fleet as lines for a terminal of any size. Prints nothing, asks nobody."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from rich.cells import cell_len
from rich.text import Text

from chatterbox_deploy.monitor.curves import curve
from chatterbox_deploy.monitor.picture import FRONT, WINDOW_S
from chatterbox_deploy.status.table import GAP, duration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from chatterbox_deploy.monitor.picture import Event, Front, FrontRow, GpuRow, InstanceRow, Picture
    from chatterbox_deploy.monitor.story import Story

Row = TypeVar("Row")

CURVE_S = 300.0
CURVE_CELLS = 20

_LEVELS = "▁▂▃▄▅▆▇█"
_PLAIN_LEVELS = "_.:-=+*#"
_PLAIN = str.maketrans({"·": "|", "°": "", "…": "~"})
"""For terminals that know no more than ASCII."""

_COLOURS = {
    "ready": "green", "active/running": "green", "answers": "green",
    "draining": "yellow", "activating": "yellow", "deactivating": "yellow", "warning": "yellow",
    "not ready": "red", "no answer": "red", "failed": "red", "critical": "bold red",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Column(Generic[Row]):
    """A column of a table."""

    title: str
    cell: Callable[[Row], str]
    is_number: bool = True
    goes: int = 0
    """Where there is no room, columns go from the highest on; 0 stays."""


def lines(story: Story, *, width: int | None, height: int | None = None, plain: bool = False) -> list[Text]:
    """What is to be seen, the most urgent first; ``None``: a pipe, which takes lines of any length and number.

    ``plain`` is for an output that knows no more than ASCII.
    """
    picture = story.picture
    if picture is None:
        return [Text("looking"[:width])]
    curves = _Curves(story, _PLAIN_LEVELS if plain else _LEVELS)
    shown = [_title(picture, width)]
    shown += [line for event in picture.now for line in _wrapped(_going_on(event, story), width, event.severity)]
    for part in (
        _table(picture.gpus or (), _gpu_columns(curves), width),
        _table(picture.instances, _instance_columns(curves), width),
        [*_front_lines(picture.front, curves, width)],
    ):
        shown += [Text(), *part] if part else []
    if told := [line for event in reversed(story.events) for line in _wrapped(_told(event), width, event.severity)]:
        shown += [Text(), *told]
    shown += [line for note in picture.notes for line in _wrapped(note, width, "")]
    if plain:
        shown = [_in_ascii(line) for line in shown]
    if width is not None:
        for line in shown:
            line.truncate(max(0, width))
    # Events are the last; whoever wants them all has a file, or a taller terminal.
    return shown if height is None else shown[: max(0, height)]


def event_line(event: Event) -> str:
    """One event, as a line of a log."""
    return f"{event.time:%Y-%m-%dT%H:%M:%SZ} {_told(event, with_time=False)}"


def _in_ascii(line: Text) -> Text:
    plain = line.plain.translate(_PLAIN).encode("ascii", "replace").decode()
    # No letter comes or goes but the degree sign, which stands in no coloured cell.
    return Text(plain, style=line.style, spans=line.spans)


def _title(picture: Picture, width: int | None) -> Text:
    window_s = _number(picture.window_s, 1 if picture.window_s is not None and picture.window_s < 10 else 0, " s")
    window = "one look so far" if picture.window_s is None else f"rates of the last {window_s}"
    speed = "-" if picture.audio_s_per_s is None else f"{picture.audio_s_per_s:.2f}"
    said = f"{picture.time:%H:%M:%S} UTC · {window} · {speed} s of sound per second"
    if width is not None and cell_len(said) > width:
        said = f"{picture.time:%H:%M:%S} · {window_s} · {speed}x"
    return Text(said, style="bold")


def _going_on(event: Event, story: Story) -> str:
    since_s = next((each.since_s for each in story.going_on.values() if each.begun is event), None)
    ago = "" if since_s is None or story.picture is None else f" for {duration(story.picture.monotonic_s - since_s)}"
    do = "" if event.do is None else f": {event.do}"
    return f"{event.severity}{ago}: {event.about} {event.text}{do}"


def _told(event: Event, *, with_time: bool = True) -> str:
    when = f"{event.time:%H:%M:%S} " if with_time else ""
    if event.phase == "ends":
        return f"{when}over after {duration(event.lasted_s)}: {event.about} {event.text}"
    do = "" if event.do is None or with_time else f": {event.do}"
    return f"{when}{event.severity}: {event.about} {event.text}{do}"


def _wrapped(text: str, width: int | None, severity: str) -> list[Text]:
    parts = [text] if width is None else textwrap.wrap(text, max(8, width), subsequent_indent="  ")
    style = _COLOURS.get(severity, "") if not text[:2].isdigit() else ""
    return [Text(part, style=style) for part in parts]


# Tables


def _table(rows: Sequence[Row], columns: Sequence[Column[Row]], width: int | None) -> list[Text]:
    if not rows:
        return []
    kept = list(columns)
    while width is not None and _width(kept, rows) > width and any(column.goes for column in kept):
        kept.remove(max(kept, key=lambda column: column.goes))
    made = [[Text(column.title, style="bold") for column in kept]]
    made += [[Text(text := column.cell(row), style=_colour(text)) for column in kept] for row in rows]
    widths = [max(cell_len(line[number].plain) for line in made) for number in range(len(kept))]
    return [_line(cells, kept, widths) for cells in made]


def _width(columns: Sequence[Column[Row]], rows: Sequence[Row]) -> int:
    widths = (max(cell_len(text) for text in (column.title, *map(column.cell, rows))) for column in columns)
    return sum(widths) + GAP * (len(columns) - 1)


def _line(cells: Sequence[Text], columns: Sequence[Column[Row]], widths: Sequence[int]) -> Text:
    line = Text()
    for number, (cell, column, size) in enumerate(zip(cells, columns, widths, strict=True)):
        pad = " " * (size - cell_len(cell.plain))
        line.append(" " * GAP * (number > 0))
        line.append_text(Text.assemble(pad, cell) if column.is_number else Text.assemble(cell, pad))
    line.rstrip()
    return line


def _colour(text: str) -> str:
    return _COLOURS.get(text) or _COLOURS.get(text.partition("/")[0], "")


def _number(value: float | None, digits: int = 0, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def _seconds(value: float | None) -> str:
    return _number(value, 2 if value is not None and value < 10 else 1, " s")


def _memory(row: GpuRow) -> str:
    if row.memory_used_bytes is None:
        return "-"
    total = "" if row.memory_total_bytes is None else f" of {row.memory_total_bytes / 1e9:.1f}"
    return f"{row.memory_used_bytes / 1e9:.1f}{total} GB"


def _power(row: GpuRow) -> str:
    if row.power_w is None:
        return "-"
    return f"{row.power_w:.0f}{'' if row.power_limit_w is None else f' of {row.power_limit_w:.0f}'} W"


def _slowed(row: GpuRow) -> str:
    return "-" if row.throttled_by is None else ",".join(row.throttled_by) or "no"


class _Curves:
    """The last minutes of each quantity, as one line of blocks."""

    def __init__(self, story: Story, levels: str) -> None:
        self._story = story
        self._levels = levels

    def draw(self, name: str, top: float | None = None) -> str:
        """``top`` is the full height; by default the greatest value there is."""
        values = curve(self._story, name, cells=CURVE_CELLS, span_s=CURVE_S)
        highest = top or max((value for value in values if value is not None), default=0)
        return "".join(" " if value is None else self._level(value, highest) for value in values)

    def _level(self, value: float, highest: float) -> str:
        last = len(self._levels) - 1
        return self._levels[min(last, round(last * value / highest)) if highest > 0 else 0]


_CURVE = f"last {CURVE_S / 60:.0f} min"


def _gpu_columns(curves: _Curves) -> tuple[Column[GpuRow], ...]:
    return (
        Column("GPU", lambda row: row.gpu, is_number=False),
        Column("name", lambda row: row.name, is_number=False, goes=7),
        Column("memory", _memory),
        Column("util", lambda row: _number(row.utilisation_percent, unit=" %")),
        Column("SM", lambda row: _number(row.sm_active_percent, unit=" %"), goes=4),
        Column("temp", lambda row: _number(row.temperature_c, unit=" °C"), goes=1),
        Column("power", _power, goes=3),
        Column("state", lambda row: row.p_state or "-", goes=6),
        Column("slowed by", _slowed, is_number=False, goes=2),
        Column(_CURVE, lambda row: curves.draw(f"gpu {row.gpu}", 100), is_number=False, goes=5),
    )


def _instance_columns(curves: _Curves) -> tuple[Column[InstanceRow], ...]:
    def count(value: int | None) -> str:
        return "-" if value is None else str(value)

    return (
        Column("instance", lambda row: row.instance, is_number=False),
        Column("GPU", lambda row: ",".join(gpu[:12] for gpu in row.gpus), is_number=False, goes=12),
        Column("unit", lambda row: row.unit or "-", is_number=False, goes=8),
        Column("ready", lambda row: row.ready or "-", is_number=False),
        Column("queue", lambda row: count(row.waiting)),
        Column("in flight", lambda row: count(row.running), goes=5),
        Column("wait", lambda row: _seconds(row.wait_s), goes=2),
        Column("first byte", lambda row: _seconds(row.first_byte_s), goes=6),
        Column("RTF", lambda row: _number(row.rtf, 2 if row.rtf is None or row.rtf >= 0.1 else 3), goes=1),
        Column("audio s/s", lambda row: _number(row.audio_s_per_s, 2)),
        Column("tokens/s", lambda row: _number(row.tokens_per_s), goes=11),
        Column("req/s", lambda row: _number(row.requests_per_s, 2), goes=9),
        Column("busy", lambda row: _number(row.busy_percent, unit=" %"), goes=7),
        Column("restarts", lambda row: count(row.restarts), goes=10),
        Column(_CURVE, lambda row: curves.draw(f"instance {row.instance}"), is_number=False, goes=4),
    )


_FRONT_COLUMNS: tuple[Column[FrontRow], ...] = (
    Column("front", lambda row: "nginx itself" if row.instance == FRONT else row.instance, is_number=False),
    Column("requests", lambda row: str(row.requests)),
    Column("share", lambda row: _number(row.share_percent, unit=" %"), goes=3),
    Column("errors", lambda row: str(row.errors)),
    Column("refused", lambda row: str(row.refused), goes=5),
    Column("passed on", lambda row: str(row.passed_on), goes=1),
    Column("p50", lambda row: _seconds(row.p50_s), goes=4),
    Column("p95", lambda row: _seconds(row.p95_s), goes=2),
)


def _front_lines(front: Front, curves: _Curves, width: int | None) -> Iterator[Text]:
    answers = {True: "answers", False: "does not answer", None: "was not asked"}[front.answers]
    nginx = "" if front.nginx is None else f", nginx is {front.nginx}"
    said = f"front {front.listen} {answers}{nginx}"
    if front.requests is not None:
        said += (
            f"; in the last {WINDOW_S:.0f} s {front.requests} requests, {front.errors} errors, "
            f"{front.refused} refused, {front.retried} retried"
        )
    yield from _wrapped(said, width, "")
    drawn = curves.draw(FRONT)
    if drawn.strip() and (width is None or width >= CURVE_CELLS + 30):
        yield Text(f"requests per second, {_CURVE}: {drawn}")
    yield from _table(front.rows or (), _FRONT_COLUMNS, width)
