"""What NVML tells of GPUs, as values; a driver that tells less, or nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatterbox_deploy.gpu import nvml
from chatterbox_deploy.gpu.cards import Card, Process
from support.recorded_nvml import RecordedNvml

RECORDED = Path(__file__).parents[1] / "recorded"
NOT_SUPPORTED = {"NVMLError": pynvml.NVML_ERROR_NOT_SUPPORTED}

# One GPU of a kind that tells everything; as scripts/gpu/record.py would write it.
EVERYTHING: dict[str, list[Any]] = {
    "nvmlInit()": [None],
    "nvmlDeviceGetCount()": [1],
    "nvmlSystemGetDriverVersion()": ["570.86.15"],
    "nvmlDeviceGetHandleByIndex(0)": ["gpu0"],
    "nvmlDeviceGetUUID(gpu0)": ["GPU-bc4d54bb-bb6a-bd83-0b29-536213c3eaf7"],
    "nvmlDeviceGetName(gpu0)": ["NVIDIA H200"],
    "nvmlDeviceGetPciInfo(gpu0)": [{"busId": "00000000:3b:00.0"}],
    "nvmlDeviceGetMemoryInfo(gpu0, 33554472)": [{"total": 150_000, "reserved": 900, "used": 4_000, "free": 145_100}],
    "nvmlDeviceGetUtilizationRates(gpu0)": [{"gpu": 97, "memory": 12}],
    "nvmlDeviceGetTemperature(gpu0, 0)": [41],
    "nvmlDeviceGetPowerUsage(gpu0)": [231_400],
    "nvmlDeviceGetEnforcedPowerLimit(gpu0)": [700_000],
    "nvmlDeviceGetPerformanceState(gpu0)": [0],
    "nvmlDeviceGetClockInfo(gpu0, 1)": [1980],
    "nvmlDeviceGetMaxClockInfo(gpu0, 1)": [1980],
    "nvmlDeviceGetClockInfo(gpu0, 2)": [3201],
    # Idle, applications clocks and sync boost slow nothing down that an operator has not slowed down.
    "nvmlDeviceGetCurrentClocksEventReasons(gpu0)": [0x1 | 0x2 | 0x10 | 0x4 | 0x40],
    "nvmlDeviceGetComputeRunningProcesses(gpu0)": [
        [{"pid": 812, "usedGpuMemory": 3_000}, {"pid": 900, "usedGpuMemory": None}]
    ],
    "nvmlDeviceGetGraphicsRunningProcesses(gpu0)": [[{"pid": 7, "usedGpuMemory": 200}]],
    "nvmlDeviceGetMPSComputeRunningProcesses(gpu0)": [[{"pid": 813, "usedGpuMemory": 500}]],
    "nvmlSystemGetProcessName(812)": ["/opt/venv/bin/python"],
    "nvmlDeviceGetMigMode(gpu0)": [[0, 0]],
    "nvmlDeviceGetComputeMode(gpu0)": [0],
    "nvmlGpmQueryDeviceSupport(gpu0)": [{"isSupportedDevice": 1}],
    "nvmlGpmSampleAlloc()": [{}],
    "nvmlGpmSampleGet(gpu0)": [{}],
    "nvmlGpmMetricsGet()": [{"metrics": [{"nvmlReturn": 0, "value": 8.5}]}],
}


def read(answers: dict[str, list[Any]]) -> tuple[Card, ...] | None:
    return nvml.read(RecordedNvml(answers), watch_s=0)


def test_a_driver_that_tells_everything_is_heard() -> None:
    assert read(EVERYTHING) == (
        Card(
            index="0",
            uuid="GPU-bc4d54bb-bb6a-bd83-0b29-536213c3eaf7",
            name="NVIDIA H200",
            bus_id="00000000:3B:00.0",
            memory_total_bytes=150_000,
            memory_used_bytes=4_000,
            memory_free_bytes=145_100,
            utilisation_percent=97,
            memory_busy_percent=12,
            sm_active_percent=8.5,
            temperature_c=41,
            power_w=231.4,
            power_limit_w=700,
            p_state="P0",
            sm_clock_mhz=1980,
            sm_clock_max_mhz=1980,
            memory_clock_mhz=3201,
            throttled_by=("sw_power_cap", "hw_thermal_slowdown"),
            processes=(
                Process(pid=7, kind="G", memory_bytes=200),
                Process(pid=812, name="/opt/venv/bin/python", kind="C", memory_bytes=3_000),
                Process(pid=813, kind="M+C", memory_bytes=500),
                Process(pid=900, kind="C"),
            ),
            mig=False,
            compute_mode="Default",
            driver="570.86.15",
        ),
    )


def test_a_driver_that_tells_nothing_of_a_gpu_leaves_everything_unknown() -> None:
    told = {call: EVERYTHING[call] for call in ("nvmlInit()", "nvmlDeviceGetCount()", "nvmlDeviceGetHandleByIndex(0)")}

    assert read(told) == (Card(index="0", uuid="", name="a GPU without a name"),)


@given(silent=st.sets(st.sampled_from([call for call in EVERYTHING if "gpu0" in call or "Gpm" in call])))
def test_whatever_is_not_supported_costs_no_other_field(silent: set[str]) -> None:
    whole, part = (read(answers) for answers in (EVERYTHING, EVERYTHING | {call: [NOT_SUPPORTED] for call in silent}))

    assert whole is not None
    assert part is not None
    assert len(part) == 1
    for name in Card.__slots__:
        seen, known = getattr(part[0], name), getattr(whole[0], name)
        assert seen in (known, None) or name in ("uuid", "name", "processes")


@pytest.mark.parametrize(
    "answers",
    [
        {"nvmlInit()": [{"NVMLError": pynvml.NVML_ERROR_LIBRARY_NOT_FOUND}]},
        {"nvmlInit()": [{"NVMLError": pynvml.NVML_ERROR_DRIVER_NOT_LOADED}]},
        {"nvmlInit()": [None], "nvmlDeviceGetCount()": [0]},
        {"nvmlInit()": [None], "nvmlDeviceGetCount()": [{"NVMLError": pynvml.NVML_ERROR_UNKNOWN}]},
    ],
    ids=["no library", "no driver", "no GPU", "a driver that went away"],
)
def test_without_a_library_a_driver_or_a_gpu_nothing_is_told(answers: dict[str, list[Any]]) -> None:
    assert read(answers) is None


def test_this_machine_can_be_asked_whatever_it_has() -> None:
    assert nvml.read(watch_s=0) is None or isinstance(nvml.read(watch_s=0), tuple)


def test_a_gpu_that_is_lost_is_said_to_be_and_the_others_are_read() -> None:
    lost: dict[str, list[Any]] = {
        "nvmlDeviceGetCount()": [2],
        "nvmlDeviceGetHandleByIndex(0)": [{"NVMLError": pynvml.NVML_ERROR_GPU_IS_LOST}],
        "nvmlDeviceGetHandleByIndex(1)": ["gpu0"],
    }

    first, second = read(EVERYTHING | lost) or ()

    assert (first.index, first.name) == ("0", "a GPU that does not answer (GPU is lost)")
    assert (second.index, second.name, second.temperature_c) == ("1", "NVIDIA H200", 41)


@pytest.mark.parametrize(
    ("answers", "field", "value"),
    [
        # Before driver 510 and 535.
        (
            {"nvmlDeviceGetMemoryInfo(gpu0, 33554472)": [NOT_SUPPORTED],
             "nvmlDeviceGetMemoryInfo(gpu0)": [{"total": 8_000, "used": 70, "free": 7_930}]},
            "memory_used_bytes", 70,
        ),
        (
            {"nvmlDeviceGetCurrentClocksEventReasons(gpu0)": [{"NVMLError": pynvml.NVML_ERROR_FUNCTION_NOT_FOUND}],
             "nvmlDeviceGetCurrentClocksThrottleReasons(gpu0)": [0x20]},
            "throttled_by", ("sw_thermal_slowdown",),
        ),
        ({"nvmlDeviceGetCurrentClocksEventReasons(gpu0)": [0x1]}, "throttled_by", ()),
        # NVML's "unknown" is 32.
        ({"nvmlDeviceGetPerformanceState(gpu0)": [32]}, "p_state", None),
        ({"nvmlDeviceGetMigMode(gpu0)": [[1, 1]]}, "mig", True),
        ({"nvmlDeviceGetComputeMode(gpu0)": [3]}, "compute_mode", "Exclusive_Process"),
        # Nobody holds memory: that is known, and none.
        ({f"nvmlDeviceGet{kind}RunningProcesses(gpu0)": [[]] for kind in ("Compute", "Graphics", "MPSCompute")},
         "processes", ()),
        # A client of an MPS daemon in both lists, a desktop's compositor in two.
        ({"nvmlDeviceGetComputeRunningProcesses(gpu0)": [[{"pid": 813, "usedGpuMemory": 500}]],
          "nvmlDeviceGetGraphicsRunningProcesses(gpu0)": [[]]},
         "processes", (Process(pid=813, kind="M+C", memory_bytes=500),)),
        ({"nvmlDeviceGetComputeRunningProcesses(gpu0)": [[{"pid": 7, "usedGpuMemory": None}]],
          "nvmlDeviceGetMPSComputeRunningProcesses(gpu0)": [[]]},
         "processes", (Process(pid=7, kind="C+G", memory_bytes=200),)),
        # Ampere and before; a sample that fails; a metric that does.
        ({"nvmlGpmQueryDeviceSupport(gpu0)": [{"isSupportedDevice": 0}]}, "sm_active_percent", None),
        ({"nvmlGpmSampleGet(gpu0)": [{}, NOT_SUPPORTED]}, "sm_active_percent", None),
        ({"nvmlGpmMetricsGet()": [{"metrics": [{"nvmlReturn": 3, "value": 0.0}]}]}, "sm_active_percent", None),
    ],
)  # fmt: skip
def test_drivers_old_and_new_and_unwilling_are_understood(
    answers: dict[str, list[Any]], field: str, value: object
) -> None:
    (card,) = read(EVERYTHING | answers) or ()

    assert getattr(card, field) == value


@pytest.mark.parametrize("path", sorted(RECORDED.glob("nvml.*.json")), ids=lambda path: path.stem)
def test_what_machines_answered_is_understood(path: Path) -> None:
    found = nvml.read(RecordedNvml(json.loads(path.read_text())), watch_s=0)

    assert found
    for card in found:
        assert card.uuid.startswith("GPU-")
        assert card.memory_total_bytes
        assert card.memory_used_bytes is not None
        assert card.processes is not None
        assert card.utilisation_percent is not None
        assert card.throttled_by is not None


@pytest.mark.parametrize(
    ("situation", "busy", "kinds"),
    [("idle", range(1), ""), ("loaded", range(90, 101), "C"), ("mps", range(90, 101), "M+C C M+C")],
)
def test_what_an_h200_does_shows_in_its_answers(situation: str, busy: range, kinds: str) -> None:
    answers = json.loads((RECORDED / f"nvml.H200-{situation}.json").read_text())

    (card,) = nvml.read(RecordedNvml(answers), watch_s=0) or ()

    assert card.utilisation_percent in busy
    assert card.sm_active_percent is not None
    assert card.sm_active_percent > 90 or not kinds
    assert " ".join(str(process.kind) for process in card.processes or ()) == kinds
    assert all(process.name in {"python", "nvidia-cuda-mps-server"} for process in card.processes or ())
