"""Small servers that speak one request at a time, and go wrong as they are told; as a process, two of them."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aiohttp import web

from chatterbox_deploy.bench.aims import Aim, Door
from chatterbox_deploy.speak.wav import SAMPLE_BYTES, Sound, encode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


def wav(seconds: float) -> bytes:
    """So much silence."""
    return encode(Sound(24_000, bytes(round(seconds * 24_000) * SAMPLE_BYTES)))


@dataclass
class Speaker:
    """A server that speaks one request at a time and counts as ours does; ``fault`` is what goes wrong."""

    service_s: float = 0.02
    fault: str = ""
    name: str | None = None
    heard: list[dict[str, Any]] = field(default_factory=list)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def speak(self, request: web.Request) -> web.StreamResponse:  # noqa: PLR0911  one for each fault
        self.heard.append({**await request.json(), "key": request.headers.get("Authorization")})
        match self.fault:
            case "busy":
                return web.Response(status=503, text="the queue is full")
            case "key":
                return web.Response(status=401)
            case "empty":
                return web.Response(body=b"")
            case "text":
                return web.Response(text="hello")
        async with self._turn:
            await asyncio.sleep(self.service_s)
        headers = {"X-Queue-Wait": "0.125"} | ({} if self.name is None else {"X-Instance": self.name})
        if self.fault == "cut short":
            response = web.StreamResponse(headers=headers | {"Content-Length": "1000"})
            await response.prepare(request)
            await response.write(wav(0.01)[:300])
            assert request.transport is not None
            request.transport.close()
            return response
        if self.fault == "stalls":
            response = web.StreamResponse(headers=headers)
            await response.prepare(request)
            whole = wav(0.2)
            # The header comes first, sound later; after a tenth of a second of sound nothing for three.
            for part, pause_s in ((whole[:44], 0.1), (whole[44:4844], 0.3), (whole[4844:], 0.0)):
                await response.write(part)
                await asyncio.sleep(pause_s)
            return response
        return web.Response(body=wav(1.0), headers=headers)

    async def metrics(self, request: web.Request) -> web.Response:
        spoken = len(self.heard)
        return web.Response(
            text=f'chatterbox_requests_total{{outcome="answered",route="/v1/audio/speech"}} {spoken}.0\n'
            f"chatterbox_audio_seconds_total {spoken}.0\nchatterbox_synthesis_seconds_total {spoken / 4}\n"
            f"chatterbox_speech_tokens_total {spoken * 25}\nprocess_cpu_seconds_total 1\n"
        )


@asynccontextmanager
async def serving(*speakers: Speaker) -> AsyncIterator[Aim]:
    """All of them, asked directly."""
    doors, runners = [], []
    for number, speaker in enumerate(speakers):
        app = web.Application()
        app.router.add_post("/v1/audio/speech", speaker.speak)
        if speaker.fault != "no metrics":
            app.router.add_get("/metrics", speaker.metrics)
        runners.append(web.AppRunner(app, access_log=None, shutdown_timeout=0.1))
        await runners[-1].setup()
        site = web.TCPSite(runners[-1], "127.0.0.1", 0)
        await site.start()
        doors.append(Door(f"gpu{number}", f"http://127.0.0.1:{runners[-1].addresses[0][1]}", by_itself=True))
    try:
        yield Aim("all", tuple(doors), tuple(doors), len(doors))
    finally:
        for runner in runners:
            await runner.cleanup()


async def main() -> None:
    """Says their addresses, and serves until it is killed."""
    async with serving(Speaker(), Speaker()) as aim:
        print(*(door.url for door in aim.doors), flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
