"""Which rows do a file, a folder or a hub data set hold, and which responses that were written elsewhere?"""

from collections import Counter
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

from detoxrl.config.schema import DataConfig
from detoxrl.data.files import Record, read_records, text_of
from detoxrl.data.layout import local_files, require_columns, response_of, response_records
from detoxrl.data.rows import Row
from detoxrl.errors import InputError, first_line, require
from detoxrl.runtime.hub import fetch


def read_source(config: DataConfig) -> dict[str, list[Row]]:
    """Return the rows of each split of the source. A row without a dialogue has an empty one.

    Raises InputError when the source cannot be read, lacks a column, or has something else than text in one.
    """
    files = local_files(config.source)
    records = {split: read_records(file) for split, file in files.items()} if files else _hub_records(config.source)
    require_columns(chain.from_iterable(records.values()), config)
    return {split: _rows(split, split_records, config) for split, split_records in records.items()}


def _hub_records(name: str) -> dict[str, list[Record]]:
    """Return the records of each split of a hub data set."""
    import datasets  # Imported here because it takes a second and files do not need it.

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    folder = fetch(name, "data.source")
    try:
        # Without checks: the sizes in a data set's card may be outdated.
        tables = datasets.load_dataset(folder, verification_mode="no_checks")
        return {str(split): table.to_list() for split, table in tables.items()}
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = f"{type(error).__name__}, {first_line(error.__cause__ or error)}"
        remedy = "give a file, a folder or a hub id"
        raise InputError("data.source", name, f"cannot be read: {reason}", remedy) from error


def _rows(split: str, records: list[Record], config: DataConfig) -> list[Row]:
    """Return the rows of a split. Raises InputError for repeated ids and for values that are not text."""
    ids = _row_ids(split, records, config.id_column)
    rows = []

    for number, (row_id, record) in enumerate(zip(ids, records, strict=True), start=1):
        place = f"row {number} of {split}"
        dialogue = text_of(record, config.dialogue_column, "data.dialogue_column", place)
        summary = None
        if config.summary_column is not None:
            summary = text_of(record, config.summary_column, "data.summary_column", place)
        rows.append(Row(id=row_id, dialogue=dialogue, summary=summary))

    return rows


def _row_ids(split: str, records: list[Record], column: str | None) -> list[str]:
    """Return the values of the id column, or a number for each row. Raises InputError if a value is repeated."""
    if column is None:
        return [f"{split}_{i}" for i in range(len(records))]

    ids = [str(record.get(column)) for record in records]
    most_frequent, count = Counter(ids).most_common(1)[0]
    rule = f"has {most_frequent!r} in {count} rows of {split}"
    require(count == 1, "data.id_column", column, rule, "choose a column of unique values, or None to number the rows")
    return ids


def read_texts(files: Mapping[str, str], config: DataConfig) -> list[Row]:
    """Return the rows of the first file, each with the responses of all files as `texts`, by the keys of `files`.

    A file has a column `response`, or is a `.txt` with one response per line. Rows are matched by the id column of the
    config, else by the dialogue column, else by their number. Rows of one file that match are samples of one prompt.
    If no file is called "before", the summaries of the first file take its place. Raises InputError when a file has no
    such column or other prompts than the first, or when summaries are needed and missing.
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


def _records_by_prompt(path: Path, config: DataConfig) -> dict[str, list[Record]]:
    """Return the records of a file by id, else dialogue, else number. Raises InputError for one without a response."""
    columns = (config.id_column or "id", config.dialogue_column)
    by_prompt: dict[str, list[Record]] = {}
    for number, record in enumerate(response_records(path), start=1):
        values = [str(record[column]) for column in columns if record.get(column) is not None]
        prompt_id = values[0] if values else str(number)
        by_prompt.setdefault(prompt_id, []).append(record)
    return by_prompt


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


def _row_with_texts(prompt_id: str, record: Record, texts: dict[str, list[str]], path: str, config: DataConfig) -> Row:
    """Return the row of a prompt; without a policy "before", the summary of `record` is its response."""
    dialogue = str(record.get(config.dialogue_column) or "")
    summary = record.get(config.summary_column or "")
    reference = None if summary is None else str(summary)

    if "before" not in texts:
        remedy = "give a second file, or a summary for each row"
        require(bool(summary), "--texts", path, "has nothing to compare with", remedy)
        texts = {"before": [str(summary)], **texts}
        reference = None  # The summary is compared, so it cannot be the reference too.
    return Row(id=prompt_id, dialogue=dialogue, summary=reference, prompt=dialogue, texts=texts)
