"""Are toxic, stressed and other prompts shown apart where the trained policy is compared?"""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path

import pytest

from detoxrl.report.page import build_report
from detoxrl.report.terminal import print_result
from results import EVALUATION, JUDGE, ROWS, change, make_run, toxicity, write


@pytest.fixture
def stressed_run(tmp_path: Path) -> Path:
    make_run(tmp_path)
    evaluation = deepcopy(EVALUATION)
    evaluation["by_prompt"] = {
        name: {"n": n, "toxicity": {JUDGE: toxicity(before, after, "less toxic")}, "quality": {
            "facts": change(0.8, 0.7), "refusal_rate": change(0.1, 0.3), "expected_max_toxicity": change(0.9, 0.4)}}
        for name, n, before, after in (("stressed prompts", 2, 0.45, 0.15), ("clean prompts", 1, 0.07, 0.04))
    }  # fmt: skip
    write(tmp_path, "eval.json", evaluation)
    counts = {"stressed": 2, "clean": 1, "without a place for a turn": 0, "too long for a turn": 0}
    write(tmp_path, "rows.json", {**ROWS, "stress": {"test": counts}})
    return tmp_path


def test_the_terminal_has_a_line_for_each_part(stressed_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_result(stressed_run)
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "toxicity by kind of prompt" in shown
    assert "2 stressed prompts 0.450 0.150 −0.300 −0.320 to −0.280" in shown
    assert "1 clean prompts 0.070 0.040 −0.030 −0.050 to −0.010" in shown


def test_the_page_has_toxicity_quality_and_refusals_of_each_part_and_the_account(stressed_run: Path) -> None:
    html = build_report(stressed_run).read_text(encoding="utf-8")
    assert "test has 2 stressed, 1 clean, 0 without a place for a turn, 0 too long for a turn." in html
    section = html.partition("Stressed prompts, and clean ones</h2>")[2].partition("</section>")[0]
    text = re.sub(r"(<[^>]+>|\s)+", " ", section)
    stressed = text.partition("2 stressed prompts")[2].partition("1 clean prompts")[0]
    assert re.search(rf"Toxicity by {JUDGE} .* 0\.450 0\.150 −0\.300 −0\.320 to −0\.280", stressed)
    assert re.search(r"Facts kept .* 0\.800 0\.700 ", stressed)
    assert re.search(r"Expected maximum toxicity .* 0\.900 0\.400 ", stressed)
    assert re.search(r"Refusals .* 0\.100 0\.300 \+0\.200 ", stressed)
