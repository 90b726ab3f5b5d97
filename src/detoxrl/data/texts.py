"""What do files of texts hold, that policies wrote elsewhere?"""

from collections.abc import Mapping
from pathlib import Path

from detoxrl.config import DataConfig
from detoxrl.data.rows import Row
from detoxrl.data.sources import Record, read_records
from detoxrl.errors import InputError, require

COLUMN = "response"


def read_texts(files: Mapping[str, str], config: DataConfig) -> tuple[list[Row], dict[str, list[list[str]]]]:
    """Return the rows of the first file, and the responses of each file in the order of those rows.

    A file has a column `response`, or is a `.txt` with one on each line. Rows are matched by the config's id column,
    else by the dialogue column, else by their number; rows that match in one file are samples of one prompt. Raises
    InputError when a file has no such column, or not the prompts of the first.
    """
    first, *_ = files
    read = {name: _by_prompt(Path(path), config) for name, path in files.items()}
    for name, path in files.items():
        other = sorted(read[first].keys() ^ read[name].keys())
        rule = f"and {files[first]} differ in {len(other)} of their prompts"
        remedy = "give files on the same prompts, by the same ids or in the same order"
        require(not other, "--texts", path, rule, remedy)
        sizes = {len(records) for records in read[name].values()}
        rule = f"holds {min(sizes)} to {max(sizes)} responses a prompt"
        require(len(sizes) == 1, "--texts", path, rule, "give as many for every prompt")
    rows = [_row(key, records[0], config) for key, records in read[first].items()]
    require(len(rows) >= 2, "--texts", files[first], "holds a single prompt", "give two or more")
    return rows, {name: [[str(r[COLUMN]) for r in by[row.id]] for row in rows] for name, by in read.items()}


def _by_prompt(path: Path, config: DataConfig) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for number, raw in enumerate(read_records(path, "--texts", lines=COLUMN), start=1):
        # Half an emoji, cut by a limit on tokens, is no text that can be written.
        record = {k: v.encode("utf-8", "replace").decode() if isinstance(v, str) else v for k, v in raw.items()}
        if not isinstance(record.get(COLUMN), str):
            rule, remedy = f"row {number} has no text under {COLUMN!r}", "give each row one"
            raise InputError("--texts", str(path), rule, remedy)
        names = (config.id_column or "id", config.dialogue_column)
        key = next((str(record[name]) for name in names if record.get(name) is not None), str(number))
        found.setdefault(key, []).append(record)
    return found


def _row(key: str, record: Record, config: DataConfig) -> Row:
    dialogue, summary = str(record.get(config.dialogue_column) or ""), record.get(config.summary_column or "")
    return Row(id=key, dialogue=dialogue, summary=None if summary is None else str(summary), prompt=dialogue)
