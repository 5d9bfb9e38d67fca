"""``up``: the real command, real nginx, real servers, in the foreground and without root's places."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.foreground import Up, get, processes_on
from support.ports import free_ports

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [
    pytest.mark.nginx,
    pytest.mark.skipif(
        not shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin"), reason="needs nginx (apt-get install nginx)"
    ),
]
NEEDS_ESPEAK = pytest.mark.skipif(not shutil.which("espeak-ng"), reason="needs espeak-ng")


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Callable[[str], Up]]:
    started: list[Up] = []

    def start(text: str) -> Up:
        (tmp_path / "fleet.toml").write_text(text)
        started.append(Up(tmp_path / "fleet.toml"))
        return started[-1]

    yield start
    for running in started:
        running.end()


@NEEDS_ESPEAK
def test_a_fleet_speaks_survives_a_kill_and_ends_in_order(up: Callable[[str], Up], tmp_path: Path) -> None:
    one, two, front = free_ports(3)
    running = up(
        f"[gpus]\n0 = {one}\n1 = {two}\n[nginx]\nlisten = '127.0.0.1:{front}'\n"
        "[server]\nengine = 'espeak'\n[unit]\nrestart_delay_s = 1\n"
    )
    running.wait_for(rf"^ready +\| 2 instances behind http://127.0.0.1:{front} ")
    assert (tmp_path / "state/chatterbox-tts/voices").is_dir()

    spoken = [
        get(f"http://127.0.0.1:{front}/v1/audio/speech", b'{"input": "Hello.", "response_format": "wav"}')
        for _ in range(6)
    ]
    assert all(audio.startswith(b"RIFF") for audio, _ in spoken)
    assert {instance for _, instance in spoken} == {"gpu0", "gpu1"}

    (victim,) = processes_on(one)
    os.kill(victim, signal.SIGKILL)
    running.wait_for(r"gpu0 +\| killed by SIGKILL; starting again in 1 s")
    running.wait_for(r"gpu0 +\| ready", times=2)

    assert running.end() == 0
    assert not [pid for port in (one, two, front) for pid in processes_on(port)]


def test_any_server_runs_unchanged_behind_the_same_front(up: Callable[[str], Up], tmp_path: Path) -> None:
    one, two, front = free_ports(3)
    (tmp_path / "site").mkdir()
    (tmp_path / "site/answer.txt").write_text("from a server of one's own")
    running = up(
        f"[gpus]\n0 = {one}\n1 = {two}\n[nginx]\nlisten = '127.0.0.1:{front}'\n"
        f"[server]\ncommand = ['{Path(sys.executable)}', '-m', 'http.server', '--bind', '{{host}}', '{{port}}']\n"
        f"directory = '{tmp_path}/site'\n"
    )
    running.wait_for(r"^ready")

    answers = [get(f"http://127.0.0.1:{front}/answer.txt") for _ in range(4)]

    assert {body for body, _ in answers} == {b"from a server of one's own"}
    assert {instance for _, instance in answers} == {"gpu0", "gpu1"}
    assert running.end() == 0


SLOW_SERVER = """
import http.server, sys, time
class Slow(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        print("asked", flush=True)
        time.sleep(1.5)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"finished")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Slow).serve_forever()
