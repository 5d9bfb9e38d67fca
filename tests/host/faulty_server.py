"""An instance as any, but for its engine: it says so many milliseconds as the text names, and fails as a file says.

The file is FAULTS/INSTANCE, read at every utterance: a fault and a number. Without it the engine is sound.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from chatterbox_server import logs
from chatterbox_server.__main__ import serve
from chatterbox_server.app import WARM_UP
from chatterbox_server.engine import EngineBroken, Errand, OutOfMemory, Sampling, Utterance
from chatterbox_server.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

FAULTS = Path(os.environ.get("FAULTS", "/etc/chatterbox-tts/faults"))

POISON = "poison"
"""Breaks any engine that is asked to say it."""

CANARY = "One, two, three."
"""What ``apply`` asks every instance to say."""

UTTERANCE_S = 0.02


class FaultyEngine:
    name = "faulty"
    model = "faulty-1"
    places = 1
    sample_rate_hz = 24_000
    longest_piece = 300
    tokens_per_audio_s: float | None = None
    speeds = (1.0, 1.0)
    languages: tuple[str, ...] = ("en",)
    defaults = Sampling()
    frees_beside = True
    broken = None

    def __init__(self, fault: Path, marks: Path | None) -> None:
        self._fault = fault
        self._marks = marks
        self._utterances = 0
        self._freed = False
        self._kept: list[bytes] = []

    def facts(self) -> Mapping[str, object]:
        return {}

    def memory(self) -> None:
        """It has no GPU."""

    def free(self) -> None:
        self._freed = True

    def synthesize(self, utterance: Utterance, errand: Errand) -> NDArray[np.float32]:
        self._utterances += 1
        if POISON in utterance.text:
            raise EngineBroken("CUDA error: device-side assert triggered, by this text")
        try:
            fault, number = self._fault.read_text().split()
        except FileNotFoundError:
            fault, number = "none", "0"
        with errand.at_work():
            self._fail(fault, int(number))
        if fault == "silent":
            return np.zeros(self.sample_rate_hz, dtype=np.float32)
        self._freed = False
        time.sleep(UTTERANCE_S)
        # The halves of a text have its numbers between them.
        lasts_ms = 1000 if utterance.text in {WARM_UP, CANARY} else sum(map(int, re.findall(r"\d+", utterance.text)))
        time_s = np.arange(lasts_ms * self.sample_rate_hz // 1000, dtype=np.float32) / self.sample_rate_hz
        tone: NDArray[np.float32] = 0.5 * np.sin(2 * np.pi * 440 * time_s, dtype=np.float32)
        return tone

    def _fail(self, fault: str, number: int) -> None:
        """What ``number`` is of: utterances of this process, milliseconds, megabytes an utterance."""
        due = number > 0 and self._utterances % number == 0
        match fault:
            case "broken" if due:
                raise EngineBroken("CUDA error: device-side assert triggered")
            case "fragmented" if due and not self._freed:
                # The next try comes at once, and must not be counted as another utterance.
                self._utterances -= 1
                raise OutOfMemory("CUDA out of memory, until something is freed")
            case "full":
                raise OutOfMemory("CUDA out of memory, and nothing to free")
            case "hung":
                if self._marks is not None:
                    (self._marks / "hung").touch()
                threading.Event().wait()
            case "slow":
                time.sleep(number / 1000)
            case "leaking":
                self._kept.append(b"x" * (number * 1_000_000))


async def main() -> int:
    settings = Settings.from_environ(os.environ)
    fault = FAULTS / settings.instance
    return await serve(settings, os.environ, lambda: FaultyEngine(fault, settings.runtime_dir))


if __name__ == "__main__":
    logs.setup(os.environ, sys.stderr)
    logging.getLogger("chatterbox_server").setLevel(logging.INFO)
    sys.exit(asyncio.run(main()))
