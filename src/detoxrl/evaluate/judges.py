"""Who says how toxic a text is?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from detoxrl.errors import InputError

Floats = npt.NDArray[np.float64]
Judge = Callable[[Sequence[str]], Floats]
"""Toxicity in [0, 1] of each text, shape (N,)."""


def once_each(judge: Judge) -> Judge:
    """Return the judge that rates each distinct text once."""

    def judged(texts: Sequence[str]) -> Floats:
        distinct, where = np.unique(np.array(texts, dtype=object), return_inverse=True)
        return judge(list(distinct))[where]

    return judged


def load_judge(name: str) -> Judge:
    """Return the judge of that name. Raises InputError when its package is missing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from profanity_check import predict_prob
    except ImportError as error:
        remedy = "pip install 'detoxrl[offline]'"
        raise InputError("evaluation.primary_judge", name, "is not installed", remedy) from error
    return once_each(lambda texts: np.asarray(predict_prob(list(texts)), dtype=np.float64))
