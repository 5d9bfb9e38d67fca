"""Ask NVIDIA's driver about each GPU through its management library (NVML). Decides nothing, changes nothing.

What the driver does not support, or does not tell us, is unknown: that field alone is ``None``.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pynvml

from chatterbox_deploy.gpu.cards import SLOWDOWNS, Card, Process

if TYPE_CHECKING:
    from collections.abc import Iterable

WATCH_S = 0.2
"""Between the two samples that SM activity is from; nvml.h asks for 100 ms at least."""

# Constants of nvml.h. `pynvml` has them, too, yet under names that came and went with its versions.
_SM_UTILISATION = 2  # NVML_GPM_METRIC_SM_UTIL
_SENSOR, _CLOCK_SM, _CLOCK_MEMORY = 0, 1, 2
_MEMORY_V2 = 0x02000028
_COMPUTE_MODES = {0: "Default", 1: "Exclusive_Thread", 2: "Prohibited", 3: "Exclusive_Process"}
_P_STATES = range(16)
_REASON_BITS = dict(zip(SLOWDOWNS, (0x4, 0x8, 0x20, 0x40, 0x80, 0x200, 0x400), strict=True))


def read(library: Any = pynvml, *, watch_s: float = WATCH_S) -> tuple[Card, ...] | None:
    """Each GPU at this moment, in nvidia-smi's order (by bus id); ``None`` without a library, a driver or a GPU.

    Takes ``watch_s`` where a GPU tells its SM activity. ``library`` has the functions of ``pynvml``: the module itself,
    or a recording of what they answered.
    """
    try:
        library.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return _read(_Driver(library), watch_s) or None
    finally:
        with suppress(pynvml.NVMLError):
            library.nvmlShutdown()


@dataclass(frozen=True, slots=True)
class _Driver:
    """NVML, asked one function at a time."""

    library: Any

    def ask(self, function: str, *arguments: Any) -> Any:
        """Its answer; ``None`` where it is not supported, not permitted, or not in this driver."""
        try:
            return getattr(self.library, function)(*arguments)
        # Also a function whose structures this driver has in other versions only, and a name that is no text.
        except (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError, AttributeError, UnicodeDecodeError):
            return None

    def find(self, index: int) -> Any:
        """The handle of a GPU; a ``_Lost`` where there is none."""
        try:
            return self.library.nvmlDeviceGetHandleByIndex(index)
        except pynvml.NVMLError as error:
            return _Lost(str(error))


@dataclass(frozen=True, slots=True)
class _Lost:
    """A GPU that fell off the bus, or that is not ours to look at."""

    why: str


def _read(driver: _Driver, watch_s: float) -> tuple[Card, ...]:
    devices = [driver.find(index) for index in range(driver.ask("nvmlDeviceGetCount") or 0)]
    version = driver.ask("nvmlSystemGetDriverVersion")
    begun = [None if isinstance(device, _Lost) else _sample(driver, device) for device in devices]
    if any(sample is not None for sample in begun):
        time.sleep(watch_s)
    return tuple(
        Card(index=str(index), uuid="", name=f"a GPU that does not answer ({device.why})", driver=version)
        if isinstance(device, _Lost)
        else _card(driver, index, device, _sm_active(driver, device, sample), version)
        for index, (device, sample) in enumerate(zip(devices, begun, strict=True))
    )


def _card(driver: _Driver, index: int, device: Any, sm_active: float | None, version: str | None) -> Card:
    bus = driver.ask("nvmlDeviceGetPciInfo", device)
    # The older count has what the driver keeps for itself among what is used, unlike nvidia-smi.
    memory = driver.ask("nvmlDeviceGetMemoryInfo", device, _MEMORY_V2) or driver.ask("nvmlDeviceGetMemoryInfo", device)
    busy = driver.ask("nvmlDeviceGetUtilizationRates", device)
    p_state = driver.ask("nvmlDeviceGetPerformanceState", device)
    mig = driver.ask("nvmlDeviceGetMigMode", device)
    return Card(
        index=str(index),
        uuid=driver.ask("nvmlDeviceGetUUID", device) or "",
        name=driver.ask("nvmlDeviceGetName", device) or "a GPU without a name",
        bus_id=None if bus is None else str(bus.busId).upper(),
        memory_total_bytes=None if memory is None else memory.total,
        memory_used_bytes=None if memory is None else memory.used,
        memory_free_bytes=None if memory is None else memory.free,
        utilisation_percent=None if busy is None else busy.gpu,
        memory_busy_percent=None if busy is None else busy.memory,
        sm_active_percent=sm_active,
        temperature_c=driver.ask("nvmlDeviceGetTemperature", device, _SENSOR),
        power_w=_watts(driver.ask("nvmlDeviceGetPowerUsage", device)),
        power_limit_w=_watts(driver.ask("nvmlDeviceGetEnforcedPowerLimit", device)),
        p_state=f"P{p_state}" if p_state in _P_STATES else None,
        sm_clock_mhz=driver.ask("nvmlDeviceGetClockInfo", device, _CLOCK_SM),
        sm_clock_max_mhz=driver.ask("nvmlDeviceGetMaxClockInfo", device, _CLOCK_SM),
        memory_clock_mhz=driver.ask("nvmlDeviceGetClockInfo", device, _CLOCK_MEMORY),
        throttled_by=_throttled_by(driver, device),
        processes=_processes(driver, device),
        mig=None if mig is None else bool(mig[0]),
        compute_mode=_COMPUTE_MODES.get(driver.ask("nvmlDeviceGetComputeMode", device)),
        driver=version,
    )


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000


def _throttled_by(driver: _Driver, device: Any) -> tuple[str, ...] | None:
    bits = driver.ask("nvmlDeviceGetCurrentClocksEventReasons", device)
    if bits is None:
        # Its name before driver 535.
        bits = driver.ask("nvmlDeviceGetCurrentClocksThrottleReasons", device)
    return None if bits is None else tuple(reason for reason, bit in _REASON_BITS.items() if bits & bit)


def _processes(driver: _Driver, device: Any) -> tuple[Process, ...] | None:
    lists = {
        kind: driver.ask(f"nvmlDeviceGet{kind}RunningProcesses", device)
        for kind in ("Compute", "Graphics", "MPSCompute")
    }
    if all(told is None for told in lists.values()):
        return None
    told = {kind: {each.pid: each.usedGpuMemory for each in found or ()} for kind, found in lists.items()}
    pids = sorted({pid for of_kind in told.values() for pid in of_kind})
    return tuple(
        Process(
            pid=pid,
            name=driver.ask("nvmlSystemGetProcessName", pid) or None,
            kind=_kind(kind for kind, of_kind in told.items() if pid in of_kind),
            # A process that computes and draws stands in two lists, with all of its memory in each.
            memory_bytes=max(
                (used for of_kind in told.values() if (used := of_kind.get(pid)) is not None), default=None
            ),
        )
        for pid in pids
    )


def _kind(lists: Iterable[str]) -> str:
    """As nvidia-smi says it."""
    stands_in = set(lists)
    if "MPSCompute" in stands_in:
        return "M+C+G" if "Graphics" in stands_in else "M+C"
    return "+".join(letter for kind, letter in (("Compute", "C"), ("Graphics", "G")) if kind in stands_in)


def _sample(driver: _Driver, device: Any) -> Any:
    """A first sample of SM activity; ``None`` before Hopper, and where the driver keeps it from us."""
    supported = driver.ask("nvmlGpmQueryDeviceSupport", device)
    if supported is None or not supported.isSupportedDevice:
        return None
    return _take(driver, device)


def _take(driver: _Driver, device: Any) -> Any:
    sample = driver.ask("nvmlGpmSampleAlloc")
    if sample is None:
        return None
    if driver.ask("nvmlGpmSampleGet", device, sample) is None:
        driver.ask("nvmlGpmSampleFree", sample)
        return None
    return sample


def _sm_active(driver: _Driver, device: Any, begun: Any) -> float | None:
    """Percent, between ``begun`` and now."""
    if begun is None:
        return None
    ended = _take(driver, device)
    try:
        return None if ended is None else _busy_between(driver, begun, ended)
    finally:
        for sample in (begun, ended):
            if sample is not None:
                driver.ask("nvmlGpmSampleFree", sample)


def _busy_between(driver: _Driver, begun: Any, ended: Any) -> float | None:
    wanted = pynvml.c_nvmlGpmMetricsGet_t()
    wanted.version, wanted.numMetrics = 1, 1
    wanted.sample1, wanted.sample2 = begun, ended
    wanted.metrics[0].metricId = _SM_UTILISATION
    got = driver.ask("nvmlGpmMetricsGet", wanted)
    if got is None or got.metrics[0].nvmlReturn != 0:
        return None
    return float(got.metrics[0].value)
