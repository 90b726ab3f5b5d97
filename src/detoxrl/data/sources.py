"""Which rows do a file, a folder or a hub data set hold, and which responses that were written elsewhere?"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from detoxrl.config.schema import Config
from detoxrl.data.conversations import as_text, awaits_reply, messages_of, split_reply, spoken
from detoxrl.data.files import Record, columns_of, text_of, value_of
from detoxrl.data.layout import Columns, find_columns, response_of, response_records
from detoxrl.data.records import read_splits
from detoxrl.data.rows import Row
from detoxrl.errors import require

# Values that are nested deeper than this are left out of what travels with a row.
_MAX_DEPTH = 50


def read_source(config: Config) -> dict[str, list[Row]]:
    """Return the rows of each split of the source. A row without a text has an empty one.

    Raises InputError when the source cannot be read, lacks a column, or has something else than text in one.
    """
    records = read_splits(config.data.source, "data.source")
    names = columns_of(chain.from_iterable(records.values()))
    columns = find_columns(names, config)
    rows = {}
    for split, split_records in records.items():
        # Every row has every column, so that a reward function finds it in any batch.
        whole = [{**dict.fromkeys(names), **record} for record in split_records]
        rows[split] = _rows(split, whole, columns, config)
    return rows


def _rows(split: str, records: list[Record], columns: Columns, config: Config) -> list[Row]:
    """Return the rows of a split. Raises InputError for repeated ids and for values that do not fit."""
    ids = _row_ids(split, records, columns.id)
    make = _chat_row if config.data.task == "chat" else _text_row
    rows = []

    for number, (row_id, record) in enumerate(zip(ids, records, strict=True), start=1):
        row = make(row_id, record, columns, f"row {number} of {split}")
        civil = row.references if config.task.references_are_civil else ()
        own = {name: _as_json(value) for name, value in record.items()}
        toxicity = _toxicity(record, columns.toxicity, f"row {number} of {split}")
        task = config.data.task
        rows.append(replace(row, task=task, civil_references=civil, columns=own, toxicity=toxicity))

    return rows


def _text_row(row_id: str, record: Record, columns: Columns, place: str) -> Row:
    text = text_of(record, columns.text, "data.text_column", place)
    references: tuple[str, ...] = ()
    if columns.reference is not None:
        reference = text_of(record, columns.reference, "data.reference_column", place)
        references = (reference,) if reference.strip() else ()
    return Row(id=row_id, text=text, references=references)


def _chat_row(row_id: str, record: Record, columns: Columns, place: str) -> Row:
    """Return the row of a conversation; its text is empty if there is no message of the user to reply to."""
    messages = messages_of(value_of(record, columns.text), "data.text_column", columns.text, place)
    messages, reply = split_reply(messages)
    if columns.reference is not None:
        replies = messages_of(value_of(record, columns.reference), "data.reference_column", columns.reference, place)
        reply = as_text(replies, only="assistant") or as_text(replies, only="user") or reply

    references = (reply,) if reply and reply.strip() else ()
    text = as_text(spoken(messages)) if awaits_reply(messages) else ""
    return Row(id=row_id, text=text, messages=messages, references=references)


def _as_json(value: Any, depth: int = 0) -> Any:
    """Return a value as a run folder keeps it: None for what JSON cannot say, such as NaN, or what is nested deep."""
    if depth > _MAX_DEPTH:
        return None
    if isinstance(value, list):
        return [_as_json(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {str(key): _as_json(item, depth + 1) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else None


def _toxicity(record: Record, column: str | None, place: str) -> float | None:
    """Return the toxicity of a row's text, None without one. Raises InputError for what is no number in [0, 1]."""
    value = None if column is None else value_of(record, column)
    if value is None or value == "":
        return None

    try:
        toxicity = float(value)
    except (TypeError, ValueError, OverflowError):
        toxicity = math.nan
    rule = f"contains {value!r} in {place}, and toxicity lies in [0, 1]"
    require(0 <= toxicity <= 1, "data.toxicity_column", column, rule, "name another column")
    return toxicity


