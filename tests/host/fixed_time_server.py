"""A speech server that takes the same time for every request, one at a time: what a GPU is, without one.

    python tests/host/fixed_time_server.py --port 6093 --seconds 0.25 --journal spoken.jsonl

Answers as ours does as far as a client can tell: a WAV whose length follows the text and whose samples are its
digest's bytes, so that a listener knows it again; 503 with Retry-After when the queue is full; /v1/models. The journal
gets a line of JSON for each text that was asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import io
import json
import wave
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from aiohttp import web

SAMPLE_RATE_HZ: Final = 24_000
SAMPLES_PER_CHARACTER: Final = 1_600
"""15 characters a second."""


@dataclass
class Instance:
    seconds: float
    queue_size: int = 8
    journal: Path | None = None
    engine: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: int = 0

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/v1/audio/speech", self.speak)
        app.router.add_get("/v1/models", self.models)
        return app

    async def models(self, _request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "fixed-time", "object": "model"}]})

    async def speak(self, request: web.Request) -> web.Response:
        text = (await request.json())["input"]
        if self.waiting > self.queue_size:
            error = {"message": "the queue is full", "type": "server_error", "param": None, "code": "queue_full"}
            return web.json_response({"error": error}, status=503, headers={"Retry-After": "1"})
        if self.journal is not None:
            with self.journal.open("a") as journal:
                journal.write(json.dumps(text) + "\n")
        self.waiting += 1
        try:
            async with self.engine:
                await asyncio.sleep(self.seconds)
        finally:
            self.waiting -= 1
        return web.Response(body=wav(text), content_type="audio/wav")


def pcm(text: str) -> bytes:
    """The samples that stand for ``text``."""
    digest = hashlib.sha256(text.encode()).digest()
    whole = len(text) * SAMPLES_PER_CHARACTER * 2
    return (digest * (whole // len(digest) + 1))[:whole]


def wav(text: str) -> bytes:
    """The same in a file."""
    stream = io.BytesIO()
    with wave.open(stream, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(SAMPLE_RATE_HZ)
        writer.writeframes(pcm(text))
    return stream.getvalue()


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=0.25)
    parser.add_argument("--queue-size", type=int, default=8)
    parser.add_argument("--journal", type=Path)
    told = parser.parse_args()

    async def app() -> web.Application:
        return Instance(told.seconds, told.queue_size, told.journal).app()

    web.run_app(app(), host="127.0.0.1", port=told.port, print=None, access_log=None)


if __name__ == "__main__":
    main()
