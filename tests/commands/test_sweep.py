"""A sweep: its frontier, its runs, its messages for bad input, and a small one through the real command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detoxrl.commands import run as stages
from detoxrl.commands import sweep
from detoxrl.commands.sweep import frontier
from detoxrl.commands.sweep_plan import SweepPlan, plan_runs
from detoxrl.config.recipes import recipe
from detoxrl.errors import TrainingError
from detoxrl.evaluation.statistics import paired_difference, two_stage_interval
from detoxrl.runtime.run_folder import SHARE_WITH_TEXT
from small_runs import contents, detoxrl, own

JUDGE = "alt-profanity-check"


@pytest.mark.parametrize(
    ("points", "undominated"),
    [
        ([], []),
        ([(0.2, 0.9)], [0]),
        ([(0.2, 0.9), (0.1, 0.8)], [0, 1]),  # Each is better in one.
        ([(0.2, 0.9), (0.1, 0.9), (0.1, 0.8)], [1]),  # As good in one and better in the other.
        ([(0.1, 0.9), (0.1, 0.9), (0.3, 0.95)], [0, 1, 2]),  # Ties stay.
        ([(0.3, 0.7), (0.2, 0.8), (0.1, 0.9)], [2]),
        ([(0.1, 0.9), (0.2, 0.9), (0.2, 0.9)], [0]),  # A dominated tie does not.
    ],
)
def test_the_frontier_is_what_no_other_point_dominates(
    points: list[tuple[float, float]], undominated: list[int]
) -> None:
    assert frontier(points) == undominated


@given(st.lists(st.tuples(*[st.integers(0, 5).map(lambda tenths: tenths / 10)] * 2), max_size=12))
def test_the_frontier_is_that_of_its_definition(points: list[tuple[float, float]]) -> None:
    def dominated(point: tuple[float, float]) -> bool:
        return any(t <= point[0] and q >= point[1] and (t, q) != point for t, q in points)

    assert frontier(points) == [index for index, point in enumerate(points) if not dominated(point)]


def test_the_interval_of_one_run_is_that_over_prompts_and_different_seeds_widen_it() -> None:
    run = np.random.default_rng(1).random((60, 4))
    low, high = two_stage_interval([run], 4000, seed=0)
    over_prompts = paired_difference(np.zeros((60, 4)), run, 4000, seed=3)
    assert low == pytest.approx(over_prompts.low, abs=0.005)
    assert high == pytest.approx(over_prompts.high, abs=0.005)

    equal_runs = two_stage_interval([run, run], 4000, seed=0)
    assert equal_runs[1] - equal_runs[0] == pytest.approx((high - low) / 2**0.5, rel=0.1)

    different_runs = two_stage_interval([run, run + 0.5], 4000, seed=0)
    assert different_runs[0] < run.mean() + 0.05
    assert different_runs[1] > run.mean() + 0.45


def test_every_combination_is_planned_with_every_seed_in_a_folder_with_a_readable_name() -> None:
    runs = plan_runs(recipe("quickstart"), SweepPlan(over=["rl.kl-coef=0.05,.2", "rl.lr=1e-4"], seeds=["0", "3"]))
    assert [(label, config.seed) for label, config in runs.values()] == [
        (f"rl.kl_coef={kl} rl.lr=0.0001", seed) for kl in (0.05, 0.2) for seed in (0, 3)
    ]
    assert list(runs)[1] == "rl.kl_coef=0.05_rl.lr=0.0001_seed=3"
    assert [(config.rl.kl_coef, config.rl.lr) for _, config in runs.values()][2] == (0.2, 1e-4)
    assert list(plan_runs(recipe("own"), SweepPlan(seeds=["7"]))) == ["as_given_seed=7"]
    assert list(plan_runs(recipe("own"), SweepPlan(over=["policy.base=a/b: c"]))) == ["policy.base=a_b_c_seed=0"]


def test_bad_input_is_one_line_and_writes_nothing(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (place / "runs").mkdir()
    (place / "runs/photos").mkdir()
    (place / "runs/photos/holiday").touch()
    before = contents(place)
    for words, message in (
        (["--over", "rl.kl-coeff=1"], "setting = 'rl.kl_coeff': is not a setting; did you mean rl.kl_coef?"),
        (["--over", "rl.kl-coef=1,x"], "rl.kl_coef = 'x': must be a number"),
        (["--over", "rl.kl-coef=1,-1"], "rl.kl_coef = -1.0: must be 0 or more"),
        (["--over", "rl.kl-coef="], "--over = 'rl.kl-coef=': must be FIELD=VALUES; write --over rl.kl-coef=0.05,0.2"),
        (["--over", "rl.kl-coef"], "must be FIELD=VALUES"),
        (
            ["--over", "rl.kl-coef=1", "--over", "rl.kl_coef=2"],
            "--over = 'rl.kl_coef': is given twice; give all its values at once",
        ),
        (["--over", "rl.kl-coef=1,1.0"], "'rl.kl_coef=1.0 seed 0': is a duplicate; name each value once"),
        (["--over", "seed=1,2"], "--over = 'seed': is not a setting to compare; write --seeds 0,1,2"),
        (["--seeds", "0,x"], "seed = 'x': must be a whole number"),
        (["--seeds", "1", "--seeds", "2,x"], "seed = 'x': must be a whole number"),
        ([], "--over = '': is missing; add --over rl.kl-coef=0.05,0.2, or --seeds 0,1"),
        (["--over"], "--over = '': expected at least one argument"),
        (["--over", "rl.lr=1e-3", "--run-dir", "runs/photos"], "is not a sweep; name another folder"),
        (["--over", "rl.lr=1e-3", "--run-dir", "runs/photos", "--resume"], "is not a sweep"),
        (["--over", "policy.base=model,nowhere"], "policy.base = 'nowhere'"),  # Before the first run.
        (["--over", "rl.lr=1e-3", "--overwrite", "--resume"], "--resume = True: cannot be combined with --overwrite"),
    ):
        assert detoxrl(["sweep", *own()[1:], *words]) == 2, words
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("detoxrl: ")]
        assert message in line, line
    assert detoxrl(own("--over", "rl.lr=1e-3")) == 2
    assert "--over" in capfd.readouterr().err
    assert detoxrl(["sweep", "--resume"]) == 2
    assert contents(place) == before


class FakeRuns:
    """Stands in for `stages.run`, with results that are known for each kl_coef and seed."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.results: dict[float, tuple[float, float]] = {}  # Toxicity and quality by kl_coef.
        self.errors: dict[float, Exception] = {}
        self.kept_step = 5
        self.quality_by = "facts"

    def __call__(self, root: Path, config: Any, **arguments: Any) -> dict[str, Any]:
        self.calls.append((root.name, arguments))
        kl = config.rl.kl_coef
        if kl in self.errors:
            raise self.errors[kl]

        toxicity, quality = self.results[kl]
        toxicity += config.seed / 100
        root.mkdir(parents=True, exist_ok=True)
        steps = {"kept_step": self.kept_step, "parted_step": 10 if kl == 0 else None, "stopped_step": None}
        (root / "checkpoint.json").write_text(json.dumps(steps | {"kept": {"kl": 1 / (kl + 0.1)}}))
        judged_samples = {"toxicity": {JUDGE: {"after": [toxicity, toxicity]}}}
        lines = [{"id": str(number), "text": "Hello.", "responses": {}, **judged_samples} for number in range(3)]
        (root / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        judged = {"before": {"mean": 0.3 + config.seed / 10}, "after": {"mean": toxicity}}
        both = {"empty_rate": {"before": 0, "after": 0}, "similarity": {"before": 1, "after": 1}}
        if self.quality_by != SHARE_WITH_TEXT:
            both[self.quality_by] = {"before": 0.9, "after": quality}
        return {"primary_judge": JUDGE, "quality_by": self.quality_by, "toxicity": {JUDGE: judged}, "quality": both}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeRuns:
    runs = FakeRuns()
    runs.results = {0.0: (0.02, 0.7), 0.1: (0.1, 0.88), 0.2: (0.15, 0.85), 0.5: (0.2, 0.9)}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stages, "run", runs)
    monkeypatch.setattr(sweep, "check", lambda run: runs.calls.append(("checked", {"kl": run.config.rl.kl_coef})))
    return runs


