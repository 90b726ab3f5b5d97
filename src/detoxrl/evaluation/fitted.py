"""How well does a fitted classifier rate held-out texts?"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import expit, log_expit, softmax

from detoxrl.data.labelled import LabelKind
from detoxrl.evaluation.classifier_metrics import (
    Rated,
    by_group,
    calibration_error,
    measured,
    reliability,
    share_correct,
)
from detoxrl.evaluation.statistics import Floats
from detoxrl.rewards.calibration import Affine, Isotonic, to_log_odds

Json = dict[str, Any]  # A part of fit.json.
# Resamples of the bootstrap intervals.
_RESAMPLES = 1000
# A label means toxic or civil text only where the probabilities of two such sentences differ by more than this: a run
# refuses labels that are reversed by as much.
_CLEARLY = 0.1


def to_probabilities(logits: Floats, kind: LabelKind, calibration: Affine | Isotonic | None) -> Floats:
    """Return the probability (N, L) of each output after calibration. `logits` are those of the classifier without it.

    Of pairs, they are the differences (N, 1) between chosen and rejected.
    """
    if isinstance(calibration, Isotonic):
        return calibration(to_log_odds(logits, kind), sums_to_one=kind == "classes")

    calibrated = logits if calibration is None else calibration(logits)
    probabilities: Floats = softmax(calibrated, axis=1) if kind == "classes" else expit(calibrated)
    return probabilities


def measure_labels(
    labels: Sequence[str], probabilities: Floats, uncalibrated: Floats, targets: Floats, seed: int
) -> Json:
    """Return the metrics of each output, by its label, and its reliability; probabilities and targets are (N, L).

    Examples without a label are left out of its metrics.
    """
    results = {}
    for number, label in enumerate(labels):
        known = ~np.isnan(targets[:, number])
        rated = Rated(probabilities[known, number], targets[known, number])
        before = Rated(uncalibrated[known, number], targets[known, number])
        result = measured(rated, _RESAMPLES, seed)
        result["ece_before_calibration"] = float(calibration_error(before, np.ones((1, known.sum())))[0])
        result["reliability"] = reliability(rated)
        results[label] = result
    return results


def meaning(labels: Sequence[str], kind: LabelKind, civil: Floats, toxic: Floats) -> Json:
    """Return the labels by which a reward reads the classifier, None where that is not clear, and why.

    `civil` and `toxic` (L,) are the probabilities of the labels for a civil and for a toxic sentence. The toxic label
    is the first one that rises clearly from the one to the other. The good label is the other of two classes; where
    none rises, the first one that falls.
    """
    rises = [label for label, rise in zip(labels, toxic - civil, strict=True) if rise > _CLEARLY]
    falls = [label for label, rise in zip(labels, toxic - civil, strict=True) if rise < -_CLEARLY]
    has_good = not rises or (kind == "classes" and len(labels) == 2)
    probabilities = zip(labels, civil.tolist(), toxic.tolist(), strict=True)
    return {
        "toxic_label": next(iter(rises), None),
        "good_label": next(iter(falls), None) if has_good else None,
        "probabilities": {label: {"civil": on_civil, "toxic": on_toxic} for label, on_civil, on_toxic in probabilities},
    }


def group_tables(
    labels: Sequence[str], probabilities: Floats, targets: Floats, groups: Sequence[str | None]
) -> dict[str, Json]:
    """Return, for each label, what is known of each group of examples."""
    tables = {}
    for number, label in enumerate(labels):
        known = ~np.isnan(targets[:, number])
        members = [group for group, is_known in zip(groups, known, strict=True) if is_known]
        tables[label] = by_group(Rated(probabilities[known, number], targets[known, number]), members)
    return tables


def class_accuracy(probabilities: Floats, targets: Floats, seed: int) -> Json:
    """Return the share of texts whose likeliest class is theirs, with its interval."""
    correct = probabilities.argmax(1) == targets.argmax(1)
    return share_correct(correct.astype(np.float64), _RESAMPLES, seed)


def measure_pairs(differences: Floats, uncalibrated: Floats, seed: int) -> Json:
    """Return how often the chosen text has the higher score, and how sure the scorer is.

    `differences` (N,) are the calibrated scores of the chosen texts less those of the rejected ones, `uncalibrated`
    those before calibration. `cross_entropy` is the mean of -log P(chosen is better), in nats. `ece` compares the
    probability of the text with the higher score with how often it was the chosen one.
    """
    correct = (np.sign(differences) + 1) / 2
    rated = Rated(expit(np.abs(differences)), correct)
    before = Rated(expit(np.abs(uncalibrated)), correct)
    ones = np.ones((1, len(differences)))
    return {
        "examples": len(differences),
        "accuracy": share_correct(correct, _RESAMPLES, seed),
        "cross_entropy": float(-log_expit(differences).mean()),
        "ece": float(calibration_error(rated, ones)[0]),
        "ece_before_calibration": float(calibration_error(before, ones)[0]),
        "reliability": reliability(rated),
    }
