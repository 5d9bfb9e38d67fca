"""The same models as ``stock``, many utterances at once: one batch of T3's steps, one of S3Gen's, on one GPU.

Tokens are chosen as the package's own loop chooses them, under noise that belongs to an utterance's seed alone. T3
takes newcomers between two steps (``t3``); S3Gen speaks whoever is waiting together (``s3gen``). An utterance's way
through both is ``engine``; ``noise`` is what both draw.
"""

from chatterbox_server.engines.fast.engine import FastEngine, load

__all__ = ["FastEngine", "load"]
