"""A report on a real systemd and a real nginx; for the driver that is not there, two scripted cards."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from support.sandbox import PYTHON
from support.situations import SEED

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.sandbox import Sandbox

pytestmark = pytest.mark.systemd

FLEET_TOML = "/etc/chatterbox-tts/fleet.toml"
FRONT = "/etc/nginx/conf.d/chatterbox-tts.conf"
OURS = "chatterbox-tts-gpu0.service"
REQUESTS = 8

# Somebody's own server: it names a GPU in its code.
HANDMADE = """\
import time
if False:
    from chatterbox.tts import ChatterboxTTS
    model = ChatterboxTTS.from_pretrained(device="cuda:1")
time.sleep(1000)
"""
HANDMADE_UNIT = f"[Service]\nExecStart={PYTHON} /srv/home_tts.py\nEnvironment=CUDA_VISIBLE_DEVICES=1\n"

# Answers for the driver: who computes on GPU 0 is the instance gpu0.
NVIDIA_SMI = f"""\
#!/bin/sh
pid=$(systemctl show --value --property=MainPID {OURS})
sed "s/<pid>48211</<pid>$pid</" /srv/two-rtx-3090.xml
"""


@pytest.fixture(scope="module")
def told(boot: Callable[[], Sandbox]) -> dict[str, Any]:
    """What the report says of two espeak instances behind the host's nginx, beside a server of somebody's own."""
    sandbox = boot()
    sandbox.write(FLEET_TOML, '[gpus]\n0 = 6093\n1 = 6094\n[server]\nengine = "espeak"\n')
    sandbox.run(PYTHON, "-m", "chatterbox_deploy", "render", FLEET_TOML, "--output", "/")
    sandbox.write("/srv/home_tts.py", HANDMADE)
    sandbox.write("/etc/systemd/system/home-made.service", HANDMADE_UNIT)
    sandbox.write("/srv/two-rtx-3090.xml", SEED.read_text())
    sandbox.write("/usr/local/bin/nvidia-smi", NVIDIA_SMI)
    sandbox.run("chmod", "755", "/usr/local/bin/nvidia-smi")
    sandbox.run("systemctl", "daemon-reload")
    sandbox.run("systemctl", "enable", "--now", "chatterbox-tts.target")
    sandbox.run("systemctl", "start", "home-made.service")
    ask = 'curl -sSf -o /dev/null --json \'{"input": "One."}\' http://127.0.0.1:6095/v1/audio/speech'
    sandbox.run("sh", "-ec", f"for i in $(seq {REQUESTS}); do {ask}; done")
    # An operator's idea of tuning.
    sandbox.run("sed", "-i", "/zone chatterbox 1m;/d", FRONT)
    said = sandbox.run("sh", "-c", f"cd /srv && {PYTHON} -m chatterbox_deploy report --format json; test $? = 1")
    report: dict[str, Any] = json.loads(said)
    return report


def findings(told: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [each for each in told["findings"] if each["name"] == name]


def test_a_process_on_a_gpu_is_followed_to_its_unit(told: dict[str, Any]) -> None:
    holder = told["gpus"][0]["holders"][0]

    assert (holder["unit"], holder["kind"], holder["memory_bytes"]) == (OURS, "instance", 9_062 * 2**20)
    assert told["told_by"] == "`nvidia-smi -q -x`"


def test_requests_are_counted_from_the_log_that_nginx_wrote(told: dict[str, Any]) -> None:
    assert set(told["requests"]["answered"]) <= {"gpu0", "gpu1"}
    assert sum(told["requests"]["answered"].values()) == REQUESTS


def test_a_front_without_its_zone_is_found(told: dict[str, Any]) -> None:
    (finding,) = findings(told, "least-conn-without-zone")

    assert finding["evidence"][0] == f"{FRONT}: upstream chatterbox, ports 6093, 6094"


def test_somebodys_own_server_is_found_and_its_code_read(told: dict[str, Any]) -> None:
    (named,) = findings(told, "hard-coded-gpu")

    assert named["evidence"] == [
        '/srv/home_tts.py:4: model = ChatterboxTTS.from_pretrained(device="cuda:1")',
    ]
    assert f'# command = ["{PYTHON}", "/srv/home_tts.py"]' in told["proposal"]["text"]
    assert "the server that runs now (home-made.service)" in told["proposal"]["text"]
    # Not all are pinned to the same one.
    assert findings(told, "pinned-to-one-gpu") == []


def test_everything_was_ours_to_look_at(told: dict[str, Any]) -> None:
    # The desktop of the capture is not on this machine.
    assert told["not_looked_at"] == [
        "what process 1407 is: not to be seen from here (another container, or already gone)"
    ]
