"""What does a hate or toxicity classifier say of a response?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from detoxrl.errors import InputError

# Texts that every classifier worth using tells apart; the check runs before training.
CIVIL_PROBE = "Thank you, that is very kind of you."
TOXIC_PROBE = "You are a stupid idiot!"


class Classifier:
    """A sequence classifier with its good and its toxic label found by name."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, good_label: str, toxic_label: str
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.good = _label_index(model, "reward.good_label", good_label)
        self.toxic = _label_index(model, "reward.toxic_label", toxic_label)
        self.max_length = min(tokenizer.model_max_length, 512)

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
        """Return the raw logit of the good label for each response alone, shape (B,). Prompts are not read."""
        return self.logits(responses)[:, self.good]

    def toxicity(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the probability in [0, 1] of the toxic label, shape (B,)."""
        return self.logits(texts).softmax(-1)[:, self.toxic]

    @torch.no_grad()
    def logits(self, texts: Sequence[str], batch_size: int = 128) -> torch.Tensor:
        """Return the logits (B, labels) on the CPU, each distinct text run once in length-sorted batches."""
        distinct = sorted(set(texts), key=lambda text: (len(text), text))
        rows = [self._run(distinct[i : i + batch_size]) for i in range(0, len(distinct), batch_size)]
        where = {text: i for i, text in enumerate(distinct)}
        return torch.cat(rows)[[where[text] for text in texts]]

    def _run(self, texts: Sequence[str]) -> torch.Tensor:
        batch = self.tokenizer(
            list(texts), return_tensors="pt", padding=True, truncation=True, max_length=self.max_length
        )
        logits: torch.Tensor = self.model(**batch.to(self.model.device)).logits
        return logits.float().cpu()


def _label_index(model: PreTrainedModel, field: str, label: str) -> int:
    labels = {str(name).lower(): index for index, name in (model.config.id2label or {}).items()}
    if label.lower() not in labels:
        raise InputError(field, label, "is not a label of the classifier", f"use one of {', '.join(labels)}")
    return int(labels[label.lower()])


def load_classifier(source: str, good_label: str, toxic_label: str, device: torch.device) -> Classifier:
    """Return the classifier of a folder or hub id, probed with one civil and one toxic sentence.

    Raises InputError when it cannot be read, lacks a label, or rates the toxic sentence as the better one.
    """
    try:
        model = AutoModelForSequenceClassification.from_pretrained(source, use_safetensors=True, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError("reward.classifier", source, reason, "give a sequence classifier") from error
    classifier = Classifier(model.to(device), tokenizer, good_label, toxic_label)
    probe(classifier, good_label)
    return classifier


def probe(classifier: Classifier, good_label: str) -> None:
    """Raise InputError unless the civil probe scores above the toxic one."""
    civil, toxic = classifier.score(["", ""], [CIVIL_PROBE, TOXIC_PROBE]).tolist()
    if civil <= toxic:
        rule = f"scores a civil sentence ({civil:.2f}) no higher than a toxic one ({toxic:.2f})"
        raise InputError("reward.good_label", good_label, rule, "name the label that means civil")
    if classifier.good == classifier.toxic:
        raise InputError("reward.toxic_label", good_label, "is the good label too", "name the label that means toxic")
