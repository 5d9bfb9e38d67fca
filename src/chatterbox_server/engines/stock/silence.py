"""The package prints progress to stdout, which the journal would keep for ever."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final


class Silence:
    """Nothing is printed while anybody is inside: stdout is the whole process's, whichever thread turns it off."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._off = contextlib.ExitStack()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._off.enter_context(_nowhere())
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._off.close()


@contextlib.contextmanager
def _nowhere() -> Iterator[None]:
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


silenced: Final = Silence()
