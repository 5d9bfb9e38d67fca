"""Charts of a report, as SVG to be put into a page. Writes no file; ``None`` without matplotlib (the extra ``plots``).

Colours are variables of the page's style sheet, so that they follow its light or dark.
"""

from __future__ import annotations

import io
import re
from html import escape
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from chatterbox_deploy.report.summary import Curve, Gpu

INK, GRID, PAPER = "#000001", "#000002", "#000003"
FIRST, SECOND = "#000004", "#000005"
KINDS: Mapping[str, str] = {
    "instance": "#000010",
    "speech": "#000011",
    "mps": "#000012",
    "display": "#000013",
    "other": "#000014",
    "unknown": "#000015",
    "driver": "#000016",
    "free": "#000017",
}
"""Who holds memory → a colour that stands for one of the page's."""

_VARIABLES: Mapping[str, str] = {
    INK: "--ink", GRID: "--grid", PAPER: "--paper", FIRST: "--first", SECOND: "--second",
    **{colour: f"--{kind}" for kind, colour in KINDS.items()},
}  # fmt: skip

_LEGEND: Mapping[str, str] = {
    "instance": "instances of this fleet",
    "speech": "speech servers",
    "mps": "MPS",
    "display": "desktop",
    "other": "others",
    "unknown": "not known",
    "driver": "driver",
    "free": "free",
}

_MEBIBYTE = 2**20
_WIDTH_IN = 10.4
_LABELLED = 0.08
"""Part of the widest bar below which a segment is too narrow for its number."""

_STYLE: Mapping[str, Any] = {
    "svg.fonttype": "none", "font.size": 11, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.edgecolor": GRID, "grid.color": GRID, "axes.facecolor": "none",
    "figure.facecolor": "none", "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 11, "xtick.major.size": 0, "ytick.major.size": 0,
}  # fmt: skip


def available() -> bool:
    """Whether there is matplotlib."""
    return find_spec("matplotlib") is not None


def memory(gpus: Sequence[Gpu]) -> str | None:
    """A bar for each GPU: who holds how much of its memory."""
    known = [gpu for gpu in gpus if gpu.card.memory_total_bytes and gpu.card.memory_used_bytes is not None]
    if not known:
        return None
    most = max(gpu.card.memory_total_bytes or 0 for gpu in known) / _MEBIBYTE

    def draw(axes: Any) -> None:
        seen: dict[str, Any] = {}
        for row, gpu in enumerate(known):
            left = 0.0
            for kind, size in _segments(gpu):
                bars = axes.barh(row, size, left=left, height=0.62, color=KINDS[kind], edgecolor=PAPER, linewidth=1)
                seen.setdefault(kind, bars[0])
                if size >= _LABELLED * most:
                    colour = INK if kind in ("free", "driver") else PAPER
                    axes.text(left + size / 2, row, f"{size:,.0f}", ha="center", va="center", color=colour, fontsize=10)
                left += size
        axes.set_yticks(range(len(known)), [f"GPU {gpu.card.index}" for gpu in known])
        axes.invert_yaxis()
        axes.set_xlim(0, most)
        axes.set_xlabel("MiB")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.spines["left"].set_visible(False)
        shown = [kind for kind in KINDS if kind in seen]
        axes.legend(
            [seen[kind] for kind in shown], [_LEGEND[kind] for kind in shown], loc="lower left",
            bbox_to_anchor=(0, 1.0), ncols=len(shown), handlelength=1, handleheight=1, borderaxespad=0.2,
        )  # fmt: skip

    return _drawn("memory", "GPU memory by who holds it", 1.1 + 0.55 * len(known), draw)


def _segments(gpu: Gpu) -> list[tuple[str, float]]:
    """Kind and MiB, in the order of the bar; what is too small to see, too."""
    sizes = dict.fromkeys(KINDS, 0.0)
    for holder in gpu.holders:
        kind = "driver" if holder.pid is None else holder.kind or "unknown"
        sizes[kind] += (holder.memory_bytes or 0) / _MEBIBYTE
    if gpu.card.processes is None:
        # Nobody tells the processes; what is in use is held by somebody.
        sizes["unknown"] = (gpu.card.memory_used_bytes or 0) / _MEBIBYTE
    total = (gpu.card.memory_total_bytes or 0) / _MEBIBYTE
    sizes["free"] = max(0.0, total - sum(sizes.values()))
    return [(kind, size) for kind, size in sizes.items() if size > 0]


