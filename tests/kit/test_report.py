"""The report as a value, as Markdown, as JSON, and by the command line."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from chatterbox_deploy.cli import main
from chatterbox_deploy.gpu import usage
from chatterbox_deploy.nginx import Block
from chatterbox_deploy.report import markdown, summary
from support.situations import MIB, SEED, card, everything, fleet_file, machine, process, seed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from click.testing import Result

    from chatterbox_deploy.report.situation import Situation

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLE = DOCS / "report/two-rtx-3090.md"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["report", *arguments])


def test_the_figures_of_the_two_cards_are_the_ones_that_were_read_off_them() -> None:
    made = summary.make(seed())

    shares = [gpu.card.memory_used_bytes for gpu in made.gpus]
    assert shares == [9_126 * MIB, 64 * MIB]
    assert (made.used_bytes, made.total_bytes) == (9_190 * MIB, 49_152 * MIB)
    # Who said 18.5 % left out GPU 1's 64 MiB, and did not round: 9,126 of 49,152 are 18.57 %.
    assert made.used_percent == pytest.approx(18.697, abs=0.001)
    assert [(finding.name, finding.gpus) for finding in made.findings] == [
        ("one-gpu-takes-all", ("0",)), ("gpu-idle", ("1",)),
    ]  # fmt: skip
    assert made.verdict() == (
        "2 GPUs, 1 of them idle, 18.7 % of all GPU memory in use. 2 findings, 2 of them grave. The proposed fleet.toml "
        "brings 2.00 times the sound per second, as reckoned."
    )


def test_every_byte_of_a_gpu_has_a_holder_or_is_free() -> None:
    for gpu in summary.make(seed()).gpus:
        held = sum(each.memory_bytes or 0 for each in gpu.holders)
        assert held + (gpu.card.memory_free_bytes or 0) == gpu.card.memory_total_bytes


def test_the_example_in_the_docs_is_what_the_command_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DOCS.parent)
    said = run("--from-nvidia-smi", str(SEED.relative_to(DOCS.parent)))

    if os.environ.get("UPDATE_GOLDEN"):
        EXAMPLE.write_text(said.stdout)
    assert said.exit_code == 1
    assert said.stdout == EXAMPLE.read_text()


def test_markdown_tells_everything_and_lets_nobody_write_into_it() -> None:
    text = markdown.markdown(summary.make(everything()))

    for word in ("chatterbox-tts-gpu0.service", "sw\\_power\\_cap", "61 °C", "31 %", "gpu0", "90.0 %", "too far away"):
        assert word.replace("\\_", "_") in text
    assert r"\<b\>\|\`x\`" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    tables = "\n".join(rows)
    assert "| -" in tables  # unknown is a dash
    for line in rows:
        assert len(re.findall(r"(?<!\\)\|", line)) in (4, 5, 6, 8)


def test_commands_are_not_garbled_and_what_others_wrote_is_no_markup() -> None:
    text = markdown.markdown(summary.make(machine(unseen=("`ss -ltnp` | <b>: no `such program", "a `<b>` b"))))

    assert "- `ss -ltnp` \\| \\<b\\>: no \\`such program\n- a `<b>` b\n" in text


def test_one_is_one_and_several_are_listed() -> None:
    idle = card(0)
    file = fleet_file("[gpus]\n0 = 6093\n4 = 6094\n5 = 6096\n6 = 6097\n7 = 6098\n")
    alone = summary.make(machine(idle)).verdict()
    grave = summary.make(machine(card(0, process(1)), fleet_file=file))

    assert alone.startswith("1 GPU, idle, ")
    assert alone.endswith(" 1 finding.")
    assert grave.verdict().startswith("1 GPU, at work, 3.3 % of all GPU memory in use. 1 grave finding. ")
    assert grave.findings[0].what == "fleet.toml is for GPUs 4, 5, 6 and 7, which this machine has not got"
    assert [usage.named(each) for each in (["0"], ["0", "1"])] == ["GPU 0", "GPUs 0 and 1"]


@pytest.mark.parametrize(
    ("name", "options", "begins"),
    [
        ("two.html", (), "<!doctype html>"),
        ("two.json", (), "{"),
        ("two.md", (), "# GPU report"),
        ("two", (), "# GPU report"),
        ("two.html", ("--format", "md"), "# GPU report"),
    ],
)
def test_the_files_name_says_the_format_unless_it_is_given(
    name: str, options: tuple[str, ...], begins: str, tmp_path: Path
) -> None:
    run("--from-nvidia-smi", str(SEED), "-o", str(tmp_path / name), *options)

    assert (tmp_path / name).read_text().startswith(begins)


def test_no_gpu_is_said_to_be_none() -> None:
    text = markdown.markdown(summary.make(machine(told_by="NVML", unseen=("the moon: too far away",))))

    assert text == (
        "# GPU report\n\nNo GPU is known here (asked: NVML). Nothing is wrong that was looked at.\n\n"
        "## Findings\n\nNone, of what was looked at.\n\n## Not looked at\n\n- the moon: too far away\n"
    )
    assert summary.make(machine()).as_json()["gpus"] == []


def test_without_a_gpu_the_front_is_looked_at_all_the_same() -> None:
    espeak = fleet_file("[gpus]\n0 = 6093\n1 = 6094\n[server]\nengine = 'espeak'\n")
    bad = Block("/etc/nginx/nginx.conf", "tts", (6093, 6094), least_conn=True, zone=False)

    text = markdown.markdown(summary.make(machine(fleet_file=espeak, upstreams=(bad,))))

    assert "`least-conn-without-zone`" in text
    assert "## Proposal" not in text


# JSON, by what the documentation says of it.

TYPES: dict[str, tuple[type, ...]] = {
    "text": (str,), "number": (int, float), "integer": (int,), "boolean": (bool,), "null": (type(None),),
}  # fmt: skip


def documented() -> dict[str, str]:
    """Path → types, from the table in docs/report.md."""
    _, _, section = (DOCS / "report.md").read_text().partition("\n## JSON\n")
    return dict(re.findall(r"^\| `([^`]+)` \| ([a-z ]+) \|", section, re.MULTILINE))


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is neither object nor list, by its path; lists of values by theirs."""
    if isinstance(value, dict) and value and path not in OPEN:
        for key, each in value.items():
            yield from leaves(each, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list) and any(isinstance(each, dict | list) for each in value):
        for each in value:
            yield from leaves(each, f"{path}[]")
    else:
        yield path, value


