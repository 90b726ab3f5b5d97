"""How does a classifier or encoder read many texts fast?"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.tokenization_utils_base import LARGE_INTEGER

from detoxrl.errors import require
from detoxrl.models.encoder import load_adapted
from detoxrl.models.files import adapter_base, has_tokenizer
from detoxrl.models.linear import FastLinear
from detoxrl.models.loading import load_pretrained, name_padding, require_vocabulary
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
        self._truncation: dict[str, Any] = {"truncation": True, "max_length": self.max_length, "padding_side": "right"}

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
        lengths, ordered = self._by_length(texts)

        rows = []
        with FastLinear():
            for batch in length_batches(lengths, batch_tokens):
                inputs = self.tokenizer(ordered[batch], return_tensors="pt", padding=True, **self._truncation).to(
                    device
                )
                output = self.model(**inputs)[0]
                rows.append(reduce(output, inputs["attention_mask"]).cpu())

        row_of = {text: row for row, text in enumerate(ordered)}
        return torch.cat(rows)[[row_of[text] for text in texts]]

    def _by_length(self, texts: Texts) -> tuple[list[int], list[Any]]:
        """Return the distinct texts, shortest first, and their lengths in tokens."""
        distinct: list[Any] = list(set(texts))
        lengths = [len(ids) for ids in self.tokenizer(distinct, **self._truncation).input_ids]
        ordered = sorted(zip(lengths, distinct, strict=True))
        return [length for length, _ in ordered], [text for _, text in ordered]


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
