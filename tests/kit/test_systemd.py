"""systemd's words. That quoting survives a real start is tested in tests/host."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from chatterbox_deploy import fleet, systemd
from chatterbox_deploy.change import observe
from chatterbox_deploy.change.ledger import Ledger
from chatterbox_deploy.config import reading
from chatterbox_deploy.errors import CommandFailed
from chatterbox_deploy.host import LocalHost, Ran

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

NEEDS_SYSTEMD = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")

NASTY = [
    "plain",
    "",
    "two words",
    'a "quoted" word',
    "it's",
    "100%",
    "%h",
    "$HOME",
    "${X}",
    "\\",
    "\\x41",
    ";",
    "ä → 語",
    "#",
]


def test_quoting_reads_like_this() -> None:
    assert systemd.quote("A=plain-1.0,/x:y") == "A=plain-1.0,/x:y"
    assert systemd.quote("A=two words") == '"A=two words"'
    assert systemd.quote('A=50% of "it" \\') == '"A=50%% of \\"it\\" \\\\"'
    assert systemd.quote_command(["/bin/x", "$HOME", ";"]) == '/bin/x "$$HOME" ";"'


@NEEDS_SYSTEMD
@pytest.mark.parametrize("text", NASTY)
def test_systemd_accepts_what_was_quoted(text: str, tmp_path: Path) -> None:
    unit = tmp_path / "quoting.service"
    unit.write_text(
        f"[Service]\nEnvironment={systemd.quote(f'A={text}')}\nExecStart={systemd.quote_command(['/bin/true', text])}\n"
    )

    said = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False)

    assert said.returncode == 0
    assert said.stderr == ""


def test_the_journal_is_asked_for_one_unit_plainly_and_for_several_with_their_names() -> None:
    assert systemd.journal_argv(["a.service"], lines=100) == (
        "journalctl",
        "--no-pager",
        "--lines=100",
        "--unit=a.service",
    )
    assert systemd.journal_argv(["a.service", "b.service"], since="-10min", follow=True) == (
        "journalctl",
        "--no-pager",
        "--output=with-unit",
        "--since=-10min",
        "--follow",
        "--unit=a.service",
        "--unit=b.service",
    )


@pytest.mark.parametrize(
    ("server", "answer"),
    [
        ("", "yes"),
        ("weights = '/home/ada/checkpoint'", "read-only"),
        ("python = '/root/venv/bin/python'", "read-only"),
        ("command = ['/home/ada/serve', '{port}']", "read-only"),
        ("command = ['/srv/serve', '--config', '/home/ada/x', '{port}']", "read-only"),
        ("command = ['/srv/serve', '--config=/home/ada/x', '{port}']", "read-only"),
        ("command = ['/srv/serve', '{port}']\ndirectory = '/home/ada'", "read-only"),
        ("weights = '/homes/checkpoint'", "yes"),
    ],
)
def test_homes_are_hidden_unless_the_fleet_uses_one(server: str, answer: str) -> None:
    text = f"[gpus]\n0 = 6093\n[server]\n{server}"

    assert systemd.protect_home(fleet.resolve(reading.load(text, source="f"))) == answer


@pytest.mark.parametrize(
    ("gpus", "clients"), [("1", "GPU-1"), ("3,2", "GPU-3,GPU-2"), ("GPU-8f3c2a1b-0000-4000-8000-00000000000a", None)]
)
def test_clients_of_an_mps_daemon_are_told_each_gpu_by_its_uuid(gpus: str, clients: str | None, tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\necho "GPU-${1#--id=}"\n')
    smi.chmod(0o755)
    (daemon,) = fleet.resolve(reading.load(f"[gpus]\n'{gpus}' = [6093, 6094]\n", source="f")).mps_daemons
    here = replace(daemon, directory=str(tmp_path))

    subprocess.run(systemd.tell_clients_command(here), env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=True)

    assert (tmp_path / "clients.env").read_text() == f"CUDA_VISIBLE_DEVICES={clients or gpus}\n"


def test_clients_of_an_mps_daemon_are_told_nothing_where_there_is_no_such_gpu(tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho No devices were found\nexit 6\n")
    smi.chmod(0o755)
    (daemon,) = fleet.resolve(reading.load("[gpus]\n7 = [6093, 6094]\n", source="f")).mps_daemons
    here = replace(daemon, directory=str(tmp_path))

    done = subprocess.run(systemd.tell_clients_command(here), env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=False)

    assert done.returncode == 6
    assert not (tmp_path / "clients.env").exists()


def test_names_tell_instances_from_their_mps_daemons() -> None:
    assert systemd.instance_name("chatterbox-tts-mps-gpu0.service") is None
    assert systemd.is_mps_unit("chatterbox-tts-mps-gpu0.service")
    assert not systemd.is_mps_unit("chatterbox-tts-gpu0-a.service")
    assert systemd.instance_name("chatterbox-tts-gpu0-a.service") == "gpu0-a"


WITHOUT = [
    # systemctl 252 in a container of Debian 12, whole.
    "System has not been booted with systemd as init system (PID 1). Can't operate.\n"
    "Failed to connect to bus: Host is down",
    "Failed to connect to bus: Host is down",
    "Failed to connect to system scope bus via local transport: No such file or directory",
]


class _Without(LocalHost):
    """A machine on which ``systemctl`` says so, or is missing."""

    def __init__(self, root: Path, said: str | None) -> None:
        super().__init__(root)
        self.said = said

    def run(self, argv: Sequence[str], *, timeout_s: float, check: bool = True) -> Ran:
        how = "no such file or directory" if self.said is None else f"exit status 1: {self.said}"
        msg = f"cannot run `{shlex.join(argv)}`: {how}"
        raise CommandFailed(msg)


@pytest.mark.parametrize("said", [*WITHOUT, None])
def test_without_systemd_it_says_what_to_type_instead(said: str | None, tmp_path: Path) -> None:
    with pytest.raises(
        CommandFailed, match=r"none runs here; `chatterbox-deploy up` .* `chatterbox-deploy apply --root"
    ):
        observe.state(_Without(tmp_path, said), Ledger())


def test_a_systemd_that_refuses_is_no_systemd_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="Connection timed out"):
        observe.state(_Without(tmp_path, "Failed to connect to bus: Connection timed out"), Ledger())
