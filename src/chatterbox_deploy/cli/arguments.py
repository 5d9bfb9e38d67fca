"""Arguments that several commands share. Reads the fleet file; decides nothing."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TextIO

import click

from chatterbox_deploy import fleet
from chatterbox_deploy.change import blueprint
from chatterbox_deploy.config import reading
from chatterbox_deploy.errors import CommandFailed, FleetFileError, ProfileError
from chatterbox_deploy.host import LocalHost
from chatterbox_deploy.sizing import profile
from chatterbox_deploy.templates import Templates, read_own

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatterbox_deploy.change.blueprint import Blueprint
    from chatterbox_deploy.config.tables import FleetConfig
    from chatterbox_deploy.fleet import Fleet, Instance
    from chatterbox_deploy.sizing.profile import Profile

FLEET = click.argument("fleet_file", metavar="[FLEET]", type=click.Path(path_type=Path), default=Path("fleet.toml"))
FLEET_OPTION = click.option(
    "--fleet",
    "fleet_file",
    type=click.Path(path_type=Path),
    default=Path("fleet.toml"),
    show_default=True,
    help="The fleet file.",
)
INSTANCES = click.argument("who", metavar="[N]...", nargs=-1)
"""Instances by name or by GPU: ``0``, ``gpu0``, ``gpu1-a``; nothing is all of them."""

TEMPLATES = click.option(
    "--templates",
    "own_templates",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Directory with units/ and nginx/: templates of your own, in place of ours where it has one.",
)


PROFILE = click.option(
    "--profile",
    "profile_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What was measured on this machine (scripts/gpu/replicas.py --profile).  [default: what came with this]",
)


_KEY_VARIABLE = "CHATTERBOX_API_KEY"

# A file, or the environment: everybody on a machine sees its command lines.
API_KEY = click.option(
    "--api-key-file", type=click.File("r", errors="replace"), help=f"Holds the key alone.  [default: ${_KEY_VARIABLE}]"
)


def read_key(file: TextIO | None) -> str | None:
    """The API key in the file that the command line names, else in the environment; ``None`` where there is none."""
    key = os.environ.get(_KEY_VARIABLE, "") if file is None else file.read()
    if len(key.split()) > 1:
        msg = "should hold one key and nothing else"
        raise click.BadParameter(msg, param_hint=f"${_KEY_VARIABLE}" if file is None else "--api-key-file")
    return key.strip() or None


def read_profile(path: Path | None) -> Profile | None:
    """What was measured; ``None`` where the command line names no file.

    Raises:
        ProfileError: it cannot be read, or is none.
    """
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"cannot read the profile {path}: {error}"
        raise ProfileError(msg) from None
    return profile.parse(text, source=str(path))


def templates(folder: Path | None) -> Templates:
    """The shipped templates, behind the operator's own.

    Raises:
        TemplateError: there are none in the folder.
    """
    return Templates(None if folder is None else read_own(folder))


def find_instances(resolved: Fleet, who: Sequence[str]) -> tuple[Instance, ...]:
    """Those that the command line names, each once; all of the fleet if it names none.

    Raises:
        UnknownInstance: it names one that the fleet has not got.
    """
    if not who:
        return resolved.instances
    named = {instance.name for one in who for instance in fleet.find(resolved, one)}
    return tuple(instance for instance in resolved.instances if instance.name in named)


def read_blueprint(host: LocalHost, fleet_file: Path, own_templates: Path | None) -> Blueprint:
    """What the command line asks of a host; the fleet file is right.

    Raises:
        FleetFileError: it is not there, or it is wrong.
        TemplateError: there are no templates in the folder.
    """
    text = read_text(fleet_file)
    reading.load(text, source=str(fleet_file))
    own = {} if own_templates is None else read_own(own_templates)
    return blueprint.of_file(host, source=str(fleet_file.resolve()), fleet_toml=text, templates=own)


def read_fleet(fleet_file: Path) -> FleetConfig:
    """The fleet file's contents, checked.

    Raises:
        FleetFileError: it is not there, or it is wrong.
    """
    return reading.load(read_text(fleet_file), source=str(fleet_file))


def read_text(fleet_file: Path) -> str:
    """The fleet file's contents.

    Raises:
        FleetFileError: it is not there, or it is no text.
    """
    try:
        content = LocalHost().read_bytes(PurePosixPath(fleet_file.absolute()))
        if content is None:
            problem = "no such file; for one server on GPU 0 write\n    [gpus]\n    0 = 6093"
            raise FleetFileError(str(fleet_file), [problem])
        # Some editors put a byte order mark before the first letter.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"not UTF-8, as TOML must be: byte {error.start + 1} is 0x{error.object[error.start]:02x}"
        raise FleetFileError(str(fleet_file), [problem]) from None
    except CommandFailed as error:
        raise FleetFileError(str(fleet_file), [str(error)]) from None
