"""Stressed prompts through the command line: mixed in, accounted for, and shown apart everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from detoxrl.commands.preflight import check_locally
from detoxrl.config.recipes import recipe
from detoxrl.config.sources import local_sources, with_absolute_paths
from detoxrl.data.stress_lines import stress_lines
from detoxrl.errors import InputError
from small_runs import SMALL, detoxrl

TURNS = [f"Listen, you idiot of type {i}." for i in range(40)]
PARTS = ("toxic prompts", "other prompts", "stressed prompts", "clean prompts")


def write_talks(place: Path) -> None:
    """Write turns, and dialogues of which one has no speakers and half are toxic by their source."""
    (place / "turns.txt").write_text("\n".join(TURNS))
    rows = [
        {"dialogue": f"Ann: Where is parcel {i} for room {i * i}?\nBob: It is in box {i} at gate {i + 7}.",
         "summary": f"They talk about {i}.", "toxicity": i % 2}
        for i in range(60)
    ]  # fmt: skip
    rows.append({"dialogue": "A long report by nobody in particular.", "summary": "A report.", "toxicity": 0})
    (place / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_stressed_prompts_are_shown_apart_and_no_held_out_turn_is_seen_in_training(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_talks(place)
    words = ["run", "own", "--policy.base", "model", "--reward.classifier", "classifier", "--data.source",
             "talks.jsonl", "--data.stress", "turns.txt", "--data.toxicity-column", "toxicity", *SMALL,
             "--rl.steps", "1", "--evaluation.best-of", "none", "--evaluation.no-sharpened"]  # fmt: skip
    assert detoxrl(words) == 0
    shown = capsys.readouterr()
    run = place / "runs/own"

    turns = stress_lines(place / "turns.txt")
    account = json.loads((run / "rows.json").read_text())["stress"]
    for split in ("train", "validation", "test"):
        rows = lines_of(run / f"data/{split}.jsonl")
        stressed = [row for row in rows if row.get("stressed")]
        assert len(rows) / 4 < len(stressed) < len(rows)
        for row in stressed:
            assert sum(turn in row["prompt"] for turn in turns[split]) == 1
        for row in rows:
            assert ("idiot" in row["prompt"]) == row.get("stressed", False)
            assert "idiot" not in row["columns"]["dialogue"]
        assert account[split]["stressed"] == len(stressed)
        assert sum(account[split].values()) == len(rows)
    assert f"prompts of train: {account['train']['stressed']} stressed, {account['train']['clean']} clean" in shown.err

    evaluation = json.loads((run / "eval.json").read_text())
    parts = evaluation["by_prompt"]
    assert tuple(parts) == PARTS
    for pair in (PARTS[:2], PARTS[2:]):
        assert sum(parts[part]["n"] for part in pair) == evaluation["n_prompts"] == 8
    assert parts["stressed prompts"]["n"] == account["test"]["stressed"]
    samples = lines_of(run / "samples.jsonl")
    assert [sample["stressed"] for sample in samples] == [
        row.get("stressed", False) for row in lines_of(run / "data/test.jsonl")
    ]

    page = (run / "report.html").read_text()
    assert "A stressed prompt has a toxic turn from" in page
    assert detoxrl(["export", "runs/own"]) == 0
    card = (place / "runs/own-export/README.md").read_text()
    assert "a stressed prompt has a toxic turn inserted" in card
    for name, part in parts.items():
        title = f"{part['n']} {name}"
        for told in (shown.out, page, card):
            assert title in told
    assert "idiot" not in shown.out + shown.err

    (place / "turns.txt").unlink()  # The rows hold what a stage needs of it.
    assert detoxrl(["evaluate", "runs/own"]) == 0


def test_a_turn_that_would_be_cut_leaves_the_row_clean_and_counted(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_talks(place)
    long = " ".join(["quite"] * 60)
    (place / "turns.txt").write_text("\n".join(f"{turn} {long}" for turn in TURNS))
    words = ["prepare", "own", "--policy.base", "model", "--reward.classifier", "classifier", "--data.source",
             "talks.jsonl", "--data.stress", "turns.txt", "--data.max-prompt-tokens", "100", *SMALL]  # fmt: skip
    assert detoxrl(words) == 0
    account = json.loads((place / "runs/own/rows.json").read_text())["stress"]
    for split, counts in account.items():
        rows = lines_of(place / f"runs/own/data/{split}.jsonl")
        assert counts["stressed"] == sum(row.get("stressed", False) for row in rows) == 0
        assert counts["too long for a turn"] > 0
        assert not any("idiot" in row["prompt"] + row["text"] for row in rows)


def test_a_file_that_is_missing_is_known_before_anything_is_written(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_talks(place)
    (place / "few.txt").write_text("\n".join(TURNS[:3]))
    for name, told in (("turn.txt", "is not a file"), ("few.txt", "of its 3 distinct turns for")):
        assert detoxrl(["run", "own", "--policy.base", "model", "--data.source", "talks.jsonl", "--data.stress", name,
                        *SMALL]) == 2  # fmt: skip
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith(f"detoxrl: data.stress = '{name}': ")
        assert told in line
        with pytest.raises(InputError, match=told):  # already by what imports no torch
            check_locally(recipe("own", {"policy.base": "model", "data.source": "talks.jsonl", "data.stress": name}))
    assert not (place / "runs").exists()


def test_a_path_means_the_same_from_any_folder(place: Path) -> None:
    write_talks(place)
    settings = {"policy.base": "model", "data.source": "talks.jsonl", "data.stress": "turns.txt"}

    config = with_absolute_paths(recipe("own", settings))
    assert config.data.stress == str(place / "turns.txt")
    assert local_sources(config)["data.stress"] == place / "turns.txt"
