"""What is known of a GPU at one moment, whoever told: NVML, ``nvidia-smi -q -x`` live or kept. Asks nobody."""

from __future__ import annotations

from dataclasses import dataclass

SLOWDOWNS = (
    "sw_power_cap", "hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown",
    "board_limit", "reliability",
)  # fmt: skip
"""Clock event reasons that slow a GPU down against an operator's will, as nvidia-smi names them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process that holds memory of a GPU."""

    pid: int
    name: str | None = None
    """Its executable or command line, as far as the teller may see it."""
    kind: str | None = None
    """As nvidia-smi says it: ``C`` computes, ``G`` draws, ``M+C`` computes as a client of an MPS daemon."""
    memory_bytes: int | None = None
    """``None`` where the driver does not say (MIG, WSL, another container); never 0 for unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One GPU. ``None`` is what nobody knows, such as ``[N/A]`` of nvidia-smi; never 0."""

    index: str
    """As nvidia-smi counts: by bus id."""
    uuid: str
    name: str
    bus_id: str | None = None
    """As ``00000000:3B:00.0``."""
    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None
    """By all processes, and by the driver."""
    memory_free_bytes: int | None = None
    """Less than the rest: the driver keeps some for itself."""
    utilisation_percent: float | None = None
    """Share of the last sample in which any kernel ran: a GPU of tiny kernels reads 100 and is nearly idle."""
    memory_busy_percent: float | None = None
    """Share of the last sample in which device memory was read or written."""
    sm_active_percent: float | None = None
    """Share of multiprocessors with a warp on them, averaged (GPM; Hopper and later, where the driver tells)."""
    temperature_c: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    p_state: str | None = None
    """``P0`` (most) to ``P15``."""
    sm_clock_mhz: int | None = None
    sm_clock_max_mhz: int | None = None
    memory_clock_mhz: int | None = None
    throttled_by: tuple[str, ...] | None = None
    """Those of ``SLOWDOWNS`` that are active; ``gpu_idle`` and what an operator has set are none. Empty: none is."""
    processes: tuple[Process, ...] | None = None
    """Empty: none holds memory."""
    mig: bool | None = None
    compute_mode: str | None = None
    driver: str | None = None
    """Version of the driver; of the machine, told with each of its GPUs."""
