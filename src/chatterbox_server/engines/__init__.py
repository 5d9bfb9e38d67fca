"""Builds the chosen engine, and imports only that one: torch alone takes seconds."""

from chatterbox_server.engine import Engine
from chatterbox_server.settings import Settings


def load(settings: Settings) -> Engine:
    """Load what ``settings`` name; takes up to minutes.

    Raises:
        EngineError: with one line that says what is missing; ``Unable``, where waiting for it would be in vain.
    """
    match settings.engine:
        case "espeak":
            from chatterbox_server.engines import espeak

            return espeak.load()
        case "fast":
            from chatterbox_server.engines import fast

            return fast.load(settings)
        case "stock":
            from chatterbox_server.engines import stock

            return stock.load(settings)
