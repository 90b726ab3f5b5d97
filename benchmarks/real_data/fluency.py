"""Which sentences read fluently? Makes labelled ones, from which `detoxrl fit` learns it, of those that people wrote.

A sentence as it was written is fluent. The same sentence is not once words are dropped, doubled or exchanged, or its
end is missing: errors that generators make. So the classifier knows these errors, and no others.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from detoxrl.data.files import read_records, text_of
from detoxrl.runtime.files import write_text

SETTINGS: dict[str, Any] = {
    "text_column": ["written.text", "broken.text"],
    "label_columns": ["fluent"],
    "epochs": 1,
    "max_length": 64,
}
"""What `detoxrl fit` is given with these sentences; the label is `fluent`."""
_FEWEST_WORDS = 4


def write_sentences(pairs: str, column: str, path: Path) -> None:
    """Write each sentence of at least four words as it is and corrupted, with labels, in one row: SETTINGS reads it.

    Both are on the same side of the split then. Raises InputError for pairs that cannot be read.
    """
    rng = random.Random("fluency")
    lines = []
    for number, record in enumerate(read_records(Path(pairs), "PAIRS"), start=1):
        words = text_of(record, column, "PAIRS", f"row {number}").split()
        if len(words) >= _FEWEST_WORDS:
            written = {"text": " ".join(words), "fluent": 1}
            broken = {"text": " ".join(corrupted(words, rng)), "fluent": 0}
            lines.append({"written": written, "broken": broken})

    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def corrupted(words: Sequence[str], rng: random.Random) -> list[str]:
    """Return at least four words with one or two errors."""
    changed = list(words)
    while changed == list(words):  # Two errors may undo each other.
        changed = list(words)
        for _ in range(rng.randint(1, 2)):
            changed = rng.choice(_ERRORS)(changed, rng)
    return changed


def _without_a_word(words: list[str], rng: random.Random) -> list[str]:
    place = rng.randrange(len(words) - 1)
    return [*words[:place], *words[place + 1 :]]


def _with_a_word_twice(words: list[str], rng: random.Random) -> list[str]:
    place = rng.randrange(len(words))
    return [*words[: place + 1], *words[place:]]


def _with_neighbours_exchanged(words: list[str], rng: random.Random) -> list[str]:
    place = rng.randrange(len(words) - 1)
    return [*words[:place], words[place + 1], words[place], *words[place + 2 :]]


def _without_the_end(words: list[str], rng: random.Random) -> list[str]:
    return words[: rng.randint(len(words) // 2, len(words) - 1)]


def _with_a_word_from_elsewhere(words: list[str], rng: random.Random) -> list[str]:
    place = rng.randrange(len(words))
    return [*words[:place], rng.choice(words), *words[place:]]


_ERRORS: tuple[Callable[[list[str], random.Random], list[str]], ...] = (
    _without_a_word,
    _with_a_word_twice,
    _with_neighbours_exchanged,
    _without_the_end,
    _with_a_word_from_elsewhere,
)
