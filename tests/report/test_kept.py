"""Is a run that kept its initial policy told without comparing the policy with itself, and with what to try next?"""

from __future__ import annotations

import csv
import io
import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from detoxrl.report.kept import Explanation, explain_kept, few_prompts
from detoxrl.report.page import build_report
from detoxrl.report.results import read_evaluation
from detoxrl.runtime.run_folder import INITIAL_KEPT, RunFolder
from results import (
    EVALUATION,
    JUDGE,
    KEPT,
    SAMPLES,
    change,
    keep_initial_policy,
    kept_evaluation,
    make_run,
    write,
    write_lines,
)
from test_report import visible

Line = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def drawings() -> None:
    """Draw the plots, which other modules leave out."""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    make_run(tmp_path)
    keep_initial_policy(tmp_path, [line(), line(step=30, toxicity=0.1, quality=0.8, kl=4.0, score=1.5)])
    return tmp_path


def line(**values: Any) -> Line:
    """Return a validation; without other `values` that of the initial policy."""
    initial = {"step": 0, "toxicity": 0.3, "toxicity_error": 0.02, "quality": 0.9, "score": 0.5, "kl": 0.0}
    return initial | values


def explained(run_dir: Path, later: list[Line]) -> Explanation:
    write_lines(run_dir, "validation.jsonl", [line(), *later])
    explanation = explain_kept(RunFolder(run_dir), kept_evaluation())
    assert explanation is not None
    return explanation


def text_of(run_dir: Path) -> str:
    return visible(build_report(run_dir).read_text(encoding="utf-8"))


# Why


def test_every_validation_says_why_its_policy_was_not_kept(run_dir: Path) -> None:
    later = [
        line(step=5, toxicity=0.31),
        line(step=10, toxicity=0.29),
        line(step=15, toxicity=0.05, quality=0.894),
        line(step=20, toxicity=0.3, quality=0.896),
    ]
    assert [(one.validation["step"], one.reason) for one in explained(run_dir, later).validations] == [
        (0, "the initial policy"),
        (5, "not less toxic"),
        (10, "not less toxic by more than one standard error"),
        (15, "quality is below 0.895"),
        (20, "not less toxic"),
    ]


@pytest.mark.parametrize(
    ("later", "advice", "settings"),
    [
        (
            [line(step=5, toxicity=0.2, quality=0.8, kl=3.0), line(step=10, toxicity=0.1, quality=0.7, kl=9.0)],
            "Step 10 was less toxic (0.100), but its quality (0.700) is below the bound (0.895). Use a lower rl.lr or "
            "a higher rl.kl_coef, or accept the loss with a larger rl.quality_margin.",
            {"rl.lr": "0.00033"},
        ),
        (
            [line(step=5, toxicity=0.29, quality=0.8, kl=0.09), line(step=10, kl=0.05)],
            "The policy hardly moved (KL to the initial policy: 0.090 nats per response). Use a higher rl.lr or more "
            "rl.steps.",
            {"rl.lr": "0.003"},
        ),
        (
            [line(step=5, kl=2.0, score=0.9), line(step=10, kl=3.0, score=0.7)],
            "The reward score rose from 0.500 to 0.700, but toxicity did not follow. Use more rl.steps; if the score "
            "alone goes on rising, the reward and the judge measure different things.",
            {"rl.steps": "120"},
        ),
        (
            [line(step=5, kl=2.0, score=0.9), line(step=10, kl=3.0, score=0.4)],
            "The reward score did not rise (from 0.500 to 0.400). Use more rl.steps or another rl.lr.",
            {"rl.steps": "120"},
        ),
    ],
)
def test_what_to_try_next_follows_from_the_validations(
    run_dir: Path, later: list[Line], advice: str, settings: dict[str, str]
) -> None:
    found = explained(run_dir, later)
    assert (found.advice, found.settings, found.few_prompts) == (advice, settings, None)


