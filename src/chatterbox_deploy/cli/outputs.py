"""Where a command may write: nowhere that it reads, and not twice to one place. Writes nothing."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chatterbox_deploy.errors import CommandLineError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Output:
    """A file that the command line names, to be written."""

    option: str
    path: Path | None
    """``None``: it names none."""

    stays: bool = False
    """Whether what is there already stays, for want of --overwrite."""


def refuse(outputs: Sequence[Output], inputs: Mapping[str, str | Path | None]) -> None:
    """Nothing is begun that would write where it must not.

    Raises:
        CommandLineError: every reason at once.
    """
    if found := problems(outputs, inputs):
        raise CommandLineError(found)


def problems(outputs: Sequence[Output], inputs: Mapping[str, str | Path | None]) -> list[str]:
    """What is wrong with where to write; ``inputs`` are the files that are read, by what the command line calls them.

    Links are followed, for whoever writes through one, or beside it under its name, destroys what it leads to. A
    device, a pipe or a terminal may be both.
    """
    found: list[str] = []
    named = [(output, output.path) for output in outputs if output.path is not None]
    read = [(name, Path(path)) for name, path in inputs.items() if path is not None]
    for at, (output, path) in enumerate(named):
        folder = path.absolute().parent
        if not folder.is_dir():
            found.append(f"{output.option}: there is no directory {folder}")
        elif _leads_nowhere(path):
            found.append(f"{output.option}: {path} is a link that leads to itself")
        elif _is_stream(path):
            continue
        elif name := next((name for name, other in read if _same(path, other)), None):
            found.append(f"{output.option}: {path} is {name}, which this command reads; name another file")
        elif earlier := next((earlier.option for earlier, other in named[:at] if _same(path, other)), None):
            found.append(f"{output.option}: {path} is that of {earlier}, too; name another file")
        elif output.stays and path.exists():
            found.append(f"{output.option}: {path} is there already; --overwrite replaces it")
    return found


def _is_stream(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        # One of them is not there yet.
        return not _leads_nowhere(other) and one.resolve() == other.resolve()


def _leads_nowhere(path: Path) -> bool:
    try:
        path.resolve(strict=True)
    except RuntimeError:
        # Until Python 3.12.
        return True
    except OSError as error:
        return error.errno == errno.ELOOP
    return False
