"""A fleet file's text as its tables, or every problem of it at once, in the operator's own words. Reads no file."""

from __future__ import annotations

import difflib
import re
import tomllib
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from chatterbox_deploy.config import conflicts
from chatterbox_deploy.config.tables import KNOWN_KEYS, FleetConfig
from chatterbox_deploy.errors import FleetFileError


def load(text: str, *, source: str) -> FleetConfig:
    """The fleet file's text as a model; ``source`` names it in messages.

    Raises:
        FleetFileError: with every problem found.
    """
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FleetFileError(source, [_syntax_problem(text, str(error))]) from None
    except (ValueError, RecursionError) as error:
        # Numbers of thousands of digits, thousands of brackets.
        raise FleetFileError(source, [f"cannot be read as TOML: {error}"]) from None
    try:
        config = FleetConfig.model_validate(raw)
    except ValidationError as error:
        problems = [_field_problem(dict(detail)) for detail in error.errors()]
        problems += conflicts.shared_ports(_ports(raw))
        # What remains may still contradict itself: report that too, or the operator meets it on the next run.
        for detail in error.errors():
            _drop(raw, tuple(detail["loc"]))
        with suppress(ValidationError):
            problems += conflicts.others(FleetConfig.model_validate(raw))
        raise FleetFileError(source, problems) from None
    if problems := conflicts.find(config):
        raise FleetFileError(source, problems)
    return config


def _ports(raw: dict[str, Any]) -> list[tuple[str, int]]:
    """Key and port, as far as they are there, of a file with something wrong in it: perhaps with just these."""
    gpus = raw.get("gpus")
    listed = (
        (key, ports if isinstance(ports, list) else [ports])
        for key, ports in (gpus.items() if isinstance(gpus, dict) else ())
    )
    return [(_printed(key), port) for key, ports in listed for port in ports if type(port) is int]


def _syntax_problem(text: str, said: str) -> str:
    """tomllib's message with the line it is about, since editors are not always at hand over ssh."""
    message = said[:1].lower() + said[1:]
    if not (place := re.search(r"\(at line (\d+), column (\d+)\)", said)):
        return message
    line_number, column = int(place[1]), int(place[2])
    line = text.splitlines()[line_number - 1] if line_number <= len(text.splitlines()) else ""
    return f"{message}\n    {line}\n    {' ' * (column - 1)}^"


def _field_problem(detail: dict[str, Any]) -> str:
    location = [str(part) for part in detail["loc"] if not str(part).startswith("#")]
    if location[-1] == "[key]":
        location.pop()
        if location[0] == "gpus":
            return (
                f"{_printed('.'.join(location))}: should be a GPU's index ('0'), its UUID as in `nvidia-smi -L`, "
                "or two of them ('2,3')"
            )
    key = _printed(".".join(location))
    if detail["type"] == "extra_forbidden":
        known_keys = [known for known in KNOWN_KEYS if "." in known or "." not in key]
        # The right key in the wrong section, before one that is only spelt alike.
        near = [known for known in KNOWN_KEYS if known.rpartition(".")[2] == location[-1]] or (
            difflib.get_close_matches(key, known_keys, n=1, cutoff=0.7)
        )
        return f"{key}: unknown key" + (f" (did you mean {near[0]!r}?)" if near else "")
    if detail["type"] == "missing":
        return f"{key}: missing; for one server on GPU 0 write\n    [{key}]\n    0 = 6093"
    if key == "gpus" and detail["type"] == "too_short":
        return "gpus: empty; for one server on GPU 0 write\n    [gpus]\n    0 = 6093"
    message = "should be a table" if detail["type"] in {"dict_type", "model_type"} else str(detail["msg"])
    return f"{key}: {message[:1].lower()}{message[1:]}, got {_shortened(detail['input'])}"


def _printed(key: str) -> str:
    """The key as it was written, unless that could write to the terminal by itself."""
    return key if key.isprintable() and key else repr(key)


def _shortened(value: object) -> str:
    try:
        said = repr(value)
    except (RecursionError, ValueError):
        said = "…"
    return said if len(said) <= 80 else f"{said[:77]}…"


def _drop(raw: dict[str, Any], location: tuple[int | str, ...]) -> None:
    """Remove the key that an error is about, as deep as the nearest table."""
    table: dict[str, Any] = raw
    for part in location:
        inner = table.get(str(part))
        if not isinstance(inner, dict):
            table.pop(str(part), None)
            return
        table = inner
