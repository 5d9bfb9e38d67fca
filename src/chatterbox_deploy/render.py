"""A ``Fleet`` as the files that systemd and nginx read. Writes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from chatterbox_deploy import __version__, nginx, systemd

if TYPE_CHECKING:
    from chatterbox_deploy.fleet import Fleet
    from chatterbox_deploy.templates import Templates

UNIT_DIR = PurePosixPath("/etc/systemd/system")
FRONT_PATH = PurePosixPath("/etc/nginx/conf.d/chatterbox-tts.conf")
FRONT_TEMPLATE = "nginx/chatterbox-tts.conf.j2"

_SIGNATURE = "# Written by chatterbox-deploy "


@dataclass(frozen=True, slots=True)
class RenderedFile:
    """One file of the fleet, at its absolute path on the host."""

    path: PurePosixPath
    text: str
    mode: int = 0o644


def header(source: str) -> str:
    """The comment every file starts with; ``source`` is the fleet file as an operator would type it."""
    one_line = "".join(letter if letter.isprintable() else "?" for letter in source)
    return (
        f"{_SIGNATURE}{__version__} from {one_line}\n"
        "# Changes made here are lost: edit that file, then run `chatterbox-deploy render`."
    )


def is_ours(text: str) -> bool:
    """Whether we wrote a file with this text, and so may replace it."""
    return text.startswith(_SIGNATURE)


def render(fleet: Fleet, templates: Templates, *, source: str) -> tuple[RenderedFile, ...]:
    """Every file of ``fleet``, sorted by path; the same input always gives the same text.

    Raises:
        TemplateError: a template (usually the operator's own) cannot be filled in.
    """
    common = {
        "header": header(source),
        "fleet": fleet,
        "service": fleet.service,
        "places": fleet.places,
        "protect_home": systemd.protect_home(fleet),
        "target": systemd.TARGET,
        "front_unit": systemd.FRONT_UNIT,
        "nodes_unit": systemd.NODES_UNIT,
        "units": [systemd.unit_name(instance.name) for instance in fleet.instances],
    }
    texts = {
        UNIT_DIR / systemd.TARGET: templates.fill_in("units/chatterbox-tts.target.j2", common),
        UNIT_DIR / systemd.FRONT_UNIT: templates.fill_in("units/chatterbox-tts-nginx.service.j2", common),
        FRONT_PATH: front(fleet, templates, source=source),
    }
    if fleet.service.uses_gpu:
        texts[UNIT_DIR / systemd.NODES_UNIT] = templates.fill_in("units/chatterbox-tts-gpu-nodes.service.j2", common)
    for instance in fleet.instances:
        unit = systemd.unit_name(instance.name)
        texts[UNIT_DIR / unit] = templates.fill_in(
            "units/chatterbox-tts-instance.service.j2", {**common, "instance": instance, "unit": unit}
        )
    return tuple(RenderedFile(path, texts[path]) for path in sorted(texts))


def front(fleet: Fleet, templates: Templates, *, source: str) -> str:
    """nginx's file for the front, which any nginx can include."""
    values = {"header": header(source), "fleet": fleet, "redirects": nginx.passes(len(fleet.instances)) - 1}
    return templates.fill_in(FRONT_TEMPLATE, values)


def render_foreground(
    fleet: Fleet, templates: Templates, *, source: str, prefix: PurePosixPath, worker_user: str | None
) -> tuple[RenderedFile, ...]:
    """The same front for an nginx of its own: its main configuration, ``prefix/nginx.conf``, comes first.

    ``worker_user`` is for an nginx started by root, whose workers would otherwise become nobody.
    """
    front_path = prefix / FRONT_PATH.name
    common = {"header": header(source), "fleet": fleet}
    main = templates.fill_in(
        "nginx/foreground.conf.j2",
        {**common, "prefix": str(prefix), "front_path": str(front_path), "worker_user": worker_user},
    )
    return (
        RenderedFile(prefix / "nginx.conf", main),
        RenderedFile(front_path, front(fleet, templates, source=source)),
    )
