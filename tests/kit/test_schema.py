"""The JSON Schema that editors use says what the reader of fleet.toml says."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given

import chatterbox_deploy
from chatterbox_deploy.config import tables
from support import fleets, golden

SHIPPED = Path(chatterbox_deploy.__file__).parent / "fleet.schema.json"
CHECK = jsonschema.Draft202012Validator(tables.schema())


def test_the_shipped_schema_is_the_generated_one() -> None:
    """Cure: ``chatterbox-deploy schema > src/chatterbox_deploy/fleet.schema.json``."""
    assert json.loads(SHIPPED.read_text()) == tables.schema()


def test_it_is_a_schema_and_explains_every_key() -> None:
    jsonschema.Draft202012Validator.check_schema(tables.schema())
    for section in tables.schema()["$defs"].values():
        assert all("description" in key for key in section["properties"].values())


@pytest.mark.parametrize("case", golden.CASES)
def test_golden_fleets_satisfy_it(case: str) -> None:
    CHECK.validate(tomllib.loads((golden.FOLDER / case / "fleet.toml").read_text()))


@given(fleets.fleet_tables())
def test_any_valid_fleet_satisfies_it(table: dict[str, Any]) -> None:
    CHECK.validate(table)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[gpus]",
        "[gpus]\n0 = 80",
        "[gpus]\n0 = []",
        "[gpus]\ngpu0 = 6093",
        "[gpus]\n0 = 6093\n[server]\nmodle = 'turbo'",
        "[gpus]\n0 = 6093\n[server]\nmodel = 'x'",
    ],
)
def test_an_editor_marks_what_the_reader_would_refuse(text: str) -> None:
    assert not CHECK.is_valid(tomllib.loads(text))
