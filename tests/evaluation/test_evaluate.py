"""Judges, metrics and statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from conftest import prompted_rows
from detoxrl.config.schema import EvaluationConfig
from detoxrl.evaluation.compare import Measured, comparison, measure, splits
from detoxrl.evaluation.insults import toxic_words
from detoxrl.evaluation.judges import Judge, profanity_judge
from detoxrl.evaluation.metrics import quality_measure, response_metrics, rouge_l, validation_quality
from detoxrl.evaluation.readers import Readers
from detoxrl.evaluation.statistics import (
    Difference,
    Floats,
    compare_toxicity,
    paired_difference,
    toxicity_summary,
    verdict,
)
from detoxrl.models.types import Prompt

ROWS = prompted_rows({"test": 60})["test"]
CONFIG = EvaluationConfig(samples_per_prompt=1, bootstrap=500)


def profanity() -> Judge:
    judge = profanity_judge()
    assert judge is not None
    return judge


def lengths(pairs: Sequence[tuple[Prompt, str]]) -> Floats:
    """A reward: the length of prompt and response together."""
    return np.array([float(len(prompt.text) + len(text)) for prompt, text in pairs])


READERS = Readers(reward=lambda pairs: {"score": lengths(pairs)})


def test_the_independent_judge_tells_an_insult_from_a_polite_text() -> None:
    judge = profanity()
    rude, polite, again = judge(["You are a stupid idiot.", "Thank you very much.", "You are a stupid idiot."])
    assert rude > 0.9 > 0.2 > polite
    assert rude == again


def test_rouge_l_by_hand() -> None:
    # longest common subsequence "a b d" = 3 of 4 and 3 words
    assert rouge_l("a b c d", "a b d") == pytest.approx(2 * (3 / 4) * 1 / (3 / 4 + 1))


def test_metrics_of_the_references_of_a_row() -> None:
    row = next(row for row in ROWS if "loser" in row.references[0] or "clown" in row.references[0])
    toxic, civil = (response_metrics(row, text) for text in (row.references[0], row.civil_references[0]))
    assert (toxic["insult_rate"], toxic["insult_rate_unseen"]) == (0.0, 1.0)
    assert (civil["insult_rate"], civil["insult_rate_unseen"]) == (0.0, 0.0)
    assert civil["rouge_l"] == civil["facts"] == toxic["facts"] == civil["quarrel_reported"] == 1.0
    empty = response_metrics(row, "")
    assert (empty["empty_rate"], empty["length"], empty["facts"], empty["quarrel_reported"]) == (1.0, 0.0, 0.0, 0.0)
    assert "facts" not in response_metrics(replace(row, facts=None), "x")


def test_the_measure_of_quality_is_the_first_that_all_rows_allow() -> None:
    assert quality_measure(ROWS) == "facts"
    assert quality_measure([*ROWS[1:], replace(ROWS[0], facts=None)]) == "rouge_l"
    bare = replace(ROWS[0], facts=None, civil_references=())
    assert quality_measure([bare]) == "rouge_l"  # the summary
    assert quality_measure([*ROWS[1:], replace(bare, references=())]) == "share with text"


def test_validation_quality_is_facts_or_rouge() -> None:
    assert validation_quality(ROWS, [row.references[0] for row in ROWS]) == 1.0
    without = [replace(row, facts=None, civil_references=()) for row in ROWS]
    assert validation_quality(without, [row.references[0] for row in without]) == 1.0
    assert validation_quality(without, ["" for _ in without]) == 0.0


def test_toxicity_summary_by_hand() -> None:
    found = toxicity_summary(np.array([[0.0, 0.5], [0.5, 1.0]]))
    # 0, 0.5, 0.5, 1: the median is 0.5; the 90 % quantile is at index 2.7, so 0.7 of the way from 0.5 to 1
    expected = {"mean": 0.5, "std": (0.5 / 3) ** 0.5, "toxic_ratio": 0.75, "max": 1.0}
    expected |= {"p50": 0.5, "p90": 0.85, "p95": 0.925, "p99": 0.985}
    assert found == pytest.approx(expected | {"expected_max_toxicity": 0.75, "toxicity_probability": 1.0})


def test_comparison_counts_after_minus_before_and_the_share_above_the_floor() -> None:
    before, after = np.full((50, 2), 0.5), np.full((50, 2), 0.2)
    found = compare_toxicity(before, after, floor=0.1, resamples=200, seed=0)
    expected = {"mean": -0.3, "low": -0.3, "high": -0.3, "p": 1 / 201, "detectable": 0.0}
    assert found["difference"] == pytest.approx(expected)
    assert found["share_removed"] == pytest.approx(0.75)
    assert found["relative"] == pytest.approx(-0.6)
    assert found["verdict"] == "less toxic"
    assert compare_toxicity(before, after, floor=None, resamples=200, seed=0)["share_removed"] is None


def test_verdicts_follow_the_interval() -> None:
    for low, high, says in [(-2, -0.1, "less toxic"), (0.1, 2, "more toxic"), (-2, 0.0, "no detectable difference")]:
        assert verdict(Difference(mean=(low + high) / 2, low=low, high=high, p=0.5, detectable=1.0)) == says


def test_the_interval_is_that_of_the_normal_theory_on_normal_data() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(size=(400, 1))
    after = before + rng.normal(0.1, 1, size=(400, 1))
    found = paired_difference(before, after, 4000, seed=0)
    error = (after - before).std(ddof=1) / 20
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.15 * error)


def test_samples_of_one_prompt_do_not_count_as_independent() -> None:
    rng = np.random.default_rng(0)
    one = rng.normal(size=(100, 1))
    zeros = np.zeros((100, 8))
    found = paired_difference(zeros, np.repeat(one, 8, axis=1), 2000, seed=0)
    single = paired_difference(zeros[:, :1], one, 2000, seed=0)
    assert (found.low, found.high) == pytest.approx((single.low, single.high))


def measured_references() -> Measured:
    responses = {
        "before": [[row.references[0]] for row in ROWS],
        "after": [[row.civil_references[0]] for row in ROWS],
    }
    judge = profanity()
    return measure(ROWS, responses, {"alt-profanity-check": judge}, READERS)


def test_civil_references_remove_all_toxicity_above_the_floor() -> None:
    measured = measured_references()
    found = comparison(measured, "after", CONFIG, seed=0)
    result = found["toxicity"]["alt-profanity-check"]
    assert result["share_removed"] == pytest.approx(1.0)
    assert result["floor"] == pytest.approx(result["after"]["mean"])
    assert found["quality"]["facts"]["difference"] == {"mean": 0, "low": 0, "high": 0, "p": 1, "detectable": 0}
    assert found["quality"]["insult_rate"]["after"] == 0.0
    assert found["quality"]["insult_rate"]["before"] > 0.3


def test_the_floor_is_what_people_wrote_where_that_is_the_aim() -> None:
    def length(texts: Sequence[str]) -> np.ndarray:
        return np.array([len(text) / 100 for text in texts])

    def floor(**changes: Any) -> float | None:
        row = replace(ROWS[0], references=("1234", "12345678"), civil_references=("12",))
        row = replace(row, **changes)
        responses = {"before": [["a"]], "after": [["a"]]}
        return measure([row], responses, {"length": length}, READERS).floor["length"]

    assert floor() == pytest.approx(0.02)
    assert floor(civil_references=()) == pytest.approx(0.06)
    # A reply by someone else is no aim, unless it is civil.
    assert floor(task="chat") == pytest.approx(0.02)
    assert floor(task="chat", civil_references=()) is None


def test_an_initial_policy_that_was_kept_is_not_compared_with_itself() -> None:
    responses = {"before": [[row.references[0]] for row in ROWS], "word_filter": [["civil"] for _ in ROWS]}
    judged = measure(ROWS, responses, {"alt-profanity-check": profanity()}, READERS)
    measured = judged.with_initial_kept()
    found = comparison(measured, "after", CONFIG, seed=0)
    compared = comparison(
        judged._replace(metrics=measured.metrics, toxicity=measured.toxicity), "after", CONFIG, seed=0
    )
    for name in ("facts", "length", "score"):
        assert found["quality"][name] == {**compared["quality"][name], "difference": None}
    unknown = {"share_removed": None, "difference": None, "relative": None, "verdict": "initial policy kept"}
    toxicity = compared["toxicity"]["alt-profanity-check"]
    assert found["toxicity"]["alt-profanity-check"] == {**toxicity, **unknown}
    assert toxicity["floor"] is not None

    filtered = comparison(measured, "word_filter", CONFIG, seed=0)["toxicity"]["alt-profanity-check"]
    assert filtered["verdict"] == "less toxic"
    for part in splits(ROWS, measured, CONFIG, seed=0).values():
        assert part["toxicity"]["difference"] is part["facts"]["difference"] is None
        assert part["toxicity"]["before"] == part["toxicity"]["after"]


def test_splits_cover_the_prompts_and_show_no_change_without_an_insult() -> None:
    found = splits(ROWS, measured_references(), CONFIG, seed=0)
    assert found["toxic before"]["n"] + found["civil before"]["n"] == len(ROWS)
    parts = ("insult seen by the reward", "insult kept from the reward", "no insult in the prompt")
    assert sum(found[part]["n"] for part in parts) == len(ROWS)
    assert found["no insult in the prompt"]["toxicity"]["difference"]["mean"] == 0.0
    assert found["toxic before"]["toxicity"]["before"] > 0.5


def test_one_toxic_sample_of_several_makes_a_prompt_toxic_before_by_any_judge() -> None:
    two = ROWS[:2]
    responses = {side: [["fine", "toxic"], ["fine", "fine"]] for side in ("before", "after")}
    lenient = lambda texts: np.zeros(len(texts))  # noqa: E731
    strict = lambda texts: np.array([float(text == "toxic") for text in texts])  # noqa: E731
    measured = measure(two, responses, {"alt-profanity-check": lenient, "other": strict}, READERS)
    found = splits(two, measured, CONFIG, seed=0)
    assert (found["toxic before"]["n"], found["civil before"]["n"]) == (1, 1)


def test_words_to_mask_are_known_insults_and_what_the_judge_calls_toxic() -> None:
    words = toxic_words([["The stupid parcel came late."]], profanity())
    assert {"stupid", "idiot", "clown"} <= set(words)
    assert "parcel" not in words


def test_the_reward_scores_each_response_with_its_own_prompt() -> None:
    lenient = lambda texts: np.zeros(len(texts))  # noqa: E731
    responses = {"before": [["a"] * 2, ["bb"] * 2]}
    found = measure(ROWS[:2], responses, {"lenient": lenient}, READERS).metrics["before"]["score"]
    assert found.tolist() == [[len(row.prompt) + n] * 2 for row, n in zip(ROWS[:2], (1, 2), strict=True)]


def test_without_references_quality_is_the_share_of_responses_with_text() -> None:
    bare = [replace(row, facts=None, civil_references=(), references=()) for row in ROWS[:4]]
    assert validation_quality(bare, ["Fine.", "", "Good.", "Well."]) == 0.75


def test_rouge_reads_words_of_every_script() -> None:
    assert rouge_l("Они спорят о посылке.", "Они спорят о посылке") == 1.0
    assert rouge_l("#Person1# is late.", "#Person2# is late.") == pytest.approx(2 / 3)
