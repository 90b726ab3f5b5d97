"""The loops learn, stop on NaN, and keep what they should."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import policy_config, small_config
from detoxrl.cache import cached
from detoxrl.config import Config, RewardConfig
from detoxrl.data.corpus import generate_rows
from detoxrl.errors import TrainingError
from detoxrl.policy.adapters import load_policy
from detoxrl.policy.backbone import scratch_base
from detoxrl.sft import fine_tune
from detoxrl.tracking import RunFolder
from detoxrl.train import reference_normaliser, train

ROWS = generate_rows(0, {"train": 64, "validation": 8})


def share_of_e(prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
    """A toy reward that any policy can learn: how much of the response is the letter e."""
    return torch.tensor([response.count("e") / max(len(response), 1) for response in responses])


def no_judge(texts: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.linspace(0.4, 0.6, len(texts))


def learn(folder: Path, base: Path, config: Config, reward: object = share_of_e) -> list[dict[str, float]]:
    policy = load_policy(str(base), None, policy_config("t5"), config.seed)
    train(RunFolder(folder), config, policy, reward, no_judge, ROWS["train"], ROWS["validation"])  # type: ignore[arg-type]
    with (folder / "metrics.jsonl").open() as lines:
        return [json.loads(line) for line in lines][:-1]


def learning_config() -> Config:
    small = small_config()
    rl = replace(
        small.rl, steps=40, batch_size=32, minibatch_size=16, microbatch_size=16, kl_coef=0.0, lr=2e-2,
        validate_every=100, update_kl_limit=None,
    )  # fmt: skip
    return replace(small, rl=rl)


def test_the_policy_learns_a_toy_reward(bases: dict[str, Path], tmp_path: Path) -> None:
    records = learn(tmp_path, bases["t5"], learning_config())
    scores = [record["score/mean"] for record in records]
    noise = records[0]["score/std"] / 32**0.5
    assert np.mean(scores[-3:]) > np.mean(scores[:2]) + 6 * noise
    assert records[-1]["kl/reference"] > 0.1


def test_without_a_reason_to_move_the_kl_penalty_holds_the_policy(bases: dict[str, Path], tmp_path: Path) -> None:
    free = learning_config()
    held = replace(free, rl=replace(free.rl, kl_coef=5.0))
    moved = [record["kl/reference"] for record in learn(tmp_path / "a", bases["t5"], free)]
    kept = [record["kl/reference"] for record in learn(tmp_path / "b", bases["t5"], held)]
    assert abs(kept[-1]) < 0.3 * moved[-1]


def test_an_adaptive_coefficient_is_logged_and_moves(bases: dict[str, Path], tmp_path: Path) -> None:
    config = replace(
        learning_config(), rl=replace(learning_config().rl, steps=3, kl_coef=0.1, kl_target=1e-3, kl_horizon=64)
    )
    coefficients = [record["kl_coef"] for record in learn(tmp_path, bases["t5"], config)]
    assert coefficients[0] == 0.1
    assert coefficients[1] == pytest.approx(0.1 * 0.9)
    assert coefficients[2] > coefficients[1]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(bases: dict[str, Path], tmp_path: Path) -> None:
    config = small_config()
    runs = [
        [
            {name: value for name, value in record.items() if "second" not in name}
            for record in learn(tmp_path / name, bases["t5"], replace(config, seed=seed))
        ]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_a_nan_stops_the_run_with_its_step_and_name(bases: dict[str, Path], tmp_path: Path) -> None:
    def broken(prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
        return share_of_e(prompts, responses) * float("nan")

    config = replace(small_config(), reward=RewardConfig(normalise_on=0))
    with pytest.raises(TrainingError, match="stopped at step 0: score/mean is nan"):
        learn(tmp_path, bases["t5"], config, broken)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_scores_are_normalised_on_the_reference(bases: dict[str, Path]) -> None:
    from detoxrl.records import Prompt

    config = small_config()
    policy = load_policy(str(bases["t5"]), None, policy_config("t5"), 0)
    prompts = [Prompt(id=row.id, text=row.dialogue) for row in ROWS["train"]]
    seen: list[str] = []

    def remember(prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
        seen.extend(responses)
        return torch.arange(len(responses)).float()

    found = reference_normaliser(policy, remember, prompts, config)
    assert len(seen) == 16
    assert found.mean == 7.5
    off = replace(config, reward=RewardConfig(normalise_on=0))
    assert reference_normaliser(policy, remember, prompts, off).std == 1.0


def test_fine_tuning_lowers_the_loss_and_a_nan_stops_it() -> None:
    pairs = [(row.dialogue, row.summary) for row in ROWS["train"]]
    model, tokenizer = scratch_base([text for pair in pairs for text in pair], seed=0)
    config = replace(small_config().sft, batch_size=8, warmup_steps=2)
    losses: list[float] = []
    fine_tune(model, tokenizer, pairs, config, 30, 3e-3, 0, losses.append)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="sft stopped at step 0"):
        fine_tune(model, tokenizer, pairs, config, 1, 3e-3, 0, losses.append)


def test_what_was_trained_once_is_taken_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETOXRL_CACHE", str(tmp_path / "cache"))
    built: list[str] = []

    def build(folder: Path) -> None:
        built.append(folder.name)
        (folder / "weights").write_text(str(len(built)))

    assert not cached("base", ["a"], tmp_path / "one", build)
    assert cached("base", ["a"], tmp_path / "two", build)
    assert (tmp_path / "two" / "weights").read_text() == "1"
    assert not cached("base", ["b"], tmp_path / "one", build)
    assert (tmp_path / "one" / "weights").read_text() == "2"


def test_a_build_that_fails_leaves_nothing_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETOXRL_CACHE", str(tmp_path / "cache"))

    def fail(folder: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cached("base", ["a"], tmp_path / "one", fail)
    assert not cached("base", ["a"], tmp_path / "one", lambda folder: (folder / "weights").touch())
