"""Metrics of a classifier, against numbers by hand, sklearn, scipy, and slow twins that repeat examples."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn import metrics as sklearn

from detoxrl.data.labelled import LabelKind
from detoxrl.evaluation.classifier_metrics import METRICS, Rated, by_group, measured, reliability, share_correct
from detoxrl.evaluation.fitted import meaning, measure_labels, measure_pairs, to_probabilities
from detoxrl.evaluation.statistics import Floats
from detoxrl.rewards.calibration import Affine


def value(name: str, rated: Rated) -> float:
    return float(METRICS[name](rated, np.ones((1, len(rated.labels))))[0])


def test_metrics_have_the_values_computed_by_hand() -> None:
    # Two positives (0.9, 0.4) and three negatives (0.6, 0.4, 0.1); 0.6 is predicted positive and is not.
    rated = Rated(np.array([0.9, 0.4, 0.6, 0.4, 0.1]), np.array([1.0, 1.0, 0.0, 0.0, 0.0]))
    # 0.9 beats all three; 0.4 beats 0.1, ties with 0.4 and loses to 0.6: (3 + 1.5) / 6.
    expected = {
        "auc": 4.5 / 6, "precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "recall_at_precision_0.9": 1 / 2,
        "mae": (0.1 + 0.6 + 0.6 + 0.4 + 0.1) / 5, "brier": (0.01 + 0.36 + 0.36 + 0.16 + 0.01) / 5,
        # Bins: 0.9 | 0.4, 0.4 with one label of two | 0.6 | 0.1.
        "ece": (0.1 + 0.2 + 0.6 + 0.1) / 5,
    }  # fmt: skip
    for name, number in expected.items():
        assert value(name, rated) == pytest.approx(number, abs=1e-12), name
    # Ranks 5, 2.5, 4, 2.5, 1 and 4.5, 4.5, 2, 2, 2: covariance 3.75, variances 9.5 and 7.5.
    assert value("spearman", rated) == pytest.approx(3.75 / math.sqrt(9.5 * 7.5))


EXAMPLES = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.05, 0.2, 0.3, 0.5, 0.51, 0.7, 0.95, 1.0]),
        st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]),
        st.integers(0, 3),
    ),
    min_size=3,
    max_size=25,
).filter(lambda examples: any(count for _, _, count in examples))


def slow_recall(rated: Rated) -> float:
    positive = rated.labels >= 0.5
    best = 0.0
    for threshold in rated.probabilities:
        above = rated.probabilities >= threshold
        if positive[above].mean() >= 0.9:
            best = max(best, float((above & positive).sum() / positive.sum()))
    return best


def slow_calibration_error(rated: Rated) -> float:
    total = 0.0
    for number in range(10):
        inside = [min(int(p * 10), 9) == number for p in rated.probabilities]
        if any(inside):
            gap = rated.probabilities[inside].mean() - rated.labels[inside].mean()
            total += sum(inside) * abs(gap)
    return total / len(rated.labels)


@given(EXAMPLES)
@settings(max_examples=60)
def test_each_metric_under_weights_is_the_metric_of_repeated_examples(examples: list[tuple[float, float, int]]) -> None:
    probabilities, labels, counts = (np.array(column) for column in zip(*examples, strict=True))
    repeated = Rated(np.repeat(probabilities, counts), np.repeat(labels, counts))
    weights = np.stack([counts, np.ones_like(counts)]).astype(float)
    weighted = {name: metric(Rated(probabilities, labels), weights)[0] for name, metric in METRICS.items()}

    positive = repeated.labels >= 0.5
    predicted = repeated.probabilities >= 0.5
    expected: dict[str, float] = {}
    if 0 < positive.sum() < len(positive):
        expected["auc"] = sklearn.roc_auc_score(positive, repeated.probabilities)
    if positive.any():
        expected["recall"] = sklearn.recall_score(positive, predicted, zero_division=0)
        expected["recall_at_precision_0.9"] = slow_recall(repeated)
    if predicted.any():
        expected["precision"] = sklearn.precision_score(positive, predicted, zero_division=0)
    if positive.any() or predicted.any():
        expected["f1"] = sklearn.f1_score(positive, predicted, zero_division=0)
    expected["mae"] = sklearn.mean_absolute_error(repeated.labels, repeated.probabilities)
    expected["brier"] = sklearn.mean_squared_error(repeated.labels, repeated.probabilities)
    expected["ece"] = slow_calibration_error(repeated)
    if np.ptp(repeated.labels) > 0 and np.ptp(repeated.probabilities) > 0:
        expected["spearman"] = spearmanr(repeated.probabilities, repeated.labels).statistic

    for name, number in weighted.items():
        assert (number == pytest.approx(expected[name], abs=1e-9)) if name in expected else np.isnan(number), name


def simulated(count: int) -> Rated:
    rng = np.random.default_rng(1)
    probabilities = rng.uniform(size=count)
    return Rated(probabilities, (rng.uniform(size=count) < probabilities).astype(float))


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    rated = simulated(400)
    result = measured(rated, 1000, seed=0)
    losses = (rated.probabilities - rated.labels) ** 2
    half = 1.96 * losses.std() / 20
    brier = result["metrics"]["brier"]
    assert brier["value"] == pytest.approx(losses.mean())
    assert brier["high"] - brier["low"] == pytest.approx(2 * half, rel=0.12)
    assert brier["low"] + brier["high"] == pytest.approx(2 * losses.mean(), rel=0.05)
    assert result["examples"] == 400
    assert result["positive"] == rated.labels.sum()
    assert measured(rated, 1000, seed=0) == result
    # Probabilities that are those of the labels are calibrated: what is left is the spread of the bins.
    assert 0 <= result["metrics"]["ece"]["value"] < 0.06


def test_what_is_not_defined_is_none() -> None:
    metrics = measured(Rated(np.array([0.1, 0.2, 0.3]), np.ones(3)), 20, seed=0)["metrics"]
    for name in ("auc", "precision", "spearman"):
        assert metrics[name] == {"value": None, "low": None, "high": None}
    assert metrics["recall"]["value"] == 0


def test_groups_are_rated_apart_and_the_largest_comes_first() -> None:
    rated = Rated(np.array([0.9, 0.6, 0.8, 0.7, 0.5, 0.1]), np.array([1.0, 0.0, 0.0, 1.0, 1.0, 0.0]))
    table = by_group(rated, ["b", "b", "b", "a", "a", None])
    assert list(table) == ["b", "a"]
    mean = pytest.approx(2.3 / 3)
    assert table["b"] == {
        "examples": 3, "mean_probability": mean, "mean_label": pytest.approx(1 / 3), "auc": 1.0,
        "false_positive_rate": 1.0,
    }  # fmt: skip
    assert table["a"]["auc"] is None
    assert table["a"]["false_positive_rate"] is None


def test_a_point_of_the_reliability_plot_is_the_mean_of_its_bin() -> None:
    rated = Rated(np.array([0.11, 0.19, 1.0, 0.95]), np.array([0.0, 1.0, 1.0, 0.5]))
    assert reliability(rated) == [
        {"examples": 2, "mean_probability": pytest.approx(0.15), "mean_label": 0.5},
        {"examples": 2, "mean_probability": pytest.approx(0.975), "mean_label": 0.75},
    ]


def test_pairs_are_rated_by_the_sign_and_the_size_of_the_difference() -> None:
    differences = np.array([math.log(4), math.log(4), math.log(4), -math.log(4), 0.0])
    result = measure_pairs(differences, 2 * differences, seed=0)
    assert result["accuracy"]["value"] == 3.5 / 5
    assert result["cross_entropy"] == pytest.approx((-3 * math.log(0.8) - math.log(0.2) - math.log(0.5)) / 5)
    # At 0.8 three of four are right, at 0.5 half of one.
    assert result["ece"] == pytest.approx(4 * 0.05 / 5)
    assert result["ece_before_calibration"] == pytest.approx(4 * abs(16 / 17 - 0.75) / 5)
    assert result["accuracy"]["low"] < 3.5 / 5 < result["accuracy"]["high"]


def test_a_share_has_the_interval_of_resampled_answers() -> None:
    answers = np.concatenate([np.ones(80), np.zeros(20)])
    result = share_correct(answers, 2000, seed=0)
    assert result["value"] == 0.8
    assert result["low"] == pytest.approx(0.8 - 1.96 * 0.04, abs=0.011)
    assert result["high"] == pytest.approx(0.8 + 1.96 * 0.04, abs=0.011)


def test_examples_without_a_label_are_left_out_of_its_metrics_alone() -> None:
    logits = np.array([[2.0, -1.0], [-1.0, 3.0], [0.5, 1.0], [-2.0, -0.5]])
    targets: Floats = np.array([[1.0, 0.0], [0.0, np.nan], [1.0, 1.0], [0.0, np.nan]])
    probabilities = to_probabilities(logits, "scores", Affine(np.array([2.0, 1.0]), np.array([0.0, 1.0])))
    assert probabilities == pytest.approx(1 / (1 + np.exp(-(logits * [2, 1] + [0, 1]))))
    result = measure_labels(("a", "b"), probabilities, probabilities, targets, seed=0)
    assert (result["a"]["examples"], result["b"]["examples"]) == (4, 2)
    assert result["a"]["metrics"]["auc"]["value"] == result["b"]["metrics"]["auc"]["value"] == 1.0


@pytest.mark.parametrize(
    ("kind", "civil", "toxic", "expected"),
    [
        ("classes", [0.9, 0.1], [0.2, 0.8], ("b", "a")),
        ("classes", [0.1, 0.9], [0.8, 0.2], ("a", "b")),
        ("classes", [0.55, 0.45], [0.5, 0.5], (None, None)),
        ("classes", [0.1, 0.1, 0.8], [0.3, 0.6, 0.1], ("a", None)),
        ("scores", [0.1, 0.1], [0.15, 0.9], ("b", None)),
        ("scores", [0.9, 0.1], [0.1, 0.9], ("b", None)),
        ("scores", [0.1, 0.9], [0.1, 0.2], (None, "b")),
    ],
)
def test_a_label_means_what_two_sentences_show(
    kind: LabelKind, civil: list[float], toxic: list[float], expected: tuple[str | None, str | None]
) -> None:
    labels = "abc"[: len(civil)]
    result = meaning(labels, kind, np.array(civil), np.array(toxic))
    assert (result["toxic_label"], result["good_label"]) == expected
    assert result["probabilities"]["b"] == {"civil": civil[1], "toxic": toxic[1]}
