"""The first moments of every command."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("imported", ["click", "pydantic_core", "jinja2"])
def test_ctrl_c_while_modules_are_imported_ends_it_without_a_word(imported: str) -> None:
    argv = [sys.executable, "-X", "importtime", "-m", "chatterbox_deploy", "schema"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.rsplit("|", 1)[-1].strip() == imported:
                process.send_signal(signal.SIGINT)
                break
        printed, said = process.communicate(timeout=60)

    assert (process.returncode, printed) == (130, "")
    assert [line for line in said.splitlines() if not line.startswith("import time:")] == []


def test_the_demo_takes_nothing_that_it_does_not_know() -> None:
    demo = Path(__file__).parents[2] / "scripts/demo"
    refused = subprocess.run([demo, "--keep", "--bogus"], capture_output=True, text=True, check=False, timeout=30)

    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "scripts/demo: there is no --bogus; it is scripts/demo, or scripts/demo --keep\n"
