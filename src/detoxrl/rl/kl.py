"""How far is the policy from its reference, and how is the KL coefficient adapted?

Estimators from samples x ~ p of KL(p, q), per token, in nats (Schulman 2020, "Approximating KL Divergence").
"""

from collections.abc import Callable

import torch


def k1(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Return log p - log q (B, T): unbiased, of either sign. As a loss its gradient is 0 in expectation."""
    return logprobs - ref_logprobs


def k2(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Return (log p - log q)^2 / 2 (B, T): biased, never negative. As a loss it has the gradient of KL(p, q).

    That is the KL of each token after the ones before it. What an earlier token changes in the KL of later ones has a
    gradient only in the reward.
    """
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Return q/p - 1 - log(q/p) (B, T): unbiased, never negative. As a loss it has the gradient of KL(q, p)."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


LOSS_ESTIMATORS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"k2": k2, "k3": k3}
"""The estimators whose gradient holds a policy to its reference (Tang and Munos 2025, "On a few pitfalls in KL
divergence gradient estimation for RL", section 3)."""


def adapt_kl_coef(kl_coef: float, kl: float, target: float, horizon: int, batch_size: int) -> float:
    """Return the next coefficient, moved towards keeping `kl` (nats per response) at `target`.

    Ziegler et al. 2019, section 2.2: a proportional controller whose error is clipped to +-0.2.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * batch_size / horizon)
