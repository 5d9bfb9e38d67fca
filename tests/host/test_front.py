"""The nginx front, by count: real nginx, instances that are real processes, real ``kill -9``.

``scripts/bench_front.py`` compares these settings with plainer ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import re
import signal
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from host import front_text
from host.front_lab import (
    HOST,
    NGINX,
    SPEECH,
    Front,
    Instances,
    Reply,
    ask,
    exchange,
    load,
    lost,
)
from support.ports import free_ports

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.nginx,
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed"),
]

MEGABYTE = 2**20


@contextlib.contextmanager
def fleet(
    directory: Path,
    count: int = 2,
    *,
    others: dict[str, str] | None = None,
    front: dict[str, Any] | None = None,
    **options: float | bool,
) -> Iterator[tuple[Instances, Front]]:
    """``count`` instances behind nginx; ``front`` goes to the template, ``options`` to each instance."""
    port, prefix = free_ports(1)[0], directory / "nginx"
    with Instances(directory, count, **options) as instances:
        text = front_text.render(instances.ports, port, prefix / "access.log", **(front or {}))
        with Front(prefix, text, port, others) as nginx:
            yield instances, nginx


async def until(happened: Callable[[], object]) -> None:
    """Wait for something that must happen."""
    async with asyncio.timeout(10):
        while not happened():
            await asyncio.sleep(0.01)


def in_background(coroutine: Coroutine[Any, Any, list[Reply]]) -> asyncio.Task[list[Reply]]:
    return asyncio.create_task(coroutine)


def is_busy(reply: Reply) -> bool:
    """Whether the client is told to come back, and when."""
    return error(reply) == (503, "unavailable") and reply.header("Retry-After") in {"7", "1"}


def error(reply: Reply) -> tuple[int, str]:
    """Status and code of an error in OpenAI's shape."""
    assert reply.header("Content-Type") == "application/json"
    said = reply.json()["error"]
    assert set(said) == {"message", "type", "param", "code"}
    return reply.status, said["code"]


# --- Judged by nginx, and a good neighbour ---------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 8, 16])
@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("keepalive_connections", [0, 8])
def test_nginx_has_nothing_to_say_about_our_file(
    tmp_path: Path, *, count: int, keys: bool, keepalive_connections: int
) -> None:
    keys_file = tmp_path / "keys.map"
    keys_file.write_text('"Bearer sesame" anna;\n')
    text = front_text.render(
        {f"gpu{number}": 6093 + number for number in range(count)},
        6080,
        tmp_path / "access.log",
        api_keys_file=keys_file if keys else None,
        keepalive_connections=keepalive_connections,
    )
    said = Front(tmp_path / "nginx", text, 6080).judge()

    assert (said.returncode, said.stdout, said.stderr) == (0, "", "")


def test_every_paragraph_gives_its_reason(tmp_path: Path) -> None:
    text = front_text.render({"gpu0": 6093}, 6095, tmp_path / "access.log", api_keys_file=tmp_path / "keys")

    assert [paragraph for paragraph in text.split("\n\n") if "#" not in paragraph] == []


def test_sites_beside_ours_work_as_before(tmp_path: Path) -> None:
    other_port = free_ports(1)[0]
    # nginx takes map_hash_bucket_size for a duplicate after any map, so a site after ours cannot have it.
    early = "map_hash_bucket_size 128;"
    other = f"""
        # Settings for all sites, which ours must neither repeat nor be broken by.
        proxy_buffers 8 16k;
        proxy_busy_buffers_size 16k;
        proxy_next_upstream off;
        proxy_intercept_errors on;
        proxy_read_timeout 1s;
        add_header X-Site other;
        log_format main '$remote_addr $other';
        map $http_x_request_id $other {{ default "map of the other site"; }}
        upstream other {{ server 127.0.0.1:{other_port}; }}
        server {{
            listen 127.0.0.1:{other_port};
            location / {{ return 200 "$other"; }}
            location /proxied {{ proxy_pass http://other/; }}
        }}
    """

    async def body() -> None:
        for name, text in {"a-site.conf": early + other, "z-site.conf": other}.items():
            (tmp_path / name).mkdir()
            with fleet(tmp_path / name, others={name: text}) as (_, front):
                assert front.judge().stderr == ""
                neighbour = await ask(other_port, "/proxied", method="GET")
                ours = await ask(front.port, f"{SPEECH}?seconds=1.2")
                assert (neighbour.body, neighbour.header("X-Site")) == (b"map of the other site", "other")
                assert (ours.good, ours.header("X-Site")) == (True, None)

    asyncio.run(body())


