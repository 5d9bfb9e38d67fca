"""What a host tells for a report: a directory tree that stands for one, with what its programs say."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from chatterbox_deploy.errors import CommandFailed
from chatterbox_deploy.gpu import nvml
from chatterbox_deploy.host import Answer, LocalHost, Ran
from chatterbox_deploy.nginx import Traffic
from chatterbox_deploy.report import findings, investigate
from chatterbox_deploy.report.investigate import ACCESS_LOG
from chatterbox_deploy.report.situation import Pin
from support.situations import SEED, card, fleet_file, process

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path, PurePosixPath

    from chatterbox_deploy.gpu.cards import Card
    from chatterbox_deploy.report.situation import FleetFile, Situation

HANDMADE = """\
import os
from chatterbox.tts import ChatterboxTTS
model = ChatterboxTTS.from_pretrained(device="cuda:0")
"""
FRONT = """\
upstream chatterbox {
    least_conn;
    server 127.0.0.1:6093 max_fails=1 fail_timeout=1s; # gpu0
    server 127.0.0.1:6094 max_fails=1 fail_timeout=1s; # gpu1
    server 127.0.0.1:6096 down; # gpu2, drained
}
"""
SS = """\
LISTEN 0 2048 127.0.0.1:8000 0.0.0.0:* users:(("python",pid=900,fd=6))
LISTEN 0 2048 [::]:8000 [::]:* users:(("python",pid=900,fd=7))
LISTEN 0 511 0.0.0.0:80 0.0.0.0:*
"""


NOON = "2026-11-27T12:00:00+00:00"


class TreeHost(LocalHost):
    """Files below a directory; ``ss`` says what it would."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.root = root
        self.says: dict[str, str] = {}
        self.answers: dict[str, bytes] = {}
        self.slept_s = 0.0
        self.closed: set[str] = set()
        """Files that only root may read."""

    def place(self, path: str, content: str | bytes) -> None:
        at = self.root / path.lstrip("/")
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_bytes(content.encode() if isinstance(content, str) else content)

    def process(self, pid: int, *argv: str, unit: str = "", environ: str | None = None, ticks: int = 0) -> None:
        self.place(f"/proc/{pid}/cmdline", "".join(f"{word}\0" for word in argv))
        self.place(f"/proc/{pid}/cgroup", f"0::/system.slice/{unit}\n" if unit else "0::/\n")
        self.place(f"/proc/{pid}/stat", f"{pid} (python) S {' '.join(['0'] * 10)} {ticks} 0 {' '.join(['0'] * 20)}")
        if environ is not None:
            self.place(f"/proc/{pid}/environ", environ.replace(" ", "\0"))

    def read_bytes(self, path: PurePosixPath) -> bytes | None:
        if str(path) in self.closed:
            msg = f"cannot read {path}: permission denied"
            raise CommandFailed(msg)
        return super().read_bytes(path)

    def run(self, argv: Sequence[str], *, timeout_s: float, check: bool = True) -> Ran:
        if argv[0] not in self.says:
            msg = f"cannot run `{argv[0]}`: no such file or directory"
            raise CommandFailed(msg)
        return Ran(0, self.says[argv[0]])

    def request(
        self, method: str, url: str, *, headers: Mapping[str, str] | None = None, body: bytes = b"", timeout_s: float
    ) -> Answer | None:
        return Answer(200, body=self.answers[url]) if url in self.answers else None

    def monotonic_s(self) -> float:
        return 100.0 + self.slept_s

    def sleep(self, seconds: float) -> None:
        """Whoever computes on the CPU has done so meanwhile: process 900, on one and a half cores."""
        self.slept_s += seconds
        if (self.root / "proc/900").exists():
            self.process(900, *self.busy, ticks=int(1.5 * seconds * investigate._TICKS_PER_S))

    busy: tuple[str, ...] = ()


@pytest.fixture
def host(tmp_path: Path) -> TreeHost:
    return TreeHost(tmp_path)


def look(host: TreeHost, *cards: Card, file: FleetFile | None = None) -> Situation:
    return investigate.investigate(host, file, lambda _: (cards, "NVML"))


