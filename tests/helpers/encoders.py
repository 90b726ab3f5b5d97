"""Tiny random encoders, and labelled texts that they can learn from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Model,
    RobertaConfig,
    RobertaModel,
)

from detoxrl.data.embedded.corpus import generate_utterances

TOKENIZER = Path(__file__).parent / "tokenizer.json"


def make_encoder(kind: str, folder: Path) -> Path:
    """Write a model of 2 layers with random weights, without a head: bert, roberta, or a causal qwen2 without a
    padding token in its config.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(TOKENIZER), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    template = processors.TemplateProcessing(single="</s> $A </s>", special_tokens=[("</s>", 1)])
    tokenizer.backend_tokenizer.post_processor = template
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "pad_token_id": 0, "max_position_embeddings": 130,
    }  # fmt: skip
    torch.manual_seed(5)
    if kind == "qwen2":
        shape |= {"pad_token_id": None, "num_key_value_heads": 4}
    kinds: dict[str, Any] = {
        "bert": (BertModel, BertConfig), "roberta": (RobertaModel, RobertaConfig), "qwen2": (Qwen2Model, Qwen2Config),
    }  # fmt: skip
    of_model, of_config = kinds[kind]
    model = of_model(of_config(**shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def labelled_rows(size: int) -> list[dict[str, Any]]:
    """Return civil and rude sentences: `rude` is 0 or 1, `score` in [0, 1], `tone` a class, `who` a group."""
    rows = []
    for number, (text, hateful) in enumerate(generate_utterances(1, size)):
        rows.append(
            {
                "text": text,
                "rude": int(hateful),
                "score": 0.9 if hateful else 0.1,
                "tone": "rude" if hateful else "civil",
                "who": "ab"[number % 2],
            }
        )
    return rows


def pair_rows(size: int) -> list[dict[str, Any]]:
    """Return pairs of a civil and a rude sentence."""
    rows = labelled_rows(2 * size + 60)
    civil = [row["text"] for row in rows if not row["rude"]]
    rude = [row["text"] for row in rows if row["rude"]]
    return [{"better": good, "worse": bad} for good, bad in zip(civil[:size], rude[:size], strict=True)]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
