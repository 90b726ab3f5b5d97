"""Which targets and losses make up an algorithm?"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from detoxrl.config.schema import RlConfig
from detoxrl.rl.advantages import batch_relative, gae, group_relative, leave_one_out, rewards_to_go
from detoxrl.rl.losses import policy_loss, value_loss
from detoxrl.rl.ops import whiten


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What an update pulls towards. Tensors are (B, T), 0 outside the response mask."""

    advantages: Tensor
    returns: Tensor | None = None  # What a critic should predict; None without one.
    kl_coef: float = 0.0  # Weight of the KL to the reference as a loss; 0 where it is part of the reward.

    def to(self, device: torch.device) -> Self:
        """Return the targets on a device."""
        returns = None if self.returns is None else self.returns.to(device)
        return replace(self, advantages=self.advantages.to(device), returns=returns)


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """The parts in which policy-gradient algorithms differ. The training loop never asks which one it runs."""

    targets: Callable[[Tensor, Tensor | None, Tensor, RlConfig], Targets]
    """(rewards, values, response mask, settings) -> targets; the tensors are (B, T), values are a critic's."""

    policy_loss: Callable[[Tensor, Tensor, Tensor, Tensor, tuple[float, float]], tuple[Tensor, Tensor]] = policy_loss
    """(new log-probs, log-probs, advantages, mask, clip range) -> summed loss, where clipping applied (B, T)."""

    value_loss: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor] | None = None
    """(new values, values, returns, mask, clip range) -> summed loss; None without a critic."""


def ppo_targets(rewards: Tensor, values: Tensor | None, response_mask: Tensor, rl: RlConfig) -> Targets:
    """Return advantages by generalised advantage estimation and returns, each (B, T).

    With std scaling, advantages are whitened over the batch.
    """
    assert values is not None, "PPO has a critic"
    advantages, returns = gae(rewards, values, response_mask, rl.gamma, rl.lam)
    if rl.scales_by_std:
        advantages = whiten(advantages, response_mask)
    return Targets(advantages=advantages, returns=returns)


def rloo_targets(rewards: Tensor, values: Tensor | None, response_mask: Tensor, rl: RlConfig) -> Targets:
    """Return advantages (B, T), the same for each token of a response: its reward against those of its group's others.

    With std scaling, they are normalised over the responses of the batch.
    """
    advantages = leave_one_out(rewards.sum(1), rl.responses_per_prompt)
    if rl.scales_by_std:
        advantages = whiten(advantages, torch.ones_like(advantages, dtype=torch.bool))
    return Targets(advantages=_on_each_token(advantages, response_mask))


def grpo_targets(rewards: Tensor, values: Tensor | None, response_mask: Tensor, rl: RlConfig) -> Targets:
    """Return advantages (B, T), the same for each token of a response: its reward against its group's mean and std."""
    advantages = group_relative(rewards.sum(1), rl.responses_per_prompt, rl.scales_by_std)
    return Targets(advantages=_on_each_token(advantages, response_mask))


def reinforce_targets(rewards: Tensor, values: Tensor | None, response_mask: Tensor, rl: RlConfig) -> Targets:
    """Return advantages (B, T): the rewards from each token on, against the mean and std over the batch's tokens."""
    to_go = rewards_to_go(rewards, response_mask, rl.gamma)
    return Targets(advantages=batch_relative(to_go, response_mask, rl.scales_by_std))


def _on_each_token(advantages: Tensor, response_mask: Tensor) -> Tensor:
    """Return advantages (B,) of responses as those of their tokens (B, T)."""
    return torch.where(response_mask, advantages[:, None], 0.0)


ALGORITHMS: dict[str, Algorithm] = {
    "ppo": Algorithm(targets=ppo_targets, value_loss=value_loss),
    "rloo": Algorithm(targets=rloo_targets),
    "grpo": Algorithm(targets=grpo_targets),
    "reinforce": Algorithm(targets=reinforce_targets),
}
"""By `rl.algorithm`: Schulman et al. 2017; Ahmadian et al. 2024; Shao et al. 2024; Hu 2025."""
