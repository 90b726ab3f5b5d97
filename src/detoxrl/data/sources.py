"""Which rows do a user's file, folder or hub dataset hold, and which responses that were written elsewhere?"""

import csv
import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pyarrow import parquet

from detoxrl.config.schema import DataConfig
from detoxrl.data.rows import Row
from detoxrl.errors import InputError, first_line, require
from detoxrl.runtime.hub import fetch, is_hub_id

Record = dict[str, Any]
_RESPONSE = "response"  # the column of a text that a policy wrote elsewhere
_SPLITS = ("train", "validation", "valid", "val", "dev", "test")


def read_source(config: DataConfig) -> dict[str, list[Row]]:
    """Return the rows of each split, as the source has them; a row without a dialogue has an empty one.

    Raises InputError when the source cannot be read, lacks a column, or holds something else than text in one.
    """
    path = Path(config.source)
    files = {"file": path} if path.is_file() or _reader(path) else _split_files(path)
    records = {split: read_records(file) for split, file in files.items()} if files else _from_hub(config.source)
    columns = dict.fromkeys(column for those in records.values() for record in those for column in record)
    for name in ("dialogue_column", "summary_column", "id_column"):
        column, also = getattr(config, name), ", or say None and --sft.steps 0" if name == "summary_column" else ""
        rule, remedy = f"is no column of {config.source}", f"choose from {', '.join(columns)}{also}"
        require(column is None or column in columns, f"data.{name}", column, rule, remedy)
    return {split: _rows(split, those, config) for split, those in records.items()}


def _split_files(folder: Path) -> dict[str, Path]:
    """Return the data files of a folder by the split that each is named after; nothing where there is no folder."""
    if not folder.is_dir():
        return {}
    there = sorted(file for file in folder.iterdir() if _reader(file))
    found: dict[str, Path] = {}
    remedy = f"name each file after one split ({', '.join(_SPLITS)}), or give one file"
    for file in there:
        words = file.name.partition(".")[0].lower().replace("-", "_").split("_")
        split = next((split for split in _SPLITS if split in words), "file")
        clear = len(there) == 1 or split not in ("file", *found)
        require(clear, "data.source", str(folder), f"holds {file.name}, which fits no one split", remedy)
        found[split] = file
    require(bool(found), "data.source", str(folder), "holds no data file", f"give {', '.join(_READERS)} files")
    return found


def read_records(path: Path, field: str = "data.source", lines: bool = False) -> list[Record]:
    """Return a data file's rows; with `lines` each line of a .txt is a response. Raises InputError, naming `field`."""
    reader = _lines if lines and path.suffix == ".txt" else _reader(path)
    if reader is None:
        raise InputError(field, str(path), "is of no known format", f"give one of {', '.join(_READERS)}")
    if not path.is_file():
        there = ", ".join(sorted(file.name for file in path.parent.glob("*") if _reader(file))[:10])
        raise InputError(field, str(path), "is no file", f"{path.parent} holds {there or 'no data file'}")
    try:
        records = list(reader(path))
    except (OSError, EOFError, ValueError, csv.Error) as error:
        remedy = "give UTF-8 text with one header, or one object a row"
        raise InputError(field, str(path), f"cannot be read: {first_line(error)}", remedy) from error
    require(bool(records), field, str(path), "holds no rows", "give a file with rows")
    return records


def _reader(path: Path) -> Callable[[Path], Iterable[Record]] | None:
    return next((reader for ending, reader in _READERS.items() if path.name.lower().endswith(ending)), None)


def _lines(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as lines:
        yield from ({_RESPONSE: line.rstrip("\n")} for line in lines)


def _json(path: Path) -> Iterator[Record]:
    """Yield the objects of a list, or of one object a line."""
    with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="\n") as file:
        text = file.read()
    # Only \n ends a line: JSON may hold other line ends inside its text.
    whole = text.lstrip().startswith("[")
    rows = json.loads(text) if whole else filter(str.strip, text.split("\n"))
    for number, row in enumerate(rows, start=1):
        try:
            found = row if whole else json.loads(row)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from None
        if not isinstance(found, dict):
            raise ValueError(f"row {number}: {type(found).__name__} where an object belongs")
        # Half an emoji, cut by a limit on tokens, is no text that can be written: it becomes a replacement mark.
        yield {k: v.encode("utf-8", "replace").decode() if isinstance(v, str) else v for k, v in found.items()}


