"""A ``Fleet``: every default decided, every name chosen. Knows nothing of systemd or nginx syntax.

The same value could be rendered for another supervisor; nothing here says which one it will be.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import ceil
from string import ascii_lowercase
from typing import TYPE_CHECKING

from chatterbox_deploy.config import split_listen
from chatterbox_deploy.errors import UnknownInstance

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chatterbox_deploy.config import FleetConfig

HOST = "127.0.0.1"
"""Instances listen on loopback only. A literal, since ``localhost`` may resolve to ::1 first."""

MARGIN_S = 10
"""Seconds by which an outer timeout exceeds the inner ones, so that the inner one answers first."""


MEGABYTE = 1_000_000

HTTPS_PORT = 443

QUICK_FAILURE_S = 60
"""A start that fails sooner is part of a crash loop; a slower one is tried for ever. Importing torch takes 10-37 s."""


@dataclass(frozen=True, slots=True)
class Places:
    """Directories of one installation."""

    state_dir: str
    """Voices: kept."""

    cache_dir: str
    """Compiled kernels, results of jobs: can be made again."""

    hub_dir: str
    """Weights, as huggingface_hub keeps them (``HF_HOME``): can be fetched again."""

    log_dir: str
    """nginx's access log."""


SYSTEM = Places(
    state_dir="/var/lib/chatterbox-tts",
    cache_dir="/var/cache/chatterbox-tts",
    hub_dir="/var/cache/chatterbox-tts/huggingface",
    log_dir="/var/log/nginx",
)
"""Where a fleet lives that systemd runs: its ``StateDirectory=`` and ``CacheDirectory=``."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One server process."""

    name: str
    """``gpu0``; ``gpu1-a`` and ``gpu1-b`` on a shared GPU; ``gpu2-gpu3`` over two."""

    gpus: tuple[str, ...]
    """Indices or UUIDs, one or two, as CUDA_VISIBLE_DEVICES takes them."""

    host: str
    port: int
    command: tuple[str, ...]
    environment: Mapping[str, str]
    """What the process is told; the keys of ``Service.api_keys_file`` come beside it."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """One member of the front's list; while the fleet changes, old and new instances stand in it together."""

    name: str
    host: str
    port: int
    drained: bool = False
    """Whether it gets no new requests; those it has, it finishes."""

    leaving: bool = False
    """Whether it is about to restart: it gets a new request only when nobody else could take it.

    An nginx worker that a reload replaced may hold a request for as long as its upload takes, and knows only the
    list that it began with: if all others on it are away by then, this one is back.
    """


@dataclass(frozen=True, slots=True)
class Front:
    """The one address that clients use."""

    listen: str
    access_log: str
    max_upload_mb: int
    read_timeout_s: int
    """Longest silence of a healthy instance, before its answer or within it: a full wait and the longest utterance."""

    keepalive_connections: int
    """Idle connections each nginx worker keeps to the instances; 0 where the server may close them first."""

    api_keys_file: str | None
    instances_check_keys: bool
    """Whether the instances ask for keys, which the front then passes on."""

    tls_certificate: str | None
    tls_key: str | None
    server_name: str | None
    http_listen: str | None
    https_address: str
    """Where ``http_listen`` sends everybody, with nginx's variable for the name that the client used."""

    acme_webroot: str | None
    rate_limit_per_minute: int
    rate_limit_burst: int
    rate_limit_retry_s: int
    """After so many seconds one more request is within the rate."""

    direct_routes: bool


@dataclass(frozen=True, slots=True)
class Service:
    """How each instance is supervised."""

    user: str
    speaks_notify: bool
    """Whether the server tells its supervisor when it is ready and that it is alive."""

    start_timeout_s: int
    stop_timeout_s: int
    """Long enough for what an instance finishes once it is told to stop.

    Ours hands what waits to the next GPU, finishes the utterance at hand, and asks its supervisor for more time
    while a long text still streams. Of another server we assume that it finishes everything it accepted.
    """

    watchdog_s: int
    restart_delay_s: int
    restart_limit: int
    restart_window_s: int
    """Seconds in which ``restart_limit`` starts, by hand too, count as a crash loop.

    Short enough that a request now and then that kills its server never adds up to one.
    """

    directory: str | None
    offline: bool
    """Whether the server needs nothing from the network: its weights lie on this machine, or it has none."""

    uses_gpu: bool
    api_keys_file: str | None
    """Keys that the instances check; a supervisor may hand each a copy of its own."""

    config_error_status: int | None
    """Exit status after which a restart cannot help."""

    memory_max_bytes: int | None
    """Host memory at which an instance is killed; ``None`` is no limit."""

    recycle_after_h: int | None
    """Age at which an instance is drained and started afresh; ``None`` is never."""

    recycle_memory_mb: int | None
    """Host memory, as its supervisor counts it, beyond which it is drained and started afresh; ``None`` is never."""

    @property
    def recycles(self) -> bool:
        """Whether somebody has to look at the instances now and then."""
        return self.recycle_after_h is not None or self.recycle_memory_mb is not None


