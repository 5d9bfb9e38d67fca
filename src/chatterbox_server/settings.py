"""What one instance was told by its environment. Reads a mapping; touches no file, no device."""

import difflib
import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    field_validator,
)

PREFIX: Final = "CHATTERBOX_"


class SettingsError(Exception):
    """The environment is wrong; holds every problem, so that an operator fixes all of them in one go."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n  ".join((f"cannot start: the environment has {count}", *problems)))


def _true_or_false(value: object) -> object:
    words = {"true": True, "false": False}
    if isinstance(value, str):
        if value not in words:
            msg = "input should be 'true' or 'false'"
            raise ValueError(msg)
        return words[value]
    return value


def _address(value: str) -> str:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        msg = "input should be an IP address"
        raise ValueError(msg) from None
    return value


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        msg = "input should be an absolute path"
        raise ValueError(msg)
    return path


def _pairs(value: object) -> object:
    """``alloy=anna,nova=bob`` as a mapping; a name given twice would mean two voices."""
    if not isinstance(value, str):
        return value
    pairs: dict[str, str] = {}
    for pair in _listed(value):
        alias, _, voice = (part.strip() for part in pair.partition("="))
        if not (re.fullmatch(_VOICE_NAME, alias) and re.fullmatch(_VOICE_NAME, voice)):
            msg = "input should be ALIAS=VOICE, with commas between; names are 1 to 64 letters, digits, '_' and '-'"
            raise ValueError(msg)
        if alias in pairs:
            msg = f"input should name '{alias}' once"
            raise ValueError(msg)
        pairs[alias] = voice
    return pairs


def _listed(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _origins(value: object) -> object:
    return _listed(value) if isinstance(value, str) else value


def _origin(value: str) -> str:
    # As a browser writes it: it compares letter for letter, and sends no path and no port that goes without saying.
    if value != "*" and not re.fullmatch(r"https?://(?:[a-z0-9.-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?", value):
        msg = "input should be '*' or like 'https://example.com' or 'http://localhost:3000': lower case, no path"
        raise ValueError(msg)
    return value


def _never_or_enough(value: int) -> int:
    if 0 < value < _SMALLEST_RECYCLE_MB:
        msg = f"input should be 0 (never) or at least {_SMALLEST_RECYCLE_MB}"
        raise ValueError(msg)
    return value


_VOICE_NAME: Final = "[A-Za-z0-9_-]{1,64}"

# Less than any engine holds from the start: it would be recycled for ever.
_SMALLEST_RECYCLE_MB: Final = 256

Flag = Annotated[bool, BeforeValidator(_true_or_false)]
Directory = Annotated[Path, AfterValidator(_absolute)]
File = Annotated[Path, AfterValidator(_absolute)]
Aliases = Annotated[Mapping[str, str], BeforeValidator(_pairs), AfterValidator(MappingProxyType), PlainSerializer(dict)]
Origins = Annotated[tuple[Annotated[str, AfterValidator(_origin)], ...], BeforeValidator(_origins)]
Recycle = Annotated[int, Field(ge=0, le=10_000_000), AfterValidator(_never_or_enough)]


class Settings(BaseModel):
    """One instance, decided completely; the field ``port`` is the variable ``CHATTERBOX_PORT``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    instance: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")] = "local"
    """Name of this instance in headers, logs and ``/readyz``."""

    host: Annotated[str, AfterValidator(_address)] = "127.0.0.1"
    """Address to bind; an address, not a name, so that it can never mean two."""

    port: Annotated[int, Field(ge=1, le=65535)] = 6093
    """Port to bind, once the engine has spoken its first words."""

    engine: Literal["stock", "fast", "espeak"] = "stock"
    """``stock`` is the real chatterbox-tts; ``fast`` is its model, many utterances at once; ``espeak`` is an offline
    stand-in without GPU or weights."""

    model: Literal["chatterbox", "turbo", "multilingual"] = "chatterbox"
    """Which of the models of chatterbox-tts the stock or the fast engine loads."""

    device: Literal["cuda", "cpu"] = "cuda"
    """Never ``cuda:N``: which GPU that is, CUDA_VISIBLE_DEVICES has already decided."""

    weights: Directory | None = None
    """Local checkpoint; ``None`` is the Hugging Face cache below ``HF_HOME``."""

    tf32: Flag = True
    """Allow TF32 in matrix products and convolutions."""

    cudnn_benchmark: Flag = True
    """Let cuDNN time its algorithms at each new shape."""

    autocast: Literal["off", "fp16", "bf16"] = "off"
    """Lower precision around the model; measured slower than ``off`` on an H200."""

    pipeline: Literal["auto", "on", "off"] = "auto"
    """Whether the stock engine begins an utterance while it ends another; ``auto`` is where it has two GPUs."""

    max_batch: Annotated[int, Field(ge=0, le=1024)] = 0
    """Utterances that the fast engine speaks at once; 0 is as many as the GPU's memory holds, 64 at most."""

    voices_dir: Directory | None = None
    """``NAME.wav`` (flac, ogg, mp3) here is voice NAME; ``None`` leaves the built-in voice."""

    queue_size: Annotated[int, Field(ge=0, le=1000)] = 8
    """Requests that may wait behind those being spoken; one more is answered 503."""

    max_wait_s: Annotated[int, Field(ge=1, le=3600)] = 60
    """A request that has not begun after so many seconds is answered 503."""

    longest_utterance_s: Annotated[int, Field(ge=1, le=3600)] = 120
    """An utterance that has run longer than this counts as hung: the watchdog pings stop."""

    max_input_chars: Annotated[int, Field(ge=1, le=1_000_000)] = 100_000
    """Longest text of one request, in characters; a longer one is answered 400."""

    order: Literal["size", "fifo"] = "size"
    """Whose piece is spoken next: the shortest request's (none waits for ever), or the oldest's."""

    check_duration: Flag = True
    """Speak a piece again whose sound is implausibly short or long for its text."""

    aliases: Aliases = Field(default_factory=lambda: MappingProxyType({}))
    """More names for voices, such as ``alloy`` for one of your own."""

    max_upload_mb: Annotated[int, Field(ge=1, le=1024)] = 25
    """Largest recording that may be uploaded as a voice, in MB; a larger body is answered 413."""

    api_keys_file: File | None = None
    """``NAME KEY`` a line; ``None`` asks nobody for a key."""

    cors_origins: Origins = ()
    """Web pages whose scripts a browser lets read the answers; ``*`` is any."""

    recycle_gpu_mb: Recycle = 0
    """GPU memory in MB that torch may reserve before the process drains and starts afresh; 0 is never."""

    recycle_host_mb: Recycle = 0
    """Memory in MB that the process may hold before it drains and starts afresh; 0 is never."""

    results_dir: Directory | None = None
    """Where the results of jobs are kept; ``None`` keeps none."""

    visible_gpus: tuple[str, ...] = ()
    """Entries of CUDA_VISIBLE_DEVICES (indices or UUIDs); empty when it is not set."""

    invocation_id: str | None = None
    """INVOCATION_ID that systemd gave this start; tells a restarted process from the one before it."""

    runtime_dir: Path | None = None
    """RUNTIME_DIRECTORY that systemd gave this unit: what must outlive a restart, yet not a reboot."""

    @field_validator("autocast")
    @classmethod
    def _autocast_needs_cuda(cls, value: str, told: ValidationInfo) -> str:
        # On the CPU, torch's autocast hands the vocoder's inverse Fourier transform numbers it does not take.
        if value != "off" and told.data.get("device") == "cpu":
            msg = "input should be 'off' where CHATTERBOX_DEVICE is 'cpu'"
            raise ValueError(msg)
        return value

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Self:
        """Read every ``CHATTERBOX_*`` name of ``environ``.

        Raises:
            SettingsError: names that do not exist and values that do not fit, all of them at once.
        """
        told: dict[str, Any] = {}
        problems: list[str] = []
        for name, value in sorted(environ.items()):
            if not name.startswith(PREFIX):
                continue
            field = name.removeprefix(PREFIX).lower()
            if field in _FIELDS and name == _variable(field):
                told[field] = value
            else:
                problems.append(f"{name}: unknown name{_near(name)}")
        told["visible_gpus"] = _listed(environ.get("CUDA_VISIBLE_DEVICES", ""))
        told["invocation_id"] = environ.get("INVOCATION_ID") or None
        # systemd puts colons between several.
        told["runtime_dir"] = environ.get("RUNTIME_DIRECTORY", "").partition(":")[0] or None
        try:
            settings = cls.model_validate(told)
        except ValidationError as error:
            problems.extend(
                f"{_variable(str(problem['loc'][0]))}: {_said(problem['msg'])}, got {problem['input']!r}"
                for problem in error.errors()
            )
            raise SettingsError(tuple(sorted(set(problems)))) from None
        if problems:
            raise SettingsError(tuple(problems))
        return settings


# What systemd, not an operator, tells us has no CHATTERBOX_ name.
_FIELDS: Final = frozenset(Settings.model_fields) - {"visible_gpus", "invocation_id", "runtime_dir"}


def _variable(field: str) -> str:
    return PREFIX + field.upper()


def _near(name: str) -> str:
    # Without the prefix, which would make every name look near.
    close = difflib.get_close_matches(name.upper().removeprefix(PREFIX), sorted(map(str.upper, _FIELDS)), n=1)
    return f" (did you mean '{PREFIX}{close[0]}'?)" if close else ""


def _said(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]
