"""What a benchmark leaves: its samples in a file, and drawings."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from chatterbox_deploy.errors import CommandFailed

if TYPE_CHECKING:
    from chatterbox_deploy.loads import Run


def write(path: Path, text: str | bytes) -> None:
    """The whole file or none of it.

    Raises:
        CommandFailed: it cannot be written.
    """
    content = text.encode() if isinstance(text, str) else text
    new = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.absolute().parent, prefix=f".{path.name}.", delete=False) as file:
            new = Path(file.name)
            file.write(content)
        new.chmod(0o666 & ~_umask())
        new.replace(path)
    except OSError as error:
        if new is not None:
            new.unlink(missing_ok=True)
        msg = f"cannot write {path}: {(error.strerror or str(error)).lower()}"
        raise CommandFailed(msg) from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def plot(run: Run, path: Path) -> None:
    """Draw ``run`` as the name of ``path`` says."""
    # Takes a second to import, and is an extra.
    from chatterbox_deploy import bench_plots  # noqa: PLC0415

    write(path, bench_plots.draw(run, path.suffix))
