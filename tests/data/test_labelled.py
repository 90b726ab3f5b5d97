"""Labelled texts: where texts and labels are found, what a value means, who is held out, and what is refused."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest

from detoxrl.config.edit import fit_config
from detoxrl.config.fit import FitConfig
from detoxrl.data.held_out import Division, divide
from detoxrl.data.labelled import Example, Labelled, read_labelled
from detoxrl.errors import InputError
from encoders import labelled_rows, write_rows


def config_of(rows: list[dict[str, Any]], folder: Path, **settings: Any) -> FitConfig:
    return fit_config({"source": write_rows(folder / "my.jsonl", rows), **settings})


def read(rows: list[dict[str, Any]], folder: Path, **settings: Any) -> Labelled:
    return read_labelled(config_of(rows, folder, **settings))


def targets(labelled: Labelled) -> list[tuple[float, ...]]:
    return [example.targets for example in labelled.examples]


def with_labels(*values: Any) -> list[dict[str, Any]]:
    return [{"text": f"text {number}", "label": value} for number, value in enumerate(values)]


def test_numbers_in_the_unit_interval_are_scores(tmp_path: Path) -> None:
    labelled = read(with_labels(0, 0.25, "1", "0.5", True, False), tmp_path)
    assert (labelled.kind, labelled.labels) == ("scores", ("label",))
    assert targets(labelled) == [(0,), (0.25,), (1,), (0.5,), (1,), (0,)]
    assert [example.texts for example in labelled.examples[:2]] == [("text 0",), ("text 1",)]


def test_thumbs_are_labels(tmp_path: Path) -> None:
    ups = ["up", "UP", "👍", "👍🏽", "thumbs_up", "Thumbs-up", "true", "yes", 1, "1"]
    downs = ["down", "👎", "👎🏿", "thumbs down", "False", "no", 0, "0.0"]
    labelled = read(with_labels(*ups, *downs), tmp_path, labels="liked")
    assert (labelled.kind, labelled.labels) == ("scores", ("liked",))
    assert targets(labelled) == [(1.0,)] * len(ups) + [(0.0,)] * len(downs)


def test_other_values_are_the_names_of_classes(tmp_path: Path) -> None:
    labelled = read(with_labels("Rude", "civil", "rude ", "odd"), tmp_path)
    assert labelled.kind == "classes"
    assert [label.lower() for label in labelled.labels] == ["civil", "odd", "rude"]
    assert targets(labelled) == [(0, 0, 1), (1, 0, 0), (0, 0, 1), (0, 1, 0)]


def test_named_classes_are_values_by_name_or_number(tmp_path: Path) -> None:
    labelled = read(with_labels(1, "nothate", "0", "HATE", 1.0, True), tmp_path, labels=["nothate", "hate"])
    assert (labelled.kind, labelled.labels) == ("classes", ("nothate", "hate"))
    assert [row.index(1) for row in targets(labelled)] == [1, 0, 0, 1, 1, 1]
    three = read(with_labels(0, 2, 1), tmp_path, labels=["hate", "offensive", "neither"])
    assert [row.index(1) for row in targets(three)] == [0, 2, 1]


def test_several_columns_are_several_outputs_and_missing_ones_are_no_label(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "rude": 0.5, "threat": None},
        {"text": "b", "rude": "", "threat": 1},
        {"text": "c", "rude": None, "threat": " "},
        {"text": " ", "rude": 1, "threat": 1},
        {"text": None, "rude": 1, "threat": 1},
        {"text": "d", "rude": float("nan"), "threat": 0},
    ]
    labelled = read(rows, tmp_path, label_columns=["rude", "threat"])
    assert labelled.labels == ("rude", "threat")
    assert [example.texts[0] for example in labelled.examples] == ["a", "b", "d"]
    known = [[None if math.isnan(value) else value for value in row] for row in targets(labelled)]
    assert known == [[0.5, None], [None, 1.0], [None, 0.0]]
    assert labelled.left_out == {"without a label": 1, "without a text": 2}


def test_a_label_is_looked_up_beside_its_text_and_then_in_the_row(tmp_path: Path) -> None:
    prompt = {"text": "p", "toxicity": 0.1, "who": "x"}
    rows = [{"prompt": prompt, "continuation": {"text": "c", "toxicity": 0.9}, "split": 0.5, "who": "y"}]
    labelled = read(
        rows, tmp_path, text_column=["prompt.text", "continuation.text"], label_columns=["toxicity", "split"],
        group_column="who",
    )  # fmt: skip
    assert labelled.labels == ("toxicity", "split")
    assert labelled.examples == [
        Example(("p",), (0.1, 0.5), "x", "file", 1),
        Example(("c",), (0.9, 0.5), "y", "file", 1),
    ]
    whole = read(rows, tmp_path, text_column="prompt.text", label_columns="continuation.toxicity")
    assert whole.labels == ("toxicity",)
    assert targets(whole) == [(0.9,)]


def test_a_csv_has_labels_as_text(tmp_path: Path) -> None:
    with (tmp_path / "my.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["comment", "toxic"], ["a", "1"], ["b", "0"], ["", "1"]])
    settings = {"source": tmp_path / "my.csv", "text_column": "comment", "label_columns": "toxic"}
    labelled = read_labelled(fit_config(settings))
    assert targets(labelled) == [(1.0,), (0.0,)]
    assert labelled.left_out == {"without a text": 1}


def test_pairs_have_a_chosen_and_a_rejected_text(tmp_path: Path) -> None:
    rows = [{"good": "a", "bad": "b"}, {"good": "c", "bad": "c"}, {"good": "d", "bad": ""}]
    labelled = read(rows, tmp_path, chosen_column="good", rejected_column="bad")
    assert (labelled.kind, labelled.labels) == ("pairs", ("score",))
    assert [example.texts for example in labelled.examples] == [("a", "b")]
    assert labelled.left_out == {"chosen and rejected are equal": 1, "without a text": 1}


REFUSALS: list[tuple[list[dict[str, Any]], dict[str, Any], str]] = [
    (with_labels(1, 0), {"text_column": "body"}, r"text_column = 'body': is not a column of .*choose from text, label"),
    (with_labels(1, 0), {"label_columns": "rude"}, r"label_columns = 'rude': is not a column of .*text, label"),
    (with_labels(1, 0), {"group_column": "who"}, r"group_column = 'who': is not a column of"),
    ([{"a": {"text": "x"}, "b": 1}], {"text_column": "text"}, r"choose from a\.text, b"),
    (with_labels(1, 0, 2), {}, r"label_columns = 'label': contains 2 in row 3 of file, and labels lie in \[0, 1\]"),
    (with_labels(1, 0, -0.5), {}, r"contains -0\.5 in row 3"),
    (with_labels(1, 0, "n/a"), {}, r"contains 'n/a' in row 3 of file, and labels lie in \[0, 1\]; name another"),
    (with_labels(1, 0, [1]), {}, r"contains \[1\] in row 3"),
    (with_labels("a", "b"), {"label_columns": ["label", "text"]}, r"contains 'a' in row 1 of file, and labels lie"),
    (with_labels("a", "b"), {"labels": ["a", "c"]}, r"contains 'b' in row 2 of file, which is none of a, c; name"),
    (with_labels(0, 1, 2), {"labels": ["a", "b"]}, r"contains 2 in row 3 of file, which is none of a, b"),
    (with_labels(*(f"v{n}" for n in range(101))), {}, r"label_columns = 'label': has 101 different values"),
    (with_labels(1, 0), {"label_columns": ["label", "text"], "labels": ["a"]}, r"does not name the 2 label columns"),
    ([{"text": "x", "a": {"l": 1}, "b": {"l": 0}}], {"label_columns": ["a.l", "b.l"]}, r"gives two outputs one name"),
    ([{"text": "x", "a=b": 1}], {"label_columns": "a=b"}, r"'a=b': contains =, which separates"),
    (with_labels(1, 0), {"labels": "a=b"}, r"labels = 'a=b': contains ="),
    ([{"text": ["x"], "label": 1}], {}, r"text_column = 'text': contains a list, not text, in row 1 of file"),
    ([{"text": {"body": "x"}, "label": 1}], {}, r"name a field of it, such as text\.body"),
    ([{"text": 3, "label": 1}], {}, r"contains int, not text, in row 1 of file"),
    (with_labels(1), {"chosen_column": "text"}, r"rejected_column = None: is missing beside the other text"),
    (with_labels(1), {"chosen_column": "text", "rejected_column": "x"}, r"rejected_column = 'x': is not a column"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "settings", "message"), REFUSALS, ids=[case[2][:40] for case in REFUSALS])
def test_what_is_no_label_is_bad_input(
    tmp_path: Path, rows: list[dict[str, Any]], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read(rows, tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0}, r"^lr = 0\.0: must be above 0"),
        ({"epochs": "x"}, "^epochs = 'x': must be a whole number; see `detoxrl fit --help`"),
        ({"held_out": 1}, r"^held_out = 1\.0: must be below 1"),
        ({"calibration": "platt"}, "^calibration = 'platt': must be 'temperature', 'isotonic' or 'none'"),
        ({"lora_rnk": 4}, "^setting = 'lora_rnk': is not a setting; did you mean lora_rank?"),
        ({"text_column": ["a", "A"]}, "^text_column = .*repeats a name"),
        ({"label_columns": []}, "^label_columns = .*: must not be empty"),
        ({"chosen_column": "a", "rejected_column": "b", "calibration": "isotonic"}, "^calibration = 'isotonic': needs"),
        ({"chosen_column": "a", "rejected_column": "b", "balance": True}, "^balance = True: needs labels"),
        ({"chosen_column": "a", "rejected_column": "b", "labels": ["a", "b"]}, "names several outputs"),
    ],
)
def test_settings_that_do_not_fit_are_bad_input(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit_config({"source": "x", **settings})


# Held-out examples


def division_of(rows: list[dict[str, Any]], folder: Path, **settings: Any) -> Division:
    config = config_of(rows, folder, **settings)
    return divide(read_labelled(config), config)


def distinct(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Return rows whose texts share no three words."""
    return [{"text": f"w{n} x{n} y{n} z{n}", "label": n % 2} for n in range(start, start + count)]