def test_validations_of_an_early_version_are_explained_too(run_dir: Path) -> None:
    bare = [{"step": 0, "toxicity": 0.3, "quality": 0.9}, {"step": 5, "toxicity": 0.2, "quality": 0.8}]
    write_lines(run_dir, "validation.jsonl", bare)
    assert "Step 5 was less toxic (0.200)" in text_of(run_dir)
    write_lines(run_dir, "validation.jsonl", [bare[0], bare[1] | {"quality": 0.9}])
    assert "Use more rl.steps or another rl.lr." in text_of(run_dir)
    assert few_prompts(RunFolder(run_dir)) is None


def test_a_run_that_kept_a_trained_policy_needs_no_explanation(run_dir: Path) -> None:
    assert explain_kept(RunFolder(run_dir), EVALUATION) is None


def test_too_few_validation_prompts_are_told_with_the_number_needed(run_dir: Path) -> None:
    write_lines(run_dir, "validation.jsonl", [line(toxicity_error=0.15), line(step=5, kl=0.01)])
    found = explain_kept(RunFolder(run_dir), kept_evaluation())
    assert found is not None
    assert found.settings["rl.validation_prompts"] == "800"  # (0.15 / 0.075) ** 2 times 200
    told = "200 validation prompts are too few to tell a better checkpoint from chance (toxicity 0.300, standard error "
    assert f"{told}0.150): set rl.validation_prompts to 800 or more." in text_of(run_dir)

    make_run(run_dir)  # A trained policy may be luck for the same reason.
    assert told not in text_of(run_dir)
    write_lines(run_dir, "validation.jsonl", [line(toxicity_error=0.15), line(step=2, toxicity=0.1)])
    assert text_of(run_dir).count(told) == 1


# The page


def test_the_page_says_first_that_the_initial_policy_was_kept_and_why(run_dir: Path) -> None:
    text = text_of(run_dir)
    assert text.lstrip().startswith("Initial policy kept – detoxrl report")
    head, _, rest = text.partition("Toxicity by judge")
    assert (
        "Initial policy kept: no checkpoint was less toxic without losing quality (mean toxicity by "
        "alt-profanity-check is 0.270; 3 prompts, 2 samples each)"
    ) in head
    assert "Step 30 was less toxic (0.100), but its quality (0.800) is below the bound (0.895)." in head
    rows = head.splitlines()
    assert "StepToxicityFacts keptReward scoreKLnats per responseWhy not kept" in rows
    assert "00.300 ± 0.0200.9000.5000.00the initial policy" in rows
    assert any(row.startswith("300.100 ± 0.0200.8001.5004.00quality is below 0.895") for row in rows)
    assert "initial policy kept" in rest  # over the curves


def test_the_page_shows_no_difference_of_the_policy_to_itself(run_dir: Path) -> None:
    text = text_of(run_dir).partition("Where the data went")[0]
    assert "What changed" not in text
    assert "made civil" not in text
    assert "regressions" not in text
    assert "→" not in text
    assert "Share removed" not in text
    judges = text.partition("Toxicity by judge")[2].partition("Do baselines do better?")[0]
    assert f"{JUDGE}primary judge, independent of the reward0.2700.04027%" in judges.splitlines()
    assert not re.search("interval|before|after", judges)
    measures = text.partition("All measures")[2].partition("Learning curves")[0]
    assert not re.search("interval|before|after|Difference|einforcement", measures)
    assert any(
        row.startswith("Facts keptshare of facts; higher is better0.9100.8800.890") for row in measures.splitlines()
    )
    assert "with facts20.5000.800" in measures.splitlines()
    responses = text.partition("Responses of the initial policy")[2]
    assert "PromptResponseToxicity" in responses.splitlines()
    assert "Changed responses only" not in responses
    assert "before" not in responses


def test_the_page_compares_the_initial_policy_with_the_baselines(run_dir: Path) -> None:
    text = text_of(run_dir).partition("Do baselines do better?")[2].partition("All measures")[0]
    assert text.startswith("Better than the initial policy: Best-of-4 by the reward.")
    assert "better than the initial policy" in text
    assert "no detectable difference" in text
    assert "As good as" not in text
    found = kept_evaluation()
    found["baselines"]["best_of_4"]["after"]["verdict"] = "ahead"
    write(run_dir, "eval.json", found)
    assert "No baseline is shown to be better than the initial policy." in text_of(run_dir)


