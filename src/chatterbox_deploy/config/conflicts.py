"""What several keys of ``fleet.toml`` cannot say together. Decides nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatterbox_deploy.config.values import placeholders, split_listen

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chatterbox_deploy.config.tables import FleetConfig, ServerConfig

# Keys of [server] that mean something to a server of the operator's own.
_KEYS_FOR_ANY_SERVER = frozenset(
    {"command", "directory", "environment", "cpu_threads", "gpu_memory_mb", "max_wait_s", "longest_utterance_s"}
)


def find(config: FleetConfig) -> list[str]:
    """Rules that span more than one key."""
    return [*shared_ports(config.ports()), *others(config)]


def shared_ports(ports: Iterable[tuple[str, int]]) -> list[str]:
    """Ports that are there twice, of all in [gpus], by GPU; once for each place where one is too many."""
    found: list[str] = []
    owner: dict[int, str] = {}
    for gpu, port in ports:
        if port in owner:
            there = "there twice" if owner[port] == gpu else f"already used by gpus.{owner[port]}"
            found.append(f"gpus.{gpu}: port {port} is {there}")
        owner.setdefault(port, gpu)
    return list(dict.fromkeys(found))


def others(config: FleetConfig) -> list[str]:
    """All rules but that of ``shared_ports``."""
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
    owner: dict[str, str] = {}
    for key in config.gpus:
        named = key.split(",")
        if len(set(named)) < len(named):
            problems.append(f"gpus.{key}: GPU {named[0]} is named twice")
        for gpu in dict.fromkeys(named):
            if gpu in owner:
                problems.append(
                    f"gpus.{key}: GPU {gpu} is already used by gpus.{owner[gpu]}; "
                    "to share a GPU give it a list of ports"
                )
            owner.setdefault(gpu, key)
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
    if not any("port" in placeholders(argument) for argument in server.command):
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
