"""``bench`` on a real fleet: `up`, real servers that speak through espeak-ng, and real nginx. Counts, no times."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_deploy.bench import loads
from host import front_lab
from support.ports import free_ports

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from chatterbox_deploy.bench.loads import Run, Trial

pytestmark = [
    pytest.mark.nginx,
    pytest.mark.skipif(front_lab.NGINX is None, reason="needs nginx (apt-get install nginx)"),
    pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng"),
]
KIT = (sys.executable, "-m", "chatterbox_deploy")
QUICK = ("--window", "0.6", "--warmup", "0.1", "--repeat", "2", "--texts", "short")


class Fleet:
    """Three instances in the foreground, and the access log that nginx writes of them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = directory / "fleet.toml"
        one, two, three, front = free_ports(4)
        # Room for all: how busy the machine is must not decide what is refused.
        self.file.write_text(
            f"[gpus]\n0 = {one}\n1 = [{two}, {three}]\n[nginx]\nlisten = '127.0.0.1:{front}'\n"
            "[server]\nengine = 'espeak'\nqueue_size = 1000\nmax_wait_s = 600\n"
        )
        self.front = f"http://127.0.0.1:{front}"
        self.instance = f"http://127.0.0.1:{one}"

    def logged(self) -> list[dict[str, Any]]:
        """Every request since the start that was to speak."""
        time.sleep(0.3)
        (log,) = self.directory.glob("tmp/chatterbox-up-*/chatterbox-tts.access.log")
        return [row for row in map(json.loads, log.read_text().splitlines()) if row["uri"] == "/v1/audio/speech"]

    def bench(self, *argv: str) -> tuple[Run, subprocess.CompletedProcess[str]]:
        saved = self.directory / "run.json"
        done = subprocess.run(
            [*KIT, "bench", *argv, "-o", str(saved), "--overwrite"],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.directory,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return loads.from_json(saved.read_text(), source=str(saved)), done


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("fleet"))
    (fleet.directory / "tmp").mkdir()
    environment = {"TMPDIR": str(fleet.directory / "tmp"), "XDG_STATE_HOME": str(fleet.directory / "state")}
    said = (fleet.directory / "said").open("w+")
    with said, subprocess.Popen(
        [*KIT, "up", str(fleet.file)], stdout=said, stderr=said, env=os.environ | environment
    ) as process:  # fmt: skip
        deadline_s = time.monotonic() + 120
        while not re.search(r"^ready +\| 3 instances", (fleet.directory / "said").read_text(), re.MULTILINE):
            assert process.poll() is None, (fleet.directory / "said").read_text()
            assert time.monotonic() < deadline_s, (fleet.directory / "said").read_text()
            time.sleep(0.1)
        yield fleet
        process.send_signal(signal.SIGINT)
        process.wait(60)


def answered(trial: Trial) -> Counter[str | None]:
    """Of all repetitions, their warm-ups too."""
    return Counter(sample.instance for repetition in trial.repetitions for sample in repetition.samples)


@pytest.mark.parametrize("load", [("--concurrency", "6"), ("--rate", "20")], ids=["closed loop", "open loop"])
def test_bench_nginx_and_the_instances_count_the_same_requests(running: Fleet, load: tuple[str, ...]) -> None:
    before = len(running.logged())
    run, done = running.bench(*QUICK, *load)
    logged = running.logged()[before:]
    (trial,) = run.trials
    ours = answered(trial)

    assert run.probes == 1
    assert ours.total() > 10
    assert Counter(row["instance"] for row in logged[1:]) == ours
    assert set(ours) == {"gpu0", "gpu1-a", "gpu1-b"}
    for name, count in ours.items():
        assert sum(repetition.counted[str(name)].ended["answered"] for repetition in trial.repetitions) == count
    assert trial.gpus == 2
    assert "sound" in done.stdout


def test_json_has_every_figure_and_shares_that_sum_to_all(running: Fleet) -> None:
    _, done = running.bench(*QUICK, "--json", "--texts", "mixed")
    (trial,) = json.loads(done.stdout)["trials"]

    known = {name for name, figure in trial["figures"].items() if figure["value"] is not None}
    assert known >= {
        "requests_per_s", "audio_s_per_s", "real_time_factor", "latency_mean_s", "latency_p50_s", "first_byte_p50_s",
        "wait_mean_s", "failed_share", "server_cores", "machine_cores", "generator_cores",
    }  # fmt: skip
    assert trial["figures"]["tokens_per_s"]["value"] is None, "espeak counts none"
    assert trial["figures"]["failed_share"]["value"] == 0
    assert sum(share["requests"] for share in trial["shares"]) == trial["requests"]
    assert sum(share["share"] for share in trial["shares"]) == pytest.approx(1)
    assert all(share["audio_s"] > 0 for share in trial["shares"])


def test_more_and_more_gpus_are_asked_without_the_front(running: Fleet) -> None:
    before = len(running.logged())
    run, done = running.bench(*QUICK, "--scale", "gpus")

    assert len(running.logged()) == before
    assert [(trial.label, set(answered(trial))) for trial in run.trials] == [
        ("1 GPU", {"gpu0"}),
        ("2 GPUs", {"gpu0", "gpu1-a", "gpu1-b"}),
    ]
    said = r"^2 GPUs speak \d+\.\d\d times as much as 1 GPU \(95 %: .*\): efficiency \d+ %$"
    assert re.search(said, done.stdout, re.MULTILINE)


def test_a_long_text_streams_and_is_listened_to(running: Fleet) -> None:
    run, done = running.bench(
        "--instance", "gpu0", "--texts", "book", "--stream", "--window", "0.3", "--warmup", "0", "--repeat", "1"
    )
    samples = [sample for repetition in run.trials[0].repetitions for sample in repetition.samples]

    assert all(sample.audio_s is not None and sample.audio_s > 20 for sample in samples)
    assert all(sample.stalls is not None for sample in samples)
    assert all(sample.first_byte_s is not None and sample.first_byte_s < sample.done_s for sample in samples)
    assert "answers that stalled" in done.stdout


def test_a_url_is_measured_without_a_fleet_file(running: Fleet, tmp_path: Path) -> None:
    front, _ = running.bench(*QUICK, "--url", running.front, "--format", "mp3")
    assert front.trials[0].instances == ()
    assert set(answered(front.trials[0])) == {"gpu0", "gpu1-a", "gpu1-b"}

    one, done = running.bench(*QUICK, "--url", running.instance)
    name = running.instance.removeprefix("http://")
    assert one.trials[0].instances == (name,)
    assert set(answered(one.trials[0])) == {name}
    assert "no /metrics" not in done.stderr
