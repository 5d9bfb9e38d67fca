"""Who comes in by which door (TLS, names, pace, one instance by itself), and who is asked while a fleet changes."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_deploy.fleet import Upstream
from host import front_text
from host.front_lab import HOST, NGINX, SPEECH, Front, Instances, Reply, ask, load, lost
from support import certificates
from support.ports import free_ports

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.nginx,
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed"),
]


@contextlib.contextmanager
def fleet(
    directory: Path,
    count: int = 2,
    *,
    drained: tuple[str, ...] = (),
    leaving: tuple[str, ...] = (),
    others: dict[str, str] | None = None,
    **front: Any,
) -> Iterator[tuple[Instances, Front]]:
    """``count`` instances behind nginx; ``front`` goes to the template."""
    port, prefix = free_ports(1)[0], directory / "nginx"
    with Instances(directory, count) as instances:
        upstreams = [
            Upstream(name, HOST, own, drained=name in drained, leaving=name in leaving)
            for name, own in instances.ports.items()
        ]
        text = front_text.render(instances.ports, port, prefix / "access.log", upstreams=upstreams, **front)
        with Front(prefix, text, port, others) as nginx:
            yield instances, nginx


def asked(port: int, target: str = SPEECH, **how: Any) -> Reply:
    return asyncio.run(ask(port, target, **how))


def error(reply: Reply) -> tuple[int, str]:
    return reply.status, reply.json()["error"]["code"]


def curl(*words: str) -> list[str]:
    """What curl prints, by line."""
    return subprocess.run(["curl", "-sS", *words], capture_output=True, text=True, check=True).stdout.splitlines()


def by(how: str, name: str) -> dict[str, Any]:
    return {how: (name,)}


# While a fleet changes


@pytest.mark.parametrize("how", ["drained", "leaving"])
def test_who_is_drained_or_leaving_gets_no_request(tmp_path: Path, how: str) -> None:
    with fleet(tmp_path, 3, **by(how, "gpu1")) as (instances, front):
        replies = asyncio.run(load(front.port, 60))

        assert lost(replies) == 0
        assert {reply.header("X-Instance") for reply in replies} == {"gpu0", "gpu2"}
        assert instances.events("handed") != []


def test_who_is_leaving_is_asked_when_all_others_are_gone_and_who_is_drained_is_not(tmp_path: Path) -> None:
    with fleet(tmp_path, 3, drained=("gpu0",), leaving=("gpu1",)) as (instances, front):
        instances.kill("gpu2")
        assert asked(front.port).header("X-Instance") == "gpu1"

        instances.kill("gpu1")
        assert error(asked(front.port)) == (502, "no_instance")


@pytest.mark.parametrize("how", [{"drained": ("gpu0", "gpu1")}, {"leaving": ("gpu0",), "drained": ("gpu1",)}])
def test_while_nobody_is_in_service_the_answer_is_busy_and_come_back(tmp_path: Path, how: dict[str, Any]) -> None:
    with fleet(tmp_path, 2, **how) as (_, front):
        reply = asked(front.port)

        assert error(reply) == (503, "unavailable")
        assert reply.header("Retry-After") == "10"


# One instance by itself


def test_each_instance_has_a_door_of_its_own_that_leads_nowhere_else(tmp_path: Path) -> None:
    with fleet(tmp_path, 2, drained=("gpu1",), direct_routes=True) as (instances, front):
        assert {asked(front.port, f"/gpu0{SPEECH}").header("X-Instance") for _ in range(5)} == {"gpu0"}
        assert asked(front.port, f"/gpu1{SPEECH}").header("X-Instance") == "gpu1"

        instances.kill("gpu1")
        assert error(asked(front.port, f"/gpu1{SPEECH}")) == (502, "no_instance")
        assert instances.events("handed")[-1] == "gpu1"


def test_without_direct_routes_there_is_no_such_door(tmp_path: Path) -> None:
    with fleet(tmp_path, 2) as (instances, front):
        asked(front.port, f"/gpu0{SPEECH}", headers={"X-Request-Id": "r1"})

        assert len(instances.events("handed", "r1")) <= 1
        assert front.log(1)[0]["uri"] == f"/gpu0{SPEECH}"


def test_the_door_of_one_instance_wants_the_key_too(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text('"~^Bearer good$" ada;\n')
    with fleet(tmp_path, 2, direct_routes=True, api_keys_file=keys) as (_, front):
        assert error(asked(front.port, f"/gpu0{SPEECH}")) == (401, "invalid_api_key")
        assert asked(front.port, f"/gpu0{SPEECH}", headers={"Authorization": "Bearer good"}).status == 200


# Pace


def test_a_client_beyond_its_pace_is_told_when_to_come_back_and_others_are_not_held_up(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text('"~^Bearer one$" ada;\n"~^Bearer two$" bob;\n')
    pace: dict[str, Any] = {"rate_limit_per_minute": 1, "rate_limit_burst": 2, "rate_limit_retry_s": 60}
    with fleet(tmp_path, 2, api_keys_file=keys, **pace) as (_, front):
        ada, bob = {"Authorization": "Bearer one"}, {"Authorization": "Bearer two"}
        replies = [asked(front.port, headers=ada) for _ in range(4)]

        assert [reply.status for reply in replies] == [200, 200, 200, 429]
        assert error(replies[-1]) == (429, "rate_limit_exceeded")
        assert replies[-1].header("Retry-After") == "60"
        assert asked(front.port, headers=bob).status == 200
        # To look costs nothing.
        assert asked(front.port, "/v1/models", method="GET", body=b"", headers=ada).status != 429


def test_without_keys_the_pace_goes_by_address(tmp_path: Path) -> None:
    with fleet(tmp_path, 2, rate_limit_per_minute=1, rate_limit_retry_s=60) as (_, front):
        assert [asked(front.port).status for _ in range(2)] == [200, 429]


def test_a_request_is_counted_once_however_many_instances_it_meets(tmp_path: Path) -> None:
    with fleet(tmp_path, 4, rate_limit_per_minute=1, rate_limit_burst=1, rate_limit_retry_s=60) as (instances, front):
        for name in ("gpu0", "gpu1", "gpu2"):
            instances.kill(name)

        assert [asked(front.port).status for _ in range(3)] == [200, 200, 429]


# TLS, names and other sites


def test_tls_speaks_and_plain_http_sends_everybody_there_but_certbot(tmp_path: Path) -> None:
    certificate, key, webroot = tmp_path / "c.pem", tmp_path / "k.pem", tmp_path / "webroot"
    certificates.self_signed(certificate, key, "tts.example.com")
    challenge = webroot / ".well-known/acme-challenge"
    challenge.mkdir(parents=True)
    for place in (tmp_path, *reversed(tmp_path.parents[:-2])):
        place.chmod(0o755)
    (challenge / "token").write_text("answer")
    plain = free_ports(1)[0]
    tls: dict[str, Any] = {
        "tls_certificate": str(certificate),
        "tls_key": str(key),
        "server_name": "tts.example.com",
        "http_listen": f"{HOST}:{plain}",
        "https_address": "https://$host:8443",
        "acme_webroot": str(webroot),
    }
    with fleet(tmp_path, 2, **tls) as (_, front):
        here = ("--resolve", f"tts.example.com:{front.port}:{HOST}", "--cacert", str(certificate))
        quiet = ("-o", "/dev/null", "-d", "hello", "-w")
        spoke = curl(*here, *quiet, "%{http_code} %{scheme}", f"https://tts.example.com:{front.port}{SPEECH}")
        assert spoke == ["200 HTTPS"]

        name, there = ("-H", "Host: tts.example.com"), f"http://{HOST}:{plain}"
        sent = curl(*name, *quiet, "%{http_code} %{redirect_url}", f"{there}{SPEECH}?a=1")
        assert sent == [f"308 https://tts.example.com:8443{SPEECH}?a=1"]
        assert curl(*name, f"{there}/.well-known/acme-challenge/token") == ["answer"]


def test_other_sites_of_the_same_nginx_stay_as_they_are(tmp_path: Path) -> None:
    shared, own = free_ports(2)
    site = 'server {{ listen {host}:{port} default_server; server_name {name}; return 200 "{name}\\n"; }}\n'
    others = {
        # Beside ours on the same address; and elsewhere.
        "a.conf": site.format(host=HOST, port=shared, name="blog.example.com"),
        "b.conf": site.format(host=HOST, port=own, name="intra.example.com"),
    }
    with Instances(tmp_path, 1) as instances:
        text = front_text.render(
            instances.ports, shared, tmp_path / "access.log", server_name="tts.example.com", rate_limit_per_minute=600
        )
        with Front(tmp_path / "nginx", text, shared, others):
            answers = {
                name: curl("-H", f"Host: {name}", f"http://{HOST}:{port}/healthz")
                for name, port in [
                    ("tts.example.com", shared),
                    ("blog.example.com", shared),
                    ("intra.example.com", own),
                ]
            }

    assert answers == {
        "tts.example.com": ['{"status":"ok"}'],
        "blog.example.com": ["blog.example.com"],
        "intra.example.com": ["intra.example.com"],
    }
