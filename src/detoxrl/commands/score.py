"""How toxic is each of these texts?"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np

from detoxrl.config.judges import PERSPECTIVE, PERSPECTIVE_SCORES, default_other_judges, default_primary_judge
from detoxrl.data.files import DATA_SUFFIXES, columns_of, is_data_file, read_lines, read_records, split_lines, text_of
from detoxrl.errors import require
from detoxrl.evaluation.insults import toxic_words
from detoxrl.evaluation.judges import (
    Judge,
    JudgeSource,
    judge_source,
    load_judges,
    memoized,
    profanity_judge,
)
from detoxrl.evaluation.statistics import Floats
from detoxrl.report.masking import mask, masking_pattern
from detoxrl.report.score_table import ScoredText, print_scores
from detoxrl.runtime.console import progress, status

# Texts between two signs of life: lines of JSON, or a step of the progress bar.
_BATCH = 256
# More texts than this are not shown one by one, but the most toxic ones of them.
_MAX_SHOWN = 40
_MOST_TOXIC = 20
_TEXT_COLUMN = "text"
_ALL_SCORES = f"{PERSPECTIVE}=all"
_EVERY_SCORE = [PERSPECTIVE, *(f"{PERSPECTIVE}={score}" for score in PERSPECTIVE_SCORES[1:])]


class _Batch(NamedTuple):
    """Texts that follow each other, the number of texts before them, and their toxicity by judge, (N,) each."""

    before: int
    texts: Sequence[str]
    toxicity: Mapping[str, Floats]


def named_judges(names: Sequence[str]) -> list[JudgeSource]:
    """Return where the judges of the command line come from, the default ones without names. Raises InputError."""
    remedy = "a classifier needs = and its toxic label; texts stand before --judge"
    asked: list[str] = []
    for name in names or [default_primary_judge(), *default_other_judges()]:
        asked += _EVERY_SCORE if name == _ALL_SCORES else [name]
    return [judge_source(name, "--judge", remedy) for name in dict.fromkeys(asked)]


def given_texts(words: Sequence[str], file: str | None, column: str | None) -> list[str]:
    """Return the texts of the command line, of a file, or of stdin ("-", or a pipe where nothing else is named).

    Raises InputError when there are none, when they cannot be read, or are given in two ways.
    """
    if file is None and not words:
        file = _piped()
    is_table = file is not None and is_data_file(Path(file))
    remedy = f"give a --file that ends in one of {', '.join(DATA_SUFFIXES)}"
    require(column is None or is_table, "--column", column, "requires a file with columns", remedy)

    if file is None:
        return _argument_texts(words)
    require(not words, "--file", file, "cannot be combined with texts on the command line", "leave one of them out")
    if is_table:
        return _column_texts(Path(file), column or _TEXT_COLUMN)
    if file == "-":
        return split_lines(sys.stdin.buffer.read(), "--file", file)
    return read_lines(Path(file), "--file")


def score(texts: Sequence[str], sources: Sequence[JudgeSource], jsonl: bool, show: bool) -> None:
    """Print the toxicity of each text by the judges of these sources: a table, or JSON lines.

    Words that are toxic alone are masked unless `show`. Raises InputError for a judge that cannot be loaded.
    """
    with status(f"loading {', '.join(dict.fromkeys(judge.source for judge in sources))}"):
        loaded = load_judges(sources)
    for key in ("index", "text"):
        rule = "is the name of another key of the JSON lines"
        require(not (jsonl and key in loaded), "--judge", key, rule, "rename the folder")
    judges = {name: memoized(judge) for name, judge in loaded.items()}

    if jsonl:
        _print_lines(texts, judges, show)
    else:
        _print_table(texts, judges, show)


def _piped() -> str:
    """Return the name of stdin as a file. Raises InputError if nothing is piped into it."""
    # Python has no stdin where the shell has closed it.
    piped = sys.stdin is not None and not sys.stdin.isatty()
    remedy = 'type detoxrl score "You are an idiot" "Thank you", or --file FILE'
    require(piped, "TEXT", "", "is missing", remedy)
    return "-"


def _argument_texts(words: Sequence[str]) -> list[str]:
    for word in words:
        # Python keeps a byte that is not UTF-8 as a lone surrogate, which tokenizers refuse.
        is_text = all(not "\ud800" <= character <= "\udfff" for character in word)
        require(is_text, "TEXT", word, "is not UTF-8", "encode it as UTF-8")
    return list(words)


def _column_texts(path: Path, column: str) -> list[str]:
    """Return the text of each record of a file, "" where it has none."""
    records = read_records(path, "--file")
    columns = columns_of(records)
    remedy = f"choose from {', '.join(columns)}"
    require(column in columns, "--column", column, f"is not a column of {path}", remedy)
    return [text_of(record, column, "--column", f"row {row} of {path}") for row, record in enumerate(records, start=1)]


def _rated(texts: Sequence[str], judges: Mapping[str, Judge], watched: bool) -> Iterator[_Batch]:
    """Yield the texts in batches with their toxicity; if `watched`, with a progress display on stderr."""
    display = progress("score", len(texts)) if watched else nullcontext(lambda done, status: None)
    with display as reach:
        for before in range(0, len(texts), _BATCH):
            batch = texts[before : before + _BATCH]
            yield _Batch(before, batch, {name: judge(batch) for name, judge in judges.items()})
            reach(before + len(batch), "")


def _masked(texts: Sequence[str], judges: Mapping[str, Judge]) -> list[str]:
    """Return the texts without the known insults and the words that are toxic alone, as a run masks them."""
    # Word by word a linear model is fast, and sees what a classifier of sentences may not know.
    judge = profanity_judge() or next(iter(judges.values()))
    pattern = masking_pattern(toxic_words([texts], judge))
    return [mask(text, pattern) for text in texts]


def _print_lines(texts: Sequence[str], judges: Mapping[str, Judge], show: bool) -> None:
    """Print a JSON object per text, in ASCII: a text can neither end a line nor control a terminal."""
    # A progress bar in a terminal catches what is printed meanwhile, and sends it to stderr.
    output = sys.stdout
    # In a terminal the lines themselves show the progress.
    watched = len(texts) > _BATCH and not output.isatty()

    for batch in _rated(texts, judges, watched):
        shown = batch.texts if show else _masked(batch.texts, judges)
        lines = []
        for i, text in enumerate(shown):
            toxicity = {name: round(float(values[i]), 6) for name, values in batch.toxicity.items()}
            lines.append(json.dumps({"index": batch.before + i + 1, "text": text, **toxicity}) + "\n")
        output.write("".join(lines))
        output.flush()


def _print_table(texts: Sequence[str], judges: Mapping[str, Judge], show: bool) -> None:
    batches = list(_rated(texts, judges, watched=len(texts) > _BATCH))
    toxicity = {name: np.concatenate([batch.toxicity[name] for batch in batches]) for name in judges}

    rows = _rows_to_show(toxicity, len(texts))
    chosen = [texts[row] for row in rows]
    shown = chosen if show else _masked(chosen, judges)
    scored = [
        ScoredText(row + 1, text, [float(values[row]) for values in toxicity.values()])
        for row, text in zip(rows, shown, strict=True)
    ]

    notes = []
    if len(rows) < len(texts):
        notes.append(f"the {len(rows)} most toxic of {len(texts):,} texts; --jsonl prints all")
    if shown != chosen:
        notes.append("toxic words are masked; --show shows them")
    print_scores(scored, toxicity, "\n".join(notes))


def _rows_to_show(toxicity: Mapping[str, Floats], count: int) -> list[int]:
    """Return the rows of all texts, or of the most toxic ones of many by whichever judge rates them highest."""
    if count <= _MAX_SHOWN:
        return list(range(count))
    highest = np.max(list(toxicity.values()), axis=0)
    return [int(row) for row in np.argsort(-highest, kind="stable")[:_MOST_TOXIC]]
