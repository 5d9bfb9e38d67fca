"""``chatterbox-deploy up``."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
from itertools import cycle
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import click

from chatterbox_deploy import fleet, render, up
from chatterbox_deploy.cli import arguments, mistakes
from chatterbox_deploy.errors import CommandFailed
from chatterbox_deploy.host import LocalHost

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chatterbox_deploy.config.tables import FleetConfig

_COLOURS = ("cyan", "magenta", "blue", "green", "yellow", "bright_cyan", "bright_magenta", "bright_blue")


@click.command("up", cls=mistakes.Command)
@arguments.FLEET
@arguments.TEMPLATES
def up_command(*, fleet_file: Path, own_templates: Path | None) -> None:
    """Run FLEET (default: fleet.toml) here and now, in the foreground, without root or systemd.

    \b
        chatterbox-deploy up
        curl --json '{"input": "Hello."}' http://127.0.0.1:6095/v1/audio/speech -o hello.mp3

    The same environment, front and restarts as the installed fleet, with an nginx of its own. Weights
    come from your own Hugging Face cache; voices lie in ~/.local/state/chatterbox-tts/voices. Unless
    the file names server.python, servers run in the environment that this command is installed in.
    Ctrl-C ends everything in order.
    """
    nginx = _find_nginx()
    with tempfile.TemporaryDirectory(prefix="chatterbox-up-") as directory:
        runtime_dir = Path(directory)
        places = _places(runtime_dir)
        config = _without_mps(_run_here(arguments.read_fleet(fleet_file)))
        resolved = fleet.resolve(config, places)
        files = render.render_foreground(
            resolved,
            arguments.templates(own_templates),
            source=str(fleet_file.absolute()),
            prefix=PurePosixPath(runtime_dir),
            worker_user="root" if os.geteuid() == 0 else None,
        )
        LocalHost().write_files(files)
        if config.server.command is None:
            _make(Path(places.voices_dir))
        foreground = up.Foreground(nginx_conf=Path(files[0].path), runtime_dir=runtime_dir, nginx=nginx)
        asyncio.run(up.run(resolved, foreground, _teller(i.name for i in resolved.instances)))


def _find_nginx() -> str:
    # Debian keeps it where only root's PATH looks.
    found = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
    if found is None:
        msg = "cannot find nginx; install it: apt-get install nginx"
        raise CommandFailed(msg)
    return found


def _run_here(config: FleetConfig) -> FleetConfig:
    """Our own interpreter instead of the one that is only there after an installation."""
    if "python" in config.server.model_fields_set or config.server.command is not None:
        return config
    return config.model_copy(update={"server": config.server.model_copy(update={"python": sys.executable})})


def _without_mps(config: FleetConfig) -> FleetConfig:
    """Nobody would keep the daemons running."""
    return config.model_copy(update={"unit": config.unit.model_copy(update={"mps": False})})


def _places(runtime_dir: Path) -> fleet.Places:
    """The XDG directories of the user who types ``up``."""
    home = Path.home()
    cache = Path(os.environ.get("XDG_CACHE_HOME", home / ".cache"))
    state = Path(os.environ.get("XDG_STATE_HOME", home / ".local/state"))
    return fleet.Places(
        state_dir=str(state / "chatterbox-tts"),
        cache_dir=str(cache / "chatterbox-tts"),
        hub_dir=os.environ.get("HF_HOME", str(cache / "huggingface")),
        log_dir=str(runtime_dir),
        run_dir=str(runtime_dir),
    )


def _make(directory: Path) -> None:
    """What systemd makes for a unit (StateDirectory=)."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"cannot make the directory of voices, {directory}: {(error.strerror or str(error)).lower()}"
        raise CommandFailed(msg) from None


def _teller(names: Iterable[str]) -> up.Tell:
    """Lines with a coloured name in front."""
    listed = list(names)
    colours = dict(zip([up.FRONT, *listed], cycle(_COLOURS), strict=False))
    width = max(len(name) for name in [*listed, up.FRONT])

    def tell(who: str, line: str) -> None:
        label = click.style(f"{who:<{width}}", fg=colours.get(who), bold=who not in colours)
        try:
            click.echo(f"{label} | {line}", err=True)
        except OSError:
            # Nobody reads us any more (`up | head`): end in order, and do not say so.
            sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115  for the rest of the process
            signal.raise_signal(signal.SIGTERM)

    return tell
