"""The real chatterbox-tts, unpatched: three stages in turn, or each on a thread of its own.

Text to speech tokens (``tokens``), tokens to sound (``sound``), the watermark (``sound`` too). The package keeps state
between calls (the last voice, its exaggeration, the random generator, forward hooks); here all of it is set for every
utterance, so that none hears the one before or the one beside.
"""

from chatterbox_server.engines.stock.engine import Built, StockEngine, built, load
from chatterbox_server.engines.stock.kinds import KINDS
from chatterbox_server.engines.stock.placement import Placement, place

__all__ = ["KINDS", "Built", "Placement", "StockEngine", "built", "load", "place"]
