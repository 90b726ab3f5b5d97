"""How do rows become prompts, and how are they stored in a run folder?"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import TypeAdapter

from detoxrl.data.corpus import Row
from detoxrl.records import Prompt

_ROW = TypeAdapter(Row)


def prompt_text(template: str, row: Row) -> str:
    """Return what the policy reads for a row."""
    return template.replace("{dialogue}", row.dialogue)


def to_prompts(template: str, rows: Iterable[Row]) -> list[Prompt]:
    """Return the prompts of rows, under the rows' ids."""
    return [Prompt(id=row.id, text=prompt_text(template, row)) for row in rows]


def rows_to_jsonl(rows: Iterable[Row]) -> str:
    """Return one JSON object a line."""
    return "".join(_ROW.dump_json(row).decode() + "\n" for row in rows)


def read_rows(path: Path) -> list[Row]:
    """Return the rows that `rows_to_jsonl` wrote to `path`."""
    with path.open(encoding="utf-8") as lines:
        return [_ROW.validate_json(line) for line in lines]
