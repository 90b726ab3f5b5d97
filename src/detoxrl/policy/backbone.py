"""Where do base model and tokenizer come from?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.activations import NewGELUActivation

from detoxrl.errors import InputError
from detoxrl.randomness import torch_seed

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")


def load_base(base: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return an encoder-decoder model in eval mode and its tokenizer, from a folder or the hub; safetensors only.

    Raises InputError when there is no such model, or when it is no encoder-decoder.
    """
    try:
        model = AutoModelForSeq2SeqLM.from_pretrained(base, use_safetensors=True, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError("policy.base", base, reason, "give an encoder-decoder folder or hub id") from error
    model.generation_config.max_length = None
    return use_fast_activation(model).eval(), tokenizer


def use_fast_activation(model: PreTrainedModel) -> PreTrainedModel:
    """Replace T5's tanh-GELU by torch's fused one: the same function in one pass instead of six."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
    return model


def scratch_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a BPE tokenizer trained on `texts`; white space is folded to one space, as T5's is."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    # Words are kept whole up to punctuation, so that DialogSum's "#Person1#" can become one token.
    punctuation = pre_tokenizers.Split(Regex(r"[.,:;?!]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), punctuation])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    pad, eos, unk = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, unk_token=unk)


def scratch_base(texts: Sequence[str], seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a randomly initialised T5 of about 1 M parameters and a tokenizer that fits `texts`."""
    tokenizer = scratch_tokenizer(texts, vocab_size=1500)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        relative_attention_max_distance=64,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=0,  # type: ignore[call-arg]
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(seed, "scratch base"))
        model = T5ForConditionalGeneration(config)
    return use_fast_activation(model).eval(), tokenizer


def save_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer so that `load_base(str(folder))` reads them."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Return `input_ids` and `attention_mask` (B, P), right-padded."""
    batch = tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="right").to(device)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
