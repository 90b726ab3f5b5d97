"""How does a hate or toxicity classifier score a response?"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from detoxrl.errors import InputError, require
from detoxrl.models.loading import explain_loading, load_pretrained
from detoxrl.models.reader import Reader, Texts, load_reader
from detoxrl.models.types import Prompt
from detoxrl.rewards.calibration import Isotonic, read_isotonic, to_log_odds
from detoxrl.rewards.names import label_index, require_labels
from detoxrl.runtime.hub import fetch

# Every usable classifier tells these sentences apart; they are tried before training.
CIVIL_PROBE = "Thank you, that is very kind of you."
TOXIC_PROBE = "You are a stupid idiot!"
# What stands for an output of 0 or below by a regression, whose log-odds would be infinite.
_LEAST_PROBABILITY = 1e-6
# How far an output of a regression to [0, 1] may leave it.
_OVERSHOOT = 0.25
# How far the outputs for a text may differ when a longer one is read beside it, relative to the largest.
_SAME_IN_BATCH = 1e-3
_REVERSED_BY = 0.1  # A label counts as reversed only when its probabilities differ by more than this.
_MANY_TOKENS = 10_000  # Two sentences are one batch.
_REMEDY = "give the folder or hub id of a sequence classifier"


def is_multi_label(config: PreTrainedConfig) -> bool:
    """Return whether a text may have several labels: each has a sigmoid, instead of one softmax over all."""
    return bool(config.num_labels == 1 or config.problem_type == "multi_label_classification")


def class_scores(
    logits: torch.Tensor, kind: str, toxic: int | None, good: int | None, multi_label: bool
) -> torch.Tensor:
    """Return scores (B,) from logits (B, labels), higher for more civil responses.

    `kind` is a value of reward.score. It is read from the label `good`; without one, "not toxic" takes its place, so
    its log-odds are those of `toxic`, negated. "not_toxicity" is 1 - P(toxic) in either case; without a label `toxic`
    it is P(good). Logits and log-odds are unbounded; a probability saturates near 1, where differences between civil
    responses vanish.
    """
    if toxic is None:
        assert good is not None
        not_toxic = _log_odds(logits, good, multi_label)
    else:
        not_toxic = -_log_odds(logits, toxic, multi_label)
    if kind == "logit":
        return -logits[:, toxic] if good is None else logits[:, good]

    if kind == "not_toxicity":
        return torch.sigmoid(not_toxic)

    log_odds = not_toxic if good is None else _log_odds(logits, good, multi_label)
    if kind == "log_odds":
        return log_odds
    if kind == "log_probability":
        return torch.nn.functional.logsigmoid(log_odds)
    return torch.sigmoid(log_odds)


def _log_odds(logits: torch.Tensor, label: int, multi_label: bool) -> torch.Tensor:
    """Return log(p / (1 - p)) of one label, (B,). Computing it from p would fail where p rounds to 1."""
    if multi_label:
        return logits[:, label]
    others = [i for i in range(logits.shape[1]) if i != label]
    return logits[:, label] - logits[:, others].logsumexp(-1)


class Classifier(Reader):
    """A sequence classifier with a toxic or a good label, or both, as indices of its outputs.

    `kind` is what `score` returns, a value of reward.score.
    """

    isotonic: Isotonic | None = None
    """What makes probabilities of logits. None: a sigmoid, or a softmax. Scores are read from logits without it,
    because its steps would give many responses the same one."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        toxic: int | None,
        good: int | None = None,
        kind: str = "logit",
    ) -> None:
        super().__init__(model, tokenizer)
        self.toxic = toxic
        self.good = good
        self.kind = kind

    @property
    def gives_probabilities(self) -> bool:
        """Whether the only output is the toxicity itself, as of a regression that was fitted to scores in [0, 1].

        A regression with a good label is a scorer, such as a reward model: its output has no bounds.
        """
        config = self.model.config
        return self.toxic is not None and config.num_labels == 1 and config.problem_type == "regression"

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> torch.Tensor:
        """Return the score (B,) of each response by `class_scores`. The prompts are not read."""
        multi_label = is_multi_label(self.model.config)
        return class_scores(self._unbounded(responses), self.kind, self.toxic, self.good, multi_label)

    def toxicity(self, texts: Texts) -> torch.Tensor:
        """Return the probability (B,) of the toxic label; without one, 1 less that of the good label."""
        probabilities = self.probabilities(texts)
        return 1 - probabilities[:, self.good] if self.toxic is None else probabilities[:, self.toxic]

    def probabilities(self, texts: Texts) -> torch.Tensor:
        """Return the probability (B, labels) of each label; rows sum to 1 unless a text may have several labels."""
        logits = self._unbounded(texts)
        multi_label = is_multi_label(self.model.config)
        if self.isotonic is None:
            return logits.sigmoid() if multi_label else logits.softmax(-1)

        log_odds = to_log_odds(logits.double().numpy(), "scores" if multi_label else "classes")
        return torch.from_numpy(self.isotonic(log_odds, sums_to_one=not multi_label)).float()

    def _unbounded(self, texts: Texts) -> torch.Tensor:
        """Return the logits (B, labels); of a regression, those whose sigmoid its outputs are."""
        outputs = self.logits(texts)
        if not self.gives_probabilities:
            return outputs
        return torch.logit(outputs, eps=_LEAST_PROBABILITY)

    def logits(self, texts: Texts, tokens: int | None = None) -> torch.Tensor:
        """Return the logits (B, labels) in fp32 on the CPU; `tokens` is the maximum number of tokens in a batch."""
        return self.read(texts, lambda logits, _: logits.float(), tokens)


