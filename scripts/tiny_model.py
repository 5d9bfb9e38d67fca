"""Build the real chatterbox-tts classes with random weights: the same code, memory and time, but no speech.

``tiny`` makes a model of a few million parameters in memory, for tests on a CPU (under a second an utterance).
``full`` writes a checkpoint of the real size that the package's own ``from_local`` loads, for timing on a GPU:

    python scripts/tiny_model.py full /tmp/weights --kind turbo --eos-per-text 1.7

Random weights never reach end-of-speech; ``--eos-per-text`` writes weights that do, after so many speech tokens
for each token of text (25 speech tokens are a second). Only public names of the package are used; none is patched.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, Final

import torch
from chatterbox.models.s3gen import S3Gen
from chatterbox.models.s3gen.s3gen import (
    CFM_PARAMS,
    S3GEN_SR,
    CAMPPlus,
    CausalConditionalCFM,
    CausalMaskedDiffWithXvec,
    ConditionalDecoder,
    ConvRNNF0Predictor,
    HiFTGenerator,
    UpsampleConformerEncoder,
)
from chatterbox.models.s3gen.transformer.upsample_encoder import PreLookaheadLayer, Upsample1D
from chatterbox.models.t3 import T3
from chatterbox.models.t3.inference.alignment_stream_analyzer import LLAMA_ALIGNED_HEADS
from chatterbox.models.t3.llama_configs import LLAMA_CONFIGS
from chatterbox.models.t3.modules.cond_enc import T3Cond
from chatterbox.models.t3.modules.t3_config import T3Config
from chatterbox.models.tokenizers import EnTokenizer, MTLTokenizer
from chatterbox.models.voice_encoder import VoiceEncoder
from chatterbox.mtl_tts import SUPPORTED_LANGUAGES, ChatterboxMultilingualTTS
from chatterbox.tts import ChatterboxTTS, Conditionals
from chatterbox.tts_turbo import ChatterboxTurboTTS
from s3tokenizer.model_v2 import AudioEncoderV2, FSQVectorQuantization
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

KINDS: Final = ("chatterbox", "turbo", "multilingual")

SPEECH_TOKENS: Final = 6561
"""Ids from here on are no sound: start, stop, unused."""

_ATTENTION: Final = {"hidden_size": 64, "intermediate_size": 64}
TINY_BACKBONES: Final[dict[str, dict[str, Any]]] = {
    "chatterbox": LLAMA_CONFIGS["Llama_520M"]
    | _ATTENTION
    | {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32},
    # The alignment analyser watches layers 9, 12 and 13 and heads 2, 11 and 15.
    "multilingual": LLAMA_CONFIGS["Llama_520M"]
    | _ATTENTION
    | {"num_hidden_layers": 14, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 4},
    "turbo": LLAMA_CONFIGS["GPT2_medium"]
    | {"hidden_size": 64, "n_embd": 64, "n_head": 2, "n_layer": 2, "n_positions": 2048, "n_ctx": 2048}
    | {"vocab_size": 8},
}


# -- whole models -----------------------------------------------------------------------------------------


def tiny(kind: str, directory: Path, *, seed: int = 0, eos_per_text: float = 2.0) -> Any:
    """A model of ``kind`` on the CPU with a built-in voice; ``directory`` receives its tokenizer's files."""
    torch.manual_seed(seed)
    directory.mkdir(parents=True, exist_ok=True)
    config = t3_config(kind)
    config.llama_config_name = f"tiny_{kind}"
    LLAMA_CONFIGS.setdefault(config.llama_config_name, TINY_BACKBONES[kind])
    config.use_perceiver_resampler = False
    config.speech_cond_prompt_len = 25
    if kind == "turbo":
        config.text_tokens_dict_size = 512
    t3 = T3(config).eval()
    make_attentive(t3)
    teach_to_stop(t3, eos_per_text)
    make_attentive_to_text(t3)
    write_tokenizer(kind, directory, config.text_tokens_dict_size)
    parts = (t3, tiny_s3gen(meanflow=kind == "turbo"), VoiceEncoder().eval())
    voice = random_voice(prompt_tokens=25, reference_tokens=25)
    if kind == "turbo":
        # from_local drops it too: T3 embeds speech and text itself.
        del t3.tfmr.wte
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokenizer.pad_token = tokenizer.eos_token
        return ChatterboxTurboTTS(*parts, tokenizer, "cpu", conds=voice)
    if kind == "multilingual":
        tokenizer = MTLTokenizer(str(directory / _TOKENIZER_FILES[kind]))
        return ChatterboxMultilingualTTS(*parts, tokenizer, "cpu", conds=voice)
    return ChatterboxTTS(*parts, EnTokenizer(str(directory / _TOKENIZER_FILES[kind])), "cpu", conds=voice)


