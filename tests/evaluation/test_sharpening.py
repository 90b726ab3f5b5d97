"""The control for sharpening: its temperature, where the entropy at every temperature is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detoxrl.evaluation.sharpening import matching_temperature
from detoxrl.evaluation.statistics import Floats


def entropy(logits: Floats, temperature: float) -> float:
    scaled = logits / temperature - (logits / temperature).max()
    p = np.exp(scaled) / np.exp(scaled).sum()
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def binary(temperature: float) -> float:
    """The entropy of a coin whose logits are 1 and 0."""
    p = 1 / (1 + math.exp(-1 / temperature))
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def test_the_temperature_of_a_coin() -> None:
    # At half the temperature the logits are 2 and 0.
    p = 1 / (1 + math.exp(-2))
    target = -p * math.log(p) - (1 - p) * math.log(1 - p)
    found = matching_temperature(binary, 1.0, binary(1.0), target)
    assert binary(found) == pytest.approx(target, abs=0.05 * (binary(1.0) - target))
    assert found == pytest.approx(0.5, rel=0.03)


logits = st.lists(st.floats(-6, 6), min_size=2, max_size=40).map(np.array)


@given(logits, st.floats(0.3, 2.0), st.floats(0.05, 0.98))
def test_of_at_most_five_temperatures_the_closest_is_returned(logits: Floats, start: float, share: float) -> None:
    first = entropy(logits, start)
    target = share * first
    tried: list[float] = []

    def entropy_at(temperature: float) -> float:
        tried.append(temperature)
        return entropy(logits, temperature)

    found = matching_temperature(entropy_at, start, first, target)
    errors = [abs(entropy(logits, temperature) - target) for temperature in tried]
    assert 1 <= len(tried) <= 5
    assert found in tried
    assert abs(entropy(logits, found) - target) == min(errors)
    assert 0 < found < start * 1.0001
    assert found == float(f"{found:.4g}")  # what a file keeps of it


def test_a_steep_rise_near_the_start_is_found() -> None:
    def entropy_at(temperature: float) -> float:
        """A language model that is nearly greedy up to 0.6, and at 1 nearly uniform."""
        return 0.15 * temperature + 2.8 / (1 + math.exp((0.75 - temperature) / 0.05))

    for target in (0.12, 0.2, 1.0, 2.0):
        found = matching_temperature(entropy_at, 1.0, entropy_at(1.0), target)
        assert entropy_at(found) == pytest.approx(target, rel=0.1)


def test_an_entropy_that_did_not_fall_leaves_the_temperature() -> None:
    assert matching_temperature(binary, 1.0, binary(1.0), binary(1.0) + 0.01) == 1.0
    assert matching_temperature(binary, 1.0, 0.0, 0.0) == 1.0
    assert matching_temperature(binary, 0.12345678, 1.0, 1.0) == 0.1235


def test_a_policy_without_entropy_is_matched_by_a_cold_one() -> None:
    coin = np.array([1.0, 0.0])
    found = matching_temperature(lambda temperature: entropy(coin, temperature), 1.0, binary(1.0), 0.0)
    assert 0 < found < 0.1
    assert entropy(coin, found) < 1e-3


def test_nearly_every_search_ends_within_the_tolerance() -> None:
    rng = np.random.default_rng(0)
    misses = []
    for _ in range(300):
        contexts = rng.normal(size=(4, rng.integers(2, 200))) * rng.uniform(0.5, 6)
        share = rng.uniform(0.05, 0.98)

        def entropy_at(temperature: float, contexts: Floats = contexts) -> float:
            return float(np.mean([entropy(logits, temperature) for logits in contexts]))

        first = entropy_at(1.0)
        found = matching_temperature(entropy_at, 1.0, first, share * first)
        misses.append(abs(entropy_at(found) / first - share) / min(share, 1 - share))
    assert np.mean(np.array(misses) > 0.05) < 0.02, np.mean(np.array(misses) > 0.05)