def test_a_process_on_a_gpu_is_followed_to_its_unit_its_settings_and_its_code(host: TreeHost) -> None:
    host.process(
        812, "/srv/tts/venv/bin/python", "api.py", unit="my-voice.service", environ="A=b CUDA_VISIBLE_DEVICES=0"
    )
    (host.root / "proc/812/cwd").symlink_to("/srv/tts")
    host.place("/srv/tts/api.py", HANDMADE)

    seen = look(host, card(0, process(812)), card(1))

    program = seen.programs[812]
    assert (program.unit, program.kind, program.visible) == ("my-voice.service", "speech", "0")
    assert (program.name, program.directory, program.environment_read) == ("python", "/srv/tts", True)
    assert [(line.path, line.number, line.device) for line in seen.code] == [("/srv/tts/api.py", 3, "cuda:0")]
    assert seen.pins == (Pin("my-voice.service", "0"),)
    assert {each.name for each in findings.find(seen)} == {
        "gpu-idle", "one-gpu-takes-all", "pinned-to-one-gpu", "hard-coded-gpu",
    }  # fmt: skip


def test_an_instance_of_ours_and_the_desktop_are_told_apart(host: TreeHost) -> None:
    host.process(
        1, "/opt/python", "-m", "chatterbox_server", unit="chatterbox-tts-gpu0.service",
        environ="FLEET_INSTANCE=gpu0/127.0.0.1:6093/0123456789ab CUDA_VISIBLE_DEVICES=0",
    )  # fmt: skip
    host.process(2, "/usr/lib/xorg/Xorg", ":0")
    host.process(3, "/usr/bin/nvidia-cuda-mps-server")
    host.process(4, "/usr/bin/python3", "train.py")

    seen = look(host, card(0, process(1), process(2, kind="G"), process(3), process(4)))

    assert [seen.programs[pid].kind for pid in (1, 2, 3, 4)] == ["instance", "display", "mps", "other"]


def test_a_server_that_computes_on_the_cpu_is_found_beside_an_idle_gpu(host: TreeHost) -> None:
    host.busy = ("/usr/bin/python3", "chatterbox_api.py", "--port", "8000")
    host.process(900, *host.busy)
    host.says["ss"] = SS

    seen = look(host, card(0))

    assert seen.programs[900].cpu_cores == pytest.approx(1.5, abs=0.02)
    assert seen.programs[900].ports == (8000,)
    assert seen.listening == {80, 8000}
    assert "cpu-bound-beside-idle-gpu" in {each.name for each in findings.find(seen)}


def test_nginx_and_its_log_are_read(host: TreeHost) -> None:
    host.place("/etc/nginx/conf.d/chatterbox-tts.conf", FRONT)
    host.place("/etc/nginx/sites-enabled/blog", "upstream blog { server 127.0.0.1:3000; }")
    said = {"uri": "/v1/audio/speech", "status": 200, "instance": "gpu0", "duration_s": 1, "tries": "", "tried": ""}
    host.place(ACCESS_LOG, f"cut off\n{json.dumps({'time': NOON, **said})}\n")
    file = fleet_file("[gpus]\n0 = 6093\n1 = 6094\n2 = 6096\n")

    seen = look(host, card(0), file=file)

    assert [(block.name, block.zone) for block in seen.upstreams] == [("chatterbox", False), ("blog", False)]
    assert seen.traffic == Traffic({"gpu0": 1}, NOON, NOON)
    assert seen.in_service == ("gpu0", "gpu1")
    assert "least-conn-without-zone" in {each.name for each in findings.find(seen)}


def test_what_the_instances_say_of_tf32_is_heard(host: TreeHost) -> None:
    for port, facts in ((6093, {"tf32": {"matmul": False, "cudnn": True}}), (6094, {}), (6096, None)):
        host.answers[f"http://127.0.0.1:{port}/readyz"] = json.dumps({"ready": True, "facts": facts}).encode()
    host.answers["http://127.0.0.1:6097/readyz"] = b"<h1>Not Found</h1>"
    file = fleet_file("[gpus]\n0 = 6093\n1 = 6094\n2 = 6096\n3 = 6097\n4 = 6098\n")

    assert look(host, card(0), file=file).tf32 == {"gpu0": False}


