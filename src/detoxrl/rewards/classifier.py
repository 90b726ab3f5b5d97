"""What does a hate or toxicity classifier say of a response?"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from detoxrl.errors import InputError, require
from detoxrl.models.linear import FastLinear
from detoxrl.models.loading import load_pretrained, require_vocabulary
from detoxrl.models.policy import length_batches
from detoxrl.runtime.hub import fetch

TOKENS = 512
"""Most tokens, padding among them, that a CPU reads at once: more is no faster there, and wastes padding."""
Texts = Sequence[str] | Sequence[tuple[str, str]]  # or pairs of premise, cut where too long, and hypothesis
# Texts that every classifier worth using tells apart; the check runs before training.
CIVIL_PROBE = "Thank you, that is very kind of you."
TOXIC_PROBE = "You are a stupid idiot!"
# A difference in probability below this is no ground to call a label reversed.
_CLEAR = 0.1
_REMEDY = "give a sequence classifier's folder or hub id"


def is_multi_label(config: PreTrainedConfig) -> bool:
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


class Reader:
    """A model that reads texts or pairs of them: each distinct one once, with others of its length."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, most: int | None = None) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        # These count positions from behind padding's on.
        late = {"roberta", "mpnet", "camembert"} & {*model.config.model_type.split("-")}
        positions = model.config.to_dict().get("max_position_embeddings", 512)
        positions -= model.config.pad_token_id + 1 if late else 0
        self.max_length = min(tokenizer.model_max_length, positions, most or 512)
        self._cut: dict[str, Any] = {"truncation": True, "max_length": self.max_length, "padding_side": "right"}

    @torch.no_grad()
    def read(
        self, texts: Texts, take: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], tokens: int | None = None
    ) -> torch.Tensor:
        """Return on the CPU a row for each text: what `take` makes of the model's first output and a batch's mask."""
        distinct: list[Any] = list(set(texts))
        ordered = sorted(zip(map(len, self.tokenizer(distinct, **self._cut).input_ids), distinct, strict=True))
        tokens = tokens or (TOKENS if self.model.device.type == "cpu" else 32 * TOKENS)
        rows = []
        with FastLinear():
            for some in length_batches([length for length, _ in ordered], tokens):
                batch = [text for _, text in ordered[some]]
                read = self.tokenizer(batch, return_tensors="pt", padding=True, **self._cut).to(self.model.device)
                rows.append(take(self.model(**read)[0], read["attention_mask"]).cpu())
        where = {text: i for i, (_, text) in enumerate(ordered)}
        return torch.cat(rows)[[where[text] for text in texts]]


class Classifier(Reader):
    """A sequence classifier with its toxic label, and its good one where it has one, found by name."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        toxic: int,
        good: int | None = None,
        kind: str = "logit",
    ) -> None:
        super().__init__(model, tokenizer)
        self.toxic, self.good, self.kind = toxic, good, kind

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
        """Return the score (B,) of each response alone, as `class_scores`. Prompts are not read."""
        return class_scores(self.logits(responses), self.kind, self.toxic, self.good, is_multi_label(self.model.config))

    def toxicity(self, texts: Texts) -> torch.Tensor:
        """Return the probability in [0, 1] of the toxic label, shape (B,)."""
        return self.probabilities(texts)[:, self.toxic]

    def probabilities(self, texts: Texts) -> torch.Tensor:
        """Return the probability (B, labels) of each label: of each alone where a text may have several labels."""
        logits = self.logits(texts)
        return logits.sigmoid() if is_multi_label(self.model.config) else logits.softmax(-1)

    def logits(self, texts: Texts, tokens: int | None = None) -> torch.Tensor:
        """Return the logits (B, labels) on the CPU, of batches of at most `tokens`."""
        return self.read(texts, lambda logits, _: logits.float(), tokens)


def load_reader(
    kind: Any, source: str, field: str, remedy: str, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model of a folder or hub id, of one of transformers' auto classes, in fp32, and its tokenizer.

    Raises InputError when it cannot be read, lacks weights, or does not fit its tokenizer.
    """
    given = (fetch(source, field), source, field, remedy)
    model, info = load_pretrained(kind, *given, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
    tokenizer = load_pretrained(AutoTokenizer, *given)
    # A pooler is of no use to an encoder of sentences, so it may be lacking there.
    missing = [name for name in sorted(info["missing_keys"]) if kind is not AutoModel or "pooler." not in name]
    require(not missing, field, source, f"lacks weights, {''.join(missing[:1])} for one", remedy)
    require(tokenizer.pad_token is not None, field, source, "has a tokenizer without padding", remedy)
    require_vocabulary(field, source, tokenizer, model)
    return model.requires_grad_(False).to(device), tokenizer


def load_classifier(
    source: str, field: str, labels: dict[str, str], device: torch.device, kind: str = "logit", probed: bool = True
) -> Classifier:
    """Return the classifier of a folder or hub id, `probed` with one civil and one toxic sentence.

    `labels` maps the setting that names a label to the label, the toxic one first, then the good one if there is one.
    Raises InputError when the model cannot be read, is no classifier, lacks a label, or has one reversed.
    """
    model, tokenizer = load_reader(AutoModelForSequenceClassification, source, field, _REMEDY, device)
    toxic, *good = (label_index(model.config, setting, label) for setting, label in labels.items())
    classifier = Classifier(model, tokenizer, toxic, good[0] if good else None, kind)
    if probed:
        probe(classifier, labels)
    return classifier


def load_classifier_shapes(source: str, field: str, labels: dict[str, str]) -> PreTrainedModel:
    """Return the classifier of a folder or hub id on the meta device, its labels found: no weight is read."""
    config = load_pretrained(AutoConfig, fetch(source, field, weights=False), source, field, _REMEDY)
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
