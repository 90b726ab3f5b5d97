"""Which local files does a source have, and do they have the columns that the config names?

This needs no torch, so a source that cannot be used is known before torch is imported.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from detoxrl.config.schema import DataConfig
from detoxrl.data.files import DATA_SUFFIXES, Record, is_data_file, iterate_records, read_lines
from detoxrl.errors import require
from detoxrl.runtime.hub import require_source

_RESPONSE = "response"  # Column of a response that was written elsewhere.
_SPLITS = ("train", "validation", "valid", "val", "dev", "test")


def local_files(source: str) -> dict[str, Path]:
    """Return the data file of each split of a file or folder; none for what can only be a hub data set.

    Raises InputError for a folder whose files are not named after splits. A file may be missing.
    """
    path = Path(source)
    if path.is_file() or is_data_file(path):
        return {"file": path}
    return _split_files(path) if path.is_dir() else {}


def require_usable_source(config: DataConfig) -> None:
    """Raise InputError unless a source is on a hub, or its local files can be read and have the config's columns.

    Reads the first rows only, as long as they have every column.
    """
    files = local_files(config.source)
    for file in files.values():
        # A pipe could be read once only.
        require(not file.is_fifo(), "data.source", str(file), "is a pipe", "give a file")
    if files:
        require_columns(chain.from_iterable(map(iterate_records, files.values())), config)
    else:
        require_source(config.source, "data.source")


def require_columns(records: Iterable[Record], config: DataConfig) -> None:
    """Raise InputError unless some record has each column that the config names. Reads no more of them than needed."""
    named = {config.dialogue_column, config.summary_column, config.id_column} - {None}
    columns: dict[str, None] = {}
    for record in records:
        columns.update(dict.fromkeys(record))
        if named <= columns.keys():
            return

    rule, remedy = f"is not a column of {config.source}", f"choose from {', '.join(columns)}"
    settings = {
        "data.dialogue_column": (config.dialogue_column, remedy),
        "data.summary_column": (config.summary_column, f"{remedy}, or set it to none and sft.steps to 0"),
        "data.id_column": (config.id_column, remedy),
    }
    for setting, (column, setting_remedy) in settings.items():
        require(column is None or column in columns, setting, column, rule, setting_remedy)


def require_usable_texts(path: Path) -> None:
    """Raise InputError unless a file of responses can be read and its first row has a response."""
    # A pipe could be read once only.
    require(not path.is_fifo(), "--texts", str(path), "is a pipe", "give a file")
    next(response_records(path))


def response_records(path: Path) -> Iterator[Record]:
    """Yield the records of a file of responses, each with its text under `response`; a line of a .txt is a response.

    Raises InputError as `iterate_records`, and for a record without a response.
    """
    if path.suffix == ".txt":
        records: Iterable[Record] = ({_RESPONSE: line} for line in read_lines(path, "--texts"))
    else:
        records = iterate_records(path, "--texts")

    for number, record in enumerate(records, start=1):
        rule = f"row {number} has no text under {_RESPONSE!r}"
        has_response = isinstance(record.get(_RESPONSE), str)
        require(has_response, "--texts", str(path), rule, "add a response to each row")
        yield record


def response_of(record: Record) -> str:
    """Return the response of a record of `response_records`."""
    return str(record[_RESPONSE])


def _split_files(folder: Path) -> dict[str, Path]:
    """Return the data files of a folder by the split that their names contain; a single file may have any name."""
    data_files = sorted(file for file in folder.iterdir() if is_data_file(file))
    require(bool(data_files), "data.source", str(folder), "has no data file", f"add {', '.join(DATA_SUFFIXES)} files")

    files: dict[str, Path] = {}
    for file in data_files:
        split = _split_in_name(file) or "file"
        is_clear = len(data_files) == 1 or (split != "file" and split not in files)
        rule = f"contains {file.name}, but the name fits no single split"
        remedy = f"name each file after one split ({', '.join(_SPLITS)}), or give one file"
        require(is_clear, "data.source", str(folder), rule, remedy)
        files[split] = file

    return files


def _split_in_name(file: Path) -> str | None:
    """Return the first split that is a word of the file's name, as in my-test-v2.jsonl."""
    words = file.name.partition(".")[0].lower().replace("-", "_").split("_")
    return next((split for split in _SPLITS if split in words), None)