# --- Balance ---------------------------------------------------------------------------------------------------


def test_eight_requests_at_once_meet_eight_idle_instances(tmp_path: Path) -> None:
    """Needs the zone: without it each of nginx's workers would count alone."""

    async def body() -> None:
        with fleet(tmp_path, 8, speech_s=0.5) as (instances, front):
            for _ in range(3):
                assert lost(await load(front.port, 8, at_once=8)) == 0
            assert Counter(instances.events("handed")) == dict.fromkeys(instances.ports, 3)

    asyncio.run(body())


def test_nobody_waits_behind_a_long_utterance_while_another_instance_is_idle(tmp_path: Path) -> None:
    async def body() -> None:
        with fleet(tmp_path, 2) as (instances, front):
            long = asyncio.create_task(ask(front.port, f"{SPEECH}?seconds=20"))
            await until(lambda: instances.events("began"))
            (busy,) = instances.events("began")
            replies = await load(front.port, 20, at_once=1)
            assert busy not in [reply.json()["instance"] for reply in replies]
            long.cancel()

    asyncio.run(body())


def test_connections_to_instances_are_kept(tmp_path: Path) -> None:
    async def body() -> None:
        with fleet(tmp_path) as (instances, front):
            await load(front.port, 40, at_once=1)
            # At most one for each of two workers and two instances.
            assert len(instances.events("connected")) <= 4

    asyncio.run(body())


def test_connections_are_not_kept_to_a_server_that_may_close_them(tmp_path: Path) -> None:
    async def body() -> None:
        with fleet(tmp_path, front={"keepalive_connections": 0}) as (instances, front):
            await load(front.port, 40, at_once=1)
            assert len(instances.events("connected")) == 40

    asyncio.run(body())


# --- Nothing lost ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "dead"), [(2, 1), (4, 2), (8, 7)])
@pytest.mark.parametrize("method", ["POST", "GET"])
def test_dead_instances_lose_nothing(tmp_path: Path, *, count: int, dead: int, method: str) -> None:
    async def body() -> None:
        with fleet(tmp_path, count, speech_s=0.002) as (instances, front):
            for name in random.sample(list(instances.ports), dead):
                instances.kill(name)
            assert lost(await load(front.port, 200, method=method)) == 0

    asyncio.run(body())


def test_kill_9_under_load_loses_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        with fleet(tmp_path, 2, speech_s=0.01) as (instances, front):
            requests = in_background(load(front.port, 500, at_once=6))
            for number in range(6):
                await asyncio.sleep(0.3)
                await asyncio.to_thread(instances.kill, f"gpu{number % 2}")
                await asyncio.sleep(0.1)
                await asyncio.to_thread(instances.start, f"gpu{number % 2}")
            replies = await requests
            assert (len(replies), lost(replies)) == (500, 0)
            # It did hurt: some were handed over twice.
            assert len(instances.events("handed")) > 500

    asyncio.run(body())


def test_a_graceful_restart_loses_nothing_and_repeats_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        with fleet(tmp_path, 2, speech_s=0.01) as (instances, front):
            requests = in_background(load(front.port, 400, at_once=6))
            for number in range(6):
                await asyncio.sleep(0.25)
                await asyncio.to_thread(instances.kill, f"gpu{number % 2}", signal.SIGTERM)
                await asyncio.to_thread(instances.start, f"gpu{number % 2}")
            replies = await requests
            assert (len(replies), lost(replies)) == (400, 0)
            assert len(instances.events("began")) == 400

    asyncio.run(body())


def test_instances_that_come_back_are_asked_at_once(tmp_path: Path) -> None:
    """Though nginx leaves out for a second or two those that failed, which just now is everybody."""

    async def body() -> None:
        with fleet(tmp_path, 4, speech_s=0.01) as (instances, front):
            for _ in range(3):
                for name in instances.ports:
                    instances.kill(name)
                assert error(await ask(front.port)) == (502, "no_instance")
                instances.start("gpu1")
                instances.start("gpu2")
                assert lost(await load(front.port, 40, at_once=4)) == 0
                instances.revive()

    asyncio.run(body())


