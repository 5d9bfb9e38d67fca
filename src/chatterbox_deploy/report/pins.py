"""Where code or a setting names a GPU. Runs nothing, and reads no file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatterbox_deploy.gpu.cards import Card

_NAMED = re.compile(
    r"""
      ["'](?P<word>cuda:(?:[0-9]+|\{[^}]*\}))          # "cuda:0", f"cuda:{gpu}"
    | \.cuda\(\s*(?P<call>[0-9]+)\s*\)                   # model.cuda(1)
    | set_device\(\s*["']?(?:cuda:)?(?P<set>[0-9]+)      # torch.cuda.set_device(0)
    | environ(?:\[|\.setdefault\()\s*["']CUDA_VISIBLE_DEVICES["']\s*(?:\]\s*=|,)\s*["'](?P<visible>[^"']*)
    """,
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of code that names a GPU by a number of its own."""

    path: str
    number: int
    """From 1."""

    text: str
    device: str
    """``cuda:0``; ``cuda:{…}`` for one that is reckoned; ``CUDA_VISIBLE_DEVICES=0`` for one that hides the others."""


def find(code: str, path: str) -> tuple[Line, ...]:
    """Lines of Python code that name a GPU; comments do not."""
    found: list[Line] = []
    for number, line in enumerate(code.splitlines(), 1):
        if line.lstrip().startswith("#") or not (match := _NAMED.search(line)):
            continue
        index = match["call"] or match["set"]
        device = match["word"] or (f"cuda:{index}" if index else f"CUDA_VISIBLE_DEVICES={match['visible']}")
        found.append(Line(path, number, line.strip(), device))
    return tuple(found)


def pinned_to(visible: str, cards: Sequence[Card]) -> str | None:
    """Index of the one GPU that ``CUDA_VISIBLE_DEVICES`` leaves; ``None`` where that is none of them, or several.

    An index counts by bus id, as with ``CUDA_DEVICE_ORDER=PCI_BUS_ID``; of a UUID the beginning is enough for CUDA.
    """
    words = [word.strip() for word in visible.split(",")]
    if len(words) != 1 or not words[0]:
        return None
    return next((card.index for card in cards if words[0] == card.index or _is_short_for(words[0], card.uuid)), None)


def _is_short_for(word: str, uuid: str) -> bool:
    return word.startswith("GPU-") and len(word) > len("GPU-") and uuid.startswith(word)
