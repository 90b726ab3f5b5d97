"""What does a hate or toxicity classifier say of a response?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from detoxrl.errors import InputError, StorageError, first_line, require
from detoxrl.hub import fetched
from detoxrl.policy.backbone import require_words

BATCH = 128
"""Most texts that a classifier reads at once."""
# Texts that every classifier worth using tells apart; the check runs before training.
CIVIL_PROBE = "Thank you, that is very kind of you."
TOXIC_PROBE = "You are a stupid idiot!"
# A difference in probability below this is no ground to call a label reversed.
_CLEAR = 0.1


def several(config: PreTrainedConfig) -> bool:
    """Return whether a text may have several labels, so that each has its own sigmoid."""
    return bool(config.num_labels == 1 or config.problem_type == "multi_label_classification")


def class_scores(logits: torch.Tensor, kind: str, toxic: int, good: int | None, apart: bool) -> torch.Tensor:
    """Return scores (B,) of logits (B, labels): what `kind`, a value of reward.score, says of the label `good`.

    `apart`: each label has a sigmoid of its own; else they share a softmax. Without a good
    label its log-odds are those against the toxic one. Logits and log-odds know no bound; a probability of a text that
    is civil enough lies so near 1 that differences vanish.
    """
    against = -_log_odds(logits, toxic, apart)
    log_odds = against if good is None else _log_odds(logits, good, apart)
    if kind == "logit":
        return -logits[:, toxic] if good is None else logits[:, good]
    if kind == "log_odds":
        return log_odds
    if kind == "log_probability":
        return torch.nn.functional.logsigmoid(log_odds)
    return torch.sigmoid(log_odds if kind == "probability" else against)


def _log_odds(logits: torch.Tensor, label: int, apart: bool) -> torch.Tensor:
    """Return log p / (1 - p) of one label, (B,), without a detour by p, which rounds to 1."""
    others = [i for i in range(logits.shape[1]) if i != label]
    return logits[:, label] if apart else logits[:, label] - logits[:, others].logsumexp(-1)


class Classifier:
    """A sequence classifier with its toxic label, and its good one where it has one, found by name."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        toxic: int,
        good: int | None = None,
        kind: str = "logit",
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.toxic = toxic
        self.good = good
        self.kind = kind
        positions = model.config.to_dict().get("max_position_embeddings", 512)
        if "roberta" in model.config.model_type:  # counts positions from its padding index on
            positions -= model.config.pad_token_id + 1
        self.max_length = min(tokenizer.model_max_length, positions, 512)

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
        """Return the score (B,) of each response alone, as `class_scores`. Prompts are not read."""
        return class_scores(self.logits(responses), self.kind, self.toxic, self.good, several(self.model.config))

    def toxicity(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the probability in [0, 1] of the toxic label, shape (B,)."""
        return self.probabilities(texts)[:, self.toxic]

    def probabilities(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the probability (B, labels) of each label: of each alone where a text may have several labels."""
        logits = self.logits(texts)
        return logits.sigmoid() if several(self.model.config) else logits.softmax(-1)

    @torch.no_grad()
    def logits(self, texts: Sequence[str], batch_size: int = BATCH) -> torch.Tensor:
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


def load_classifier(
    source: str, field: str, labels: dict[str, str], device: torch.device, kind: str = "logit"
) -> Classifier:
    """Return the classifier of a folder or hub id, probed with one civil and one toxic sentence.

    `labels` maps the setting that names a label to the label, the toxic one first, then the good one if there is one.
    Raises InputError when the model cannot be read, is no classifier, lacks a label, or has one reversed.
    """
    folder = fetched(source, field)
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except SafetensorError as error:
        raise StorageError(f"the weights of {source} are broken: {first_line(error)}") from error
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        reason = f"cannot be loaded: {first_line(error)}"
        raise InputError(field, source, reason, "give a sequence classifier's folder or hub id") from error
    missing = sorted(info["missing_keys"])
    rule = f"lacks the weights of a classifier, {missing[0]} for one" if missing else ""
    require(not missing, field, source, rule, "give a model trained to classify")
    rows = model.get_input_embeddings().num_embeddings
    rule = f"has a tokenizer of {len(tokenizer)} tokens, but embeddings for {rows}"
    require(len(tokenizer) <= rows, field, source, rule, "give the tokenizer the model was trained with")
    require_words(field, source, tokenizer)
    toxic, *good = (label_index(model.config, setting, label) for setting, label in labels.items())
    classifier = Classifier(model.to(device), tokenizer, toxic, good[0] if good else None, kind)
    probe(classifier, labels)
    return classifier


def bare_classifier(source: str, field: str, labels: dict[str, str]) -> PreTrainedModel:
    """Return the classifier of a folder or hub id on the meta device, its labels found: no weight is read."""
    folder = fetched(source, field, weights="")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        rule = f"cannot be loaded: {first_line(error)}"
        raise InputError(field, source, rule, "give a sequence classifier's folder or hub id") from error
    for setting, label in labels.items():
        label_index(config, setting, label)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    model.eval()
    return model


def label_index(config: PreTrainedConfig, field: str, label: str) -> int:
    """Return the number of a label, any case. Raises InputError, naming those there are."""
    labels = {str(name).lower(): index for index, name in (config.id2label or {}).items()}
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
