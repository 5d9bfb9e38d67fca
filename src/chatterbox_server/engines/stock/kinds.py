"""How the package's models differ: what each is called, takes and heeds, and how it makes speech tokens of text."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from chatterbox_server.engine import Sampling, Utterance

TINY_CFG_WEIGHT: Final = 1e-6
"""Stands for a ``cfg_weight`` of 0, which the package crashes on: its loop always expects two rows."""

MOST_TOKENS: Final = 1000
"""As ``generate`` has it: after 40 s the model stops without a word."""

SOUNDS: Final = 6561
"""Tokens from here on are no sound."""

SHORTEST_RECORDING_S: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One of the package's models."""

    module: str
    class_name: str
    tokens: Callable[[Any, Utterance, Any], Any]
    """The model, what to say, T3's conditionals (a copy: they are written into) → speech tokens, in one row."""
    defaults: Sampling
    languages: tuple[str, ...] = ("en",)
    flow_steps: int | None = None
    """Of S3Gen; ``None``: its own."""
    levels_recordings: bool = False
    shortest_recording_s: float = SHORTEST_RECORDING_S


def guided(model: Any, utterance: Utterance, conditionals: Any, **language: str) -> Any:
    """Text in two rows, the second without guidance."""
    import torch
    from chatterbox.models.s3tokenizer import drop_invalid_tokens

    t3, sampling = model.t3, utterance.sampling
    conditionals.emotion_adv = sampling.exaggeration * torch.ones(1, 1, 1, device=t3.device)
    text = model.tokenizer.text_to_tokens(_punctuated(model, utterance.text), **language).to(t3.device)
    text = torch.cat([text, text])
    text = torch.nn.functional.pad(text, (1, 0), value=t3.hp.start_text_token)
    text = torch.nn.functional.pad(text, (0, 1), value=t3.hp.stop_text_token)
    speech = t3.inference(
        t3_cond=conditionals,
        text_tokens=text,
        max_new_tokens=MOST_TOKENS,
        temperature=sampling.temperature,
        cfg_weight=max(sampling.cfg_weight, TINY_CFG_WEIGHT),
        repetition_penalty=sampling.repetition_penalty,
        min_p=sampling.min_p,
        top_p=sampling.top_p,
    )
    speech = drop_invalid_tokens(speech[0])
    # Multilingual's own ``generate`` leaves these in; S3Gen has no row for them, and a GPU would be poisoned.
    return speech[speech < SOUNDS]


def multilingual(model: Any, utterance: Utterance, conditionals: Any) -> Any:
    return guided(model, utterance, conditionals, language_id=utterance.language)


def turbo(model: Any, utterance: Utterance, conditionals: Any) -> Any:
    """Exaggeration, cfg_weight and min_p it does not know."""
    import torch
    from chatterbox.models.s3gen.const import S3GEN_SIL

    t3, sampling = model.t3, utterance.sampling
    text = model.tokenizer(_punctuated(model, utterance.text), return_tensors="pt", padding=True, truncation=True)
    speech = t3.inference_turbo(
        t3_cond=conditionals,
        text_tokens=text.input_ids.to(t3.device),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        repetition_penalty=sampling.repetition_penalty,
    )
    silence = torch.full((3,), S3GEN_SIL, device=speech.device)
    return torch.cat([speech[speech < SOUNDS], silence])


def _punctuated(model: Any, text: str) -> str:
    punctuated: str = importlib.import_module(type(model).__module__).punc_norm(text)
    return punctuated


# chatterbox.mtl_tts.SUPPORTED_LANGUAGES of 0.1.7, English first: it is spoken unless another is named.
# fmt: off
_MULTILINGUAL: Final = (
    "en", "ar", "da", "de", "el", "es", "fi", "fr", "he", "hi", "it", "ja",
    "ko", "ms", "nl", "no", "pl", "pt", "ru", "sv", "sw", "tr", "zh",
)
# fmt: on

KINDS: Final[dict[str, Kind]] = {
    "chatterbox": Kind(
        module="chatterbox.tts",
        class_name="ChatterboxTTS",
        tokens=guided,
        defaults=Sampling(),
    ),
    "turbo": Kind(
        module="chatterbox.tts_turbo",
        class_name="ChatterboxTurboTTS",
        tokens=turbo,
        defaults=Sampling(exaggeration=0.0, cfg_weight=0.0, min_p=0.0, top_p=0.95),
        flow_steps=2,
        levels_recordings=True,
        # Its own assertion: "Audio prompt must be longer than 5 seconds!"
        shortest_recording_s=5.01,
    ),
    "multilingual": Kind(
        module="chatterbox.mtl_tts",
        class_name="ChatterboxMultilingualTTS",
        tokens=multilingual,
        defaults=Sampling(repetition_penalty=2.0),
        languages=_MULTILINGUAL,
    ),
}