def gain(now: Mapping[str, float], then: Mapping[str, float]) -> str | None:
    """Two bars, now and proposed, each of a part for every GPU: sound per second, as multiples of now's."""
    base = sum(now.values())
    if not base:
        return None

    def draw(axes: Any) -> None:
        for row, layout in enumerate((now, then)):
            left = 0.0
            for index, rate in layout.items():
                size = rate / base
                axes.barh(
                    row, size, left=left, height=0.62, color=SECOND if row == 0 else FIRST, edgecolor=PAPER, linewidth=2
                )
                if size >= _LABELLED * sum(then.values()) / base:
                    axes.text(left + size / 2, row, f"GPU {index}", ha="center", va="center", color=PAPER, fontsize=10)
                left += size
            axes.annotate(
                f"{left:.2f} ×", (left, row), (6, 0), textcoords="offset points", va="center", fontweight="bold"
            )
        axes.set_yticks((0, 1), ("now", "proposed"))
        axes.invert_yaxis()
        axes.set_xlim(0, 1.12 * max(1.0, sum(then.values()) / base))
        axes.set_xlabel("seconds of sound per second, as multiples of now's; reckoned")
        axes.spines["left"].set_visible(False)

    return _drawn("gain", "Sound per second, now and as proposed", 1.9, draw)


def curve(curve: Curve, now: int, then: int) -> str | None:
    """Sound per second over the number of instances on one GPU: points that were measured, the model fitted to them."""

    def draw(axes: Any) -> None:
        ways = ((True, curve.by_mps, FIRST, "by MPS"), (False, curve.in_turns, SECOND, "taking turns"))
        for mps, rates, colour, word in ways:
            axes.plot(curve.replicas, rates, color=colour, linewidth=2)
            axes.text(curve.replicas[-1] + 0.12, rates[-1], word, color=colour, va="center")
            points = [(count, rate) for count, by_mps, rate in curve.measured if by_mps == mps]
            axes.plot([count for count, _ in points], [rate for _, rate in points], "o", color=colour, markersize=6)
        axes.set_ylim(0, 1.08 * max(*curve.by_mps, *curve.in_turns, *(rate for *_, rate in curve.measured)))
        for count, word in ((now, "now"), (then, "proposed")):
            if count in curve.replicas and (word == "proposed" or count != then):
                axes.axvline(count, color=INK, linewidth=1, linestyle=(0, (3, 3)), alpha=0.6)
                axes.text(count + 0.06, axes.get_ylim()[1], word, color=INK, va="top", fontsize=10)
        axes.set_xticks(curve.replicas)
        axes.set_xlim(0.8, curve.replicas[-1] + 1.1)
        axes.set_xlabel("instances on one GPU (dots: measured; lines: the model fitted to them)")
        axes.set_ylabel("seconds of sound per second")
        axes.grid(visible=True, axis="y", linewidth=0.8)
        axes.set_axisbelow(True)

    return _drawn("curve", f"Sound per second by instances on one GPU, {curve.machine}", 3.3, draw)


def requests(answered: Mapping[str, int]) -> str | None:
    """A bar for each instance: how many requests it answered; a line where all would be equal."""
    names = sorted(answered)
    counts = [answered[name] for name in names]
    even = sum(counts) / max(1, len(counts))

    def draw(axes: Any) -> None:
        axes.barh(names, counts, height=0.6, color=FIRST)
        for row, count in enumerate(counts):
            axes.annotate(f"{count:,}", (count, row), (6, 0), textcoords="offset points", va="center", fontsize=10)
        axes.axvline(even, color=INK, linewidth=1, linestyle=(0, (3, 3)))
        axes.text(even, -0.55, "even", ha="center", va="bottom", color=INK, fontsize=10)
        axes.invert_yaxis()
        axes.set_xlim(0, max(counts) * 1.12)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("requests answered")
        axes.spines["left"].set_visible(False)

    return _drawn("requests", "Requests answered by instance", 0.9 + 0.42 * len(names), draw) if names else None


def _drawn(name: str, title: str, height_in: float, draw: Callable[[Any], None]) -> str | None:
    """The same bytes for the same values, with ids that no other chart of the page has."""
    if not available():
        return None
    import matplotlib as mpl  # noqa: PLC0415  an extra, and slow to import
    from matplotlib.figure import Figure  # noqa: PLC0415

    written = io.StringIO()
    style: Any = {**_STYLE, "svg.hashsalt": name}
    with mpl.rc_context(style):
        figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(written, format="svg", metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", written.getvalue(), flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg[svg.index("<svg") :])
    svg = svg.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    box = re.search(r'viewBox="[^"]*"', svg)
    svg = f'<svg {box[0] if box else ""} role="img" aria-label="{escape(title)}">{svg[svg.index(">") + 1 :].strip()}'
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg
