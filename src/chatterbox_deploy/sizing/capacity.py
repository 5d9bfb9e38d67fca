"""Whether a fleet fits the machine: its GPUs' memory, its CPUs. Decides; asks nobody."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from chatterbox_deploy.fleet import Fleet
    from chatterbox_deploy.gpu.query import Gpu


def problems(fleet: Fleet, gpus: Sequence[Gpu], cpus: Collection[int] | None) -> list[str]:
    """Why the fleet cannot run on these GPUs and CPUs; a GPU that is not among them is not judged."""
    return [*_memory_problems(fleet, gpus), *_cpu_problems(fleet, cpus)]


def _memory_problems(fleet: Fleet, gpus: Sequence[Gpu]) -> list[str]:
    """Of instances on one GPU each: of two, how much of a model each holds is not known here."""
    needed = fleet.service.gpu_memory_bytes
    if needed is None:
        return []
    count = Counter(instance.gpus[0] for instance in fleet.instances if len(instance.gpus) == 1)
    found = {key: gpu for gpu in gpus for key in (gpu.index, gpu.uuid)}
    return [
        f"gpus.{key}: {many} x {gigabytes(needed)} of GPU memory are more than its {gigabytes(there)}, which hold "
        f"{there // needed}; if an instance needs less, say so (server.gpu_memory_mb)"
        for key, many in count.items()
        if key in found and (there := found[key].memory_bytes) is not None and many * needed > there
    ]


def _cpu_problems(fleet: Fleet, cpus: Collection[int] | None) -> list[str]:
    wanted = {cpu for instance in fleet.instances for cpu in instance.cpus or ()}
    if cpus is None or not wanted or wanted <= set(cpus):
        return []
    width = len(fleet.instances[0].cpus or ())
    return [
        f"unit.cpus_per_instance: {len(fleet.instances)} x {width} CPUs are 0 to {max(wanted)}, and this machine has "
        f"{len(set(cpus))}, up to {max(cpus, default=0)}"
    ]


def gigabytes(size_bytes: int) -> str:
    """``16.4 GB``."""
    return f"{size_bytes / 1e9:.1f} GB"
