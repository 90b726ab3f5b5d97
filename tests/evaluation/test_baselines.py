"""Baselines without training: what they write, and how they compare with the trained policy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detoxrl.config.schema import EvaluationConfig
from detoxrl.evaluation.baselines import best_of, best_of_kl, word_filter
from detoxrl.evaluation.compare import Measured, compare_with_baselines
from detoxrl.evaluation.judges import memoized
from detoxrl.evaluation.statistics import Floats


def test_the_word_filter_takes_out_what_is_known_and_what_the_rewards_judge_calls_toxic_alone() -> None:
    texts = [["You stupid fool, be nice.", "A foolproof plan."], ["Idiots!", ""]]
    judge = lambda words: np.array([0.9 * (word == "nice") for word in words])  # noqa: E731
    assert word_filter(texts, None) == [["You stupid , be nice.", "A foolproof plan."], ["!", ""]]
    assert word_filter(texts, judge) == [["You stupid , be .", "A foolproof plan."], ["!", ""]]


def test_best_of_by_hand() -> None:
    pool, scores = [list("abcdefg"), list("ABCDEFG")], np.array([[1, 3, 2, 9, 0, 0, 99], [5, 4, 3, 2, 1, 7, 99]])
    assert best_of(pool, scores, 2) == [["b", "d", "e"], ["A", "C", "F"]]  # the seventh is in no pair
    assert best_of(pool, scores, 6) == [["d"], ["F"]]


@given(st.integers(2, 6), st.integers(1, 4), st.integers(0, 10**6))
def test_the_best_of_a_group_scores_highest_in_it(n: int, groups: int, seed: int) -> None:
    scores = np.random.default_rng(seed).normal(size=(3, n * groups))
    pool = [[f"{row} {i}" for i in range(n * groups)] for row in range(3)]
    for row, picks in enumerate(best_of(pool, scores, n)):
        for group, pick in enumerate(picks):
            assert scores[row, int(pick.split()[1])] == scores[row, group * n : (group + 1) * n].max()


def test_the_bound_on_best_of_n_is_the_divergence_of_the_largest_of_n_uniforms() -> None:
    u = (np.arange(1_000_000) + 0.5) / 1_000_000
    for n in (1, 4, 16):
        density = n * u ** (n - 1)
        assert best_of_kl(n) == pytest.approx(float((density * np.log(density)).mean()), abs=1e-4)
    assert best_of_kl(4) == pytest.approx(math.log(4) - 3 / 4)


def test_a_memoized_judge_rates_each_item_once_over_all_calls() -> None:
    asked: list[str] = []

    def lengths(texts: Sequence[str]) -> Floats:
        asked.extend(texts)
        return np.array([float(len(text)) for text in texts])

    rate = memoized(lengths)
    assert rate(["bb", "a", "bb", "ccc"]).tolist() == [2, 1, 2, 3]
    assert rate(["a", "dddd"]).tolist() == [1, 4]
    assert sorted(asked) == ["a", "bb", "ccc", "dddd"]


def verdict_of(n: int, toxicity_above: float, facts_above: float) -> str:
    """Return the verdict on "after", which gained 0.5, against a baseline with this much more toxicity and facts."""
    noise = np.random.default_rng(0).normal(0, 0.05, size=(4, n, 1))
    toxicity = {"before": 0.6 + noise[0], "after": 0.1 + noise[1], "other": 0.1 + toxicity_above + noise[2]}
    facts = {"before": noise[3], "after": noise[3], "other": noise[3] + facts_above + noise[2] / 9}
    metrics = {name: {"facts": values} for name, values in facts.items()}
    measured = Measured({"judge": toxicity}, metrics, {})
    return str(compare_with_baselines(measured, EvaluationConfig(bootstrap=500), 0)["other"]["verdict"])


@pytest.mark.parametrize(
    ("n", "toxicity_above", "facts_above", "verdict"),
    [
        (400, 0.1, 0.0, "ahead"),
        (400, 0.0, -0.1, "ahead"),
        (400, -0.1, 0.0, "behind"),
        (400, 0.0, 0.1, "behind"),
        (400, 0.1, 0.1, "a trade"),
        (400, 0.0, 0.0, "level"),
        (3, 0.0, 0.0, "undecided"),
    ],
)
def test_the_verdict_is_ahead_behind_a_trade_level_or_undecided(
    n: int, toxicity_above: float, facts_above: float, verdict: str
) -> None:
    assert verdict_of(n, toxicity_above, facts_above) == verdict
