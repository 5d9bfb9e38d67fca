"""The tables of ``fleet.toml``: every key, what it may be, what it means, and its default."""

from __future__ import annotations

from itertools import chain
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from chatterbox_deploy.config.values import (
    AbsolutePath,
    Argument,
    GpuKey,
    HostName,
    Listen,
    MemoryMb,
    Origin,
    Ports,
    Variable,
    VariableName,
    Voice,
)

VERSIONS_DIR = "/opt/chatterbox-tts/versions"
"""Each version of the server has an environment of its own below it."""

VERSION_LINK = "/opt/chatterbox-tts/venv"
"""Points to the version that runs."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class NginxConfig(_Strict):
    """``[nginx]``: the one address that clients use."""

    listen: Listen = "127.0.0.1:6095"
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

    http_listen: Listen | None = None
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
    """Requests that may wait behind those being spoken, per instance; one more is answered 503."""

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
