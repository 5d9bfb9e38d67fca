"""What a command writes never takes the place of what it reads."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from chatterbox_deploy.cli import main, outputs
from chatterbox_deploy.cli.outputs import Output

FLEET = "[gpus]\n0 = 16193\n[nginx]\nlisten = '127.0.0.1:16195'\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands run in a directory that holds what they read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CHATTERBOX_API_KEY", raising=False)
    for name in ("s.md", "book.wav", "cap.xml", "texts.txt", "key", "run.json"):
        (tmp_path / name).write_text(f"This is {name}.")
    (tmp_path / "key").write_text("secret")
    (tmp_path / "mine.toml").write_text(FLEET)
    (tmp_path / "link.srt").symlink_to("s.md")
    (tmp_path / "hard.csv").hardlink_to("mine.toml")
    return tmp_path


def run(*argv: str) -> Result:
    return CliRunner().invoke(main, argv)


SPEAK = ("speak", "--url", "http://127.0.0.1:1", "--overwrite")
BENCH = ("bench", "--url", "http://127.0.0.1:1", "--overwrite")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((*SPEAK, "s.md", "-o", "a.wav", "--subtitles", "s.md"), "--subtitles: s.md is BOOK, which"),
        ((*SPEAK, "s.md", "-o", "a.wav", "--subtitles", "link.srt"), "--subtitles: link.srt is BOOK, which"),
        ((*SPEAK, "book.wav", "-o", "book.wav", "--markdown"), "--output: book.wav is BOOK, which"),
        (
            (*SPEAK, "s.md", "-o", "a.wav", "--fleet", "mine.toml", "--subtitles", "mine.toml"),
            "--subtitles: mine.toml is the fleet file, which",
        ),
        (
            (*SPEAK, "s.md", "-o", "a.wav", "--api-key-file", "key", "--subtitles", "../{}/key"),
            "key is the key file, which",
        ),
        (("bench", "mine.toml", "--overwrite", "-o", "mine.toml"), "--output: mine.toml is FLEET, which"),
        ((*BENCH, "--texts", "texts.txt", "-o", "texts.txt"), "--output: texts.txt is --texts, which"),
        ((*BENCH, "--api-key-file", "key", "-o", "key"), "--output: key is --api-key-file, which"),
        ((*BENCH, "-o", "a.html", "--plot", "a.html"), "--plot: a.html is that of --output, too"),
        (("report", "mine.toml", "--output", "mine.toml"), "--output: mine.toml is FLEET, which"),
        (
            ("report", "--from-nvidia-smi", "cap.xml", "--output", "cap.xml"),
            "--output: cap.xml is --from-nvidia-smi, which",
        ),
        (("monitor", "mine.toml", "--once", "--csv", "mine.toml"), "--csv: mine.toml is FLEET, which"),
        (("monitor", "mine.toml", "--once", "--csv", "hard.csv"), "--csv: hard.csv is FLEET, which"),
        (
            ("monitor", "mine.toml", "--once", "--access-log", "a.log", "--csv", "a.log"),
            "--csv: a.log is --access-log, which",
        ),
    ],
)
def test_no_command_writes_over_what_it_reads(argv: tuple[str, ...], said: str, here: Path) -> None:
    before = {path.name: path.read_bytes() for path in here.iterdir()}

    result = run(*(word.format(here.name) for word in argv))

    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert {path.name: path.read_bytes() for path in here.iterdir()} == before


def test_a_run_that_is_kept_already_is_replaced_only_when_that_is_asked_for(here: Path) -> None:
    refused = run(
        "bench", "--url", "http://127.0.0.1:1", "-o", "run.json", "--plot", "nowhere/a.svg", "--scale", "gpus"
    )

    assert refused.exit_code == 2
    assert "--output: run.json is there already; --overwrite replaces it" in refused.stderr
    assert f"--plot: there is no directory {here}/nowhere" in refused.stderr
    # Nobody is there, so nothing is written; but it was begun.
    assert run("bench", "--url", "http://127.0.0.1:1", "-o", "run.json", "--overwrite").exit_code == 3


@pytest.mark.parametrize(
    "argv",
    [
        ("monitor", "mine.toml", "--once", "--prometheus", "none/m.prom"),
        ("monitor", "mine.toml", "--once", "--csv", "none/m.csv"),
        ("report", "mine.toml", "--output", "none/r.md"),
    ],
)
def test_a_directory_that_is_not_there_is_told_and_not_made(argv: tuple[str, ...], here: Path) -> None:
    result = run(*argv)

    assert (result.exit_code, result.stdout) == (2, "")
    assert f"{argv[-2]}: there is no directory {here}/none" in result.stderr
    assert not (here / "none").exists()


def test_a_device_may_be_read_and_written() -> None:
    null = Path("/dev/null")

    assert outputs.problems([Output("--output", null, stays=True), Output("--csv", null)], {"FLEET": null}) == []


def test_a_link_that_leads_to_itself_is_told_and_not_followed_for_ever(here: Path) -> None:
    (here / "loop").symlink_to("loop")

    told = run(*SPEAK, "s.md", "-o", "loop.wav", "--subtitles", "loop")

    assert told.exit_code == 2
    assert "--subtitles: loop is a link that leads to itself" in told.output
