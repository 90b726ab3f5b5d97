"""The tables of the benchmark of judges: a judge whose ratings are known, and numbers by hand."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoModelForSequenceClassification

from blind_spots import disguised_insults, disguises, identity, languages
from clock import Clock
from detoxrl.data.embedded.phrases import INSULTS, INTENSIFIERS, insult_pattern
from detoxrl.data.labelled import Example
from detoxrl.evaluation.attacks import DISGUISES
from detoxrl.evaluation.classifier_metrics import Rated
from detoxrl.evaluation.identity_sentences import DIALECT, GROUPS
from detoxrl.evaluation.judges import Judge
from detoxrl.evaluation.statistics import Floats
from detoxrl.rewards.classifier import load_classifier
from detoxrl.rewards.obfuscation import plain
from encoders import make_encoder
from judge_measures import Benchmark, Table, intervals, to_markdown
from judge_speed import distinct_texts, texts_per_second
from judged import first_number, scored_rows, write_sets, write_split
from judged_sets import PERSPECTIVE, PERSPECTIVE_SCORES, read_perspective
from judges import TABLES, main
from label_tables import context, groups, sets
from mild_pairs import MILD_PAIRS
from perspective_tables import judge_agreement, lengths, perspective, reliability_bins

PAGE = Path(__file__).parents[2] / "docs" / "judges.md"
INSULT = insult_pattern((*INSULTS, *INTENSIFIERS))
# The rating that `first_number` gives, Perspective's toxicity, and the words of a text.
TEXTS = ((0.9, 0.8, 3), (0.4, 0.6, 8), (0.6, 0.3, 9), (0.4, 0.2, 25), (0.1, 0.1, 26), (0.7, math.nan, 2))


def example(row: int, rating: float, toxicity: float, words: int) -> Example:
    text = " ".join([str(rating), *["word"] * (words - 1)])
    return Example((text,), (toxicity,) * len(PERSPECTIVE_SCORES), None, "train", row)


class Known(Benchmark):
    """A benchmark of a known judge on TEXTS, or on the sets in a folder."""

    @cached_property
    def perspective(self) -> list[Example]:
        return [example(row, *text) for row, text in enumerate(TEXTS, start=1)]


def known(root: Path = Path(), judge: Judge = first_number) -> Known:
    return Known(root=root, loaded={"known": judge}, resamples=50)


def values(cells: Sequence[str]) -> list[str]:
    """Return cells without their intervals."""
    return [cell.partition(" (")[0] for cell in cells]


# Against Perspective


def test_the_agreement_with_perspective_by_hand() -> None:
    table = perspective(known())
    # The text without a score is left out. Ratings 0.9 0.4 0.6 0.4 0.1 against 0.8 0.6 0.3 0.2 0.1.
    assert table.caption == "5 held-out texts, 2 of them at 0.5 or above by Perspective."
    # Ranks 5, 2.5, 4, 2.5, 1 and 5, 4, 3, 2, 1: covariance 8, variances 9.5 and 10.
    spearman = 8 / math.sqrt(95)
    # Positive 0.9 and 0.4, negative 0.6, 0.4 and 0.1: AUC (3 + 1.5) / 6. Errors 0.1, 0.2, 0.3, 0.2 and 0.
    # Bins: 0.9 is 0.1 too high, 0.4 and 0.4 fit 0.6 and 0.2, 0.6 is 0.3 too high: 0.4 / 5.
    assert values(table.rows[0]) == ["known", f"{spearman:.3f}", "0.750", "0.500", "0.160", "0.080"]
    assert len(table.columns) == len(table.rows[0])


def test_the_reliability_by_hand() -> None:
    assert reliability_bins(known()).rows == [
        ["known", "1", "0.100", "0.100"],
        ["known", "2", "0.400", "0.400"],
        ["known", "1", "0.600", "0.300"],
        ["known", "1", "0.900", "0.800"],
    ]


def test_short_and_long_texts_are_measured_apart() -> None:
    rows = lengths(known()).rows
    assert [(row[0], row[2], values(row)[4]) for row in rows] == [
        ("1 to 8", "2", "0.150"),
        ("9 to 14", "1", "0.300"),
        ("15 to 25", "1", "0.200"),
        ("26 and more", "1", "0.000"),
    ]


def test_the_agreement_of_judges_by_hand() -> None:
    # Toxic by the judge are the first and third text, by Perspective the first two: 3 of 5 agree, by chance 0.52 would.
    expected = f"{8 / math.sqrt(95):.3f}, {(0.6 - 0.52) / 0.48:.3f}"
    table = judge_agreement(known())
    assert table.columns == ["", "Perspective", "known"]
    assert table.rows == [["Perspective", "", expected], ["known", expected, ""]]


def test_the_texts_of_a_unit_are_drawn_together() -> None:
    ratings = Rated(np.array([0.9, 0.4, 0.6, 0.2, 0.1]), np.array([1.0, 1.0, 0.0, 0.0, 0.0]))
    twice = Rated(np.repeat(ratings.probabilities, 2), np.repeat(ratings.labels, 2))
    metrics = ["auc", "mae"]
    single = intervals(metrics, ratings, list("abcde"), 200, 0)
    assert single["auc"]["value"] == pytest.approx(5 / 6)
    assert 0 <= single["auc"]["low"] < 5 / 6 < single["auc"]["high"] <= 1

    # Each text twice is no more evidence, unless the copies count as independent.
    doubled = intervals(metrics, twice, list("aabbccddee"), 200, 0)
    for metric in metrics:
        assert doubled[metric] == pytest.approx(single[metric])
    independent = intervals(metrics, twice, range(10), 200, 0)
    width, narrower = (result["mae"]["high"] - result["mae"]["low"] for result in (single, independent))
    assert narrower < 0.9 * width


# Sets with labels of people


def test_the_sets_by_hand(tmp_path: Path) -> None:
    rows = sets(known(write_sets(tmp_path), lambda texts: first_number([text[-400:] for text in texts]))).rows
    by_set = {row[0]: values(row[2:]) for row in rows}
    # 0.9 and 0.4 against 0.6 and 0.1.
    assert by_set["Surge (2 positive of 4)"] == ["0.750", "0.500", "0.650, 0.350", "50.0 %", "50.0 %"]
    assert by_set["Dynabench, hate (1 positive of 2)"] == ["0.500", "0.000", "0.500, 0.500", "100.0 %", "0.0 %"]
    assert by_set["ConvAbuse, user turns (1 positive of 3)"][0] == "1.000"
    # The context alone decides: 0.1 against 0.7.
    assert by_set["DiaSafety, context and response (1 positive of 2)"][0] == "0.000"
    assert by_set["DiaSafety, response alone (1 positive of 2)"][0] == "1.000"
    assert len(by_set) == 10


def test_groups_and_categories_are_measured_apart(tmp_path: Path) -> None:
    benchmark = known(write_sets(tmp_path))
    assert groups(benchmark).rows == [["left-handed", "1, 2", "0.500"], ["tall", "1, 1", "1.000"]]
    assert context(benchmark).rows == [["Risk", "known", "1, 1", "1.000", "0.000"]]


def test_a_set_with_one_label_has_no_auc(tmp_path: Path) -> None:
    write_split(tmp_path, "surge_toxicity", "train", [{"text": "0.9 stupid", "label": "toxic"}])
    (row,) = sets(known(tmp_path)).rows
    assert row[2:] == ["—", "1.000", "0.900, —", "—", "0.0 %"]


# Blind spots


@pytest.mark.parametrize("disguise", DISGUISES)
def test_insults_in_disguise_read_only_in_plain_letters(disguise: str) -> None:
    insults = disguised_insults(disguise, 60, 1)
    assert len({insult.shown for insult in insults}) == 60
    assert insults == disguised_insults(disguise, 60, 1)
    assert all(INSULT.search(insult.shown) for insult in insults)
    assert not any(INSULT.search(insult.disguised) for insult in insults)
    assert sum(bool(INSULT.search(plain(insult.disguised))) for insult in insults) >= 57


def test_a_judge_that_knows_a_list_misses_disguises_alone() -> None:
    def finds_insult(texts: Sequence[str]) -> Floats:
        return np.array([float(bool(INSULT.search(text))) for text in texts])

    rows = disguises(known(judge=finds_insult)).rows
    assert [row[:5] for row in rows] == [[name, "known", "0.000", "1.000", "0.000"] for name in DISGUISES]
    assert all(float(row[5]) > 0.95 for row in rows)


def test_every_language_has_its_own_pairs() -> None:
    assert {len(pairs) for pairs in MILD_PAIRS.values()} == {8}
    sentences = [sentence for pairs in MILD_PAIRS.values() for pair in pairs for sentence in pair]
    assert len(set(sentences)) == 2 * 8 * 7


def test_a_judge_of_english_alone_ties_everywhere_else() -> None:
    english = dict(MILD_PAIRS["English"])

    def knows_english(texts: Sequence[str]) -> Floats:
        return np.array([0.9 if text in english else 0.2 for text in texts])

    rows = languages(known(judge=knows_english)).rows
    assert rows[0] == ["English", "known", "1.000", "0.900", "0.200"]
    assert [row[2:] for row in rows[1:]] == [["0.500", "0.200", "0.200"]] * 6


def test_a_flagged_group_and_every_dialect_are_shown() -> None:
    def dislikes_a_word(texts: Sequence[str]) -> Floats:
        return np.array([0.6 if "deaf" in text else 0.1 for text in texts])

    table = identity(known(judge=dislikes_a_word))
    flagged, *dialects = table.rows
    assert flagged == ["known", "deaf", "0.600", "0.100", "+0.500 (0.500 to 0.500)", "100.0 %", "yes"]
    assert [row[1] for row in dialects] == [group.name for group in GROUPS if group.category == DIALECT]
    assert {row[6] for row in dialects} == {"no"}
    assert table.caption.startswith("known: 1 of 18 groups flagged, 4.6 % of 304 civil sentences at 0.5 or above")


# Speed


def test_the_speed_is_the_median_of_three_passes_over_other_texts() -> None:
    clock = Clock()
    seconds = iter([100.0, 2.0, 5.0, 4.0])  # Of the warm-up and of each pass.
    seen: list[str] = []

    def slow(texts: Sequence[str]) -> Floats:
        clock.now += next(seconds)
        seen.extend(texts)
        return np.zeros(len(texts))

    assert texts_per_second(slow, 0, clock) == pytest.approx(1000 / 4)
    assert len(set(seen)) == len(seen) == 3100
    assert {len(text.split()) for text in distinct_texts(20, 1)} == {23}


# The command


def printed(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[str, str]:
    main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return output.out, output.err


def test_the_command_prints_every_table_and_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # No judge of the package has several scores, so that none has to be installed.
    monkeypatch.setattr("judges.JUDGES", ("alt-profanity-check",))
    rows = scored_rows(60)
    write_split(write_sets(tmp_path), PERSPECTIVE, "train", rows)
    out, err = printed(capsys, tmp_path, "--resamples", "20", "--held-out", "0.5", "--seed", "3")
    for name in set(TABLES) - {"scores"}:
        assert f"<!-- table: {name} -->\n" in out
        assert f"measuring {name}\n" in err
    assert "skipped scores: name a judge that has several with --scores-of\n" in err
    assert "30 held-out texts" in out

    texts = [row[half]["text"] for row in rows for half in ("prompt", "continuation")]
    assert not any(text in out + err for text in [*texts, "0.9 stupid", "0.8 a dumb idea"])


def test_the_page_shows_every_table() -> None:
    marks = re.findall("<!-- table: (.*) -->", PAGE.read_text(encoding="utf-8"))
    assert sorted(marks) == sorted(TABLES)


def test_each_score_of_a_judge_stands_beside_the_same_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = scored_rows(60)
    for i, row in enumerate(rows):
        row["prompt"]["insult"] = (53 * i % 100) / 100
    write_split(tmp_path, PERSPECTIVE, "train", rows)
    judge = tmp_path / "judge"
    make_encoder("bert", judge)
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        judge,
        problem_type="multi_label_classification",
        id2label={0: "insult", 1: "toxicity"},
        label2id={"insult": 0, "toxicity": 1},
    )
    model.save_pretrained(judge)

    held_out = read_perspective(tmp_path, 0.5, 0)
    classifier = load_classifier(str(judge), "judge", {"label": "insult"}, torch.device("cpu"))
    probabilities = classifier.probabilities([example.texts[0] for example in held_out])
    labels = ("toxicity", "insult")
    expected = []
    for output, label in ((1, "toxicity"), (0, "insult")):
        scores = [example.targets[PERSPECTIVE_SCORES.index(label)] for example in held_out]
        expected.append((label, f"{spearmanr(probabilities[:, output], scores).statistic:.3f}".replace("-", "−")))

    out, _ = printed(
        capsys, tmp_path, "--only", "scores", "--scores-of", judge, "--score-labels", *labels, "--held-out", "0.5",
        "--resamples", "20", "--seed", "0", "--judge", "alt-profanity-check",
    )  # fmt: skip
    cells = [line.split(" | ") for line in out.splitlines() if line.startswith(("| toxicity", "| insult"))]
    assert [(row[0].removeprefix("| "), values(row)[2]) for row in cells] == expected


def test_a_missing_set_is_skipped_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_split(tmp_path, "surge_toxicity", "train", [{"text": "stupid", "label": "toxic"}])
    out, err = printed(
        capsys, tmp_path, "--judge", "alt-profanity-check", "--only", "perspective", "sets", "--resamples", "9"
    )
    assert out.startswith("<!-- table: sets -->\n")
    assert out.count("alt-profanity-check") == 1
    assert f"skipped perspective: {tmp_path} has no folder realtoxicityprompts_sample\n" in err
    assert f"skipped Davidson, hate: {tmp_path} has no folder davidson\n" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "SETS = 'missing': is not a folder; give the folder of the data sets\n"),
        ([".", "--judge", "nice"], "--judge = 'nice': is neither "),
        ([".", "--texts", "0"], "--texts = 0: must be above 0; 4000 is the default\n"),
        ([".", "--resamples", "0"], "--resamples = 0: must be above 0; 1000 is the default\n"),
        ([".", "--seed", "-1"], "--seed = -1: must not be negative; give 0 or more\n"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    output = capsys.readouterr()
    assert stop.value.code == 2
    assert output.out == ""
    assert output.err.startswith(message)
    assert output.err.count("\n") == 1


def test_a_table_in_markdown() -> None:
    table = Table("Two texts.", ["judge", "AUC"], [["a", "0.500"], ["b", "1.000"]])
    assert to_markdown("perspective", table) == (
        "<!-- table: perspective -->\nTwo texts.\n\n| judge | AUC |\n|---|---|\n| a | 0.500 |\n| b | 1.000 |\n"
    )