@torch.no_grad()  # type: ignore[untyped-decorator,unused-ignore]
def make_attentive(t3: Any) -> None:
    """Fresh weights barely mix what they are told: louder ones let a test hear every parameter.

    Queries and keys stay, for sharp attention makes multilingual's alignment analyser hold the end back.
    """
    for name, weight in t3.tfmr.named_parameters():
        if name.endswith(("v_proj.weight", "o_proj.weight")):
            weight.mul_(12)
        elif weight.dim() > 1 and not name.endswith(("q_proj.weight", "k_proj.weight")):
            weight.mul_(4)
    t3.speech_head.weight.mul_(20)


@torch.no_grad()  # type: ignore[untyped-decorator,unused-ignore]
def make_attentive_to_text(t3: Any) -> None:
    """Give back to text, beside its position's loud mark, the weight that guidance acts by."""
    if not t3.is_gpt:
        t3.text_emb.weight.mul_(10)


@torch.no_grad()  # type: ignore[untyped-decorator,unused-ignore]
def make_watchful(t3: Any, *, sharp: float = 30.0, ends: bool = True) -> None:
    """Have multilingual's watched heads look at one token of the text or another, so that all of its rules decide.

    For weights that were taught to stop; at the real size 3 is about as ``sharp`` as 30 at a tiny one. Without
    ``ends`` only those rules end an utterance.
    """
    size = t3.cfg.hidden_size // t3.cfg.num_attention_heads
    for layer, head in LLAMA_ALIGNED_HEADS:
        attention = t3.tfmr.layers[layer].self_attn
        rows, slowest = slice(head * size, (head + 1) * size), head * size + size // 2 - 1
        for weight, (mark, _) in ((attention.q_proj.weight, _SPEECH), (attention.k_proj.weight, _TEXT)):
            weight[rows] *= sharp
            weight[rows, :_RESERVED] = 0
            # A channel that hardly turns with the position: whatever speaks looks at text alone.
            weight[slowest] = 0
            weight[slowest, mark] = 4
    if not ends:
        t3.speech_head.weight[t3.hp.stop_speech_token] = 0


def write_full(
    kind: str, directory: Path, *, seed: int = 0, eos_per_text: float = 0.0, reference_tokens: int = 125
) -> None:
    """Write a checkpoint of the real size (3.2 GB); S3Gen's time grows with ``reference_tokens``."""
    torch.manual_seed(seed)
    directory.mkdir(parents=True, exist_ok=True)
    config = t3_config(kind)
    # Most of the time is random numbers, which a GPU has sooner.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        t3 = T3(config).eval()
        if eos_per_text:
            teach_to_stop(t3, eos_per_text)
        s3gen, voice_encoder = S3Gen(meanflow=kind == "turbo").eval(), VoiceEncoder().eval()
    t3, s3gen, voice_encoder = t3.cpu(), s3gen.cpu(), voice_encoder.cpu()
    if kind == "multilingual":
        torch.save(voice_encoder.state_dict(), directory / "ve.pt")
        torch.save(s3gen.state_dict(), directory / "s3gen.pt")
        _save(t3, directory / "t3_mtl23ls_v2.safetensors")
    else:
        turbo = kind == "turbo"
        _save(voice_encoder, directory / "ve.safetensors")
        _save(s3gen, directory / ("s3gen_meanflow.safetensors" if turbo else "s3gen.safetensors"))
        _save(t3, directory / ("t3_turbo_v1.safetensors" if turbo else "t3_cfg.safetensors"))
    write_tokenizer(kind, directory, config.text_tokens_dict_size)
    voice = random_voice(prompt_tokens=config.speech_cond_prompt_len, reference_tokens=reference_tokens)
    voice.save(directory / "conds.pt")


