"""What the page, the terminal and the card say of the audit of group mentions."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detoxrl.evaluation.identity import audit_judge, audit_policies, audit_reward
from detoxrl.evaluation.identity_sentences import identity_rows
from detoxrl.models.types import Prompt
from detoxrl.report.ending import ending
from detoxrl.report.identity import audit_warnings, raters, refusals
from detoxrl.report.page import build_report
from results import EVALUATION, JUDGE, change, make_run, write

ANSWER = "I see what you mean."
REFUSAL = "I cannot help with that."


def audited(bias: float, refused: str, judge: str = JUDGE) -> dict[str, Any]:
    """An evaluation whose judge and reward punish "deaf" by `bias`, and whose policy refuses texts with `refused`."""

    def rate(texts: Any) -> Any:
        return np.array([bias * ("deaf" in text) for text in texts])

    rows = identity_rows("chat", 253)
    before = {sentence: [ANSWER] for sentence in rows}
    after = {sentence: [REFUSAL if refused and refused in sentence else ANSWER] for sentence in rows}
    evaluation = deepcopy(EVALUATION)
    evaluation["quality"]["refusal_rate"] = change(0.01, 0.05)
    evaluation["identity"] = {
        "judges": {judge: audit_judge(rate)},
        "reward": audit_reward(lambda pairs: {"score": -rate([text for _, text in pairs])}, [Prompt(id="a", text="a")]),
        "policy": audit_policies({"before": before, "after": after}, rate),
    }
    return evaluation


def test_nothing_is_said_where_nothing_is_flagged() -> None:
    evaluation = audited(0.0, "")
    assert audit_warnings(evaluation) == []
    assert audit_warnings(EVALUATION) == raters(EVALUATION) == []  # an earlier version
    assert "no group is flagged" in raters(evaluation)[0].summary


def test_the_terminal_names_the_worst_group_and_how_many_more() -> None:
    evaluation = audited(0.2, "")
    assert audit_warnings(evaluation) == [
        "civil mentions of a group are rated less favourably than neutral words by "
        f"{JUDGE} (deaf +0.20), the reward's score (deaf −4.76 standard deviations)"
    ]
    evaluation["identity"]["judges"][JUDGE]["flagged"] += ["blind", "gay"]
    assert f"{JUDGE} (deaf +0.20 and 2 more)" in audit_warnings(evaluation)[0]


def test_a_policy_that_learned_to_refuse_one_group_is_named() -> None:
    evaluation = audited(0.0, "Muslim")
    policy, refused = audit_warnings(evaluation)
    assert policy.startswith("the policy answers mentions of a group otherwise than before: refusals on all prompts ")
    assert "(95% interval +0.067 to +0.067)" in policy  # one of 15 terms
    assert policy.endswith(" and 1 more")
    assert refused.startswith(
        "refusals on civil prompts that mention a group rose from 0.000 to 0.067 (difference +0.0"
    )
    assert set(refusals(evaluation)) == {"On the held-out prompts", "On civil prompts that mention a group"}


def test_risen_refusals_have_their_interval_in_the_last_lines() -> None:
    evaluation = audited(0.0, "")
    config = {"recipe": "own", "data": {"source": "x"}, "rl": {"lr": 1e-3, "steps": 5}, "reward": {"function": None}}
    price = ending(Path("runs/x"), config, evaluation, None).price
    assert "refusals rose from 0.010 to 0.050 (95 % interval of the change +0.020 to +0.060)" in price


@pytest.mark.parametrize("refused", ["Muslim", ""])
def test_the_page_shows_raters_refusals_and_answers(refused: str, tmp_path: Path) -> None:
    make_run(tmp_path)
    write(tmp_path, "eval.json", audited(0.2, refused))
    html = build_report(tmp_path).read_text(encoding="utf-8")
    section = html.partition("<h2>Mentions of groups</h2>")[2].partition("</section>")[0]
    text = re.sub(r"<[^>]+>|\s+", " ", section)
    assert "rated more toxic than their neutral match: deaf (+0.200)." in text
    assert "On the held-out prompts: rose from 0.010 to 0.050 (difference +0.040, 95% interval +0.020 to" in text
    assert "On civil prompts that mention a group:" in text
    assert "253 generated prompts, 1 sample each." in text
    assert text.count("flagged") > 2
    assert ("Flagged: refusals on all prompts with a mention" in text) == bool(refused)
    assert ("No change of a gap is flagged." in text) != bool(refused)


def test_a_page_without_an_audit_has_no_such_section(tmp_path: Path) -> None:
    make_run(tmp_path)
    assert "Mentions of groups" not in build_report(tmp_path).read_text(encoding="utf-8")
