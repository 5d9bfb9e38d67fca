"""Where the two packages meet: the rendered unit's environment is what the server's Settings read."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings

from chatterbox_deploy import fleet, render, systemd
from chatterbox_deploy.config import reading
from chatterbox_deploy.templates import Templates
from chatterbox_server.settings import PREFIX, Settings
from support import fleets, golden

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chatterbox_deploy.fleet import Fleet, Instance
    from chatterbox_deploy.render import RenderedFile

OURS = [case for case in golden.CASES if golden.resolve(case).service.speaks_notify]


def told(files: Iterable[RenderedFile], instance: Instance) -> dict[str, str]:
    """The environment that systemd gives the instance, read from its unit file."""
    unit = next(file.text for file in files if file.path.name == systemd.unit_name(instance.name))
    words = [line.removeprefix("Environment=") for line in unit.splitlines() if line.startswith("Environment=")]
    credentials = f"/run/credentials/{systemd.unit_name(instance.name)}"
    expanded = [re.sub("%[d%]", lambda found: {"%d": credentials, "%%": "%"}[found[0]], word) for word in words]
    pairs = [pair for word in expanded for pair in shlex.split(word)]
    return dict(pair.split("=", 1) for pair in pairs)


def check(resolved: Fleet, files: Iterable[RenderedFile]) -> None:
    for instance in resolved.instances:
        environment = told(files, instance)
        read = Settings.from_environ(environment)

        assert read.instance == instance.name
        assert (read.host, read.port) == (instance.host, instance.port)
        assert read.visible_gpus == instance.gpus
        assert read.max_upload_mb == resolved.front.max_upload_mb


@pytest.mark.parametrize("case", OURS)
def test_the_server_understands_every_golden_unit(case: str) -> None:
    check(golden.resolve(case), golden.render_case(case))


def test_a_unit_tells_every_setting_there_is() -> None:
    server = """
engine = 'fast'
max_batch = 8
weights = '/w'
api_keys_file = '/k'
cors_origins = ['https://a.example', '*']
aliases = { a = 'b', c = 'd' }
"""
    resolved = fleet.resolve(reading.load(f"[gpus]\n0 = 6093\n[server]{server}", source="f"))
    (instance,) = resolved.instances
    environment = told(render.render(resolved, Templates(), source="f"), instance)

    read = Settings.from_environ(environment)
    assert (read.engine, read.max_batch) == ("fast", 8)
    assert read.api_keys_file == Path("/run/credentials/chatterbox-tts-gpu0.service/api-keys")
    assert read.cors_origins == ("https://a.example", "*")
    assert read.aliases == {"a": "b", "c": "d"}
    by_systemd = {"visible_gpus", "invocation_id", "runtime_dir"}
    assert {name.removeprefix(PREFIX).lower() for name in environment if name.startswith(PREFIX)} == (
        set(Settings.model_fields) - by_systemd
    )


def test_both_sides_have_the_same_defaults() -> None:
    """Else a server started by hand would differ from one that a unit starts."""
    resolved = fleet.resolve(reading.load("[gpus]\n0 = 6093", source="f"))
    (instance,) = resolved.instances
    environment = told(render.render(resolved, Templates(), source="f"), instance)
    of_the_place = {"instance", "voices_dir", "results_dir", "visible_gpus"}

    assert Settings.from_environ(environment).model_dump(exclude=of_the_place) == Settings().model_dump(
        exclude=of_the_place
    )


@settings(deadline=None, max_examples=50)
@given(fleets.fleet_tables())
def test_the_server_understands_any_valid_fleet(table: dict[str, Any]) -> None:
    resolved = fleet.resolve(reading.load(fleets.to_toml(table), source="f"))
    if resolved.service.speaks_notify:
        check(resolved, render.render(resolved, Templates(), source="f"))
