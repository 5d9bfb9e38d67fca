"""Boots and ends the machines that these tests run a fleet on."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from support import sandbox

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(scope="module")
def boot(request: pytest.FixtureRequest) -> Iterator[Callable[[], sandbox.Sandbox]]:
    """Boots sandboxes that last for one module of tests."""
    able = subprocess.run([sandbox.COMMAND, "check"], capture_output=True, text=True, check=False)
    if able.returncode != 0:
        pytest.skip(f"no systemd sandbox: {' '.join(able.stderr.split())}")
    names: list[str] = []

    def boot_one() -> sandbox.Sandbox:
        name = f"{request.module.__name__.rpartition('.')[2].replace('_', '-')}-{os.getpid()}-{len(names)}"
        binds = [word for source, place in sandbox.mounts() for word in ("--bind-ro", f"{source}:{place}")]
        subprocess.run([sandbox.COMMAND, "up", name, "--owner", str(os.getpid()), *binds], check=True)
        names.append(name)
        booted = sandbox.Sandbox(name)
        sandbox.install_python(booted)
        return booted

    yield boot_one
    for name in names:
        subprocess.run([sandbox.COMMAND, "down", name], check=True)
