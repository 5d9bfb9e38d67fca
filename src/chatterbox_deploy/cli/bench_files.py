"""What a benchmark leaves beside its tables: drawings."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from chatterbox_deploy.host import save

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_deploy.loads import Run


def can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def plot(run: Run, path: Path) -> None:
    """Draw ``run`` as the name of ``path`` says."""
    # Takes a second to import, and is an extra.
    from chatterbox_deploy import bench_plots  # noqa: PLC0415

    save(path, bench_plots.draw(run, path.suffix))
