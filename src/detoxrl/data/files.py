"""Which records does a data file hold, and which lines does a text file?

This needs no torch, so a file that cannot be used is known before torch is imported.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from detoxrl.errors import InputError, first_line, require
from detoxrl.runtime.files import meant_path

Record = dict[str, Any]
_Reader = Callable[[Path], Iterable[Record]]


def is_data_file(path: Path) -> bool:
    """Return whether the file's name ends like a format of records."""
    return _reader(path) is not None


def read_records(path: Path, field: str = "data.source") -> list[Record]:
    """Return the records of a data file. Raises InputError as `iterate_records`."""
    return list(iterate_records(path, field))


def iterate_records(path: Path, field: str = "data.source") -> Iterator[Record]:
    """Yield the records of a data file or a pipe; of a long file only what is asked for is read.

    Raises InputError, with the setting `field`, when the file does not exist, has no rows or cannot be read.
    """
    reader = _reader(path)
    if reader is None and path.is_file():
        raise InputError(field, str(path), "has an unknown format", f"give one of {', '.join(DATA_SUFFIXES)}")
    if reader is None or not path.exists() or path.is_dir():
        raise InputError(field, str(path), "is not a file", _files_beside(path))

    is_empty = True
    try:
        for record in reader(path):
            is_empty = False
            yield record
    except (OSError, EOFError, ValueError, RecursionError, csv.Error, zlib.error) as error:
        reason = _undecodable_line(path) if isinstance(error, UnicodeDecodeError) else first_line(error)
        remedy = "give UTF-8 text with one header, or one JSON object per row"
        raise InputError(field, str(path), f"cannot be read: {reason}", remedy) from error
    require(not is_empty, field, str(path), "contains no rows", "give a file with rows")


def read_lines(path: Path, field: str) -> list[str]:
    """Return the lines of a text file, blank ones included.

    Raises InputError, with the setting `field`, when the file does not exist, is empty or is not UTF-8.
    """
    try:
        data = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise InputError(field, str(path), "is not a file", _files_beside(path)) from error
    except OSError as error:
        rule = f"cannot be read: {error.strerror}"
        raise InputError(field, str(path), rule, "give a file that can be read") from error
    return split_lines(data, field, str(path))


def split_lines(data: bytes, field: str, name: str) -> list[str]:
    r"""Return the lines of UTF-8 text, blank ones included, without their ends: \n or \r\n.

    Raises InputError, with the setting `field` and the file's `name`, when the text is empty or not UTF-8.
    """
    require(bool(data), field, name, "is empty", "give one text per line")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        rule = f"cannot be read: {_first_undecodable(io.BytesIO(data))}"
        raise InputError(field, name, rule, "save it as UTF-8") from None

    # Lines end with \n only: a text may contain other line ends, such as U+2028 or a lone \r.
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def columns_of(records: Iterable[Record]) -> list[str]:
    """Return the names of all columns that the records have, in the order of their first appearance."""
    columns: dict[str, None] = {}
    for record in records:
        columns.update(dict.fromkeys(record))
    return list(columns)


def value_of(record: Record, column: str) -> Any:
    """Return the value in a column, or in a field of a nested one (`prompt.text`); None if the record has none."""
    if column in record:
        return record[column]

    value: Any = record
    for name in column.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value


def text_of(record: Record, column: str, field: str, place: str) -> str:
    """Return the text in a column, "" if the record has none there.

    Raises InputError, with the setting `field` and the record's `place`, for anything but text.
    """
    value = value_of(record, column)
    if isinstance(value, str | None):
        return value or ""

    rule = f"contains {type(value).__name__}, not text, in {place}"
    remedy = "name a column of text"
    if isinstance(value, dict) and value:
        remedy = f"name a field of it, such as {column}.{next(iter(value))}"
    elif _looks_like_messages(value):
        remedy = "use --data.task chat, which reads conversations"
    raise InputError(field, column, rule, remedy)


def _looks_like_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def _reader(path: Path) -> _Reader | None:
    """Return the function that reads a data file of this format, or None if there is none."""
    name = path.name.lower()
    return next((reader for suffix, reader in _READERS.items() if name.endswith(suffix)), None)


def _files_beside(path: Path) -> str:
    """Return the remedy for a path that is no file: the file that was meant, or those in its folder, or in it."""
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        return f"there is no folder {folder}"
    suffixes = DATA_SUFFIXES if is_data_file(path) else (*DATA_SUFFIXES, ".txt")
    files = sorted(file.name for file in folder.iterdir() if file.name.lower().endswith(suffixes))
    meant = "" if path.is_dir() else meant_path(path)
    return meant or f"{folder} contains {', '.join(files[:10]) or 'no data file'}"


def _open(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _undecodable_line(path: Path) -> str:
    with _open(path) as file:
        return _first_undecodable(file)


def _first_undecodable(lines: Iterable[bytes]) -> str:
    """Return in words which line is not UTF-8, and at which byte."""
    for number, line in enumerate(lines, start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            return f"line {number} is not UTF-8 (byte 0x{line[error.start]:02x})"
    return "it is not UTF-8"  # A pipe cannot be read twice.


def _json(path: Path) -> Iterator[Record]:
    """Yield the objects of a JSON list, or of JSON lines, which are read one by one."""
    # Lines end with \n only: a JSON string may contain other line ends.
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="\n") as file:
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
    encodable: Record = _encodable(value)
    return encodable


def _encodable(value: Any) -> Any:
    """Return a JSON value with lone surrogates replaced in its texts, because they cannot be encoded as UTF-8.

    A limit on tokens may have cut an emoji in half.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_encodable(item) for item in value]
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    return value


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
    from pyarrow import parquet  # Imported here because it takes a fifth of a second and few sources need it.

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
DATA_SUFFIXES = tuple(_READERS)
"""How the names of data files end."""
