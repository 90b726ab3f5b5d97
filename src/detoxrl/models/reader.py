"""How does a classifier or encoder read many texts fast?"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BatchEncoding,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.tokenization_utils_base import LARGE_INTEGER

from detoxrl.errors import require
from detoxrl.models.encoder import load_adapted
from detoxrl.models.files import adapter_base, has_tokenizer
from detoxrl.models.linear import FastLinear
from detoxrl.models.loading import load_pretrained, name_padding, require_finite, require_vocabulary
from detoxrl.models.policy import length_batches
from detoxrl.runtime.hub import adapts_classifier, fetch

TOKENS = 512
"""Maximum number of tokens, padding included, in a batch on a CPU: a larger one is not faster and pads more."""
_ACCELERATOR_FACTOR = 32  # Batches on an accelerator are this many times larger.
_MAX_LENGTH = 512  # The limit of a text in tokens where tokenizer or model state none.
# These models number positions from the padding id + 1 on, so the first positions are never used.
_OFFSET_POSITIONS = {"roberta", "mpnet", "camembert"}

Texts = Sequence[str] | Sequence[tuple[str, str]]
"""Texts, or pairs of texts such as (premise, hypothesis)."""


class Reader:
    """A model that reads texts or pairs of texts, each distinct one once, in batches of similar length.

    Texts are cut at `max_length` tokens, the limit that the tokenizer states, unless the model has fewer positions. Of
    a pair, the longer text is cut first.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_length = min(_stated_limit(tokenizer), positions_of(model.config))

    @torch.no_grad()
    def read(
        self, texts: Texts, reduce: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], tokens: int | None = None
    ) -> torch.Tensor:
        """Return one row per text, on the CPU.

        `reduce` maps the model's first output for a batch and its attention mask (B, T) to the rows (B, ...).
        `tokens` overrides the maximum number of tokens in a batch.
        """
        device = self.model.device
        batch_tokens = tokens or tokens_at_once(device)
        encoded = self._encoded(texts)
        ordered = sorted(encoded, key=lambda text: (len(encoded[text]["input_ids"]), text))
        lengths = [len(encoded[text]["input_ids"]) for text in ordered]

        rows = []
        with FastLinear():
            for batch in length_batches(lengths, batch_tokens):
                inputs = self._padded([encoded[text] for text in ordered[batch]]).to(device)
                output = self.model(**inputs)[0]
                rows.append(reduce(output, inputs["attention_mask"]).cpu())

        row_of = {text: row for row, text in enumerate(ordered)}
        return torch.cat(rows)[[row_of[text] for text in texts]]

    def _encoded(self, texts: Texts) -> dict[Any, dict[str, list[int]]]:
        """Return what the model reads of each distinct text, by the name of its argument.

        Texts are data: "</s>" in one is five characters. A text without any token is read as an end or padding alone.
        """
        distinct: list[Any] = list(set(texts))
        columns = self.tokenizer(distinct, truncation=True, max_length=self.max_length, split_special_tokens=True)
        encoded = {}
        for number, text in enumerate(distinct):
            encoded[text] = {name: values[number] for name, values in columns.items()}
            if not encoded[text]["input_ids"]:
                stand_in = self.tokenizer.eos_token_id
                ids = [self.tokenizer.pad_token_id if stand_in is None else stand_in]
                encoded[text] = {name: [0] for name in columns} | {"input_ids": ids, "attention_mask": [1]}
        return encoded

    def _padded(self, rows: Sequence[dict[str, list[int]]]) -> BatchEncoding:
        """Return the arguments of the model for a batch, each (B, T)."""
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        return self.tokenizer.pad(columns, padding_side="right", return_tensors="pt")


def tokens_at_once(device: torch.device) -> int:
    """Return the maximum number of tokens, padding included, in a batch on this device."""
    return TOKENS if device.type == "cpu" else _ACCELERATOR_FACTOR * TOKENS


def _stated_limit(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the tokenizer's limit of a text, in tokens. One above LARGE_INTEGER means none in transformers."""
    stated: int = tokenizer.model_max_length
    return stated if stated <= LARGE_INTEGER else _MAX_LENGTH


def positions_of(config: PreTrainedConfig) -> int:
    """Return how many tokens the model has positions for."""
    positions: int = config.to_dict().get("max_position_embeddings", _MAX_LENGTH)
    if _OFFSET_POSITIONS.isdisjoint(config.model_type.split("-")):
        return positions
    padding: int = config.pad_token_id
    return positions - (padding + 1)


def load_reader(
    source: str, field: str, remedy: str, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the classifier of a folder or hub id in fp32, a LoRA merged into its base, and its tokenizer.

    A LoRA without a tokenizer has that of its base. Raises InputError, with `remedy`, when either cannot be loaded,
    lacks weights, or does not fit the other.
    """
    folder = fetch(source, field)
    tokenizer_folder = folder
    if adapts_classifier(Path(folder)):
        model = load_adapted(Path(folder), source, field, remedy)
        if not has_tokenizer(Path(folder)):
            tokenizer_folder = fetch(adapter_base(Path(folder), field, source), field, weights=False)
    else:
        model = _load_whole(folder, source, field, remedy)
    tokenizer = load_pretrained(AutoTokenizer, tokenizer_folder, source, field, remedy)

    require(tokenizer.pad_token is not None, field, source, "has a tokenizer without a padding token", remedy)
    require_vocabulary(field, source, tokenizer, model)
    require_finite(model, field, source)
    name_padding(model, tokenizer)
    return model.requires_grad_(False).to(device), tokenizer  # type: ignore[arg-type]


def _load_whole(folder: str, source: str, field: str, remedy: str) -> PreTrainedModel:
    model: PreTrainedModel
    model, info = load_pretrained(
        AutoModelForSequenceClassification,
        folder,
        source,
        field,
        remedy,
        use_safetensors=True,
        dtype=torch.float32,
        output_loading_info=True,
    )
    missing = sorted(info["missing_keys"])
    require(not missing, field, source, f"lacks weights such as {''.join(missing[:1])}", remedy)
    return model
