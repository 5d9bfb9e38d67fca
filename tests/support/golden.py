"""The golden cases: ``tests/golden/<case>/fleet.toml`` beside the files it renders to."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from chatterbox_deploy import fleet, render
from chatterbox_deploy.config import reading
from chatterbox_deploy.templates import Templates

if TYPE_CHECKING:
    from chatterbox_deploy.fleet import Fleet
    from chatterbox_deploy.render import RenderedFile

FOLDER = Path(__file__).parents[1] / "golden"
CASES = sorted(path.parent.name for path in FOLDER.glob("*/fleet.toml"))

SOURCE = "/etc/chatterbox-tts/fleet.toml"
"""Every golden file says that it came from here, wherever the checkout lies."""


def resolve(case: str) -> Fleet:
    text = (FOLDER / case / "fleet.toml").read_text()
    return fleet.resolve(reading.load(text, source=f"golden/{case}/fleet.toml"))


def render_case(case: str) -> tuple[RenderedFile, ...]:
    return render.render(resolve(case), Templates(), source=SOURCE)


def on_disk(case: str) -> dict[PurePosixPath, str]:
    root = FOLDER / case / "rendered"
    return {PurePosixPath("/") / path.relative_to(root): path.read_text() for path in root.rglob("*") if path.is_file()}
