"""What a machine's GPUs do, what is wrong, what to change, and what that brings. Decides; asks nobody."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from chatterbox_deploy.gpu import usage
from chatterbox_deploy.report import findings, proc, proposal
from chatterbox_deploy.report.reckoning import Reckoning, Share
from chatterbox_deploy.sizing import profile

if TYPE_CHECKING:
    from chatterbox_deploy.gpu.cards import Card
    from chatterbox_deploy.report.findings import Finding
    from chatterbox_deploy.report.proposal import Proposal
    from chatterbox_deploy.report.situation import Situation
    from chatterbox_deploy.sizing.profile import Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds some of a GPU's memory."""

    pid: int | None
    """``None``: nobody in particular, such as the driver."""

    name: str | None
    unit: str | None
    kind: str | None
    """A word of ``proc.Kind``."""

    what: str
    """That in words."""

    gpu_kind: str | None
    """As nvidia-smi says it: C, G, M+C."""

    memory_bytes: int | None
    share_percent: float | None
    """Of the GPU's memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU, and who is on it."""

    card: Card
    idle: bool
    holders: tuple[Holder, ...]
    """The greatest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """What so many instances on one GPU bring, by the profile: for a chart."""

    replicas: tuple[int, ...]
    by_mps: tuple[float, ...]
    """Seconds of sound per second."""

    in_turns: tuple[float, ...]
    measured: tuple[tuple[int, bool, float], ...]
    """Instances, whether by MPS, seconds of sound per second."""

    machine: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that is told."""

    situation: Situation
    gpus: tuple[Gpu, ...]
    used_bytes: int | None
    """Of all GPUs together."""

    total_bytes: int | None
    findings: tuple[Finding, ...]
    proposal: Proposal | None
    curve: Curve

    @property
    def used_percent(self) -> float | None:
        """Of the memory of all GPUs together."""
        if self.used_bytes is None or not self.total_bytes:
            return None
        return 100 * self.used_bytes / self.total_bytes

    @property
    def grave(self) -> bool:
        """Whether something is wrong that wastes a GPU or will fail."""
        return any(finding.severity == "high" for finding in self.findings)

    def verdict(self) -> str:
        """All of it in a sentence or two."""
        idle = sum(gpu.idle for gpu in self.gpus)
        capacity = "" if self.used_percent is None else f", {self.used_percent:.1f} % of all GPU memory in use"
        resting = f"{idle or 'none'} of them idle" if len(self.gpus) > 1 else "idle" if idle else "at work"
        gpus = f"{len(self.gpus)} GPU{'s' * (len(self.gpus) != 1)}, {resting}{capacity}."
        if not self.gpus:
            gpus = f"No GPU is known here (asked: {self.situation.told_by})."
        if not self.findings:
            return f"{gpus} Nothing is wrong that was looked at."
        high = sum(finding.severity == "high" for finding in self.findings)
        count = f"{len(self.findings)} findings{f', {high} of them grave' if high else ''}"
        if len(self.findings) == 1:
            count = f"1 {'grave ' * high}finding"
        said = f"{gpus} {count}."
        if self.proposal is not None and self.proposal.gain is not None and self.proposal.gain > 1:
            said += f" The proposed fleet.toml brings {self.proposal.gain:.2f} times the sound per second, as reckoned."
        return said

    def as_json(self) -> dict[str, Any]:
        """The same for programs (docs/report.md); unknown is null."""
        situation, made = self.situation, self.proposal
        return {
            "told_by": situation.told_by,
            "taken": situation.taken,
            "gpus": [
                {
                    **{key: value for key, value in asdict(gpu.card).items() if key != "processes"},
                    "idle": gpu.idle,
                    "holders": [asdict(holder) for holder in gpu.holders],
                }
                for gpu in self.gpus
            ],
            "memory": {
                "used_bytes": self.used_bytes,
                "total_bytes": self.total_bytes,
                "used_percent": self.used_percent,
            },
            "requests": None if situation.traffic is None else asdict(situation.traffic),
            "findings": [asdict(finding) for finding in self.findings],
            "proposal": None if made is None else asdict(made),
            "not_looked_at": list(situation.unseen),
            "verdict": self.verdict(),
        }


def make(situation: Situation, chosen: Profile | None = None) -> Report:
    """A report on the situation; the gain is reckoned by ``chosen``, or by what came with us for the fleet's model."""
    known = profile.built_in()
    file = situation.fleet_file
    used = chosen or known["chatterbox" if file is None else file.config.server.model]
    found = findings.find(situation)
    by = Reckoning(situation, used, known["chatterbox"])
    sums = usage.capacity(situation.cards)
    return Report(
        situation=situation,
        gpus=tuple(_gpu(situation, card) for card in situation.cards),
        used_bytes=None if sums is None else sums[0],
        total_bytes=None if sums is None else sums[1],
        findings=found,
        proposal=proposal.propose(by, {finding.name for finding in found}) if situation.cards else None,
        curve=_curve(by),
    )


def _gpu(situation: Situation, card: Card) -> Gpu:
    return Gpu(card=card, idle=usage.is_idle(card), holders=tuple(_holders(situation, card)))


def _holders(situation: Situation, card: Card) -> list[Holder]:
    total = card.memory_total_bytes
    holders: list[Holder] = []
    for process in card.processes or ():
        program = situation.program(process.pid)
        holders.append(
            Holder(
                pid=process.pid,
                name=program.name,
                unit=program.unit,
                kind=program.kind,
                what="not known" if program.kind is None else proc.WORDS[program.kind],
                gpu_kind=process.kind,
                memory_bytes=process.memory_bytes,
                share_percent=usage.share_of(card, process.memory_bytes),
            )
        )
    holders.sort(key=lambda holder: -(holder.memory_bytes or 0))
    if card.processes is not None and card.memory_used_bytes is not None:
        seen = sum(each.memory_bytes or 0 for each in card.processes)
        unsaid = any(each.memory_bytes is None for each in card.processes)
        who = (
            "those whose share nobody tells, and the driver" if unsaid else "the driver, and whoever is not to be seen"
        )
        holders += _nobody(card, who, card.memory_used_bytes - seen)
    if total is not None and card.memory_used_bytes is not None and card.memory_free_bytes is not None:
        holders += _nobody(card, "kept by the driver", total - card.memory_used_bytes - card.memory_free_bytes)
    return holders


def _nobody(card: Card, what: str, size_bytes: int) -> list[Holder]:
    """Memory that no process holds."""
    if size_bytes <= 0:
        return []
    return [
        Holder(
            pid=None, name=None, unit=None, kind=None, what=what, gpu_kind=None,
            memory_bytes=size_bytes, share_percent=usage.share_of(card, size_bytes),
        )
    ]  # fmt: skip


def _curve(by: Reckoning) -> Curve:
    points = by.profile.points if any(each.replicas > 1 for each in by.profile.points) else by.reference.points
    most = max(point.replicas for point in points)
    replicas = tuple(range(1, most + 1))
    return Curve(
        replicas=replicas,
        by_mps=tuple(by.of(Share(count, mps=True), None) for count in replicas),
        in_turns=tuple(by.of(Share(count, mps=False), None) for count in replicas),
        measured=tuple((each.replicas, each.mps, each.audio_s_per_s) for each in by.profile.points),
        machine=f"{by.profile.model} on {by.profile.machine}",
    )