OVER = ["sweep", "quickstart", "--over", "rl.kl-coef=0,0.1,0.2,0.5", "--seeds", "0,1"]


def test_a_sweep_reports_every_combination_and_names_the_frontier(
    runs: FakeRuns, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert detoxrl(OVER) == 0
    out, err = capfd.readouterr()
    assert [arguments["kl"] for name, arguments in runs.calls if name == "checked"] == [0, 0.1, 0.2, 0.5]
    assert [name for name, _ in runs.calls][4:6] == ["rl.kl_coef=0.0_seed=0", "rl.kl_coef=0.0_seed=1"]
    assert "run 4 of 8: rl.kl_coef=0.1 seed 1" in err
    root = tmp_path / "runs/sweep"
    state = json.loads((root / "sweep.json").read_text())
    assert state["over"] == ["rl.kl-coef=0,0.1,0.2,0.5"]
    assert state["start"] == [pytest.approx(0.35), 0.9]
    middle = state["combinations"]["rl.kl_coef=0.1"]
    assert middle["toxicity"] == [pytest.approx(0.35), pytest.approx(0.105)]
    assert middle["quality"] == [0.9, 0.88]
    assert middle["kl"] == 5
    assert middle["interval"] == [pytest.approx(0.1), pytest.approx(0.11)]  # Only the seeds differ.
    assert [label for label, combination in state["combinations"].items() if combination["frontier"]] == [
        "rl.kl_coef=0.0", "rl.kl_coef=0.1", "rl.kl_coef=0.5",
    ]  # fmt: skip
    assert [run["folder"] for run in middle["runs"]] == ["rl.kl_coef=0.1_seed=0", "rl.kl_coef=0.1_seed=1"]
    (row,) = [line for line in out.splitlines() if "rl.kl_coef=0.2" in line]
    assert row.split() == ["rl.kl_coef=0.2", "2/2", "0.155", "0.150", "to", "0.160", "0.850", "3.3"]
    assert out.splitlines()[-1] == "next: open runs/sweep/sweep.html in a browser"
    html = (root / "sweep.html").read_text()
    assert not re.search(r"https?:|\bsrc\s*=|<link|@import", html)
    assert str(tmp_path) not in html
    assert "On the frontier: rl.kl_coef=0.0; rl.kl_coef=0.1; rl.kl_coef=0.5<" in html
    drawing = html.partition("<svg")[2].partition("</svg>")[0]
    assert [f"rl.kl_coef={kl}<" in drawing for kl in (0.0, 0.1, 0.2, 0.5)] == [True, True, False, True]
    assert "initial policy<" in drawing
    assert html.count("divergence at step 10") == 2
    first = (root / "sweep.html").read_bytes()
    assert detoxrl(["sweep", "--resume", "--run-dir", "runs/sweep"]) == 0  # With the plan of before.
    assert (root / "sweep.html").read_bytes() == first
    assert json.loads((root / "sweep.json").read_text()) == state


def test_a_sweep_without_references_shows_no_quality(
    runs: FakeRuns, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs.quality_by = SHARE_WITH_TEXT
    assert detoxrl(OVER) == 0
    out = capfd.readouterr().out
    rows = [line for line in out.splitlines() if re.match(" *(rl.kl_coef=|initial policy)", line)]
    assert len(rows) == 5
    assert all("—" in row and "1.000" not in row for row in rows)
    assert "quality: not measured" in " ".join(out.split())
    html = (tmp_path / "runs/sweep/sweep.html").read_text()
    assert "quality was not measured, and the share of responses with text stands in for it" in html
    assert '">Share with text</th>' in html
    assert "share with text (quality was not measured)<" in html
    assert "quality 1.000" not in html


def test_a_sweep_compares_by_the_quality_that_bounds_training(
    runs: FakeRuns, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs.quality_by = "distinct_2"  # Of prompts to continue, for example.
    assert detoxrl(OVER) == 0
    state = json.loads((tmp_path / "runs/sweep/sweep.json").read_text())
    assert state["measure"] == "distinct_2"
    assert state["combinations"]["rl.kl_coef=0.1"]["quality"] == [0.9, 0.88]
    assert "quality: distinct word pairs" in " ".join(capfd.readouterr().out.split()).lower()
    assert "quality (Distinct word pairs" in (tmp_path / "runs/sweep/sweep.html").read_text()


def test_a_sweep_tells_which_runs_kept_the_initial_policy(
    runs: FakeRuns, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert detoxrl(OVER) == 0
    assert "initial policy kept" not in capfd.readouterr().out
    runs.kept_step = 0
    assert detoxrl([*OVER, "--overwrite"]) == 0
    out = capfd.readouterr().out
    assert "rl.kl_coef=0.2: initial policy kept in 2 of 2 runs, because no checkpoint was better" in out.splitlines()
    html = (tmp_path / "runs/sweep/sweep.html").read_text()
    assert html.count("initial policy kept") == 8
    assert "step 0" not in html


def test_a_combination_that_fails_is_recorded_and_the_others_follow(
    runs: FakeRuns, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs.errors = {0.1: TrainingError("train stopped at step 3: grad_norm is nan")}
    assert detoxrl(OVER) == 0
    out, err = capfd.readouterr()
    assert "rl.kl_coef=0.1_seed=1: train stopped at step 3: grad_norm is nan" in " ".join(err.split())
    (row,) = [line for line in out.splitlines() if "rl.kl_coef=0.1" in line]
    assert row.split() == ["rl.kl_coef=0.1", "0/2", "failed"]
    combinations = json.loads((tmp_path / "runs/sweep/sweep.json").read_text())["combinations"]
    assert combinations["rl.kl_coef=0.1"]["runs"][0]["error"] == "train stopped at step 3: grad_norm is nan"
    assert combinations["rl.kl_coef=0.2"]["frontier"] is True  # The point that dominated it is gone.
    assert "grad_norm is nan" in (tmp_path / "runs/sweep/sweep.html").read_text()
    runs.errors |= {0.2: ZeroDivisionError("a bug")}
    with pytest.raises(ZeroDivisionError, match="a bug"):
        detoxrl([*OVER, "--overwrite"])
    runs.errors = dict.fromkeys(runs.results, TrainingError("no"))
    assert detoxrl([*OVER, "--resume"]) == 1
    assert "no run in runs/sweep has a result" in capfd.readouterr().err


def test_a_sweep_is_replaced_or_resumed_on_request_only(runs: FakeRuns, capfd: pytest.CaptureFixture[str]) -> None:
    assert detoxrl(OVER) == 0
    assert detoxrl(OVER) == 2
    assert (
        "'runs/sweep': already exists; add --resume to continue it, --overwrite to start again"
        in capfd.readouterr().err
    )
    runs.calls.clear()
    assert detoxrl([*OVER[:2], "--over", "rl.kl-coef=0.5", "--resume"]) == 0
    assert runs.calls == [("rl.kl_coef=0.5_seed=0", {"if_exists": "resume", "track": None})]
    assert detoxrl([*OVER[:2], "--over=rl.kl-coef=0.5", "--overwrite", "--rl.steps=7"]) == 0
    assert runs.calls[-1][1] == {"if_exists": "overwrite", "track": None}
    assert json.loads(Path("runs/sweep/base.json").read_text())["rl"]["steps"] == 7


def test_a_sweep_that_is_replaced_is_checked_before_anything_of_it_is_lost(
    runs: FakeRuns, capfd: pytest.CaptureFixture[str]
) -> None:
    assert detoxrl(OVER) == 0
    runs.calls.clear()
    before = Path("runs/sweep/sweep.json").read_bytes()
    for settled in ("--overwrite", "--resume"):
        assert detoxrl(["sweep", "quickstart", "--over", "data.source=embedded,typo.jsonl", settled]) == 2
        assert "data.source = 'typo.jsonl': is not a file" in capfd.readouterr().err
    assert Path("runs/sweep/sweep.json").read_bytes() == before
    assert runs.calls == []

    assert detoxrl([*OVER, "--overwrite"]) == 0
    assert [name for name, _ in runs.calls].count("checked") == 4


def test_a_small_sweep_through_the_real_command_line(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ["--rl.steps", "1", "--reward.function", "rewards.py:brevity", "--rl.quality-margin", "1"]
    words = ["sweep", *own(*small)[1:], "--over", "rl.kl-coef=0.1,0.5", "--run-dir", "swept"]
    monkeypatch.setenv("INTERRUPT_AT", "2")  # Call 0 is the probe, 1 the normaliser, 2 the only step of the first run.
    assert detoxrl(words) == 130
    message = capfd.readouterr().err.splitlines()[-1]
    assert message.endswith("keeps base.json, rl.kl_coef=0.1_seed=0, sweep.json; resume with "
                         "`detoxrl sweep --resume --run-dir swept`")  # fmt: skip
    monkeypatch.delenv("INTERRUPT_AT")
    assert detoxrl(["sweep", "--resume", "--run-dir", "swept"]) == 0
    out, err = capfd.readouterr()
    assert "run 2 of 2: rl.kl_coef=0.5 seed 0" in err
    assert "yes" in out
    combinations = json.loads((place / "swept/sweep.json").read_text())["combinations"]
    for kl in ("0.1", "0.5"):
        combination = combinations[f"rl.kl_coef={kl}"]
        evaluation = json.loads((place / f"swept/rl.kl_coef={kl}_seed=0/eval.json").read_text())
        assert combination["toxicity"][1] == pytest.approx(evaluation["toxicity"][JUDGE]["after"]["mean"])
        assert combination["quality"][0] == pytest.approx(evaluation["quality"]["rouge_l"]["before"])
        assert combination["interval"][0] <= combination["toxicity"][1] <= combination["interval"][1]

    def files_of_runs() -> dict[Path, bytes]:
        return {name: body for name, body in contents(place / "swept").items() if len(name.parts) > 1}

    before = files_of_runs()
    assert detoxrl([*words, "--resume"]) == 0
    assert files_of_runs() == before
