"""``fleet.toml`` as the operator wrote it: strict at the door, defaults documented. Decides nothing.

``load`` turns text into a ``FleetConfig`` or one ``FleetFileError`` that names every problem;
``fleet.resolve`` then decides what the file leaves open.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import string
import tomllib
from contextlib import suppress
from itertools import chain
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError
from pydantic_core import PydanticCustomError

from chatterbox_deploy.errors import FleetFileError

_UUID = r"(?:GPU|MIG)-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_GPU = rf"(?:0|[1-9][0-9]?|{_UUID})"

VERSIONS_DIR = "/opt/chatterbox-tts/versions"
"""Each version of the server has an environment of its own below it."""

VERSION_LINK = "/opt/chatterbox-tts/venv"
"""Points to the version that runs."""

MAX_INSTANCES_PER_GPU = 16
"""More replicas than this share a GPU badly: even a tiny model spends its time switching contexts."""

RESERVED_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE",
    "CUDA_MPS_LOG_DIRECTORY",
    "CUDA_MPS_PIPE_DIRECTORY",
    "FLEET_INSTANCE",
    "FLEET_MPS",
    "INVOCATION_ID",
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
)
"""Environment the unit itself decides; an operator's value would silently break pinning or readiness."""


SMALLEST_MEMORY_MB = 256
"""Any engine holds as much from the start: with less it would be recycled, or killed, for ever."""


def _absolute_path(value: str) -> str:
    """A path that means the same to systemd, nginx and the shell, quoted or not."""
    if not re.fullmatch(r"/[A-Za-z0-9._/+@:=,~-]*", value) or ".." in PurePosixPath(value).parts:
        raise PydanticCustomError(
            "path",
            "should be an absolute path without spaces, '..' or characters special to nginx or systemd",
        )
    return value


def _printable(value: str) -> str:
    if not value.isprintable():
        raise PydanticCustomError("printable", "should be one line of printable characters")
    return value


def _listen(value: str) -> str:
    try:
        split_listen(value)
    except ValueError:
        raise PydanticCustomError(
            "listen", "should be ADDRESS:PORT, such as '127.0.0.1:6095', '0.0.0.0:80' or '[::1]:6095'"
        ) from None
    return value


def split_listen(listen: str) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]:
    """Address and port of ``ADDRESS:PORT``.

    Raises:
        ValueError: not an IP address (IPv6 in brackets), or a port outside 1..65535.
    """
    host, _, port_text = listen.rpartition(":")
    if "%" in host:
        # A zone (fe80::1%eth0) may hold any text at all, and nginx listens on none.
        msg = f"an address with a zone: {host}"
        raise ValueError(msg)
    bracketed = host.startswith("[") and host.endswith("]")
    address = ipaddress.IPv6Address(host[1:-1]) if bracketed else ipaddress.IPv4Address(host)
    if not re.fullmatch(r"[1-9][0-9]{0,4}", port_text) or int(port_text) > 65535:
        msg = f"not a port: {port_text}"
        raise ValueError(msg)
    return address, int(port_text)


def _argument(value: str) -> str:
    """One argument of ``server.command``; ``{port}`` and ``{host}`` are filled in, ``{{`` is a brace."""
    _printable(value)
    if not _placeholders(value) <= {"port", "host"}:
        raise PydanticCustomError(
            "placeholder",
            "may hold only {placeholders}; write a plain brace twice",
            {"placeholders": "{port} and {host}"},
        )
    return value


def _placeholders(argument: str) -> set[str]:
    """Names in braces; ``""`` stands for anything that is more than a name, or not closed."""
    try:
        parts = list(string.Formatter().parse(argument))
    except ValueError:
        return {""}
    return {"" if spec or conversion else name for _, name, spec, conversion in parts if name is not None}


def _variable_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
        raise PydanticCustomError("variable", "should be a name of letters, digits and '_'")
    if value.startswith("CHATTERBOX_") or value in RESERVED_VARIABLES:
        raise PydanticCustomError("variable", "is set by the unit itself and cannot be given here")
    return value