def _csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        header = next(reader, [])
        for row in filter(None, reader):
            if len(row) != len(header):
                raise ValueError(f"line {reader.line_num}: {len(row)} fields under {len(header)} columns")
            yield dict(zip(header, row, strict=True))


_READERS: dict[str, Callable[[Path], Iterable[Record]]] = {
    ".csv": _csv, ".json": _json, ".jsonl": _json, ".jsonl.gz": _json,
    ".parquet": lambda path: parquet.read_table(path).to_pylist(),
}  # fmt: skip


def _from_hub(name: str) -> dict[str, list[Record]]:
    # Imported here: it takes a second, and files do not need it.
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    remedy = "give a file, a folder or a hub id"
    require(is_hub_id(name), "data.source", name, "is no file or folder, and no hub id", remedy)
    folder = fetch(name, "data.source")
    try:
        tables = datasets.load_dataset(folder, verification_mode="no_checks")  # its card may count other rows
        return {str(split): table.to_list() for split, table in tables.items()}
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = f"{type(error).__name__}, {first_line(error.__cause__ or error)}"
        raise InputError("data.source", name, f"cannot be read: {reason}", remedy) from error


def _rows(split: str, records: list[Record], config: DataConfig) -> list[Row]:
    ids = [f"{split}_{i}" for i in range(len(records))]
    if config.id_column is not None:
        ids = [str(record.get(config.id_column)) for record in records]
        repeated, times = Counter(ids).most_common(1)[0]
        rule = f"names {times} rows of {split} {repeated!r}"
        require(times == 1, "data.id_column", config.id_column, rule, "leave it out to number the rows")
    rows, column = [], config.summary_column
    for number, (row_id, record) in enumerate(zip(ids, records, strict=True), start=1):
        where = f"row {number} of {split}"
        dialogue = _text(record, config.dialogue_column, "data.dialogue_column", where)
        summary = None if column is None else _text(record, column, "data.summary_column", where)
        rows.append(Row(id=row_id, dialogue=dialogue, summary=summary))
    return rows


def _text(record: Record, column: str, field: str, where: str) -> str:
    value = record.get(column)
    if not isinstance(value, str | None):
        raise InputError(field, column, f"holds {type(value).__name__}, not text, in {where}", "name a column of text")
    return value or ""


def read_texts(files: Mapping[str, str], config: DataConfig) -> list[Row]:
    """Return the rows of the first file, each with the responses of every file as `texts`.

    A file has a column `response`, or is a `.txt` with one on each line. Rows are matched by the config's id column,
    else by the dialogue column, else by their number; rows that match in one file are samples of one prompt. Without a
    file "before" the summaries are that. Raises InputError when a file has no such column, or not the prompts of the
    first, or summaries are needed and lacking.
    """
    first, *_ = files
    read = {name: _by_prompt(Path(path), config) for name, path in files.items()}
    for name, path in files.items():
        other = sorted(read[first].keys() ^ read[name].keys())
        rule = f"and {files[first]} differ in {len(other)} of their prompts"
        require(not other, "--texts", path, rule, "give files on the same prompts, by id or in the same order")
        sizes = {len(records) for records in read[name].values()}
        rule = f"holds {min(sizes)} to {max(sizes)} responses a prompt"
        require(len(sizes) == 1, "--texts", path, rule, "give as many for every prompt")
    rows = []
    for key, (record, *_) in read[first].items():
        dialogue, summary = str(record.get(config.dialogue_column) or ""), record.get(config.summary_column or "")
        texts = {name: [str(one[_RESPONSE]) for one in by[key]] for name, by in read.items()}
        if "before" not in files:
            rule, remedy = "has nothing to be compared with", "give a second file, or a summary for each row"
            require(bool(summary), "--texts", files[first], rule, remedy)
            texts, summary = {"before": [str(summary)]} | texts, None  # no reference, where that is compared with
        summary = None if summary is None else str(summary)
        rows.append(Row(id=key, dialogue=dialogue, summary=summary, prompt=dialogue, texts=texts))
    require(len(rows) >= 2, "--texts", files[first], "holds a single prompt", "give two or more")
    return rows


def _by_prompt(path: Path, config: DataConfig) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for number, record in enumerate(read_records(path, "--texts", lines=True), start=1):
        if not isinstance(record.get(_RESPONSE), str):
            raise InputError("--texts", str(path), f"row {number} has no text under {_RESPONSE!r}", "give each row one")
        names = (config.id_column or "id", config.dialogue_column)
        key = next((str(record[name]) for name in names if record.get(name) is not None), str(number))
        found.setdefault(key, []).append(record)
    return found
