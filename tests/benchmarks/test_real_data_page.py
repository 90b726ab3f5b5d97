"""Does the page on real data show what its results say?"""

from __future__ import annotations

import json
from typing import Any

import tables
from kept_results import RESULTS

LONGEST_NAME = 60


def test_every_table_of_the_page_is_the_one_that_the_results_make() -> None:
    page = tables.PAGE.read_text(encoding="utf-8")
    by_name = tables.tables()
    assert tables.with_tables(page, by_name) == page
    assert all(f"<!-- table: {name} -->" in page for name in by_name)


def test_a_rewrite_is_compared_by_j_and_other_texts_by_the_verdict() -> None:
    def system(before: float, after: float, **quality: float) -> dict[str, Any]:
        toxicity = {"judge": {"before": {"mean": before}, "after": {"mean": after}}}
        joint = {"joint": {"before": quality["j"], "after": quality["j"] + 0.1}} if quality else {}
        return {"toxicity": toxicity, "quality": joint}

    def run(compared: bool, **quality: float) -> dict[str, Any]:
        filtered = system(0.5, 0.4, **quality) | ({"after": {"verdict": "behind"}} if compared else {})
        about = {"primary_judge": "judge", "baselines": {"word_filter": filtered}, "seconds": {"train": 120.0}}
        return system(0.5, 0.25, **quality) | about

    results = {"realtoxicity": run(True), "paradetox": run(True, j=0.3), "quarrels": run(False)}
    _, _, before, after, word_filter, *_, minutes = tables.purpose_table(results).splitlines()
    assert before == "| before RL | 0.500 | 0.500, J 0.300 | 0.500 |"
    assert after == "| after RL | 0.250 | 0.250, J 0.400 | 0.250 |"
    assert word_filter == "| word filter | 0.400, RL: behind | 0.400, J 0.400 | 0.400 |"
    assert minutes == "| minutes of RL | 2 | 2 | 2 |"


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
