"""``speak`` as it is typed, as far as nobody is asked to speak."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

from chatterbox_deploy.cli import main, speaking

if TYPE_CHECKING:
    from pathlib import Path

BOOK = """# The Book

## One

It was so. “Oh!”

## Two

* a
* b
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands run in a directory that holds book.md, and no fleet file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CHATTERBOX_API_KEY", raising=False)
    (tmp_path / "book.md").write_text(BOOK)
    return tmp_path


def run(*argv: str, text: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, ["speak", *argv], input=text)


def test_a_dry_run_prints_chapters_pieces_and_pauses_and_asks_nobody() -> None:
    result = run("book.md", "--dry-run")

    assert result.exit_code == 0
    assert (
        result.stdout
        == """\
The Book  (1 piece, 8 characters)
     1  The Book  [2.5 s]
One  (2 pieces, 19 characters)
     2  One  [1.2 s]
     3  It was so. “Oh!”  [2.5 s]
Two  (3 pieces, 5 characters)
     4  Two  [1.2 s]
     5  a  [0.3 s]
     6  b  [0 s]
"""
    )


def test_a_dry_run_of_standard_input_as_json() -> None:
    result = run("-", "--dry-run", "--json", text="\ufeffOne.\r\n\r\nZwei ü.")

    assert json.loads(result.stdout) == {
        "title": None,
        "author": None,
        "chapters": [
            {"title": None, "pieces": [{"text": "One.", "pause_s": 0.7}, {"text": "Zwei ü.", "pause_s": 0.0}]}
        ],
    }


@pytest.mark.parametrize(
    ("argv", "status", "said"),
    [
        (["book.md"], 2, "say where to: -o book.m4b"),
        (["book.md", "-o", "book.mp4"], 2, "book.mp4 should end in .m4b, .m4a, .mp3, .opus, .flac, .wav"),
        (["book.md", "-o", "nowhere/book.m4b"], 2, "--output: there is no directory "),
        (["book.md", "-o", "a.wav", "--subtitles", "./a.wav"], 2, "--subtitles: a.wav is that of --output, too"),
        (["book.md", "-o", "book.m4b"], 2, "there is no fleet.toml: name the fleet's file (--fleet "),
        (
            ["book.md", "-o", "book.m4b", "--url", "tts.example.com"],
            2,
            "should be like http://127.0.0.1:6095 or https://",
        ),
        (["none.md", "-o", "book.m4b"], 2, "BOOK: file 'none.md' does not exist"),
    ],
)
def test_what_is_wrong_with_the_command_line_is_said_before_anything_begins(
    argv: list[str], status: int, said: str, here: Path
) -> None:
    result = run(*argv)

    assert result.exit_code == status
    assert said in result.stderr
    assert result.stdout == ""
    assert [path.name for path in here.iterdir()] == ["book.md"]


def test_all_that_is_wrong_is_said_at_once(here: Path) -> None:
    (here / "fleet.toml").write_text("[gpus]\n0 = 80\n")
    result = run("book.md", "-o", "book.mp4", "--subtitles", "book.md", "--speed", "2")

    assert result.exit_code == 2
    assert result.stderr == (
        "error: cannot do this:\n"
        "  --subtitles: book.md is BOOK, which this command reads; name another file\n"
        "  --output: book.mp4 should end in .m4b, .m4a, .mp3, .opus, .flac, .wav: that says the format\n"
        "  fleet.toml: gpus.0: input should be greater than or equal to 1024, got 80\n"
    )


def test_a_book_that_is_no_text_is_told_with_the_command_that_makes_it_one(here: Path) -> None:
    (here / "book.epub").write_bytes(b"PK\x03\x04\xff")

    result = run("book.epub", "-o", "book.m4b")

    assert result.exit_code == 2
    assert result.stderr == (
        "error: book.epub is a zip archive, as EPUB and DOCX are, not plain text in UTF-8: "
        "`pandoc --to plain book.epub --output book.txt`\n"
    )


def test_signs_alone_are_nothing_to_say() -> None:
    result = run("-", "--dry-run", text="* * *\n\n…\n")

    assert (result.exit_code, result.stderr) == (2, "error: there is nothing to say in standard input\n")


def test_a_key_file_that_holds_more_than_a_key_is_refused(here: Path) -> None:
    (here / "keys").write_text('"~^Bearer secret$" alice;\n')

    result = run("book.md", "-o", "book.m4b", "--url", "http://127.0.0.1:1", "--api-key-file", "keys")

    assert result.exit_code == 2
    assert "error: --api-key-file: should hold one key and nothing else" in result.stderr


@pytest.mark.parametrize("package", ["av", "sentencex"])
def test_without_the_extra_the_rest_of_the_kit_works_and_speak_says_what_to_install(package: str) -> None:
    main_without = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from chatterbox_deploy.cli import main; main(sys.argv[1:])"
    )  # fmt: skip

    def typed(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", main_without, *argv], capture_output=True, text=True, check=False)

    assert typed("schema").returncode == 0
    spoken = typed("speak", "book.md", "-o", "book.m4b")
    assert spoken.returncode == 3
    assert spoken.stderr == (
        f"error: cannot speak without the packages of the extra `speak` ({package}): "
        f"{sys.executable} -m pip install 'av>=14.2' 'sentencex>=1.0'\n"
    )


def test_where_there_is_no_bar_a_long_encoding_says_once_what_it_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with speaking.Show().writing("evening out to -19 LUFS and writing a.m4b", 3725.0) as on_way:
        on_way(1.0)
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(speaking, "LONG_S", -1.0)
        on_way(2.0)
        on_way(3.0)

    assert capsys.readouterr().err == "evening out to -19 LUFS and writing a.m4b: 1:02:05 of sound\n"
