"""A report as one page of HTML that needs nothing else: its style and charts are inside. Writes no file."""

from __future__ import annotations

import re
from importlib import resources
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup, escape

from chatterbox_deploy import __version__
from chatterbox_deploy.gpu import usage
from chatterbox_deploy.report import charts, markdown

if TYPE_CHECKING:
    from chatterbox_deploy.report.summary import Gpu, Report


def html(report: Report) -> str:
    """The page; without matplotlib it says so where the charts would be."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = resources.files("chatterbox_deploy.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    proposal, traffic = report.proposal, report.situation.traffic
    return environment.from_string(text).render(
        version=__version__,
        report=report,
        situation=report.situation,
        proposal=proposal,
        tiles=_tiles(report),
        gpus=[(gpu, _meters(gpu), markdown.facts(gpu.card)) for gpu in report.gpus],
        memory_sentence=markdown.memory_sentence(report),
        gain_sentences=() if proposal is None else map(_with_code, markdown.gain_sentences(proposal)),
        with_code=_with_code,
        size=lambda size_bytes: "-" if size_bytes is None else usage.mebibytes(size_bytes),
        percent=markdown.percent,
        share_of=usage.share_of,
        diff_class=_diff_class,
        charts_there=charts.available(),
        memory_chart=charts.memory(report.gpus),
        gain_chart=None if proposal is None else charts.gain(proposal.by_gpu_now, proposal.by_gpu_then),
        curve_chart=_curve_chart(report),
        requests_chart=None if traffic is None else charts.requests(traffic.answered),
    )


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """Title, the number, and what it is of."""
    idle = sum(gpu.idle for gpu in report.gpus)
    high = sum(finding.severity == "high" for finding in report.findings)
    made = report.proposal
    memory = "no GPU says"
    if report.used_bytes is not None and report.total_bytes is not None:
        memory = f"{usage.mebibytes(report.used_bytes).removesuffix(' MiB')} of {usage.mebibytes(report.total_bytes)}"
    if made is None:
        gain, of = "-", "nothing to propose"
    elif made.gain is None:
        gain, of = "-", "nothing to compare with"
    else:
        gain, of = f"{made.gain:.2f} ×", "the sound per second of now, as reckoned"
    return [
        ("GPU memory in use", "-" if report.used_percent is None else f"{report.used_percent:.1f} %", memory),
        ("idle GPUs", f"{idle}", f"of {len(report.gpus)}"),
        (
            "findings",
            f"{len(report.findings)}",
            f"{high} of them grave" if len(report.findings) != 1 else "grave" * high,
        ),
        ("proposed gain", gain, of),
    ]


def _meters(gpu: Gpu) -> list[tuple[str, float | None, str]]:
    """Name, percent, and the number in words."""
    card = gpu.card
    power = None if card.power_w is None or not card.power_limit_w else 100 * card.power_w / card.power_limit_w
    return [
        ("memory", usage.memory_share(card), usage.memory_in_words(card) or "-"),
        ("utilisation", card.utilisation_percent, _percent(card.utilisation_percent)),
        ("SM activity", card.sm_active_percent, _percent(card.sm_active_percent)),
        ("power", power, "-" if power is None else f"{card.power_w:.0f} of {card.power_limit_w:.0f} W"),
    ]


def _percent(number: float | None) -> str:
    return "-" if number is None else f"{number:.0f} %"


def _diff_class(line: str) -> str:
    """Of a line of a unified diff."""
    if line.startswith(("+++", "---", "@@")):
        return "place"
    return {"+": "added", "-": "removed"}.get(line[:1], "")


def _with_code(text: str) -> Markup:
    """With what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704  escaped before


def _curve_chart(report: Report) -> str | None:
    """Where the number of instances on a GPU is to change: what so many bring."""
    made = report.proposal
    if made is None or made.gain is None:
        return None
    now = max((share.instances for share in made.now.values()), default=0)
    then = max(share.instances for share in made.then.values())
    return charts.curve(report.curve, now, then) if then > now and then > 1 else None
