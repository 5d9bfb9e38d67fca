"""The real chatterbox-tts classes, small and with random weights: engines around them, voices, and what they say."""

import copy
import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from chatterbox_server.engine import Engine, Errand, Utterance
from chatterbox_server.engines.stock import Placement, StockEngine
from server.fakes import an_utterance

KINDS = ("chatterbox", "turbo", "multilingual")
CPU = Placement("cpu", "cpu")

Build = Callable[..., StockEngine]

warnings = [
    pytest.mark.filterwarnings("ignore:`LoRACompatibleLinear` is deprecated:FutureWarning"),  # diffusers 0.29
    pytest.mark.filterwarnings("ignore:pkg_resources is deprecated"),  # resemble-perth
    pytest.mark.filterwarnings("ignore:.*slated for removal in Python 3.13:DeprecationWarning"),  # audioread
]

model = [
    pytest.mark.model,
    pytest.mark.skipif(importlib.util.find_spec("chatterbox") is None, reason="needs chatterbox-tts"),
]


class Models:
    """One tiny model of each kind, made when it is first asked for, and lent as if it were new."""

    def __init__(self, directory: Path) -> None:
        # One thread: more of them only wait for each other at this size. The hub cannot be asked here.
        os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
        import torch

        torch.set_num_threads(1)
        script = Path(__file__).parents[2] / "scripts" / "tiny_model.py"
        spec = importlib.util.spec_from_file_location("tiny_model", script)
        assert spec is not None
        assert spec.loader is not None
        self._made_by = importlib.util.module_from_spec(spec)
        sys.modules["tiny_model"] = self._made_by
        spec.loader.exec_module(self._made_by)
        self._directory = directory
        self._models: dict[str, tuple[Any, Any, Any]] = {}

    def lend(self, kind: str) -> Any:
        if kind not in self._models:
            made = self._made_by.tiny(kind, self._directory / kind)
            self._models[kind] = (made, made.conds, made.s3gen)
        made, made.conds, made.s3gen = self._models[kind]
        return made

    def lend_watchful(self, *, ends: bool) -> Any:
        """Multilingual, whose alignment analyser has something to see; ``ends``: by itself, too."""
        if (key := f"watchful {ends}") not in self._models:
            made = copy.copy(self.lend("multilingual"))
            made.t3 = copy.deepcopy(made.t3)
            self._made_by.make_watchful(made.t3, ends=ends)
            self._models[key] = (made, made.conds, made.s3gen)
        return self.lend(key)

    def build(self, kind: str, **told: Any) -> StockEngine:
        return StockEngine(self.lend(kind), kind, **({"placement": CPU} | told))


def record(path: Path, *, hertz: float, seconds: float = 5.5, rate_hz: int = 24_000) -> None:
    """A hum with the rhythm of syllables."""
    time_s = np.arange(round(seconds * rate_hz)) / rate_hz
    hum = sum((np.sin(2 * np.pi * hertz * part * time_s) / part for part in range(1, 12)), np.zeros(time_s.size))
    soundfile.write(path, 0.15 * hum * (0.55 + 0.45 * np.sin(2 * np.pi * 3.5 * time_s)), rate_hz)


def said(engine: Engine, utterance: Utterance) -> NDArray[np.float32]:
    return engine.synthesize(utterance, Errand())


def changed(engine: Engine, **changes: Any) -> Utterance:
    """A short utterance with the engine's own sampling, but for ``changes``."""
    return but(an_utterance("Hello to you.", sampling=engine.defaults), **changes)


def but(plain: Utterance, **changes: Any) -> Utterance:
    """``plain`` but for ``changes``, of which some may be of its sampling."""
    fields = {field.name for field in dataclasses.fields(Utterance)}
    sampling = {name: changes.pop(name) for name in tuple(changes) if name not in fields}
    return dataclasses.replace(plain, **changes, sampling=dataclasses.replace(plain.sampling, **sampling))


def same(one: NDArray[np.float32], other: NDArray[np.float32]) -> bool:
    return np.array_equal(one, other)
