"""Arguments that several commands share. Reads the fleet file; decides nothing."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import click

from chatterbox_deploy import config
from chatterbox_deploy.errors import CommandFailed, FleetFileError
from chatterbox_deploy.host import LocalHost

if TYPE_CHECKING:
    from chatterbox_deploy.config import FleetConfig

FLEET = click.argument("fleet_file", metavar="[FLEET]", type=click.Path(path_type=Path), default=Path("fleet.toml"))
TEMPLATES = click.option(
    "--templates",
    "own_templates",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Directory with units/ and nginx/: templates of your own, in place of ours where it has one.",
)


def read_fleet(fleet_file: Path) -> FleetConfig:
    """The fleet file's contents, checked.

    Raises:
        FleetFileError: it is not there, or it is wrong.
    """
    try:
        content = LocalHost().read_bytes(PurePosixPath(fleet_file.absolute()))
        if content is None:
            problem = "no such file; for one server on GPU 0 write\n    [gpus]\n    0 = 6093"
            raise FleetFileError(str(fleet_file), [problem])
        # Some editors put a byte order mark before the first letter.
        return config.load(content.decode("utf-8-sig"), source=str(fleet_file))
    except UnicodeDecodeError as error:
        problem = f"not UTF-8, as TOML must be: byte {error.start + 1} is 0x{error.object[error.start]:02x}"
        raise FleetFileError(str(fleet_file), [problem]) from None
    except CommandFailed as error:
        raise FleetFileError(str(fleet_file), [str(error)]) from None
