"""``monitor`` beside a fleet that serves: what it says is what was sent; and in a terminal that somebody uses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from support.foreground import Up, get, processes_on
from support.ports import free_ports

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.nginx,
    pytest.mark.skipif(
        not shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin"), reason="needs nginx (apt-get install nginx)"
    ),
    pytest.mark.skipif(not shutil.which("espeak-ng"), reason="needs espeak-ng (apt-get install espeak-ng)"),
]
NEEDS_TMUX = pytest.mark.skipif(not shutil.which("tmux"), reason="needs tmux (apt-get install tmux)")
TEXT = b'{"input": "Hello. This is the second sentence.", "response_format": "wav"}'


@dataclass
class Serving:
    running: Up
    fleet_file: Path
    ports: list[int]
    access_log: str

    def speak(self, count: int) -> None:
        for _ in range(count):
            get(f"http://127.0.0.1:{self.ports[2]}/v1/audio/speech", TEXT)

    def monitor(self, *options: str) -> list[str]:
        command = [sys.executable, "-m", "chatterbox_deploy", "monitor", str(self.fleet_file)]
        return [*command, "--access-log", self.access_log, *options]

    def look(self, *options: str) -> dict[str, Any]:
        argv = self.monitor("--once", "--json", "--interval", "0.2", *options)
        told: dict[str, Any] = json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)
        return told


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Two instances behind nginx."""
    ports = free_ports(3)
    path = tmp_path_factory.mktemp("monitor") / "fleet.toml"
    path.write_text(
        f"[gpus]\n0 = {ports[0]}\n1 = {ports[1]}\n[nginx]\nlisten = '127.0.0.1:{ports[2]}'\n"
        "[server]\nengine = 'espeak'\n[unit]\nrestart_delay_s = 1\n"
    )
    running = Up(path)
    try:
        running.wait_for("--access-log")
        found = re.search(r"--access-log (\S+)`", "".join(running.said))
        assert found
        yield Serving(running, path, ports, found[1])
    finally:
        running.end()


def test_what_it_says_is_what_was_sent(serving: Serving, tmp_path: Path) -> None:
    serving.speak(7)
    with pytest.raises(OSError, match="400"):
        get(f"http://127.0.0.1:{serving.ports[2]}/v1/audio/speech", b'{"input": ""}')
    csv, prom = tmp_path / "looks.csv", tmp_path / "fleet.prom"

    told = serving.look("--csv", str(csv), "--prometheus", str(prom))

    instances = told["instances"]
    assert [row["instance"] for row in instances] == ["gpu0", "gpu1"]
    assert sum(row["outcomes"]["answered"] for row in instances) == 7
    assert sum(row["outcomes"]["refused"] for row in instances) == 1
    assert [row["ready"] for row in instances] == ["ready", "ready"]
    front = told["front"]
    assert (front["answers"], front["requests"], front["errors"], front["retried"]) == (True, 8, 0, 0)
    by_front = {row["instance"]: row["requests"] for row in front["rows"]}
    assert by_front == {row["instance"]: sum(row["outcomes"].values()) for row in instances}
    # Nothing was asked for between its two looks.
    assert told["audio_s_per_s"] == 0
    assert told["well"] is True
    assert f"front,gpu0,requests,{by_front['gpu0']}" in csv.read_text()
    assert f'requests_per_second{{instance_name="gpu1"}} {by_front["gpu1"] / 60}' in prom.read_text()


def test_rates_are_of_what_is_sent_meanwhile(serving: Serving) -> None:
    argv = serving.monitor("--json", "--interval", "1")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as monitor:
        assert monitor.stdout is not None
        first = json.loads(monitor.stdout.readline())
        serving.speak(4)
        time.sleep(1)
        second, third = (json.loads(monitor.stdout.readline()) for _ in range(2))
        monitor.send_signal(signal.SIGINT)
        assert monitor.wait(timeout=10) == 0

    assert first["audio_s_per_s"] is None
    assert third["time"] > second["time"] > first["time"]
    sent = sum(row["requests_per_s"] * row["window_s"] for row in third["instances"])
    assert sent == pytest.approx(4, abs=0.01)
    assert third["audio_s_per_s"] > 0
    assert all(0 < row["rtf"] < 1 for row in third["instances"] if row["rtf"] is not None)


