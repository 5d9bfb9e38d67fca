"""What was measured of instances that share a GPU: the built-in profiles, or a file of one's own. Decides nothing."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from chatterbox_deploy.errors import ProfileError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Point(_Strict):
    """So many instances on one GPU, each speaking all the time."""

    replicas: Annotated[int, Field(ge=1)]
    mps: bool
    """Whether they shared it by MPS."""

    audio_s_per_s: Annotated[float, Field(gt=0)]
    """Seconds of sound per second, all together."""

    cores: Annotated[float, Field(gt=0)] | None
    """CPU seconds per second, all together; ``None`` where nobody counted."""


class Profile(_Strict):
    """One model on one kind of machine."""

    model: str
    machine: str
    source: str
    """Who measured it, and how."""

    gpu_memory_bytes: Annotated[int, Field(gt=0)]
    """Of one instance, after 10 s of speech, by the driver's count."""

    t3_share: Annotated[float, Field(gt=0, lt=1)] | None
    """Part of the computing time that T3 takes, the rest being S3Gen's; ``None`` where nobody measured."""

    points: Annotated[tuple[Point, ...], Field(min_length=1)]


@cache
def built_in() -> dict[str, Profile]:
    """By model."""
    text = resources.files("chatterbox_deploy.sizing").joinpath("measured.json").read_text(encoding="utf-8")
    return {profile.model: profile for profile in TypeAdapter(tuple[Profile, ...]).validate_json(text)}


def parse(text: str, *, source: str) -> Profile:
    """A profile that scripts/gpu/replicas.py wrote; ``source`` names it in messages.

    Raises:
        ProfileError: with every problem found.
    """
    try:
        return Profile.model_validate_json(text)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, each['loc'])) or 'the file'}: {each['msg'].lower()}" for each in error.errors()
        ]
        msg = "\n  ".join([f"cannot use the profile {source}:", *problems])
        raise ProfileError(msg) from None
