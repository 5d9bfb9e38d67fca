"""``chatterbox-deploy render``."""

from __future__ import annotations

import json
import shlex
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import click

from chatterbox_deploy import render, systemd
from chatterbox_deploy.change import difference, ledger, observe
from chatterbox_deploy.change.blueprint import want
from chatterbox_deploy.cli import arguments, mistakes, telling
from chatterbox_deploy.errors import CommandFailed, ForeignFile
from chatterbox_deploy.host import LocalHost

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chatterbox_deploy.change.difference import Changes
    from chatterbox_deploy.fleet import Fleet


@click.command("render", cls=mistakes.Command)
@arguments.FLEET
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("rendered"),
    show_default=True,
    help="Write below this directory; / installs in place.",
)
@click.option("--check", is_flag=True, help="Change nothing; exit 1 if a file differs.")
@click.option("--diff", is_flag=True, help="Change nothing; print what would change; exit 1 if anything would.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of files and what became of each.")
@arguments.TEMPLATES
def render_command(
    *, fleet_file: Path, output: Path, check: bool, diff: bool, as_json: bool, own_templates: Path | None
) -> None:
    """Turn FLEET (default: fleet.toml) into systemd units and an nginx configuration.

    \b
        chatterbox-deploy render                    # look at it first, below ./rendered
        chatterbox-deploy render --diff --output /  # what would change on this machine?
        sudo chatterbox-deploy render --output /    # install

    Files that carry our header are ours to replace; any other file in their place is refused.
    """
    host = LocalHost(output)
    asked = want(arguments.read_blueprint(host, fleet_file, own_templates))
    resolved, wanted = asked.fleet, asked.files
    changes = difference.compare(wanted, observe.files(host, wanted))
    dry_run = check or diff
    if not dry_run:
        _refuse_foreign(host, changes)
        with _alone(host):
            host.write_files([change.file for change in changes.to_write])
    if as_json:
        click.echo(json.dumps(_rows(host, changes), indent=2))
    else:
        if diff:
            click.echo("".join(change.diff() for change in changes.to_write), nl=False)
        _tell(host, changes, done=not dry_run)
        if not dry_run:
            _tell_next(host, output, changes, fleet_file)
            _tell_missing_keys(host, resolved)
    if dry_run and changes:
        raise SystemExit(1)


@contextmanager
def _alone(host: LocalHost) -> Iterator[None]:
    """Where files are installed, nobody else changes them, and nothing that `apply` remembers becomes untrue.

    Raises:
        CommandFailed: somebody does, or a fleet was applied here.
    """
    if not _installs(host):
        yield
        return
    with ledger.lock(host, telling.author().command):
        if ledger.read(host) != ledger.Ledger():
            msg = "cannot write beside `chatterbox-deploy apply`, which keeps this machine: type that instead"
            raise CommandFailed(msg)
        yield


def _installs(host: LocalHost) -> bool:
    return host.at(render.UNIT_DIR) == Path(render.UNIT_DIR)


def _refuse_foreign(host: LocalHost, changes: Changes) -> None:
    if changes.foreign:
        names = "".join(f"\n  {host.at(path)}" for path in changes.foreign)
        msg = f"cannot write over files that chatterbox-deploy did not write; move them away first:{names}"
        raise ForeignFile(msg)


def _rows(host: LocalHost, changes: Changes) -> list[dict[str, str]]:
    def row(action: str, path: PurePosixPath) -> dict[str, str]:
        return {"path": str(host.at(path)), "action": action}

    return [
        *(row("created" if change.before is None else "changed", change.file.path) for change in changes.to_write),
        *(row("unchanged", path) for path in changes.unchanged),
        *(row("stale", path) for path in changes.stale),
        *(row("foreign", path) for path in changes.foreign),
    ]


def _tell(host: LocalHost, changes: Changes, *, done: bool) -> None:
    verb = "wrote" if done else "differs"
    for change in changes.to_write:
        new = " (new)" if change.before is None else ""
        click.echo(f"{verb}  {host.at(change.file.path)}{new}", err=True)
    for path in changes.foreign:
        click.echo(f"not ours, would be refused  {host.at(path)}", err=True)
    for path in changes.stale:
        click.echo(
            f"stale  {host.at(path)}: the fleet file asks for it no longer; {_removal(host, path)}",
            err=True,
        )
    if not changes:
        click.echo(f"unchanged: all {len(changes.unchanged)} files are as the fleet file says", err=True)


def _removal(host: LocalHost, path: PurePosixPath) -> str:
    """The command that takes a stale file away; where it is installed its unit has to be stopped first."""
    return "chatterbox-deploy apply removes it" if host.at(path) == Path(path) else f"rm {host.at(path)}"


def _tell_next(host: LocalHost, output: Path, changes: Changes, fleet_file: Path) -> None:
    if not changes.to_write:
        return
    if not _installs(host):
        click.echo(
            f"next: read them below {output}, then install them: sudo chatterbox-deploy render --output /", err=True
        )
    elif all(change.before is None for change in changes.to_write):
        click.echo(f"next: systemctl enable --now {systemd.TARGET}", err=True)
    else:
        click.echo(f"next: chatterbox-deploy apply {shlex.quote(str(fleet_file))}", err=True)


def _tell_missing_keys(host: LocalHost, resolved: Fleet) -> None:
    """Without its file an instance does not start, nor does nginx, and with it every other site on this machine."""
    for keys, who, line in (
        (resolved.front.api_keys_file, "nginx", '"~^Bearer %s$" NAME;'),
        (resolved.service.api_keys_file, "an instance", "NAME %s"),
    ):
        if keys is not None and _installs(host) and host.read_bytes(PurePosixPath(keys)) is None:
            click.echo(
                f"before that, make the key file, or {who} will not start:\n"
                f"  printf '{line}\\n' \"$(openssl rand -hex 24)\" | install -D -m 600 /dev/stdin {keys}",
                err=True,
            )