def load_classifier(
    source: str,
    field: str,
    toxic: Mapping[str, str],
    device: torch.device,
    good: Mapping[str, str] | None = None,
    kind: str = "logit",
) -> Classifier:
    """Return the classifier of a folder or hub id, with its labels tried by `probe`.

    `toxic` and `good` hold the label of toxic and of civil text, each by the setting that names it; one of them may be
    missing. Raises InputError when the model cannot be loaded, is not a classifier, lacks a label, or has one reversed.
    """
    classifier = load_unprobed_classifier(source, field, toxic, device, good)
    classifier.kind = kind
    _require_sound(classifier, field, source)
    probe(classifier, toxic, good or {})
    return classifier


def load_unprobed_classifier(
    source: str, field: str, toxic: Mapping[str, str], device: torch.device, good: Mapping[str, str] | None = None
) -> Classifier:
    """Return the classifier of a folder or hub id, as `load_classifier`, whose labels may mean anything."""
    good = good or {}
    model, tokenizer = load_reader(source, field, _REMEDY, device)
    id2label: Any = model.config.id2label
    require_labels(id2label, {**toxic, **good})
    classifier = Classifier(model, tokenizer, _index(id2label, toxic), _index(id2label, good))
    classifier.isotonic = read_isotonic(Path(fetch(source, field, weights=False)), id2label, field, source)
    return classifier


def _index(id2label: Any, label_by_setting: Mapping[str, str]) -> int | None:
    """Return the output of the label that a setting names; None without a label."""
    indices = [label_index(id2label, setting, label) for setting, label in label_by_setting.items()]
    return indices[0] if indices else None


def load_classifier_shapes(source: str, field: str, labels: Mapping[str, str]) -> PreTrainedModel:
    """Return the classifier of a folder or hub id on the meta device: its shapes, without reading weights.

    `labels` holds all labels by the settings that name them. Raises InputError as `load_classifier`, except for
    reversed labels.
    """
    folder = fetch(source, field, weights=False)
    config = load_pretrained(AutoConfig, folder, source, field, _REMEDY)
    require_labels(config.id2label, labels)

    with torch.device("meta"), explain_loading(source, field, _REMEDY):
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    model.eval()
    return model


def _require_sound(classifier: Classifier, field: str, source: str) -> None:
    """Raise InputError unless a classifier gives a text the same outputs in every batch, and those of its kind."""
    alone = classifier.logits([CIVIL_PROBE])[0]
    beside = classifier.logits([CIVIL_PROBE, f"{TOXIC_PROBE} {CIVIL_PROBE}"], tokens=_MANY_TOKENS)[0]
    difference = float((alone - beside).abs().max())
    allowed = _SAME_IN_BATCH * max(1.0, float(alone.abs().max()))
    rule = f"gives a text other outputs when a longer one is read beside it, by up to {difference:.2g}"
    remedy = "name another classifier, or save it with the tokenizer and padding it was trained with"
    require(difference < allowed, field, source, rule, remedy)

    if classifier.gives_probabilities:
        outputs = classifier.logits([CIVIL_PROBE, TOXIC_PROBE])
        lowest, highest = float(outputs.min()), float(outputs.max())
        rule = f"is a regression whose outputs, {lowest:.2f} and {highest:.2f} for two sentences, are no probabilities"
        is_probability = lowest >= -_OVERSHOOT and highest <= 1 + _OVERSHOOT
        remedy = "remove problem_type from its config.json if they are log-odds"
        require(is_probability, field, source, rule, remedy)


def probe(classifier: Classifier, toxic: Mapping[str, str], good: Mapping[str, str]) -> None:
    """Raise InputError when a civil and a toxic sentence show that a label is reversed.

    `toxic` and `good` are as in `load_classifier`.
    """
    on_civil, on_toxic = classifier.probabilities([CIVIL_PROBE, TOXIC_PROBE])
    # The good label comes first: if both are reversed, they were exchanged.
    for setting, label in good.items():
        civil, rude = float(on_civil[classifier.good]), float(on_toxic[classifier.good])
        if rude - civil > _REVERSED_BY:
            raise _reversed(setting, label, civil, rude, "civil")

    for setting, label in toxic.items():
        civil, rude = float(on_civil[classifier.toxic]), float(on_toxic[classifier.toxic])
        if civil - rude > _REVERSED_BY:
            raise _reversed(setting, label, civil, rude, "toxic")


def _reversed(setting: str, label: str, on_civil: float, on_toxic: float, meaning: str) -> InputError:
    """Return the error for a label with these probabilities for the civil and the toxic sentence."""
    rule = f"is reversed: probability {on_civil:.2f} for a civil sentence, {on_toxic:.2f} for a toxic one"
    return InputError(setting, label, rule, f"name the label that means {meaning}")
