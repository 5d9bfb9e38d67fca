"""Hypothesis strategies of fleet files: valid ones, and ones with anything in them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from chatterbox_deploy import fleet
from chatterbox_deploy.config import reading

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn

_HEX = "0123456789abcdef"
_WORDS = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF, categories=["L", "N", "P", "S"]), max_size=12)
_PATHS = st.lists(st.text("abzAZ09._+@:=,~-", min_size=1, max_size=8), min_size=1, max_size=4).map(
    lambda parts: "/" + "/".join(part if part.strip(".") else "x" for part in parts)
)

_PROGRAMS = _PATHS.map(lambda path: f"/programs{path}")


@st.composite
def uuids(draw: DrawFn) -> str:
    groups = (draw(st.text(_HEX, min_size=size, max_size=size)) for size in (8, 4, 4, 4, 12))
    return f"{draw(st.sampled_from(['GPU', 'MIG']))}-{'-'.join(groups)}"


@st.composite
def gpu_tables(draw: DrawFn) -> dict[str, int | list[int]]:
    """``[gpus]``: up to eight GPUs, alone or in pairs, one or several instances each; no port twice."""
    gpus = draw(st.lists(st.integers(0, 15).map(str) | uuids(), min_size=1, max_size=8, unique=True))
    keys: list[str] = []
    while gpus:
        # Two indices or two UUIDs of whole GPUs make a pair.
        pair = len(gpus) > 1 and len({gpu.isdigit() for gpu in gpus[:2]}) == 1
        pair = pair and not any(gpu.startswith("MIG") for gpu in gpus[:2])
        size = draw(st.integers(1, 2 if pair else 1))
        keys.append(",".join(gpus[:size]))
        del gpus[:size]
    counts = [draw(st.integers(1, 3)) for _ in keys]
    ports = draw(st.lists(st.integers(1024, 65535), min_size=sum(counts), max_size=sum(counts), unique=True))
    table: dict[str, int | list[int]] = {}
    for key, count in zip(keys, counts, strict=True):
        mine, ports = ports[:count], ports[count:]
        table[key] = mine[0] if count == 1 and draw(st.booleans()) else mine
    return table


_VOICES = st.text("abcXYZ019_-", min_size=1, max_size=64)
_MEMORIES = st.just(0) | st.integers(256, 10_000_000)

_OUR_SERVER = st.fixed_dictionaries(
    {},
    optional={
        "model": st.sampled_from(["chatterbox", "turbo", "multilingual"]),
        "engine": st.sampled_from(["stock", "espeak"]),
        "python": _PROGRAMS,
        "weights": _PATHS,
        "device": st.sampled_from(["cuda", "cpu"]),
        "tf32": st.booleans(),
        "cudnn_benchmark": st.booleans(),
        "autocast": st.sampled_from(["off", "fp16", "bf16"]),
        "pipeline": st.sampled_from(["auto", "on", "off"]),
        "queue_size": st.integers(0, 1000),
        "max_wait_s": st.integers(1, 3600),
        "longest_utterance_s": st.integers(1, 3600),
        "max_input_chars": st.integers(1, 1_000_000),
        "order": st.sampled_from(["size", "fifo"]),
        "check_duration": st.booleans(),
        "aliases": st.dictionaries(_VOICES, _VOICES, max_size=3),
        "api_keys_file": _PATHS,
        "cors_origins": st.lists(st.sampled_from(["*", "https://chat.example", "http://[::1]:3000"]), max_size=3),
        "recycle_gpu_mb": _MEMORIES,
        "recycle_host_mb": _MEMORIES,
        "cpu_threads": st.integers(1, 256),
        "gpu_memory_mb": _MEMORIES,
        "environment": st.dictionaries(st.sampled_from(["HF_ENDPOINT", "LC_ALL", "X_1"]), _WORDS),
    },
).filter(lambda server: server.get("device") != "cpu" or server.get("autocast", "off") == "off")
_OTHER_SERVER = st.fixed_dictionaries(
    {
        "command": st.tuples(
            _PROGRAMS, st.lists(_WORDS.map(lambda word: word.replace("{", "{{").replace("}", "}}")), max_size=3)
        ).map(lambda parts: [parts[0], *parts[1], "--port={port}"])
    },
    optional={"directory": _PATHS, "cpu_threads": st.integers(1, 256)},
)
_UNIT = st.fixed_dictionaries(
    {},
    optional={
        "user": st.sampled_from(["chatterbox", "www-data", "_tts"]),
        "start_timeout_s": st.integers(10, 7200),
        "watchdog_s": st.integers(5, 3600),
        "restart_delay_s": st.integers(1, 3600),
        "restart_limit": st.integers(1, 1000),
        "memory_max_mb": _MEMORIES,
        "recycle_after_h": st.integers(0, 8760),
        "recycle_memory_mb": _MEMORIES,
        "mps": st.booleans(),
        "mps_thread_percentage": st.integers(1, 100),
        "cpus_per_instance": st.integers(0, 256),
    },
).filter(lambda unit: unit.get("mps", True) or "mps_thread_percentage" not in unit)


_MONITORING = st.fixed_dictionaries(
    {},
    optional={
        "rules_file": st.just("/etc/prometheus/rules.yml"),
        "textfile": st.sampled_from(["/var/lib/node/a.prom", "/var/lib/node/b.prom"]),
        "dashboard_file": st.sampled_from(["/var/lib/grafana/a.json", "/var/lib/grafana/b.json"]),
    },
)
_TLS = {"tls_certificate": "/etc/tls/chain.pem", "tls_key": "/etc/tls/key.pem"}
_DOORS = st.tuples(
    st.sampled_from([{}, _TLS, {**_TLS, "http_listen": "0.0.0.0:80", "acme_webroot": "/var/www/certbot"}]),
    st.sampled_from([{}, {"server_name": "tts.example.com"}]),
    st.sampled_from([{}, {"rate_limit_per_minute": 30}, {"rate_limit_per_minute": 30, "rate_limit_burst": 9}]),
    st.fixed_dictionaries({}, optional={"direct_routes": st.booleans()}),
).map(lambda parts: {key: value for part in parts for key, value in part.items()})


@st.composite
def fleet_tables(draw: DrawFn) -> dict[str, Any]:
    """A valid fleet file as a table."""
    gpus = draw(gpu_tables())
    taken = {port for ports in gpus.values() for port in (ports if isinstance(ports, list) else [ports])}
    table: dict[str, Any] = {"gpus": gpus}
    if draw(st.booleans()):
        address, public = draw(st.sampled_from([("127.0.0.1", False), ("[::1]", False), ("0.0.0.0", True)]))
        port = draw(st.integers(1, 65535).filter(lambda port: port not in {80, *taken}))
        table["nginx"] = {"listen": f"{address}:{port}", "max_upload_mb": draw(st.integers(1, 1024))}
        table["nginx"] |= draw(_DOORS)
        if public or draw(st.booleans()):
            table["nginx"] |= draw(
                st.sampled_from([{"allow_anonymous": True}, {"api_keys_file": "/etc/chatterbox-tts/api-keys"}])
            )
    elif 6095 in taken:
        table["nginx"] = {"listen": "127.0.0.2:80"}
    if draw(st.booleans()):
        table["server"] = draw(_OUR_SERVER | _OTHER_SERVER)
        if "api_keys_file" in table.get("nginx", {}):
            # nginx asks for the key, so no instance can, and no browser comes through.
            for key in ("api_keys_file", "cors_origins"):
                table["server"].pop(key, None)
    if draw(st.booleans()):
        table["unit"] = draw(_UNIT)
        recycles = (table.get("server", {}).get("recycle_host_mb"), table["unit"].get("recycle_memory_mb"))
        if max(filter(None, recycles), default=0) >= table["unit"].get("memory_max_mb", 0):
            # It would be killed before.
            table["unit"].pop("memory_max_mb", None)
    if draw(st.booleans()):
        table["monitoring"] = draw(_MONITORING)
        if not {"command", "api_keys_file"} & table.get("server", {}).keys() and draw(st.booleans()):
            table["monitoring"] = {**table["monitoring"], "scrape_file": "/etc/prometheus/scrape.yml"}
    return table


def to_toml(table: dict[str, Any]) -> str:
    """``table`` as TOML; JSON's strings, numbers, booleans and lists are TOML's too."""
    lines: list[str] = []
    for section, values in table.items():
        lines.append(f"[{section}]")
        lines += [f"{json.dumps(key)} = {_value(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def _value(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_value(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value)


_ANYTHING = st.recursive(
    st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def broken_tables(draw: DrawFn) -> dict[str, Any]:
    """A valid fleet file in which one value or key was replaced by anything; it may still be valid."""
    table = draw(fleet_tables())
    section = draw(st.sampled_from(sorted(table)))
    key = draw(
        st.sampled_from([*table[section], "listen", "model", "user", "0", "99", "1,1", "GPU-1"]) | st.text(max_size=8)
    )
    table[section] = {**table[section], key: draw(_ANYTHING)}
    return table


@dataclass(frozen=True)
class Pair:
    """What a host has, and what it is to have."""

    before: dict[str, Any]
    after: dict[str, Any]
    drained: tuple[str, ...] = ()
    """Instances of ``before`` that an operator took out of the front."""

    max_unavailable: int = 1


_FEW_PORTS = range(6100, 6108)
_OWN_SERVER = {"command": ["/programs/serve", "--port={port}"]}


@st.composite
def _small_gpu_tables(draw: DrawFn) -> dict[str, int | list[int]]:
    """Few GPUs and few ports, so that two of them get in each other's way."""
    gpus = draw(st.lists(st.sampled_from("0123"), min_size=1, max_size=4, unique=True))
    keys = gpus if draw(st.integers(0, 3)) else [",".join(gpus[:2]), *gpus[2:]]
    ports = draw(st.permutations(_FEW_PORTS))
    table: dict[str, int | list[int]] = {}
    for number, key in enumerate(keys):
        replicas = draw(st.sampled_from([1, 1, 2]))
        table[key] = ports[2 * number] if replicas == 1 else list(ports[2 * number : 2 * number + 2])
    return table