def test_what_a_hung_instance_held_is_answered_elsewhere_once_it_is_killed(tmp_path: Path) -> None:
    async def body() -> None:
        with fleet(tmp_path, 2, speech_s=0.01) as (instances, front):
            os.kill(instances.pids["gpu0"], signal.SIGSTOP)
            requests = in_background(load(front.port, 60, at_once=6))
            await asyncio.sleep(0.5)
            # What a watchdog would do.
            await asyncio.to_thread(instances.kill, "gpu0")
            assert lost(await requests) == 0

    asyncio.run(body())


def test_a_reload_under_load_loses_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        with fleet(tmp_path, 2, speech_s=0.005) as (_, front):
            requests = in_background(load(front.port, 400, at_once=6))
            for _ in range(4):
                await asyncio.sleep(0.2)
                await asyncio.to_thread(front.reload)
            assert lost(await requests) == 0

    asyncio.run(body())


def test_a_body_is_sent_again_unchanged(tmp_path: Path) -> None:
    bodies = [os.urandom(size) for size in (0, 1, 2_000, 10 * MEGABYTE, 10 * MEGABYTE, 5 * MEGABYTE)]
    chunked = [bodies[3][:MEGABYTE], bodies[3][MEGABYTE:]]

    async def body() -> None:
        with fleet(tmp_path, 2, speech_s=0.1) as (instances, front):
            requests = [asyncio.create_task(ask(front.port, body=sent)) for sent in bodies]
            requests.append(asyncio.create_task(ask(front.port, body=chunked)))
            await until(lambda: len(instances.events("handed")) == len(requests))
            victims = instances.events("handed").count("gpu0")
            await asyncio.to_thread(instances.kill, "gpu0")
            replies = await asyncio.gather(*requests)
            assert victims >= 2
            assert [(reply.status, reply.json()["sha256"]) for reply in replies] == [
                (200, hashlib.sha256(sent).hexdigest()) for sent in (*bodies, bodies[3])
            ]
            await until(lambda: len(instances.events("answered")) == len(requests))

    asyncio.run(body())


# --- Not too much patience -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "method"), [(1, "POST"), (2, "POST"), (4, "POST"), (8, "POST"), (4, "GET")])
def test_a_request_that_kills_is_handed_to_two_instances_at_most(tmp_path: Path, *, count: int, method: str) -> None:
    async def body() -> None:
        with fleet(tmp_path, count) as (instances, front):
            for number in range(20):
                instances.revive()
                # Everybody has a kept connection now: an error on one of those, nginx by itself does not count.
                await load(front.port, 2 * count, at_once=2 * count)
                name = f"poison-{number}"
                reply = await ask(front.port, f"{SPEECH}?poison", method=method, headers={"X-Request-Id": name})
                victims = instances.events("handed", name)
                assert (error(reply), len(victims)) == ((502, "no_instance"), min(count, 2))
                await asyncio.to_thread(instances.bury, victims)

    asyncio.run(body())


@pytest.mark.parametrize("count", [2, 4, 8])
def test_a_request_that_breaks_engines_meets_two_instances_at_most(tmp_path: Path, count: int) -> None:
    async def body() -> None:
        with fleet(tmp_path, count) as (instances, front):
            for number in range(10):
                instances.revive()
                name = f"broken-{number}"
                reply = await ask(front.port, f"{SPEECH}?broken", headers={"X-Request-Id": name})
                victims = instances.events("handed", name)
                assert (error(reply), len(victims), len(set(victims))) == ((502, "no_instance"), 2, 2)
                await asyncio.to_thread(instances.bury, victims)

    asyncio.run(body())


def test_a_lone_instance_whose_engine_broke_is_a_fleet_that_cannot_take_the_request_now(tmp_path: Path) -> None:
    async def body() -> None:
        with fleet(tmp_path, 1) as (_, front):
            assert is_busy(await ask(front.port, f"{SPEECH}?broken"))

    asyncio.run(body())


