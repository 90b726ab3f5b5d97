"""Which records do the data files of a user hold?

This needs no torch, so a file that cannot be used is known before torch is imported.
"""

import csv
import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from detoxrl.config.schema import DataConfig
from detoxrl.errors import InputError, first_line, require
from detoxrl.runtime.files import meant_path
from detoxrl.runtime.hub import require_source

Record = dict[str, Any]
_Reader = Callable[[Path], Iterable[Record]]
RESPONSE = "response"  # Column of a response that was written elsewhere.
_SPLITS = ("train", "validation", "valid", "val", "dev", "test")


def local_files(source: str) -> dict[str, Path]:
    """Return the data file of each split of a file or folder; none for what can only be a hub data set.

    Raises InputError for a folder whose files are not named after splits. A file may be missing.
    """
    path = Path(source)
    if path.is_file() or _reader(path):
        return {"file": path}
    return _split_files(path) if path.is_dir() else {}


def require_usable_source(config: DataConfig) -> None:
    """Raise InputError unless a source is on a hub, or its local files can be read and have the config's columns.

    Reads the first rows only, as long as they have every column.
    """
    files = local_files(config.source)
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
    require_response(next(iterate_records(path, "--texts", lines=True)), 1, path)


def require_response(record: Record, number: int, path: Path) -> None:
    """Raise InputError unless the record of row `number` has a response."""
    rule = f"row {number} has no text under {RESPONSE!r}"
    require(isinstance(record.get(RESPONSE), str), "--texts", str(path), rule, "add a response to each row")


def _split_files(folder: Path) -> dict[str, Path]:
    """Return the data files of a folder by the split that their names contain; a single file may have any name."""
    data_files = sorted(file for file in folder.iterdir() if _reader(file))
    require(bool(data_files), "data.source", str(folder), "has no data file", f"add {', '.join(_READERS)} files")

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


def read_records(path: Path, field: str = "data.source", lines: bool = False) -> list[Record]:
    """Return the rows of a data file, as `iterate_records`."""
    return list(iterate_records(path, field, lines))


def iterate_records(path: Path, field: str = "data.source", lines: bool = False) -> Iterator[Record]:
    """Yield the rows of a data file; with `lines`, each line of a .txt is a response.

    Raises InputError, with the setting `field`, when the file does not exist, has no rows or cannot be read.
    """
    reader = _lines if lines and path.suffix == ".txt" else _reader(path)
    if not path.is_file():
        raise InputError(field, str(path), "is not a file", _data_files_beside(path))
    if reader is None:
        raise InputError(field, str(path), "has an unknown format", f"give one of {', '.join(_READERS)}")

    is_empty = True
    try:
        for record in reader(path):
            is_empty = False
            yield record
    except (OSError, EOFError, ValueError, csv.Error) as error:
        remedy = "give UTF-8 text with one header, or one JSON object per row"
        raise InputError(field, str(path), f"cannot be read: {first_line(error)}", remedy) from error
    require(not is_empty, field, str(path), "contains no rows", "give a file with rows")


def _reader(path: Path) -> _Reader | None:
    """Return the function that reads a data file of this format, or None if there is none."""
    name = path.name.lower()
    return next((reader for suffix, reader in _READERS.items() if name.endswith(suffix)), None)


def _data_files_beside(path: Path) -> str:
    """Return the remedy for a file that does not exist: the one that was meant, or the data files in its folder."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    data_files = sorted(file.name for file in path.parent.iterdir() if _reader(file))
    return meant_path(path) or f"{path.parent} contains {', '.join(data_files[:10]) or 'no data file'}"


def _lines(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as lines:
        for line in lines:
            yield {RESPONSE: line.rstrip("\n")}


def _json(path: Path) -> Iterator[Record]:
    """Yield the objects of a JSON list, or of JSON lines, which are read one by one."""
    open_text = gzip.open if path.suffix.lower() == ".gz" else open
    # Lines end with \n only: a JSON string may contain other line ends.
    with open_text(path, "rt", encoding="utf-8-sig", newline="\n") as file:
        lines = filter(str.strip, file)
        first = next(lines, "")
        if first.lstrip().startswith("["):
            for number, value in enumerate(json.loads(first + file.read()), start=1):
                yield _json_record(value, number)
            return

        for number, line in enumerate(chain([first] if first else [], lines), start=1):
            try:
                value = json.loads(line)
            except ValueError as error:
                raise ValueError(f"row {number}: {error}") from None
            yield _json_record(value, number)


def _json_record(value: Any, number: int) -> Record:
    """Return the object of row `number`, with lone surrogates in its texts replaced. Raises ValueError for others."""
    if not isinstance(value, dict):
        raise ValueError(f"row {number}: expected an object, not {type(value).__name__}")
    # A limit on tokens may have cut an emoji in half. The lone surrogate that is left cannot be encoded as UTF-8.
    return {
        key: item.encode("utf-8", "replace").decode() if isinstance(item, str) else item for key, item in value.items()
    }


def _csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        header = next(reader, [])
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(f"line {reader.line_num}: {len(row)} fields under {len(header)} columns")
            yield dict(zip(header, row, strict=True))


def _parquet(path: Path) -> Iterator[Record]:
    from pyarrow import parquet  # Imported here because few sources need it.

    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()


_READERS: dict[str, _Reader] = {
    ".csv": _csv,
    ".json": _json,
    ".jsonl": _json,
    ".jsonl.gz": _json,
    ".parquet": _parquet,
}