def test_the_fast_engine_heeds_no_tf32_so_what_it_says_of_it_is_no_finding(host: TreeHost) -> None:
    said = {"ready": True, "facts": {"tf32": {"matmul": False, "cudnn": False}}}
    for port, engine in ((6093, "fast"), (6094, "stock")):
        host.answers[f"http://127.0.0.1:{port}/readyz"] = json.dumps({**said, "engine": engine}).encode()
    file = fleet_file("[gpus]\n0 = 6093\n1 = 6094\n[server]\nengine = 'fast'\n")

    assert look(host, card(0), file=file).tf32 == {"gpu1": False}


def test_units_that_do_not_run_tell_to_which_gpu_they_are_pinned(host: TreeHost) -> None:
    unit = "[Service]\nExecStart=/srv/venv/bin/python /srv/tts_api.py\nEnvironment=CUDA_VISIBLE_DEVICES=0\n"
    host.place("/etc/systemd/system/voice.service", unit)
    host.place(
        "/etc/systemd/system/ollama.service", "[Service]\nExecStart=/bin/ollama\nEnvironment=CUDA_VISIBLE_DEVICES=1\n"
    )
    host.place("/etc/systemd/system/chatterbox-tts-gpu0.service", '[Service]\nEnvironment="CUDA_VISIBLE_DEVICES=0"\n')

    assert look(host, card(0), card(1)).pins == (Pin("chatterbox-tts-gpu0.service", "0"), Pin("voice.service", "0"))


def test_the_code_of_server_command_is_read_though_it_does_not_run(host: TreeHost) -> None:
    host.place("/srv/tts/api.py", 'model.to("cuda:1")\n')
    file = fleet_file(
        '[gpus]\n0 = 6093\n[server]\ncommand = ["/opt/venv/bin/python", "api.py", "{port}"]\ndirectory = "/srv/tts"\n'
    )

    assert [line.device for line in look(host, card(0), file=file).code] == ["cuda:1"]


def test_what_could_not_be_looked_at_is_said_with_the_reason(host: TreeHost) -> None:
    host.process(812, "/usr/bin/python3", "/srv/tts.py", unit="tts.service", environ="CUDA_VISIBLE_DEVICES=0")
    host.closed = {"/proc/812/environ", "/srv/tts.py", "/etc/nginx/nginx.conf"}
    host.place("/etc/nginx/nginx.conf", "http {}")

    lost = card(2, uuid="", name="a GPU that does not answer (GPU is lost)")
    seen = look(host, card(0, process(812), process(77)), card(1, processes=None), lost)

    assert seen.unseen == (
        "GPU 2: a GPU that does not answer (GPU is lost); dmesg(1) may say why",
        "the processes on GPU 1: the driver does not tell",
        "what process 77 is: not to be seen from here (another container, or already gone)",
        "the environment of tts.service, and where its code lies: only root may read that (sudo)",
        "the code in /srv/tts.py: not there, not ours to read, or too long",
        "nginx's configuration: there is none in /etc/nginx that could be read",
        "who listens on which port: ss(8) does not answer",
    )
    assert seen.pins == ()
    assert seen.programs[77].kind is None


def test_a_log_that_is_not_ours_to_read_is_named_where_a_front_of_ours_is(host: TreeHost) -> None:
    host.place("/etc/nginx/conf.d/chatterbox-tts.conf", FRONT)

    assert look(host, card(0)).unseen == (
        "who answered how many requests: /var/log/nginx/chatterbox-tts.access.log is not there, or not ours to read",
        "who listens on which port: ss(8) does not answer",
    )


@pytest.mark.skipif(nvml.read(watch_s=0) is not None, reason="NVML answers here")
def test_where_nvml_does_not_answer_nvidia_smi_is_asked(host: TreeHost) -> None:
    assert investigate.cards(host)[0] == ()
    host.says["nvidia-smi"] = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
    assert investigate.cards(host) == ((), "NVML and `nvidia-smi -q -x`, and neither answers")
    host.says["nvidia-smi"] = SEED.read_text()

    found, told_by = investigate.cards(host)

    assert ([each.index for each in found], told_by) == (["0", "1"], "`nvidia-smi -q -x`")
