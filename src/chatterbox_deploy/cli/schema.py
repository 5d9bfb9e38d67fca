"""``chatterbox-deploy schema``."""

from __future__ import annotations

import json

import click

from chatterbox_deploy.cli import mistakes
from chatterbox_deploy.config import tables


@click.command("schema", cls=mistakes.Command)
def schema_command() -> None:
    """Print the JSON Schema of fleet.toml, for editors that complete and check as you type.

    \b
        chatterbox-deploy schema > fleet.schema.json
        sed -i '1i #:schema ./fleet.schema.json' fleet.toml    # Even Better TOML, taplo
    """
    click.echo(json.dumps(tables.schema(), indent=2, ensure_ascii=False))