def _with_ports(gpus: dict[str, int | list[int]], ports: list[int]) -> dict[str, int | list[int]]:
    left = iter(ports)
    return {key: [next(left) for _ in old] if isinstance(old, list) else next(left) for key, old in gpus.items()}


def _ports_of(gpus: dict[str, int | list[int]]) -> list[int]:
    return [port for ports in gpus.values() for port in (ports if isinstance(ports, list) else [ports])]


@st.composite
def _edited(draw: DrawFn, gpus: dict[str, int | list[int]]) -> dict[str, int | list[int]]:
    """One thing that an operator does to ``[gpus]``."""
    ports = _ports_of(gpus)
    spare = [port for port in _FEW_PORTS if port not in ports]
    free = [gpu for gpu in "01234" if not any(gpu in key.split(",") for key in gpus)]
    edit = draw(st.sampled_from(["add", "remove", "permute", "rotate", "move", "replicas", "reorder", "anew"]))
    key = draw(st.sampled_from(sorted(gpus)))
    edited: dict[str, int | list[int]] = draw(_small_gpu_tables()) if edit == "anew" else dict(gpus)
    match edit:
        case "add" if free and spare:
            edited[draw(st.sampled_from(free))] = draw(st.sampled_from(spare))
        case "remove" if len(gpus) > 1:
            del edited[key]
        case "permute":
            edited = _with_ports(gpus, draw(st.permutations(ports)))
        case "rotate":
            edited = _with_ports(gpus, [*ports[1:], ports[0]])
        case "move" if spare:
            edited = _with_ports(gpus, [*ports[1:], draw(st.sampled_from(spare))])
        case "replicas":
            held = _ports_of({key: gpus[key]})
            edited[key] = held[-1] if len(held) > 1 else draw(st.permutations([*held, *spare[:1]]))
        case "reorder":
            edited = dict(draw(st.permutations(list(gpus.items()))))
    return edited


