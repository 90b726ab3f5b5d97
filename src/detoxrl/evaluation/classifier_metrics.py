"""How well do the probabilities of a classifier fit the labels of people?

A label may be a score in [0, 1]; it counts as positive from 0.5 on. Every metric is computed under weights (R, N), one
row per resample: weights of 1 give the metric itself, the counts of a bootstrap resample give its spread.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from detoxrl.evaluation.statistics import Floats

POSITIVE = 0.5
"""Probabilities and labels from here on are positive."""
PRECISION = 0.9
"""The precision at which recall is given."""
BINS = 10
"""Bins of equal width in which probabilities are compared with labels."""
# Resamples drawn at a time; bounds the memory that many examples take.
_BLOCK = 50

Json = dict[str, Any]  # A part of fit.json.
Metric = Callable[["Rated", Floats], Floats]  # (R, N) weights -> the metric under each row, (R,); NaN if undefined.


@dataclass(frozen=True)
class Rated:
    """Probabilities (N,) and labels (N,) in [0, 1] of one output, with what all metrics need of their order."""

    probabilities: Floats
    labels: Floats

    @property
    def positive(self) -> Floats:
        """1.0 where the label is positive, else 0.0, (N,)."""
        return (self.labels >= POSITIVE).astype(np.float64)

    @property
    def predicted(self) -> Floats:
        """1.0 where the probability is positive, else 0.0, (N,)."""
        return (self.probabilities >= POSITIVE).astype(np.float64)


def auc(rated: Rated, weights: Floats) -> Floats:
    """Return the probability that a positive example is rated above a negative one, where a tie counts one half.

    That is the area under the ROC curve (Hanley and McNeil 1982), (R,).
    """
    order, starts = _tied(rated.probabilities)
    positive = rated.positive[order]
    weights = weights[:, order]
    positives = np.add.reduceat(weights * positive, starts, axis=1)
    negatives = np.add.reduceat(weights * (1 - positive), starts, axis=1)

    below = negatives.cumsum(1) - negatives
    return _ratio((positives * (below + negatives / 2)).sum(1), positives.sum(1) * negatives.sum(1))


def precision(rated: Rated, weights: Floats) -> Floats:
    """Return the share of positive labels among examples with a probability of 0.5 or above, (R,)."""
    return _ratio(weights @ (rated.predicted * rated.positive), weights @ rated.predicted)


def recall(rated: Rated, weights: Floats) -> Floats:
    """Return the share of examples with a probability of 0.5 or above among those with a positive label, (R,)."""
    return _ratio(weights @ (rated.predicted * rated.positive), weights @ rated.positive)


def f1(rated: Rated, weights: Floats) -> Floats:
    """Return the harmonic mean of precision and recall at 0.5, (R,)."""
    return _ratio(2 * weights @ (rated.predicted * rated.positive), weights @ (rated.predicted + rated.positive))


def recall_at_precision(rated: Rated, weights: Floats) -> Floats:
    """Return the highest recall of all thresholds whose precision is PRECISION or more, 0 if there is none, (R,)."""
    order, starts = _tied(rated.probabilities)
    positives = np.add.reduceat((weights * rated.positive)[:, order], starts, axis=1)
    counts = np.add.reduceat(weights[:, order], starts, axis=1)

    # Above each threshold, from the lowest one on.
    true_positives = positives[:, ::-1].cumsum(1)[:, ::-1]
    above = counts[:, ::-1].cumsum(1)[:, ::-1]
    precise = true_positives >= PRECISION * above
    most = np.where(precise, true_positives, 0).max(1)
    return _ratio(most, positives.sum(1))


def spearman(rated: Rated, weights: Floats) -> Floats:
    """Return the correlation of the ranks of probabilities and labels, ties with their mean rank (Spearman 1904)."""
    ranks, other_ranks = _ranks(rated.probabilities, weights), _ranks(rated.labels, weights)
    total = weights.sum(1, keepdims=True)
    centred = ranks - (weights * ranks).sum(1, keepdims=True) / total
    other_centred = other_ranks - (weights * other_ranks).sum(1, keepdims=True) / total

    covariance = (weights * centred * other_centred).sum(1)
    variances = (weights * centred**2).sum(1) * (weights * other_centred**2).sum(1)
    return _ratio(covariance, np.sqrt(variances))


def absolute_error(rated: Rated, weights: Floats) -> Floats:
    """Return the mean distance of probability and label, (R,)."""
    return _ratio(weights @ np.abs(rated.probabilities - rated.labels), weights.sum(1))


def brier(rated: Rated, weights: Floats) -> Floats:
    """Return the mean squared distance of probability and label (Brier 1950, for one of two classes), (R,)."""
    return _ratio(weights @ (rated.probabilities - rated.labels) ** 2, weights.sum(1))


def calibration_error(rated: Rated, weights: Floats) -> Floats:
    """Return the expected calibration error (Naeini et al. 2015; Guo et al. 2017, equation 3), (R,).

    Over BINS bins of equal width: the distance of mean probability and mean label, weighted by the bin's examples.
    """
    bins = _bins(rated.probabilities)
    in_bin = (bins[:, None] == np.arange(BINS)).astype(np.float64)
    gaps = weights @ (in_bin * (rated.probabilities - rated.labels)[:, None])
    return _ratio(np.abs(gaps).sum(1), weights.sum(1))


METRICS: dict[str, Metric] = {
    "auc": auc,
    "f1": f1,
    "precision": precision,
    "recall": recall,
    "recall_at_precision_0.9": recall_at_precision,
    "spearman": spearman,
    "mae": absolute_error,
    "brier": brier,
    "ece": calibration_error,
}
"""The metrics by their names in fit.json."""


def measured(rated: Rated, resamples: int, seed: int) -> Json:
    """Return every metric as value, low and high: the 95 % interval by the percentile bootstrap over examples.

    Each is None where it is not defined, such as the AUC of examples with positive labels only.
    """
    count = len(rated.labels)
    values = {name: metric(rated, np.ones((1, count))) for name, metric in METRICS.items()}
    resampled = _resampled(rated, resamples, np.random.default_rng(seed))

    results = {}
    for name, value in values.items():
        defined = resampled[name][np.isfinite(resampled[name])]
        low, high = np.quantile(defined, [0.025, 0.975]) if len(defined) else (np.nan, np.nan)
        results[name] = {"value": _number(value[0]), "low": _number(low), "high": _number(high)}
    return {"examples": count, "positive": int(rated.positive.sum()), "metrics": results}


def share_correct(correct: Floats, resamples: int, seed: int) -> Json:
    """Return the mean of (N,) as value, low and high: 1 where an answer is right, 0.5 for a tie of a pair, else 0."""
    rng = np.random.default_rng(seed)
    means = [correct[rng.integers(len(correct), size=len(correct))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return {"value": float(correct.mean()), "low": float(low), "high": float(high)}


def by_group(rated: Rated, groups: Sequence[str | None]) -> dict[str, Json]:
    """Return what is known of each group of examples, the largest first; examples without a group are left out.

    `false_positive_rate` is the share of probabilities of 0.5 or above among negative labels. It and `auc` are None
    where a group has no examples for them.
    """
    names = np.array([group or "" for group in groups])
    table: dict[str, Json] = {}
    for group in dict.fromkeys(group for group in groups if group):
        inside = names == group
        members = Rated(rated.probabilities[inside], rated.labels[inside])
        ones = np.ones((1, len(members.labels)))
        negative = 1 - members.positive
        table[group] = {
            "examples": len(members.labels),
            "mean_probability": float(members.probabilities.mean()),
            "mean_label": float(members.labels.mean()),
            "auc": _number(auc(members, ones)[0]),
            "false_positive_rate": _number(_ratio(ones @ (members.predicted * negative), ones @ negative)[0]),
        }
    return dict(sorted(table.items(), key=lambda item: (-item[1]["examples"], item[0])))


def reliability(rated: Rated) -> list[Json]:
    """Return, for each of the BINS bins that has examples, their number, mean probability and mean label."""
    bins = _bins(rated.probabilities)
    table = []
    for number in np.unique(bins):
        inside = bins == number
        table.append(
            {
                "examples": int(inside.sum()),
                "mean_probability": float(rated.probabilities[inside].mean()),
                "mean_label": float(rated.labels[inside].mean()),
            }
        )
    return table


def _resampled(rated: Rated, resamples: int, rng: np.random.Generator) -> Mapping[str, Floats]:
    """Return each metric under bootstrap resamples of the examples, (resamples,)."""
    count = len(rated.labels)
    parts: dict[str, list[Floats]] = {name: [] for name in METRICS}
    for start in range(0, resamples, _BLOCK):
        size = min(_BLOCK, resamples - start)
        weights = rng.multinomial(count, np.full(count, 1 / count), size=size).astype(np.float64)
        for name, metric in METRICS.items():
            parts[name].append(metric(rated, weights))
    return {name: np.concatenate(part) for name, part in parts.items()}


def _tied(values: Floats) -> tuple[Any, Any]:
    """Return the order that sorts values (N,), and the places in it at which each distinct value begins."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order], prepend=np.nan) != 0)
    return order, starts


def _ranks(values: Floats, weights: Floats) -> Floats:
    """Return the ranks (R, N) of values (N,) of which each occurs as often as its weight says."""
    order, starts = _tied(values)
    counts = np.add.reduceat(weights[:, order], starts, axis=1)
    mean_ranks = counts.cumsum(1) - counts + (counts + 1) / 2

    sizes = np.diff(starts, append=len(values))
    ranks = np.empty_like(weights)
    ranks[:, order] = np.repeat(mean_ranks, sizes, axis=1)
    return ranks


def _bins(probabilities: Floats) -> Any:
    """Return the number of the bin (N,) that each probability is in; the last one includes 1."""
    return np.minimum((probabilities * BINS).astype(int), BINS - 1)


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Return the quotient, NaN where the denominator is 0."""
    undefined = denominator == 0
    quotient: Floats = np.where(undefined, np.nan, numerator / np.where(undefined, 1, denominator))
    return quotient


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
