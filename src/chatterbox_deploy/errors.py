"""What can go wrong that is not our bug; the shell shows these bare and exits with their code."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Sequence


class DeployError(Exception):
    """Something the operator can act on: the message says what is wrong, where, and what to type next."""

    exit_code: ClassVar[int] = 3


class FleetFileError(DeployError):
    """The fleet file is wrong; carries every problem found, not the first."""

    exit_code = 2

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n  ".join([f"{source} has {count}", *problems]))


class UnknownInstance(DeployError):
    """The command line names an instance, or a GPU, that the fleet has not got."""

    exit_code = 2

    def __init__(self, who: str, known: Sequence[str]) -> None:
        super().__init__(f"cannot find instance {who!r}; the fleet has {', '.join(known)}")


class TemplateError(DeployError):
    """A template cannot be rendered; usually one of the operator's own (``--templates``)."""

    exit_code = 2


class ProfileError(DeployError):
    """A file that tells what was measured does not."""

    exit_code = 2


class CaptureError(DeployError):
    """A file that ought to be what ``nvidia-smi -q -x`` printed is not."""

    exit_code = 2

    def __init__(self, source: str, how: str) -> None:
        super().__init__(f"cannot read {source}: {how}; it has to be what `nvidia-smi -q -x` printed, whole")


class ManuscriptError(DeployError):
    """What is to be spoken is no text, or there is nothing in it to say."""

    exit_code = 2


class CommandLineError(DeployError):
    """The command line asks for what cannot be; carries every problem found."""

    exit_code = 2

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(problems[0] if len(problems) == 1 else "\n  ".join(["cannot do this:", *problems]))


class BenchmarkError(CommandLineError):
    """What is asked of a benchmark, or a file that one left, is wrong."""


class ForeignFile(DeployError):
    """A file that we did not write stands where we would write."""


class CommandFailed(DeployError):
    """A command we ran, or a file operation, did not succeed."""
