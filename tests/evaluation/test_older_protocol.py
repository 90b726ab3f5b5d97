"""The protocol of older systems, by hand, and the benchmark's command on a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import prompted_rows
from detoxrl.evaluation.statistics import Floats
from older_protocol import Line, main, older_protocol, summarized
from small_runs import detoxrl, own

ROWS = prompted_rows({"test": 60})["test"]


def by_length(texts: Sequence[str]) -> Floats:
    """A judge: a hundredth of a text's length."""
    return np.array([len(text) / 100 for text in texts])


def by_key(lines: Sequence[Line]) -> dict[tuple[int, str, str], Line]:
    return {(line.prompts, line.judged, line.writer): line for line in lines}


def test_the_aggregates_by_hand() -> None:
    # mean 0.5, squares 0.16 + 0 + 0 + 0.16 over 4
    line = summarized("response", "before", np.array([0.1, 0.5, 0.5, 0.9]))
    assert line[:3] == (4, "response", "before")
    assert line[3:] == pytest.approx((0.5, 0.08**0.5, 0.9, 0.75))


def test_it_reads_one_response_of_ten_prompts_and_of_all_with_and_without_the_prompt() -> None:
    rows = [replace(row, prompt=f"p{i}", references=("s" * (i + 1),)) for i, row in enumerate(ROWS[:12])]
    texts = {"before": [["ab", "zz"] for _ in rows], "after": [["a", "zz"] for _ in rows], "sft": [["q"] for _ in rows]}
    read: list[str] = []

    def judge(asked: Sequence[str]) -> Floats:
        read.extend(asked)
        return by_length(asked)

    lines = older_protocol(rows, texts, judge)
    found = by_key(lines)
    assert {line.prompts for line in lines} == {10, 12}
    assert [line.writer for line in lines if line[:2] == (10, "response")] == ["before", "after", "people"]
    assert found[10, "response", "after"].mean == pytest.approx(0.01)
    assert found[10, "response", "people"].maximum == pytest.approx(0.10)
    assert found[12, "response", "people"].maximum == pytest.approx(0.12)
    # "p0 ab" to "p9 ab" have five characters, "p10 ab" and "p11 ab" six.
    assert found[10, "prompt and response", "before"].mean == pytest.approx(0.05)
    assert found[12, "prompt and response", "before"].mean == pytest.approx((10 * 5 + 2 * 6) / 1200)
    assert "zz" not in read
    assert "q" not in read

    without_summaries = [replace(row, references=()) for row in rows]
    assert (10, "response", "people") not in by_key(older_protocol(without_summaries, texts, by_length))


def test_the_command_prints_the_table_of_a_run_by_the_rewards_classifier(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert detoxrl(own("--rl.steps", "1")) == 0
    capsys.readouterr()
    main(["runs/own"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Toxicity by reward classifier, one response per prompt"
    assert [line.split(" | ")[:3] for line in lines[4:]] == [
        ["| 8", "prompt and response", "before"],
        ["| 8", "prompt and response", "after"],
        ["| 8", "response", "before"],
        ["| 8", "response", "after"],
        ["| 8", "response", "people"],
    ]
