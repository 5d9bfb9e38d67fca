"""What several of the server's tests share and takes seconds to make."""

import os
from pathlib import Path

import pytest

from server.tiny import Build, Models, record

if not Path("/dev/nvidiactl").exists():
    # Before anything imports triton, which asks once: without a GPU its kernels are interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def build(models: Models) -> Build:
    """Makes engines around one tiny model of each kind."""
    return models.build


@pytest.fixture(scope="session")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two voices that differ: a low and a high hum."""
    directory = tmp_path_factory.mktemp("voices")
    record(directory / "low.wav", hertz=110)
    record(directory / "high.wav", hertz=220)
    return directory
