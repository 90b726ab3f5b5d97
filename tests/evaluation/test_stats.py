"""Intervals, p-values, sample sizes, summaries and agreement, by hand, by slow twins and in simulated evaluations."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from detoxrl.errors import InputError
from detoxrl.evaluation.statistics import (
    Difference,
    Floats,
    agreement,
    paired_difference,
    prompts_needed,
    toxicity_summary,
    validation_prompts_needed,
    verdict,
)
from evaluation_statistics import SHAPES, Evaluation, Shares, evaluations, truth

SCORES = arrays(np.float64, st.tuples(st.integers(1, 12), st.integers(1, 3)), elements=st.floats(0, 1, width=32))
quick = settings(max_examples=60)


def difference(differences: Sequence[float], resamples: int = 20_000) -> Difference:
    """The paired difference of prompts with these differences."""
    after = np.array(differences, dtype=float)[:, None]
    return paired_difference(np.zeros_like(after), after, resamples, seed=0)


def exact_p(differences: Sequence[float]) -> float:
    """The sign-flip p-value over all signs."""
    observed = abs(math.fsum(differences))
    flips = itertools.product((-1, 1), repeat=len(differences))
    return statistics.fmean(
        abs(math.fsum(s * d for s, d in zip(sign, differences, strict=True))) >= observed - 1e-12 for sign in flips
    )


def exact_reach(differences: Sequence[float]) -> float:
    """The 95 % quantile of |t| over all n^n resamples; those of equal differences count as 0."""
    n = len(differences)
    centre = statistics.fmean(differences)
    ratios = []
    for sample in itertools.product(differences, repeat=n):
        error = statistics.stdev(sample) / math.sqrt(n)
        ratios.append(abs(statistics.fmean(sample) - centre) / error if error > 1e-9 else 0.0)
    return sorted(ratios)[math.ceil(0.95 * len(ratios)) - 1]


@pytest.mark.parametrize(
    ("toxicity", "error", "prompts", "needed"),
    [
        (0.24, 0.02, 256, None),
        (0.24, 0.06, 100, None),  # Half of the toxicity is two standard errors.
        (0.24, 0.0601, 100, 110),
        (0.24, 0.12, 100, 400),  # Half the error takes four times the prompts.
        (0.24, 0.2, 8, 90),  # 8 * (0.2 / 0.06) ** 2 = 88.9
        (0.24, 0.01, 19, 20),  # So few prompts say little about the error.
        (0.24, 0.01, 20, None),
        (0.0, 0.0, 100, None),
        (0.0, 0.0, 5, 20),
    ],
)
def test_a_validation_needs_prompts_to_tell_half_of_the_toxicity_from_chance(
    toxicity: float, error: float, prompts: int, needed: int | None
) -> None:
    assert validation_prompts_needed(toxicity, error, prompts) == needed


def test_the_p_value_by_hand() -> None:
    # 1, 2, 3: of eight signs +++ and --- reach 6. 3, -1, 2: 4 or more is reached by +-+, +++ and their opposites.
    assert difference([1, 2, 3]).p == pytest.approx(2 / 8, abs=0.01)
    assert difference([3, -1, 2]).p == pytest.approx(4 / 8, abs=0.01)
    assert difference([0, 0, 0]).p == 1.0
    # No other choice of signs is as extreme, so only the observed one counts.
    assert difference([1] * 60, 999).p == pytest.approx(1 / 1000)


@pytest.mark.parametrize("values", [[0.1, 0.3, -0.2, 0.4, 0.1, 0.1, -0.1, 0.2], [0.1] * 3 + [-0.1] * 3 + [0.1]])
def test_the_p_value_is_that_of_all_signs_and_ties_count(values: list[float]) -> None:
    assert difference(values).p == pytest.approx(exact_p(values), abs=0.012)


def test_the_interval_is_that_of_all_resamples() -> None:
    values = [0.0, 0.1, 0.15, 0.3, 0.9]
    found, error = difference(values), statistics.stdev(values) / math.sqrt(5)
    reach = exact_reach(values)
    assert reach > 4  # far beyond Student's 2.78, so it is the resamples that decide
    assert (found.high - found.mean) / error == pytest.approx(reach, rel=0.03)
    assert (found.mean - found.low) / error == pytest.approx(reach, rel=0.03)


def test_the_smallest_detectable_difference_by_hand() -> None:
    # std of 0, 2, 4 is 2: 2.8016 standard errors of 2 / 3^0.5
    assert difference([0, 2, 4]).detectable == pytest.approx((1.959964 + 0.841621) * 2 / 3**0.5, rel=1e-6)


def test_few_or_equal_prompts_have_a_finite_interval_with_0_in_it() -> None:
    # Two prompts: Student's t with one degree of freedom, standard error 1.
    assert (difference([1, 3]).low, difference([1, 3]).high) == pytest.approx((2 - 12.706205, 2 + 12.706205))
    for values in ([0.5], [1] + [0] * 399, [1, 1] + [0] * 398):
        found = difference(values, 2000)
        assert found.low < 0 < found.high < 20
        assert verdict(found) == "no detectable difference"
    same = difference([0.0] * 10)
    assert (same.mean, same.low, same.high, same.detectable) == (0, 0, 0, 0)


def test_the_interval_of_one_normal_difference_covers_in_95_percent() -> None:
    drawn = np.random.default_rng(0).normal(size=20_000)
    for mean in (0.3, 1.0, 3.0):
        values = drawn + mean
        assert np.mean(np.abs(values - mean) <= 12.706 * np.abs(values)) > 0.955


def test_policies_may_have_different_numbers_of_samples() -> None:
    before, after = np.array([[0.2, 0.4], [0.0, 0.0]]), np.array([[0.1, 0.2, 0.3], [0.3, 0.3, 0.3]])
    assert paired_difference(before, after, 500, 0).mean == pytest.approx((-0.1 + 0.3) / 2)


@quick
@given(SCORES, st.integers(0, 3))
def test_a_difference_changes_sign_with_its_sides_scales_with_its_unit_and_ignores_order(
    scores: Floats, seed: int
) -> None:
    other = np.random.default_rng(seed).permutation(scores.ravel()).reshape(scores.shape)
    found = paired_difference(scores, other, 500, seed)
    swapped = paired_difference(other, scores, 500, seed)
    assert (swapped.mean, swapped.low, swapped.high) == (-found.mean, -found.high, -found.low)
    assert (swapped.p, swapped.detectable) == (found.p, found.detectable)
    assert 0 < found.p <= 1
    assert found.low <= found.mean <= found.high
    halved = paired_difference(scores / 2, other / 2, 500, seed)
    assert (halved.low, halved.high, halved.p) == pytest.approx((found.low / 2, found.high / 2, found.p), abs=1e-12)
    order = np.random.default_rng(seed + 1).permutation(len(scores))
    again = paired_difference(scores[order], other[order], 500, seed)
    assert (again.mean, again.detectable) == pytest.approx((found.mean, found.detectable), abs=1e-12)
    assert again.p == pytest.approx(found.p, abs=0.16)  # five standard errors of two shares of 500


def simulated(shape: str, n: int, k: int, share_cured: float) -> Shares:
    known = truth(SHAPES[shape])
    drop = share_cured * (1 - known.civil / known.mean)
    return evaluations(SHAPES[shape], n, k, drop, 300, np.random.default_rng(1))


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    for share_cured in (0.0, 0.8):
        assert 0.92 <= simulated("harsh", 100, 4, share_cured).holds <= 0.985


def test_equal_policies_are_rarely_called_different_even_with_skewed_scores() -> None:
    # A percentile bootstrap calls 9 % of these different, BCa 17 %, equal-tailed bootstrap-t 12 %.
    assert simulated("mild", 30, 1, 0.0).called <= 0.03
    assert simulated("mild", 100, 4, 0.0).called <= 0.075


def test_p_values_of_equal_policies_are_below_5_percent_as_often() -> None:
    assert 0.02 <= simulated("harsh", 100, 4, 0.0).p <= 0.085


def test_as_many_prompts_as_needed_find_the_drop_four_times_of_five() -> None:
    rng, known = np.random.default_rng(0), truth(SHAPES["harsh"])
    needed = prompts_needed(Evaluation(SHAPES["harsh"], 5000, 4, rng).before, 0.2)
    found = 0
    for seed in range(300):
        evaluation = Evaluation(SHAPES["harsh"], needed, 4, rng)
        difference = paired_difference(evaluation.before, evaluation.after("responses", 0.2, known), 500, seed)
        found += verdict(difference) == "less toxic"
    assert 0.73 <= found / 300 <= 0.87


def needed_by_drawing(means: Floats, k: int, std: float, drop: float) -> float:
    """How many prompts with these means (N, 1) it takes, by drawing k normal responses of that std and the drop."""
    rng, shape = np.random.default_rng(2), (len(means), k)
    before, anew = (means + rng.normal(0, std, shape) for _ in range(2))
    civil = np.quantile(before, 0.1)
    chance = drop * before.mean() / (before.mean() - civil)
    seen = (np.where(rng.random(shape) < chance, civil, anew) - before).mean(1)
    fall = drop * float(means.mean())
    assert -seen.mean() == pytest.approx(fall, abs=0.003)
    return float(seen.var() * (1.959964 + 0.841621) ** 2 / fall**2)


@pytest.mark.parametrize(("between", "k", "std"), [(0.1, 4, 0.05), (0.02, 4, 0.2), (0.1, 2, 0.1), (0.0, 1, 0.2)])
@pytest.mark.parametrize("drop", [0.03, 0.1])
def test_prompts_needed_are_those_of_the_drawn_model(between: float, k: int, std: float, drop: float) -> None:
    rng = np.random.default_rng(0)
    means = 0.5 + rng.normal(0, between, (200_000, 1)) if between else np.full((200_000, 1), 0.5)
    pilot = means + rng.normal(0, std, (200_000, k))
    # 1.92 is half of z squared: Student's t in place of the normal.
    assert prompts_needed(pilot, drop) == pytest.approx(needed_by_drawing(means, k, std, drop) + 1.92, rel=0.04, abs=1)


def test_with_one_sample_per_prompt_all_variance_counts_as_within_and_asks_for_more() -> None:
    rng = np.random.default_rng(0)
    means = rng.normal(0.5, 0.1, (200_000, 1))
    pilot = means + rng.normal(0, 0.05, means.shape)
    assert prompts_needed(pilot, 0.05) > 1.5 * needed_by_drawing(means, 1, 0.05, 0.05)


@quick
@given(st.integers(0, 1000), st.sampled_from((1, 2, 4)), st.floats(0.05, 0.5))
def test_a_smaller_drop_or_more_power_needs_more_prompts_in_any_unit(seed: int, k: int, drop: float) -> None:
    pilot = Evaluation(SHAPES["harsh"], 60, k, np.random.default_rng(seed)).before
    needed = prompts_needed(pilot, drop)
    assert prompts_needed(pilot, drop / 2) > needed
    assert prompts_needed(pilot, drop, power=0.95) > needed
    assert abs(prompts_needed(100 * pilot, drop) - needed) <= 1


@pytest.mark.parametrize(
    ("pilot", "drop", "rule"),
    [
        (np.full((9, 2), 0.1), 0.2, "more than can be removed"),
        (np.zeros((9, 2)), 0.2, "more than can be removed"),
        (np.array([[0.1, 0.9]]), 0.2, "2 or more"),
        (np.array([[0.1], [0.9]]), 0.0, "between 0 and 1"),
        (np.array([[0.1], [0.9]]), 1.0, "between 0 and 1"),
        (np.array([[0.4], [0.6]]), 0.5, "mean is 0.5, its civil responses score 0.42"),
    ],
)
def test_a_pilot_without_an_answer_is_refused(pilot: Floats, drop: float, rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        prompts_needed(pilot, drop)


def test_maxima_over_samples_by_hand() -> None:
    found = toxicity_summary(np.array([[0.1, 0.5, 0.2], [0.4, 0.3, 0.0], [0.9, 0.9, 0.9], [0.0, 0.0, 0.2]]))
    assert found["expected_max_toxicity"] == pytest.approx((0.5 + 0.4 + 0.9 + 0.2) / 4)
    assert found["toxicity_probability"] == 2 / 4


@quick
@given(SCORES.filter(lambda scores: scores.size > 1))
def test_a_summary_is_that_of_plain_python(scores: Floats) -> None:
    rows = scores.tolist()
    flat = [value for row in rows for value in row]
    cuts = statistics.quantiles(flat, n=100, method="inclusive")
    assert toxicity_summary(scores) == pytest.approx(
        {
            "mean": statistics.fmean(flat),
            "std": statistics.stdev(flat),
            "toxic_ratio": sum(value >= 0.5 for value in flat) / len(flat),
            **{f"p{percent}": cuts[percent - 1] for percent in (50, 90, 95, 99)},
            "max": max(flat),
            "expected_max_toxicity": statistics.fmean(max(row) for row in rows),
            "toxicity_probability": sum(any(value >= 0.5 for value in row) for row in rows) / len(rows),
        }
    )


def test_agreement_by_hand() -> None:
    one, two = np.array([[0.1, 0.6], [0.7, 0.2]]), np.array([[0.2, 0.9], [0.4, 0.4]])
    # Ranks 1 3 4 2 and 1 4 2.5 2.5, less 2.5: products 2.25 + 0.75 + 0 + 0 over (5 * 4.5)^0.5.
    # Toxic 0 1 1 0 and 0 1 0 0: same on three of four; by chance 1/2 * 1/4 + 1/2 * 3/4 = 1/2.
    assert agreement({"one": one, "two": two}) == {
        "one and two": {"spearman": pytest.approx(3 / 22.5**0.5), "kappa": pytest.approx(0.5), "same_side": 0.75}
    }


def test_agreement_that_is_undefined_is_none() -> None:
    mixed, civil, toxic = np.array([[0.5, 0.4]]), np.array([[0.1, 0.1]]), np.array([[0.9, 0.8]])
    found = agreement({"mixed": mixed, "civil": civil, "low": civil / 2, "toxic": toxic})
    assert list(found)[:3] == ["mixed and civil", "mixed and low", "mixed and toxic"]
    assert len(found) == 6
    assert found["mixed and civil"] == {"spearman": None, "kappa": 0.0, "same_side": 0.5}
    assert found["civil and low"] == {"spearman": None, "kappa": None, "same_side": 1.0}
    assert found["civil and toxic"] == {"spearman": None, "kappa": 0.0, "same_side": 0.0}
    assert found["mixed and toxic"] == {"spearman": pytest.approx(1), "kappa": 0.0, "same_side": 0.5}
    assert agreement({"mixed": mixed}) == {}
