"""fleet.toml: what is accepted, and what is said of everything else."""

from __future__ import annotations

import tomllib
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatterbox_deploy.config import reading, tables
from chatterbox_deploy.errors import FleetFileError
from support import fleets


def problems(text: str) -> list[str]:
    with pytest.raises(FleetFileError) as caught:
        reading.load(text, source="fleet.toml")
    return list(caught.value.problems)


GPU_KEY = "should be a GPU's index ('0'), its UUID as in `nvidia-smi -L`, or two of them ('2,3')"
ONE_GPU = "[gpus]\n0 = 6093\n"
HOST_NAME = "should be a host's name in lower case, such as 'tts.example.com'"
LISTEN = "should be ADDRESS:PORT, such as '127.0.0.1:6095', '0.0.0.0:80' or '[::1]:6095'"
ORIGIN = "should be '*' or like 'https://example.com' or 'http://localhost:3000': lower case, no path"
PATH = "should be an absolute path without spaces, '..' or characters special to nginx or systemd"

REJECTED = [
    # [gpus]
    ("", ["gpus: missing; for one server on GPU 0 write\n    [gpus]\n    0 = 6093"]),
    ("[gpus]\n", ["gpus: empty; for one server on GPU 0 write\n    [gpus]\n    0 = 6093"]),
    ("gpus = 6093", ["gpus: should be a table, got 6093"]),
    (ONE_GPU + "[nginx]\nlisten = '[::1%a]:80'", [f"nginx.listen: {LISTEN}, got '[::1%a]:80'"]),
    ("[gpus]\n0 = 80", ["gpus.0: input should be greater than or equal to 1024, got 80"]),
    ("[gpus]\n0 = 65536", ["gpus.0: input should be less than or equal to 65535, got 65536"]),
    ("[gpus]\n0 = '6093'", ["gpus.0: input should be a valid integer, got '6093'"]),
    ("[gpus]\n0 = true", ["gpus.0: input should be a valid integer, got True"]),
    ("[gpus]\n0 = []", ["gpus.0: list should have at least 1 item after validation, not 0, got []"]),
    ("[gpus]\n0 = [6093, 80]", ["gpus.0.1: input should be greater than or equal to 1024, got 80"]),
    ("[gpus]\ngpu0 = 6093", [f"gpus.gpu0: {GPU_KEY}"]),
    ("[gpus]\n01 = 6093", [f"gpus.01: {GPU_KEY}"]),
    ("[gpus]\n'0, 1' = 6093", [f"gpus.0, 1: {GPU_KEY}"]),
    ("[gpus]\n'0,1,2' = 6093", [f"gpus.0,1,2: {GPU_KEY}"]),
    ("[gpus]\nGPU-8f3c2a1b = 6093", [f"gpus.GPU-8f3c2a1b: {GPU_KEY}"]),
    ("[gpus]\n0 = 6093\n1 = 6093", ["gpus.1: port 6093 is already used by gpus.0"]),
    ("[gpus]\n0 = [6093, 6093]", ["gpus.0: port 6093 is there twice"]),
    ("[gpus]\n0 = [6093, 6093, 6093]", ["gpus.0: port 6093 is there twice"]),
    (
        "[gpus]\n0 = 6093\n'0,0' = 6095\n[nginx]\nlisten = '127.0.0.1:7000'",
        [
            "gpus.0,0: GPU 0 is named twice",
            "gpus.0,0: GPU 0 is already used by gpus.0; to share a GPU give it a list of ports",
        ],
    ),
    (
        "[gpus]\nfirst = 6093\n0 = 6093\n1 = [6093, 'x']",
        [
            "gpus.first: should be a GPU's index ('0'), its UUID as in `nvidia-smi -L`, or two of them ('2,3')",
            "gpus.1.1: input should be a valid integer, got 'x'",
            "gpus.0: port 6093 is already used by gpus.first",
            "gpus.1: port 6093 is already used by gpus.first",
        ],
    ),
    (
        "[gpus]\n0 = 6093\n'0,1' = 6094",
        ["gpus.0,1: GPU 0 is already used by gpus.0; to share a GPU give it a list of ports"],
    ),
    ("[gpus]\n'1,1' = 6094", ["gpus.1,1: GPU 1 is named twice"]),
    (
        "[gpus]\n'0,GPU-8f3c2a1b-0000-4000-8000-00000000000a' = 6093",
        ["gpus.0,GPU-8f3c2a1b-0000-4000-8000-00000000000a: name both GPUs by index or both by UUID"],
    ),
    (
        "[gpus]\n'MIG-8f3c2a1b-0000-4000-8000-00000000000a,MIG-8f3c2a1b-0000-4000-8000-00000000000b' = 6093",
        [
            "gpus.MIG-8f3c2a1b-0000-4000-8000-00000000000a,MIG-8f3c2a1b-0000-4000-8000-00000000000b: "
            "CUDA shows a process one MIG device; name whole GPUs"
        ],
    ),
    ("[gpus]\n'a\\u001bb' = 6093".replace("'", '"'), [f"'gpus.a\\x1bb': {GPU_KEY}"]),
    (
        "[gpus]\n0 = " + "9" * 5000,
        [
            "cannot be read as TOML: Exceeds the limit (4300 digits) for integer string conversion: "
            "value has 5000 digits; use sys.set_int_max_str_digits() to increase the limit"
        ],
    ),
    ("a = " + "[" * 5000, ["cannot be read as TOML: maximum recursion depth exceeded"]),
    ("[gpus]\n0 = 6095", ["gpus.0: port 6095 is already used by nginx.listen, '127.0.0.1:6095'"]),
    # [nginx]
    (ONE_GPU + "[nginx]\nlisten = 'localhost:6095'", [f"nginx.listen: {LISTEN}, got 'localhost:6095'"]),
    (ONE_GPU + "[nginx]\nlisten = '6095'", [f"nginx.listen: {LISTEN}, got '6095'"]),
    (ONE_GPU + "[nginx]\nlisten = '127.0.0.1:70000'", [f"nginx.listen: {LISTEN}, got '127.0.0.1:70000'"]),
    (ONE_GPU + "[nginx]\nlisten = '::1:6095'", [f"nginx.listen: {LISTEN}, got '::1:6095'"]),
    (
        ONE_GPU + "[nginx]\nlisten = '0.0.0.0:80'",
        ["nginx.listen: other machines reach '0.0.0.0:80': give api_keys_file, or say allow_anonymous = true"],
    ),
    (ONE_GPU + "[nginx]\napi_keys_file = 'keys'", [f"nginx.api_keys_file: {PATH}, got 'keys'"]),
    (ONE_GPU + "[nginx]\napi_keys_file = '/a b'", [f"nginx.api_keys_file: {PATH}, got '/a b'"]),
    (ONE_GPU + "[nginx]\napi_keys_file = '/a/$x'", [f"nginx.api_keys_file: {PATH}, got '/a/$x'"]),
    (ONE_GPU + "[nginx]\napi_keys_file = '/a/../b'", [f"nginx.api_keys_file: {PATH}, got '/a/../b'"]),
    # [server]
    (
        ONE_GPU + "[server]\nmodel = 'chaterbox'",
        ["server.model: input should be 'chatterbox', 'turbo' or 'multilingual', got 'chaterbox'"],
    ),
    (
        ONE_GPU + "[server]\ndevice = 'cpu'\nautocast = 'bf16'",
        ["server.autocast: should be 'off' where server.device is 'cpu', got 'bf16'"],
    ),
    (
        "[gpus]\n'0,1' = 6093\n[server]\nengine = 'fast'",
        ["gpus.0,1: the fast engine has one GPU: give each a port of its own, or set server.engine = 'stock'"],
    ),
    (
        ONE_GPU + "[server]\nmax_batch = 8",
        ["server.max_batch: has no meaning unless server.engine is 'fast'"],
    ),
    (
        ONE_GPU + "[server]\ndirectory = '/srv'",
        ["server.directory: has no meaning without server.command"],
    ),
    (
        ONE_GPU + "[server]\ncommand = ['/srv/serve', '{port}']\nengine = 'stock'\nmodel = 'turbo'",
        [
            "server.engine: has no meaning with server.command; give it to that server in its own way",
            "server.model: has no meaning with server.command; give it to that server in its own way",
        ],
    ),
    (
        ONE_GPU + "[server]\ncommand = ['python', '{port}']",
        ["server.command: should begin with an absolute path, got 'python'"],
    ),
    (
        ONE_GPU + "[server]\ncommand = ['/srv/serve']",
        [
            "server.command: should hold {port}, or every instance takes the same one"
            " (for a server that reads a variable: ['/usr/bin/env', 'PORT={port}', …])"
        ],
    ),
    (
        ONE_GPU + "[server]\ncommand = ['/srv/serve', '{{port}}']",
        [
            "server.command: should hold {port}, or every instance takes the same one"
            " (for a server that reads a variable: ['/usr/bin/env', 'PORT={port}', …])"
        ],
    ),
    (
        ONE_GPU + "[server]\ncommand = ['/srv/serve', '{port}', '{gpu}']",
        ["server.command.2: may hold only {port} and {host}; write a plain brace twice, got '{gpu}'"],
    ),
    (
        ONE_GPU + "[server]\ncommand = ['/srv/serve', '{port', 'x']",
        ["server.command.1: may hold only {port} and {host}; write a plain brace twice, got '{port'"],
    ),
    (
        ONE_GPU + "[server.environment]\nCUDA_VISIBLE_DEVICES = '1'",
        [
            "server.environment.CUDA_VISIBLE_DEVICES: is set by the unit itself and cannot be given here, "
            "got 'CUDA_VISIBLE_DEVICES'"
        ],
    ),
    (
        ONE_GPU + '[server.environment]\nA = "1\\n2"',
        ["server.environment.A: should be one line of printable characters, got '1\\n2'"],
    ),
    (
        ONE_GPU + "[server]\norder = 'lifo'\nmax_input_chars = 0\ncheck_duration = 1",
        [
            "server.max_input_chars: input should be greater than or equal to 1, got 0",
            "server.order: input should be 'size' or 'fifo', got 'lifo'",
            "server.check_duration: input should be a valid boolean, got 1",
        ],
    ),
    (
        ONE_GPU + "[server.aliases]\nalloy = '../anna'\nnova = 1",
        [
            "server.aliases.alloy: should be a voice's name: 1 to 64 letters, digits, '_' and '-', got '../anna'",
            "server.aliases.nova: input should be a valid string, got 1",
        ],
    ),
    (
        ONE_GPU + "[server.aliases]\n'a=b,c' = 'anna'",
        ["server.aliases.a=b,c: should be a voice's name: 1 to 64 letters, digits, '_' and '-', got 'a=b,c'"],
    ),
    (ONE_GPU + "[server]\naliases = 'alloy=anna'", ["server.aliases: should be a table, got 'alloy=anna'"]),
    (
        ONE_GPU + "[server]\ncors_origins = ['https://chat.example/', '*', 'chat.example']",
        [
            f"server.cors_origins.0: {ORIGIN}, got 'https://chat.example/'",
            f"server.cors_origins.2: {ORIGIN}, got 'chat.example'",
        ],
    ),
    (
        ONE_GPU + "[server]\nrecycle_gpu_mb = 255\nrecycle_host_mb = -1",
        [
            "server.recycle_gpu_mb: should be 0 (none) or at least 256, got 255",
            "server.recycle_host_mb: input should be greater than or equal to 0, got -1",
        ],
    ),
    (
        ONE_GPU + "[unit]\nmps = false\nmps_thread_percentage = 50",
        ["unit.mps_thread_percentage: has no meaning with unit.mps = false"],
    ),
    (
        ONE_GPU + "[unit]\nmps = 'on'\nmps_thread_percentage = 0\ncpus_per_instance = -1",
        [
            "unit.mps: input should be a valid boolean, got 'on'",
            "unit.mps_thread_percentage: input should be greater than or equal to 1, got 0",
            "unit.cpus_per_instance: input should be greater than or equal to 0, got -1",
        ],
    ),
    (
        ONE_GPU + "[unit]\nmemory_max_mb = 1\nrecycle_after_h = -1\nrecycle_memory_mb = 10_000_001",
        [
            "unit.memory_max_mb: should be 0 (none) or at least 256, got 1",
            "unit.recycle_after_h: input should be greater than or equal to 0, got -1",
            "unit.recycle_memory_mb: input should be less than or equal to 10000000, got 10000001",
        ],
    ),
    (
        ONE_GPU + "[server]\nrecycle_host_mb = 9000\n[unit]\nmemory_max_mb = 8000\nrecycle_memory_mb = 8000",
        [
            "server.recycle_host_mb: should be below unit.memory_max_mb, 8000, where the kernel kills an instance, "
            "got 9000",
            "unit.recycle_memory_mb: should be below unit.memory_max_mb, 8000, where the kernel kills an instance, "
            "got 8000",
        ],
    ),
    (ONE_GPU + "[server]\napi_keys_file = 'keys'", [f"server.api_keys_file: {PATH}, got 'keys'"]),
    (
        ONE_GPU + "[nginx]\napi_keys_file = '/k'\n[server]\napi_keys_file = '/k'\ncors_origins = ['*']",
        [
            "server.api_keys_file: has no meaning with nginx.api_keys_file, which asks first and keeps the key from "
            "the instances; give one of the two",
            "server.cors_origins: a browser first asks without a key (OPTIONS), which nginx.api_keys_file refuses; "
            "give server.api_keys_file instead",
        ],
    ),
    (
        ONE_GPU + "[server]\ncommand = ['/srv/serve', '{port}']\napi_keys_file = '/k'",
        ["server.api_keys_file: has no meaning with server.command; give it to that server in its own way"],
    ),
    (
        "[gpus]\n0 = 6093\n1 = 8080\n[nginx]\ntls_key = '/k'\nhttp_listen = '0.0.0.0:8080'\nrate_limit_burst = 5",
        [
            "nginx.tls_key: has no meaning without nginx.tls_certificate",
            "nginx.http_listen: has no meaning without nginx.tls_certificate: it sends everybody to TLS",
            "gpus.1: port 8080 is already used by nginx.http_listen, '0.0.0.0:8080'",
            "nginx.rate_limit_burst: has no meaning without nginx.rate_limit_per_minute",
        ],
    ),
    (
        ONE_GPU + "[nginx]\ntls_certificate = '/c'\ntls_key = '/k'\nhttp_listen = '127.0.0.1:6095'",
        ["nginx.http_listen: port 6095 is already used by nginx.listen, '127.0.0.1:6095'"],
    ),
    (
        ONE_GPU + "[nginx]\nacme_webroot = '/var/www/certbot'",
        ["nginx.acme_webroot: has no meaning without nginx.http_listen, where certbot's challenges come"],
    ),
    (
        ONE_GPU + "[nginx]\nserver_name = 'tts; listen 80'",
        [f"nginx.server_name: {HOST_NAME}, got 'tts; listen 80'"],
    ),
    # unknown keys, and the nearest known one
    (
        ONE_GPU + "[unit]\nstart_timout_s = 3",
        ["unit.start_timout_s: unknown key (did you mean 'unit.start_timeout_s'?)"],
    ),
    ("start_timout_s = 3\n" + ONE_GPU, ["start_timout_s: unknown key (did you mean 'unit.start_timeout_s'?)"]),
    (ONE_GPU + "[server]\nlisten = '127.0.0.1:80'", ["server.listen: unknown key (did you mean 'nginx.listen'?)"]),
    (ONE_GPU + "[zebra]\nx = 1", ["zebra: unknown key"]),
    # not TOML: where, and the line itself
    (
        "[gpus]\n0 = 6093\n1 6094\n",
        ["expected '=' after a key in a key/value pair (at line 3, column 3)\n    1 6094\n      ^"],
    ),
    ("[gpus]\n0 = 6093\n0 = 6094\n", ["cannot overwrite a value (at line 3, column 9)\n    0 = 6094\n            ^"]),
    (
        "[gpus]\n0 = 6093\n[monitoring]\nrules_file = '/r.yml'\nscrape_file = '/r.yml'\nscrape_key_file = '/k'\n"
        "textfile = '/t.txt'\ndashboard_file = '/d'\n",
        [
            "monitoring.scrape_file: '/r.yml' is already used by monitoring.rules_file",
            "monitoring.scrape_key_file: has no meaning without monitoring.scrape_file and server.api_keys_file",
            "monitoring.textfile: node_exporter reads files that end in .prom only, got '/t.txt'",
            "monitoring.dashboard_file: Grafana reads files that end in .json only, got '/d'",
        ],
    ),
    (
        "[gpus]\n0 = 6093\n[server]\napi_keys_file = '/k'\n[monitoring]\nscrape_file = '/s.yml'\n",
        ["monitoring.scrape_file: with server.api_keys_file Prometheus needs a key: give scrape_key_file"],
    ),
    (
        "[gpus]\n0 = 6093\n[server]\ncommand = ['/x', '{port}']\n[monitoring]\nscrape_file = '/s.yml'\n",
        ["monitoring.scrape_file: has no meaning with server.command; only our own server has /metrics"],
    ),
]