OPEN = ("requests.answered", "proposal.now", "proposal.then", "proposal.by_gpu_now", "proposal.by_gpu_then")
"""Objects whose keys are names of instances or indices of GPUs."""


def is_of(value: Any, types: str) -> bool:
    for word in types.split(" or "):
        if word.startswith("list of "):
            inner = word.removeprefix("list of ").removesuffix("s")
            if isinstance(value, list) and all(isinstance(each, TYPES[inner]) for each in value):
                return True
        elif word == "object":
            if isinstance(value, dict):
                return True
        elif isinstance(value, TYPES[word]) and (word == "boolean" or not isinstance(value, bool)):
            return True
    return False


@pytest.mark.parametrize("situation", [seed(), everything(), machine(), machine(card(0))], ids=list("1234"))
def test_json_is_as_the_documentation_says(situation: Situation) -> None:
    told = json.loads(json.dumps(summary.make(situation).as_json()))
    known = documented()

    wrong = [(path, value) for path, value in leaves(told) if not is_of(value, known.get(path, "nothing at all"))]

    assert wrong == [], known


def test_the_documentation_says_nothing_of_json_that_is_not_there() -> None:
    situations = (everything(), seed(), machine(), machine(card(0)))
    told = {path for each in situations for path, _ in leaves(json.loads(json.dumps(summary.make(each).as_json())))}

    assert documented().keys() - told == set()


# The command line.


def test_json_is_whole_and_unknown_is_null() -> None:
    told = json.loads(run("--from-nvidia-smi", str(SEED), "--format", "json").stdout)

    assert told["memory"]["used_percent"] == pytest.approx(18.697, abs=0.001)
    assert told["gpus"][1]["sm_active_percent"] is None
    assert told["proposal"]["path"] is None


def test_what_is_well_exits_0_and_what_wastes_a_gpu_exits_1(tmp_path: Path) -> None:
    capture = tmp_path / "gpus.xml"
    one = re.sub(r'\t<gpu id="00000000:02.*</gpu>\n', "", SEED.read_text(), flags=re.DOTALL)
    capture.write_text(one.replace("<attached_gpus>2", "<attached_gpus>1"))

    assert run("--from-nvidia-smi", str(capture)).exit_code == 0
    assert run("--from-nvidia-smi", str(SEED)).exit_code == 1


def test_a_capture_of_some_gpus_says_that_there_are_more(tmp_path: Path) -> None:
    capture = tmp_path / "gpus.xml"
    capture.write_text(re.sub(r'\t<gpu id="00000000:02.*</gpu>\n', "", SEED.read_text(), flags=re.DOTALL))

    assert "2 GPUs are in that machine, and the capture tells of 1" in run("--from-nvidia-smi", str(capture)).stdout


def test_a_fleet_file_beside_a_capture_is_what_the_proposal_changes(tmp_path: Path) -> None:
    (tmp_path / "fleet.toml").write_text("[gpus]\n0 = 6093\n")

    said = run(str(tmp_path / "fleet.toml"), "--from-nvidia-smi", str(SEED), "--format", "json")

    assert "+1 = 6094" in json.loads(said.stdout)["proposal"]["diff"].splitlines()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file or directory"),
        ("==============NVSMI LOG==============", "it is no XML"),
        ("<html/>", "it begins with <html>"),
    ],
)
def test_a_capture_that_is_none_exits_2_and_says_what_it_has_to_be(
    tmp_path: Path, content: str | None, says: str
) -> None:
    capture = tmp_path / "gpus.xml"
    if content is not None:
        capture.write_text(content)

    said = run("--from-nvidia-smi", str(capture))

    assert (said.exit_code, said.stdout) == (2, "")
    assert says in said.stderr
    assert "`nvidia-smi -q -x`" in said.stderr


def test_a_fleet_file_that_is_named_and_wrong_exits_2(tmp_path: Path) -> None:
    assert run(str(tmp_path / "none.toml")).exit_code == 2


def test_the_report_goes_to_a_file_if_one_is_named(tmp_path: Path) -> None:
    said = run("--from-nvidia-smi", str(SEED), "--format", "html", "--output", str(tmp_path / "a.html"))

    assert (said.exit_code, said.stdout) == (1, "")
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    assert run("--from-nvidia-smi", str(SEED), "--output", str(tmp_path / "none/a.md")).exit_code == 2


def test_this_machine_can_be_looked_at_whatever_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = run("--format", "json")

    assert said.exit_code in (0, 1), said.output
    assert isinstance(json.loads(said.stdout)["verdict"], str)
