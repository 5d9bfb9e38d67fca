"""A machine of its own with a real systemd, and this checkout's code installed on it as on a host."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
COMMAND = CHECKOUT / "scripts/systemd-sandbox"

PYTHON = "/opt/chatterbox-tts/venv/bin/python"
"""Inside: the interpreter that units run by default."""

TESTS = "/opt/tests-host"
"""Inside: tests/host."""


class Sandbox:
    """A booted machine of its own: process tree, file system and loopback network."""

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, *argv: str, check: bool = True, limit_s: int = 120) -> str:
        """Standard output of a command inside; its standard error too when it fails."""
        done = subprocess.run(
            [COMMAND, "exec", self.name, "--timeout", str(limit_s), "--chdir", "/", "--", *argv],
            capture_output=True,
            text=True,
            check=False,
        )
        if check and done.returncode != 0:
            pytest.fail(f"`{' '.join(argv)}` ended with {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def start(self, *argv: str) -> subprocess.Popen[str]:
        """Start a command inside and go on."""
        return subprocess.Popen(
            [COMMAND, "exec", self.name, "--timeout", "300", "--chdir", "/", "--", *argv],
            stdout=subprocess.PIPE,
            text=True,
        )

    def write(self, path: str, text: str) -> None:
        self.run("sh", "-c", 'mkdir -p "$(dirname "$0")" && printf %s "$1" > "$0"', path, text)

    def show(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).strip()

    def wait_until(self, shell: str, limit_s: int = 60) -> None:
        """Until a shell condition holds inside; fails with the journal's end when it does not."""
        loop = (
            f"for i in $(seq {limit_s * 5}); do {shell} && exit 0; sleep 0.2; done; journalctl -n 60 --no-pager; exit 1"
        )
        self.run("bash", "-c", loop, limit_s=limit_s + 60)

    def reboot(self) -> None:
        subprocess.run([COMMAND, "reboot", self.name], check=True)


def mounts() -> list[tuple[Path, str]]:
    """What the unit's interpreter needs, at places that a service user may enter."""
    mounts = [(CHECKOUT / "src", "/opt/src"), (CHECKOUT / "units", "/opt/units"), (CHECKOUT / "nginx", "/opt/nginx")]
    mounts += [(Path(sysconfig.get_path("purelib")), "/opt/site-packages")]
    mounts += [(CHECKOUT / "tests/host", TESTS)]
    if not sys.base_prefix.startswith("/usr"):
        mounts.append((Path(sys.base_prefix), "/opt/python"))
    return mounts


def install_python(sandbox: Sandbox) -> None:
    """A virtual environment as on a host, whose packages are this checkout's and the test environment's."""
    home = "/usr/bin" if sys.base_prefix.startswith("/usr") else "/opt/python/bin"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    sandbox.run(
        "bash",
        "-euc",
        f"""
        mkdir -p /opt/chatterbox-tts/venv/bin /opt/chatterbox-tts/venv/lib/{version}/site-packages
        cd /opt/chatterbox-tts/venv
        ln -s {home}/{version} bin/python
        printf 'home = {home}\\ninclude-system-site-packages = false\\n' > pyvenv.cfg
        printf '/opt/src\\n/opt/site-packages\\n' > lib/{version}/site-packages/checkout.pth
        echo /opt/python/lib > /etc/ld.so.conf.d/python.conf && ldconfig
        rm -f /etc/nginx/sites-enabled/default
        printf '#!/bin/sh\\nexec {PYTHON} -m chatterbox_deploy "$@"\\n' > /usr/local/bin/chatterbox-deploy
        chmod +x /usr/local/bin/chatterbox-deploy
        """,
    )