@pytest.mark.parametrize(("text", "said"), REJECTED)
def test_a_wrong_file_is_refused_with_the_key_the_value_and_the_way_out(text: str, said: list[str]) -> None:
    assert problems(text) == said


def test_every_problem_is_reported_at_once() -> None:
    assert problems("""
start_timout_s = 300
[gpus]
0 = 80
1 = "x"
2 = 6095
3 = 7000
4 = 7000
[server]
modle = "turbo"
""") == [
        "gpus.0: input should be greater than or equal to 1024, got 80",
        "gpus.1: input should be a valid integer, got 'x'",
        "server.modle: unknown key (did you mean 'server.model'?)",
        "start_timout_s: unknown key (did you mean 'unit.start_timeout_s'?)",
        "gpus.4: port 7000 is already used by gpus.3",
        "gpus.2: port 6095 is already used by nginx.listen, '127.0.0.1:6095'",
    ]


def test_the_message_counts_and_lists() -> None:
    with pytest.raises(FleetFileError) as caught:
        reading.load("[gpus]\n0 = 80\n1 = 'x'", source="fleet.toml")

    assert str(caught.value) == (
        "fleet.toml has 2 problems\n"
        "  gpus.0: input should be greater than or equal to 1024, got 80\n"
        "  gpus.1: input should be a valid integer, got 'x'"
    )


