"""What is wrong with a command line, all at once and as every other error reads. Prints nothing."""

from __future__ import annotations

import enum
import re
from typing import TYPE_CHECKING, Any

import click

from chatterbox_deploy.errors import CommandLineError

if TYPE_CHECKING:
    from collections.abc import Mapping


_SUGGESTED = re.compile(r"\.? \(?Did you mean (?:one of: )?([^?]*)\?\)?")


class Command(click.Command):
    """click stops at the first value that it does not take: this goes on to the last."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.BadParameter as first:
            found = [*self._wrong(ctx, given), *self.further(_taken(ctx))]
            if len(found) < 2:
                raise
            raise CommandLineError(found) from first

    def _wrong(self, ctx: click.Context, args: list[str]) -> list[str]:
        values, _, _ = self.make_parser(ctx).parse_args(args)
        found = []
        for parameter in self.get_params(ctx):
            try:
                parameter.handle_parse_result(ctx, values, [])
            except click.BadParameter as error:
                error.ctx = error.ctx or ctx
                error.param = error.param or parameter
                found.append(text(error))
        return found

    def further(self, given: Mapping[str, Any]) -> list[str]:  # noqa: ARG002  a command may know more
        """What else is wrong, by the values that click took; ``None`` stands for each of the others."""
        return []


def _taken(ctx: click.Context) -> dict[str, Any]:
    # click has a member of an enumeration for what was not given, until all is.
    return {name: None if isinstance(value, enum.Enum) else value for name, value in ctx.params.items()}


def text(error: click.ClickException) -> str:
    """What click says, in our words: which option or argument, what is wrong with it, what to type."""
    if isinstance(error, click.BadParameter) and not isinstance(error, click.MissingParameter):
        hint = error.param_hint or (error.param.get_error_hint(error.ctx) if error.param and error.ctx else None)
        name = hint if isinstance(hint, str) or hint is None else " / ".join(hint)
        return f"{name.replace(chr(39), '')}: {_begun_small(error.message)}" if name else _begun_small(error.message)
    if isinstance(error, click.FileError):
        return f"cannot open {error.ui_filename}: {_begun_small(error.message)}"
    told = _SUGGESTED.sub(r" (did you mean \1?)", _begun_small(error.format_message()))
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f"{told}: `{error.ctx.command_path} --help`"
    return told


def _begun_small(message: str) -> str:
    """As the rest of a line: without a capital, unless it is a name's, and without a full stop."""
    message = message.removesuffix(".")
    return message[:1].lower() + message[1:] if message[1:2].islower() else message
