"""nvidia-smi -q -x, as drivers old and new print it, whole or not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatterbox_deploy.errors import CaptureError
from chatterbox_deploy.gpu import smi
from chatterbox_deploy.gpu.cards import SLOWDOWNS, Card, Process

CHECKOUT = Path(__file__).parents[2]
SEED = (CHECKOUT / "docs/report/two-rtx-3090.xml").read_bytes()
RECORDED = sorted((CHECKOUT / "tests/recorded").glob("nvidia-smi.*.xml"))
MIB = 2**20


def parse(text: str | bytes) -> tuple[Card, ...]:
    return smi.parse(text.encode() if isinstance(text, str) else text, source="a.xml").cards


def one(inside: str) -> Card:
    """A GPU of which only this is told."""
    (card,) = parse(f'<?xml version="1.0" ?><nvidia_smi_log><gpu id="0:1:0.0">{inside}</gpu></nvidia_smi_log>')
    return card


def test_two_cards_of_which_one_does_all_the_work_are_read() -> None:
    capture = smi.parse(SEED, source="a.xml")

    assert (capture.taken, capture.attached) == ("Mon Sep 15 10:00:00 2025", 2)
    assert capture.cards[0] == Card(
        index="0",
        uuid="GPU-3a1f0c52-7b6e-4d10-9a55-0c1d2e3f4a5b",
        name="NVIDIA GeForce RTX 3090",
        bus_id="00000000:01:00.0",
        memory_total_bytes=24_576 * MIB,
        memory_used_bytes=9_126 * MIB,
        memory_free_bytes=15_134 * MIB,
        utilisation_percent=71,
        memory_busy_percent=22,
        temperature_c=62,
        power_w=171.25,
        power_limit_w=350,
        p_state="P2",
        sm_clock_mhz=1755,
        sm_clock_max_mhz=2100,
        memory_clock_mhz=9501,
        throttled_by=(),
        processes=(
            Process(pid=1407, name="/usr/lib/xorg/Xorg", kind="G", memory_bytes=46 * MIB),
            Process(pid=48211, name="/srv/tts/venv/bin/python", kind="C", memory_bytes=9_062 * MIB),
        ),
        compute_mode="Default",
        driver="550.54.14",
    )
    second = capture.cards[1]
    assert (second.index, second.memory_used_bytes, second.p_state) == ("1", 64 * MIB, "P8")


@pytest.mark.parametrize("unsaid", ["N/A", "[N/A]", "Unknown Error", "[Unknown Error]", "Insufficient Permissions", "",
                                    "GPU is lost", "�!", "NaN W", "-3 C", "12 parsecs"])  # fmt: skip
def test_what_no_field_says_is_unknown_in_every_field(unsaid: str) -> None:
    silent = re.sub(r"(<(?!process_name|uuid|product_name)(\w+)>)[^<\n]+(</\2>)", rf"\g<1>{unsaid}\g<3>", SEED.decode())

    for card in parse(silent):
        known = {name for name in Card.__slots__ if getattr(card, name) is not None}
        # Whatever words a driver finds for these, they are passed on.
        assert known - {"driver", "compute_mode"} == {"index", "uuid", "name", "bus_id", "processes"}
        assert card.processes == ()


@given(data=st.data())
def test_one_field_that_is_not_known_costs_no_other(data: st.DataObject) -> None:
    text = SEED.decode()
    fields = [found for found in re.finditer(r"(<(\w+)>)([^<\n]+)(</\2>)", text) if found[2] != "pid"]
    field = data.draw(st.sampled_from(fields))
    silent = f"{text[: field.start()]}{field[1]}[N/A]{field[4]}{text[field.end() :]}"

    changed = sum(
        getattr(before, name) != getattr(after, name)
        for before, after in zip(parse(SEED), parse(silent), strict=True)
        for name in Card.__slots__
    )

    # The driver's version is told with each GPU.
    assert changed <= (2 if field[2] == "driver_version" else 1)


@pytest.mark.parametrize(
    ("inside", "field", "value"),
    [
        # Drivers before 535, from 535, and from 560.
        ("<power_readings><power_draw>20.5 W</power_draw><power_limit>350 W</power_limit>"
         "<enforced_power_limit>280.00 W</enforced_power_limit></power_readings>", "power_limit_w", 280),
        ("<power_readings><power_draw>20.5 W</power_draw></power_readings>", "power_w", 20.5),
        ("<gpu_power_readings><power_draw>20.5 W</power_draw></gpu_power_readings>", "power_w", 20.5),
        ("<gpu_power_readings><average_power_draw>77 W</average_power_draw><instant_power_draw>91 W"
         "</instant_power_draw></gpu_power_readings><module_power_readings><power_draw>9 W</power_draw>"
         "</module_power_readings>", "power_w", 77),
        ("<gpu_power_readings><average_power_draw>N/A</average_power_draw><instant_power_draw>91 W"
         "</instant_power_draw></gpu_power_readings>", "power_w", 91),
        ("<clocks_throttle_reasons><clocks_throttle_reason_gpu_idle>Active</clocks_throttle_reason_gpu_idle>"
         "<clocks_throttle_reason_sw_thermal_slowdown>Active</clocks_throttle_reason_sw_thermal_slowdown>"
         "</clocks_throttle_reasons>", "throttled_by", ("sw_thermal_slowdown",)),
        ("<clocks_event_reasons><clocks_event_reason_sw_power_cap>Not Active</clocks_event_reason_sw_power_cap>"
         "<clocks_event_reason_sync_boost>Active</clocks_event_reason_sync_boost></clocks_event_reasons>",
         "throttled_by", ()),
        ("<clocks_throttle_reasons>N/A</clocks_throttle_reasons>", "throttled_by", None),
        ("<mig_mode><current_mig>Enabled</current_mig></mig_mode>", "mig", True),
        ("<mig_mode><current_mig>Disabled</current_mig></mig_mode>", "mig", False),
        ("<processes>\n\t\t</processes>", "processes", ()),
        ("<processes>N/A</processes>", "processes", None),
        ("<processes><process_info><pid>12</pid><type>M+C</type><used_memory>[N/A]</used_memory></process_info>"
         "<process_info><pid>N/A</pid></process_info></processes>", "processes", (Process(pid=12, kind="M+C"),)),
        ("<performance_state>P12</performance_state>", "p_state", "P12"),
    ],
)  # fmt: skip
def test_drivers_old_and_new_are_understood(inside: str, field: str, value: object) -> None:
    assert getattr(one(inside), field) == value


@pytest.mark.parametrize("reason", SLOWDOWNS)
def test_each_reason_that_slows_a_gpu_down_is_told_by_its_name(reason: str) -> None:
    tag = f"clocks_event_reason_{reason}"

    assert one(f"<clocks_event_reasons><{tag}>Active</{tag}></clocks_event_reasons>").throttled_by == (reason,)


BOMB = """<?xml version="1.0"?>
<!DOCTYPE nvidia_smi_log [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>
<nvidia_smi_log><gpu id="0"><uuid>&b;</uuid></gpu></nvidia_smi_log>"""
FILE = """<?xml version="1.0"?>
<!DOCTYPE nvidia_smi_log [<!ENTITY file SYSTEM "file:///etc/passwd">]>
<nvidia_smi_log><gpu id="0"><uuid>&file;</uuid></gpu></nvidia_smi_log>"""
PARAMETER = """<?xml version="1.0"?>
<!DOCTYPE nvidia_smi_log [<!ENTITY % more SYSTEM "file:///etc/passwd"> %more;]>
<nvidia_smi_log/>"""


@pytest.mark.parametrize(
    ("content", "how"),
    [
        (b'<?xml version="1.0" encoding="utf-7"?><nvidia_smi_log/>', "multi-byte encodings are not supported"),
        (b"", "it is no XML, or not all of it (no element found: line 1, column 0)"),
        (b"\x00\xff\x13garbage", "it is no XML, or not all of it (not well-formed"),
        (b"==============NVSMI LOG==============\n", "it is no XML, or not all of it (not well-formed"),
        (SEED[:4000], "it is no XML, or not all of it"),
        (SEED.replace(b"</nvidia_smi_log>", b""), "it is no XML, or not all of it (no element found"),
        (b"<html><body>404</body></html>", "it begins with <html>"),
        (b"<nvidia_smi_log><attached_gpus>0</attached_gpus></nvidia_smi_log>", "it tells of no GPU"),
        (BOMB.encode(), "it declares an entity (a), which nvidia-smi never does"),
        (FILE.encode(), "it declares an entity (file), which nvidia-smi never does"),
        (PARAMETER.encode(), "it declares an entity (more), which nvidia-smi never does"),
        (b'<?xml version="1.0" encoding="klingon"?><nvidia_smi_log/>', "unknown encoding: klingon"),
        (b"<nvidia_smi_log><gpu>&unknown;</gpu></nvidia_smi_log>", "it is no XML, or not all of it (undefined entity"),
    ],
)  # fmt: skip
def test_what_is_something_else_or_not_all_of_it_is_refused_with_the_reason(content: bytes, how: str) -> None:
    with pytest.raises(CaptureError) as refused:
        smi.parse(content, source="a.xml")

    said = str(refused.value)
    assert said.startswith(f"cannot read a.xml: {how}")
    assert said.endswith("it has to be what `nvidia-smi -q -x` printed, whole")


@given(end=st.integers(0, len(SEED.rstrip()) - 1))
def test_what_was_cut_off_anywhere_is_never_taken_for_the_whole(end: int) -> None:
    with pytest.raises(CaptureError):
        smi.parse(SEED[:end], source="a.xml")


@given(content=st.binary(max_size=300))
def test_no_bytes_do_more_than_be_refused(content: bytes) -> None:
    for whole in (content, SEED[:600] + content + SEED[600:]):
        try:
            smi.parse(whole, source="a.xml")
        except CaptureError:
            continue


def test_a_capture_that_windows_wrote_is_read() -> None:
    assert parse(SEED.decode().encode("utf-16")) == parse(SEED)


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_what_machines_printed_is_understood(path: Path) -> None:
    for card in parse(path.read_bytes()):
        assert card.uuid.startswith("GPU-")
        assert card.memory_total_bytes
        assert card.memory_used_bytes is not None
        assert card.utilisation_percent is not None
        assert card.power_w is not None
        assert card.throttled_by is not None
        assert card.processes is not None
