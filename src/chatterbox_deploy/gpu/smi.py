"""What ``nvidia-smi -q -x`` prints, of drivers old and new, as cards. Runs nothing, and fetches nothing.

Where it says no number with its unit (but ``N/A``, ``[N/A]``, ``Unknown Error``, ``Insufficient Permissions``), nobody
knows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree.ElementTree import TreeBuilder
from xml.parsers import expat

from chatterbox_deploy.errors import CaptureError
from chatterbox_deploy.gpu.cards import SLOWDOWNS, Card, Process

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

ASK_ARGV = ("nvidia-smi", "-q", "-x")
_MEBIBYTE = 2**20
_ROOT = "nvidia_smi_log"
_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(MiB|%|C|W|MHz)\s*")
_P_STATE = re.compile(r"P(?:[0-9]|1[0-5])")
_UNSAID = re.compile(
    r"\[?(?:N/A|Unknown Error|Insufficient Permissions|GPU is lost|Not Supported|Unknown)\]?", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Capture:
    """One run of nvidia-smi."""

    cards: tuple[Card, ...]
    taken: str | None
    """When, in the machine's own words."""

    attached: int | None
    """GPUs of the machine. More than ``cards``: it was asked about some of them (``-i``), whose indices nobody told."""


def parse(content: bytes, *, source: str) -> Capture:
    """What it printed; ``source`` names it in messages.

    Raises:
        CaptureError: it is something else, or not all of it.
    """
    root = _parse(content, source)
    gpus = root.findall("gpu")
    if root.tag != _ROOT or not gpus:
        what = f"it begins with <{root.tag}>" if root.tag != _ROOT else "it tells of no GPU"
        raise CaptureError(source, what)
    driver = _said(root, "driver_version")
    attached = _said(root, "attached_gpus") or ""
    return Capture(
        cards=tuple(_card(str(index), gpu, driver) for index, gpu in enumerate(gpus)),
        taken=_said(root, "timestamp"),
        attached=int(attached) if attached.isdecimal() else None,
    )


def _parse(content: bytes, source: str) -> Element:
    """The tree. Its DOCTYPE names a file that nobody reads; one that declares entities is refused, as bombs are."""
    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data

    def refuse(name: str, *_: object) -> None:
        raise CaptureError(source, f"it declares an entity ({name}), which nvidia-smi never does")

    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(content, True)
        return builder.close()
    except expat.ExpatError as error:
        how = f"it is no XML, or not all of it ({error})"
        raise CaptureError(source, how) from None
    except (LookupError, ValueError) as error:
        # An encoding that nobody knows, or that takes several bytes.
        raise CaptureError(source, str(error)) from None


def _card(index: str, gpu: Element, driver: str | None) -> Card:
    # Since driver 535 the GPU's own power stands apart from that of its memory and its module.
    power = "power_readings" if gpu.find("gpu_power_readings") is None else "gpu_power_readings"
    p_state = _said(gpu, "performance_state") or ""
    mig = _said(gpu, "mig_mode/current_mig")
    return Card(
        index=index,
        uuid=_said(gpu, "uuid") or "",
        name=_said(gpu, "product_name") or "a GPU without a name",
        bus_id=(gpu.get("id") or "").upper() or None,
        memory_total_bytes=_bytes(gpu, "fb_memory_usage/total"),
        memory_used_bytes=_bytes(gpu, "fb_memory_usage/used"),
        memory_free_bytes=_bytes(gpu, "fb_memory_usage/free"),
        utilisation_percent=_number(gpu, "utilization/gpu_util", "%"),
        memory_busy_percent=_number(gpu, "utilization/memory_util", "%"),
        temperature_c=_number(gpu, "temperature/gpu_temp", "C"),
        power_w=_first(gpu, power, ("power_draw", "average_power_draw", "instant_power_draw"), "W"),
        power_limit_w=_first(gpu, power, ("current_power_limit", "enforced_power_limit", "power_limit"), "W"),
        p_state=p_state if _P_STATE.fullmatch(p_state) else None,
        sm_clock_mhz=_whole(gpu, "clocks/sm_clock", "MHz"),
        sm_clock_max_mhz=_whole(gpu, "max_clocks/sm_clock", "MHz"),
        memory_clock_mhz=_whole(gpu, "clocks/mem_clock", "MHz"),
        throttled_by=_throttled_by(gpu),
        processes=_processes(gpu),
        mig={"Enabled": True, "Disabled": False}.get(mig or ""),
        compute_mode=_said(gpu, "compute_mode"),
        driver=driver,
    )


def _said(element: Element, path: str) -> str | None:
    """Its text, unless that says that nobody knows."""
    text = (element.findtext(path) or "").strip()
    return None if not text or _UNSAID.fullmatch(text) else text


def _number(element: Element, path: str, unit: str) -> float | None:
    found = _NUMBER.fullmatch(element.findtext(path) or "")
    return float(found[1]) if found and found[2] == unit else None


def _whole(element: Element, path: str, unit: str) -> int | None:
    number = _number(element, path, unit)
    return None if number is None else round(number)


def _bytes(element: Element, path: str) -> int | None:
    mebibytes = _number(element, path, "MiB")
    return None if mebibytes is None else round(mebibytes * _MEBIBYTE)


def _first(gpu: Element, section: str, names: tuple[str, ...], unit: str) -> float | None:
    """Of several names for the same thing, of several drivers, the first that says something."""
    numbers = (_number(gpu, f"{section}/{name}", unit) for name in names)
    return next((number for number in numbers if number is not None), None)


def _throttled_by(gpu: Element) -> tuple[str, ...] | None:
    """Their names have had two beginnings: throttle before driver 535, event since."""
    said = {
        reason: state
        for word in ("event", "throttle")
        for reason in SLOWDOWNS
        if (state := _said(gpu, f"clocks_{word}_reasons/clocks_{word}_reason_{reason}")) in ("Active", "Not Active")
    }
    return tuple(reason for reason in SLOWDOWNS if said.get(reason) == "Active") if said else None


def _processes(gpu: Element) -> tuple[Process, ...] | None:
    told = gpu.find("processes")
    if told is None or (told.text or "").strip():
        return None
    found = (_process(each) for each in told.findall("process_info"))
    return tuple(process for process in found if process is not None)


def _process(told: Element) -> Process | None:
    pid = _said(told, "pid") or ""
    if not pid.isdecimal():
        return None
    return Process(
        pid=int(pid),
        name=_said(told, "process_name"),
        kind=_said(told, "type"),
        memory_bytes=_bytes(told, "used_memory"),
    )