"""


def test_what_was_accepted_is_answered_before_anything_ends(up: Callable[[str], Up], tmp_path: Path) -> None:
    """The front ends first: this server would drop its request the moment it is asked to end."""
    one, front = free_ports(2)
    (tmp_path / "slow.py").write_text(SLOW_SERVER)
    running = up(
        f"[gpus]\n0 = {one}\n[nginx]\nlisten = '127.0.0.1:{front}'\n"
        f"[server]\ncommand = ['{sys.executable}', '{tmp_path}/slow.py', '{{port}}']\n"
    )
    running.wait_for(r"^ready")
    answers: list[bytes] = []
    asking = threading.Thread(target=lambda: answers.append(get(f"http://127.0.0.1:{front}/")[0]))
    asking.start()
    running.wait_for(r"gpu0 +\| asked")

    assert running.end() == 0
    asking.join(timeout=30)
    assert answers == [b"finished"]


def test_instances_that_crash_in_a_loop_are_left_down_and_up_ends_with_the_reason(up: Callable[[str], Up]) -> None:
    one, front = free_ports(2)
    running = up(
        f"[gpus]\n0 = {one}\n[nginx]\nlisten = '127.0.0.1:{front}'\n"
        "[server]\ncommand = ['/bin/sh', '-c', 'echo no weights; exit 4 # {port}']\n"
        "[unit]\nrestart_limit = 2\nrestart_delay_s = 1\n"
    )

    assert running.wait() == 3
    said = "".join(running.said)
    assert said.count("| no weights") == 2
    assert "gpu0  | ended with status 4, start 2 of 2; left down" in said
    assert "error: no instance is left running" in said


def test_an_instance_that_misses_a_program_is_not_restarted_in_vain(up: Callable[[str], Up], tmp_path: Path) -> None:
    one, front = free_ports(2)
    # Of all programs only what `up` starts its children with.
    (tmp_path / "setpriv").symlink_to(shutil.which("setpriv") or "/nowhere")
    running = up(
        f"[gpus]\n0 = {one}\n[nginx]\nlisten = '127.0.0.1:{front}'\n"
        f"[server]\nengine = 'espeak'\nenvironment = {{ PATH = '{tmp_path}' }}\n"
    )

    assert running.wait() == 3
    said = "".join(running.said)
    assert said.count("cannot find espeak-ng: apt-get install espeak-ng") == 1
    assert "gpu0  | ended with status 2; left down" in said


def test_a_taken_front_port_is_said_at_once(up: Callable[[str], Up]) -> None:
    one, _ = free_ports(2)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        running = up(
            f"[gpus]\n0 = {one}\n[nginx]\nlisten = '127.0.0.1:{taken.getsockname()[1]}'\n"
            "[server]\ncommand = ['/bin/sleep', '600', '{port}']\n"
        )

        assert running.wait() == 3
        port = taken.getsockname()[1]
    said = "".join(running.said)
    assert said.startswith("error: cannot listen where the fleet file says; `ss -ltnp` shows who does:")
    assert f"127.0.0.1:{port}: address already in use" in said


def test_a_program_that_is_not_there_leaves_the_others_running(up: Callable[[str], Up], tmp_path: Path) -> None:
    one, two, front = free_ports(3)
    # One deletes the program once the other has started, and ends: its second start finds none.
    server = tmp_path / "server"
    server.write_text(
        f"#!/bin/sh\nif [ $1 = {two} ]; then touch {tmp_path}/other; exec sleep 600; fi\n"
        f"while [ ! -e {tmp_path}/other ]; do sleep 0.05; done; rm $0; exit 9\n"
    )
    server.chmod(0o755)
    running = up(
        f"[gpus]\n0 = {one}\n1 = {two}\n[nginx]\nlisten = '127.0.0.1:{front}'\n"
        f"[server]\ncommand = ['{server}', '{{port}}']\n[unit]\nrestart_delay_s = 1\n"
    )

    running.wait_for(r"gpu0 +\| cannot run .*/server: no such program, or it is not executable; left down")
    assert running.process.poll() is None
    assert running.end() == 0


def test_a_dead_nginx_is_noticed_although_its_workers_hold_its_output(up: Callable[[str], Up]) -> None:
    one, front = free_ports(2)
    running = up(
        f"[gpus]\n0 = {one}\n[nginx]\nlisten = '127.0.0.1:{front}'\n"
        f"[server]\ncommand = ['{sys.executable}', '-m', 'http.server', '--bind', '{{host}}', '{{port}}']\n"
    )
    running.wait_for(r"^ready")
    os.kill(min(processes_on(front)), signal.SIGKILL)

    assert running.wait() == 3
    assert "error: nginx ended by itself, with status -9" in "".join(running.said)
    assert processes_on(front) == []


def test_up_ends_in_order_when_nobody_reads_it_any_more(up: Callable[[str], Up]) -> None:
    one, front = free_ports(2)
    running = up(
        f"[gpus]\n0 = {one}\n[nginx]\nlisten = '127.0.0.1:{front}'\n"
        f"[server]\ncommand = ['{sys.executable}', '-u', '-m', 'http.server', '--bind', '{{host}}', '{{port}}']\n"
    )
    running.wait_for(r"^ready")
    running.stop_reading()
    with suppress(OSError):
        get(f"http://127.0.0.1:{front}/")

    assert running.process.wait(timeout=60) == 0
    assert processes_on(one) == processes_on(front) == []
