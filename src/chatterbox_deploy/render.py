"""A ``Fleet`` as the files that systemd and nginx read. Writes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from chatterbox_deploy import __version__, grafana, nginx, systemd
from chatterbox_deploy.fleet import Upstream

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatterbox_deploy.fleet import Fleet, Instance, MpsDaemon
    from chatterbox_deploy.templates import Templates

UNIT_DIR = PurePosixPath("/etc/systemd/system")
FRONT_PATH = PurePosixPath("/etc/nginx/conf.d/chatterbox-tts.conf")
FRONT_TEMPLATE = "nginx/chatterbox-tts.conf.j2"

_SIGNATURE = "# Written by chatterbox-deploy "
_JSON_SIGNATURE = grafana.BEGINS + _SIGNATURE.removeprefix("# ")
"""JSON has no comments; a dashboard has a description."""


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
        "# Changes made here are lost: edit that file, then type `chatterbox-deploy apply`."
    )


def is_ours(text: str) -> bool:
    """Whether we wrote a file with this text, and so may replace it."""
    return text.startswith((_SIGNATURE, _JSON_SIGNATURE))


def render(fleet: Fleet, templates: Templates, *, source: str) -> tuple[RenderedFile, ...]:
    """Every file of ``fleet``, sorted by path; the same input always gives the same text.

    Raises:
        TemplateError: a template (usually the operator's own) cannot be filled in.
    """
    common = _common(fleet, source)
    texts = {
        UNIT_DIR / systemd.TARGET: templates.fill_in("units/chatterbox-tts.target.j2", common),
        UNIT_DIR / systemd.FRONT_UNIT: templates.fill_in("units/chatterbox-tts-nginx.service.j2", common),
        FRONT_PATH: front(fleet, templates, source=source),
    }
    if fleet.service.uses_gpu:
        texts[UNIT_DIR / systemd.NODES_UNIT] = templates.fill_in("units/chatterbox-tts-gpu-nodes.service.j2", common)
    if fleet.service.recycles:
        for unit in (systemd.RECYCLE_UNIT, systemd.RECYCLE_TIMER):
            texts[UNIT_DIR / unit] = templates.fill_in(f"units/{unit}.j2", common)
    if fleet.monitoring.textfile is not None:
        values = {**common, "look": _look_command(fleet.monitoring.textfile, source)}
        values["directory"] = str(PurePosixPath(fleet.monitoring.textfile).parent)
        texts[UNIT_DIR / systemd.MONITOR_UNIT] = templates.fill_in(f"units/{systemd.MONITOR_UNIT}.j2", values)
    for daemon in fleet.mps_daemons:
        texts[UNIT_DIR / systemd.unit_name(daemon.name)] = _mps_unit(fleet, daemon, templates, source=source)
    texts |= _monitoring(fleet, templates, source=source)
    instances = tuple(instance_unit(fleet, instance, templates, source=source) for instance in fleet.instances)
    others = (RenderedFile(path, text) for path, text in texts.items())
    return tuple(sorted((*others, *instances), key=lambda file: file.path))


def _look_command(textfile: str, source: str) -> tuple[str, ...]:
    # env: found where systemd looks for programs, /usr/local/bin before /usr/bin.
    return ("/usr/bin/env", "chatterbox-deploy", "monitor", source, "--interval", "15", "--prometheus", textfile)


def _monitoring(fleet: Fleet, templates: Templates, *, source: str) -> dict[PurePosixPath, str]:
    """What those who watch are given."""
    asked, texts = fleet.monitoring, dict[PurePosixPath, str]()
    common = _common(fleet, source)
    if asked.rules_file is not None:
        texts[PurePosixPath(asked.rules_file)] = templates.fill_in("monitoring/rules.yml.j2", common)
    if asked.scrape_file is not None:
        texts[PurePosixPath(asked.scrape_file)] = templates.fill_in("monitoring/scrape.yml.j2", common)
    if asked.dashboard_file is not None:
        description = " ".join(line.removeprefix("# ") for line in header(source).splitlines())
        texts[PurePosixPath(asked.dashboard_file)] = grafana.dashboard(description)
    return texts


def _common(fleet: Fleet, source: str) -> dict[str, object]:
    return {
        "header": header(source),
        "fleet": fleet,
        "service": fleet.service,
        "places": fleet.places,
        "protect_home": systemd.protect_home(fleet),
        "target": systemd.TARGET,
        "front_unit": systemd.FRONT_UNIT,
        "nodes_unit": systemd.NODES_UNIT,
        "recycle_unit": systemd.RECYCLE_UNIT,
        "recycle_timer": systemd.RECYCLE_TIMER,
        "monitor_unit": systemd.MONITOR_UNIT,
        "units": [systemd.unit_name(instance.name) for instance in fleet.instances],
    }


def instance_unit(fleet: Fleet, instance: Instance, templates: Templates, *, source: str) -> RenderedFile:
    """The unit of one instance, which carries its mark."""
    unit = systemd.unit_name(instance.name)
    mps_unit = None if instance.mps is None else systemd.unit_name(instance.mps.name)
    values = {**_common(fleet, source), "instance": instance, "unit": unit, "mps_unit": mps_unit}

    def fill_in(digest: str) -> str:
        mark = systemd.Mark(instance.name, instance.host, instance.port, digest)
        variable = f"{systemd.MARK_VARIABLE}={mark}"
        return templates.fill_in("units/chatterbox-tts-instance.service.j2", {**values, "mark": variable})

    return RenderedFile(UNIT_DIR / unit, fill_in(systemd.digest(fill_in(""))))


def _mps_unit(fleet: Fleet, daemon: MpsDaemon, templates: Templates, *, source: str) -> str:
    """The unit of an MPS daemon, which carries a mark of its own."""
    values = {
        **_common(fleet, source),
        "daemon": daemon,
        "clients": [instance.name for instance in fleet.instances if instance.mps == daemon],
        "runtime_directory": PurePosixPath(daemon.directory).name,
        "tell_clients": systemd.tell_clients_command(daemon),
    }

    def fill_in(digest: str) -> str:
        mark = f"{systemd.MPS_MARK_VARIABLE}={digest}"
        return templates.fill_in("units/chatterbox-tts-mps.service.j2", {**values, "mark": mark})

    return fill_in(systemd.digest(fill_in("")))


def front(fleet: Fleet, templates: Templates, *, source: str, upstreams: Sequence[Upstream] | None = None) -> str:
    """nginx's file for the front, which any nginx can include.

    ``upstreams`` is who stands behind it, with ports and names of their own; by default the fleet's instances,
    all in service.
    """
    if upstreams is None:
        upstreams = [Upstream(instance.name, instance.host, instance.port) for instance in fleet.instances]
    asked = [upstream for upstream in upstreams if not upstream.drained]
    in_service = [upstream for upstream in asked if not upstream.leaving]
    values = {
        "header": header(source),
        "fleet": fleet,
        "upstreams": upstreams,
        "asked": asked,
        "in_service": in_service,
        "redirects": nginx.passes(len(asked)) - 1,
    }
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
