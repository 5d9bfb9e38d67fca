"""Ask a host how its fleet is: systemd, the files, each instance, the front. Decides nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from chatterbox_deploy import render, systemd
from chatterbox_deploy.errors import CommandFailed
from chatterbox_deploy.status import rows
from chatterbox_deploy.status.found import PROPERTIES, Found, read_readiness, read_unit

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from chatterbox_deploy.fleet import Fleet
    from chatterbox_deploy.host import Host
    from chatterbox_deploy.render import RenderedFile
    from chatterbox_deploy.status.found import Readiness, Unit
    from chatterbox_deploy.systemd import Mark

SHOW_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 2.0
"""An instance answers in milliseconds whatever its engine does, unless it hangs."""


def survey(host: Host, fleet: Fleet, wanted: Iterable[RenderedFile]) -> Found:
    """All that can be known, as root or not; what cannot be read is missing from the answer."""
    texts = _texts(host, wanted)
    units = _units(host, [path.name for path in texts if path.parent == render.UNIT_DIR])
    running = {} if units is None else _running(host, units)
    places: dict[str, tuple[str, int]] = {}
    for name, unit_name in rows.instance_units(fleet, texts, units or ()).items():
        place = rows.address(fleet, texts.get(render.UNIT_DIR / unit_name), running.get(unit_name), name)
        if place is not None and fleet.service.speaks_notify:
            places[name] = place
    # All at once, so that those that hang are waited for together.
    with ThreadPoolExecutor(len(places) + 1) as pool:
        front = pool.submit(_front_answers, host, fleet)
        asked = {name: pool.submit(_readiness, host, *place) for name, place in places.items()}
    return Found(
        units=units,
        texts=texts,
        running=running,
        places=places,
        readiness={name: said.result() for name, said in asked.items()},
        front_answers=front.result(),
        monotonic_s=host.monotonic_s(),
    )


def _texts(host: Host, wanted: Iterable[RenderedFile]) -> dict[PurePosixPath, str | None]:
    paths = chain((file.path for file in wanted), host.glob(render.UNIT_DIR, "chatterbox-tts*"))
    texts: dict[PurePosixPath, str | None] = {}
    for path in paths:
        try:
            content = host.read_bytes(path)
        except CommandFailed:
            continue
        texts[path] = None if content is None else content.decode(errors="replace")
    return texts


def _units(host: Host, names: list[str]) -> dict[str, Unit] | None:
    # The glob is for what runs though its file is gone.
    argv = systemd.show_argv([*names, systemd.NGINX_UNIT, "chatterbox-tts-*.service"], PROPERTIES)
    try:
        shown = host.run(argv, timeout_s=SHOW_TIMEOUT_S).stdout
    except CommandFailed:
        return None
    return {unit["Id"]: read_unit(unit) for unit in systemd.parse_show(shown) if "Id" in unit}


def _running(host: Host, units: Mapping[str, Unit]) -> dict[str, Mark | None]:
    """By unit of an instance: which text of it its process was started by. Only root may ask."""
    marks: dict[str, Mark | None] = {}
    for name, unit in units.items():
        if unit.main_pid is None or systemd.instance_name(name) is None:
            continue
        try:
            environment = host.read_bytes(PurePosixPath(f"/proc/{unit.main_pid}/environ"))
        except CommandFailed:
            continue
        if environment:
            marks[name] = systemd.find_mark(environment.decode(errors="replace"))
    return marks


def _readiness(host: Host, address: str, port: int) -> Readiness | None:
    answer = host.request("GET", f"http://{address}:{port}/readyz", timeout_s=ANSWER_TIMEOUT_S)
    return None if answer is None else read_readiness(answer.body)


def _front_answers(host: Host, fleet: Fleet) -> bool:
    headers = {"Host": fleet.front.server_name} if fleet.front.server_name is not None else {}
    answer = host.request("GET", f"{fleet.front.local_url}/healthz", headers=headers, timeout_s=ANSWER_TIMEOUT_S)
    return answer is not None and answer.status == 200