def _voice(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", value):
        raise PydanticCustomError("voice", "should be a voice's name: 1 to 64 letters, digits, '_' and '-'")
    return value


def _host_name(value: str) -> str:
    label = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
    if len(value) > 253 or not re.fullmatch(rf"{label}(\.{label})*", value):
        raise PydanticCustomError("host_name", "should be a host's name in lower case, such as 'tts.example.com'")
    return value


def _origin(value: str) -> str:
    """An origin as a browser writes it: the header is compared letter for letter."""
    if value != "*" and not re.fullmatch(r"https?://(?:[a-z0-9.-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?", value):
        raise PydanticCustomError(
            "origin", "should be '*' or like 'https://example.com' or 'http://localhost:3000': lower case, no path"
        )
    return value


def _none_or_enough(value: int) -> int:
    if 0 < value < SMALLEST_MEMORY_MB:
        raise PydanticCustomError("memory", "should be 0 (none) or at least {least}", {"least": SMALLEST_MEMORY_MB})
    return value


def _one_or_many(value: object) -> str:
    return "#many" if isinstance(value, (list, tuple)) else "#one"


GpuKey = Annotated[str, Field(pattern=rf"^{_GPU}(?:,{_GPU})?$")]
"""A GPU's index as nvidia-smi shows it, its UUID, or two of them with a comma (one instance over both)."""

Port = Annotated[int, Field(ge=1024, le=65535)]
Ports = Annotated[
    Annotated[Port, Tag("#one")]
    | Annotated[list[Port], Field(min_length=1, max_length=MAX_INSTANCES_PER_GPU), Tag("#many")],
    Discriminator(_one_or_many),
]
AbsolutePath = Annotated[str, AfterValidator(_absolute_path)]
Argument = Annotated[str, AfterValidator(_argument)]
VariableName = Annotated[str, AfterValidator(_variable_name)]
Variable = Annotated[str, AfterValidator(_printable)]
HostName = Annotated[str, AfterValidator(_host_name)]
Voice = Annotated[str, AfterValidator(_voice)]
Origin = Annotated[str, AfterValidator(_origin)]
MemoryMb = Annotated[int, Field(ge=0, le=10_000_000), AfterValidator(_none_or_enough)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class NginxConfig(_Strict):
    """``[nginx]``: the one address that clients use."""

    listen: Annotated[str, AfterValidator(_listen)] = "127.0.0.1:6095"
    """Address and port of the front. Anything but loopback also needs api_keys_file, here or in [server], or
    allow_anonymous."""

    api_keys_file: AbsolutePath | None = None
    """File of the keys that may speak, one `"~^Bearer KEY$" NAME;` a line; NAME appears in the access log."""

    allow_anonymous: bool = False
    """Serve other machines without asking for a key."""

    max_upload_mb: Annotated[int, Field(ge=1, le=1024)] = 25
    """Largest request body, in MB; reference audio for a voice is the largest thing sent."""

    tls_certificate: AbsolutePath | None = None
    """Speak TLS with this certificate and its chain (PEM), such as certbot's live/NAME/fullchain.pem; with tls_key."""

    tls_key: AbsolutePath | None = None
    """Private key of the certificate (PEM), such as certbot's live/NAME/privkey.pem."""

    server_name: HostName | None = None
    """Answer to this name alone, beside other sites on the same address. Default: to any name."""

    http_listen: Annotated[str, AfterValidator(_listen)] | None = None
    """Address and port of plain HTTP, which sends everybody to TLS: usually '0.0.0.0:80'."""

    acme_webroot: AbsolutePath | None = None
    """Directory in which certbot's webroot plugin answers its challenges, on http_listen."""

    rate_limit_per_minute: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Requests to speak that a client may make each minute, by its key or else its address; 0 is any number."""

    rate_limit_burst: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Requests beyond that pace that are taken at once."""

    direct_routes: bool = False
    """Also offer each instance by itself, drained or not: /gpu0/v1/audio/speech, /gpu0/metrics. For debugging."""


class ServerConfig(_Strict):
    """``[server]``: what every unit runs."""

    model: Literal["chatterbox", "turbo", "multilingual"] = "chatterbox"
    """Which Chatterbox model to load."""

    engine: Literal["stock", "fast", "espeak"] = "stock"
    """stock: the chatterbox-tts package. fast: the same models, many utterances at once, on one GPU.
    espeak: offline stand-in without GPU or weights, for demos and tests."""

    python: AbsolutePath = f"{VERSION_LINK}/bin/python"
    """Interpreter of the environment that has chatterbox-deploy[server] installed."""

    weights: AbsolutePath | None = None
    """Directory of a local checkpoint. Default: the Hugging Face cache, downloaded on first start."""

    device: Literal["cuda", "cpu"] = "cuda"
    """cpu is for machines without a GPU, and slow."""

    tf32: bool = True
    """Let matrix products and convolutions use TensorFloat-32."""

    cudnn_benchmark: bool = True
    """Let cuDNN time its convolution algorithms and keep the fastest."""

    autocast: Literal["off", "fp16", "bf16"] = "off"
    """Run the model under torch.autocast. Slower than off on an H200 (scripts/gpu/stock_server_sweep.txt)."""

    pipeline: Literal["auto", "on", "off"] = "auto"
    """Begin the next utterance while the last one becomes sound (stock engine). auto: where it has two GPUs."""

    max_batch: Annotated[int, Field(ge=0, le=1024)] = 0
    """Utterances that the fast engine speaks at once. 0: as many as the GPU's memory holds, 64 at most."""

    queue_size: Annotated[int, Field(ge=0, le=1000)] = 8
    """Requests that may wait behind the one being spoken, per instance; one more is answered 503."""

    max_wait_s: Annotated[int, Field(ge=1, le=3600)] = 60
    """Seconds a request may wait for its turn; then it is answered 503."""

    longest_utterance_s: Annotated[int, Field(ge=1, le=3600)] = 120
    """Seconds the longest utterance may take to compute; a stuck engine is restarted after that."""

    max_input_chars: Annotated[int, Field(ge=1, le=1_000_000)] = 100_000
    """Longest text of one request, in characters."""

    order: Literal["size", "fifo"] = "size"
    """Who is next. size: the shortest, yet nobody waits for ever behind shorter ones. fifo: who came first."""

    check_duration: bool = True
    """Speak a sentence once more whose sound is implausibly short or long for its text."""

    aliases: dict[Voice, Voice] = {}
    """More names for your voices, such as { alloy = "anna" } for clients that know only OpenAI's names."""

    api_keys_file: AbsolutePath | None = None
    """File of the keys that may speak, one `NAME KEY` a line. Instances check them, so not with nginx.api_keys_file."""

    cors_origins: list[Origin] = []
    """Web pages whose scripts may use the front from a browser, such as "https://example.com"; "*" is any page."""

    recycle_gpu_mb: MemoryMb = 0
    """MB of GPU memory after which an instance finishes what it has and starts afresh; 0 is never."""

    recycle_host_mb: MemoryMb = 0
    """MB of host memory after which an instance finishes what it has and starts afresh; 0 is never."""

    cpu_threads: Annotated[int, Field(ge=1, le=256)] = 2
    """CPU threads for tensor work, per instance. Without a limit every instance takes every core."""

    gpu_memory_mb: MemoryMb = 0
    """MB of GPU memory that one instance needs: a plan for more than a GPU holds is refused. 0 is what was measured
    for the model, and no check for a server of your own."""

    command: Annotated[list[Argument], Field(min_length=1)] | None = None
    """Run this server instead of ours, unchanged: absolute program, arguments; {port} and {host} are filled in."""

    directory: AbsolutePath | None = None
    """Working directory of the command."""

    environment: dict[VariableName, Variable] = {}
    """More environment variables for every instance, such as HF_ENDPOINT. Readable by every local user."""


class UnitConfig(_Strict):
    """``[unit]``: how systemd runs an instance."""

    user: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_-]{0,30}$")] = "chatterbox"
    """User of the instances. Made up by systemd for as long as they run, unless it exists."""

    start_timeout_s: Annotated[int, Field(ge=10, le=7200)] = 300
    """Seconds systemd waits for the weights to load before it calls the start a failure."""

    watchdog_s: Annotated[int, Field(ge=5, le=3600)] = 30
    """Seconds without a sign of life after which systemd kills and restarts an instance."""

    restart_delay_s: Annotated[int, Field(ge=1, le=3600)] = 5
    """Seconds between a crash and the next start."""

    restart_limit: Annotated[int, Field(ge=1, le=1000)] = 10
    """Starts that fail within about a minute each, one after the other, until systemd leaves an instance down."""

    memory_max_mb: MemoryMb = 0
    """MB of host memory, with all that it started, at which the kernel kills an instance; 0 is no limit."""

    mps: bool = True
    """Have instances that share a GPU compute at the same time, not in turns: NVIDIA's Multi-Process Service, with a
    daemon for each GPU that has several ports. Needs the program nvidia-cuda-mps-control."""

    mps_thread_percentage: Annotated[int, Field(ge=1, le=100)] = 100
    """Largest share of its GPU's multiprocessors that one of the instances sharing it by MPS may use at a time."""

    cpus_per_instance: Annotated[int, Field(ge=0, le=256)] = 0
    """CPUs for each instance alone, the first ones for the first of the file, and so on; 0 lets all use all. More
    cpu_threads than that are not started."""

    recycle_after_h: Annotated[int, Field(ge=0, le=8760)] = 0
    """Hours after which an instance is drained and started afresh, one at a time; 0 is never."""

    recycle_memory_mb: MemoryMb = 0
    """MB of host memory after which an instance is drained and started afresh, any server; 0 is never. It is what
    systemd counts (MemoryCurrent), which includes the cached pages of files that were read, such as the weights."""


class MonitoringConfig(_Strict):
    """``[monitoring]``: files for a Prometheus and a Grafana on this machine. None is written unless it is named."""

    rules_file: AbsolutePath | None = None
    """Alerts, each with what to type, to be named below rule_files in prometheus.yml."""

    scrape_file: AbsolutePath | None = None
    """Where the instances' numbers are, to be named below scrape_config_files in prometheus.yml (2.43 and later)."""

    scrape_key_file: AbsolutePath | None = None
    """File with nothing but a key, which Prometheus shows the instances; with server.api_keys_file."""

    textfile: AbsolutePath | None = None
    """What a service of the fleet sees of GPUs and front, which no instance can tell, for node_exporter's textfile
    collector: in the directory that it reads, a name that ends in .prom."""

    dashboard_file: AbsolutePath | None = None
    """A dashboard for Grafana, in a directory that it provisions dashboards from; its name ends in .json."""


class FleetConfig(_Strict):
    """Root of ``fleet.toml``."""

    gpus: Annotated[dict[GpuKey, Ports], Field(min_length=1, json_schema_extra={"additionalProperties": False})]
    """GPU (or two, with a comma) to serve on, and the loopback port or ports of the instances there."""

    nginx: NginxConfig = NginxConfig()
    """The front: one address for all instances."""

    server: ServerConfig = ServerConfig()
    """What every unit runs."""

    unit: UnitConfig = UnitConfig()
    """How systemd runs it."""

    monitoring: MonitoringConfig = MonitoringConfig()
    """What a Prometheus and a Grafana read."""

    def ports(self) -> list[tuple[str, int]]:
        """Every (GPU key, port) of the file, in its order."""
        return [
            (gpu, port) for gpu, ports in self.gpus.items() for port in (ports if isinstance(ports, list) else [ports])
        ]

    def with_version(self, directory: str) -> FleetConfig:
        """The same fleet with the version itself in the place of the link to it.

        So a running instance, and one that restarts by itself, keeps to its version when the link is turned.
        """
        inside = self.server.python.removeprefix(f"{VERSION_LINK}/")
        if self.server.command is not None or inside == self.server.python:
            return self
        return self.model_copy(update={"server": self.server.model_copy(update={"python": f"{directory}/{inside}"})})

    def with_port(self, before: int, after: int) -> FleetConfig:
        """The same fleet with one instance on another port."""
        gpus = {
            gpu: [after if port == before else port for port in ports]
            if isinstance(ports, list)
            else (after if ports == before else ports)
            for gpu, ports in self.gpus.items()
        }
        return self.model_copy(update={"gpus": gpus})


# Keys of [server] that mean something to a server of the operator's own.
_KEYS_FOR_ANY_SERVER = frozenset(
    {"command", "directory", "environment", "cpu_threads", "gpu_memory_mb", "max_wait_s", "longest_utterance_s"}
)


def conflicts(config: FleetConfig) -> list[str]:
    """Rules that span more than one key."""
    return [
        *_gpu_conflicts(config),
        *_listen_conflicts(config),
        *_tls_conflicts(config),
        *_keys_conflicts(config),
        *_command_conflicts(config.server),
        *_device_conflicts(config.server),
        *_fast_conflicts(config),
        *_memory_conflicts(config),
        *_sharing_conflicts(config),
        *_monitoring_conflicts(config),
    ]


def _fast_conflicts(config: FleetConfig) -> list[str]:
    server = config.server
    if server.engine != "fast":
        return ["server.max_batch: has no meaning unless server.engine is 'fast'"] if server.max_batch else []
    return [
        f"gpus.{key}: the fast engine has one GPU: give each a port of its own, or set server.engine = 'stock'"
        for key in config.gpus
        if "," in key
    ]


def _gpu_conflicts(config: FleetConfig) -> list[str]:
    problems: list[str] = []
    port_owner: dict[int, str] = {}
    for gpu, port in config.ports():
        if port in port_owner:
            problems.append(f"gpus.{gpu}: port {port} is already used by gpus.{port_owner[port]}")
        port_owner.setdefault(port, gpu)
    gpu_owner: dict[str, str] = {}
    for key in config.gpus:
        for gpu in key.split(","):
            if gpu in gpu_owner:
                problems.append(
                    f"gpus.{key}: GPU {gpu} is named twice"
                    if gpu_owner[gpu] == key
                    else f"gpus.{key}: GPU {gpu} is already used by gpus.{gpu_owner[gpu]}; "
                    "to share a GPU give it a list of ports"
                )
            gpu_owner.setdefault(gpu, key)
        problems.extend(_pair_conflicts(key))
    return problems


def _pair_conflicts(key: str) -> list[str]:
    """What CUDA_VISIBLE_DEVICES does not take (CUDA C++ Programming Guide; MIG User Guide, "CUDA visible devices")."""
    gpus = key.split(",")
    if len(gpus) == 2 and any(gpu.startswith("MIG-") for gpu in gpus):
        return [f"gpus.{key}: CUDA shows a process one MIG device; name whole GPUs"]
    if len({gpu.isdigit() for gpu in gpus}) == 2:
        return [f"gpus.{key}: name both GPUs by index or both by UUID"]
    return []


def _listen_conflicts(config: FleetConfig) -> list[str]:
    problems: list[str] = []
    nginx = config.nginx
    address, front_port = split_listen(nginx.listen)
    problems.extend(
        f"gpus.{gpu}: port {port} is already used by nginx.listen, {nginx.listen!r}"
        for gpu, port in config.ports()
        if port == front_port
    )
    if not (address.is_loopback or nginx.api_keys_file or config.server.api_keys_file or nginx.allow_anonymous):
        problems.append(
            f"nginx.listen: other machines reach {nginx.listen!r}: give api_keys_file, or say allow_anonymous = true"
        )
    return problems


def _tls_conflicts(config: FleetConfig) -> list[str]:
    nginx = config.nginx
    problems: list[str] = []
    if (nginx.tls_certificate is None) != (nginx.tls_key is None):
        given, lacking = ("tls_certificate", "tls_key") if nginx.tls_certificate else ("tls_key", "tls_certificate")
        problems.append(f"nginx.{given}: has no meaning without nginx.{lacking}")
    if nginx.http_listen is not None:
        port = split_listen(nginx.http_listen)[1]
        if nginx.tls_certificate is None:
            problems.append(
                "nginx.http_listen: has no meaning without nginx.tls_certificate: it sends everybody to TLS"
            )
        if port == split_listen(nginx.listen)[1]:
            problems.append(f"nginx.http_listen: port {port} is already used by nginx.listen, {nginx.listen!r}")
        problems += [
            f"gpus.{gpu}: port {port} is already used by nginx.http_listen, {nginx.http_listen!r}"
            for gpu, own in config.ports()
            if own == port
        ]
    if nginx.acme_webroot is not None and nginx.http_listen is None:
        problems.append("nginx.acme_webroot: has no meaning without nginx.http_listen, where certbot's challenges come")
    if nginx.rate_limit_burst and not nginx.rate_limit_per_minute:
        problems.append("nginx.rate_limit_burst: has no meaning without nginx.rate_limit_per_minute")
    return problems


def _keys_conflicts(config: FleetConfig) -> list[str]:
    nginx, server = config.nginx, config.server
    problems: list[str] = []
    if nginx.api_keys_file and server.api_keys_file:
        problems.append(
            "server.api_keys_file: has no meaning with nginx.api_keys_file, which asks first and keeps the key from "
            "the instances; give one of the two"
        )
    if nginx.api_keys_file and server.cors_origins:
        problems.append(
            "server.cors_origins: a browser first asks without a key (OPTIONS), which nginx.api_keys_file refuses; "
            "give server.api_keys_file instead"
        )
    return problems


def _command_conflicts(server: ServerConfig) -> list[str]:
    if server.command is None:
        return [] if server.directory is None else ["server.directory: has no meaning without server.command"]
    problems = [
        f"server.{key}: has no meaning with server.command; give it to that server in its own way"
        for key in sorted(server.model_fields_set - _KEYS_FOR_ANY_SERVER)
    ]
    if not server.command[0].startswith("/"):
        problems.append(f"server.command: should begin with an absolute path, got {server.command[0]!r}")
    if not any("port" in _placeholders(argument) for argument in server.command):
        problems.append(
            "server.command: should hold {port}, or every instance takes the same one"
            " (for a server that reads a variable: ['/usr/bin/env', 'PORT={port}', …])"
        )
    return problems


def _device_conflicts(server: ServerConfig) -> list[str]:
    if server.device == "cpu" and server.autocast != "off":
        # torch's CPU autocast hands the vocoder's inverse Fourier transform numbers that it does not take.
        return [f"server.autocast: should be 'off' where server.device is 'cpu', got {server.autocast!r}"]
    return []


def _memory_conflicts(config: FleetConfig) -> list[str]:
    limit_mb = config.unit.memory_max_mb
    recycles = {
        "server.recycle_host_mb": config.server.recycle_host_mb,
        "unit.recycle_memory_mb": config.unit.recycle_memory_mb,
    }
    return [
        f"{key}: should be below unit.memory_max_mb, {limit_mb}, where the kernel kills an instance, got {recycle_mb}"
        for key, recycle_mb in recycles.items()
        if limit_mb and recycle_mb >= limit_mb
    ]


def _sharing_conflicts(config: FleetConfig) -> list[str]:
    if not config.unit.mps and "mps_thread_percentage" in config.unit.model_fields_set:
        return ["unit.mps_thread_percentage: has no meaning with unit.mps = false"]
    return []


def _monitoring_conflicts(config: FleetConfig) -> list[str]:
    given, server = config.monitoring, config.server
    problems: list[str] = []
    named: dict[str, str] = {}
    for key in ("rules_file", "scrape_file", "textfile", "dashboard_file"):
        path = getattr(given, key)
        if path is not None and path in named:
            problems.append(f"monitoring.{key}: {path!r} is already used by monitoring.{named[path]}")
        named.setdefault(path, key)
    if given.scrape_file is not None and server.command is not None:
        problems.append("monitoring.scrape_file: has no meaning with server.command; only our own server has /metrics")
    if given.scrape_file is not None and server.api_keys_file is not None and given.scrape_key_file is None:
        problems.append(
            "monitoring.scrape_file: with server.api_keys_file Prometheus needs a key: give scrape_key_file"
        )
    if given.scrape_key_file is not None and (given.scrape_file is None or server.api_keys_file is None):
        problems.append(
            "monitoring.scrape_key_file: has no meaning without monitoring.scrape_file and server.api_keys_file"
        )
    if given.textfile is not None and not given.textfile.endswith(".prom"):
        problems.append(
            f"monitoring.textfile: node_exporter reads files that end in .prom only, got {given.textfile!r}"
        )
    if given.dashboard_file is not None and not given.dashboard_file.endswith(".json"):
        problems.append(
            f"monitoring.dashboard_file: Grafana reads files that end in .json only, got {given.dashboard_file!r}"
        )
    return problems


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
        # What remains may still contradict itself: report that too, or the operator meets it on the next run.
        for detail in error.errors():
            _drop(raw, tuple(detail["loc"]))
        with suppress(ValidationError):
            problems += conflicts(FleetConfig.model_validate(raw))
        raise FleetFileError(source, problems) from None
    if problems := conflicts(config):
        raise FleetFileError(source, problems)
    return config


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


def _known_keys() -> tuple[str, ...]:
    sections = {name: field.annotation for name, field in FleetConfig.model_fields.items()}
    return tuple(
        chain.from_iterable(
            [name, *(f"{name}.{key}" for key in model.model_fields)]
            if isinstance(model, type) and issubclass(model, BaseModel)
            else [name]
            for name, model in sections.items()
        )
    )


KNOWN_KEYS = _known_keys()
"""Every dotted key of the file, for near misses."""


def schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of ``fleet.toml``, for editors that complete and check as one types."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "fleet.toml of chatterbox-deploy",
        **{key: value for key, value in FleetConfig.model_json_schema().items() if key != "title"},
    }
