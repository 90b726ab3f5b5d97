"""Which texts does a source hold, and how are they labelled?

This needs no torch, so labels that cannot be used are known before torch is imported.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple

from detoxrl.config.fit import FitConfig
from detoxrl.data.files import Record, columns_of, text_of, value_of
from detoxrl.data.records import read_splits
from detoxrl.errors import require

LabelKind = Literal["scores", "classes", "pairs"]
"""`scores`: each output has a label in [0, 1] of its own. `classes`: a text has one of several classes. `pairs`: of two
texts one was chosen."""

_YES = frozenset({"true", "yes", "up", "thumbs up", "👍"})
_NO = frozenset({"false", "no", "down", "thumbs down", "👎"})
# Emoji may be followed by one of five skin tones, or by the sign that asks for a coloured picture.
_WITHOUT_VARIANTS = dict.fromkeys([0xFE0F, *range(0x1F3FB, 0x1F400)])
# More classes than this are taken for a column that holds something else.
_MAX_CLASSES = 100


@dataclass(frozen=True)
class Example:
    """A text with its labels, or a pair of texts. A row of the source may hold several."""

    texts: tuple[str, ...]  # One text; of a pair, the chosen one and then the rejected one.
    targets: tuple[float, ...]  # In [0, 1], one per output; NaN for a label that is missing.
    group: str | None
    split: str
    row: int  # Of its split, counted from 1.


class Labelled(NamedTuple):
    """The examples of a source, and how many were left out for which reason."""

    kind: LabelKind
    labels: tuple[str, ...]  # Names of the outputs.
    examples: list[Example]
    left_out: dict[str, int]


class _Text(NamedTuple):
    """A text column, with the columns that belong to its texts."""

    column: str
    labels: tuple[str, ...]
    group: str | None


class _Unlabelled(NamedTuple):
    """A text as the source has it, with the values that are to become its labels."""

    text: str
    values: tuple[Any, ...]
    group: str | None
    split: str
    row: int

    @property
    def place(self) -> str:
        return f"row {self.row} of {self.split}"


def read_labelled(config: FitConfig) -> Labelled:
    """Return the examples of the source of `config`.

    Raises InputError when the source cannot be read, lacks a column, or has a value that is no label.
    """
    splits = read_splits(config.source, "source")
    read = _read_pairs if config.is_pairs else _read_texts
    labelled = read(splits, config)
    _require_usable_names(labelled.labels, config)
    return labelled


# Pairs


def _read_pairs(splits: Mapping[str, list[Record]], config: FitConfig) -> Labelled:
    records = list(chain.from_iterable(splits.values()))
    settings = {"chosen_column": str(config.chosen_column), "rejected_column": str(config.rejected_column)}
    for setting, column in settings.items():
        _require_column(records, column, setting, config)
    group = _column_beside(records, "", config.group_column, "group_column", config)

    examples = []
    left_out: Counter[str] = Counter()
    for split, row, record in _rows(splits):
        place = f"row {row} of {split}"
        chosen, rejected = (_text(record, column, setting, place) for setting, column in settings.items())
        if not (chosen.strip() and rejected.strip()):
            left_out["without a text"] += 1
        elif chosen == rejected:
            left_out["chosen and rejected are equal"] += 1
        else:
            examples.append(Example((chosen, rejected), (1.0,), _group(record, group), split, row))

    names = config.labels or ("score",)
    return Labelled("pairs", names, examples, dict(left_out))


# Texts with labels


def _read_texts(splits: Mapping[str, list[Record]], config: FitConfig) -> Labelled:
    records = list(chain.from_iterable(splits.values()))
    texts = [_resolved(records, column, config) for column in config.text_column]

    left_out: Counter[str] = Counter()
    unlabelled = []
    for candidate in _candidates(splits, texts):
        if not candidate.text.strip():
            left_out["without a text"] += 1
        elif all(map(_is_missing, candidate.values)):
            left_out["without a label"] += 1
        else:
            unlabelled.append(candidate)

    if _are_classes(unlabelled, config):
        kind: LabelKind = "classes"
        labels, targets = _class_targets(unlabelled, config)
    else:
        kind = "scores"
        labels = config.labels or tuple(column.rpartition(".")[2] for column in config.label_columns)
        targets = _score_targets(unlabelled, config)

    rows = zip(unlabelled, targets, strict=True)
    examples = [Example((row.text,), row_targets, row.group, row.split, row.row) for row, row_targets in rows]
    return Labelled(kind, labels, examples, dict(left_out))


def _candidates(splits: Mapping[str, list[Record]], texts: Sequence[_Text]) -> Iterator[_Unlabelled]:
    for split, row, record in _rows(splits):
        for text in texts:
            content = _text(record, text.column, "text_column", f"row {row} of {split}")
            values = tuple(value_of(record, column) for column in text.labels)
            yield _Unlabelled(content, values, _group(record, text.group), split, row)


def _are_classes(rows: Sequence[_Unlabelled], config: FitConfig) -> bool:
    """Return whether the values of the label column are names or numbers of classes."""
    if len(config.label_columns) > 1:
        return False
    if config.labels is not None and len(config.labels) > 1:
        return True
    names = sum(_as_score(row.values[0]) is None for row in rows)
    return names > len(rows) / 2  # A few texts in a column of numbers are mistakes, which are reported.


def _score_targets(rows: Sequence[_Unlabelled], config: FitConfig) -> list[tuple[float, ...]]:
    """Return a score in [0, 1] for each label column, NaN where it is missing."""
    count = len(config.label_columns)
    right_count = config.labels is None or len(config.labels) == count
    rule = f"does not name the {count} label columns"
    require(right_count, "labels", config.labels, rule, "give one name for each")

    targets = []
    for row in rows:
        columns = zip(config.label_columns, row.values, strict=True)
        targets.append(tuple(_score(value, column, row.place) for column, value in columns))
    return targets


def _score(value: Any, column: str, place: str) -> float:
    if _is_missing(value):
        return math.nan

    score = _as_score(value)
    rule = f"contains {value!r} in {place}, and labels lie in [0, 1]"
    in_range = score is not None and 0 <= score <= 1
    require(in_range, "label_columns", column, rule, "name another column, or the classes with --labels")
    assert score is not None
    return score


def _class_targets(rows: Sequence[_Unlabelled], config: FitConfig) -> tuple[tuple[str, ...], list[tuple[float, ...]]]:
    """Return the names of the classes, and for each row 1 for its class and 0 for the others."""
    labels = config.labels or _class_names(rows, config)
    number_of = {name.casefold(): number for number, name in enumerate(labels)}

    targets = []
    for row in rows:
        number = _class_number(row.values[0], number_of)
        rule = f"contains {row.values[0]!r} in {row.place}, which is none of {', '.join(labels)}"
        remedy = "name every class with --labels"
        require(number is not None, "label_columns", config.label_columns[0], rule, remedy)
        targets.append(tuple(float(other == number) for other in range(len(labels))))
    return labels, targets


def _class_names(rows: Sequence[_Unlabelled], config: FitConfig) -> tuple[str, ...]:
    """Return the values of the label column in alphabetical order. Names that differ in case are one."""
    names = {str(row.values[0]).strip().casefold(): str(row.values[0]).strip() for row in rows}
    rule = f"has {len(names)} different values"
    remedy = "name a column of scores in [0, 1] or of few classes"
    require(len(names) <= _MAX_CLASSES, "label_columns", config.label_columns[0], rule, remedy)
    return tuple(names[key] for key in sorted(names))


def _class_number(value: Any, number_of: Mapping[str, int]) -> int | None:
    """Return the number of the class that a value names, or is the number of; None if it does neither."""
    name = str(value).strip().casefold()
    if name in number_of:
        return number_of[name]

    number = _as_score(value)
    if number is None or number not in range(len(number_of)):
        return None
    return int(number)


# Values


def _as_score(value: Any) -> float | None:
    """Return the number that a value is: 1 and 0 for thumbs, true and false; None if it is none."""
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, str):
        return None

    word = value.strip().casefold().translate(_WITHOUT_VARIANTS).replace("_", " ").replace("-", " ").strip()
    if word in _YES or word in _NO:
        return float(word in _YES)
    try:
        return float(value)
    except ValueError:
        return None


def _is_missing(value: Any) -> bool:
    is_nan = isinstance(value, float) and math.isnan(value)
    is_blank = isinstance(value, str) and not value.strip()
    return value is None or is_nan or is_blank


def _text(record: Record, column: str, setting: str, place: str) -> str:
    value = value_of(record, column)
    is_list = isinstance(value, list)
    require(not is_list, setting, column, f"contains a list, not text, in {place}", "name a column of text")
    return text_of(record, column, setting, place)


def _group(record: Record, column: str | None) -> str | None:
    value = None if column is None else value_of(record, column)
    return None if _is_missing(value) else str(value)


# Columns


def _rows(splits: Mapping[str, list[Record]]) -> Iterator[tuple[str, int, Record]]:
    for split, records in splits.items():
        for row, record in enumerate(records, start=1):
            yield split, row, record


def _resolved(records: Sequence[Record], column: str, config: FitConfig) -> _Text:
    """Return a text column with its labels and group. Raises InputError for a column that does not exist."""
    _require_column(records, column, "text_column", config)
    labels = []
    for name in config.label_columns:
        found = _column_beside(records, column, name, "label_columns", config)
        assert found is not None
        labels.append(found)
    group = _column_beside(records, column, config.group_column, "group_column", config)
    return _Text(column, tuple(labels), group)


def _column_beside(
    records: Sequence[Record], text: str, name: str | None, setting: str, config: FitConfig
) -> str | None:
    """Return the column of this name in the object that holds a text, else in the row; None for no name."""
    if name is None:
        return None

    holder = text.rpartition(".")[0]
    beside = f"{holder}.{name}"
    if holder and _has_values(records, beside):
        return beside

    _require_column(records, name, setting, config)
    return name


def _require_column(records: Sequence[Record], column: str, setting: str, config: FitConfig) -> None:
    rule = f"is not a column of {config.source}"
    remedy = f"choose from {', '.join(_all_columns(records))}"
    exists = _has_values(records, column) or column in columns_of(records)
    require(exists, setting, column, rule, remedy)


def _has_values(records: Iterable[Record], column: str) -> bool:
    return any(value_of(record, column) is not None for record in records)


def _all_columns(records: Sequence[Record]) -> list[str]:
    """Return the names of the columns; of nested ones, the names of their fields in the first record that has them."""
    names = []
    for column in columns_of(records):
        values = (record.get(column) for record in records)
        first = next((value for value in values if value is not None), None)
        names += [f"{column}.{field}" for field in first] if isinstance(first, dict) else [column]
    return names


def _require_usable_names(labels: Sequence[str], config: FitConfig) -> None:
    """Raise InputError for names of outputs by which `FOLDER=LABEL` could not tell them apart."""
    setting = "labels" if config.labels else "label_columns"
    different = len({label.casefold() for label in labels}) == len(labels)
    require(different, setting, labels, "gives two outputs one name", "name each with --labels")

    for label in labels:
        rule = "contains =, which separates a classifier from its label"
        require("=" not in label, setting, label, rule, "name the outputs with --labels")
