"""Who says how toxic a text is?"""

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np

from detoxrl.evaluation.statistics import Floats
from detoxrl.models.reader import Texts
from detoxrl.rewards.classifier import Classifier

Judge = Callable[[Sequence[str]], Floats]  # toxicity in [0, 1] of each of N texts, (N,)
Item = TypeVar("Item", bound=Hashable)


def memoized(rate: Callable[[Sequence[Item]], Floats]) -> Callable[[Sequence[Item]], Floats]:
    """Return a function like `rate` that rates each distinct item only once, over all its calls."""
    ratings: dict[Item, float] = {}

    def rate_once(items: Sequence[Item]) -> Floats:
        new = [item for item in dict.fromkeys(items) if item not in ratings]
        if new:
            ratings.update(zip(new, rate(new).tolist(), strict=True))
        return np.array([ratings[item] for item in items])

    return rate_once


def classifier_judge(classifier: Classifier) -> Callable[[Texts], Floats]:
    """Return a judge that rates texts, or pairs of texts, by the probability of a classifier's toxic label."""

    def judge(texts: Texts) -> Floats:
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