def test_rows_are_drawn_by_the_seed_and_keep_their_texts_together(tmp_path: Path) -> None:
    rows = [{"a": {"t": f"a{n} b{n} c{n}", "l": 0}, "b": {"t": f"d{n} e{n} f{n}", "l": 1}} for n in range(100)]
    settings = {"text_column": ["a.t", "b.t"], "label_columns": "l", "held_out": 0.3}
    division = division_of(rows, tmp_path, **settings)
    parts = [division.train, division.validation, division.test]
    assert list(map(len, parts)) == [140, 30, 30]
    held = [{example.row for example in part} for part in parts]
    assert [len(part) for part in held] == [70, 15, 15]
    assert set.union(*held) == set(range(1, 101))
    assert division_of(rows, tmp_path, **settings) == division
    assert division_of(rows, tmp_path, **settings, seed=1).test != division.test


def test_splits_of_a_folder_are_taken_and_a_missing_one_is_drawn(tmp_path: Path) -> None:
    source = tmp_path / "data"
    source.mkdir()
    write_rows(source / "train.jsonl", distinct(40))
    write_rows(source / "test.jsonl", distinct(8, start=100))
    config = fit_config({"source": source, "held_out": 0.5})
    division = divide(read_labelled(config), config)
    assert [len(part) for part in (division.train, division.validation, division.test)] == [30, 10, 8]
    assert {example.split for example in division.test} == {"test"}
    assert {example.split for example in division.validation} == {"train"}

    write_rows(source / "dev.jsonl", distinct(6, start=200))
    division = divide(read_labelled(config), config)
    assert [len(part) for part in (division.train, division.validation, division.test)] == [40, 6, 8]
    assert division.unused == 0


