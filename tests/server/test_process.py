"""``python -m chatterbox_server`` as systemd runs it: real process, real port, real signals."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from server.fakes import PATIENCE_S

pytestmark = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")

ESPEAK_THAT_MAY_HANG = """#!/bin/sh
# Stands before the real one in PATH, and never answers a request for "hang".
case "$*" in *--stdin*) ;; *) exec {espeak} "$@" ;; esac
text=$(cat)
case "$text" in hang*) exec sleep 600 ;; esac
printf %s "$text" | {espeak} "$@"
"""


class Instance:
    """One server process and what it told systemd."""

    def __init__(self, process: "subprocess.Popen[str]", url: str, told: socket.socket) -> None:
        self.process = process
        self.url = url
        self._told = told
        self.heard: list[str] = []

    def listen(self, timeout_s: float) -> str | None:
        """The next datagram; ``None`` when none comes in time."""
        self._told.settimeout(timeout_s)
        try:
            message = self._told.recv(4096).decode()
        except TimeoutError:
            return None
        self.heard.append(message)
        return message

    def wait_told(self, line: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if line in (self.listen(0.2) or "").splitlines():
                return
            if self.process.poll() is not None:
                break
        pytest.fail(f"never told {line}: {self.heard}, status {self.process.poll()}")

    def stop(self) -> tuple[int, str]:
        """End it as systemd does; its exit status and its log."""
        self.process.send_signal(signal.SIGTERM)
        _, log = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, log


@contextmanager
def an_instance(tmp_path: Path, *, code: str = "", **environ: str) -> Iterator[Instance]:
    """The server, or ``code`` instead of its ``__main__``."""
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told, socket.socket() as free:
        told.bind(address)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        process = subprocess.Popen(
            (sys.executable, *(("-c", code) if code else ("-m", "chatterbox_server"))),
            env=clean_environ()
            | {"CHATTERBOX_ENGINE": "espeak", "CHATTERBOX_PORT": str(port), "NOTIFY_SOCKET": address}
            | environ,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            yield Instance(process, f"http://127.0.0.1:{port}", told)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def clean_environ() -> dict[str, str]:
    systemds = ("CHATTERBOX_", "NOTIFY_", "WATCHDOG_", "INVOCATION_", "CUDA_")
    return {name: value for name, value in os.environ.items() if not name.startswith(systemds)}


def start_and_fail(*program: str, **environ: str) -> tuple[int, str]:
    """The server's exit status and what it said; or those of another ``program``."""
    done = subprocess.run(
        (sys.executable, *(program or ("-m", "chatterbox_server"))),
        env=clean_environ() | environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    return done.returncode, done.stderr


def test_ready_is_told_when_the_port_answers_and_a_sigterm_finishes_what_was_accepted(tmp_path: Path) -> None:
    slow = tmp_path / "espeak-ng"
    # Slow enough that the signal comes in the middle.
    slow.write_text(f'#!/bin/sh\ncase "$*" in *--stdin*) sleep 1 ;; esac\nexec {shutil.which("espeak-ng")} "$@"\n')
    slow.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    with (
        an_instance(tmp_path, PATH=path, INVOCATION_ID="abc", CHATTERBOX_INSTANCE="gpu0") as instance,
        httpx.Client(base_url=instance.url, timeout=PATIENCE_S) as client,
    ):
        instance.wait_told("READY=1")
        ready = client.get("/readyz").json()
        assert (ready["instance"], ready["invocation_id"], ready["spoken"]) == ("gpu0", "abc", 1)
        host, port = instance.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            body = b'{"input": "Hello.", "response_format": "wav"}'
            head = "POST /v1/audio/speech HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            while not client.get("/readyz").json()["running"]:
                time.sleep(0.01)
            status, log = instance.stop()
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert b"RIFF" in answer
        assert status == 0
        assert "outcome=answered" in log
        instance.wait_told("STOPPING=1")
        with pytest.raises(httpx.ConnectError):
            client.get("/healthz")


def test_watchdog_pings_stop_while_the_engine_hangs(tmp_path: Path) -> None:
    program = tmp_path / "espeak-ng"
    program.write_text(ESPEAK_THAT_MAY_HANG.format(espeak=shutil.which("espeak-ng")))
    program.chmod(0o755)
    environ = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "WATCHDOG_USEC": "200000",
        "CHATTERBOX_LONGEST_UTTERANCE_S": "1",
    }
    with (
        an_instance(tmp_path, **environ) as instance,
        httpx.Client(base_url=instance.url, timeout=PATIENCE_S) as client,
    ):
        instance.wait_told("READY=1")
        instance.wait_told("WATCHDOG=1")
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/audio/speech", json={"input": "hang"}, timeout=0.5)
        while client.get("/readyz").status_code == 200:
            time.sleep(0.05)
        while instance.listen(1.0) is not None:
            # What was told before, and that it is stuck; pings would come ten times a second, for ever.
            assert len(instance.heard) < 200
        assert "STATUS=engine stuck, speaking, 0 waiting, 1 spoken" in instance.heard[-1]
        assert client.get("/healthz").status_code == 200
        # Nobody waits for that utterance: stopping does not either.
        assert instance.stop()[0] == 0


