"""Compare retry settings of the nginx front by what they lose: `python scripts/bench_front.py`.

Every row is one set of settings, every column one thing that happens to a fleet; real nginx, real processes,
real `kill -9`. The last row is the file we ship. Runs about three minutes; prints a Markdown table.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from host import front_lab, front_text
from host.front_lab import SPEECH, Front, Instances, ask, load, lost
from support.ports import free_ports

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

PLAIN = """
upstream plain {{
    zone plain 64k;
    least_conn;
    {servers}
    keepalive 8;
}}
{more}
server {{
    listen 127.0.0.1:{port};
    access_log off;
    client_max_body_size 50m;
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_set_header X-Request-Id $http_x_request_id;
    proxy_read_timeout 60s;
    recursive_error_pages on;
    {locations}
}}
"""

ONE = "location / {{ proxy_pass http://plain; proxy_next_upstream {listed}; proxy_next_upstream_tries {tries}; }}"

# The idea without a second upstream: one try a pass, two instances handed the request at most, a busy one too.
LOOP_MAP = r"""
map "$upstream_bytes_sent" $plain_next {
    volatile;
    "~([^:]* : ){9}" @gave_up;
    "~[1-9][0-9]* : (.* )?[1-9]" @gave_up;
    default @again;
}
"""
LOOP = """
    proxy_next_upstream off;
    location / { proxy_pass http://plain; proxy_intercept_errors on; error_page 502 503 = $plain_next; }
    location @again { proxy_pass http://plain; error_page 502 = $plain_next; }
    location @gave_up { return 502 "gave up"; }
"""

# A pass for each death: refused connections are free for POST, since nginx knows that nothing was sent.
PASSES = """
    proxy_next_upstream error timeout;
    location / { proxy_pass http://plain; proxy_intercept_errors on; error_page 502 503 = @again; }
    location @again { proxy_pass http://plain; }
"""

VARIANTS: dict[str, tuple[str, str, str]] = {
    "nginx's defaults": ("", "", ONE.format(listed="error timeout", tries=0)),
    "`non_idempotent`, tries 2, `max_fails=0`": (
        "max_fails=0",
        "",
        ONE.format(listed="error timeout non_idempotent", tries=2),
    ),
    "`non_idempotent`, tries 2, `1/2s`": (
        "max_fails=1 fail_timeout=2s",
        "",
        ONE.format(listed="error timeout non_idempotent", tries=2),
    ),
    "… and `http_503`": (
        "max_fails=1 fail_timeout=2s",
        "",
        ONE.format(listed="error timeout http_503 non_idempotent", tries=2),
    ),
    "`http_503`, tries 2, `max_fails=0`": (
        "max_fails=0",
        "",
        ONE.format(listed="error timeout http_503 non_idempotent", tries=2),
    ),
    "`http_503`, any tries, `max_fails=0`": (
        "max_fails=0",
        "",
        ONE.format(listed="error timeout http_503 non_idempotent", tries=0),
    ),
    "two passes, `error`, `max_fails=0`": ("max_fails=0", "", PASSES),
    "passes of one try, one upstream": ("max_fails=1 fail_timeout=2s", LOOP_MAP, LOOP),
}


def text(variant: str | None, instances: Instances, port: int, directory: Path) -> str:
    """nginx's file for ``variant``; ``None`` is ours."""
    if variant is None:
        return front_text.render(instances.ports, port, directory / "access.log")
    parameters, more, locations = VARIANTS[variant]
    servers = " ".join(f"server 127.0.0.1:{port} {parameters};" for port in instances.ports.values())
    return PLAIN.format(servers=servers, more=more, port=port, locations=locations)


@contextmanager
def fleet(variant: str | None, count: int, **options: float | bool) -> Iterator[tuple[Instances, Front]]:
    """``count`` instances behind nginx."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        port = free_ports(1)[0]
        with Instances(directory, count, **options) as instances:
            nginx = directory / "nginx"
            with Front(nginx, text(variant, instances, port, nginx), port) as front:
                yield instances, front


async def dead(variant: str | None, count: int, dead_ones: int) -> str:
    """200 POSTs while some instances are dead: lost."""
    with fleet(variant, count, speech_s=0.005) as (instances, front):
        for name in list(instances.ports)[:dead_ones]:
            instances.kill(name)
        return str(lost(await load(front.port, 200)))


async def killed(variant: str | None, every_s: float, down_s: float) -> str:
    """40 POSTs a second to two instances, one after the other killed and started again: lost of how many.

    One that died in the hands of both is lost by design: it might have been the killer.
    """
    with fleet(variant, 2, speech_s=0.03) as (instances, front):
        requests = asyncio.create_task(steady(front.port, count=int(8 * every_s * 40)))
        for number in range(8):
            await asyncio.sleep(every_s - down_s)
            await asyncio.to_thread(instances.kill, f"gpu{number % 2}")
            await asyncio.sleep(down_s)
            await asyncio.to_thread(instances.start, f"gpu{number % 2}")
        replies = await requests
        return f"{lost(replies)}/{len(replies)}"


async def steady(port: int, *, count: int) -> list[front_lab.Reply]:
    """A request every 1/40 s, whatever becomes of those before it."""
    tasks = []
    for _ in range(count):
        tasks.append(asyncio.create_task(ask(port)))
        await asyncio.sleep(1 / 40)
    return await asyncio.gather(*tasks)


async def poison(variant: str | None, count: int, method: str) -> str:
    """20 poison requests, one after the other: most instances that one of them was handed to."""
    worst = 0
    with fleet(variant, count) as (instances, front):
        for number in range(20):
            instances.revive()
            # Everybody has a kept connection now: nginx gives an error on one of those a try for free.
            await load(front.port, 4 * count, at_once=2 * count)
            name = f"poison-{number}"
            await ask(front.port, f"{SPEECH}?poison", method=method, headers={"X-Request-Id": name})
            victims = instances.events("handed", name)
            await asyncio.to_thread(instances.bury, victims)
            worst = max(worst, len(victims))
    return str(worst)


async def busy(variant: str | None) -> str:
    """40 POSTs at once to 2 × (1 + 1) places, then one at a time to idle instances: wrong answers, then lost."""
    with fleet(variant, 2, queue=1, speech_s=0.2) as (_, front):
        replies = await load(front.port, 40, at_once=40)
        wrong = sum(not reply.good and not is_busy(reply) for reply in replies)
        after = await load(front.port, 4, at_once=1)
        return f"{wrong} + {lost(after)}"


async def full(variant: str | None, dead_ones: int) -> str:
    """60 POSTs while one of four instances is full of work nginx does not know (and some are dead): lost."""
    with fleet(variant, 4, queue=3, speech_s=0.02) as (instances, front):
        for name in list(instances.ports)[1 : 1 + dead_ones]:
            instances.kill(name)
        others = [asyncio.create_task(ask(instances.ports["gpu0"], f"{SPEECH}?seconds=4")) for _ in range(4)]
        await asyncio.sleep(0.1)
        replies = await load(front.port, 60, at_once=5)
        for other in others:
            other.cancel()
        return str(lost(replies))


def is_busy(reply: front_lab.Reply) -> bool:
    """Whether the client is told to come back, and when."""
    return reply.status == 503 and reply.header("Retry-After") is not None


SCENARIOS: dict[str, Callable[[str | None], Coroutine[Any, Any, str]]] = {
    "1 of 2 dead": lambda variant: dead(variant, 2, 1),
    "2 of 4": lambda variant: dead(variant, 4, 2),
    "7 of 8": lambda variant: dead(variant, 8, 7),
    "8 kills": lambda variant: killed(variant, 1.2, 0.7),
    "8 quick kills": lambda variant: killed(variant, 0.3, 0),
    "poison N=2": lambda variant: poison(variant, 2, "POST"),
    "N=4": lambda variant: poison(variant, 4, "POST"),
    "N=8": lambda variant: poison(variant, 8, "POST"),
    "GET, N=4": lambda variant: poison(variant, 4, "GET"),
    "all full: wrong + lost after": busy,
    "1 of 4 full": lambda variant: full(variant, 0),
    "… and 1 dead": lambda variant: full(variant, 1),
}


def main() -> None:
    """Print one row per variant; arguments are words that its name must contain (`ours` is the last)."""
    began = time.monotonic()
    print("| settings | " + " | ".join(SCENARIOS) + " |")
    print("| --- |" + " ---: |" * len(SCENARIOS))
    for variant in (*VARIANTS, None):
        name = "**ours**" if variant is None else variant
        if sys.argv[1:] and not any(word in name for word in sys.argv[1:]):
            continue
        cells = [asyncio.run(scenario(variant)) for scenario in SCENARIOS.values()]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print(f"\n{time.monotonic() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
