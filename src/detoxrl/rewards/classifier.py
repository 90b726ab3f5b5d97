"""What does a hate or toxicity classifier say of a response?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from detoxrl.errors import InputError, StorageError, first_line, require
from detoxrl.policy.backbone import require_words

# Texts that every classifier worth using tells apart; the check runs before training.
CIVIL_PROBE = "Thank you, that is very kind of you."
TOXIC_PROBE = "You are a stupid idiot!"
# A difference in probability below this is noise: no ground to call a label reversed.
_CLEAR = 0.02


class Classifier:
    """A sequence classifier with its toxic label, and its good one where it is a reward, found by name."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, toxic: int, good: int = -1) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.toxic = toxic
        self.good = good
        positions = model.config.to_dict().get("max_position_embeddings", 512)
        if "roberta" in model.config.model_type:  # counts positions from its padding index on
            positions -= model.config.pad_token_id + 1
        self.max_length = min(tokenizer.model_max_length, positions, 512)

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
        """Return the raw logit of the good label for each response alone, shape (B,). Prompts are not read."""
        return self.logits(responses)[:, self.good]

    def toxicity(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the probability in [0, 1] of the toxic label, shape (B,)."""
        return self.probabilities(texts)[:, self.toxic]

    def probabilities(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the probability (B, labels) of each label: of each alone where a text may have several labels."""
        logits = self.logits(texts)
        several = self.model.config.problem_type == "multi_label_classification" or logits.shape[1] == 1
        return logits.sigmoid() if several else logits.softmax(-1)

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


def load_classifier(source: str, field: str, labels: dict[str, str], device: torch.device) -> Classifier:
    """Return the classifier of a folder or hub id, probed with one civil and one toxic sentence.

    `labels` maps the setting that names a label to the label, the toxic one first, then the good one of a reward.
    Raises InputError when the model cannot be read, is no classifier, lacks a label, or has one reversed.
    """
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(source)
    except SafetensorError as error:
        raise StorageError(f"the weights of {source} are broken: {first_line(error)}") from error
    except (OSError, ValueError, RuntimeError) as error:
        where = "" if Path(source).exists() else "is no folder here and "
        reason = f"{where}cannot be loaded: {first_line(error)}"
        raise InputError(field, source, reason, "give a sequence classifier's folder or hub id") from error
    missing = sorted(info["missing_keys"])
    rule = f"lacks the weights of a classifier, {missing[0]} for one" if missing else ""
    require(not missing, field, source, rule, "give a model trained to classify")
    rows = model.get_input_embeddings().num_embeddings
    rule = f"has a tokenizer of {len(tokenizer)} tokens, but embeddings for {rows}"
    require(len(tokenizer) <= rows, field, source, rule, "give the tokenizer the model was trained with")
    require_words(field, source, tokenizer)
    indices = [_label_index(model, setting, label) for setting, label in labels.items()]
    classifier = Classifier(model.to(device), tokenizer, *indices)
    probe(classifier, labels)
    return classifier


def _label_index(model: PreTrainedModel, field: str, label: str) -> int:
    labels = {str(name).lower(): index for index, name in (model.config.id2label or {}).items()}
    if label.lower() not in labels:
        raise InputError(field, label, "is not a label of the classifier", f"use one of {', '.join(labels)}")
    return int(labels[label.lower()])


def probe(classifier: Classifier, labels: dict[str, str]) -> None:
    """Raise InputError when a label is clearly reversed on a civil and a toxic sentence, or both labels are one."""
    toxic, *good = labels.items()
    civil_text, toxic_text = classifier.probabilities([CIVIL_PROBE, TOXIC_PROBE])
    signs = [*((pair, classifier.good, -1, "civil") for pair in good), (toxic, classifier.toxic, 1, "toxic")]
    for (setting, label), index, sign, meaning in signs:
        low, high = float(civil_text[index]), float(toxic_text[index])
        if sign * (high - low) < -_CLEAR:
            rule = f"is reversed: probability {low:.2f} for a civil sentence, {high:.2f} for a toxic one"
            raise InputError(setting, label, rule, f"name the label that means {meaning}")
    if good and classifier.good == classifier.toxic:
        raise InputError(*toxic, "is the good label too", "name the label that means toxic")
