"""Which records does a data file hold, and which lines does a text file?"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from detoxrl.errors import InputError, first_line, require

Record = dict[str, Any]
_Reader = Callable[[bytes], Iterable[Record]]


def is_data_file(path: Path) -> bool:
    """Return whether the file's name ends like a format of records."""
    return _reader(path) is not None


def read_records(path: Path, field: str = "data.source") -> list[Record]:
    """Return the records of a data file.

    Raises InputError, with the setting `field`, when the file does not exist, has no rows or cannot be read.
    """
    reader = _reader(path)
    if reader is None:
        raise InputError(field, str(path), "has an unknown format", f"give one of {', '.join(DATA_SUFFIXES)}")

    data = _read_bytes(path, field)
    try:
        records = list(reader(data))
    except (OSError, EOFError, ValueError, RecursionError, csv.Error, zlib.error) as error:
        remedy = "give UTF-8 text with one header, or one JSON object per row"
        raise InputError(field, str(path), f"cannot be read: {first_line(error)}", remedy) from error
    require(bool(records), field, str(path), "contains no rows", "give a file with rows")
    return records


def read_lines(path: Path, field: str) -> list[str]:
    """Return the lines of a text file, blank ones included.

    Raises InputError, with the setting `field`, when the file does not exist, is empty or is not UTF-8.
    """
    return split_lines(_read_bytes(path, field), field, str(path))


def split_lines(data: bytes, field: str, name: str) -> list[str]:
    r"""Return the lines of UTF-8 text, blank ones included, without their ends: \n or \r\n.

    Raises InputError, with the setting `field` and the file's `name`, when the text is empty or not UTF-8.
    """
    require(bool(data), field, name, "is empty", "give one text per line")
    try:
        text = _decoded(data)
    except ValueError as error:
        raise InputError(field, name, f"cannot be read: {error}", "save it as UTF-8") from error

    # Lines end with \n only: a text may contain other line ends, such as U+2028 or a lone \r.
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def columns_of(records: Iterable[Record]) -> list[str]:
    """Return the names of all columns that the records have, in the order of their first appearance."""
    columns: dict[str, None] = {}
    for record in records:
        columns.update(dict.fromkeys(record))
    return list(columns)


def text_of(record: Record, column: str, field: str, place: str) -> str:
    """Return the text in a column, "" if the record has none there.

    Raises InputError, with the setting `field` and the record's `place`, for anything but text.
    """
    value = record.get(column)
    if not isinstance(value, str | None):
        rule = f"contains {type(value).__name__}, not text, in {place}"
        raise InputError(field, column, rule, "name a column of text")
    return value or ""


def _reader(path: Path) -> _Reader | None:
    """Return the function that reads a data file of this format, or None if there is none."""
    name = path.name.lower()
    return next((reader for suffix, reader in _READERS.items() if name.endswith(suffix)), None)


def _read_bytes(path: Path, field: str) -> bytes:
    """Return the bytes of a file, or of a pipe. Raises InputError."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError(field, str(path), "is not a file", _files_beside(path)) from error
    except OSError as error:
        rule = f"cannot be read: {error.strerror}"
        raise InputError(field, str(path), rule, "give a file that can be read") from error


def _files_beside(path: Path) -> str:
    """Return which files might have been meant by a path that is no file: those of its folder, or in it."""
    folder = path if path.is_dir() else path.parent
    suffixes = DATA_SUFFIXES if _reader(path) else (*DATA_SUFFIXES, ".txt")
    files = sorted(file.name for file in folder.glob("*") if file.name.lower().endswith(suffixes))
    return f"{folder} contains {', '.join(files[:10]) or 'no data file'}"


def _decoded(data: bytes) -> str:
    """Return UTF-8 text without its byte order mark. Raises ValueError, which names the line."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        byte = error.object[error.start]
        raise ValueError(f"line {line} is not UTF-8 (byte 0x{byte:02x})") from None


def _json(data: bytes) -> Iterator[Record]:
    """Yield the objects of a JSON list, or of JSON lines."""
    text = _decoded(data)
    if text.lstrip().startswith("["):
        for number, value in enumerate(json.loads(text), start=1):
            yield _json_record(value, number)
        return

    # Lines end with \n only: a JSON string may contain other line ends.
    lines = [line for line in text.split("\n") if line.strip()]
    for number, line in enumerate(lines, start=1):
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


def _gzipped_json(data: bytes) -> Iterator[Record]:
    return _json(gzip.decompress(data))


def _csv(data: bytes) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(_decoded(data), newline=""), strict=True)
    header = next(reader, [])
    for row in reader:
        if not row:
            continue
        if len(row) != len(header):
            raise ValueError(f"line {reader.line_num}: {len(row)} fields under {len(header)} columns")
        yield dict(zip(header, row, strict=True))


def _parquet(data: bytes) -> Iterator[Record]:
    # Imported here because it takes a fifth of a second and other formats do not need it.
    import pyarrow
    from pyarrow import parquet

    yield from parquet.read_table(pyarrow.BufferReader(data)).to_pylist()


_READERS: dict[str, _Reader] = {
    ".csv": _csv,
    ".json": _json,
    ".jsonl": _json,
    ".jsonl.gz": _gzipped_json,
    ".parquet": _parquet,
}
DATA_SUFFIXES = tuple(_READERS)
"""How the names of data files end."""