def test_there_is_one_distribution_and_nothing_for_blind_raters(run_dir: Path) -> None:
    for name in ("compared.csv", "blind_sheet.csv", "blind_key.csv"):
        (run_dir / name).write_text("stale")
    html = build_report(run_dir).read_text(encoding="utf-8")
    drawing = html.partition("Distribution of toxicity")[2].partition("Responses of the initial policy")[0]
    assert 'aria-label="Histogram of toxicity: initial policy"' in drawing
    assert ">before<" not in drawing
    assert set(re.findall(r'href="([^#][^"]*)"', html)) == {"samples.csv", "samples.jsonl"}
    assert [path.name for path in run_dir.glob("*.csv")] == ["samples.csv"]
    (header, *_) = csv.reader(io.StringIO((run_dir / "samples.csv").read_text("utf-8-sig")))
    assert header == ["id", "dialogue", "summary", "before_response", "before_toxicity"]


def test_the_page_needs_no_checkbox_to_search(run_dir: Path) -> None:
    html = build_report(run_dir).read_text(encoding="utf-8")
    assert 'id="differing"' not in html
    assert "if (differing) differing.onchange" in html


# What was not measured


def test_a_page_without_a_measure_of_quality_says_so_and_shows_no_1(run_dir: Path) -> None:
    write(run_dir, "checkpoint.json", KEPT | {"kept_step": 0, "reason": "the best", "quality_by": "share with text"})
    found = kept_evaluation()
    found["quality"] = {"length": change(24.0, 24.0) | {"difference": None}}
    for baseline in found["baselines"].values():
        baseline["after"]["quality_by"] = "share with text"
    write(run_dir, "eval.json", found)
    text = text_of(run_dir)
    assert "no checkpoint was less toxic without writing more empty responses (" in text
    assert "Quality was not measured: there are neither facts nor references to compare with." in text
    assert "quality was not measured, and the share of responses with text stands in for it" in text
    assert "StepToxicityShare with textReward score" in text
    assert "share of responses with text is below 0.895" in text
    assert "Validation share with text" in text
    assert "Facts kept" not in text.partition("All measures")[0]


def test_the_measure_of_validations_is_named_where_it_is_known(run_dir: Path) -> None:
    make_run(run_dir)
    assert "Validation quality mean over" in text_of(run_dir)  # a run of an earlier version
    checkpoint = json.loads((run_dir / "checkpoint.json").read_text())
    write(run_dir, "checkpoint.json", checkpoint | {"quality_by": "rouge_l"})
    assert "Validation ROUGE-L mean over" in text_of(run_dir)


# Folders of earlier versions


def test_a_comparison_of_the_initial_policy_with_itself_is_not_read(run_dir: Path) -> None:
    old = deepcopy(EVALUATION)
    for result in old["toxicity"].values():
        result["verdict"] = "no detectable difference"
    write(run_dir, "eval.json", old)
    write_lines(run_dir, "samples.jsonl", SAMPLES)
    found = read_evaluation(RunFolder(run_dir))
    assert {result["verdict"] for result in found["toxicity"].values()} == {INITIAL_KEPT}
    assert '"difference": {' not in json.dumps({name: found[name] for name in ("toxicity", "quality", "splits")})
    assert found["baselines"] == old["baselines"]
    assert "Initial policy kept: no checkpoint" in text_of(run_dir)
    assert json.loads((run_dir / "eval.json").read_text()) == old  # It is only read differently.


def test_a_comparison_with_a_trained_policy_is_read_as_it_is(run_dir: Path) -> None:
    make_run(run_dir)
    assert read_evaluation(RunFolder(run_dir)) == EVALUATION
    (run_dir / "checkpoint.json").unlink()
    assert read_evaluation(RunFolder(run_dir)) == EVALUATION