_SETTINGS: dict[str, Any] = {
    "nginx": {"listen": "127.0.0.1:7000", "max_upload_mb": 30},
    "server": {"model": "turbo", "engine": "espeak", "environment": {"X_1": '50% "more"'}, "cpu_threads": 3},
    "unit": {"user": "_tts", "recycle_after_h": 24, "memory_max_mb": 9000, "watchdog_s": 20, "mps": False},
    "monitoring": {"rules_file": "/etc/prometheus/rules.yml", "textfile": "/var/lib/node/a.prom"},
}


@st.composite
def related_pairs(draw: DrawFn) -> Pair:
    """Two fleets of which the second is what became of the first after an edit or a few."""
    before: dict[str, Any] = {"gpus": draw(_small_gpu_tables())}
    if draw(st.integers(0, 4)) == 0:
        before["server"] = _OWN_SERVER
    after = dict(before)
    for _ in range(draw(st.integers(1, 3))):
        section = draw(st.sampled_from(["gpus", "gpus", "gpus", "nginx", "server", "unit", "monitoring", "command"]))
        if section == "gpus":
            after["gpus"] = draw(_edited(after["gpus"]))
        elif section == "command":
            after["server"] = {} if "command" in after.get("server", {}) else _OWN_SERVER
        else:
            own = section == "server" and "command" in after.get("server", {})
            key = draw(st.sampled_from(["cpu_threads", "environment"] if own else sorted(_SETTINGS[section])))
            after[section] = {**after.get(section, {}), key: _SETTINGS[section][key]}
    if draw(st.booleans()):
        before, after = after, before
    names = [instance.name for instance in fleet.resolve(reading.load(to_toml(before), source="f")).instances]
    drained = draw(st.lists(st.sampled_from(names), max_size=1)) if draw(st.integers(0, 3)) == 0 else []
    return Pair(before, after, tuple(drained), draw(st.sampled_from([1, 1, 2, 3])))