def test_a_public_address_is_accepted_with_keys_or_with_the_explicit_word() -> None:
    public = ONE_GPU + "[nginx]\nlisten = '0.0.0.0:80'\n"

    assert reading.load(public + "api_keys_file = '/etc/keys'", source="f").nginx.api_keys_file == "/etc/keys"
    assert (
        reading.load(public + "[server]\napi_keys_file = '/etc/keys'", source="f").server.api_keys_file == "/etc/keys"
    )
    assert reading.load(public + "allow_anonymous = true", source="f").nginx.allow_anonymous


def test_a_long_value_is_shortened_in_the_message() -> None:
    (said,) = problems(ONE_GPU + f"[server]\nmodel = '{'x' * 5000}'")

    assert len(said) < 200


@given(fleets.fleet_tables())
def test_any_valid_fleet_is_read_as_it_was_written(table: dict[str, Any]) -> None:
    loaded = reading.load(fleets.to_toml(table), source="fleet.toml")

    assert loaded.model_dump(exclude_unset=True) == table


@given(fleets.broken_tables())
def test_whatever_stands_in_the_file_the_answer_is_a_fleet_or_a_list_of_problems(table: dict[str, Any]) -> None:
    with suppress(FleetFileError):
        reading.load(fleets.to_toml(table), source="fleet.toml")


@given(st.text())
def test_any_text_is_a_fleet_or_a_list_of_problems(text: str) -> None:
    with suppress(FleetFileError):
        reading.load(text, source="fleet.toml")


def test_the_near_miss_knows_every_key_of_every_section() -> None:
    example = tomllib.loads(fleets.to_toml({"gpus": {}, "nginx": {}, "server": {}, "unit": {}}))

    assert set(example) <= set(tables.KNOWN_KEYS)
    assert {"nginx.listen", "server.engine", "unit.watchdog_s"} <= set(tables.KNOWN_KEYS)
