"""Real dialogue sets, complete, through the command line; skipped where they are not installed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from detoxrl import cli
from test_own import SMALL

DATA = Path(__file__).parents[3] / "shared" / "data"
SIZES = {
    "samsum": {"train": 14732, "validation": 818, "test": 819},
    "dialogsum": {"train": 12460, "validation": 500, "test": 1500},
}


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not installed")
@pytest.mark.parametrize("name", ["samsum", "dialogsum"])
def test_every_row_of_a_real_set_is_accounted_for_and_unchanged(
    name: str, tmp_path: Path, bases: dict[str, Path], reward_folder: Path
) -> None:
    words = ["--policy.base", str(bases["t5"]), "--reward.classifier", str(reward_folder)]
    words += ["--data.source", str(DATA / name), "--data.id-column", "id", "--run-dir", str(tmp_path / "run")]
    cli.main(["run", "own", *words, *SMALL])
    account = json.loads((tmp_path / "run" / "rows.json").read_text())
    assert {split: sum(counts.values()) for split, counts in account["splits"].items()} == SIZES[name]
    assert account["splits"]["train"]["leaks from test"] > 0
    originals = {}
    used = []
    for split in SIZES[name]:
        with gzip.open(DATA / name / f"{split}.jsonl.gz", "rt", encoding="utf-8", newline="\n") as lines:
            originals |= {row["id"]: row for row in map(json.loads, lines)}
        rows = (tmp_path / "run" / "data" / f"{split}.jsonl").read_text("utf-8").rstrip().split("\n")
        used += map(json.loads, rows)
    assert len(used) > 11_000
    for row in used:
        original = originals[row["id"]]
        assert row["text"] == original["dialogue"]
        assert row["references"][0] == original["summary"]
    assert max(len(row["text"]) for row in used) > 5000
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
