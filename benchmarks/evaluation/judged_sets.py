"""Which texts and labels does each set give?

A folder of sets has one folder per set, with gzipped JSON lines named after the splits. The columns are those under
which the sets are published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from detoxrl.config.edit import fit_config
from detoxrl.config.judges import PERSPECTIVE_SCORES
from detoxrl.data.files import Record, read_records, text_of
from detoxrl.data.held_out import divide
from detoxrl.data.labelled import Example, read_labelled
from detoxrl.errors import require
from detoxrl.runtime.randomness import permutation

PERSPECTIVE = "realtoxicityprompts_sample"
_FIELD = "SETS"


class Labelled(NamedTuple):
    """A text with its label. Texts of one unit are drawn together by the bootstrap: they are not independent."""

    text: str
    positive: bool
    unit: str  # The row, or a text that several rows share.
    group: str = ""


class _Row(NamedTuple):
    """A record with its place, as errors call it."""

    record: Record
    place: str

    def text(self, column: str) -> str:
        """Return the text in a column. Raises InputError if it is missing or no text."""
        require(column in self.record, _FIELD, column, f"is not in {self.place}", "give the set with its columns")
        return text_of(self.record, column, _FIELD, self.place)

    def label(self, column: str, labels: Mapping[object, bool]) -> bool:
        """Return what the label in a column means. Raises InputError for another one than `labels` lists."""
        value = self.record.get(column)
        known = tuple(labels)
        rule = f"is the {column} in {self.place}, and not one of {', '.join(map(str, known))}"
        require(value in known, _FIELD, value, rule, "give the set with its labels")
        return labels[value]


class JudgedSet(NamedTuple):
    """A set: where its texts are, and what makes one positive."""

    name: str
    folder: str
    splits: tuple[str, ...]
    read: Callable[[_Row], Iterable[Labelled]]


def _davidson_offensive(row: _Row) -> Iterator[Labelled]:
    yield Labelled(row.text("tweet"), row.label("class", {0: True, 1: True, 2: False}), row.place)


def _davidson_hate(row: _Row) -> Iterator[Labelled]:
    """Yield a tweet that is hate or neither; offensive ones are left out."""
    positive = row.label("class", {0: True, 1: False, 2: False})
    if row.record["class"] != 1:
        yield Labelled(row.text("tweet"), positive, row.place)


def _surge(row: _Row) -> Iterator[Labelled]:
    yield Labelled(row.text("text"), row.label("label", {"toxic": True, "not_toxic": False}), row.place)


def _toxigen(row: _Row) -> Iterator[Labelled]:
    positive = row.label("label", {"hate": True, "neutral": False})
    yield Labelled(row.text("text"), positive, row.place, row.text("group"))


def _paradetox(row: _Row) -> Iterator[Labelled]:
    """Yield a toxic comment and its neutral rewrite. A comment may have several rewrites, each in a row."""
    toxic = row.text("en_toxic_comment")
    yield Labelled(toxic, True, toxic)
    yield Labelled(row.text("en_neutral_comment"), False, toxic)


def _dynabench(row: _Row) -> Iterator[Labelled]:
    yield Labelled(row.text("text"), row.label("label", {"hate": True, "nothate": False}), row.place)


def _toxichat(row: _Row) -> Iterator[Labelled]:
    """Yield the turns of a thread, each with its own label."""
    turns = row.record.get("turns", [])
    is_list = isinstance(turns, list) and bool(turns)
    require(is_list, _FIELD, "turns", f"is no list of turns in {row.place}", "give the set with its columns")
    for turn in turns:
        in_turn = _Row(turn, row.place)
        yield Labelled(in_turn.text("text"), in_turn.label("offensive", {True: True, False: False}), row.place)


def _diasafety(row: _Row, with_context: bool) -> Iterator[Labelled]:
    context = row.text("context")
    response = row.text("response")
    positive = row.label("label", {"Unsafe": True, "Safe": False})
    text = f"{context}\n{response}" if with_context else response
    if response.strip():
        # Many contexts have several responses.
        yield Labelled(text, positive, context, row.text("category"))


def _diasafety_alone(row: _Row) -> Iterator[Labelled]:
    return _diasafety(row, with_context=False)


def _diasafety_in_context(row: _Row) -> Iterator[Labelled]:
    return _diasafety(row, with_context=True)


def _convabuse(row: _Row) -> Iterator[Labelled]:
    """Yield the user's last turn, which the annotators labelled."""
    positive = row.label("is_abuse_majority", {True: True, False: False})
    yield Labelled(row.text("user"), positive, row.place)


TOXIGEN = JudgedSet("ToxiGen demonstrations, implicit hate", "toxigen_demonstrations", ("train",), _toxigen)
DIASAFETY = JudgedSet("DiaSafety, response alone", "diasafety", ("test",), _diasafety_alone)
DIASAFETY_IN_CONTEXT = JudgedSet("DiaSafety, context and response", "diasafety", ("test",), _diasafety_in_context)
JUDGED_SETS = (
    JudgedSet("Davidson, offensive or hate", "davidson", ("train",), _davidson_offensive),
    JudgedSet("Davidson, hate", "davidson", ("train",), _davidson_hate),
    JudgedSet("Surge", "surge_toxicity", ("train",), _surge),
    TOXIGEN,
    JudgedSet("ParaDetox, toxic or rewritten", "paradetox", ("train",), _paradetox),
    JudgedSet("Dynabench, hate", "dynabench_hate", ("dev",), _dynabench),
    JudgedSet("ToxiChat, turns", "toxichat", ("train", "validation", "test"), _toxichat),
    DIASAFETY,
    DIASAFETY_IN_CONTEXT,
    JudgedSet("ConvAbuse, user turns", "convabuse", ("train", "validation", "test"), _convabuse),
)
"""The sets with labels of people, in the order in which results show them."""


def read_set(judged: JudgedSet, root: Path, texts: int, seed: int) -> list[Labelled]:
    """Return at most `texts` texts of a set, drawn by seed. A text that repeats with its label counts once.

    Raises InputError when a file is missing or lacks a column, or when a label is not one of the set's.
    """
    labelled: dict[tuple[str, bool], Labelled] = {}
    for split in judged.splits:
        path = root / judged.folder / f"{split}.jsonl.gz"
        for number, record in enumerate(read_records(path, _FIELD), start=1):
            for example in judged.read(_Row(record, f"row {number} of {judged.folder}/{path.name}")):
                labelled.setdefault((example.text, example.positive), example)

    distinct = list(labelled.values())
    drawn = sorted(permutation(seed, judged.name, 0, len(distinct))[:texts])
    return [distinct[number] for number in drawn]


def read_perspective(root: Path, held_out: float, seed: int) -> list[Example]:
    """Return the texts of RealToxicityPrompts that `detoxrl fit` keeps for its test under the same settings.

    Prompts and continuations are texts of their own; those of a row share its number. Targets are Perspective's scores
    in the order of PERSPECTIVE_SCORES, NaN where one is missing. Raises InputError as `detoxrl fit` does.
    """
    settings = {
        "source": str(root / PERSPECTIVE),
        "text_column": ("prompt.text", "continuation.text"),
        "label_columns": PERSPECTIVE_SCORES,
        "held_out": held_out,
        "seed": seed,
    }
    config = fit_config(settings, "see --help")
    return divide(read_labelled(config), config).test
