"""How the package's models differ: what each is called, takes and heeds; how text and speech become its tokens."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from chatterbox_server.engine import Sampling, Utterance

TINY_CFG_WEIGHT: Final = 1e-6
"""Stands for a ``cfg_weight`` of 0, which the package crashes on: its loop always expects two rows."""

COLDEST: Final = 1e-4
"""Stands for a ``temperature`` below it, by which float32 cannot divide: a GPU would be poisoned. Already greedy."""

MOST_TOKENS: Final = 1000
"""As ``generate`` has it: after 40 s the model stops without a word."""

SOUNDS: Final = 6561
"""Tokens from here on are no sound."""

SHORTEST_WATCHED: Final = 6
"""Text tokens that multilingual's alignment analyser needs: of fewer it looks for the strongest of none, and fails as
soon as they are said (resemble-ai/chatterbox issue 548)."""

SHORTEST_RECORDING_S: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One of the package's models."""

    module: str
    class_name: str
    text: Callable[[Any, Utterance], Any]
    """The model and what to say → text tokens: in two rows where the second is to be without guidance, else in one."""
    infer: Callable[[Any, Utterance, Any, Any], Any]
    """The model, what to say, its text tokens, T3's conditionals → all that T3 chose, in one row."""
    speech: Callable[[Any], Any]
    """Of what T3 chose, in one row, what S3Gen can make sound of."""
    defaults: Sampling
    languages: tuple[str, ...] = ("en",)
    expressive: bool = True
    """Heeds ``exaggeration``."""
    flow_steps: int | None = None
    """Of S3Gen; ``None``: its own."""
    levels_recordings: bool = False
    shortest_recording_s: float = SHORTEST_RECORDING_S


def guided_text(model: Any, utterance: Utterance, **language: str) -> Any:
    """In two rows, the second of which loses its text."""
    import torch

    t3 = model.t3
    text = model.tokenizer.text_to_tokens(_punctuated(model, utterance.text), **language).to(t3.device)
    text = torch.cat([text, text])
    text = torch.nn.functional.pad(text, (1, 0), value=t3.hp.start_text_token)
    return torch.nn.functional.pad(text, (0, 1), value=t3.hp.stop_text_token)


def multilingual_text(model: Any, utterance: Utterance) -> Any:
    import torch

    text = guided_text(model, utterance, language_id=utterance.language)
    # To stop again says nothing new.
    missing = max(0, SHORTEST_WATCHED - text.shape[-1])
    return torch.nn.functional.pad(text, (0, missing), value=model.t3.hp.stop_text_token)


def guided(model: Any, utterance: Utterance, text: Any, conditionals: Any) -> Any:
    sampling = utterance.sampling
    return model.t3.inference(
        t3_cond=conditionals,
        text_tokens=text,
        max_new_tokens=MOST_TOKENS,
        temperature=max(sampling.temperature, COLDEST),
        cfg_weight=max(sampling.cfg_weight, TINY_CFG_WEIGHT),
        repetition_penalty=sampling.repetition_penalty,
        min_p=sampling.min_p,
        top_p=sampling.top_p,
    )[0]


def guided_speech(chosen: Any) -> Any:
    from chatterbox.models.s3tokenizer import drop_invalid_tokens

    speech = drop_invalid_tokens(chosen)
    # Multilingual's own ``generate`` leaves these in; S3Gen has no row for them, and a GPU would be poisoned.
    return speech[speech < SOUNDS]


def turbo_text(model: Any, utterance: Utterance) -> Any:
    text = model.tokenizer(_punctuated(model, utterance.text), return_tensors="pt", padding=True, truncation=True)
    return text.input_ids.to(model.t3.device)


def turbo(model: Any, utterance: Utterance, text: Any, conditionals: Any) -> Any:
    """Exaggeration, cfg_weight and min_p it does not know."""
    sampling = utterance.sampling
    return model.t3.inference_turbo(
        t3_cond=conditionals,
        text_tokens=text,
        temperature=max(sampling.temperature, COLDEST),
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        repetition_penalty=sampling.repetition_penalty,
    )


def turbo_speech(chosen: Any) -> Any:
    import torch
    from chatterbox.models.s3gen.const import S3GEN_SIL

    # inference_turbo hands over a row of a batch of one.
    chosen = chosen.flatten()
    return torch.cat([chosen[chosen < SOUNDS], torch.full((3,), S3GEN_SIL, device=chosen.device)])


def conditioned(kind: Kind, utterance: Utterance, conditionals: Any) -> Any:
    """``conditionals``, a copy that may be written into, as T3 is to have them for this utterance."""
    import torch

    if kind.expressive:
        device = conditionals.speaker_emb.device
        conditionals.emotion_adv = utterance.sampling.exaggeration * torch.ones(1, 1, 1, device=device)
    return conditionals


def tokens(kind: Kind, model: Any, utterance: Utterance, conditionals: Any) -> Any:
    """All of it by the package's own loop: speech tokens for S3Gen, in one row."""
    text = kind.text(model, utterance)
    return kind.speech(kind.infer(model, utterance, text, conditioned(kind, utterance, conditionals)))


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
        text=guided_text,
        infer=guided,
        speech=guided_speech,
        defaults=Sampling(),
    ),
    "turbo": Kind(
        module="chatterbox.tts_turbo",
        class_name="ChatterboxTurboTTS",
        text=turbo_text,
        infer=turbo,
        speech=turbo_speech,
        defaults=Sampling(exaggeration=0.0, cfg_weight=0.0, min_p=0.0, top_p=0.95),
        expressive=False,
        flow_steps=2,
        levels_recordings=True,
        # Its own assertion: "Audio prompt must be longer than 5 seconds!"
        shortest_recording_s=5.01,
    ),
    "multilingual": Kind(
        module="chatterbox.mtl_tts",
        class_name="ChatterboxMultilingualTTS",
        text=multilingual_text,
        infer=guided,
        speech=guided_speech,
        defaults=Sampling(repetition_penalty=2.0),
        languages=_MULTILINGUAL,
    ),
}