@dataclass(frozen=True, slots=True)
class Fleet:
    """All instances on one host, and their front."""

    instances: tuple[Instance, ...]
    front: Front
    service: Service
    places: Places

    @property
    def key_files(self) -> tuple[str, ...]:
        """The front's file of API keys and the instances' own, where it has them."""
        files = (self.front.api_keys_file, self.service.api_keys_file)
        return tuple(path for path in files if path is not None)


def resolve(config: FleetConfig, places: Places = SYSTEM) -> Fleet:
    """Decide everything that ``config`` leaves open."""
    server, unit, nginx = config.server, config.unit, config.nginx
    ours = server.command is None
    answer_s = server.max_wait_s + server.longest_utterance_s
    names = _names(config)
    _, tls_port = split_listen(nginx.listen)
    return Fleet(
        instances=tuple(
            _instance(config, places, name, tuple(key.split(",")), port)
            for name, (key, port) in zip(names, config.ports(), strict=True)
        ),
        front=Front(
            listen=nginx.listen,
            access_log=f"{places.log_dir}/chatterbox-tts.access.log",
            max_upload_mb=nginx.max_upload_mb,
            read_timeout_s=answer_s + MARGIN_S,
            # Our server keeps idle connections for longer than nginx does; of another one we cannot know.
            keepalive_connections=2 * len(names) if ours else 0,
            api_keys_file=nginx.api_keys_file,
            instances_check_keys=server.api_keys_file is not None,
            tls_certificate=nginx.tls_certificate,
            tls_key=nginx.tls_key,
            server_name=nginx.server_name,
            http_listen=nginx.http_listen,
            https_address="https://$host" if tls_port == HTTPS_PORT else f"https://$host:{tls_port}",
            acme_webroot=nginx.acme_webroot,
            rate_limit_per_minute=nginx.rate_limit_per_minute,
            rate_limit_burst=nginx.rate_limit_burst,
            rate_limit_retry_s=ceil(60 / max(1, nginx.rate_limit_per_minute)),
            direct_routes=nginx.direct_routes,
        ),
        service=Service(
            user=unit.user,
            speaks_notify=ours,
            start_timeout_s=unit.start_timeout_s,
            stop_timeout_s=(server.longest_utterance_s if ours else answer_s) + MARGIN_S,
            watchdog_s=unit.watchdog_s,
            restart_delay_s=unit.restart_delay_s,
            restart_limit=unit.restart_limit,
            restart_window_s=(QUICK_FAILURE_S + unit.restart_delay_s) * unit.restart_limit,
            directory=server.directory,
            offline=ours and (server.weights is not None or server.engine == "espeak"),
            uses_gpu=not ours or (server.engine != "espeak" and server.device == "cuda"),
            api_keys_file=server.api_keys_file,
            config_error_status=2 if ours else None,
            memory_max_bytes=unit.memory_max_mb * MEGABYTE or None,
            recycle_after_h=unit.recycle_after_h or None,
            recycle_memory_mb=unit.recycle_memory_mb or None,
        ),
        places=places,
    )


def find(fleet: Fleet, who: str) -> tuple[Instance, ...]:
    """Instances that an operator calls ``who``: by name, or by a GPU of theirs (``1``, ``gpu1``, its UUID).

    Raises:
        UnknownInstance: there is none.
    """
    wanted = who.lower()
    named = tuple(instance for instance in fleet.instances if wanted == instance.name)
    found = named or tuple(
        instance
        for instance in fleet.instances
        if wanted == ",".join(instance.gpus).lower()
        or any(wanted in {gpu.lower(), _full(gpu), _short(gpu)} for gpu in instance.gpus)
    )
    if not found:
        raise UnknownInstance(who, [instance.name for instance in fleet.instances])
    return found