def test_what_waits_where_an_engine_breaks_is_spoken_elsewhere(tmp_path: Path) -> None:
    async def body() -> None:
        with fleet(tmp_path, 4, speech_s=0.02) as (instances, front):
            killer = asyncio.create_task(
                ask(front.port, f"{SPEECH}?broken&seconds=0.3", headers={"X-Request-Id": "killer"})
            )
            await until(lambda: instances.events("began", "killer"))
            # Some wait behind it at the first, some at the second; some at both, and those are not the killer.
            replies = await load(front.port, 200, at_once=40)
            assert error(await killer) == (502, "no_instance")
            assert len(instances.events("handed", "killer")) == 2
            assert lost(replies) == 0
            # It did hurt: some were handed over again.
            assert len(instances.events("handed")) > 202
            await until(lambda: len(instances.events("answered")) == 200)

    asyncio.run(body())


def test_full_instances_on_its_way_do_not_buy_a_request_that_kills_a_third(tmp_path: Path) -> None:

    async def body() -> None:
        with fleet(tmp_path, 4, queue=0) as (instances, front):
            for number in range(10):
                instances.revive()
                full = asyncio.create_task(ask(instances.ports["gpu0"], f"{SPEECH}?seconds=20"))
                began = number + 1
                await until(lambda expected=began: instances.events("began").count("gpu0") == expected)  # type: ignore[misc]
                name = f"poison-{number}"
                await ask(front.port, f"{SPEECH}?poison", headers={"X-Request-Id": name})
                victims = instances.events("handed", name)
                assert len(victims) == 2
                await asyncio.to_thread(instances.bury, victims)
                full.cancel()
                await asyncio.to_thread(instances.kill, "gpu0")

    asyncio.run(body())


def test_an_instance_that_does_not_answer_in_time_is_not_followed_by_another(tmp_path: Path) -> None:
    async def body() -> None:
        with fleet(tmp_path, 2, front={"read_timeout_s": 1}) as (instances, front):
            reply = await ask(front.port, f"{SPEECH}?seconds=20")
            assert error(reply) == (504, "timeout")
            assert len(instances.events("handed")) == 1
            # Nor is anybody left out after that: both serve at once.
            await load(front.port, 8, at_once=8, target=f"{SPEECH}?seconds=0.1")

    asyncio.run(body())


def test_a_stream_that_breaks_is_neither_repeated_nor_taken_for_whole(tmp_path: Path) -> None:
    async def body() -> None:
        with fleet(tmp_path) as (instances, front):
            reply = await ask(front.port, f"{SPEECH}?stream=3&pause=0.05&die")
            assert (reply.status, reply.body, reply.whole) == (200, b"hello", False)
            assert len(instances.events("handed")) == 1

    asyncio.run(body())


# --- Busy is not broken ----------------------------------------------------------------------------------------


def test_a_full_fleet_says_when_to_come_back(tmp_path: Path) -> None:
    async def body() -> None:
        with fleet(tmp_path, 2, queue=1, speech_s=0.3) as (instances, front):
            replies = await load(front.port, 60, at_once=60)
            accepted = len(instances.events("handed"))
            assert Counter(reply.good for reply in replies) == {True: accepted, False: 60 - accepted}
            assert accepted >= 4
            # Nobody is dead, so that the last one that was asked has told when to come back.
            assert all(reply.good or (is_busy(reply) and reply.header("Retry-After") == "7") for reply in replies)

    asyncio.run(body())


def test_a_full_fleet_with_a_dead_instance_still_says_that_it_is_full(tmp_path: Path) -> None:
    async def body() -> None:
        with fleet(tmp_path, 4, queue=1, speech_s=0.3) as (instances, front):
            instances.kill("gpu2")
            replies = await load(front.port, 60, at_once=60)
            assert Counter(
                "good" if reply.good else "busy" if is_busy(reply) else reply.status for reply in replies
            ) == {
                "good": len(instances.events("handed")),
                "busy": 60 - len(instances.events("handed")),
            }

    asyncio.run(body())


def test_a_busy_instance_is_never_left_out(tmp_path: Path) -> None:
    async def body() -> None:
        with fleet(tmp_path, 2, queue=0, speech_s=0.2) as (instances, front):
            for _ in range(5):
                before = len(instances.events("busy"))
                replies = await load(front.port, 20, at_once=20)
                assert len(instances.events("busy")) > before
                assert all(reply.good or is_busy(reply) for reply in replies)
                # The moment they are idle, both take one each.
                taken = len(instances.events("handed"))
                assert lost(await load(front.port, 2, at_once=2)) == 0
                assert set(instances.events("handed")[taken:]) == {"gpu0", "gpu1"}

    asyncio.run(body())


