"""What systemd hears."""

import socket
from pathlib import Path

import pytest

from chatterbox_server import notify


@pytest.mark.parametrize("abstract", [False, True])
def test_lines_arrive_in_one_datagram(abstract: bool, tmp_path: Path) -> None:
    name = f"@chatterbox-test-{tmp_path.name}" if abstract else str(tmp_path / "n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(name.replace("@", "\0"))
        heard.settimeout(10)

        assert notify.send({"NOTIFY_SOCKET": name}, notify.READY, notify.status("idle,\n0 waiting"))

        assert heard.recv(4096) == b"READY=1\nSTATUS=idle, 0 waiting"


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "/nobody/there"}])
def test_nobody_listening_is_no_error(environ: dict[str, str]) -> None:
    assert not notify.send(environ, notify.READY)


@pytest.mark.parametrize(
    ("environ", "watched"),
    [
        ({}, False),
        ({"WATCHDOG_USEC": "30000000"}, True),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, True),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, False),
        ({"WATCHDOG_USEC": "0"}, False),
        ({"WATCHDOG_USEC": "soon"}, False),
    ],
)
def test_the_watchdog_is_pinged_if_it_waits_for_this_process(environ: dict[str, str], watched: bool) -> None:
    assert notify.is_watched(environ, pid=7) is watched


def test_a_full_ear_is_not_waited_for() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind("\0chatterbox-test-deaf")
        environ = {"NOTIFY_SOCKET": "@chatterbox-test-deaf"}
        while notify.send(environ, notify.WATCHDOG):
            pass
