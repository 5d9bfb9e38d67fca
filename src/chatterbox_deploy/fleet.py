"""A ``Fleet``: every default decided, every name chosen. Knows nothing of systemd or nginx syntax.

The same value could be rendered for another supervisor; nothing here says which one it will be.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import ceil
from string import ascii_lowercase
from typing import TYPE_CHECKING

from chatterbox_deploy.config.values import split_listen
from chatterbox_deploy.errors import UnknownInstance

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chatterbox_deploy.config.tables import FleetConfig, ServerConfig

HOST = "127.0.0.1"
"""Instances listen on loopback only. A literal, since ``localhost`` may resolve to ::1 first."""

SPEECH = "/v1/audio/speech"
"""The route by which an instance is asked to speak."""

SPEECH_ROUTES = (SPEECH, "/synthesize", "/synthesize-json")
"""Those of older clients, too: whoever asks there wants to hear something."""

MARGIN_S = 10
"""Seconds by which an outer timeout exceeds the inner ones, so that the inner one answers first."""


MEGABYTE = 1_000_000

HTTPS_PORT = 443

MPS_PROGRAM = "nvidia-cuda-mps-control"

GPU_MEMORY_BYTES = {
    "chatterbox": int(4.07 * 2**30),
    "turbo": int(3.63 * 2**30),
    "multilingual": int(4.21 * 2**30),
}
"""Of one instance of the stock engine that has spoken 10 s, by model (scripts/gpu/stock_server.txt: an H200)."""

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

    run_dir: str
    """What is there only while something runs."""

    @property
    def voices_dir(self) -> str:
        return f"{self.state_dir}/voices"


SYSTEM = Places(
    state_dir="/var/lib/chatterbox-tts",
    cache_dir="/var/cache/chatterbox-tts",
    hub_dir="/var/cache/chatterbox-tts/huggingface",
    log_dir="/var/log/nginx",
    run_dir="/run",
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

    mps: MpsDaemon | None = None
    """Through which it shares its GPU; ``None`` where it is alone there, or takes turns."""

    cpus: range | None = None
    """The CPUs that are its own; ``None`` where all use all."""


@dataclass(frozen=True, slots=True)
class MpsDaemon:
    """NVIDIA's Multi-Process Service for the instances that share a GPU, or the same two.

    A client is told the GPU by its UUID: the daemon counts the GPUs that it was given from 0, and a client that
    finds no daemon computes without one, on whatever that number means then (Multi-Process Service, appendix
    "Environment Variables": CUDA_VISIBLE_DEVICES). The UUID means the same to both.
    """

    name: str
    """``mps-gpu1``; ``mps-gpu2-gpu3`` for two."""

    gpus: tuple[str, ...]
    directory: str
    """Its pipes and sockets, by which its clients find it."""

    environment: Mapping[str, str]

    @property
    def clients_file(self) -> str:
        """What its clients are told beside their own environment; there once it answers."""
        return f"{self.directory}/clients.env"


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

    @property
    def local_url(self) -> str:
        """Where this machine reaches it, without a path. With TLS its certificate is for the name that clients use."""
        address, port = split_listen(self.listen)
        if address.is_unspecified:
            host = "127.0.0.1" if address.version == 4 else "[::1]"
        else:
            host = str(address) if address.version == 4 else f"[{address}]"
        return f"http{'' if self.tls_certificate is None else 's'}://{host}:{port}"


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

    broken_engine_status: int | None
    """Exit status of one whose CUDA context is broken, and with it those of all who share the GPU by MPS."""

    gpu_memory_bytes: int | None
    """GPU memory that one instance needs; ``None`` where nobody knows."""

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
class Monitoring:
    """Files for those who watch; ``None`` is not written."""

    rules_file: str | None = None
    scrape_file: str | None = None
    scrape_key_file: str | None = None
    """Holds a key that is shown to the instances; not ours to write."""

    textfile: str | None = None
    """Written again and again by somebody who looks."""

    dashboard_file: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """Those that are rendered."""
        return tuple(path for path in (self.rules_file, self.scrape_file, self.dashboard_file) if path is not None)


@dataclass(frozen=True, slots=True)
class Fleet:
    """All instances on one host, and their front."""

    instances: tuple[Instance, ...]
    front: Front
    service: Service
    places: Places
    monitoring: Monitoring = Monitoring()

    @property
    def key_files(self) -> tuple[str, ...]:
        """The front's file of API keys and the instances' own, where it has them."""
        files = (self.front.api_keys_file, self.service.api_keys_file)
        return tuple(path for path in files if path is not None)

    @property
    def mps_daemons(self) -> tuple[MpsDaemon, ...]:
        """One for each GPU that is shared so."""
        return tuple({each.mps.name: each.mps for each in self.instances if each.mps is not None}.values())


def resolve(config: FleetConfig, places: Places = SYSTEM) -> Fleet:
    """Decide everything that ``config`` leaves open."""
    server, unit, nginx = config.server, config.unit, config.nginx
    ours = server.command is None
    answer_s = server.max_wait_s + server.longest_utterance_s
    uses_gpu = not ours or (server.engine != "espeak" and server.device == "cuda")
    names = _names(config)
    daemons = _mps_daemons(config, places) if unit.mps and uses_gpu else {}
    _, tls_port = split_listen(nginx.listen)
    return Fleet(
        instances=tuple(
            _instance(config, places, name, key, port, number=number, mps=daemons.get(key))
            for number, (name, (key, port)) in enumerate(zip(names, config.ports(), strict=True))
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
            uses_gpu=uses_gpu,
            api_keys_file=server.api_keys_file,
            config_error_status=2 if ours else None,
            broken_engine_status=70 if ours else None,
            gpu_memory_bytes=_gpu_memory_bytes(server) if uses_gpu else None,
            memory_max_bytes=unit.memory_max_mb * MEGABYTE or None,
            recycle_after_h=unit.recycle_after_h or None,
            recycle_memory_mb=unit.recycle_memory_mb or None,
        ),
        places=places,
        monitoring=Monitoring(**config.monitoring.model_dump()),
    )


def _gpu_memory_bytes(server: ServerConfig) -> int | None:
    if server.gpu_memory_mb:
        return server.gpu_memory_mb * MEGABYTE
    # The fast engine takes of a GPU what is free, and leaves half of it.
    return GPU_MEMORY_BYTES[server.model] if server.command is None and server.engine == "stock" else None


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
    gpu_names = _gpu_names(config)
    names: list[str] = []
    for key, ports in config.gpus.items():
        name = gpu_names[key]
        replicas = len(ports) if isinstance(ports, list) else 1
        names += [name] if replicas == 1 else [f"{name}-{letter}" for letter in ascii_lowercase[:replicas]]
    return names


def _gpu_names(config: FleetConfig) -> dict[str, str]:
    """One name per GPU key; unique, since GPUs are."""
    short = {gpu: _short(gpu) for key in config.gpus for gpu in key.split(",")}
    clashes = {name for name, count in Counter(short.values()).items() if count > 1}
    full = {gpu: _full(gpu) if name in clashes else name for gpu, name in short.items()}
    return {key: "-".join(full[gpu] for gpu in key.split(",")) for key in config.gpus}


def _full(gpu: str) -> str:
    """``gpu0`` for an index; a UUID in lower case (``gpu-8f3c…``, ``mig-…``)."""
    return f"gpu{gpu}" if gpu.isdigit() else gpu.lower()


def _short(gpu: str) -> str:
    """A UUID's kind and first group: what an operator compares with ``nvidia-smi -L``."""
    return "-".join(_full(gpu).split("-")[:2])


