"""``chatterbox-deploy bench`` as an operator types it, against small servers."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

from chatterbox_deploy.bench import loads
from chatterbox_deploy.cli import main
from support.speaking import Speaker, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiohttp import web

KIT = (sys.executable, "-m", "chatterbox_deploy")


def command(*argv: str) -> Result:
    return CliRunner().invoke(main, ["bench", *argv])


WRONG = """
error: cannot do this:
  there-is-none.toml: no such file; for one server on GPU 0 write
    [gpus]
    0 = 6093
  --find-rate: cannot read 'p95 foo'; write it as 'p95 first-byte <= 2' or 'p99 latency <= 10'
  --texts: cannot read none.txt: no such file or directory; sets are short, mixed, book
  --concurrency and --rate: a loop is closed or open; give one
  --rate and --find-rate: it tries rates of its own
  --each and --find-rate: it asks one thing at a time
  --stream and --format mp3: what has come when is known of wav and pcm
  --plot: x.pdf ends in none of .svg, .png, .html
"""


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = command(
        "there-is-none.toml", "--find-rate", "p95 foo", "--texts", "none.txt", "--rate", "1", "--concurrency", "1",
        "--each", "--stream", "--format", "mp3", "--plot", "x.pdf", "-o", "x.json",
    )  # fmt: skip

    assert result.exit_code == 2
    assert result.stderr == WRONG[1:]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def urls() -> Iterator[list[str]]:
    """Two speakers in a process of their own."""
    argv = [sys.executable, "-m", "support.speaking"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()
        process.kill()


def test_a_run_is_shown_kept_drawn_shown_again_and_compared(urls: list[str], tmp_path: Path) -> None:
    saved, html = str(tmp_path / "a.json"), tmp_path / "a.html"
    quick = ("--window", "0.4", "--warmup", "0.1", "--repeat", "2")
    first = command("--url", urls[0], *quick, "-o", saved, "--plot", str(html), "--json")
    assert first.exit_code == 0, first.output
    (trial,) = json.loads(first.stdout)["trials"]
    assert trial["figures"]["tokens_per_s"]["value"] > 0
    assert trial["figures"]["audio_s_per_s"]["low"] <= trial["figures"]["audio_s_per_s"]["value"]
    assert sum(share["share"] for share in trial["shares"]) == 1
    page = html.read_text()
    assert "<svg" in page
    assert not re.search(r"""(src|href)=["'](?!#)""", page), "it needs nothing from anywhere"

    shown = command("show", saved, "--plot", str(tmp_path / "a.svg"), "--plot", str(tmp_path / "a.png"))
    assert shown.exit_code == 0
    assert "sound" in shown.stdout
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.svg").read_text().removeprefix("<?xml").split("<svg")[1] in page, (
        "the same run, the same bytes"
    )

    compared = command("compare", saved, saved)
    assert compared.exit_code == 0
    assert "B speaks 1.00 times as much as A" in compared.stdout


def test_two_instances_are_measured_against_one(urls: list[str]) -> None:
    result = command(
        "--url",
        urls[0],
        "--url",
        urls[1],
        "--scale",
        "instances",
        "--window",
        "0.5",
        "--warmup",
        "0.1",
        "--repeat",
        "2",
    )

    assert result.exit_code == 0, result.output
    assert "2 instances speak " in result.stdout
    assert result.stdout.rstrip().endswith(" %")


def test_the_highest_rate_is_looked_for(urls: list[str]) -> None:
    result = command(
        "--url", urls[0], "--find-rate", "p50 latency <= 0.03", "--tolerance", "0.5", "--window", "0.2",
        "--warmup", "0.1", "--repeat", "2", "--json",
    )  # fmt: skip

    assert result.exit_code == 0, result.output
    search = json.loads(result.stdout)["search"]
    assert search["tried"][0]["rate_per_s"] > 1
    assert "p50 latency <= 0.03 s" in search["says"]


def test_ctrl_c_shows_what_there_is_and_says_that_it_is_partial(urls: list[str], tmp_path: Path) -> None:
    argv = [*KIT, "bench", "--url", urls[0], "--window", "60", "--warmup", "0", "-o", "p.json"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stderr is not None
    assert "1 of 5" in process.stderr.readline()
    time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=30)

    assert process.returncode == 130
    assert said.startswith("partial: it was stopped")
    assert "requests answered" in said
    assert loads.from_json((tmp_path / "p.json").read_text(), source="p.json").partial


def test_only_who_asks_a_fleet_of_this_machine_is_sent_to_its_status(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    (tmp_path / "fleet.toml").write_text(f"[gpus]\n0 = {port}\n[nginx]\nlisten = '127.0.0.1:{port + 1}'\n")
    elsewhere = command("--url", f"http://127.0.0.1:{port}")
    here = command(str(tmp_path / "fleet.toml"), "--instance", "0")

    assert (elsewhere.exit_code, here.exit_code) == (3, 3)
    assert "connection refused" in elsewhere.stderr
    assert "status" not in elsewhere.stderr
    assert here.stderr.endswith("connection refused; is the fleet running? `chatterbox-deploy status`\n")


def test_a_failure_is_an_exit_status(tmp_path: Path) -> None:
    """Something answers the probe, and then is busy."""

    class Tires(Speaker):
        async def speak(self, request: web.Request) -> web.StreamResponse:
            self.fault = "busy" if self.heard else ""
            return await super().speak(request)

    async def scenario() -> subprocess.CompletedProcess[str]:
        async with serving(Tires()) as aim:
            argv = ["bench", "--url", aim.doors[0].url, "--window", "0.3", "--warmup", "0", "--repeat", "1"]
            return await asyncio.to_thread(
                subprocess.run, [*KIT, *argv], capture_output=True, text=True, check=False
            )  # fmt: skip

    done = asyncio.run(scenario())
    assert done.returncode == 1
    assert "note: failed: " in done.stderr


def test_bad_files_to_compare_are_named_both(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    result = command("compare", str(tmp_path / "bad.json"), str(tmp_path / "none.json"))

    assert result.exit_code == 2
    assert f"  {tmp_path}/bad.json is no file of `bench -o`\n" in result.stderr
    assert "required" not in result.stderr
    assert f"cannot read {tmp_path}/none.json: no such file or directory" in result.stderr


def test_no_other_command_waits_for_what_bench_imports() -> None:
    code = "import chatterbox_deploy.cli, sys; print({'aiohttp', 'matplotlib', 'numpy'} & set(sys.modules))"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_stopped_before_it_began_it_keeps_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        argv = [*KIT, "bench", "--url", url, "-o", "p.json"]
        with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
            connection, _ = silent.accept()
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=30)
            connection.close()

    assert process.returncode == 130
    assert said.endswith("stopped before anything was measured\n")
    assert list(tmp_path.iterdir()) == []
