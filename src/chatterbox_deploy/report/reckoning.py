"""How much sound a machine's GPUs give, with so many instances on each, by what was measured. Decides; asks nobody."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatterbox_deploy.gpu import usage
from chatterbox_deploy.sizing import advice

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chatterbox_deploy.gpu.cards import Card
    from chatterbox_deploy.report.situation import Situation
    from chatterbox_deploy.sizing.advice import Advice
    from chatterbox_deploy.sizing.profile import Profile

UTTERANCE_S = 10.0


@dataclass(frozen=True, slots=True)
class Share:
    """Of a fleet, on one GPU."""

    instances: int
    mps: bool

    def __str__(self) -> str:
        """``4 by MPS``."""
        return f"{self.instances}{' by MPS' * (self.mps and self.instances > 1)}"


Layout = dict[str, Share]
"""By index of a GPU."""


@dataclass(frozen=True, slots=True)
class Reckoning:
    """By one profile, of one machine."""

    situation: Situation
    profile: Profile
    reference: Profile
    """Lends its way of sharing a GPU where the profile has one instance only."""

    @property
    def measured(self) -> bool:
        """Whether the profile is of the server that the fleet runs; of somebody's own server there is none."""
        file = self.situation.fleet_file
        return file is None or (
            file.config.server.command is None and file.config.server.engine == "stock" and file.fleet.service.uses_gpu
        )

    @property
    def same_gpus(self) -> bool:
        """Whether the profile is of GPUs like these: then not only ratios carry over."""
        return all(card.name in self.profile.machine for card in self.situation.cards)

    def audio_s_per_s(self, layout: Mapping[str, Share]) -> float:
        """Seconds of sound per second, all together."""
        return sum(self.by_gpu(layout).values())

    def by_gpu(self, layout: Mapping[str, Share]) -> dict[str, float]:
        """Seconds of sound per second, GPU by GPU; the machine's cores shared out evenly to those in use."""
        cores = None if self.situation.cores is None else self.situation.cores / max(1, len(layout))
        return {index: self.of(share, cores) for index, share in layout.items()}

    def of(self, share: Share, cores: float | None) -> float:
        """Of one GPU with so many cores for it."""
        return advice.throughput(self.profile, self.reference, replicas=share.instances, mps=share.mps, cores=cores)

    def advise(self, card: Card) -> Advice:
        """How many instances to run on a GPU, beside what strangers hold of its memory."""
        total = card.memory_total_bytes
        return advice.advise(
            self.profile,
            self.reference,
            memory_bytes=None if total is None else max(0, total - self._strangers_bytes(card)),
            cores=(self.situation.cores or 1) / len(self.situation.cards),
            utterance_s=UTTERANCE_S,
        )

    def can_take_one(self, card: Card) -> bool:
        """Whether an instance could run there, as far as anybody knows."""
        return usage.is_usable(card) and (not self.measured or self.advise(card).memory_holds != 0)

    def speaking_now(self) -> Layout:
        """Servers on each GPU, as its processes are known; of a capture, whatever computes is taken for one."""
        kinds = ("instance", "speech", None) if self.situation.captured else ("instance", "speech")
        found: Layout = {}
        for card in self.situation.cards:
            there = [each for each in usage.computing(card) if self.situation.program(each.pid).kind in kinds]
            if there:
                found[card.index] = Share(len(there), all("M" in (each.kind or "") for each in there))
        return found

    def _strangers_bytes(self, card: Card) -> int:
        kinds = ("other", "display") if self.situation.captured else ("other", "display", None)
        others = [each for each in card.processes or () if self.situation.program(each.pid).kind in kinds]
        return sum(each.memory_bytes or 0 for each in others)


def in_words(layout: Mapping[str, Share]) -> str:
    """``4 by MPS on GPU 0, 1 on each of 2 GPUs``."""
    by_share: dict[str, list[str]] = {}
    for index, share in layout.items():
        by_share.setdefault(str(share), []).append(index)
    said = [
        f"{share} on GPU {indices[0]}" if len(indices) == 1 else f"{share} on each of {len(indices)} GPUs"
        for share, indices in by_share.items()
    ]
    return ", ".join(said) or "none"