def _mps_daemons(config: FleetConfig, places: Places) -> dict[str, MpsDaemon]:
    """By GPU key: of those with several instances."""
    daemons: dict[str, MpsDaemon] = {}
    for key, name in _gpu_names(config).items():
        ports = config.gpus[key]
        if not isinstance(ports, list) or len(ports) == 1:
            continue
        directory = f"{places.run_dir}/chatterbox-tts-mps-{name}"
        daemons[key] = MpsDaemon(
            name=f"mps-{name}",
            gpus=tuple(key.split(",")),
            directory=directory,
            environment={
                "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
                "CUDA_VISIBLE_DEVICES": key,
                "CUDA_MPS_PIPE_DIRECTORY": directory,
                "CUDA_MPS_LOG_DIRECTORY": f"{directory}/log",
            },
        )
    return daemons


def _instance(
    config: FleetConfig, places: Places, name: str, key: str, port: int, *, number: int, mps: MpsDaemon | None
) -> Instance:
    """``number`` counts the instances of the file from 0."""
    server, width = config.server, config.unit.cpus_per_instance
    command = (
        (server.python, "-m", "chatterbox_server")
        if server.command is None
        else tuple(argument.format(port=port, host=HOST) for argument in server.command)
    )
    environment = {
        # nvidia-smi's order, so that "GPU 1" means the same card to us, to CUDA and to the operator.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": key,
        **_limits_and_caches(min(server.cpu_threads, width or server.cpu_threads), places),
    }
    if mps is not None:
        environment["CUDA_MPS_PIPE_DIRECTORY"] = mps.directory
        if config.unit.mps_thread_percentage < 100:
            environment["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = str(config.unit.mps_thread_percentage)
    if server.command is None:
        environment |= _settings(config, places, name, port)
    if server.weights is not None:
        environment["HF_HUB_OFFLINE"] = "1"
    return Instance(
        name=name,
        gpus=tuple(key.split(",")),
        host=HOST,
        port=port,
        command=command,
        environment=environment | server.environment,
        mps=mps,
        cpus=range(number * width, (number + 1) * width) if width else None,
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
        "MAX_BATCH": server.max_batch if server.engine == "fast" else None,
        "VOICES_DIR": places.voices_dir,
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
