"""Who says how toxic a text is?"""

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np

from detoxrl.evaluation.statistics import Floats
from detoxrl.rewards.classifier import Classifier, Texts

Judge = Callable[[Sequence[str]], Floats]  # toxicity in [0, 1] of each text, shape (N,)
Item = TypeVar("Item", bound=Hashable)


def memoized(rate: Callable[[Sequence[Item]], Floats]) -> Callable[[Sequence[Item]], Floats]:
    """Return what rates each distinct item once, however often it is asked."""
    known: dict[Item, float] = {}

    def rated(items: Sequence[Item]) -> Floats:
        new = [item for item in dict.fromkeys(items) if item not in known]
        if new:
            known.update(zip(new, rate(new).tolist(), strict=True))
        return np.array([known[item] for item in items])

    return rated


def classifier_judge(classifier: Classifier) -> Callable[[Texts], Floats]:
    """Return the judge that a classifier's toxic label makes; it reads pairs of texts too."""
    return lambda texts: classifier.toxicity(texts).double().numpy()


def profanity_judge() -> Judge | None:
    """Return alt-profanity-check where it is installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from profanity_check import predict_prob
    except ImportError:
        return None
    return lambda texts: np.asarray(predict_prob(list(texts)), dtype=np.float64)
