"""Who says how toxic a text is?

`load_judge` is the one place where the name of a judge becomes a judge. torch is imported for classifiers only.
"""

import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from detoxrl.config.judges import (
    EMBEDDED,
    JUDGES,
    PERSPECTIVE,
    PERSPECTIVE_SCORES,
    PROFANITY_CHECK,
    is_named_judge,
)
from detoxrl.config.names import did_you_mean
from detoxrl.config.schema import without_revision
from detoxrl.config.sources import split_label
from detoxrl.errors import InputError, require
from detoxrl.evaluation.statistics import Floats

if TYPE_CHECKING:
    from detoxrl.models.reader import Texts
    from detoxrl.rewards.classifier import Classifier

Judge = Callable[[Sequence[str]], Floats]  # toxicity in [0, 1] of each of N texts, (N,)
Item = TypeVar("Item", bound=Hashable)


class JudgeSource(NamedTuple):
    """Where a judge comes from, and which settings say so."""

    source: str  # One of JUDGES, or the folder or hub id of a classifier.
    label: str  # The classifier's toxic label, or a score of perspective-minilm; not read for the others in JUDGES.
    field: str
    label_field: str


def judge_source(value: str, field: str, remedy: str) -> JudgeSource:
    """Return the judge that `field` names: one of JUDGES, perspective-minilm=SCORE, or SOURCE=LABEL.

    Raises InputError for anything else, with `remedy` unless the value is close to a name in JUDGES.
    """
    if value in JUDGES:
        return JudgeSource(value, "", field, field)

    source, label = split_label(value)
    is_score = source != PERSPECTIVE or is_named_judge(value)
    scores = f"choose from {', '.join(PERSPECTIVE_SCORES)}"
    require(is_score, field, value, f"is not a score of {PERSPECTIVE}", did_you_mean(label, PERSPECTIVE_SCORES, scores))
    rule = f"is neither {' nor '.join(JUDGES)} nor SOURCE=LABEL"
    require(bool(source and label), field, value, rule, did_you_mean(value, JUDGES, remedy))
    if value == f"{PERSPECTIVE}={PERSPECTIVE_SCORES[0]}":
        label = ""  # What it is without a label.
    return JudgeSource(source, label, field, field)


def load_judges(judges: Iterable[JudgeSource]) -> dict[str, Judge]:
    """Return the judges by the names that results call them, in the given order.

    Raises InputError when the package of one is missing, or when a classifier does not exist or has no such label.
    """
    judges = list(judges)
    for judge in judges:
        # A classifier that does not exist is reported before another one takes its time to load.
        if judge.source not in JUDGES:
            _require_source(judge)

    by_name: dict[str, Judge] = {}
    for judge in judges:
        name = _judge_name(judge.source)
        is_other_score = judge.source == PERSPECTIVE and judge.label
        if is_other_score or (judge.label and name in by_name):
            name = f"{name} ({judge.label})"
        rule = f"is called {name} in results, as another judge is"
        require(name not in by_name, judge.field, judge.source, rule, "rename the folder, or leave one of them out")
        by_name[name] = load_judge(judge)
    return by_name


def load_judge(judge: JudgeSource) -> Judge:
    """Return the judge of a source. Raises InputError as `load_judges` does."""
    if judge.source == PROFANITY_CHECK:
        profanity = profanity_judge()
        if profanity is None:
            raise InputError(judge.field, judge.source, "is not installed", "pip install 'detoxrl[offline]'")
        return profanity

    if judge.source == PERSPECTIVE:
        return _perspective_judge(judge)

    # Imported here because torch takes seconds and the other judges do not need it.
    from detoxrl.rewards.classifier import load_classifier
    from detoxrl.rewards.names import LABELS
    from detoxrl.runtime.shipped import MODELS
    from detoxrl.runtime.world import current_world

    source, label = judge.source, judge.label
    if source == EMBEDDED:
        source, label = str(MODELS / "reward"), LABELS[1]
    labels = {judge.label_field: label}
    return classifier_judge(load_classifier(source, judge.field, labels, current_world().device))


def _perspective_judge(judge: JudgeSource) -> Judge:
    # Imported here because torch takes seconds and the other judges do not need it.
    from detoxrl.evaluation.perspective import perspective_scores

    scores = perspective_scores(judge.field)
    column = PERSPECTIVE_SCORES.index(judge.label or PERSPECTIVE_SCORES[0])
    return lambda texts: scores(texts)[:, column]


def _require_source(classifier: JudgeSource) -> None:
    """Raise InputError unless the folder or hub id of a classifier exists."""
    # Imported here because it takes a tenth of a second and the other judges do not need it.
    from detoxrl.runtime.hub import fetch

    fetch(classifier.source, classifier.field, weights=False)


def _judge_name(source: str) -> str:
    """Return what results call a judge: the name of its folder, or the hub id."""
    path = Path(without_revision(source))
    return path.name if path.is_absolute() else str(path)


def memoized(rate: Callable[[Sequence[Item]], Floats]) -> Callable[[Sequence[Item]], Floats]:
    """Return a function like `rate` that rates each distinct item only once, over all its calls."""
    ratings: dict[Item, float] = {}

    def rate_once(items: Sequence[Item]) -> Floats:
        new = [item for item in dict.fromkeys(items) if item not in ratings]
        if new:
            ratings.update(zip(new, rate(new).tolist(), strict=True))
        return np.array([ratings[item] for item in items])

    return rate_once


def classifier_judge(classifier: "Classifier") -> "Callable[[Texts], Floats]":
    """Return a judge that rates texts, or pairs of texts, by the probability of a classifier's toxic label."""

    def judge(texts: "Texts") -> Floats:
        probabilities: Floats = classifier.toxicity(texts).double().numpy()
        return probabilities

    return judge


def profanity_judge() -> Judge | None:
    """Return alt-profanity-check as a judge, or None where the package is not installed."""
    try:
        # Its import warns about versions of scikit-learn.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from profanity_check import predict_prob
    except ImportError:
        return None

    def judge(texts: Sequence[str]) -> Floats:
        return np.asarray(predict_prob(list(texts)), dtype=np.float64)

    return judge