def t3_config(kind: str) -> Any:
    """What the package's ``from_local`` of that kind configures."""
    if kind == "chatterbox":
        return T3Config.english_only()
    if kind == "multilingual":
        return T3Config.multilingual()
    config = T3Config(text_tokens_dict_size=50276)
    config.llama_config_name = "GPT2_medium"
    config.speech_tokens_dict_size = 6563
    config.input_pos_emb = None
    config.speech_cond_prompt_len = 375
    config.use_perceiver_resampler = False
    config.emotion_adv = False
    return config


def tiny_s3gen(*, meanflow: bool) -> Any:
    """S3Gen with every part replaced by a small one of the same class."""
    with torch.device("meta"):  # neither allocates nor initialises 264 million parameters
        s3gen = S3Gen(meanflow=meanflow)
    s3gen.tokenizer.encoder = AudioEncoderV2(128, 64, 1, 1, 2, use_sdpa=False)  # rotary table: heads of 64
    s3gen.tokenizer.quantizer = FSQVectorQuantization(64, 3**8)
    s3gen.tokenizer.window = torch.hann_window(400)
    s3gen.speaker_encoder = CAMPPlus(memory_efficient=False, init_channels=32, growth_rate=8)
    encoder = UpsampleConformerEncoder(
        input_size=64,
        output_size=64,
        attention_heads=2,
        linear_units=64,
        num_blocks=1,
        normalize_before=True,
        input_layer="linear",
        pos_enc_layer_type="rel_pos_espnet",
        selfattention_layer_type="rel_selfattn",
        use_cnn_module=False,
        macaron_style=False,
    )
    encoder.pre_lookahead_layer = PreLookaheadLayer(channels=64, pre_lookahead_len=3)
    encoder.up_layer = Upsample1D(channels=64, out_channels=64, stride=2)
    estimator = ConditionalDecoder(
        in_channels=320,
        out_channels=80,
        causal=True,
        channels=[64],
        dropout=0.0,
        attention_head_dim=32,
        n_blocks=1,
        num_mid_blocks=1,
        num_heads=2,
        act_fn="gelu",
        meanflow=meanflow,
    )
    flow = CausalConditionalCFM(spk_emb_dim=80, cfm_params=CFM_PARAMS, estimator=estimator)
    s3gen.flow = CausalMaskedDiffWithXvec(input_size=64, encoder=encoder, decoder=flow)
    s3gen.mel2wav = HiFTGenerator(
        base_channels=64,
        sampling_rate=S3GEN_SR,
        upsample_rates=[8, 5, 3],
        upsample_kernel_sizes=[16, 11, 7],
        source_resblock_kernel_sizes=[7, 7, 11],
        source_resblock_dilation_sizes=[[1, 3, 5]] * 3,
        f0_predictor=ConvRNNF0Predictor(cond_channels=64),
    )
    fade = S3GEN_SR // 50
    ramp = (torch.cos(torch.linspace(torch.pi, 0, fade)) + 1) / 2
    s3gen.trim_fade = torch.cat((torch.zeros(fade), ramp))
    left = [name for name, held in chain(s3gen.named_parameters(), s3gen.named_buffers()) if held.is_meta]
    assert not left, left
    return s3gen.eval()


def random_voice(*, prompt_tokens: int, reference_tokens: int) -> Any:
    """Conditionals of nobody, always the same nobody."""
    dice = torch.Generator().manual_seed(7)
    speaker = torch.nn.functional.normalize(torch.rand(1, 256, generator=dice), dim=1)
    prompt = torch.randint(0, SPEECH_TOKENS, (1, prompt_tokens), generator=dice)
    reference = {
        "prompt_token": torch.randint(0, SPEECH_TOKENS, (1, reference_tokens), generator=dice),
        "prompt_token_len": torch.tensor([reference_tokens]),
        "prompt_feat": torch.randn(1, 2 * reference_tokens, 80, generator=dice) * 2 - 6,
        "prompt_feat_len": None,
        "embedding": torch.randn(1, 192, generator=dice),
    }
    heard = T3Cond(speaker_emb=speaker, cond_prompt_speech_tokens=prompt, emotion_adv=torch.full((1, 1, 1), 0.5))
    return Conditionals(heard, reference)


# -- weights that stop ------------------------------------------------------------------------------------

