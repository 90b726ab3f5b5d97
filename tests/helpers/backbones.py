"""Tiny random models of every supported architecture, and of some that are not supported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from detoxrl.models.loading import save_base

HELPERS = Path(__file__).parent
VOCABULARY = 300

_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
    "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_BART: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 256,
    "init_std": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip
_BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 256, "initializer_range": 0.2,
}  # fmt: skip
_GPT: dict[str, Any] = _BERT | {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
_LLAMA: dict[str, Any] = _GPT | {"num_key_value_heads": 2}
_GEMMA: dict[str, Any] = _LLAMA | {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}
# Layers of both kinds, the first with a window shorter than the prompts.
_LAYERS = ["sliding_attention", "full_attention"]
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip


def _encoder_decoder() -> PreTrainedModel:
    """Two encoders of MiniLM's kind, the second of which reads from left to right and looks at the first."""
    parts = (hf.BertConfig(**_BERT), hf.BertConfig(**_BERT))
    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(
        *parts, decoder_start_token_id=1, eos_token_id=1, pad_token_id=0
    )
    return hf.EncoderDecoderModel(config)


BACKBONES: dict[str, Callable[[], PreTrainedModel]] = {
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5)),
    "mt5": lambda: hf.MT5ForConditionalGeneration(hf.MT5Config(**_T5)),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**_BART)),
    "mbart": lambda: hf.MBartForConditionalGeneration(hf.MBartConfig(**_BART)),
    "pegasus": lambda: hf.PegasusForConditionalGeneration(hf.PegasusConfig(**_BART)),
    "marian": lambda: hf.MarianMTModel(hf.MarianConfig(**_BART)),
    "encoder-decoder": _encoder_decoder,
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_GPT)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, init_std=0.2,
        max_position_embeddings=256, word_embed_proj_dim=16, do_layer_norm_before=False, bos_token_id=1,
        eos_token_id=1, pad_token_id=0)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_LLAMA, sliding_window=16)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_LLAMA)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_LLAMA, head_dim=8)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_GEMMA)),
    "gemma3_text": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_GEMMA, layer_types=_LAYERS)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**_GPT)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_LLAMA)),
    "falcon": lambda: hf.FalconForCausalLM(hf.FalconConfig(**_GPT, multi_query=True)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_LLAMA, num_local_experts=4)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(
        **_LLAMA, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)),
}  # fmt: skip
"""Models that can be trained, by their type."""

_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
           "image_size": 16, "patch_size": 8}  # fmt: skip
REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "mamba": (lambda: hf.MambaForCausalLM(hf.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, state_size=4, eos_token_id=1)), "keeps a state"),
    "rwkv": (lambda: hf.RwkvForCausalLM(hf.RwkvConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32)), "keeps a state"),
    "lfm2": (lambda: hf.Lfm2ForCausalLM(hf.Lfm2Config(
        **_LLAMA, layer_types=["conv", "full_attention"])), "keeps a state in place of keys and values"),
    "gemma3": (lambda: hf.Gemma3ForConditionalGeneration(hf.Gemma3Config(
        text_config=_GEMMA | {"layer_types": _LAYERS}, vision_config=_VISION)),
        r"also reads images; .*; save its text model alone"),
    "qwen2_audio": (lambda: hf.Qwen2AudioForConditionalGeneration(hf.Qwen2AudioConfig(
        text_config=_LLAMA | {"model_type": "qwen2"}, audio_config={"d_model": 16, "encoder_layers": 1,
        "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "num_mel_bins": 8})), "also reads sound"),
    "whisper": (lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(
        vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0, eos_token_id=1,
        bos_token_id=1, decoder_start_token_id=1, begin_suppress_tokens=None)), "does not generate text"),
    "bert": (lambda: hf.BertLMHeadModel(hf.BertConfig(**_BERT, eos_token_id=1)), "looks at both sides of a token"),
    "xlnet": (lambda: hf.XLNetLMHeadModel(hf.XLNetConfig(
        vocab_size=VOCABULARY, d_model=16, n_layer=1, n_head=2, d_inner=16)), "looks at both sides of a token"),
    "BertForMaskedLM": (lambda: hf.BertForMaskedLM(hf.BertConfig(**_BERT)), "does not generate text"),
    "switch_transformers": (lambda: hf.SwitchTransformersForConditionalGeneration(hf.SwitchTransformersConfig(
        **_T5, num_experts=2, num_sparse_encoder_layers=1)), "gives its decoder more than hidden states"),
}  # fmt: skip
"""Models that cannot be trained, and what the error says of them."""


def tokenizer_for(model: PreTrainedModel) -> PreTrainedTokenizerFast:
    """The stored tokenizer, which puts EOS behind a text for models with an encoder only."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(HELPERS / "tokenizer.json"), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    if not model.config.is_encoder_decoder:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    return tokenizer


def save_backbone(make: Callable[[], PreTrainedModel], folder: Path) -> Path:
    """Write a tiny random model and its tokenizer to a folder."""
    torch.manual_seed(7)
    model = make()
    save_base(model, tokenizer_for(model), folder)
    return folder