def test_held_out_texts_that_training_repeats_are_removed_and_counted(tmp_path: Path) -> None:
    source = tmp_path / "data"
    source.mkdir()
    train, validation, test = distinct(20), distinct(6, start=100), distinct(6, start=200)
    long = "one two three four five six seven eight nine ten"
    train.append({"text": long, "label": 1})
    validation.append({"text": "W3, X3! y3 Z3", "label": 0})  # The same words as a training text.
    test += [
        {"text": f"{long} eleven", "label": 1},  # 8 of 9 trigrams are those of a training text.
        {"text": "w101 x101 y101 z101", "label": 1},  # In the validation.
        {"text": "w3 other words here", "label": 1},
    ]
    for name, rows in (("train", train), ("validation", validation), ("test", test)):
        write_rows(source / f"{name}.jsonl", rows)
    config = fit_config({"source": source})
    division = divide(read_labelled(config), config)
    assert division.leaks == {"validation": 1, "test": 2}
    assert [example.texts[0] for example in division.test[-1:]] == ["w3 other words here"]
    assert (len(division.train), len(division.validation), len(division.test)) == (21, 6, 7)


def test_texts_with_two_labels_and_pairs_in_two_orders_are_counted(tmp_path: Path) -> None:
    rows = [*distinct(40), {"text": "W1  x1 Y1 z1", "label": 0.4}, {"text": "w2 x2 y2 z2", "label": 0.3}]
    assert division_of(rows, tmp_path, held_out=0.4).conflicts == 1
    pairs = [{"g": f"a{n} b{n} c{n}", "b": f"d{n} e{n} f{n}"} for n in range(40)]
    pairs += [{"g": "d1 e1 f1", "b": "A1 b1 c1"}, {"g": "a2 b2 c2", "b": "d2 e2 f2"}]
    settings = {"chosen_column": "g", "rejected_column": "b", "held_out": 0.4}
    assert division_of(pairs, tmp_path, **settings).conflicts == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (distinct(20), r"source = .*: leaves 16 examples for train, and at least 20 are needed; give more rows"),
        (distinct(30), r"leaves 3 examples for validation, and at least 5 are needed"),
        ([{"text": "same text", "label": n % 2} for n in range(80)], r"leaves 0 .*\(8 were removed because earlier"),
        ([{"text": " ", "label": 1}], r"leaves 0 examples for train"),
        ([row | {"label": 1} for row in distinct(80)], r"label_columns = 'label': is 1 in every training example"),
        ([row | {"label": "rude"} for row in distinct(80)], r"'rude': is the class of every training example"),
    ],
)
def test_too_few_or_equal_examples_are_bad_input(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        division_of(rows, tmp_path)


def test_a_class_that_no_training_text_has_is_bad_input(tmp_path: Path) -> None:
    rows = [{"text": row["text"], "label": row["tone"]} for row in labelled_rows(200)]
    with pytest.raises(InputError, match="'mixed': is the class of no training example"):
        division_of(rows, tmp_path, labels=["civil", "rude", "mixed"])


@pytest.mark.parametrize(("role", "other"), [("validation", "test"), ("test", "validation")])
def test_an_output_with_few_held_out_labels_is_bad_input(tmp_path: Path, role: str, other: str) -> None:
    source = tmp_path / "data"
    source.mkdir()
    known = {"train": 40, other: 10, role: 5}
    for place, (split, count) in enumerate(known.items()):
        rows = [row | {"threat": row["label"]} for row in distinct(max(count, 10), start=100 * place)]
        for row in rows[count:]:
            row["threat"] = None
        write_rows(source / f"{split}.jsonl", rows)
    config = fit_config({"source": source, "label_columns": ["label", "threat"]})
    assert len(getattr(divide(read_labelled(config), config), role)) == 10

    write_rows(source / f"{role}.jsonl", [*rows[1:], {"text": "a b c", "label": 1, "threat": None}])
    message = f"label_columns = 'threat': is known for 4 examples for {role}, and at least 5 are needed; give more rows"
    with pytest.raises(InputError, match=message):
        divide(read_labelled(config), config)


def test_a_folder_needs_a_training_split(tmp_path: Path) -> None:
    source = tmp_path / "data"
    source.mkdir()
    write_rows(source / "dev.jsonl", distinct(40))
    write_rows(source / "test.jsonl", distinct(40, start=100))
    config = fit_config({"source": source})
    with pytest.raises(InputError, match="has the splits dev, test, but not train; add that split"):
        divide(read_labelled(config), config)