def test_a_fleet_file_that_changes_is_followed_and_a_wrong_one_is_not(serving: Serving, tmp_path: Path) -> None:
    text, path = serving.fleet_file.read_text(), tmp_path / "fleet.toml"
    path.write_text(text)
    argv = [sys.executable, "-m", "chatterbox_deploy", "monitor", str(path), "--json", "--interval", "0.2"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as monitor:
        assert monitor.stdout is not None
        told = json.loads(monitor.stdout.readline())
        assert len(told["instances"]) == 2
        path.write_text(text.replace("[nginx]", f"2 = {free_ports(1)[0]}\n[nginx]"))
        while len(told["instances"]) == 2:
            told = json.loads(monitor.stdout.readline())
        assert [event["about"] for event in told["now"]] == ["gpu2"]
        path.write_text("[gpus]\nx")
        while not any("shown as the fleet file was before" in note for note in told["notes"]):
            told = json.loads(monitor.stdout.readline())
        assert len(told["instances"]) == 3
        monitor.send_signal(signal.SIGINT)


def test_who_has_seen_enough_ends_it_without_a_complaint(serving: Serving) -> None:
    argv = serving.monitor("--json", "--interval", "0.2")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as monitor:
        assert monitor.stdout is not None
        assert monitor.stderr is not None
        monitor.stdout.readline()
        monitor.stdout.close()
        assert monitor.wait(timeout=10) == 0
        assert monitor.stderr.read() == ""


class Terminal:
    """A shell in tmux, on a server of its own."""

    def __init__(self, directory: Path) -> None:
        self._tmux = ["tmux", "-S", str(directory / "socket"), "-f", "/dev/null"]
        # Without the colours of whoever runs the tests, and with a size that some shells export and never renew.
        environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        environment |= {"COLUMNS": "80", "LINES": "24"}
        subprocess.run(
            [*self._tmux, "new-session", "-d", "-x", "120", "-y", "30", "bash --norc --noprofile"],
            check=True,
            env=environment | {"LC_ALL": "C.UTF-8", "TERM": "screen"},
        )

    def say(self, *arguments: str) -> str:
        return subprocess.run([*self._tmux, *arguments], check=True, capture_output=True, text=True).stdout

    def type(self, text: str) -> None:
        self.say("send-keys", text, "Enter")

    def shown(self) -> str:
        return self.say("capture-pane", "-p")

    def wait_for(self, pattern: str, limit_s: float = 20) -> str:
        deadline = time.monotonic() + limit_s
        while not re.search(pattern, shown := self.shown(), re.MULTILINE):
            assert time.monotonic() < deadline, f"{pattern} never came:\n{shown}"
            time.sleep(0.05)
        return shown


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    opened = Terminal(tmp_path)
    yield opened
    opened.say("kill-server")


@NEEDS_TMUX
def test_in_a_terminal_it_follows_what_happens_and_leaves_it_as_it_was(serving: Serving, terminal: Terminal) -> None:
    terminal.type(" ".join(serving.monitor("--interval", "0.3")))
    terminal.wait_for(r"^gpu1 .* ready ")
    serving.speak(2)
    terminal.wait_for(r"^front .* answers")

    terminal.say("resize-window", "-x", "40", "-y", "24")
    narrow = terminal.wait_for(r"^instance +ready +queue +(RTF +)?audio s/s$")
    assert max(map(len, narrow.splitlines())) <= 40
    terminal.say("resize-window", "-x", "120", "-y", "30")
    terminal.wait_for(r"^instance .* in flight ")

    # Silent until it was seen to be: a killed one may be back between two looks.
    (victim,) = processes_on(serving.ports[0])
    os.kill(victim, signal.SIGSTOP)
    terminal.wait_for(r"^critical for \d+s: gpu0 does not answer: chatterbox-deploy logs gpu0$")
    os.kill(victim, signal.SIGKILL)
    after = terminal.wait_for(r"over after \d+s: gpu0 does not answer$")
    assert "warning: gpu0 has restarted" in after
    assert "critical for" not in after

    terminal.say("send-keys", "q")
    terminal.wait_for(r"^bash-\S+[#$]$")
    assert "does not answer" not in terminal.shown()
    terminal.type("stty -a | grep -c -w -- -icanon; echo status $?")
    terminal.wait_for(r"^0\nstatus 1$")


@NEEDS_TMUX
@pytest.mark.parametrize("how", ["C-c", "TERM"])
def test_however_it_ends_the_terminal_is_sane(how: str, serving: Serving, terminal: Terminal) -> None:
    terminal.type("NO_COLOR=1 " + " ".join(serving.monitor()) + "; echo status $?")
    terminal.wait_for(r"^gpu1 .* ready ")
    # Bold is no colour.
    assert not re.search(r"\x1b\[[0-9;]*\b[34][0-9]\b", terminal.say("capture-pane", "-p", "-e"))

    if how == "TERM":
        shell = terminal.say("display-message", "-p", "#{pane_pid}").strip()
        (monitor,) = Path(f"/proc/{shell}/task/{shell}/children").read_text().split()
        os.kill(int(monitor), signal.SIGTERM)
    else:
        terminal.say("send-keys", how)

    assert "gpu1" not in terminal.wait_for(r"^status 0$").partition("status 0")[2]
    terminal.type("stty -a | grep -c -w -- -echo; tput cnorm; echo done")
    terminal.wait_for(r"^0\n.*done$")


@pytest.mark.skipif(not shutil.which("prometheus"), reason="needs prometheus (apt-get install prometheus)")
def test_a_real_prometheus_finds_the_instances_and_reads_the_rules(serving: Serving, tmp_path: Path) -> None:
    text = (
        serving.fleet_file.read_text() + f"[monitoring]\nrules_file = '{tmp_path}/rules.yml'\nscrape_file = '/s.yml'\n"
    )
    (tmp_path / "fleet.toml").write_text(text)
    asked = [sys.executable, "-m", "chatterbox_deploy", "render", str(tmp_path / "fleet.toml")]
    subprocess.run([*asked, "--output", str(tmp_path / "out")], check=True, capture_output=True)
    scrape = (tmp_path / "out/s.yml").read_text().replace("15s", "1s").replace("5s", "1s")
    rules = tmp_path / "out" / str(tmp_path / "rules.yml").lstrip("/")
    (tmp_path / "prometheus.yml").write_text(f"rule_files: ['{rules}']\n{scrape}")
    (port,) = free_ports(1)
    place = f"http://127.0.0.1:{port}/api/v1"
    argv = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data", "--log.level=warn"]
    serving.speak(1)

    with subprocess.Popen([*argv, f"--web.listen-address=127.0.0.1:{port}"], cwd=tmp_path) as prometheus:
        try:
            up = wait_for_two(f"{place}/query?query=up")
            spoken = wait_for_two(f"{place}/query?query=sum(chatterbox_audio_seconds_total)by(instance,gpu)")
            groups = json.loads(get(f"{place}/rules")[0])["data"]["groups"]
        finally:
            prometheus.send_signal(signal.SIGINT)
            prometheus.wait(timeout=20)

    assert [(series["metric"]["instance"], series["value"][1]) for series in up] == [("gpu0", "1"), ("gpu1", "1")]
    assert [series["metric"] for series in spoken] == [{"instance": f"gpu{n}", "gpu": f"{n}"} for n in (0, 1)]
    assert max(float(series["value"][1]) for series in spoken) > 0
    health = {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}
    assert len(health) > 10
    assert "err" not in health.values()


def wait_for_two(url: str, limit_s: float = 30) -> list[dict[str, Any]]:
    """Both instances' series, by name."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            found: list[dict[str, Any]] = json.loads(get(url)[0])["data"]["result"]
        except OSError:
            found = []
        if len(found) == 2 and all(series["value"][1] != "0" or "__name__" not in series["metric"] for series in found):
            return sorted(found, key=lambda series: str(series["metric"]["instance"]))
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


def test_without_colour_where_none_is_wanted(serving: Serving) -> None:
    argv = serving.monitor("--once", "--interval", "0.2")
    piped = subprocess.run(argv, capture_output=True, check=True).stdout

    assert b"\x1b" not in piped
    assert b"gpu1" in piped
