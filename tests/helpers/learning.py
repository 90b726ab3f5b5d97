"""A Run and a Learner around parts that a test gives, small configs for them, and toy rewards and judges."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from conftest import prompted_rows, small_config
from detoxrl.config.schema import Config
from detoxrl.data.rows import Row
from detoxrl.evaluation.judges import Judge
from detoxrl.evaluation.readers import Readers
from detoxrl.models.policy import Policy
from detoxrl.models.sampling import Draws
from detoxrl.models.types import Prompt, Rollout
from detoxrl.rewards.terms import Reward, ScoredTerm
from detoxrl.rl.algorithm import Targets
from detoxrl.runs import Run, Scorer
from detoxrl.runtime.run_folder import RunFolder
from detoxrl.training.learner import Learner
from detoxrl.training.memory import MemoryPlan
from detoxrl.training.rollout import collect_rollout
from detoxrl.training.train import train

PROMPTS = [
    Prompt(id="a", text="#Person1#: You lost my novel on the train. You clown!"),
    Prompt(id="b", text="#Person1#: Yes? #Person2#: the soup was ice cold. #Person1#: Sorry."),
    Prompt(id="c", text="Short."),
    Prompt(id="d", text="#Person1#: I waited two weeks too long for the lamp. #Person2#: The van broke down. " * 2),
]
TEXTS = [prompt.text for prompt in PROMPTS]
LENGTH = 16
ROWS = prompted_rows({"train": 32, "validation": 4})


def share_of_e(prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
    """A reward that any policy can learn: how much of the response is the letter e."""
    return torch.tensor([response.count("e") / max(len(response), 1) for response in responses])


def share_of_a(texts: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """A judge that has no part in the reward: how much of the response is the letter a."""
    return np.array([text.count("a") / max(len(text), 1) for text in texts])


def loop_config(**rl: object) -> Config:
    """A config of three training steps, with some settings of `rl` changed."""
    small = small_config()
    settings: dict[str, Any] = {"steps": 3, "validate_every": 9, "lr": 1e-3, **rl}
    return replace(small, rl=replace(small.rl, **settings))


def run_of(
    policy: Policy,
    folder: Path,
    config: Config,
    reward: Any = share_of_e,
    judge: Judge = share_of_a,
    rows: Mapping[str, Sequence[Row]] = ROWS,
) -> Run:
    """A run whose parts are given, not loaded."""
    run = Run(RunFolder(folder), config)
    if not isinstance(reward, Reward):
        reward = Reward((ScoredTerm(config.reward.measured_terms[0], reward),))
    run._scorer = Scorer(reward=reward, judge=None)
    run._judges = {"judge": judge}
    run._readers = Readers()
    run._rows = {split: list(rows_of_split) for split, rows_of_split in rows.items()}
    run.initial_policy = lambda: policy  # type: ignore[method-assign]
    run.require_warm_start = lambda: None  # type: ignore[method-assign]
    return run


def learn(
    policy: Policy, folder: Path, config: Config, reward: Any = share_of_e, judge: Judge = share_of_a
) -> list[dict[str, float]]:
    """Train a policy and return what metrics.jsonl holds."""
    train(run_of(policy, folder, config, reward, judge))
    return metrics_of(folder)


def metrics_of(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    with (folder / "metrics.jsonl").open() as lines:
        return [json.loads(line) for line in lines]


def learner_of(policy: Policy, folder: Path, config: Config, rollout: Rollout, microbatch_size: int = 0) -> Learner:
    """A learner that is about to update on a rollout, with microbatches as large as a minibatch unless told."""
    learner = Learner(run_of(policy, folder, config))
    learner.rollout = rollout
    size = microbatch_size or config.rl.microbatch_size or config.rl.minibatch_size
    learner.memory = MemoryPlan(microbatch_size=size, keep_cross=True)
    return learner


def use_sgd(learner: Learner) -> None:
    """Replace the optimizer by plain gradient descent, whose steps are the gradients times the learning rates."""
    policy_group = {"params": learner.policy.parameters(), "lr": 0.0}
    value_group = {"params": list(learner.policy.add_value_head().parameters()), "lr": 0.0}
    learner.optimizer = torch.optim.SGD([policy_group, value_group])  # type: ignore[assignment]


def rollout_of(policy: Policy, step: int = 0, temperature: float = 1.0, batch_size: int = 8) -> Rollout:
    """A rollout of the four prompts, with the values of a critic."""
    policy.add_value_head()
    config = replace(small_config().generation, max_new_tokens=LENGTH, temperature=temperature, batch_size=batch_size)
    return collect_rollout(policy, PROMPTS, config, Draws(0, "rollout", step))


def targets_of(rollout: Rollout) -> Targets:
    """Random advantages and returns for a rollout."""
    mask = rollout.responses.response_mask
    generator = torch.Generator().manual_seed(5)
    return Targets(
        advantages=torch.where(mask, torch.randn(mask.shape, generator=generator), 0.0),
        returns=torch.where(mask, torch.randn(mask.shape, generator=generator), 0.0),
    )


def run_update(policy: Policy, config: Config, rollout: Rollout) -> dict[str, float]:
    """Update a policy on a rollout towards random targets; return the metrics."""
    return learner_of(policy, Path("unused"), config, rollout).update(targets_of(rollout), step=0)
