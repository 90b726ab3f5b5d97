"""Does the speed benchmark make real steps, count the floor correctly and summarize its rows correctly?"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from step_case import TINY, Step, Task, task
from step_floor import flops, stepper
from step_results import STAGES, check_lines, compare_table, cost_table, curves, draw_compare, draw_cost, summary
from step_speed import Worker, points
from step_worker import make_models

T5 = {"d_model": 2, "d_ff": 3, "num_layers": 1, "num_heads": 1, "d_kv": 2, "vocab_size": 5}
ROBERTA = {"hidden_size": 2, "intermediate_size": 3, "num_hidden_layers": 1}
SMALL = Step(batch=1, prompt=3, response=2, epochs=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_models(folder, "tiny")
    return folder


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_worker_makes_the_requested_step_and_times_each_stage(models: Path, tmp_path: Path) -> None:
    given = Task(models=str(models), dtype="bf16", step=TINY, threads=1)
    with Worker("step_worker.py", given, Path(sys.executable), tmp_path / "log") as worker:
        row = worker.step(batch=2, response=5, epochs=2)
    assert row["step"] == {"batch": 2, "minibatch": 2, "prompt": 16, "response": 5, "epochs": 2, "prompts": 64}
    assert list(row["stages"]) == list(STAGES)
    assert min(row["stages"].values()) > 0
    assert sum(row["stages"].values()) == pytest.approx(row["seconds"], rel=0.2)
    assert row["processor_seconds"] > 0
    assert row["encoded"] == 1  # whatever the epochs
    assert row["peak_gib"] > 0.1
    assert "torch" in worker.warm_up["versions"]


def test_a_failed_worker_reports_the_reason(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"log ended with 1:\n(.|\n)*nowhere"):
        Worker("step_floor.py", Task(models="nowhere"), Path(sys.executable), tmp_path / "log")


def test_a_task_round_trips_through_the_command_line() -> None:
    given = Task(models="a", dtype="bf16", generate="per-prompt", step=TINY, threads=1)
    assert task(given.arguments()) == given


def test_the_leanest_step_counted_by_hand() -> None:
    # One projection of a token: 8; a feed-forward layer: 36. Prompt of 3: 3 (4 * 8 + 36) + 4 * 9 * 2.
    # Response of 2: 2 (6 * 8 + 36) = 168, pairs 3 * 4 * 2 = 24 and 6 * 4 * 2 = 48, head 2 * 20 = 40: 280 forward.
    # Backward: 168 - 2 * 3 * 8, 2 * 24, 1.5 * 48, 40: 280. Reward of 3 tokens: 3 * 2 (16 + 12) + 4 * 9 * 2 + 8.
    counted = flops(SMALL, T5, ROBERTA)
    assert counted == {"encode": 276, "sample": 48 + 280, "log-probs": 280, "score": 248, "update": 2 * 560}
    twice = flops(Step(batch=2, prompt=3, response=2, epochs=2), T5, ROBERTA)
    assert twice == {stage: 2 * flop for stage, flop in counted.items()}


def test_encoder_and_reward_are_counted_as_torch_counts_them(models: Path) -> None:
    t5, roberta = (json.loads((models / name / "config.json").read_text()) for name in ("policy", "reward"))
    ids, scored = torch.ones(TINY.batch, TINY.prompt).long(), torch.full((TINY.batch, TINY.response + 1), 5)
    policy = AutoModelForSeq2SeqLM.from_pretrained(models / "policy", attn_implementation="eager").eval()
    reward = AutoModelForSequenceClassification.from_pretrained(models / "reward", attn_implementation="eager").eval()
    counted = flops(TINY, t5, roberta)
    for stage, model, given in (("encode", policy.get_encoder(), ids), ("score", reward, scored)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=given)
        # The reward's last layer has only two labels; `flops` leaves it out.
        assert counter.get_total_flops() == pytest.approx(counted[stage], rel=1e-3)


@pytest.mark.usefixtures("threads")
def test_the_floor_is_lowest_at_the_best_rate(models: Path) -> None:
    row = stepper(Task(models=str(models), step=TINY, threads=1), seconds=0.01)(0, TINY)
    assert 0 < row["seconds"] <= row["plain_seconds"]
    assert sum(row["stages"].values()) == pytest.approx(row["seconds"])
    assert row["gflop"] / row["feed-forward GFLOP/s"] == pytest.approx(row["plain_seconds"])


def row(contestant: str, dtype: str, round_number: int, seconds: float, **others: Any) -> dict[str, Any]:
    stages = {stage: seconds / len(STAGES) for stage in STAGES}
    found = {"contestant": contestant, "dtype": dtype, "round": round_number, "seconds": seconds, "stages": stages}
    return (
        found | {"peak_gib": 1.0 + round_number, "processor_seconds": 2.0, "step": {"batch": 4, "response": 8}} | others
    )


def test_ratios_compare_steps_of_the_same_round(tmp_path: Path) -> None:
    rows = [row("detoxrl", "bf16", round_number, seconds) for round_number, seconds in enumerate((1.0, 2.0, 4.0))]
    rows += [
        row("trl per-prompt", "fp32", round_number, seconds) for round_number, seconds in enumerate((10.0, 30.0, 20.0))
    ]
    rates = {"plain_seconds": 1.0, "gflop": 2.0, "plain GFLOP/s": 2.0, "oneDNN GFLOP/s": 4.0}
    rows += [row("floor", "bf16", round_number, 0.5, **rates) for round_number in range(3)]
    found = summary(rows)
    detoxrl = found["contestants"][0]
    assert detoxrl["seconds"] == {"median": 2.0, "low": 1.0, "high": 4.0}
    assert (detoxrl["tokens_per_second"], detoxrl["peak_gib"]) == (16.0, 3.0)
    ratios = {f"{one['of']} / {one['to']}": (one["median"], one["low"], one["high"]) for one in found["ratios"]}
    assert ratios == {
        "trl per-prompt fp32 / detoxrl bf16": (10.0, 5.0, 15.0),
        "detoxrl bf16 / floor bf16": (4.0, 2.0, 8.0),
        "detoxrl bf16 / floor bf16 (PyTorch's own linear, feed-forward)": (2.0, 1.0, 4.0),
    }
    about = found | {"machine": {"cores": 2}, "versions": {"detoxrl": {"torch": "2"}}}
    assert "| trl per-prompt fp32 / detoxrl bf16 | 10.00 | 5.00 to 15.00 |" in compare_table(about)
    assert "| floor | bf16 | 0.50 (0.50 to 0.50) | 0.10 | 0.10 | 0.10 | 0.10 | 0.10 |  | 64 |  |" in compare_table(
        about
    )
    _draws_the_same_twice(draw_compare, about, tmp_path)


def test_the_checks_of_the_cost_report_growth_faster_than_linear(tmp_path: Path) -> None:
    usual = {"batch": 4, "minibatch": 2, "prompt": 16, "response": 8, "epochs": 1, "prompts": 64}
    took = [({}, 1.0), ({"batch": 8}, 2.1), ({"batch": 16}, 5.0), ({"epochs": 2}, 1.5), ({"prompts": 128}, 1.1)]
    rows = [row("", "fp32", 0, seconds, size="tiny", parameters=4e6, encoded=1.0, step=usual | changes)
            for changes, seconds in took]  # fmt: skip
    rows.append(row("", "fp32", 0, 3.0, size="small", parameters=77e6, encoded=1.0, step=usual))
    assert {axis: list(curve) for axis, curve in curves(rows).items()} == {
        "batch": [4, 8, 16], "size": [4, 77], "epochs": [1, 2], "prompts": [64, 128]
    }  # fmt: skip
    assert check_lines(rows) == [
        "- prompts per step 4 to 8: 2.10 times the time, no faster than linear",
        "- prompts per step 8 to 16: 2.38 times the time, FASTER than linear",
        "- a second epoch: 0.50 s more, 0.10 of them in the update, 0.10 in the encoder; a prompt is encoded 1 time(s)",
        "- prompts in the data set: the slowest is 1.10 times the fastest",
    ]
    assert "| million parameters | 77 | 3.00 (3.00 to 3.00) |" in cost_table(rows)
    _draws_the_same_twice(draw_cost, rows, tmp_path)


def _draws_the_same_twice(draw: Any, found: Any, folder: Path) -> None:
    pictures = []
    for name in ("one", "other"):
        draw(found, folder / f"{name}.svg")
        pictures.append((folder / f"{name}.svg").read_text())
    assert pictures[0] == pictures[1]
    assert "</svg>" in pictures[0]


def test_each_point_changes_one_size_and_the_default_step_comes_once() -> None:
    found = points(["batch", "size", "epochs"], "base")
    assert found == [
        ("base", {}), ("base", {"batch": 4}), ("base", {"batch": 8}), ("base", {"batch": 32}), ("small", {}),
        ("base", {"epochs": 2}), ("base", {"epochs": 3}),
    ]  # fmt: skip