def test_a_request_finds_the_room_there_is(tmp_path: Path) -> None:
    """One instance is full of work that nginx does not know: a client went there directly."""

    async def body() -> None:
        with fleet(tmp_path, 4, queue=3, speech_s=0.02) as (instances, front):
            direct = [asyncio.create_task(ask(instances.ports["gpu0"], f"{SPEECH}?seconds=20")) for _ in range(4)]
            await until(lambda: instances.events("handed").count("gpu0") == 4)
            assert lost(await load(front.port, 60, at_once=5)) == 0
            assert "gpu0" in instances.events("busy")
            for one in direct:
                one.cancel()

    asyncio.run(body())


def test_a_request_finds_the_room_there_is_past_a_dead_instance(tmp_path: Path) -> None:
    """gpu0 and gpu2 are full, gpu1 is dead, gpu3 has room: yet it looks worst to nginx, who knows only its request."""

    async def body() -> None:
        with fleet(tmp_path, 4, queue=3) as (instances, front):
            for name in ("gpu0", "gpu1", "gpu2"):
                instances.kill(name)
            held = [asyncio.create_task(ask(front.port, f"{SPEECH}?seconds=20&aside"))]
            await until(lambda: instances.events("began") == ["gpu3"])
            for name in ("gpu0", "gpu2"):
                instances.start(name)
                direct = instances.ports[name]
                held += [asyncio.create_task(ask(direct, f"{SPEECH}?seconds=20")) for _ in range(4)]
            await until(lambda: len(instances.events("handed")) == 9)
            # Until nginx would ask them again.
            await asyncio.sleep(2.1)
            replies = await load(front.port, 20, at_once=1)
            assert [reply.header("X-Instance") for reply in replies if reply.good] == ["gpu3"] * 20
            for one in held:
                one.cancel()

    asyncio.run(body())


def test_a_request_finds_the_room_there_is_after_a_reload_forgot_the_counts(tmp_path: Path) -> None:
    async def body() -> None:
        with fleet(tmp_path, 2, queue=1) as (instances, front):
            # Fill one instance through nginx, while the other is away.
            instances.kill("gpu1")
            held = [asyncio.create_task(ask(front.port, f"{SPEECH}?seconds=1")) for _ in range(2)]
            await until(lambda: len(instances.events("handed")) == 2)
            instances.start("gpu1")
            await asyncio.to_thread(front.reload)
            assert lost(await load(front.port, 30, at_once=2)) == 0
            assert lost(await asyncio.gather(*held)) == 0

    asyncio.run(body())


# --- Buffers, in both directions -------------------------------------------------------------------------------


def test_a_slow_uploader_holds_no_instance(tmp_path: Path) -> None:
    async def body() -> None:
        with fleet(tmp_path, 1, queue=0) as (instances, front):
            slow = asyncio.create_task(ask(front.port, body=[b"x" * 100_000] * 5, chunk_pause_s=0.1))
            await asyncio.sleep(0.2)
            assert instances.events("connected") == []
            assert (await ask(front.port)).good
            assert (await slow).json()["bytes"] == 500_000

    asyncio.run(body())


