"""Anybody's nginx configuration, and the log of a front of ours, read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chatterbox_deploy import nginx
from chatterbox_deploy.nginx import Block, Traffic

GOLDEN = Path(__file__).parents[1] / "golden"
FOREIGN = """
# upstream commented { least_conn; server 127.0.0.1:1; }
http {
    upstream tts_backend {
        least_conn;              # zone tts 1m;
        server 127.0.0.1:8001 max_fails=3 fail_timeout=30s;
        server 127.0.0.1:8002;
    }
    upstream "named" { zone n 64k; least_conn; server unix:/run/a.sock; server [::1]:8003 weight=2; }
    upstream rr { server localhost:8004; server backend.example; }
    map $upstream_status $x { default 1; }
    server { location / { proxy_pass http://tts_backend; } }
}
"""


def test_every_upstream_is_found_with_its_ports_and_how_it_chooses() -> None:
    assert nginx.find_blocks(FOREIGN, "/etc/nginx/nginx.conf") == (
        Block("/etc/nginx/nginx.conf", "tts_backend", (8001, 8002), least_conn=True, zone=False),
        Block("/etc/nginx/nginx.conf", "named", (8003,), least_conn=True, zone=True),
        Block("/etc/nginx/nginx.conf", "rr", (8004,), least_conn=False, zone=False),
    )


@pytest.mark.parametrize("case", sorted(path.name for path in GOLDEN.iterdir()))
def test_our_own_front_has_a_zone(case: str) -> None:
    text = (GOLDEN / case / "rendered/etc/nginx/conf.d/chatterbox-tts.conf").read_text()

    (block,) = nginx.find_blocks(text, "a")

    assert (block.name, block.least_conn, block.zone) == ("chatterbox", True, True)
    assert set(block.ports) == {upstream.port for upstream in nginx.find_upstreams(text)}


def line(instance: str, *, status: int = 200, uri: str = "/v1/audio/speech", hour: str = "10") -> str:
    time = f"2026-11-27T{hour}:00:00+00:00"
    told = {"time": time, "method": "POST", "uri": uri, "status": status, "instance": instance, "duration_s": 1.0}
    return json.dumps(told | {"tries": f"{status}", "tried": "127.0.0.1:6093"})


def test_who_answered_is_counted_from_the_log_of_the_front() -> None:
    log = "\n".join(
        [
            'tail cut this line","status":200,"instance":"gpu0"}',
            line("gpu0", hour="09"),
            line("gpu1"),
            line("gpu1", uri="/synthesize?x=1"),
            line("gpu0", status=503),
            line("", status=200),
            # These make nobody speak.
            line("gpu0", uri="/v1/audio/voices"),
            line("gpu0", uri="/v1/models"),
            "[]",
            line("gpu1", hour="11"),
        ]
    )

    assert nginx.read_log(log.encode()) == Traffic(
        {"gpu0": 1, "gpu1": 3}, "2026-11-27T09:00:00+00:00", "2026-11-27T11:00:00+00:00"
    )


@pytest.mark.parametrize("log", ["", "127.0.0.1 - - [somebody's own format]\n", line("gpu0", status=502)])
def test_a_log_in_which_nobody_answered_tells_nothing(log: str) -> None:
    assert nginx.read_log(log.encode()) is None
