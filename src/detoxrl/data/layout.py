"""Which local files does a source have, and do they have the columns that the config names?

This needs no torch, so a source that cannot be used is known before torch is imported.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from detoxrl.config.schema import Config
from detoxrl.data.files import DATA_SUFFIXES, Record, is_data_file, iterate_records, read_lines
from detoxrl.errors import require
from detoxrl.runtime.hub import require_source

_RESPONSE = "response"  # Column of a response that was written elsewhere.
_SPLITS = ("train", "validation", "valid", "val", "dev", "test")


def local_files(source: str, field: str = "data.source") -> dict[str, Path]:
    """Return the data file of each split of a file or folder; none for what can only be a hub data set.

    Raises InputError, with the setting `field`, for a folder whose files are not named after splits. A file may be
    missing.
    """
    path = Path(source)
    if path.is_file() or is_data_file(path):
        return {"file": path}
    return _split_files(path, field) if path.is_dir() else {}


class Columns(NamedTuple):
    """The columns of a source that rows are made of; None where it has no such column."""

    text: str
    reference: str | None
    id: str | None
    toxicity: str | None


def outer_name(column: str) -> str:
    """Return the name of the column that a path such as `prompt.text` leads into."""
    return column.partition(".")[0]


def require_usable_source(config: Config) -> None:
    """Raise InputError unless a source is on a hub, or its local files can be read and have the config's columns.

    Reads the first rows only, as long as they have every column.
    """
    source = config.data.source
    files = local_files(source)
    for file in files.values():
        # A pipe could be read once only.
        require(not file.is_fifo(), "data.source", str(file), "is a pipe", "give a file")
    if not files:
        require_source(source, "data.source")
        return

    names: dict[str, None] = {}
    for record in chain.from_iterable(map(iterate_records, files.values())):
        names.update(dict.fromkeys(record))
        if _has_all(names, config):
            break
    find_columns(list(names), config)


def find_columns(names: Sequence[str], config: Config) -> Columns:
    """Return the columns that rows are made of: those that the config names, else the usual ones of its task.

    `names` are all columns of the source. Raises InputError when a column is missing.
    """
    data = config.data
    remedy = f"choose from {', '.join(names)}"
    for setting, name in _named(config).items():
        has_column = name is None or name in names or outer_name(name) in names
        require(has_column, setting, name, f"is not a column of {data.source}", remedy)

    text = data.text_column or _usual(config.task.text_columns, names)
    usual = " or ".join(config.task.text_columns)
    rule = f"is {usual} by default for data.task = {data.task}, and {data.source} has no such column"
    require(text is not None, "data.text_column", None, rule, remedy)
    assert text is not None

    reference = data.reference_column or _usual(config.task.reference_columns, names)
    rule = f"leaves sft nothing to learn from: {data.source} has no column {config.task.reference_columns[0]}"
    has_reference = reference is not None or config.sft.steps == 0 or data.task == "chat"
    require(has_reference, "data.reference_column", None, rule, f"{remedy}, or use --sft.steps 0")
    return Columns(text=text, reference=reference, id=data.id_column, toxicity=data.toxicity_column)


def _named(config: Config) -> dict[str, str | None]:
    data = config.data
    return {
        "data.text_column": data.text_column,
        "data.reference_column": data.reference_column,
        "data.id_column": data.id_column,
        "data.toxicity_column": data.toxicity_column,
    }


def _usual(usual: Iterable[str], names: Collection[str]) -> str | None:
    return next((name for name in usual if name in names), None)


def _has_all(names: Collection[str], config: Config) -> bool:
    """Return whether further records can change nothing: every column that is named, or needed, is there."""
    named = [name for name in _named(config).values() if name is not None]
    has_named = all(name in names or outer_name(name) in names for name in named)
    data = config.data
    has_text = data.text_column is not None or _usual(config.task.text_columns, names) is not None
    has_reference = data.reference_column is not None or _usual(config.task.reference_columns, names) is not None
    return has_named and has_text and (has_reference or config.sft.steps == 0)


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


def _split_files(folder: Path, field: str) -> dict[str, Path]:
    """Return the data files of a folder by the split that their names contain; a single file may have any name."""
    data_files = sorted(file for file in folder.iterdir() if is_data_file(file))
    require(bool(data_files), field, str(folder), "has no data file", f"add {', '.join(DATA_SUFFIXES)} files")

    files: dict[str, Path] = {}
    for file in data_files:
        split = _split_in_name(file) or "file"
        is_clear = len(data_files) == 1 or (split != "file" and split not in files)
        rule = f"contains {file.name}, but the name fits no single split"
        remedy = f"name each file after one split ({', '.join(_SPLITS)}), or give one file"
        require(is_clear, field, str(folder), rule, remedy)
        files[split] = file

    return files


def _split_in_name(file: Path) -> str | None:
    """Return the first split that is a word of the file's name, as in my-test-v2.jsonl."""
    words = file.name.partition(".")[0].lower().replace("-", "_").split("_")
    return next((split for split in _SPLITS if split in words), None)
