"""What the routes of one app share. Holds; does nothing."""

from dataclasses import dataclass
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

    @property
    def ready(self) -> bool:
        """A request sent now would be spoken."""
        return not self.queue.draining and self.queue.sound


def _of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Shared = Annotated[Service, Depends(_of)]
