"""What a report proposes for fleet.toml, and what it says that brings."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatterbox_deploy.config import reading
from chatterbox_deploy.report import findings, proposal, summary
from chatterbox_deploy.report.reckoning import Reckoning, Share
from chatterbox_deploy.report.situation import Pin
from chatterbox_deploy.sizing import profile
from chatterbox_deploy.sizing.profile import Point, Profile
from support.situations import MIB, card, fleet_file, machine, process, program, seed

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_deploy.report.proposal import Proposal
    from chatterbox_deploy.report.situation import Situation

BUSY = card(0, process(812))
ONE = fleet_file("[gpus]\n0 = 6093   # by the window\n")
KNOWN = profile.built_in()


def propose(situation: Situation, by: Profile | None = None) -> Proposal | None:
    return summary.make(situation, by).proposal


def changed_lines(made: Proposal | None) -> list[str]:
    assert made is not None
    return [line for line in made.diff.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]


def test_two_cards_of_which_one_does_all_the_work_get_an_instance_each() -> None:
    made = propose(seed())

    assert made is not None
    assert made.path is None
    assert made.text == (
        "[gpus]                  # GPU → port, as nvidia-smi counts\n0 = 6093\n1 = 6094\n\n"
        '[server]\nmodel = "chatterbox"\n'
    )
    assert (made.now, made.then) == ({"0": Share(1, mps=False)}, {"0": Share(1, mps=True), "1": Share(1, mps=True)})
    (change,) = made.changes
    assert change.resolves == ("one-gpu-takes-all", "gpu-idle")
    assert change.reckoned == "instances: 1 on GPU 0 → 1 on each of 2 GPUs"
    assert made.gain == pytest.approx(2)
    # Of another kind of GPU only the ratio carries over.
    assert (made.now_audio_s_per_s, made.then_audio_s_per_s) == (None, None)
    assert "not on NVIDIA GeForce RTX 3090" in made.caveats[0]
    assert made.typed == ("chatterbox-deploy plan fleet.toml", "sudo chatterbox-deploy apply fleet.toml")


def test_an_idle_gpu_is_added_to_the_file_and_the_gain_is_what_was_measured() -> None:
    made = propose(machine(BUSY, card(1), fleet_file=ONE, programs=(program(812, "instance"),), cores=4))

    assert changed_lines(made) == ["+1 = 6094"]
    assert made is not None
    # Of four cores two are for each GPU: no more than one instance beside nginx.
    assert made.gain == pytest.approx(2)
    rate = made.now_audio_s_per_s
    assert rate is not None
    assert rate == pytest.approx(KNOWN["chatterbox"].points[0].audio_s_per_s, rel=0.12)


def test_more_instances_where_there_is_room_and_cores_for_them() -> None:
    made = propose(machine(card(0, process(812)), fleet_file=ONE, programs=(program(812, "instance"),), cores=16))

    assert changed_lines(made) == [
        "-0 = 6093   # by the window",
        "+0 = [6093, 6094, 6096, 6097, 6098, 6099, 6100, 6101]   # by the window",
    ]
    assert made is not None
    assert made.gain == pytest.approx(11.41 / 1.71, rel=0.12)


def test_cores_and_memory_that_are_not_there_limit_what_is_proposed() -> None:
    assert propose(machine(BUSY, fleet_file=ONE, cores=2)) is None
    small = card(0, memory_total_bytes=12_288 * MIB)
    assert changed_lines(propose(machine(small, fleet_file=ONE)))[1] == "+0 = [6093, 6094]   # by the window"
    # Strangers hold most of it.
    held = card(0, process(5, 135_000))
    assert propose(machine(held, fleet_file=ONE, programs=(program(5, "other"),))) is None


def test_few_cores_are_reckoned_in_and_said() -> None:
    made = propose(machine(BUSY, card(1), fleet_file=ONE, programs=(program(812, "instance"),), cores=1))

    assert made is not None
    assert made.gain == pytest.approx(1)
    assert made.caveats == ("CPU cores: 1, instances: 2, and each keeps a core busy; that is reckoned in",)


def test_a_gpu_that_cannot_take_an_instance_gets_none() -> None:
    for unfit in ({"mig": True}, {"compute_mode": "Prohibited"}, {"uuid": ""}, {"memory_total_bytes": 3_000 * MIB}):
        assert propose(machine(BUSY, card(1, **unfit), fleet_file=ONE, cores=2)) is None


def test_ports_that_are_taken_are_left_to_those_who_have_them() -> None:
    made = propose(machine(BUSY, card(1), fleet_file=ONE, cores=4, listening=frozenset({6094, 6096})))

    assert changed_lines(made) == ["+1 = 6097"]


def test_a_file_that_counts_by_uuid_goes_on_to() -> None:
    by_uuid = fleet_file(f"[gpus]\n{BUSY.uuid} = 6093\n")

    assert changed_lines(propose(machine(BUSY, card(1), fleet_file=by_uuid, cores=4))) == [f"+{card(1).uuid} = 6094"]


def test_mps_and_tf32_are_switched_on_in_the_words_of_the_file() -> None:
    file = fleet_file("[gpus]\n0 = [6093, 6094]\n\n[server]\ntf32 = false\n\n[unit]\nmps = false # fear\n")
    both = card(0, process(1), process(2))
    programs = (program(1, "instance"), program(2, "instance"))

    made = propose(machine(both, fleet_file=file, programs=programs, cores=3, tf32={"gpu0-a": False, "gpu0-b": False}))

    assert changed_lines(made) == ["-tf32 = false", "+tf32 = true", "-mps = false # fear", "+mps = true # fear"]
    assert made is not None
    by_mps, tf32 = made.changes
    assert (by_mps.resolves, tf32.resolves, tf32.gain) == (("no-mps",), ("tf32-off",), None)
    assert by_mps.gain == pytest.approx(3.46 / 3.36, rel=0.12)


def test_of_a_server_that_nobody_measured_no_gain_is_stated() -> None:
    own = fleet_file('[gpus]\n0 = 6093\n[server]\ncommand = ["/srv/tts/python", "api.py", "{port}"]\n')

    made = propose(machine(BUSY, card(1), fleet_file=own))

    assert changed_lines(made) == ["+1 = 6094"]
    assert made is not None
    assert (made.gain, made.changes[0].gain) == (None, None)
    assert "nobody measured this server" in made.changes[0].reckoned


def test_a_home_made_server_can_be_kept_as_it_is() -> None:
    kept = program(
        812, unit="tts.service", directory="/srv/tts", ports=(8000,),
        command=("/srv/tts/venv/bin/python", "api.py", "--port=8000", "--map", "{a}"),
    )  # fmt: skip

    made = propose(machine(BUSY, card(1), programs=(kept,), pins=(Pin("tts.service", "0"),), cores=4))

    assert made is not None
    lines = made.text.splitlines()
    assert lines[lines.index('model = "chatterbox"') + 1 :] == [
        "# Or, without model, the server that runs now (tts.service), unchanged, once per GPU;",
        "# {port} stands for its port: a server that takes none cannot run twice.",
        '# command = ["/srv/tts/venv/bin/python", "api.py", "--port={port}", "--map", "{{a}}"]',
        '# directory = "/srv/tts"',
    ]
    with_own = [line.removeprefix("# ") for line in lines if not line.startswith(("model", "# Or", "# {"))]
    assert reading.load("\n".join(with_own), source="f").server.command is not None
    assert "what speaks now is reckoned as so many instances of this server" in made.caveats


def test_secrets_on_a_command_line_stay_there() -> None:
    words = ("python", "tts.py", "--api-key", "s3cret", "--hf-token=hf_abc", "--no-key", "--port", "8000", "-v")

    made = propose(machine(BUSY, card(1), programs=(program(812, command=words, ports=(8000,)),), cores=4))

    assert made is not None
    assert (
        '# command = ["python", "tts.py", "--api-key", "…", "--hf-token=…", "--no-key", "--port", "{port}", "-v"]'
        in made.text.splitlines()
    )


def test_a_fleet_that_uses_all_it_has_is_left_alone() -> None:
    full = fleet_file("[gpus]\n0 = [6093, 6094, 6096, 6097, 6098, 6099, 6100, 6101]\n")

    assert propose(machine(BUSY, fleet_file=full)) is None
    assert propose(machine(BUSY, card(1), fleet_file=fleet_file('[gpus]\n"0,1" = 6093\n'))) is None


def test_a_profile_of_ones_own_machine_is_reckoned_by() -> None:
    points = tuple(
        Point(replicas=count, mps=mps, audio_s_per_s=rate, cores=None)
        for count, mps, rate in ((1, False, 1.0), (2, False, 1.2), (2, True, 1.3))
    )
    mine = Profile(model="chatterbox", machine="NVIDIA H200", source="mine", gpu_memory_bytes=4 * 2**30, t3_share=None,
                   points=points)  # fmt: skip

    made = propose(machine(BUSY, card(1), fleet_file=ONE, cores=4), mine)

    assert made is not None
    assert made.basis == "chatterbox, measured on NVIDIA H200: mine"
    assert made.now_audio_s_per_s == pytest.approx(1.0, rel=0.1)
    assert made.then_audio_s_per_s == pytest.approx(2.0, rel=0.1)


@given(
    gpus=st.integers(1, 4),
    served=st.sets(st.integers(0, 3), min_size=1),
    cores=st.integers(1, 64),
    mps=st.booleans(),
)
def test_what_is_proposed_can_be_applied_keeps_what_is_there_and_brings_more(
    gpus: int, served: set[int], cores: int, mps: bool
) -> None:
    lines = [f"{gpu} = {6093 + 10 * gpu}" for gpu in sorted(served)]
    file = fleet_file("\n".join(["[gpus]", *lines, "[unit]", f"mps = {str(mps).lower()}", ""]))
    situation = machine(*(card(index) for index in range(gpus)), fleet_file=file, cores=cores)
    by = Reckoning(situation, KNOWN["chatterbox"], KNOWN["chatterbox"])

    made = proposal.propose(by, {finding.name for finding in findings.find(situation)})

    if made is None:
        return
    after = reading.load(made.text, source="f")
    before_ports = {port: gpu for gpu, port in file.config.ports()}
    assert before_ports.items() <= {port: gpu for gpu, port in after.ports()}.items()
    assert made.gain is None or made.gain >= 1


def test_the_diff_is_one_that_patch_takes(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    for text in (ONE.text, ONE.text.rstrip("\n")):
        path.write_text(text)
        made = propose(machine(BUSY, card(1), fleet_file=fleet_file(text), cores=4))
        assert made is not None

        subprocess.run(["patch", str(path)], input=made.diff, text=True, check=True, capture_output=True)

        assert path.read_text() == made.text
