"""How plans and their progress read. Prints; decides nothing."""

from __future__ import annotations

import getpass
import os
import signal
import sys
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

from chatterbox_deploy.change import deploy
from chatterbox_deploy.change.deploy import Author
from chatterbox_deploy.change.steps import ShowFront, WriteFiles
from chatterbox_deploy.errors import CommandFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from chatterbox_deploy.change.plan import Plan
    from chatterbox_deploy.change.steps import Step
    from chatterbox_deploy.host import Host


INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells say it: 128 and the number of SIGINT."""

CLOSED = 141
"""Exit status where whoever read our output has seen enough, as of 128 and the number of SIGPIPE."""


def close_output() -> None:
    """Nothing more goes to a standard output that nobody reads (``| head``); nor shall Python's last flush object."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def author() -> Author:
    """Who types, also behind sudo, and what."""
    try:
        who = os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):
        # Nobody gave this number a name.
        who = str(os.getuid())
    return Author(who, " ".join(["chatterbox-deploy", *sys.argv[1:]]))


def show(plan: Plan, *, nothing: str = "the host is as the fleet file says") -> None:
    """The plan for people: what changes and why, then the steps in their order; or why there is ``nothing`` to do.

    Raises:
        CommandFailed: it cannot be carried out; every reason at once.
    """
    refuse(plan)
    if not plan.steps:
        click.echo(f"nothing to do: {nothing}")
        return
    click.echo("".join(change.diff() for change in plan.changed_files()), nl=False)
    for path in plan.removed_files():
        click.echo(f"removed  {path}")
    for line in why(plan):
        click.echo(line)
    digits = len(str(len(plan.steps)))
    click.echo("\n".join(f"{number:>{digits}}. {step}" for number, step in enumerate(plan.steps, 1)))


def why(plan: Plan) -> list[str]:
    """Which instances start, restart or stop, with the reason of each; and what else one ought to know."""
    width = max((len(name) for name, _ in plan.reasons), default=0)
    return [
        *(f"{name:<{width}}  {reason}" for name, reason in plan.reasons),
        *(f"note: {note}" for note in plan.notes),
    ]


def refuse(plan: Plan) -> None:
    """Nothing is begun that would stop halfway.

    Raises:
        CommandFailed: every reason at once.
    """
    if plan.problems:
        raise CommandFailed("\n  ".join(["cannot do this; nothing was changed:", *plan.problems]))


def as_json(plan: Plan) -> dict[str, Any]:
    """The same for programs."""
    return {
        "changes": bool(plan),
        "reasons": [{"instance": name, "why": why} for name, why in plan.reasons],
        "notes": list(plan.notes),
        "problems": list(plan.problems),
        "files": [
            {
                "path": str(change.file.path),
                "action": "created" if change.before is None else "changed",
                "diff": change.diff(),
            }
            for change in plan.changed_files()
        ]
        + [{"path": str(path), "action": "removed", "diff": None} for path in plan.removed_files()],
        "steps": [{"kind": type(step).__name__, "says": str(step), "writes": _writes(step)} for step in plan.steps],
    }


def _writes(step: Step) -> list[str]:
    return [str(change.file.path) for change in step.changes] if isinstance(step, WriteFiles | ShowFront) else []


def show_unfinished(host: Host) -> None:
    """On standard error: that a change did not end, and what to type."""
    if (advice := deploy.advice(host)) is not None:
        click.echo(f"a change did not end: {advice}", err=True)


@contextmanager
def interruptible(host: Host) -> Iterator[None]:
    """A change of the host; after Ctrl-C, SIGTERM or the end of the terminal whoever typed it learns how to go on."""
    with saying_when_interrupted(lambda: deploy.advice(host) or "nothing was changed"):
        yield


@contextmanager
def saying_when_interrupted(how_to_go_on: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C, SIGTERM and the end of the terminal all end what is within, and whoever typed it learns how to go on."""
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except KeyboardInterrupt:
        # The terminal may be gone.
        with suppress(OSError):
            click.echo(f"interrupted; {how_to_go_on()}", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  as signal calls it
    # As Ctrl-C would be taken here: asyncio cancels, where an exception would fall into whichever task runs.
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        raise KeyboardInterrupt
    handler(signal.SIGINT, frame)


def progress(total: int, title: str | None = None) -> Callable[[int, Step], None]:
    """Each step on a line of its own on standard error, with the seconds since the first."""
    if title is not None:
        click.echo(f"{title}:", err=True)
    begun_s = time.monotonic()

    def tell(number: int, step: Step) -> None:
        click.echo(f"[{number}/{total} {time.monotonic() - begun_s:6.1f} s] {step}", err=True)

    return tell
