"""How good was each token?"""

import torch
from torch import Tensor

from detoxrl.rl.kl import k1


def token_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, kl_coef: float
) -> Tensor:
    """Return rewards (B, T): -kl_coef * k1 on every token, plus the score (B,) on the last one; 0 after it.

    Stiennon et al. 2020, section 3.4: R = r - beta * log(policy / reference), spread over the tokens.
    """
    rewards = torch.where(response_mask, -kl_coef * k1(logprobs, ref_logprobs), 0.0)
    last = response_mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores[:, None])


def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Return advantages and returns (B, T), 0 outside `response_mask`; the value after the last token is 0.

    Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation", equation 16:
    A_t = sum_l (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t. Returns are advantages + values.
    """
    values = torch.where(response_mask, values, 0.0)
    advantages = torch.zeros_like(values)
    later = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(later)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        later = torch.where(response_mask[:, t], delta + gamma * lam * later, 0.0)
        next_value = values[:, t]
        advantages[:, t] = later
    return advantages, advantages + values
