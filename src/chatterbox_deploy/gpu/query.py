"""nvidia-smi's words: what to ask it for, and what it answers. Runs nothing."""

from __future__ import annotations

from dataclasses import dataclass

MEBIBYTE = 2**20


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as nvidia-smi tells of it."""

    index: str
    uuid: str
    name: str
    memory_bytes: int | None
    """``None`` where it has none of its own, or the driver does not say; never 0."""

    used_bytes: int | None
    """By all processes, ours among them."""


def ask_argv() -> tuple[str, ...]:
    """Command that prints a line for each GPU (nvidia-smi --help-query-gpu)."""
    return (
        "nvidia-smi",
        "--query-gpu=index,uuid,name,memory.total,memory.used",
        "--format=csv,noheader,nounits",
    )


def parse(stdout: str) -> tuple[Gpu, ...]:
    """What it printed; sizes are MiB. A line that is none of these tells of no GPU."""
    rows = ([field.strip() for field in line.split(",")] for line in stdout.splitlines())
    return tuple(
        Gpu(index, uuid, name, _bytes(total), _bytes(used))
        for index, uuid, name, total, used in (row for row in rows if len(row) == 5)
    )


def _bytes(mebibytes: str) -> int | None:
    return int(mebibytes) * MEBIBYTE if mebibytes.isdigit() else None
