"""A report as Markdown, which a terminal shows as it is. Decides nothing, prints nothing."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from chatterbox_deploy.gpu import usage

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from chatterbox_deploy.gpu.cards import Card
    from chatterbox_deploy.report.findings import Finding
    from chatterbox_deploy.report.proposal import Proposal
    from chatterbox_deploy.report.summary import Gpu, Report

UNKNOWN = "-"


def markdown(report: Report) -> str:
    """The whole report."""
    situation = report.situation
    told = f"Told by {situation.told_by}" + (f", {situation.taken}" if situation.taken else "")
    sections = [f"# GPU report\n\n{report.verdict()}"]
    if report.gpus:
        sections.append(f"{told}.")
        tables = _table(_names(report.gpus), right_from=9), _table(_facts(report.gpus), right_from=1)
        sections.append("\n\n".join(["## GPUs", *tables]))
        sections.append(f"## Memory\n\n{memory_sentence(report)}\n\n{_table(_holders(report.gpus), right_from=5)}")
    if situation.traffic is not None:
        sections.append(f"## Requests\n\n{_table(_requests(report), right_from=1)}")
    sections.append(f"## Findings\n\n{''.join(map(_finding, report.findings)) or 'None, of what was looked at.'}")
    if report.proposal is not None:
        sections.append(f"## Proposal\n\n{_proposal(report.proposal)}")
    if situation.unseen:
        sections.append("## Not looked at\n\n" + "\n".join(f"- {_prose(each)}" for each in situation.unseen))
    return "\n\n".join(section.rstrip() for section in sections) + "\n"


def memory_sentence(report: Report) -> str:
    """Capacity used of all GPUs together."""
    if report.used_bytes is None or report.total_bytes is None or report.used_percent is None:
        return "No GPU says how much memory it has."
    used = usage.mebibytes(report.used_bytes).removesuffix(" MiB")
    all_of_them = "all GPUs together" if len(report.gpus) > 1 else "the GPU"
    return f"{used} of {usage.mebibytes(report.total_bytes)} of {all_of_them} in use: {report.used_percent:.1f} %."


def facts(card: Card) -> list[tuple[str, str]]:
    """What a GPU does, and how it is, by name; ``-`` for what nobody knows."""
    clocks = None if card.sm_clock_mhz is None else f"{card.sm_clock_mhz:,}"
    if clocks is not None and card.sm_clock_max_mhz is not None:
        clocks += f" of {card.sm_clock_max_mhz:,}"
    power = None if card.power_w is None else f"{card.power_w:.0f}"
    if card.power_limit_w is not None:
        power = f"{power or UNKNOWN} of {card.power_limit_w:.0f}"
    return [
        ("memory used", _size(card.memory_used_bytes)),
        ("memory free", _size(card.memory_free_bytes)),
        ("memory in all", _size(card.memory_total_bytes)),
        ("utilisation", _number(card.utilisation_percent, " %")),
        ("SM activity", _number(card.sm_active_percent, " %")),
        ("memory traffic", _number(card.memory_busy_percent, " %")),
        ("temperature", _number(card.temperature_c, " °C")),
        ("power", UNKNOWN if power is None else f"{power} W"),
        ("P-state", card.p_state or UNKNOWN),
        ("SM clock", UNKNOWN if clocks is None else f"{clocks} MHz"),
        ("memory clock", _number(card.memory_clock_mhz, " MHz")),
        ("slowed down by", UNKNOWN if card.throttled_by is None else ", ".join(card.throttled_by) or "nothing"),
        ("MIG", UNKNOWN if card.mig is None else "on" if card.mig else "off"),
        ("compute mode", card.compute_mode or UNKNOWN),
    ]


def _size(size_bytes: int | None) -> str:
    return UNKNOWN if size_bytes is None else usage.mebibytes(size_bytes)


def _number(number: float | None, unit: str) -> str:
    return UNKNOWN if number is None else f"{number:,.0f}{unit}"


def percent(number: float | None) -> str:
    """``36.9 %``."""
    return UNKNOWN if number is None else f"{number:.1f} %"


def _names(gpus: Sequence[Gpu]) -> list[list[str]]:
    cards = [gpu.card for gpu in gpus]
    rows = [
        [card.index, card.name, card.bus_id or UNKNOWN, card.uuid or UNKNOWN, card.driver or UNKNOWN] for card in cards
    ]
    return [["GPU", "name", "bus id", "UUID", "driver"], *rows]


def _facts(gpus: Sequence[Gpu]) -> list[list[str]]:
    """A row a fact, a column a GPU: names are long."""
    columns = [facts(gpu.card) for gpu in gpus]
    head = ["", *(f"GPU {gpu.card.index}{' (idle)' if gpu.idle else ''}" for gpu in gpus)]
    return [head, *([name, *(column[at][1] for column in columns)] for at, (name, _) in enumerate(columns[0]))]


def _holders(gpus: Sequence[Gpu]) -> list[list[str]]:
    rows = [["GPU", "process", "unit", "what", "type", "memory", "share"]]
    for gpu in gpus:
        for each in gpu.holders:
            name = UNKNOWN if each.pid is None else f"{each.name or UNKNOWN} {each.pid}"
            rows.append(
                [gpu.card.index, name, each.unit or UNKNOWN, each.what, each.gpu_kind or UNKNOWN,
                 _size(each.memory_bytes), percent(each.share_percent)]
            )  # fmt: skip
        free = gpu.card.memory_free_bytes
        rows.append(
            [gpu.card.index, UNKNOWN, UNKNOWN, "free", UNKNOWN, _size(free), percent(usage.share_of(gpu.card, free))]
        )
    return rows


def _requests(report: Report) -> list[list[str]]:
    traffic = report.situation.traffic
    assert traffic is not None  # noqa: S101  asked only where there was some
    total = sum(traffic.answered.values())
    rows = [[name, f"{count:,}", percent(100 * count / total)] for name, count in sorted(traffic.answered.items())]
    return [["instance", "answered", "share"], *rows]


def _finding(finding: Finding) -> str:
    head = f"- **{finding.severity}** · {_prose(finding.what)} (`{finding.name}`)"
    evidence = (f"  - {_prose(each)}" for each in finding.evidence)
    return "\n".join([head, *evidence, f"  - → {finding.remedy}", ""])


def _proposal(proposal: Proposal) -> str:
    lines = [
        f"- {change.what}: {'no gain stated' if change.gain is None else f'{change.gain:.2f} times the sound'}"
        f" ({change.reckoned}){_resolving(change.resolves)}"
        for change in proposal.changes
    ]
    return "\n".join(
        [
            *lines,
            "",
            *gain_sentences(proposal),
            "",
            *_file(proposal),
            "",
            "Then type:",
            "",
            *_code(proposal.typed, "sh"),
        ]
    )


def _resolving(names: Iterable[str]) -> str:
    listed = ", ".join(f"`{name}`" for name in names)
    return f"; resolves {listed}" if listed else ""


def gain_sentences(proposal: Proposal) -> list[str]:
    """Expected gain, what it is reckoned from, and how far to trust it."""
    said = (
        []
        if proposal.gain is None
        else [f"Expected: {proposal.gain:.2f} times the sound per second of now{_rates(proposal)}."]
    )
    if proposal.gain is not None or proposal.then_audio_s_per_s is not None:
        said.append(f"Reckoned from {proposal.basis}.")
    return [*said, *(f"{caveat[:1].upper()}{caveat[1:]}." for caveat in proposal.caveats)]


def _rates(proposal: Proposal) -> str:
    now, then = proposal.now_audio_s_per_s, proposal.then_audio_s_per_s
    return "" if now is None or then is None else f", {now:.2f} → {then:.2f} seconds of sound per second"


def _file(proposal: Proposal) -> list[str]:
    if proposal.path is None:
        return ["A first fleet.toml:", "", *_code([proposal.text.rstrip()], "toml")]
    return [f"What changes in {proposal.path}:", "", *_code([proposal.diff.rstrip()], "diff")]


def _code(lines: Iterable[str], language: str) -> Iterator[str]:
    yield f"```{language}"
    yield from lines
    yield "```"


def _prose(text: str) -> str:
    """As ``_plain``, but for what stands between two backticks: that is a command of ours, or harmless as one."""
    return "".join(part if _CODE.fullmatch(part) else _plain(part) for part in _CODE.split(_printable(text)))


_CODE = re.compile(r"(`[^`]+`)")


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _plain(text: str) -> str:
    """On one line, with no meaning to Markdown: names of processes and lines of code are other people's."""
    return re.sub(r"([\\`*<>\[\]|])", r"\\\1", _printable(text))


def _table(rows: Sequence[Sequence[str]], *, right_from: int) -> str:
    """With columns aligned for those who read it as it is; numbers, from a column on, to the right."""
    cells = [[_plain(cell) for cell in row] for row in rows]
    widths = [max(3, *(len(row[at]) for row in cells)) for at in range(len(cells[0]))]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if at >= right_from else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = (f"{'-' * (width - 1)}:" if at >= right_from else "-" * width for at, width in enumerate(widths))
    return "\n".join([line(cells[0]), f"| {' | '.join(rule)} |", *map(line, cells[1:])])
