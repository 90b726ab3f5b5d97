"""Calibration: temperature and bias against closed forms and a twin, isotonic regression against sklearn."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit, log_softmax
from sklearn.isotonic import IsotonicRegression

from detoxrl.errors import InputError
from detoxrl.evaluation.statistics import Floats
from detoxrl.rewards.calibration import (
    ISOTONIC_FILE,
    Affine,
    fit_affine,
    fit_isotonic,
    fold_in,
    isotonic_to_json,
    read_isotonic,
    to_log_odds,
)


def column(*values: float) -> Floats:
    return np.array(values)[:, None]


def test_temperature_and_bias_of_two_logits_are_those_of_their_shares() -> None:
    # At logit 1, 3 of 4 are positive; at -1, 1 of 6. So P = 4 and N = 6, and labels become 5/6 and 1/8.
    logits = column(*[1.0] * 4, *[-1.0] * 6)
    labels = column(1, 1, 1, 0, 1, 0, 0, 0, 0, 0)
    high = (3 * 5 / 6 + 1 / 8) / 4
    low = (5 / 6 + 5 / 8) / 6
    fitted = fit_affine(logits, labels, "scores")
    assert expit(fitted(column(1.0, -1.0)))[:, 0] == pytest.approx([high, low], abs=1e-6)


def test_true_temperatures_and_biases_are_found_again() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (40_000, 2))
    true = Affine(np.array([0.5, 2.0]), np.array([-1.0, 0.3]))
    fitted = fit_affine(logits, expit(true(logits)), "scores")  # Soft labels have no noise.
    assert fitted.scale == pytest.approx(true.scale, rel=0.01)
    assert fitted.bias == pytest.approx(true.bias, rel=0.02)


def test_a_label_that_is_missing_counts_for_no_output() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (60, 2))
    labels = (rng.uniform(size=(60, 2)) < expit(logits)).astype(float)
    labels[::3, 1] = np.nan
    known = fit_affine(np.delete(logits, np.s_[::3], 0), np.delete(labels, np.s_[::3], 0), "scores")
    fitted = fit_affine(logits, labels, "scores")
    assert fitted.scale[1] == pytest.approx(known.scale[1])
    assert fitted.scale[0] == pytest.approx(fit_affine(logits[:, :1], labels[:, :1], "scores").scale[0])


def test_a_set_without_mistakes_has_a_finite_temperature() -> None:
    # All differences are 1, so sigmoid(scale) = (n + 1) / (n + 2).
    pairs = fit_affine(np.ones((7, 1)), np.ones((7, 1)), "pairs")
    assert pairs.scale == pytest.approx([math.log(8)], rel=1e-5)
    assert pairs.bias == pytest.approx([0.0])
    separated = fit_affine(column(-1, -1, 1, 1), column(0, 0, 1, 1), "scores")
    assert expit(separated(column(1.0))) == pytest.approx(np.array([[3 / 4]]), abs=1e-5)


def test_two_classes_are_calibrated_as_one_sigmoid_of_their_difference() -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 2, (200, 2))
    first = (rng.uniform(size=200) < expit(logits[:, 0] - logits[:, 1])).astype(float)
    classes = fit_affine(logits, np.stack([first, 1 - first], 1), "classes")
    sigmoid = fit_affine(column(*(logits[:, 0] - logits[:, 1])), column(*first), "scores")
    assert classes.scale == pytest.approx(sigmoid.scale, rel=1e-4)
    assert classes.bias[0] - classes.bias[1] == pytest.approx(sigmoid.bias[0], abs=1e-4)
    assert classes.bias.sum() == pytest.approx(0)


def test_the_calibration_of_classes_is_the_minimum_of_a_twin_without_gradients() -> None:
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 1.5, (60, 3))
    numbers = (logits + rng.gumbel(size=(60, 3))).argmax(1)
    targets = np.eye(3)[numbers]
    counts = targets.sum(0)

    def loss(parameters: Floats) -> float:
        log_p = log_softmax(parameters[0] * logits + np.append(parameters[1:], 0.0), axis=1)
        total = 0.0
        for row, number in enumerate(numbers):
            right = (counts[number] + 1) / (counts[number] + 2)
            for other in range(3):
                total -= log_p[row, other] * (right if other == number else (1 - right) / 2)
        return total / 60

    slow = minimize(loss, [1.0, 0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-12}).x
    fitted = fit_affine(logits, targets, "classes")
    assert fitted.scale[0] == pytest.approx(slow[0], abs=1e-4)
    assert fitted.bias[:2] - fitted.bias[2] == pytest.approx(slow[1:], abs=1e-4)


def test_a_calibration_that_is_folded_in_changes_the_logits_alone() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 3)
    x = torch.randn(4, 5)
    before = layer(x).detach()
    for scale in (np.array([0.5, 2.0, 3.0]), np.array([2.0])):
        fresh = torch.nn.Linear(5, 3)
        fresh.load_state_dict(layer.state_dict())
        calibration = Affine(scale, np.array([1.0, 0.0, -2.0]))
        fold_in(calibration, fresh)
        expected = torch.from_numpy(calibration(before.double().numpy())).float()
        torch.testing.assert_close(fresh(x).detach(), expected)


def test_isotonic_regression_pools_neighbours_that_fall() -> None:
    # 0, 1, 0, 1: the middle two become 1/2. No probability is below 1/6 or above 5/6.
    fitted = fit_isotonic(column(-2, -1, 1, 2), column(0, 1, 0, 1))
    assert fitted.log_odds[0] == pytest.approx([-2, -1, 1, 2])
    assert fitted.probabilities[0] == pytest.approx([1 / 6, 0.5, 0.5, 5 / 6])
    assert fitted(column(-9, -1.5, 0, 9), sums_to_one=False)[:, 0] == pytest.approx([1 / 6, 1 / 3, 0.5, 5 / 6])


@given(st.lists(st.tuples(st.integers(-5, 5), st.sampled_from([0.0, 0.3, 1.0])), min_size=2, max_size=30))
@settings(max_examples=50)
def test_isotonic_regression_is_that_of_sklearn(examples: list[tuple[int, float]]) -> None:
    x, labels = (np.array(values, dtype=float) for values in zip(*examples, strict=True))
    grid = np.linspace(-6, 6, 49)
    slow = IsotonicRegression(out_of_bounds="clip").fit(x, labels)
    margin = 1 / (len(x) + 2)
    fitted = fit_isotonic(x[:, None], labels[:, None])
    knots = np.clip(slow.predict(fitted.log_odds[0]), margin, 1 - margin)
    assert fitted.probabilities[0] == pytest.approx(knots, abs=1e-12)
    assert (np.diff(fitted(grid[:, None], sums_to_one=False)[:, 0]) >= 0).all()
    assert fitted(x[:, None], False)[:, 0] == pytest.approx(np.clip(slow.predict(x), margin, 1 - margin), abs=1e-12)


def test_log_odds_of_classes_compare_each_with_all_others() -> None:
    logits = np.array([[2.0, -1.0, 0.5]])
    p = np.exp(logits) / np.exp(logits).sum()
    assert to_log_odds(logits, "classes") == pytest.approx(np.log(p / (1 - p)))
    assert to_log_odds(logits, "scores") is logits


def test_knots_in_a_file_are_read_again_by_the_names_of_the_labels(tmp_path: Path) -> None:
    logits = np.random.default_rng(0).normal(size=(30, 2))
    fitted = fit_isotonic(logits, (logits > 0.3).astype(float))
    (tmp_path / ISOTONIC_FILE).write_text(isotonic_to_json(fitted, ("a", "b")))
    for order, names in (((0, 1), {0: "a", 1: "b"}), ((1, 0), {0: "b", 1: "a"})):
        read = read_isotonic(tmp_path, names, "field", "source")
        assert read is not None
        for place, number in enumerate(order):
            assert np.array_equal(read.log_odds[place], fitted.log_odds[number])
            assert np.array_equal(read.probabilities[place], fitted.probabilities[number])
    normed = fitted(logits, sums_to_one=True)
    assert normed.sum(1) == pytest.approx(1)
    assert read_isotonic(tmp_path / "other", {0: "a"}, "field", "source") is None


@pytest.mark.parametrize(
    "content",
    [
        "{", "[]", '{"knots": {}}', '{"knots": {"a": {"log_odds": [], "probability": []}}}',
        '{"knots": {"a": {"log_odds": [1, 0], "probability": [0.1, 0.2]}}}',
        '{"knots": {"a": {"log_odds": [0, 1], "probability": [0.2, 0.1]}}}',
        '{"knots": {"a": {"log_odds": [0, 1], "probability": [0.2, 1.1]}}}',
        '{"knots": {"a": {"log_odds": [0], "probability": [0.2, 0.3]}}}',
        json.dumps({"knots": {"b": {"log_odds": [0], "probability": [0.2]}}}),
    ],
)  # fmt: skip
def test_knots_that_fit_no_label_are_bad_input(tmp_path: Path, content: str) -> None:
    (tmp_path / ISOTONIC_FILE).write_text(content)
    with pytest.raises(InputError, match=r"--judge = 'here': has a malformed calibration\.json; restore"):
        read_isotonic(tmp_path, {0: "a"}, "--judge", "here")
