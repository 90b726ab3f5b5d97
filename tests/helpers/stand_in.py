"""Repositories for a stand-in hub: tiny random models and generated dialogues under the names in the recipes."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from chat_templates import Family, chat_tokenizer
from detoxrl.data.embedded.corpus import generate_rows
from detoxrl.models.loading import save_base, scratch_tokenizer

HATE = "facebook/roberta-hate-speech-dynabench-r4-target"
TOXIC = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")
UNBIASED = ("toxicity", "severe_toxicity", "obscene", "identity_attack", "insult", "threat", "sexual_explicit", "male",
            "female", "homosexual_gay_or_lesbian", "christian", "jewish", "muslim", "black", "white",
            "psychiatric_or_mental_illness")  # fmt: skip
HEADS = {
    HATE: ("nothate", "hate"), "unitary/toxic-bert": TOXIC, "unitary/unbiased-toxic-roberta": UNBIASED,
    "s-nlp/roberta_toxicity_classifier": ("neutral", "toxic"),
}  # fmt: skip
SIZES = {"small": 32, "base": 48, "large": 64}
DATA = ("knkarthick/dialogsum", "knkarthick/samsum")


def stand_in(folder: Path, rows: int = 160) -> dict[str, Path]:
    """Create every repository below `folder` and return its path by name; names of data sets begin with `datasets/`."""
    texts = [row.text for row in generate_rows(0, {"train": 200})["train"]]
    tokenizer = scratch_tokenizer([*texts, "#Person1#: #Person2#: Summarize the following conversation."], 400)
    repositories = {}
    for size, width in SIZES.items():
        repositories[f"google/flan-t5-{size}"] = folder / f"flan-t5-{size}"
        save_base(_t5(len(tokenizer), width), tokenizer, folder / f"flan-t5-{size}")

    for name, labels in HEADS.items():
        repositories[name] = folder / name
        _classifier(name, labels, len(tokenizer)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    for name in DATA:
        repositories[f"datasets/{name}"] = folder / "datasets" / name
        _write_csv(repositories[f"datasets/{name}"], rows)
    return repositories


def _t5(vocabulary: int, width: int) -> PreTrainedModel:
    torch.manual_seed(width)
    config = T5Config(
        vocab_size=vocabulary, d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=4, dropout_rate=0.1,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0, pad_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def _classifier(name: str, labels: tuple[str, ...], vocabulary: int) -> PreTrainedModel:
    torch.manual_seed(len(labels))
    settings = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 514,
        "pad_token_id": 0,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        "problem_type": "multi_label_classification" if len(labels) > 2 else None,
    }
    if "roberta" in name:
        return RobertaForSequenceClassification(RobertaConfig(**settings, type_vocab_size=1))
    return BertForSequenceClassification(BertConfig(**settings))


def _write_csv(folder: Path, rows: int) -> None:
    """Write the splits with the columns of the real sets; every dialogue has at least 200 characters, as theirs do."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    generated = generate_rows(1, {"train": 6 * rows, "validation": 200, "test": 200})
    for split, split_rows in generated.items():
        long = [row for row in split_rows if len(row.text) >= 200]
        rng.shuffle(long)
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "dialogue", "summary", "topic"])
            writer.writerows([row.id, row.text, row.references[0], row.topic] for row in long[:rows])


def stand_in_chat(folder: Path, base: Path, family: Family) -> Path:
    """Write a tiny Llama with the chat template of a family and the words of a tiny model; return its folder."""
    tokenizer = chat_tokenizer(base, family)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.2, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def stand_in_toxicity_prompts(folder: Path, rows: int) -> Path:
    """Write prompts in the shape of RealToxicityPrompts: text and toxicity are nested, a few have no toxicity."""
    folder.mkdir(parents=True)
    generated = generate_rows(2, {"train": rows}, "continue")["train"]
    lines = []
    for number, row in enumerate(generated):
        toxicity = None if number % 20 == 0 else (number % 10) / 10
        prompt = {"text": row.text, "toxicity": toxicity, "threat": 0.1}
        continuation = {"text": row.references[0], "toxicity": 0.1, "threat": 0.1}
        lines.append(json.dumps({"prompt": prompt, "continuation": continuation, "challenging": False}) + "\n")
    (folder / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def stand_in_paradetox(folder: Path, rows: int) -> Path:
    """Write pairs in the shape of ParaDetox; every third source has two rewrites."""
    folder.mkdir(parents=True)
    with (folder / "train.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["en_toxic_comment", "en_neutral_comment"])
        for number, row in enumerate(generate_rows(3, {"train": rows}, "rewrite")["train"]):
            source = f"{row.text} Case {number}."
            writer.writerow([source, row.references[0]])
            if number % 3 == 0:
                writer.writerow([source, f"{row.references[0]} Again."])
    return folder


def stand_in_encoder(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write a tiny sentence encoder as sentence-transformers has it."""
    torch.manual_seed(1)
    settings = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), hidden_size=16, **settings)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    kind = "sentence_transformers.models"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{kind}.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{kind}.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder
