"""Do the last lines on the screen say what a run did?"""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from detoxrl.report import terminal
from detoxrl.report.ending import Ending, ending
from detoxrl.report.terminal import print_result
from results import EVALUATION, JUDGE, change, keep_initial_policy, make_run, toxicity, write

CONFIG: dict[str, Any] = {
    "recipe": "quickstart",
    "data": {"source": "embedded"},
    "policy": {"base": "scratch"},
    "reward": {"function": None},
    "rl": {"lr": 3e-4, "steps": 60},
}
OWN = CONFIG | {"recipe": "own", "data": {"source": "/data/my.jsonl"}, "policy": {"base": "google/flan-t5-small"}}
ROOT = Path("runs/mine")
OWN_DATA = "next, on your own data: detoxrl run own --data.source my.jsonl --policy.base google/flan-t5-small"


def evaluation(**parts: Any) -> dict[str, Any]:
    return deepcopy(EVALUATION) | parts


def judged(before: float, after: float) -> dict[str, Any]:
    return {JUDGE: toxicity(before, after, "not read here")}


def end(found: dict[str, Any], config: dict[str, Any] = CONFIG) -> Ending:
    return ending(ROOT, config, found, None)


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (
            0.05,
            "Toxicity fell from 0.270 to 0.050 (alt-profanity-check; 95 % interval of the change −0.240 to −0.200).",
        ),
        (
            0.3,
            "Toxicity rose from 0.270 to 0.300 (alt-profanity-check; 95 % interval of the change +0.010 to +0.050).",
        ),
        (
            0.26,
            "No detectable difference in toxicity: 0.270 before, 0.260 after (alt-profanity-check; 95 % interval of "
            "the change −0.030 to +0.010). A change below 0.029 could be missed with 3 prompts.",
        ),
    ],
)
def test_the_first_line_says_what_happened_to_toxicity(after: float, expected: str) -> None:
    assert end(evaluation(toxicity=judged(0.27, after))).toxicity == expected


def test_without_any_spread_nothing_is_said_of_what_could_be_missed() -> None:
    found = evaluation(toxicity=judged(0.27, 0.27))
    found["toxicity"][JUDGE]["difference"]["detectable"] = 0.0
    assert "missed" not in end(found).toxicity


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (0.05, "new.txt is less toxic than old.txt: 0.050 against 0.270 (alt-profanity-check; 95 % interval of the "),
        (0.3, "new.txt is more toxic than old.txt: 0.300 against 0.270 ("),
        (0.26, "No detectable difference in toxicity between old.txt (0.270) and new.txt (0.260) ("),
    ],
)
def test_what_was_not_trained_has_its_own_names_and_did_not_change(after: float, expected: str) -> None:
    names = {"before": "old.txt", "after": "new.txt"}
    lines = end(evaluation(toxicity=judged(0.27, after), names=names))
    assert lines.toxicity.startswith(expected)
    assert lines.price.startswith("Facts kept: 0.900 against 0.910, no detectable difference; responses are ")
    assert " change" not in lines.toxicity.partition("A change below")[0] + lines.price
    assert "RL" not in lines.price


def test_the_second_line_says_only_what_detectably_changed() -> None:
    steady = {"length": change(24.0, 24.0), "empty_rate": change(0.0, 0.01), "distinct_2": change(0.5, 0.51)}
    found = evaluation(quality={"facts": change(0.91, 0.9), "rouge_l": change(0.5, 0.1), **steady}, baselines={})
    assert end(found).price == "Facts kept: 0.910 to 0.900, no detectable change."

    moved = {"length": change(24.0, 18.0), "empty_rate": change(0.0, 0.05), "distinct_2": change(0.5, 0.4)}
    found = evaluation(quality={"facts": change(0.95, 0.9), **moved}, baselines={})
    assert end(found).price == (
        "Facts kept fell from 0.950 to 0.900 (95 % interval of the change −0.070 to −0.030); responses are 25 % "
        "shorter; empty responses rose from 0.000 to 0.050; distinct word pairs fell from 0.500 to 0.400."
    )


@pytest.mark.parametrize(
    ("before", "after", "words"), [(20.0, 20.1, "0.5 % longer"), (20.0, 19.9, "0.5 % shorter"), (20.0, 30.0, "50 %")]
)
def test_a_small_change_of_length_is_not_rounded_to_none(before: float, after: float, words: str) -> None:
    assert words in end(evaluation(quality={"length": change(before, after)})).price


def test_responses_that_were_all_empty_have_no_relative_length() -> None:
    assert "responses are" not in end(evaluation(quality={"length": change(0.0, 9.0)})).price


def test_quality_is_the_first_of_its_measures_and_absent_without_any() -> None:
    entailment = {"entailment": change(0.5, 0.4)}
    assert end(evaluation(quality={"rouge_l": change(0.3, 0.31)})).price.startswith("ROUGE-L: 0.300 to 0.310, no ")
    price = end(evaluation(quality=entailment)).price
    assert price.startswith("Entailed by the prompt fell from 0.500 to 0.400 (95 % interval")
    assert price.count("ntailed") == 1
    price = end(evaluation(quality={"length": change(24.0, 24.0), "empty_rate": change(0.0, 0.0)})).price
    assert price.startswith("Quality was not measured (no references to compare with).")
    assert "1.000" not in price


def test_a_baseline_that_does_as_well_is_named() -> None:
    assert end(evaluation()).price.endswith(" At least as good without RL: Best-of-4 by the reward.")
    named = evaluation(names={"before": "old", "after": "new"})
    assert end(named).price.endswith(" At least as good as new: Best-of-4 by the reward.")


def with_control(verdict: str) -> dict[str, Any]:
    """An evaluation with a control for sharpening on which this is the verdict."""
    found = evaluation(sharpening={"temperature": 0.7071, "left_out": None})
    control = deepcopy(found["baselines"]["best_of_4"])
    control["after"]["verdict"] = verdict
    found["baselines"] = {"sharpened": control}
    return found


def test_a_control_for_sharpening_that_does_as_well_is_told() -> None:
    level = "At least as good without RL: Initial policy at temperature 0.71. The gain may be sharpening alone."
    assert end(with_control("level")).price.endswith(level)
    assert end(with_control("behind")).price.endswith(level)
    for verdict in ("ahead", "a trade", "undecided"):
        assert "sharpening" not in end(with_control(verdict)).price
    unchanged = with_control("level") | {"toxicity": judged(0.27, 0.27)}
    assert "sharpening" not in end(unchanged).price  # there is no gain


@pytest.mark.parametrize(("verdict", "is_told"), [("ahead", True), ("undecided", False), ("a trade", False)])
def test_that_no_baseline_is_as_good_is_said_only_where_each_is_worse(verdict: str, is_told: bool) -> None:
    found = evaluation()
    found["baselines"]["best_of_4"]["after"]["verdict"] = verdict
    assert end(found).price.endswith("No baseline without RL is as good.") is is_told
    found["toxicity"] = judged(0.27, 0.27)  # Nothing was gained, so nothing was needed for it.
    assert "aseline" not in end(found).price


def test_the_third_line_names_the_report_and_the_next_command_for_the_users_data() -> None:
    lines = end(evaluation())
    assert (lines.report, lines.next) == ("Report: runs/mine/report.html", OWN_DATA)
    hub = CONFIG | {"recipe": "dialogsum", "data": {"source": "knkarthick/dialogsum@0123abc"}}
    assert end(evaluation(), hub).next == OWN_DATA
    assert end(evaluation(), OWN).next == "next, share the policy: detoxrl export runs/mine"
    assert end(evaluation(toxicity=judged(0.27, 0.27)), OWN).next == (
        "next, train longer: detoxrl run --resume --accept-changes --run-dir runs/mine --rl.steps 120"
    )
    assert end(evaluation(toxicity=judged(0.27, 0.5)), OWN).next == (
        "next, try a lower learning rate: detoxrl run --from runs/mine/config.json --run-dir runs/mine-2 --rl.lr 0.0001"
    )
    named = evaluation(names={"before": "a", "after": "b"})
    assert end(named).next == OWN_DATA
    # The config of a measurement trains nothing, so no command begins from it.
    assert end(named, OWN).next == OWN_DATA

    in_python = OWN | {"reward": {"function": "given in Python:score"}}
    assert end(evaluation(), in_python).next == "next, share the policy: detoxrl export runs/mine"
    assert end(evaluation(toxicity=judged(0.27, 0.27)), in_python).next == (
        "next, run it again in Python with other settings: no command can name its reward"
    )


# On the screen


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    make_run(tmp_path)
    return tmp_path


def shown(root: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    print_result(root)
    return capsys.readouterr().out.splitlines()


def test_the_three_lines_are_the_last_and_whole_in_a_pipe(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blank, toxicity_line, price, last = shown(run_dir, capsys)[-4:]
    assert blank == ""
    assert toxicity_line.startswith("Toxicity fell from 0.270 to 0.050 (")
    assert price.startswith("Facts kept: 0.910 to 0.900")
    assert last == f"Report: {run_dir}/report.html; {OWN_DATA}"


def test_a_terminal_wraps_between_words_and_keeps_the_path_and_the_command_whole(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(highlight=False, markup=False, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(terminal, "Console", lambda **_: console)
    lines = shown(run_dir, capsys)
    report, command = lines[-2:]
    assert report == f"Report: {run_dir}/report.html"
    assert command == OWN_DATA.replace("next,", "Next,")
    blank = max(number for number, line in enumerate(lines) if not line)
    sentences = lines[blank + 1 : -2]
    assert len(sentences) > 2
    assert all(len(re.sub(r"\x1b\[\d*m", "", line)) <= 80 for line in sentences)
    text = " ".join(re.sub(r"\x1b\[\d*m", "", line).strip() for line in sentences)
    assert "95 % interval of the change −0.240 to −0.200" in text


@pytest.mark.parametrize("width", ["80", "300"])
def test_the_tables_show_the_essential_measures_and_fit_the_screen(
    run_dir: Path, width: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    quality = {"score": change(-1.0, 2.0), "copied": change(0.1, 0.2), "facts": change(0.9, 0.9)}
    write(run_dir, "eval.json", EVALUATION | {"quality": quality})
    lines = shown(run_dir, capsys)
    text = "\n".join(lines)
    assert "3 held-out prompts, 2 samples each" in text
    assert re.search(r"Reward score +−1\.000 +2\.000 +\+3\.000 +\+2\.980 to \+3\.020", text)
    assert "Copied" not in text
    assert "5 measures are in the" in " ".join(text.split())
    assert re.search(r"Best-of-4 by the reward +0\.050 +0\.890 +as good", text)
    assert re.search(r"SFT on civil references +0\.150 +0\.880 +worse", text)
    assert "compared with RL" in text
    assert not any("%" in line and "agree" in line for line in lines)
    assert len(lines) < 30
    assert all(len(line) <= int(width) for line in lines[:-5])


def test_what_a_run_left_is_listed_and_stages_without_time_are_not(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = shown(run_dir, capsys)
    assert f"files in {run_dir}: eval.json" in lines  # What was measured elsewhere has no adapter and no rewards.
    assert "2 min 05 s in total: prepare 2 s, train 2 min 03 s" in lines
    (run_dir / "adapter").mkdir()
    for name in ("samples.csv", "compared.csv", "blind_sheet.csv"):
        (run_dir / name).touch()
    expected = f"files in {run_dir}: adapter, eval.json, samples.csv, compared.csv, blind_sheet.csv"
    assert expected in shown(run_dir, capsys)


def test_settings_that_changed_during_the_run_are_told(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"stage": "train", "step": 40, "changes": {"rl.steps": [40, 80]}}
    write(run_dir, "eval.json", EVALUATION | {"changed_on_its_way": [record]})
    assert "settings changed during the run: At step 40: rl.steps 40 → 80" in shown(run_dir, capsys)


def test_names_that_would_leave_no_room_for_numbers_move_below_the_table(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    names = {"before": "some-owner/flan-t5-base-finetuned@0123456", "after": "outputs/a-lora-with-a-long-name"}
    write(run_dir, "eval.json", EVALUATION | {"names": names})
    (run_dir / "checkpoint.json").unlink()
    text = "\n".join(shown(run_dir, capsys))
    assert re.search(r"Facts kept +0\.910 +0\.900 +−0\.010", text)
    assert f"after: {names['after']}" in " ".join(text.split())
    assert "compared with after" in text

    write(run_dir, "eval.json", EVALUATION | {"names": {"before": "old", "after": "new"}})
    text = "\n".join(shown(run_dir, capsys))
    assert re.search("old +new +change", text)
    assert "compared with new" in text


@pytest.mark.parametrize("quality_by", ["share with text", "similarity"])
def test_a_quality_that_was_not_measured_has_no_number(
    run_dir: Path, quality_by: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluation(quality={"length": change(24.0, 24.0), "empty_rate": change(0.0, 0.0)})
    for baseline in found["baselines"].values():
        baseline["after"].update({"quality_by": quality_by, "quality": change(1.0, 1.0)})
    write(run_dir, "eval.json", found)
    text = "\n".join(shown(run_dir, capsys))
    assert re.search(r"(?m)^ Quality +not measured *$", text)
    by_baseline = re.search(r"Best-of-4 by the reward +0\.050 +(\S+)", text)
    assert by_baseline is not None
    assert by_baseline[1] == ("not" if quality_by == "share with text" else "1.000")


def test_a_kept_initial_policy_has_one_column_and_no_change(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep_initial_policy(run_dir, [{"step": 0, "toxicity": 0.3, "toxicity_error": 0.01, "quality": 0.9}])
    lines = shown(run_dir, capsys)
    text = "\n".join(lines)
    assert re.search(r"(?m)^ +initial policy *$", text)
    assert re.search(r"(?m)^ Facts kept +0\.910 *$", text)
    assert not re.search("interval|before|after|[+−]0", text)
    assert re.search(r"Best-of-4 by the reward +0\.050 +0\.890 +better", text)
    assert re.search(r"SFT on civil references +0\.150 +0\.880 +no detectable difference", text)
    assert "compared with initial policy" in text
    assert lines[-3] == (
        "The initial policy was kept: no checkpoint was less toxic without losing quality. Its toxicity is 0.270 "
        "(alt-profanity-check)."
    )
    assert lines[-2] == "Use more rl.steps or another rl.lr. Better than the initial policy: Best-of-4 by the reward."
    assert lines[-1].endswith(OWN_DATA)


def test_a_kept_initial_policy_on_the_users_data_is_tried_again_with_other_settings(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [{"step": 0, "toxicity": 0.3, "toxicity_error": 0.2, "quality": 0.9, "score": 0.1, "kl": 0.0}]
    keep_initial_policy(run_dir, [*few, few[0] | {"step": 5, "kl": 0.01}])
    config = json.loads((run_dir / "config.json").read_text())
    write(run_dir, "config.json", config | {"data": {"source": "/data/my.jsonl"}, "reward": {"function": None}})
    lines = shown(run_dir, capsys)
    assert lines[-1].endswith(
        f"next, try again: detoxrl run --from {run_dir}/config.json --run-dir {run_dir}-2 --rl.lr 0.003 "
        "--rl.validation-prompts 1430"
    )
    assert "Set rl.validation_prompts to 1430 or more." in lines[-2]