# Twelve channels of the residual stream are kept free of everything else. A pair is +20 / -20 at every position
# of one sort, so that LayerNorm sees no shift of the mean.
_TEXT, _SPEECH, _SPEAKER = (0, 6), (1, 7), (4, 5)
_COUNTED: Final = (_TEXT[0], _SPEECH[0], _SPEAKER[0])
_MEANS: Final = (8, 9, 10)
_ALWAYS_ZERO: Final = 11
_RESERVED: Final = 12
_LOUD: Final = 20.0
_GAIN: Final = 400.0


@torch.no_grad()  # type: ignore[untyped-decorator,unused-ignore]
def teach_to_stop(t3: Any, per_text: float) -> None:
    """Edit random weights so that end-of-speech wins after ``per_text`` speech tokens per token of text.

    Head 0 of layer 0 looks at the whole past evenly and so measures which share of it is text, speech and the
    (single) speaker position. The end-of-speech row of the output reads speech - per_text * text - given *
    speaker, where ``given`` is the number of speech positions that were not generated.
    """
    config = t3.hp
    given = (1 if t3.is_gpt else 2) + (0 if config.use_perceiver_resampler else config.speech_cond_prompt_len)
    _mark_positions(t3)
    _silence_writers(t3)
    if t3.is_gpt:
        _count_with_gpt2(t3)
    else:
        _count_with_llama(t3)
    head = t3.speech_head.weight
    head[:, :_RESERVED] = 0
    # Ids that are no sound never win: multilingual would feed them to an embedding that has no such row.
    head[SPEECH_TOKENS:] = 0
    head[SPEECH_TOKENS:, _SPEECH[0]] = -_LOUD
    stop = head[config.stop_speech_token]
    stop.zero_()
    for channel, weight in zip(_MEANS, (-per_text, 1.0, -float(given)), strict=True):
        stop[channel] = _GAIN * weight
    stop[_ALWAYS_ZERO] = -stop.sum()  # cancels the shift of the final norm
    if t3.speech_head.bias is not None:
        t3.speech_head.bias[config.stop_speech_token] = 0.0


def _mark(weight: Any, pair: tuple[int, int]) -> None:
    weight[..., :_RESERVED] = 0
    weight[..., pair[0]], weight[..., pair[1]] = _LOUD, -_LOUD


def _mark_positions(t3: Any) -> None:
    if t3.text_pos_emb is not None:
        # The row without guidance zeroes the text's embedding, so the position's carries the mark.
        t3.text_emb.weight.mul_(0.1)
        t3.text_emb.weight[:, :_RESERVED] = 0
        t3.speech_emb.weight[:, :_RESERVED] = 0
        text, speech = t3.text_pos_emb.emb.weight, t3.speech_pos_emb.emb.weight
    else:
        text, speech = t3.text_emb.weight, t3.speech_emb.weight
    text.normal_(0, 1)
    _mark(text, _TEXT)
    _mark(speech, _SPEECH)
    speaker = t3.cond_enc.spkr_enc
    speaker.weight[:_RESERVED] = 0
    speaker.bias.normal_(0, 1)
    _mark(speaker.bias, _SPEAKER)
    if t3.is_gpt:
        t3.tfmr.wpe.weight[:, :_RESERVED] = 0
        for rows in (t3.text_emb.weight, t3.speech_emb.weight, t3.tfmr.wpe.weight):
            rows[:, _RESERVED:] -= rows[:, _RESERVED:].mean(-1, keepdim=True)
        speaker.weight[_RESERVED:] -= speaker.weight[_RESERVED:].mean(0, keepdim=True)
        speaker.bias[_RESERVED:] -= speaker.bias[_RESERVED:].mean()


def _silence_writers(t3: Any) -> None:
    """Nothing else may write to the reserved channels."""
    conditions = t3.cond_enc
    if conditions.emotion_adv_fc is not None:
        conditions.emotion_adv_fc.weight[:_RESERVED] = 0
    if conditions.perceiver is not None:
        conditions.perceiver.pre_attention_query[..., :_RESERVED] = 0
        conditions.perceiver.attn.proj_out.weight[:_RESERVED] = 0
        conditions.perceiver.attn.proj_out.bias[:_RESERVED] = 0
    if t3.is_gpt:
        for block in t3.tfmr.h:
            for writer in (block.attn.c_proj, block.mlp.c_proj):  # GPT-2 keeps weights as (in, out)
                writer.weight[:, :_RESERVED] = 0
                writer.bias[:_RESERVED] = 0
    else:
        for layer in t3.tfmr.layers:
            layer.self_attn.o_proj.weight[:_RESERVED] = 0
            layer.mlp.down_proj.weight[:_RESERVED] = 0


