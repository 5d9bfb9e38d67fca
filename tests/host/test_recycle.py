"""Memory bounded and instances recycled on a real systemd: by the kernel, and by the timer's hardened unit."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from support.sandbox import PYTHON

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.sandbox import Sandbox

pytestmark = pytest.mark.systemd

FLEET_TOML = "/etc/chatterbox-tts/fleet.toml"
GPU0, GPU1 = "chatterbox-tts-gpu0.service", "chatterbox-tts-gpu1.service"
BOTH_ANSWER = " && ".join(f"curl -sSf -o /dev/null http://127.0.0.1:{port}/" for port in (6093, 6094))

# Holds 400 MB more from the first GET /grow on.
GROWS = """
import http.server, sys

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/grow":
            self.server.held = bytearray(400_000_000)
        self.send_response(200)
        self.end_headers()

http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""


def install(sandbox: Sandbox, unit_table: str) -> None:
    """Two servers of one's own that grow when they are told to."""
    sandbox.write("/srv/tts/grow.py", GROWS)
    command = "/usr/local/bin/chatterbox-deploy"
    sandbox.write(command, f'#!/bin/sh\nexec {PYTHON} -m chatterbox_deploy "$@"\n')
    sandbox.run("chmod", "+x", command)
    sandbox.write(
        FLEET_TOML,
        f"[gpus]\n0 = 6093\n1 = 6094\n[unit]\nrestart_delay_s = 1\n{unit_table}\n[server]\n"
        f"command = ['{PYTHON}', '/srv/tts/grow.py', '{{port}}']\n",
    )
    sandbox.run("chatterbox-deploy", "apply", FLEET_TOML)
    sandbox.wait_until(BOTH_ANSWER)


def rows(sandbox: Sandbox) -> dict[str, dict[str, Any]]:
    said = json.loads(sandbox.run("chatterbox-deploy", "status", FLEET_TOML, "--json"))
    return {row["instance"]: row for row in said["instances"]}


def test_an_instance_over_its_memory_is_killed_alone_and_starts_afresh(boot: Callable[[], Sandbox]) -> None:
    sandbox = boot()
    install(sandbox, "memory_max_mb = 256")

    sandbox.run("curl", "-s", "http://127.0.0.1:6093/grow", check=False)
    sandbox.wait_until(f'test "$(systemctl show --value --property=NRestarts {GPU0})" = 1')
    sandbox.wait_until(BOTH_ANSWER)

    # "oom-kill" where systemd sees the kernel's count, in cgroup2.
    assert "code=killed, status=9/KILL" in sandbox.run("journalctl", "--no-pager", f"--unit={GPU0}")
    assert sandbox.show(GPU1, "NRestarts") == "0"
    assert all(row["wrong"] == [] for row in rows(sandbox).values())


def test_the_timers_unit_recycles_who_has_grown_and_nobody_else(boot: Callable[[], Sandbox]) -> None:
    sandbox = boot()
    install(sandbox, "recycle_memory_mb = 256")
    assert sandbox.show("chatterbox-tts-recycle.timer", "ActiveState") == "active"
    sandbox.run("systemctl", "start", "chatterbox-tts-recycle.service")
    lives = {unit: sandbox.show(unit, "InvocationID") for unit in (GPU0, GPU1)}

    sandbox.run("curl", "-sf", "http://127.0.0.1:6093/grow")
    assert rows(sandbox)["gpu0"]["memory_bytes"] > 400_000_000
    # Fails if its hardening keeps it from anything it has to do.
    sandbox.run("systemctl", "start", "chatterbox-tts-recycle.service")

    assert sandbox.show(GPU0, "InvocationID") != lives[GPU0]
    assert sandbox.show(GPU1, "InvocationID") == lives[GPU1]
    sandbox.wait_until(BOTH_ANSWER)
    after = rows(sandbox)
    assert after["gpu0"]["memory_bytes"] < 256_000_000
    assert all(row["front"] == "serving" and row["wrong"] == [] for row in after.values())
    said = sandbox.run("journalctl", "--no-pager", "--output=cat", "--unit=chatterbox-tts-recycle.service")
    assert "nothing to recycle" in said
    assert "gpu0  it holds " in said
