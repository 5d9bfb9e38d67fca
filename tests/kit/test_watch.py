"""Looking at a host: real sockets, some of which hang, and a real log that is rotated."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from chatterbox_deploy.change import facts
from chatterbox_deploy.config import reading
from chatterbox_deploy.host import LocalHost
from chatterbox_deploy.monitor import watch
from chatterbox_deploy.status import survey
from chatterbox_deploy.templates import Templates

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from chatterbox_deploy.gpu.cards import Card
    from chatterbox_deploy.monitor.story import Look

LOG = "/var/log/nginx/chatterbox-tts.access.log"
NOBODY = 16_093
"""A port on which no instance listens; should anybody, it makes no difference."""

METRICS = b"# TYPE process_start_time_seconds gauge\nprocess_start_time_seconds 1000\n"
READY = {"ready": True, "instance": "gpu0", "waiting": 3, "running": 1, "draining": False}


@contextmanager
def server(metrics: bytes = METRICS, key: str | None = None) -> Iterator[int]:
    """Answers as an instance does; its port."""

    class Instance(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = key is None or self.headers.get("Authorization") == f"Bearer {key}"
            body = json.dumps(READY).encode() if self.path == "/readyz" else metrics
            self.send_response(200 if known or self.path == "/readyz" else 401)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Instance) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        try:
            yield serving.server_port
        finally:
            serving.shutdown()


@contextmanager
def hanging() -> Iterator[int]:
    """Takes connections, as the kernel does for a stopped process, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def watched(root: Path, *ports: int, more: str = "", cards: tuple[Card, ...] | None = None) -> watch.Watch:
    gpus = "\n".join(f"{number} = {port}" for number, port in enumerate(ports))
    wanted = facts.want(reading.load(f"[gpus]\n{gpus}\n{more}", source="f"), Templates(), source="f")
    return watch.Watch(LocalHost(root), wanted, access_log=LOG, read_cards=lambda: cards)


def line(status: int = 200, *, ago_s: float = 0) -> str:
    ended = datetime.now(UTC) - timedelta(seconds=ago_s)
    said = {"time": ended.isoformat(timespec="seconds"), "status": status, "instance": "gpu0", "duration_s": 0.1}
    return json.dumps({**said, "tries": str(status), "tried": "127.0.0.1:6093", "uri": "/"}) + "\n"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / LOG.lstrip("/")
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def statuses(look: Look) -> list[int] | None:
    return None if look.requests is None else [request.status for request in look.requests]


def test_those_that_hang_are_waited_for_together_and_delay_nobody_else(tmp_path: Path) -> None:
    with server() as alive, hanging() as one, hanging() as two, hanging() as three:
        begun_s = time.monotonic()
        look = watched(tmp_path, alive, one, two, three).look()
        took_s = time.monotonic() - begun_s

    # One timeout, and a second for a machine that is not quiet; not three.
    assert took_s < 2 * survey.ANSWER_TIMEOUT_S
    told = {name: said is not None for name, said in look.found.readiness.items()}
    assert told == {"gpu0": True, "gpu1": False, "gpu2": False, "gpu3": False}
    assert set(look.counts) == {"gpu0"}
    assert look.cards is None


def test_numbers_that_need_a_key_are_asked_for_with_one(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# ours\nalice a-first-and-long-key\n")
    with server(key="a-first-and-long-key") as port:
        keys = "[server]\napi_keys_file = '/keys'\n"
        assert set(watched(tmp_path, port, more=keys).look().counts) == {"gpu0"}
        assert watched(tmp_path, port).look().counts == {}


def test_another_answer_than_numbers_is_none(tmp_path: Path) -> None:
    with server(metrics=b"<h1>It works!</h1>") as port:
        look = watched(tmp_path, port).look()

    assert look.found.readiness["gpu0"] is not None
    assert look.counts == {}


def test_the_log_is_read_on_by_whole_lines(tmp_path: Path, log: Path) -> None:
    log.write_text(line(200, ago_s=300) + line(201))
    looking = watched(tmp_path, NOBODY)

    assert statuses(looking.look()) == [201]
    with log.open("a") as stream:
        whole = line(203)
        stream.write(line(202) + whole[:20])
        stream.flush()
        assert statuses(looking.look()) == [202]
        stream.write(whole[20:] + "not JSON\n")
    assert statuses(looking.look()) == [203]
    assert statuses(looking.look()) == []


def test_a_rotated_log_loses_no_request_and_counts_none_twice(tmp_path: Path, log: Path) -> None:
    older = log.with_name(f"{log.name}.1")
    older.write_text(line(299))
    log.write_text(line(200))
    looking = watched(tmp_path, NOBODY)
    assert statuses(looking.look()) == [299, 200]

    with log.open("a") as stream:
        stream.write(line(201))
        stream.flush()
        log.rename(older)
        # nginx has been told to reopen its log, and has not done it yet.
        stream.write(line(202))
        stream.flush()
        log.write_text(line(203))
        assert statuses(looking.look()) == [201, 202, 203]
        stream.write(line(204))
    log.write_text(log.read_text() + line(205))
    assert statuses(looking.look()) == [204, 205]
    assert statuses(looking.look()) == []


def test_without_a_log_that_is_said_until_there_is_one(tmp_path: Path) -> None:
    looking = watched(tmp_path, NOBODY)

    look = looking.look()
    assert look.requests is None
    assert look.notes == (f"nothing is known of the front's requests: there is no {LOG}",)
    path = tmp_path / LOG.lstrip("/")
    path.parent.mkdir(parents=True)
    path.write_text(line(200))
    assert statuses(looking.look()) == [200]


def test_a_log_that_cannot_be_read_is_a_note(tmp_path: Path) -> None:
    (tmp_path / LOG.lstrip("/")).mkdir(parents=True)

    look = watched(tmp_path, NOBODY).look()

    assert look.requests is None
    assert "access.log: not a regular file" in look.notes[0]
