"""Which toxic turns does a file hold, and which split may use each?

This needs no torch, so a file that cannot be used is known before torch is imported.
"""

import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from detoxrl.data.files import is_data_file, iterate_records, read_lines, text_of
from detoxrl.errors import require

_FIELD = "data.stress"
_COLUMN = "text"
# Share of the turns that each of the two held-out splits has, and the fewest that a split can do with.
_HELD_OUT_SHARE = 0.2
_FEWEST = 3


def stress_lines(path: Path) -> dict[str, list[str]]:
    """Return the distinct turns of a file by split (train, validation, test), each on one line.

    The file has one turn per line, or is a data file with a column `text`. The split of a turn follows from the words
    in it, so turns that differ in case or punctuation alone are never on two sides. Raises InputError for a file that
    cannot be read, has an empty turn, or too few turns for a split.
    """
    # A pipe could be read once only.
    require(not path.is_fifo(), _FIELD, str(path), "is a pipe", "give a file")
    turns: dict[str, dict[str, str]] = {"train": {}, "validation": {}, "test": {}}
    for number, text in enumerate(_texts(path), start=1):
        turn = " ".join(text.split())
        words = " ".join(re.findall(r"\w+", turn.casefold()))
        require(words != "", _FIELD, str(path), f"has no words in turn {number}", "leave it out")
        turns[_split_of(words)].setdefault(words, turn)

    total = sum(map(len, turns.values()))
    for split, of_split in turns.items():
        rule = f"has {len(of_split)} of its {total} distinct turns for {split}, and {_FEWEST} are needed"
        remedy = "add turns; by a hash of its words a fifth goes to test, a fifth to validation"
        require(len(of_split) >= _FEWEST, _FIELD, str(path), rule, remedy)
    return {split: list(of_split.values()) for split, of_split in turns.items()}


def _texts(path: Path) -> Iterator[str]:
    if not is_data_file(path):
        yield from read_lines(path, _FIELD)
        return
    for number, record in enumerate(iterate_records(path, _FIELD), start=1):
        rule = f"has no column {_COLUMN!r}"
        require(_COLUMN in record, _FIELD, str(path), rule, f"call the column of the turns {_COLUMN}")
        yield text_of(record, _COLUMN, _FIELD, f"row {number}")


def _split_of(words: str) -> str:
    """Return the split that a turn belongs to, whatever the seed."""
    share = zlib.crc32(words.encode()) / 2**32
    if share < _HELD_OUT_SHARE:
        return "test"
    return "validation" if share < 2 * _HELD_OUT_SHARE else "train"