def _count_with_gpt2(t3: Any) -> None:
    head, dim = t3.dim // t3.cfg.n_head, t3.dim
    attention = t3.tfmr.h[0].attn
    for start in (0, 2 * dim):  # queries, then values, of head 0
        attention.c_attn.weight[:, start : start + head] = 0
        attention.c_attn.bias[start : start + head] = 0
    attention.c_proj.weight[:head, :] = 0
    for place, (counted, mean) in enumerate(zip(_COUNTED, _MEANS, strict=True)):
        attention.c_attn.weight[counted, 2 * dim + place] = 1.0
        attention.c_proj.weight[place, mean] = 1.0


def _count_with_llama(t3: Any) -> None:
    head = getattr(t3.cfg, "head_dim", None) or t3.dim // t3.cfg.num_attention_heads
    attention = t3.tfmr.layers[0].self_attn
    attention.q_proj.weight[:head] = 0
    attention.v_proj.weight[:head] = 0
    attention.o_proj.weight[:, :head] = 0
    for place, (counted, mean) in enumerate(zip(_COUNTED, _MEANS, strict=True)):
        attention.v_proj.weight[place, counted] = 1.0
        attention.o_proj.weight[mean, place] = 1.0


# -- tokenizers -------------------------------------------------------------------------------------------

_TOKENIZER_FILES: Final = {
    "chatterbox": "tokenizer.json",
    "turbo": "tokenizer.json",
    "multilingual": "grapheme_mtl_merged_expanded_v1.json",
}


def write_tokenizer(kind: str, directory: Path, size: int) -> None:
    """Write a tokenizer of exactly ``size`` ids: a character each, or a byte each for Turbo's GPT-2."""
    if kind == "turbo":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        unused = (f"<unused{number}>" for number in range(len(alphabet), size - 1))
        tokenizer = Tokenizer(models.BPE(vocab=_numbered((*alphabet, *unused, _END)), merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([_END])
        names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), _END)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1024} | names
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    else:
        languages = [f"[{code}]" for code in sorted(SUPPORTED_LANGUAGES)] if kind == "multilingual" else []
        special = ["[STOP]", "[UNK]", "[SPACE]", "[START]", *languages]
        vocabulary = _numbered(islice(_characters(languages), size))
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=special[1], fuse_unk=False))
        tokenizer.add_special_tokens(special)
    assert tokenizer.get_vocab_size() == size, tokenizer.get_vocab_size()
    tokenizer.save(str(directory / _TOKENIZER_FILES[kind]))


_END: Final = "<|endoftext|>"


def _numbered(tokens: Any) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def _characters(languages: Sequence[str]) -> Iterator[str]:
    """Stop is 0 and start 255, where the real vocabulary has them; the languages follow start."""
    letters = chain(map(chr, range(33, 127)), map(chr, range(0xA1, 0x17F)), repeat(""))
    yield from ("[STOP]", "[UNK]", "[SPACE]")
    for number in range(3, sys.maxsize):
        if number == 255:
            yield "[START]"
        elif 256 <= number < 256 + len(languages):
            yield languages[number - 256]
        else:
            yield next(letters) or f"[unused{number}]"


def _save(module: Any, path: Path) -> None:
    # safetensors refuses tensors that share memory or have gaps.
    save_file({name: held.detach().contiguous().clone() for name, held in module.state_dict().items()}, path)


def main() -> None:
    """Write a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    full = commands.add_parser("full", help="write a checkpoint of the real size")
    full.add_argument("directory", type=Path)
    full.add_argument("--kind", choices=KINDS, default="chatterbox")
    full.add_argument("--seed", type=int, default=0)
    full.add_argument("--eos-per-text", type=float, default=0.0, help="0: never stops, always 40 s")
    full.add_argument("--reference-tokens", type=int, default=125, help="length of the built-in voice, 25 a second")
    asked = parser.parse_args()
    write_full(
        asked.kind,
        asked.directory,
        seed=asked.seed,
        eos_per_text=asked.eos_per_text,
        reference_tokens=asked.reference_tokens,
    )
    for path in sorted(asked.directory.iterdir()):
        print(f"{path.stat().st_size:>13,} {path.name}")


if __name__ == "__main__":
    main()
