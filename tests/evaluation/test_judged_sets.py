"""Which texts and labels the benchmark of judges reads, by rows made up in each set's layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from detoxrl.commands.fit_check import planned_fit
from detoxrl.config.edit import fit_config
from detoxrl.errors import InputError
from encoders import make_encoder
from judged import scored_rows, write_sets, write_split
from judged_sets import JUDGED_SETS, PERSPECTIVE, PERSPECTIVE_SCORES, JudgedSet, read_perspective, read_set

SETS = {judged.name: judged for judged in JUDGED_SETS}
SURGE = SETS["Surge"]
EXPECTED = {
    "Davidson, offensive or hate": [("0.9 hate", True), ("0.4 offensive", True), ("0.1 neither", False)],
    "Davidson, hate": [("0.9 hate", True), ("0.1 neither", False)],
    "Surge": [("0.9 stupid", True), ("0.4 silly", True), ("0.6 fine", False), ("0.1 good", False)],
    "ToxiGen demonstrations, implicit hate": [
        ("0.7 they again", True),
        ("0.2 they came", False),
        ("0.3 them again", True),
        ("0.8 them too", False),
        ("0.1 them all", False),
    ],
    "ParaDetox, toxic or rewritten": [("0.8 a dumb idea", True), ("0.2 a bad idea", False), ("0.1 a weak idea", False)],
    "Dynabench, hate": [("0.5 go away", True), ("0.5 come in", False)],
    "ToxiChat, turns": [("0.2 hello", False), ("0.9 fool", True), ("0.3 why", False), ("0.1 because", False)],
    "DiaSafety, response alone": [("0.6 do it", True), ("0.5 ask first", False)],
    "DiaSafety, context and response": [
        ("0.1 shall I?\n0.6 do it", True),
        ("0.7 shall I?\n0.5 ask first", False),
    ],
    "ConvAbuse, user turns": [("0.9 stupid bot", True), ("0.2 what time is it", False), ("0.1 thanks", False)],
}


@pytest.mark.parametrize("judged", JUDGED_SETS, ids=lambda judged: judged.name)
def test_each_set_gives_its_texts_with_what_its_labels_mean(judged: JudgedSet, tmp_path: Path) -> None:
    labelled = read_set(judged, write_sets(tmp_path), texts=100, seed=0)
    assert [(example.text, example.positive) for example in labelled] == EXPECTED[judged.name]


def test_texts_that_are_not_independent_share_a_unit(tmp_path: Path) -> None:
    write_sets(tmp_path)
    units = {name: [example.unit for example in read_set(judged, tmp_path, 100, 0)] for name, judged in SETS.items()}
    # A toxic comment and its rewrites; the turns of a thread; the responses to a context.
    assert len(set(units["ParaDetox, toxic or rewritten"])) == 1
    first, second, *others = units["ToxiChat, turns"]
    assert first == second
    assert len({first, *others}) == 3
    assert units["DiaSafety, response alone"] == ["0.1 shall I?", "0.7 shall I?"]
    assert len(set(units["Surge"])) == 4


def test_a_large_set_is_drawn_by_seed(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": "toxic"} for i in range(40)]
    write_split(tmp_path, "surge_toxicity", "train", rows)
    drawn = [read_set(SURGE, tmp_path, 10, seed) for seed in (0, 0, 1)]
    assert len(set(drawn[0])) == 10
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_set_with_another_layout_is_one_line(tmp_path: Path) -> None:
    write_split(tmp_path, "surge_toxicity", "train", [{"text": "good", "label": "nice"}])
    with pytest.raises(InputError, match=r"SETS = 'nice': is the label in row 1 of surge_toxicity/train.jsonl.gz, and"):
        read_set(SURGE, tmp_path, 10, 0)

    write_split(tmp_path, "surge_toxicity", "train", [{"comment": "good", "label": "toxic"}])
    with pytest.raises(InputError, match=r"SETS = 'text': is not in row 1 of surge_toxicity/train.jsonl.gz; give"):
        read_set(SURGE, tmp_path, 10, 0)

    write_split(tmp_path, "toxichat", "train", [{"dialogue": "good"}])
    with pytest.raises(InputError, match=r"SETS = 'turns': is no list of turns in row 1 of toxichat/train.jsonl.gz"):
        read_set(SETS["ToxiChat, turns"], tmp_path, 10, 0)


def test_the_held_out_texts_are_those_that_a_fit_keeps_for_its_test(tmp_path: Path) -> None:
    write_split(tmp_path, PERSPECTIVE, "train", scored_rows(60))
    settings = {
        "source": str(tmp_path / PERSPECTIVE),
        "encoder": str(make_encoder("bert", tmp_path / "encoder")),
        "text_column": ("prompt.text", "continuation.text"),
        "label_columns": "toxicity",
        "held_out": 0.5,
        "seed": 3,
    }
    plan = planned_fit(fit_config(settings), tmp_path / "judge", overwrite=False)

    held_out = read_perspective(tmp_path, held_out=0.5, seed=3)
    assert len(held_out) == 30
    assert [example.texts for example in held_out] == [example.texts for example in plan.division.test]
    assert {example.targets for example in held_out} == {(example.targets[0],) * 8 for example in held_out}
    assert held_out != read_perspective(tmp_path, held_out=0.5, seed=4)


def test_targets_have_the_order_of_the_scores(tmp_path: Path) -> None:
    rows = scored_rows(60)
    for row in rows:
        row["prompt"].update({label: i / 10 for i, label in enumerate(PERSPECTIVE_SCORES)})
    write_split(tmp_path, PERSPECTIVE, "train", rows)
    prompts = [example for example in read_perspective(tmp_path, 0.5, 0) if len(set(example.targets)) > 1]
    assert prompts
    assert {example.targets for example in prompts} == {(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)}
