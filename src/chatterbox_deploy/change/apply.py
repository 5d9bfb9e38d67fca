"""Carry out a plan through a host, step by step. Decides nothing; prints nothing."""

from __future__ import annotations

import array
import io
import json
import math
import sys
import wave
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from chatterbox_deploy import nginx, systemd
from chatterbox_deploy.change import observe
from chatterbox_deploy.change.steps import (
    PointLink,
    Purge,
    RemoveFile,
    Run,
    ShowFront,
    Speak,
    StartUnits,
    StopUnits,
    VerifyUnits,
    WaitIdle,
    WaitReady,
    WriteFiles,
)
from chatterbox_deploy.errors import CommandFailed
from chatterbox_deploy.render import RenderedFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from chatterbox_deploy.change.steps import Step
    from chatterbox_deploy.fleet import Upstream
    from chatterbox_deploy.host import Answer, Host

STAGING_DIR = PurePosixPath("/run/chatterbox-deploy")
"""Units lie here, beside each other, while systemd reads them for the first time."""

COMMAND_TIMEOUT_S = 90.0
"""For commands that only talk to systemd or nginx."""

MARGIN_S = 30
"""What systemd may need beyond its own timeout, to kill what does not stop."""

LONGEST_STOP_S = 24 * 3600.0
"""A stop takes as long as the longest stream that still goes on, a book perhaps; systemd itself kills what hangs."""

RELOAD_TIMEOUT_S = 20.0
"""For nginx to read its files and start new workers."""

GRACE_S = 3.0
"""How long requests that a retired nginx worker still holds may take to reach an instance, before one is stopped."""

POLL_S = 0.2
CANARY = "One, two, three."
SILENCE_DBFS = -60.0


def carry_out(steps: Sequence[Step], host: Host, tell: Callable[[int, Step], None]) -> None:
    """Take one step after the other; ``tell`` hears of each, counted from 1, before it is taken.

    Raises:
        CommandFailed: a step failed; those before it are done, those after it are not begun.
    """
    for number, step in enumerate(steps, 1):
        tell(number, step)
        _take(step, host)


def _take(step: Step, host: Host) -> None:
    match step:
        case PointLink():
            host.link(step.path, step.target)
        case VerifyUnits():
            _verify(step.files, host)
        case WriteFiles():
            host.write_files([change.file for change in step.changes])
        case RemoveFile() | Purge():
            host.remove(step.path)
        case ShowFront():
            _show(step, host)
        case Run():
            host.run(step.argv, timeout_s=COMMAND_TIMEOUT_S)
        case StopUnits():
            host.run(("systemctl", "stop", *step.units), timeout_s=LONGEST_STOP_S)
        case StartUnits():
            # Starts count towards the limit of a crash loop, by hand too; one that failed before begins anew.
            host.run(("systemctl", "reset-failed", *step.units), timeout_s=COMMAND_TIMEOUT_S, check=False)
            _start(step, host)
        case WaitIdle():
            _wait_idle(step, host)
        case WaitReady():
            _wait_ready(step, host)
        case Speak():
            _speak(step, host)


def _verify(files: Sequence[RenderedFile], host: Host) -> None:
    """``systemd-analyze verify`` exits 0 on unknown keys: whatever it says is a refusal."""
    staged = [RenderedFile(STAGING_DIR / file.path.name, file.text) for file in files]
    host.write_files(staged)
    try:
        said = host.run(
            ("systemd-analyze", "verify", *(str(file.path) for file in staged)),
            timeout_s=COMMAND_TIMEOUT_S,
            check=False,
        )
        lines = [line for line in said.stderr.splitlines() if str(STAGING_DIR) in line or "chatterbox-tts" in line]
        if said.status != 0 or lines:
            msg = "cannot install units that systemd refuses; nothing was changed:\n  " + "\n  ".join(
                lines or said.stderr.splitlines()
            )
            raise CommandFailed(msg)
    finally:
        host.remove(STAGING_DIR)


def _show(step: ShowFront, host: Host) -> None:
    host.write_files([step.change.file])
    try:
        _test_front(host)
        workers = _nginx_workers(host)
        host.run(("systemctl", "reload-or-restart", systemd.NGINX_UNIT), timeout_s=COMMAND_TIMEOUT_S)
        _wait_for_new_workers(workers, host, grace_s=GRACE_S if _takes_somebody_out(step) else 0.0)
    except CommandFailed:
        # What nginx does not take must not lie there at its next start, which would fail for every site.
        if step.change.before is None:
            host.remove(step.change.file.path)
        else:
            host.write_files([RenderedFile(step.change.file.path, step.change.before, step.change.file.mode)])
        raise


def _test_front(host: Host) -> None:
    """Have nginx read its files, ours and those of others."""
    tested = host.run(("nginx", "-t"), timeout_s=COMMAND_TIMEOUT_S, check=False)
    if tested.status != 0:
        msg = f"cannot use a front that nginx refuses; it was put back:\n  {tested.stderr.strip()}"
        raise CommandFailed(msg)


def _takes_somebody_out(step: ShowFront) -> bool:
    """Or may have done so before: the same front is shown again only after an interruption."""

    def asked(upstreams: Iterable[Upstream]) -> set[tuple[str, int]]:
        return {(each.host, each.port) for each in upstreams if not (each.drained or each.leaving)}

    before = step.change.before or ""
    return before == step.change.file.text or bool(asked(nginx.find_upstreams(before)) - asked(step.upstreams))


def _nginx_workers(host: Host) -> list[str]:
    """Process ids of the workers of nginx; none where it does not run."""
    shown = host.run(systemd.show_argv([systemd.NGINX_UNIT], ["MainPID"]), timeout_s=COMMAND_TIMEOUT_S).stdout
    master = systemd.parse_show(shown)[0].get("MainPID", "0")
    children = host.read_bytes(PurePosixPath(f"/proc/{master}/task/{master}/children"))
    return (children or b"").decode().split()


