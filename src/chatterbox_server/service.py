"""What the routes of one app share. Holds; does nothing."""

import asyncio
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from chatterbox_server.metrics import Metrics
from chatterbox_server.queue import EngineQueue
from chatterbox_server.results import Results
from chatterbox_server.settings import Settings
from chatterbox_server.voices import Library


@dataclass(frozen=True, slots=True)
class Service:
    settings: Settings
    queue: EngineQueue
    voices: Library
    results: Results
    metrics: Metrics
    started_at: int
    """Unix time, for OpenAI's ``created``."""
    decoding: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    """One upload at a time: each takes a core and up to a gigabyte, and threads that speech needs."""

    @property
    def ready(self) -> bool:
        """A request sent now would be spoken."""
        return not self.queue.draining and self.queue.healthy


async def _of(request: Request) -> Service:
    # Async, though it awaits nothing: FastAPI would call another on a thread, for every request.
    service: Service = request.app.state.service
    return service


Shared = Annotated[Service, Depends(_of)]
