"""How do logits become probabilities that come true?

Temperature and bias: Platt 1999, "Probabilistic outputs for support vector machines", for outputs with a sigmoid; Guo
et al. 2017, "On calibration of modern neural networks", section 4.2, with a bias for each class (Alexandari et al.
2020, "Maximum likelihood with bias-corrected calibration"), for a softmax. Both are affine, so they become a part of
the last layer. Isotonic regression: Zadrozny and Elkan 2002, "Transforming classifier scores into accurate multiclass
probability estimates", one class against the others. It is no layer of a network, so its knots are kept in a file.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import log_expit, log_softmax, logsumexp, softmax

from detoxrl.data.labelled import LabelKind
from detoxrl.errors import InputError

Floats = npt.NDArray[np.float64]

ISOTONIC_FILE = "calibration.json"
# A validation set that is told apart without a mistake asks for an infinite scale; this is the largest, and its
# reciprocal the smallest.
_MAX_SCALE = 100.0
_MALFORMED = f"restore {ISOTONIC_FILE}, or remove it to read the classifier without it"


@dataclass(frozen=True)
class Affine:
    """Calibrated logits are scale * logits + bias. The temperature is 1 / scale."""

    scale: Floats  # (L,), or (1,) where one scale serves all outputs.
    bias: Floats  # (L,)

    def __call__(self, logits: Floats) -> Floats:
        """Return the calibrated logits (N, L)."""
        calibrated: Floats = self.scale * logits + self.bias
        return calibrated


@dataclass(frozen=True)
class Isotonic:
    """For each output the knots of a non-decreasing function from log-odds to probability, linear between them."""

    log_odds: tuple[Floats, ...]
    probabilities: tuple[Floats, ...]

    def __call__(self, log_odds: Floats, sums_to_one: bool) -> Floats:
        """Return the calibrated probabilities (N, L); of classes they are scaled to a sum of 1."""
        columns = zip(log_odds.T, self.log_odds, self.probabilities, strict=True)
        mapped: Floats = np.stack([np.interp(values, x, y) for values, x, y in columns], 1)
        if sums_to_one:
            mapped /= mapped.sum(1, keepdims=True)
        return mapped


def fit_affine(logits: Floats, targets: Floats, kind: LabelKind) -> Affine:
    """Return the scale and bias of the smallest cross-entropy on validation logits (N, L) and targets (N, L).

    Each output with a sigmoid has both of its own; classes share the scale; a scorer's `logits` are the differences
    (N, 1) between chosen and rejected, and it has a scale alone. Targets are drawn towards 0.5 as by one more example
    on each side (Platt 1999, section 2.2), without which a set told apart without a mistake had no finite optimum.
    """
    if kind == "classes":
        return _fit_softmax(logits, targets)
    if kind == "pairs":
        count = len(logits)
        certain = np.full(count, (count + 1) / (count + 2))
        scale, _ = _fit_sigmoid(logits[:, 0], certain, has_bias=False)
        return Affine(np.array([scale]), np.zeros(1))

    fits = []
    for column, labels in zip(logits.T, targets.T, strict=True):
        known = ~np.isnan(labels)
        fits.append(_fit_sigmoid(column[known], _smoothed(labels[known])))
    scales, biases = zip(*fits, strict=True)
    return Affine(np.array(scales), np.array(biases))


def fit_isotonic(log_odds: Floats, targets: Floats) -> Isotonic:
    """Return for each output the non-decreasing function of the smallest squared error on validation examples (N, L).

    No probability is nearer to 0 or 1 than 1 / (N + 2).
    """
    curves = []
    for column, labels in zip(log_odds.T, targets.T, strict=True):
        known = ~np.isnan(labels)
        curves.append(_isotonic_knots(column[known], labels[known]))
    x, y = zip(*curves, strict=True)
    return Isotonic(x, y)


def to_log_odds(logits: Floats, kind: LabelKind) -> Floats:
    """Return log(p / (1 - p)) of each output (N, L)."""
    if kind != "classes":
        return logits
    columns = []
    for label in range(logits.shape[1]):
        others: Floats = logsumexp(np.delete(logits, label, 1), axis=1)
        columns.append(logits[:, label] - others)
    return np.stack(columns, 1)


def fold_in(calibration: Affine, layer: torch.nn.Linear) -> None:
    """Make the calibration a part of the layer whose outputs are the logits."""
    scale = torch.from_numpy(np.broadcast_to(calibration.scale, layer.bias.shape).copy())
    bias = torch.from_numpy(calibration.bias)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.double() * scale.to(layer.weight.device)[:, None])
        layer.bias.copy_(layer.bias.double() * scale.to(layer.bias.device) + bias.to(layer.bias.device))


def isotonic_to_json(calibration: Isotonic, labels: tuple[str, ...]) -> str:
    """Return the knots as JSON, from which `read_isotonic` reads an equal calibration."""
    knots = {}
    for label, x, y in zip(labels, calibration.log_odds, calibration.probabilities, strict=True):
        knots[label] = {"log_odds": x.tolist(), "probability": y.tolist()}
    return json.dumps({"method": "isotonic", "knots": knots}, indent=2, ensure_ascii=False) + "\n"


def read_isotonic(folder: Path, id2label: Mapping[int, str], field: str, source: str) -> Isotonic | None:
    """Return the isotonic calibration in a classifier's folder, or None if there is none.

    Raises InputError, naming `field` and its value `source`, when it does not fit the labels or is malformed.
    """
    path = folder / ISOTONIC_FILE
    if not path.is_file():
        return None

    try:
        knots: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["knots"]
        of_labels = [knots[id2label[number]] for number in range(len(id2label))]
        x = tuple(np.array(curve["log_odds"], dtype=np.float64) for curve in of_labels)
        y = tuple(np.array(curve["probability"], dtype=np.float64) for curve in of_labels)
        if not all(_are_knots(*curve) for curve in zip(x, y, strict=True)):
            raise ValueError("not the knots of an increasing function")
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(field, source, f"has a malformed {ISOTONIC_FILE}", _MALFORMED) from error
    return Isotonic(x, y)


def _are_knots(x: Floats, y: Floats) -> bool:
    """Return whether x rises and y, in [0, 1], does not fall."""
    fit = x.ndim == 1 and x.shape == y.shape and len(x) > 0
    return bool(fit and (np.diff(x) > 0).all() and (np.diff(y) >= 0).all() and y[0] > 0 and y[-1] <= 1)


def _smoothed(labels: Floats) -> Floats:
    """Return labels (N,) drawn towards 0.5: 1 becomes (P + 1) / (P + 2), with P the sum of the labels."""
    positives = labels.sum()
    negatives = len(labels) - positives
    high = (positives + 1) / (positives + 2)
    low = 1 / (negatives + 2)
    smoothed: Floats = low + labels * (high - low)
    return smoothed


def _fit_sigmoid(logits: Floats, labels: Floats, has_bias: bool = True) -> tuple[float, float]:
    """Return the scale and bias that minimise the cross-entropy of sigmoid(scale * logits + bias)."""

    def loss(parameters: Floats) -> tuple[float, Floats]:
        scale, bias = parameters
        z = scale * logits + bias
        value = -(labels * log_expit(z) + (1 - labels) * log_expit(-z)).mean()
        slope = np.exp(log_expit(z)) - labels
        return float(value), np.array([(slope * logits).mean(), slope.mean() if has_bias else 0.0])

    scale, bias = _minimum(loss, np.array([1.0, 0.0]))
    return float(scale), float(bias)


def _fit_softmax(logits: Floats, targets: Floats) -> Affine:
    """Return the scale and biases that minimise the cross-entropy of softmax(scale * logits + bias); sum(bias) = 0."""
    count = targets.sum(0)
    certain = (count + 1) / (count + 2)
    others = (1 - certain) / (len(count) - 1)
    smoothed = np.where(targets == 1, certain, (targets @ others)[:, None])

    def loss(parameters: Floats) -> tuple[float, Floats]:
        scale, biases = parameters[0], parameters[1:]
        z = scale * logits + biases
        slope = softmax(z, axis=1) - smoothed
        value = -(smoothed * log_softmax(z, axis=1)).sum(1).mean()
        return float(value), np.concatenate([[(slope * logits).sum(1).mean()], slope.mean(0)])

    found = _minimum(loss, np.concatenate([[1.0], np.zeros(logits.shape[1])]))
    return Affine(found[:1], found[1:] - found[1:].mean())


def _minimum(loss: Any, start: Floats) -> Floats:
    """Return the parameters of the smallest loss; the first one is a scale. The loss is convex."""
    from scipy.optimize import minimize  # Imported here because classifiers are read far more often than fitted.

    bounds = [(1 / _MAX_SCALE, _MAX_SCALE), *[(None, None)] * (len(start) - 1)]
    options = {"ftol": 1e-15, "gtol": 1e-9, "maxiter": 1000}
    found: Floats = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
    return found


def _isotonic_knots(x: Floats, labels: Floats) -> tuple[Floats, Floats]:
    """Return where the steps of the isotonic regression of labels (N,) on x (N,) begin and end, and their heights."""
    from scipy.optimize import isotonic_regression

    points, number_of, weights = np.unique(x, return_inverse=True, return_counts=True)
    means = np.bincount(number_of, labels) / weights
    heights = isotonic_regression(means, weights=weights).x

    # Only the ends of a step are knots: in between the function is constant.
    begins = np.diff(heights, prepend=np.nan) != 0
    ends = np.diff(heights, append=np.nan) != 0
    is_knot = begins | ends
    margin = 1 / (len(x) + 2)
    return points[is_knot], np.clip(heights[is_knot], margin, 1 - margin)
