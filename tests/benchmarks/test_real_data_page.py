"""Does the page on real data show what its results say?"""

from __future__ import annotations

import json

import tables
from kept_results import RESULTS

LONGEST_NAME = 60


def test_every_table_of_the_page_is_the_one_that_the_results_make() -> None:
    page = tables.PAGE.read_text(encoding="utf-8")
    by_name = tables.tables()
    assert tables.with_tables(page, by_name) == page
    assert all(f"<!-- table: {name} -->" in page for name in by_name)


def test_results_hold_no_texts_of_the_sets() -> None:
    paths = [path for path in RESULTS.rglob("*") if path.is_file()]
    assert {path.suffix for path in paths} <= {".json", ".jsonl", ".svg"}
    for path in paths:
        if path.suffix != ".svg":
            lines = path.read_text(encoding="utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            for line in lines:
                json.loads(line, object_pairs_hook=_checked)


def _checked(pairs: list[tuple[str, object]]) -> None:
    for name, value in pairs:
        texts = [name, *(value if isinstance(value, list) else [value])]
        assert all(len(text) < LONGEST_NAME for text in texts if isinstance(text, str)), texts
