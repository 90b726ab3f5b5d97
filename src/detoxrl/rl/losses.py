"""What does an update minimise?

Losses come as sums over tokens, that of DPO over pairs: the caller divides by the number in the whole minibatch, so
that the size of a microbatch never changes the update.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from detoxrl.rl.kl import LOSS_ESTIMATORS


def policy_loss(
    new_logprobs: Tensor, logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Return the clipped surrogate summed over tokens, a scalar, and where clipping bit (B, T) bool.

    The ratio is clipped to [1 - clip[0], 1 + clip[1]]. Schulman et al. 2017, "Proximal Policy Optimization Algorithms",
    equation 7, with its sign turned to a loss. A larger range upwards: Yu et al. 2025, "DAPO", section 3.1.
    """
    low, high = clip
    ratio = torch.where(mask, new_logprobs - logprobs, 0.0).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - low, 1 + high)
    return torch.where(mask, torch.maximum(plain, clipped), 0.0).sum(), clipped > plain


def kl_loss(new_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: str) -> Tensor:
    """Return the KL to the reference by `estimator` (k2 or k3), summed over tokens, a scalar.

    Shao et al. 2024, "DeepSeekMath", equation 4, has k3.
    """
    # Where nothing is counted both are set to 0, so that no padding overflows.
    logprobs = torch.where(mask, new_logprobs, 0.0)
    return LOSS_ESTIMATORS[estimator](logprobs, torch.where(mask, ref_logprobs, 0.0)).sum()


def value_loss(new_values: Tensor, values: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Return half the clipped squared error of the values summed over tokens, a scalar.

    The worse of the clipped and the plain error: Huang et al. 2022, "The 37 Implementation Details of PPO", detail 9.
    """
    clipped = values + (new_values - values).clamp(-clip, clip)
    worse = torch.maximum((new_values - returns).square(), (clipped - returns).square())
    return 0.5 * torch.where(mask, worse, 0.0).sum()


def dpo_loss(best: Tensor, worst: Tensor, beta: float) -> Tensor:
    """Return -log sigmoid(beta * (best - worst)) summed over pairs of responses, a scalar.

    `best` and `worst` (P,) are log(policy / reference) of whole responses, in nats: sums over their tokens. Rafailov et
    al. 2023, "Direct Preference Optimization", equation 7.
    """
    return -logsigmoid(beta * (best - worst)).sum()


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Return 1 - Var(returns - values) / Var(returns) over tokens, a scalar: 1 is a perfect critic, 0 a constant."""
    kept = returns[mask]
    return 1 - (kept - values[mask]).var(correction=0) / kept.var(correction=0).clamp_min(1e-12)
