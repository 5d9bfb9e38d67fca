"""One record, one line, whatever it holds; for the journal or a terminal. Installs nothing when imported."""

import json
import logging
import os
import re
from collections.abc import Mapping
from typing import Final, TextIO

_BARE: Final = re.compile(r"""[!-~]+""")
_QUOTED: Final = frozenset('"=\\')

# sd-daemon(3): the levels of syslog, as journald reads them from the beginning of a line.
_PRIORITIES: Final = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG: Final = 7


def setup(environ: Mapping[str, str], stream: TextIO) -> None:
    """Send every record of WARNING and above, and Python's own warnings, to ``stream``, which is stderr.

    Replaces what was set up before. A logger that should say more is given its level by the caller.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Lines(journal=is_journal(environ, stream)))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(True)


def is_journal(environ: Mapping[str, str], stream: TextIO) -> bool:
    """Whether ``stream`` is the journal's own: JOURNAL_STREAM alone may have been inherited (systemd.exec(5))."""
    try:
        file = os.fstat(stream.fileno())
    except (OSError, ValueError):
        # Not a file at all.
        return False
    return environ.get("JOURNAL_STREAM") == f"{file.st_dev}:{file.st_ino}"


class Lines(logging.Formatter):
    """The level, then the message as one line; then, indented, the lines of a traceback.

    The level is ``<6>`` for the journal, which keeps it as the record's priority, and ``INFO`` elsewhere. The journal
    takes each line for a record of its own, so each line of a traceback has the level too: without it, `journalctl -p
    err` would show what failed and hide where. No line of a message can pass for another record: what ends a line
    is escaped, and what continues one is indented.
    """

    def __init__(self, *, journal: bool) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        lines = [printable(record.getMessage().rstrip())]
        if record.exc_info:
            lines += _indented(self.formatException(record.exc_info))
        if record.stack_info:
            lines += _indented(record.stack_info)
        level = f"<{_priority(record.levelno)}>" if self._journal else f"{record.levelname} "
        return "\n".join(level + line for line in lines)


def pairs(**fields: object) -> str:
    """``key=value key="another value"``, as logfmt has it: one line of ASCII, safe whatever a client sent.

    ``None`` is ``-``. Floats have three decimals: seconds are told to the millisecond.
    """
    return " ".join(f"{key}={_value(value)}" for key, value in fields.items())


def printable(text: str) -> str:
    """``text`` with every character that has no shape of its own as its escape.

    That is what ends a line, moves a terminal's cursor, turns the direction of writing, or makes journalctl print
    "[blob data]" instead of the message (journald keeps as binary what holds control characters).
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _value(value: object) -> str:
    if value is None:
        return "-"
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    # A dash that somebody sent is not our word for nothing.
    if text != "-" and _BARE.fullmatch(text) and not _QUOTED & set(text):
        return text
    # JSON's escapes are logfmt's too.
    return json.dumps(text)


def _indented(text: str) -> list[str]:
    return [f"  {printable(line)}" for line in text.split("\n")]


def _priority(level: int) -> int:
    return next((priority for least, priority in _PRIORITIES if level >= least), _DEBUG)
