"""Does the benchmark of groups make real steps of each algorithm, and summarize its rows correctly?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from detoxrl.training.learner import Learner
from group_case import TINY, GroupTask, group_task
from group_floor import flops
from group_speed import CONTESTANTS, RATIOS, table
from group_worker import SHAPES, make_learner, make_model
from step_case import Step
from step_speed import Worker
from step_worker import make_step


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_model(folder, "tiny")
    return str(folder)


def test_a_worker_makes_a_step_on_request(model: str, tmp_path: Path) -> None:
    given = GroupTask(models=model, step=TINY, threads=1, algorithm="grpo", group_size=8, microbatch=8)
    with Worker("group_worker.py", given, Path(sys.executable), tmp_path / "log") as worker:
        row = worker.step()
    assert list(row["stages"]) == ["rollout", "update"]
    assert sum(row["stages"].values()) == pytest.approx(row["seconds"], rel=0.2)
    assert min(row["processor_seconds"], row["peak_gib"]) > 0
    assert "torch" in worker.warm_up["versions"]


@pytest.mark.parametrize(("algorithm", "group_size"), [("ppo", 1), ("grpo", 4), ("grpo", 8)])
def test_a_step_reads_each_prompt_once_a_group_and_holds_the_policy_back(
    model: str, algorithm: str, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = GroupTask(models=model, step=TINY, algorithm=algorithm, group_size=group_size)
    updates: list[tuple[float, dict[str, float]]] = []
    update = Learner.update

    def noted(self: Learner, targets: Any, step: int) -> dict[str, float]:
        metrics = update(self, targets, step)
        updates.append((targets.kl_coef, metrics))
        return metrics

    monkeypatch.setattr(Learner, "update", noted)
    _, rollout = make_step(make_learner(given), 0)
    assert len(rollout.prompts) == len(rollout.encoded.mask) == TINY.batch // group_size
    ((kl_coef, metrics),) = updates
    assert kl_coef == (0.0 if algorithm == "ppo" else 0.05)
    assert ("kl/loss" in metrics) == (algorithm == "grpo")
    assert metrics["epochs"] == 1


def test_the_floor_counts_each_product_of_the_leanest_step() -> None:
    llama = {
        "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 3, "vocab_size": 5,
    }  # fmt: skip
    step = Step(batch=2, minibatch=2, prompt=2, response=3)
    # Eight tokens, of which six are written. Each: 64 for queries, keys and values, 32 for the output, 72 feed-forward.
    linear = 8 * (64 + 32 + 72)
    # Pairs: 3 in the prompt, 12 from responses to it, 12 in responses. Two products of 4 numbers, a multiply-add is 2.
    attention = 27 * 2 * 2 * 4
    head = 6 * 2 * 4 * 5
    forward = linear + attention + head
    backward = linear - 8 * 64 + 2 * attention + head
    assert flops(step, 2, llama) == {"rollout": 2 * forward, "update": forward + backward}


def test_the_floor_is_what_its_rates_give(model: str, tmp_path: Path) -> None:
    given = GroupTask(models=model, step=TINY, threads=1, group_size=4)
    with Worker("group_floor.py", given, Path(sys.executable), tmp_path / "log") as worker:
        row = worker.step()
    best = max(rate for name, rate in row.items() if name.endswith("GFLOP/s"))
    assert row["seconds"] == pytest.approx(row["gflop"] / best)
    assert sum(row["stages"].values()) == pytest.approx(row["seconds"])


def test_the_model_has_the_parameters_of_smollm2_135m() -> None:
    config = LlamaConfig(tie_word_embeddings=True, **SHAPES["smollm2-135m"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == 134_515_008


def test_a_task_round_trips_through_the_command_line() -> None:
    given = GroupTask(models="a", step=TINY, threads=1, algorithm="ppo", group_size=1, microbatch=2)
    assert group_task(given.arguments()) == given


def test_ratios_compare_steps_of_the_same_round() -> None:
    def row(contestant: str, seconds: float, processor: float) -> dict[str, Any]:
        stages = {"rollout": seconds / 4, "update": seconds * 3 / 4}
        return {
            "contestant": contestant, "seconds": seconds, "processor_seconds": processor, "stages": stages,
            "peak_gib": seconds, "step": {"batch": 16, "response": 48},
        }  # fmt: skip

    rows = [row("detoxrl grpo 4 x 4", seconds, 2.0) for seconds in (1.0, 2.0, 4.0)]
    rows += [row("trl grpo 4 x 4", seconds, 3.0) for seconds in (10.0, 30.0, 20.0)]
    rows += [row("floor 4 x 4", seconds, 9.0) for seconds in (0.5, 1.0, 1.0)]
    about = {"machine": {"cores": 2}, "versions": {"trl": {"torch": "2"}}}
    written = table(rows, about)
    assert "| detoxrl grpo 4 x 4 | 2.00 (1.00 to 4.00) | 2.00 | 0.50 | 1.50 | 384 | 4.00 |" in written
    assert "| trl grpo 4 x 4 / detoxrl grpo 4 x 4 | 10.00 | 5.00 to 15.00 | 1.50 | 1.50 to 1.50 |" in written
    assert "| floor 4 x 4 | 1.00 (0.50 to 1.00) |  | 0.25 | 0.75 | 768 |  |" in written
    assert "| detoxrl grpo 4 x 4 / floor 4 x 4 | 2.00 | 2.00 to 4.00 |" in written
    assert "cores 2; 3 rounds." in written
    assert {name for pair in RATIOS for name in pair} == set(CONTESTANTS)
