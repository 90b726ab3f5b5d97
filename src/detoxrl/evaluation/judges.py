"""Who says how toxic a text is?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from detoxrl.config import EvaluationConfig
from detoxrl.errors import InputError
from detoxrl.rewards.classifier import Classifier, load_classifier

Floats = npt.NDArray[np.float64]
Judge = Callable[[Sequence[str]], Floats]
"""Toxicity in [0, 1] of each text, shape (N,)."""


def once_each(judge: Judge) -> Judge:
    """Return the judge that rates each distinct text once."""

    def judged(texts: Sequence[str]) -> Floats:
        distinct, where = np.unique(np.array(texts, dtype=object), return_inverse=True)
        return judge(list(distinct))[where]

    return judged


def classifier_judge(classifier: Classifier) -> Judge:
    """Return the judge that a classifier's toxic label makes; the classifier itself rates each distinct text once."""
    return lambda texts: classifier.toxicity(texts).double().numpy()


def load_judge(config: EvaluationConfig, device: torch.device) -> Judge:
    """Return the primary judge. Raises InputError when its package is missing, or its classifier does not fit."""
    name, field = config.primary_judge, "evaluation.primary_judge"
    if name != "alt-profanity-check":
        return classifier_judge(load_classifier(name, field, {"evaluation.judge_label": config.judge_label}, device))
    judge = profanity_judge()
    if judge is None:
        raise InputError(field, name, "is not installed", "pip install 'detoxrl[offline]'")
    return judge


def profanity_judge() -> Judge | None:
    """Return alt-profanity-check where it is installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from profanity_check import predict_prob
    except ImportError:
        return None
    return once_each(lambda texts: np.asarray(predict_prob(list(texts)), dtype=np.float64))
