"""Which rows do a user's file, folder or hub dataset hold?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detoxrl.config import DataConfig
from detoxrl.data.rows import Row
from detoxrl.errors import InputError, first_line, require

# File endings, longest first, and the loader that reads them.
_LOADERS = {".jsonl.gz": "json", ".json.gz": "json", ".jsonl": "json", ".json": "json", ".parquet": "parquet",
            ".csv": "csv"}  # fmt: skip


def read_source(config: DataConfig) -> dict[str, list[Row]]:
    """Return the rows of each split, as the source has them; a row without a dialogue has an empty one.

    Raises InputError when the source cannot be read, lacks a column, or holds something else than text in one.
    """
    loaded = _load(config.source)
    columns = next(iter(loaded.values())).column_names
    for name in ("dialogue_column", "summary_column", "id_column"):
        column = getattr(config, name)
        if column is not None and column not in columns:
            remedy = f"choose from {', '.join(columns)}"
            if name == "summary_column":
                remedy += ", or say None and --sft.steps 0"
            raise InputError(f"data.{name}", column, f"is no column of {config.source}", remedy)
    return {str(split): _rows(str(split), table, config) for split, table in loaded.items()}


def _load(source: str) -> dict[str, Any]:
    # Imported here: it takes a second, and the embedded corpus does not need it.
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    arguments = _arguments(source)
    try:
        return dict(datasets.load_dataset(**arguments))
    except (datasets.exceptions.DatasetsError, OSError, ValueError, StopIteration) as error:
        raise _unreadable(source, error.__cause__ or error) from error


def _arguments(source: str) -> dict[str, Any]:
    """Return what to call load_dataset with."""
    path = Path(source)
    ending = next((ending for ending in _LOADERS if source.lower().endswith(ending)), None)
    if path.is_dir() or (ending is None and not path.is_file()):
        return {"path": source}
    require(ending is not None, "data.source", source, "is of no known format", f"give one of {', '.join(_LOADERS)}")
    if not path.is_file():
        raise InputError("data.source", source, "is no file", _beside(path))
    require(path.stat().st_size > 0, "data.source", source, "is empty", "give a file with rows")
    settings = {"path": _LOADERS[str(ending)], "data_files": source}
    # Without it pandas would read a dialogue "None" or "NA" as a missing one.
    return settings | {"keep_default_na": False} if ending == ".csv" else settings


def _beside(path: Path) -> str:
    there = sorted(p.name for p in path.parent.glob("*") if p.name.lower().endswith(tuple(_LOADERS)))
    return f"{path.parent} holds {', '.join(there[:10]) or 'no data file'}"


def _rows(split: str, table: Any, config: DataConfig) -> list[Row]:
    dialogues = _texts(split, table, config.dialogue_column, "data.dialogue_column", config.source)
    summaries: Sequence[str | None] = [None] * len(dialogues)
    if config.summary_column is not None:
        summaries = _texts(split, table, config.summary_column, "data.summary_column", config.source)
    ids = _ids(split, table, config)
    return [Row(id=i, dialogue=d, summary=s) for i, d, s in zip(ids, dialogues, summaries, strict=True)]


def _column(table: Any, name: str, source: str) -> list[Any]:
    try:
        values: list[Any] = table[name][:]
    except UnicodeDecodeError as error:  # JSON is decoded as late as this
        raise _unreadable(source, error) from error
    return values


def _unreadable(source: str, error: BaseException) -> InputError:
    remedy = "give a UTF-8 file with one header or one object a row, a folder of such, or a hub id"
    return InputError("data.source", source, f"cannot be read: {first_line(error)}", remedy)


def _texts(split: str, table: Any, column: str, field: str, source: str) -> list[str]:
    values = _column(table, column, source)
    for i, value in enumerate(values):
        if not isinstance(value, str | None):
            rule = f"holds {type(value).__name__}, not text, in row {i + 1} of {split}"
            raise InputError(field, column, rule, "name a column of text")
    return [value or "" for value in values]


def _ids(split: str, table: Any, config: DataConfig) -> list[str]:
    if config.id_column is None:
        return [f"{split}_{i}" for i in range(len(table))]
    ids = [str(value) for value in _column(table, config.id_column, config.source)]
    if len(set(ids)) < len(ids):
        repeated = next(name for i, name in enumerate(ids) if name in ids[:i])
        rule = f"names two rows of {split} {repeated!r}"
        raise InputError("data.id_column", config.id_column, rule, "leave it out to number the rows")
    return ids
