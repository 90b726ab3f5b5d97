"""Which targets and losses make up an algorithm?"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from detoxrl.config.schema import RlConfig
from detoxrl.rl.advantages import gae
from detoxrl.rl.losses import policy_loss, value_loss
from detoxrl.rl.ops import whiten


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What an update pulls towards, each (B, T), 0 outside the response mask."""

    advantages: Tensor
    returns: Tensor

    def to(self, device: torch.device) -> Self:
        """Return the targets on a device."""
        return replace(self, advantages=self.advantages.to(device), returns=self.returns.to(device))


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """The parts in which policy-gradient algorithms differ. The training loop never asks which one it runs."""

    targets: Callable[[Tensor, Tensor, Tensor, RlConfig], Targets]
    """(rewards, values, response mask, settings) -> targets; the tensors are (B, T)."""

    policy_loss: Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    """(new log-probs, log-probs, advantages, mask, clip range) -> summed loss, where clipping applied (B, T)."""

    value_loss: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
    """(new values, values, returns, mask, clip range) -> summed loss."""


def ppo_targets(rewards: Tensor, values: Tensor, response_mask: Tensor, rl: RlConfig) -> Targets:
    """Return advantages by generalised advantage estimation, whitened over the batch, and returns, each (B, T)."""
    advantages, returns = gae(rewards, values, response_mask, rl.gamma, rl.lam)
    return Targets(advantages=whiten(advantages, response_mask), returns=returns)


PPO = Algorithm(targets=ppo_targets, policy_loss=policy_loss, value_loss=value_loss)