WITH_A_FAKE_ENGINE = """
import sys, threading
from chatterbox_server import __main__, engines
from chatterbox_server.engine import EngineBroken
from server.fakes import FakeEngine

class Engine(FakeEngine):
    def synthesize(self, utterance, errand):
        if utterance.text == "grow":
            self.grown = b"x" * 400_000_000
        if utterance.text == "fine until later":
            threading.Timer(0.1, self.give_up).start()
        return super().synthesize(utterance, errand)

    def give_up(self):
        self.broken = EngineBroken("thread fast-t3 has ended")

engines.load = lambda settings: Engine()
sys.exit(__main__.main())
"""
IMPORTED = os.pathsep.join((str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")))
FAKE = {"code": WITH_A_FAKE_ENGINE, "PYTHONPATH": IMPORTED, "CHATTERBOX_CHECK_DURATION": "false"}


def say(instance: Instance, text: str, **headers: str) -> httpx.Response:
    return httpx.post(f"{instance.url}/v1/audio/speech", json={"input": text}, headers=headers, timeout=PATIENCE_S)


def test_a_broken_engine_answers_503_and_ends_the_process_with_its_own_status(tmp_path: Path) -> None:
    """nginx asks another GPU; systemd starts a fresh process."""
    with an_instance(tmp_path, **FAKE) as instance:
        instance.wait_told("READY=1")
        answer = say(instance, "break")
        assert (answer.status_code, answer.headers["x-engine"]) == (503, "broken")
        _, log = instance.process.communicate(timeout=PATIENCE_S)
    assert instance.process.returncode == 70
    assert log.count("the engine is broken, ending the process: device-side assert") == 1
    assert "Traceback" not in log


def test_an_engine_that_breaks_while_nobody_asks_ends_the_process_too(tmp_path: Path) -> None:
    with an_instance(tmp_path, **FAKE) as instance:
        instance.wait_told("READY=1")
        assert say(instance, "fine until later").status_code == 200
        _, log = instance.process.communicate(timeout=PATIENCE_S)
    assert instance.process.returncode == 70
    assert log.count("the engine is broken, ending the process: thread fast-t3 has ended") == 1


def test_a_process_that_has_grown_too_large_drains_and_ends_with_its_own_status(tmp_path: Path) -> None:
    with an_instance(tmp_path, CHATTERBOX_RECYCLE_HOST_MB="400", **FAKE) as instance:
        instance.wait_told("READY=1")
        assert say(instance, "fine").status_code == 200
        assert say(instance, "grow").status_code == 200
        instance.wait_told("STOPPING=1")
        _, log = instance.process.communicate(timeout=PATIENCE_S)
    assert instance.process.returncode == 75
    assert "and recycle_host_mb is 400" in log


def test_a_stop_takes_as_long_as_what_was_begun(tmp_path: Path) -> None:
    slow = tmp_path / "espeak-ng"
    slow.write_text(f'#!/bin/sh\ncase "$*" in *--stdin*) sleep 1 ;; esac\nexec {shutil.which("espeak-ng")} "$@"\n')
    slow.chmod(0o755)
    book = " ".join(f"This is sentence number {number} of quite a long text." for number in range(60))
    with an_instance(tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}") as instance:
        instance.wait_told("READY=1")
        body = {"input": book, "response_format": "pcm"}
        with httpx.stream("POST", f"{instance.url}/v1/audio/speech", json=body, timeout=PATIENCE_S) as answer:
            chunks = answer.iter_raw()
            next(chunks)
            instance.process.send_signal(signal.SIGTERM)
            instance.wait_told("STOPPING=1")
            instance.wait_told("EXTEND_TIMEOUT_USEC=15000000")
            # Raises, were the stream cut short.
            assert sum(map(len, chunks)) > 100 * 48_000
        assert instance.process.wait(timeout=PATIENCE_S) == 0


WITH_A_THREAD_OF_ITS_OWN = """
import sys, threading, torch
from chatterbox_server import __main__, engines
from server.fakes import FakeEngine

def work():
    one = torch.ones(1000, 1000)
    while True:
        torch.mm(one, one)

def load(settings):
    threading.Thread(target=work, daemon=True).start()
    return FakeEngine()

engines.load = load
sys.exit(__main__.main())
"""


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
def test_a_thread_of_the_engines_that_is_still_at_work_makes_no_stop_a_crash(tmp_path: Path) -> None:
    """As the fast engine's may be, for a client that left; torch aborts where Python is finalized beneath it."""
    told = {"code": WITH_A_THREAD_OF_ITS_OWN, "PYTHONPATH": IMPORTED, "OMP_NUM_THREADS": "1"}
    with an_instance(tmp_path, **told) as instance:
        instance.wait_told("READY=1")
        assert instance.stop()[0] == 0


def test_keys_are_asked_for_and_read_again_on_a_hangup(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"alice {'a' * 16}\n")
    with an_instance(tmp_path, CHATTERBOX_API_KEYS_FILE=str(keys), **FAKE) as instance:
        instance.wait_told("READY=1")
        assert say(instance, "fine").status_code == 401
        assert say(instance, "fine", Authorization=f"Bearer {'a' * 16}").status_code == 200
        keys.write_text(f"bob {'b' * 16}\n")
        instance.process.send_signal(signal.SIGHUP)
        while say(instance, "fine", Authorization=f"Bearer {'b' * 16}").status_code != 200:
            time.sleep(0.05)
        assert say(instance, "fine", Authorization=f"Bearer {'a' * 16}").status_code == 401
        _, log = instance.stop()
    assert "client=alice" in log
    assert "a" * 16 not in log


def test_keys_that_cannot_be_read_are_exit_status_2(tmp_path: Path) -> None:
    status, said = start_and_fail(CHATTERBOX_ENGINE="espeak", CHATTERBOX_API_KEYS_FILE=str(tmp_path / "none"))
    assert status == 2
    assert "cannot use the API keys" in said


def test_a_wrong_environment_is_exit_status_2() -> None:
    status, said = start_and_fail(CHATTERBOX_PROT="1", CHATTERBOX_ENGINE="espeak")
    assert status == 2
    assert (
        said
        == """
cannot start: the environment has 1 problem
  CHATTERBOX_PROT: unknown name (did you mean 'CHATTERBOX_PORT'?)
"""[1:]
    )


def test_an_engine_that_cannot_load_is_exit_status_1_and_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "espeak-ng"
    broken.write_text("#!/bin/sh\necho no data >&2; exit 3\n")
    broken.chmod(0o755)
    status, said = start_and_fail(CHATTERBOX_ENGINE="espeak", PATH=str(tmp_path))
    assert status == 1
    assert said == "ERROR cannot start: cannot run espeak-ng: exit status 3: no data\n"


def test_a_missing_program_is_exit_status_2_for_no_fresh_start_would_find_it() -> None:
    status, said = start_and_fail(CHATTERBOX_ENGINE="espeak", PATH="/nowhere")
    assert status == 2
    assert said == "ERROR cannot start: cannot find espeak-ng: apt-get install espeak-ng\n"


@pytest.mark.parametrize("engine", ["stock", "fast"])
def test_a_missing_package_is_exit_status_2_for_no_fresh_start_would_find_it(engine: str, tmp_path: Path) -> None:
    # The package that the engine imports first.
    (tmp_path / "perth.py").write_text("raise ModuleNotFoundError(\"No module named 'perth'\")\n")
    status, said = start_and_fail(CHATTERBOX_ENGINE=engine, CHATTERBOX_DEVICE="cpu", PYTHONPATH=str(tmp_path))
    assert status == 2
    assert said == (
        "ERROR cannot start: cannot import chatterbox-tts (ModuleNotFoundError: No module named 'perth'); "
        "in a checkout: pip install '.[server]'\n"
    )


def test_settings_that_no_engine_can_follow_are_exit_status_2() -> None:
    status, said = start_and_fail(CHATTERBOX_ENGINE="fast", CUDA_VISIBLE_DEVICES="0,1")
    assert status == 2
    assert "cannot spread the fast engine over 2 GPUs" in said


def test_a_port_that_is_taken_is_exit_status_1() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        status, said = start_and_fail(CHATTERBOX_ENGINE="espeak", CHATTERBOX_PORT=port)
    assert status == 1
    assert "address already in use" in said


TINY = str(Path(__file__).parents[2] / "scripts/tiny_server.py")


def test_the_tiny_server_says_what_is_wrong_before_it_makes_its_model(tmp_path: Path) -> None:
    assert start_and_fail(TINY, CHATTERBOX_PROT="1") == (
        2,
        "cannot start: the environment has 1 problem\n"
        "  CHATTERBOX_PROT: unknown name (did you mean 'CHATTERBOX_PORT'?)\n",
    )
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        without_torch = {"PYTHONPATH": str(tmp_path), "CHATTERBOX_PORT": port}
        taken.listen()
        assert start_and_fail(TINY, **without_torch) == (
            1,
            f"ERROR cannot start: cannot listen on 127.0.0.1:{port}: Address already in use; `ss -ltnp` shows who "
            "does, and CHATTERBOX_PORT=6193 takes another port\n",
        )
    assert start_and_fail(TINY, **without_torch) == (
        2,
        "ERROR cannot start: cannot import chatterbox-tts (No module named 'torch'); `scripts/test` makes .venv-tests, "
        "which has it\n",
    )