def test_a_slow_reader_holds_no_instance(tmp_path: Path) -> None:
    # More than the kernel would hold between the instance and the reader.
    size = 48 * MEGABYTE

    async def body() -> None:
        with fleet(tmp_path, 1, queue=0) as (instances, front):
            reader, writer = await asyncio.open_connection(HOST, front.port)
            writer.write(f"POST {SPEECH}?bytes={size} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
            await reader.readuntil(b"\r\n\r\n")
            await until(lambda: instances.events("answered"))
            assert (await ask(front.port)).good
            assert len(await reader.read()) > size
            writer.close()
            await writer.wait_closed()

    asyncio.run(body())


def test_a_stream_is_passed_on_as_it_comes(tmp_path: Path) -> None:
    async def body() -> None:
        with fleet(tmp_path) as (instances, front):
            reader, writer = await asyncio.open_connection(HOST, front.port)
            writer.write(f"POST {SPEECH}?stream=4&pause=0.2 HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
            await reader.readuntil(b"hello\r\n")
            assert instances.events("answered") == []
            await reader.readuntil(b"0\r\n\r\n")
            writer.close()
            await writer.wait_closed()

    asyncio.run(body())


def test_an_instance_may_ask_for_no_buffer(tmp_path: Path) -> None:
    size = 48 * MEGABYTE

    async def body() -> None:
        with fleet(tmp_path, 1) as (instances, front):
            reader, writer = await asyncio.open_connection(HOST, front.port)
            writer.write(
                f"POST {SPEECH}?unbuffered&bytes={size} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode()
            )
            head = await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(0.5)
            # More than fits between the two, and nobody reads.
            assert instances.events("answered") == []
            assert b"x-accel-buffering" not in head.lower()
            assert len(await reader.read()) > size
            await until(lambda: instances.events("answered"))
            writer.close()
            await writer.wait_closed()

    asyncio.run(body())


def test_an_instance_learns_that_its_client_hung_up(tmp_path: Path) -> None:
    async def body() -> None:
        with fleet(tmp_path) as (instances, front):
            leaver = asyncio.create_task(ask(front.port, f"{SPEECH}?seconds=20", headers={"X-Request-Id": "leaver"}))
            await until(lambda: instances.events("began", "leaver"))
            leaver.cancel()
            await until(lambda: instances.events("gone", "leaver"))
            # Nobody else is asked to speak to a client that is gone.
            assert len(instances.events("handed")) == 1
            assert (await asyncio.to_thread(front.log, 1))[0]["status"] == 499

    asyncio.run(body())


# --- Who asked, who answered -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["a", "Z-0_9.", "x" * 128])
def test_a_request_id_goes_in_and_comes_out(tmp_path: Path, wanted: str) -> None:
    async def body() -> None:
        with fleet(tmp_path) as (_, front):
            reply = await ask(front.port, headers={"X-Request-Id": wanted})
            assert reply.all("X-Request-Id") == [wanted]
            assert reply.json()["headers"]["x-request-id"] == wanted
            assert (await asyncio.to_thread(front.log, 1))[0]["request_id"] == wanted

    asyncio.run(body())


@pytest.mark.parametrize("unwanted", [None, "", "x" * 129, "a b", 'a"b', "a\\b", "a;b", "ä", "a\tb", "$host"])
def test_any_other_request_id_is_replaced(tmp_path: Path, unwanted: str | None) -> None:
    async def body() -> None:
        with fleet(tmp_path) as (_, front):
            reply = await ask(front.port, headers={} if unwanted is None else {"X-Request-Id": unwanted})
            (fresh,) = reply.all("X-Request-Id")
            assert re.fullmatch("[0-9a-f]{32}", fresh)
            assert reply.json()["headers"]["x-request-id"] == fresh

    asyncio.run(body())


def test_an_instance_learns_how_long_the_request_waited_elsewhere(tmp_path: Path) -> None:
    async def body() -> None:
        with fleet(tmp_path, 2, speech_s=0.1) as (instances, front):
            at_once = await ask(front.port, headers={"X-Waited": "99"})
            assert at_once.json()["headers"]["x-waited"] == "0"
            later = asyncio.create_task(ask(front.port, f"{SPEECH}?seconds=0.5", headers={"X-Request-Id": "later"}))
            await until(lambda: instances.events("began", "later"))
            await asyncio.sleep(0.2)
            await asyncio.to_thread(instances.kill, instances.events("began", "later")[0])
            assert 0.2 <= float((await later).json()["headers"]["x-waited"]) < 60

    asyncio.run(body())


@pytest.mark.parametrize("keys", [False, True])
def test_an_instance_learns_whose_request_it_is_and_nobody_can_pose_as_another(tmp_path: Path, *, keys: bool) -> None:
    keys_file = tmp_path / "keys.map"
    keys_file.write_text('"~^Bearer sesame$" anna;\n')

    async def body() -> None:
        with fleet(tmp_path, front={"api_keys_file": keys_file} if keys else None) as (instances, front):
            for name in (None, "gpu0"):
                # The second time some come by another pass.
                if name is not None:
                    instances.kill(name)
                for forged in ("X-Client", "x-client", "X_Client"):
                    reply = await ask(front.port, headers={forged: "bob", "Authorization": "Bearer sesame"})
                    said = reply.json()["headers"]
                    assert said["x-client"] == ("anna" if keys else HOST)
                    assert "bob" not in said.values()

    asyncio.run(body())


@pytest.mark.parametrize("foreign", [False, True])
def test_exactly_one_header_names_the_instance_that_answered(tmp_path: Path, *, foreign: bool) -> None:
    async def body() -> None:
        with fleet(tmp_path, 2, foreign=foreign) as (instances, front):
            instances.kill("gpu0")
            replies = await load(front.port, 10)
            instances.start("gpu0")
            # Long enough for both to be asked.
            replies += await load(front.port, 20, at_once=4, target=f"{SPEECH}?seconds=0.15")
            named = [reply.all("X-Instance") for reply in replies]
            assert named == [[reply.json()["instance"]] for reply in replies]
            assert {name for names in named for name in names} == {"gpu0", "gpu1"}

    asyncio.run(body())


def test_the_log_tells_the_story_of_a_request(tmp_path: Path) -> None:
    async def body() -> None:
        with fleet(tmp_path) as (instances, front):
            instances.kill("gpu0")
            # Either worker of nginx may come first; the one that is dead is met once.
            for _ in range(4):
                await ask(front.port, SPEECH + '?a="b\\é', headers={"X-Request-Id": "story"})
            await ask(front.port, "/healthz", method="GET")
            rows = await asyncio.to_thread(front.log, 4)
            assert len(rows) == 4
            retried = next(row for row in rows if " : " in row["tries"])
            time, address = retried.pop("time"), retried.pop("address")
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", time)
            assert address == HOST
            assert retried.pop("bytes") > 100
            assert 0 <= retried.pop("duration_s") < 60
            assert re.fullmatch(r"\d+\.\d+ : \d+\.\d+", retried.pop("tried_s"))
            assert retried == {
                "request_id": "story",
                "client": "",
                "method": "POST",
                "uri": SPEECH + '?a="b\\é',
                "status": 200,
                "instance": "gpu1",
                "queue_wait_s": 0.25,
                "tries": "502 : 200",
                "tried": f"{HOST}:{instances.ports['gpu0']} : {HOST}:{instances.ports['gpu1']}",
            }

    asyncio.run(body())


def test_what_is_unknown_is_null_in_the_log(tmp_path: Path) -> None:
    async def body() -> None:
        with fleet(tmp_path) as (instances, front):
            instances.kill("gpu0")
            instances.kill("gpu1")
            await ask(front.port)
            (row,) = await asyncio.to_thread(front.log, 1)
            assert (row["status"], row["queue_wait_s"], row["client"]) == (502, None, "")

    asyncio.run(body())


# --- What nginx says by itself ---------------------------------------------------------------------------------


def test_the_front_is_healthy_even_when_no_instance_is(tmp_path: Path) -> None:
    async def body() -> None:
        with fleet(tmp_path) as (instances, front):
            for name in instances.ports:
                instances.kill(name)
            reply = await ask(front.port, "/healthz", method="GET")
            assert (reply.status, reply.json()) == (200, {"status": "ok"})
            assert error(await ask(front.port)) == (502, "no_instance")
            # With nobody there, no more is tried than there is.
            assert instances.events("handed") == []

    asyncio.run(body())


def test_a_client_without_a_known_key_is_turned_away(tmp_path: Path) -> None:
    long_key = "sk-" + "x1Y2" * 30
    keys = tmp_path / "keys.map"
    keys.write_text(f'"Bearer sesame" anna;\n"~^Bearer {long_key}$" bob;\n')

    async def body() -> None:
        with fleet(tmp_path, front={"api_keys_file": keys}) as (instances, front):
            given: dict[str | None, int] = {
                None: 401,
                "": 401,
                "sesame": 401,
                "Bearer": 401,
                "Bearer ": 401,
                "Bearer wrong": 401,
                "Bearer sesame2": 401,
                f"Bearer {long_key.lower()}": 401,
                "Bearer sesame": 200,
                f"Bearer {long_key}": 200,
            }
            for value, status in given.items():
                reply = await ask(front.port, headers={} if value is None else {"Authorization": value})
                assert (value, reply.status) == (value, status)
                if status == 401:
                    assert error(reply) == (401, "invalid_api_key")
                    assert reply.header("WWW-Authenticate") == "Bearer"
                    assert len(reply.all("X-Request-Id")) == 1
                else:
                    # The key ends here.
                    assert "authorization" not in reply.json()["headers"]
            assert len(instances.events("handed")) == 2
            assert (await ask(front.port, "/healthz", method="GET")).status == 200
            rows = await asyncio.to_thread(front.log, len(given))
            assert [row["client"] for row in rows] == [""] * 8 + ["anna", "bob"]

    asyncio.run(body())


def test_without_keys_the_authorization_reaches_the_server(tmp_path: Path) -> None:
    async def body() -> None:
        with fleet(tmp_path) as (_, front):
            reply = await ask(front.port, headers={"Authorization": "Bearer theirs"})
            assert reply.json()["headers"]["authorization"] == "Bearer theirs"

    asyncio.run(body())


def test_metrics_are_each_instances_own(tmp_path: Path) -> None:
    async def body() -> None:
        with fleet(tmp_path) as (instances, front):
            assert error(await ask(front.port, "/metrics", method="GET")) == (404, "not_found")
            assert error(await ask(front.port, "/metrics?x", method="POST")) == (404, "not_found")
            assert instances.events("handed") == []

    asyncio.run(body())


@pytest.mark.parametrize("chunked", [False, True])
def test_an_upload_beyond_the_limit_is_refused(tmp_path: Path, *, chunked: bool) -> None:
    async def body() -> None:
        with fleet(tmp_path, front={"max_upload_mb": 1}) as (instances, front):
            allowed, refused = b"x" * MEGABYTE, b"x" * (MEGABYTE + 1)
            assert (await ask(front.port, body=[allowed] if chunked else allowed)).good
            reply = await ask(front.port, body=[refused] if chunked else refused)
            assert error(reply) == (413, "request_too_large")
            assert len(instances.events("handed")) == 1

    asyncio.run(body())


@pytest.mark.parametrize("status", [400, 401, 404, 422, 429, 500, 501])
def test_errors_of_an_instance_reach_the_client_as_they_are(tmp_path: Path, status: int) -> None:
    async def body() -> None:
        with fleet(tmp_path) as (_, front):
            reply = await ask(front.port, f"{SPEECH}?status={status}")
            assert reply.status == status
            assert reply.json()["instance"] == reply.header("X-Instance")

    asyncio.run(body())


# --- Everything else -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_any_path_reaches_an_instance_untouched(tmp_path: Path, method: str) -> None:
    target = "/v1/voices/a%2Fb//c?x=%22&y=+&z"

    async def body() -> None:
        with fleet(tmp_path) as (instances, front):
            for name in (None, "gpu0"):
                # The second time some come by another pass.
                if name is not None:
                    instances.kill(name)
                for _ in range(4):
                    said = (await ask(front.port, target, method=method, headers={"Host": "who.example:81"})).json()
                    assert (said["method"], said["target"]) == (method, target)
                    assert said["headers"]["host"] == "who.example:81"
                    assert said["headers"]["x-forwarded-for"] == HOST
                    assert said["headers"]["x-forwarded-proto"] == "http"
                    assert "connection" not in said["headers"]

    asyncio.run(body())


def test_nobody_learns_the_version_of_nginx(tmp_path: Path) -> None:
    async def body() -> None:
        with fleet(tmp_path) as (_, front):
            for target in (SPEECH, "/healthz"):
                assert (await ask(front.port, target)).header("Server") == "nginx"

    asyncio.run(body())


def test_nothing_is_compressed(tmp_path: Path) -> None:
    async def body() -> None:
        with fleet(tmp_path) as (_, front):
            reply = await ask(front.port, headers={"Accept-Encoding": "gzip"})
            assert reply.header("Content-Encoding") is None
            assert int(reply.header("Content-Length") or 0) == len(reply.body)

    asyncio.run(body())


def test_a_client_connection_serves_one_request(tmp_path: Path) -> None:
    """So that a reload, which closes idle connections, never meets one that is about to be used again."""

    async def body() -> None:
        with fleet(tmp_path) as (_, front):
            reader, writer = await asyncio.open_connection(HOST, front.port)
            reply = await exchange(reader, writer)
            assert (reply.good, reply.header("Connection")) == (True, "close")
            assert await reader.read() == b""
            writer.close()
            await writer.wait_closed()

    asyncio.run(body())
