"""``chatterbox-deploy``, also as ``python -m chatterbox_deploy``: what is there before the rest is imported."""

import os
import signal
import sys
from types import FrameType

_INTERRUPTED = 130
"""As ``cli.telling`` has it, which is not imported yet."""


def _leave(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  as signal calls it
    # An exception would be raised within whatever module is half imported, some of which catch it.
    os._exit(_INTERRUPTED)


def run() -> None:
    """The command line. Ctrl-C while the rest is imported, which takes most of a second, ends it without a word."""
    # Who was started without Ctrl-C (nohup, a shell's &) stays without.
    heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heeded:
        signal.signal(signal.SIGINT, _leave)
    from chatterbox_deploy.cli import main  # noqa: PLC0415

    try:
        if heeded:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        main(prog_name="chatterbox-deploy")
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


if __name__ == "__main__":
    run()