def _names(config: FleetConfig) -> list[str]:
    """One name per (GPU key, port), in the file's order; unique, since GPUs are."""
    short = {gpu: _short(gpu) for key in config.gpus for gpu in key.split(",")}
    clashes = {name for name, count in Counter(short.values()).items() if count > 1}
    full = {gpu: _full(gpu) if name in clashes else name for gpu, name in short.items()}
    names: list[str] = []
    for key, ports in config.gpus.items():
        name = "-".join(full[gpu] for gpu in key.split(","))
        replicas = len(ports) if isinstance(ports, list) else 1
        names += [name] if replicas == 1 else [f"{name}-{letter}" for letter in ascii_lowercase[:replicas]]
    return names


def _full(gpu: str) -> str:
    """``gpu0`` for an index; a UUID in lower case (``gpu-8f3c…``, ``mig-…``)."""
    return f"gpu{gpu}" if gpu.isdigit() else gpu.lower()


def _short(gpu: str) -> str:
    """A UUID's kind and first group: what an operator compares with ``nvidia-smi -L``."""
    return "-".join(_full(gpu).split("-")[:2])


def _instance(config: FleetConfig, places: Places, name: str, gpus: tuple[str, ...], port: int) -> Instance:
    server = config.server
    command = (
        (server.python, "-m", "chatterbox_server")
        if server.command is None
        else tuple(argument.format(port=port, host=HOST) for argument in server.command)
    )
    environment = {
        # nvidia-smi's order, so that "GPU 1" means the same card to us, to CUDA and to the operator.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": ",".join(gpus),
        **_limits_and_caches(server.cpu_threads, places),
    }
    if server.command is None:
        environment |= _settings(config, places, name, port)
    if server.weights is not None:
        environment["HF_HUB_OFFLINE"] = "1"
    return Instance(
        name=name,
        gpus=gpus,
        host=HOST,
        port=port,
        command=command,
        environment=environment | server.environment,
    )


def _limits_and_caches(cpu_threads: int, places: Places) -> dict[str, str]:
    threads = str(cpu_threads)
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "NUMBA_NUM_THREADS": threads,
        # The home directory of a service user is nowhere: every library's cache has to be told its place.
        "HF_HOME": places.hub_dir,
        "XDG_CACHE_HOME": places.cache_dir,
        "NUMBA_CACHE_DIR": f"{places.cache_dir}/numba",
        "CUDA_CACHE_PATH": f"{places.cache_dir}/cuda",
        "TRITON_CACHE_DIR": f"{places.cache_dir}/triton",
        "TQDM_DISABLE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def _settings(config: FleetConfig, places: Places, name: str, port: int) -> dict[str, str]:
    """What ``chatterbox_server`` reads; the contract test feeds it every golden unit's."""
    server, nginx = config.server, config.nginx
    settings: dict[str, str | int | bool | None] = {
        "INSTANCE": name,
        "HOST": HOST,
        "PORT": port,
        "ENGINE": server.engine,
        "MODEL": server.model,
        "DEVICE": server.device,
        "WEIGHTS": server.weights,
        "TF32": server.tf32,
        "CUDNN_BENCHMARK": server.cudnn_benchmark,
        "AUTOCAST": server.autocast,
        "PIPELINE": server.pipeline,
        "VOICES_DIR": f"{places.state_dir}/voices",
        "QUEUE_SIZE": server.queue_size,
        "MAX_WAIT_S": server.max_wait_s,
        "LONGEST_UTTERANCE_S": server.longest_utterance_s,
        "MAX_INPUT_CHARS": server.max_input_chars,
        "ORDER": server.order,
        "CHECK_DURATION": server.check_duration,
        "ALIASES": ",".join(f"{alias}={voice}" for alias, voice in server.aliases.items()) or None,
        # What the front lets through, an instance takes.
        "MAX_UPLOAD_MB": nginx.max_upload_mb,
        "CORS_ORIGINS": ",".join(server.cors_origins) or None,
        "RECYCLE_GPU_MB": server.recycle_gpu_mb,
        "RECYCLE_HOST_MB": server.recycle_host_mb,
        "RESULTS_DIR": f"{places.cache_dir}/results",
    }
    return {
        f"CHATTERBOX_{key}": str(value).lower() if isinstance(value, bool) else str(value)
        for key, value in settings.items()
        if value is not None
    }