def _wait_for_new_workers(before: Sequence[str], host: Host, *, grace_s: float) -> None:
    """A reload only asks: until the old workers retire, they take requests by the old list.

    Retired, they still hold what they accepted; ``grace_s`` is for those that had yet to pass it on.
    """
    deadline_s = host.monotonic_s() + RELOAD_TIMEOUT_S
    while any(_is_worker(host, worker, b"worker process") for worker in before):
        if host.monotonic_s() > deadline_s:
            msg = "cannot have nginx take the new front: it goes on with the old one; `journalctl -u nginx` tells why"
            raise CommandFailed(msg)
        host.sleep(POLL_S / 10)
    deadline_s = host.monotonic_s() + grace_s
    while host.monotonic_s() < deadline_s and any(_is_worker(host, worker, b"shutting down") for worker in before):
        host.sleep(POLL_S / 10)


def _is_worker(host: Host, process: str, words: bytes) -> bool:
    """Whether a process of nginx calls itself so: a retired one is a "worker process is shutting down"."""
    try:
        title = host.read_bytes(PurePosixPath(f"/proc/{process}/cmdline")) or b""
    except CommandFailed:
        # It ended as we looked.
        return False
    return title.rstrip(b"\0 ").endswith(words)


def _start(step: StartUnits, host: Host) -> None:
    try:
        host.run(("systemctl", "start", *step.units), timeout_s=step.timeout_s + MARGIN_S)
    except CommandFailed as error:
        last = host.run(
            (
                "journalctl",
                "--quiet",
                "--no-pager",
                "--lines=8",
                "--output=cat",
                *(f"--unit={unit}" for unit in step.units),
            ),
            timeout_s=COMMAND_TIMEOUT_S,
            check=False,
        ).stdout.strip()
        msg = f"{error}\nthe last lines of its journal:\n  " + "\n  ".join(last.splitlines())
        raise CommandFailed(msg) from None


def _wait_idle(step: WaitIdle, host: Host) -> None:
    deadline_s = host.monotonic_s() + step.timeout_s
    while host.monotonic_s() < deadline_s:
        if step.tells:
            answer = host.request("GET", f"http://{step.host}:{step.port}/readyz", timeout_s=5)
            told = _json(answer)
            # One that does not answer has nothing to finish.
            if told is None or not (told.get("waiting") or told.get("running")):
                return
        elif not observe.connections(host, step.port):
            return
        host.sleep(POLL_S)


def _wait_ready(step: WaitReady, host: Host) -> None:
    """The old process may still answer on the port, or another one may: whoever answers says which start it is."""
    deadline_s = host.monotonic_s() + step.timeout_s
    seen = "nobody answers"
    while True:
        shown = systemd.parse_show(
            host.run(
                systemd.show_argv([step.unit], ["ActiveState", "InvocationID", "NRestarts"]),
                timeout_s=COMMAND_TIMEOUT_S,
            ).stdout
        )[0]
        if step.tells:
            told = _json(host.request("GET", f"http://{step.host}:{step.port}/readyz", timeout_s=5))
            if told is not None and told.get("invocation_id") != shown["InvocationID"]:
                seen = "another process answers there"
            elif told is not None and told.get("ready") is True and shown["ActiveState"] == "active":
                return
            elif told is not None:
                seen = "it answers that it is not ready"
        elif shown["ActiveState"] == "active" and step.port in observe.listening(host):
            return
        if shown["ActiveState"] == "failed" or host.monotonic_s() > deadline_s:
            msg = (
                f"cannot get {step.name} ready: its unit is {shown['ActiveState']} and {seen} on port {step.port}; "
                f"`journalctl -u {step.unit}` tells more"
            )
            raise CommandFailed(msg)
        host.sleep(POLL_S)


def _json(answer: Answer | None) -> dict[str, object] | None:
    if answer is None:
        return None
    try:
        told = json.loads(answer.body)
    except ValueError:
        return None
    return told if isinstance(told, dict) else None


def _speak(step: Speak, host: Host) -> None:
    headers = {"Content-Type": "application/json"}
    if step.api_keys_file is not None:
        headers["Authorization"] = f"Bearer {observe.first_key(host, step.api_keys_file)}"
    answer = host.request(
        "POST",
        f"http://{step.host}:{step.port}/v1/audio/speech",
        headers=headers,
        body=json.dumps({"input": CANARY, "response_format": "wav"}).encode(),
        timeout_s=step.timeout_s,
    )
    if answer is None or answer.status != 200:
        said = (
            "no answer" if answer is None else f"{answer.status}: {answer.body[:300].decode(errors='replace').strip()}"
        )
        msg = f"cannot hear {step.name}: asked for {CANARY!r}, got {said}"
        raise CommandFailed(msg)
    if (loudest := _peak_dbfs(answer.body)) is None or loudest < SILENCE_DBFS:
        msg = f"cannot hear {step.name}: asked for {CANARY!r}, got " + ("no sound" if loudest is None else "silence")
        raise CommandFailed(msg)


def _peak_dbfs(recording: bytes) -> float | None:
    """Loudest sample of a 16-bit WAV, in dB below full scale; ``None`` if it is none, or holds none."""
    try:
        with wave.open(io.BytesIO(recording)) as opened:
            samples = array.array("h", opened.readframes(opened.getnframes()))
    except (wave.Error, EOFError, ValueError):
        return None
    if not samples:
        return None
    if sys.byteorder == "big":
        samples.byteswap()
    loudest = max(abs(sample) for sample in samples)
    return -200.0 if loudest == 0 else 20 * math.log10(loudest / 32768)
