"""Every algorithm learns in the shipped loop, is resumed bit-identically, and does what its settings say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import Make, policy_config, small_config
from detoxrl.config.schema import Config
from detoxrl.models.lora import load_policy
from learning import learn, loop_config, share_of_e

VARIANTS: dict[str, dict[str, Any]] = {
    "ppo, groups of 4": {"group_size": 4},
    "rloo": {"algorithm": "rloo"},
    "grpo": {"algorithm": "grpo"},
    "grpo, k2": {"algorithm": "grpo", "kl_estimator": "k2", "std_scaling": False},
    "reinforce": {"algorithm": "reinforce"},
}


def learning_config(**rl: object) -> Config:
    """Enough steps for a tiny policy to learn."""
    small = small_config()
    settings: dict[str, Any] = {"steps": 30, "batch_size": 32, "minibatch_size": 16, "microbatch_size": None}
    settings |= {"epochs": 2, "lr": 2e-2, "kl_coef": 0.0, "validate_every": 100, "update_kl_limit": None}
    return replace(small, rl=replace(small.rl, **{**settings, **rl}))


def trained(bases: dict[str, Path], name: str, folder: Path, config: Config) -> list[dict[str, float]]:
    """Train a tiny policy towards the letter e, and return what was logged."""
    return learn(load_policy(str(bases[name]), None, policy_config(name), seed=0), folder, config)


@pytest.mark.parametrize(
    ("name", "variant"), [*(("t5", variant) for variant in VARIANTS), ("gpt2", "ppo, groups of 4"), ("gpt2", "rloo")]
)
def test_each_algorithm_learns_a_toy_reward(variant: str, name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    records = trained(bases, name, tmp_path, learning_config(**VARIANTS[variant]))
    scores = [record["score/mean"] for record in records]
    print(f"{variant} on {name}: {np.mean(scores[:2]):.3f} to {np.mean(scores[-3:]):.3f}")
    # Without learning the mean over three batches stays below 1.25 times that of the first two.
    assert np.mean(scores[-3:]) > {"t5": 2.5, "gpt2": 1.35}[name] * np.mean(scores[:2])
    assert records[-1]["kl/reference"] > 0.1
    assert ("value/loss" in records[0]) == variant.startswith("ppo")
    assert ("groups/zero_variance" in records[0]) == (variant != "reinforce")
    assert ("kl/loss" in records[0]) == variant.startswith("grpo")


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_kl_in_the_loss_holds_the_policy(estimator: str, bases: dict[str, Path], tmp_path: Path) -> None:
    moved = []
    for kl_coef in (0.0, 5.0):
        config = learning_config(algorithm="grpo", kl_estimator=estimator, kl_coef=kl_coef)
        records = trained(bases, "t5", tmp_path / str(kl_coef), config)
        moved.append(records[-1]["kl/reference"])
    assert moved[1] < 0.3 * moved[0]


def test_an_entropy_bonus_keeps_responses_varied(bases: dict[str, Path], tmp_path: Path) -> None:
    entropies = []
    for entropy_coef in (0.0, 0.5):
        config = learning_config(algorithm="rloo", entropy_coef=entropy_coef)
        entropies.append(trained(bases, "t5", tmp_path / str(entropy_coef), config)[-1]["entropy"])
    assert entropies[1] > entropies[0] + 0.3


def test_a_tail_share_raises_the_lowest_scores_first(bases: dict[str, Path], tmp_path: Path) -> None:
    records = trained(bases, "t5", tmp_path, learning_config(tail_share=0.25))
    assert all(record["score/tail"] < record["score/shaped"] for record in records)
    assert np.mean([record["score/tail"] for record in records[-3:]]) > records[0]["score/tail"] + 0.3


RESUMED: dict[str, dict[str, Any]] = {
    "grpo, varied prompts, tail, entropy": {
        "algorithm": "grpo",
        "group_size": 2,
        "prompt_sampling": "varied",
        "tail_share": 0.5,
        "entropy_coef": 0.01,
        "clip_high": 0.3,
    },
    "rloo": {"algorithm": "rloo", "group_size": 2, "std_scaling": True},
    "reinforce": {"algorithm": "reinforce", "kl_in": "loss", "kl_estimator": "k2"},
    "ppo, groups": {"group_size": 2},
}


@pytest.mark.parametrize("variant", RESUMED)
@pytest.mark.parametrize(("name", "kind"), [("t5", "loaded"), ("gpt2", "fresh")])
def test_a_resumed_run_is_identical_to_an_uninterrupted_one(
    variant: str, name: str, kind: str, make_policy: Make, tmp_path: Path
) -> None:
    calls = 0

    def failing(prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:  # the first call fits the normaliser, each step makes one more
            raise ConnectionError
        return share_of_e(prompts, responses)

    settings = {"steps": 4, "kl_target": 1.0, "batch_size": 8, "minibatch_size": 4, "microbatch_size": None}
    config = loop_config(**{**settings, **RESUMED[variant]})
    whole, interrupted, resumed = (make_policy(name, kind) for _ in range(3))
    expected = learn(whole, tmp_path / "whole", config)
    with pytest.raises(ConnectionError):
        learn(interrupted, tmp_path / "parts", config, failing)
    records = learn(resumed, tmp_path / "parts", config)

    assert [without_times(record) for record in records] == [without_times(record) for record in expected]
    pairs = zip(whole.parameters(), resumed.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def without_times(record: dict[str, float]) -> dict[str, float]:
    """What was logged of a step, without its seconds."""
    return {name: value for name, value in record.items() if "second" not in name}
