"""How much a GPU is used, by what is known of it. Decides nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from chatterbox_deploy.gpu.cards import Card, Process

BUSY_PERCENT = 5.0
"""Utilisation from which on a GPU counts as used though nobody is seen to compute on it."""

UNEXPLAINED_BYTES = 2**30
"""Memory in use that no process is seen to hold, from which on somebody does: a container hides others' processes."""


def mebibytes(size_bytes: int) -> str:
    """``9,126 MiB``, as nvidia-smi counts."""
    return f"{size_bytes / 2**20:,.0f} MiB"


def named(indices: Sequence[str]) -> str:
    """``GPU 0``, ``GPUs 0 and 1``, ``GPUs 0, 1 and 2``."""
    return f"GPU{'s' * (len(indices) > 1)} {listed(indices)}"


def listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([part for part in (", ".join(names[:-1]), *names[-1:]) if part])


def is_usable(card: Card) -> bool:
    """Whether a server could be put on it: it answers, is whole (no MIG), and lets programs compute."""
    return bool(card.uuid) and card.mig is not True and card.compute_mode != "Prohibited"


def memory_share(card: Card) -> float | None:
    """Percent of its memory that is in use."""
    return share_of(card, card.memory_used_bytes)


def share_of(card: Card, size_bytes: int | None) -> float | None:
    """Percent of its memory; ``None`` where one of the two is not known."""
    return None if size_bytes is None or not card.memory_total_bytes else 100 * size_bytes / card.memory_total_bytes


def computing(card: Card) -> tuple[Process, ...]:
    """Processes that compute on it, or are ready to; the MPS server itself is none."""
    return tuple(each for each in card.processes or () if "C" in (each.kind or "C") and not is_mps_server(each))


def is_mps_server(process: Process) -> bool:
    return "nvidia-cuda-mps" in (process.name or "")


def is_idle(card: Card) -> bool:
    """Whether nobody computes on it, as far as anything is known of it at all."""
    used, busy = card.memory_used_bytes, card.utilisation_percent
    unexplained = (used or 0) - sum(process.memory_bytes or 0 for process in card.processes or ())
    if computing(card) or not card.uuid or unexplained >= UNEXPLAINED_BYTES or (busy or 0) >= BUSY_PERCENT:
        return False
    return not (used is None and busy is None and card.processes is None)


def in_words(card: Card) -> str:
    """What says how busy it is."""
    parts = (
        memory_in_words(card),
        None if card.utilisation_percent is None else f"utilisation {card.utilisation_percent:.0f} %",
        None if card.sm_active_percent is None else f"SM activity {card.sm_active_percent:.0f} %",
        card.p_state,
        None if card.power_w is None else f"{card.power_w:.0f} W",
        f"{len(computing(card)) or 'no'} computing process{'es' * (len(computing(card)) > 1)}"
        if card.processes is not None
        else None,
    )
    return f"GPU {card.index}: {', '.join(part for part in parts if part)}"


def memory_in_words(card: Card) -> str | None:
    """``9,126 of 24,576 MiB used``."""
    if card.memory_used_bytes is None:
        return None
    if card.memory_total_bytes is None:
        return f"{mebibytes(card.memory_used_bytes)} used"
    used = mebibytes(card.memory_used_bytes).removesuffix(" MiB")
    return f"{used} of {mebibytes(card.memory_total_bytes)} used"


def capacity(cards: Iterable[Card]) -> tuple[int, int] | None:
    """Bytes in use, and bytes that there are, of all GPUs together; ``None`` where nobody knows of any.

    A GPU that does not say both is left out.
    """
    known = [
        (card.memory_used_bytes, card.memory_total_bytes)
        for card in cards
        if card.memory_used_bytes is not None and card.memory_total_bytes
    ]
    return (sum(used for used, _ in known), sum(total for _, total in known)) if known else None