def _row_ids(split: str, records: list[Record], column: str | None) -> list[str]:
    """Return the values of the id column, or a number for each row. Raises InputError if a value is repeated."""
    if column is None:
        return [f"{split}_{i}" for i in range(len(records))]

    ids = [str(value_of(record, column)) for record in records]
    most_frequent, count = Counter(ids).most_common(1)[0]
    rule = f"has {most_frequent!r} in {count} rows of {split}"
    require(count == 1, "data.id_column", column, rule, "choose a column of unique values, or None to number the rows")
    return ids


def read_texts(files: Mapping[str, str], config: Config) -> list[Row]:
    """Return the rows of the first file, each with the responses of all files as `texts`, by the keys of `files`.

    A file has a column `response`, or is a `.txt` with one response per line. Rows are matched by the id column of the
    config, else by the column of the text, else by their number. Rows of one file that match are samples of one prompt.
    If no file is called "before", the references of the first file take its place. Raises InputError when a file has no
    such column or other prompts than the first, or when references are needed and missing.
    """
    first_name, first_path = next(iter(files.items()))
    by_prompt = {name: _records_by_prompt(Path(path), config) for name, path in files.items()}
    for name, path in files.items():
        _require_same_prompts(by_prompt[name], by_prompt[first_name], path, first_path)

    rows = []
    for prompt_id, records in by_prompt[first_name].items():
        texts = {name: list(map(response_of, prompts[prompt_id])) for name, prompts in by_prompt.items()}
        rows.append(_row_with_texts(prompt_id, records[0], texts, first_path, config))
    require(len(rows) >= 2, "--texts", first_path, "has a single prompt", "give at least two")
    return rows


def _records_by_prompt(path: Path, config: Config) -> dict[str, list[Record]]:
    """Return the records of a file by id, else text, else number. Raises InputError for one without a response."""
    by_prompt: dict[str, list[Record]] = {}
    for number, record in enumerate(response_records(path), start=1):
        text = _text_in(record, config)
        row_id = record.get(config.data.id_column or "id")
        prompt_id = str(row_id) if row_id is not None else text or str(number)
        by_prompt.setdefault(prompt_id, []).append(record)
    return by_prompt


def _text_in(record: Record, config: Config) -> str:
    """Return the text that a response answers, as far as a record of responses has it, else "".

    Of a conversation that ends with the assistant, the last message is no part of it.
    """
    named = config.data.text_column
    for column in (named,) if named else config.task.text_columns:
        value = value_of(record, column)
        if isinstance(value, str):
            return value
        if isinstance(value, list):
            messages, _ = split_reply(messages_of(value, "--texts", column, "a row"))
            return as_text(spoken(messages))
    return ""


def _reference_in(record: Record, config: Config) -> str | None:
    named = config.data.reference_column
    for column in (named,) if named else config.task.reference_columns:
        value = value_of(record, column)
        if isinstance(value, list):
            return as_text(messages_of(value, "--texts", column, "a row"), only="assistant") or None
        if value is not None:
            return str(value)
    return None


def _require_same_prompts(
    prompts: Mapping[str, list[Record]], first: Mapping[str, list[Record]], path: str, first_path: str
) -> None:
    """Raise InputError unless a file has the prompts of the first one, and equally many responses to each."""
    different = prompts.keys() ^ first.keys()
    rule = f"differs from {first_path} in {len(different)} prompts"
    require(not different, "--texts", path, rule, "give files on the same prompts, by id or in the same order")

    counts = {len(records) for records in prompts.values()}
    rule = f"has {min(counts)} to {max(counts)} responses per prompt"
    require(len(counts) == 1, "--texts", path, rule, "give equally many for each prompt")


def _row_with_texts(prompt_id: str, record: Record, texts: dict[str, list[str]], path: str, config: Config) -> Row:
    """Return the row of a prompt; without a policy "before", the reference of `record` is its response."""
    text = _text_in(record, config)
    reference = _reference_in(record, config)
    references = () if reference is None else (reference,)

    if "before" not in texts:
        remedy = f"give a second file, or a {config.task.reference} for each row"
        require(bool(reference), "--texts", path, "has nothing to compare with", remedy)
        texts = {"before": [str(reference)], **texts}
        references = ()  # The reference is compared, so it cannot be the reference too.
    civil = references if config.task.references_are_civil else ()
    return Row(
        id=prompt_id,
        text=text,
        references=references,
        civil_references=civil,
        prompt=text,
        task=config.data.task,
        texts=texts,
    )
