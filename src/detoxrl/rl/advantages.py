"""How good was each token?

Responses to one prompt form a group: k consecutive rows of a batch of B.
"""

import torch
from torch import Tensor

from detoxrl.rl.kl import k1
from detoxrl.rl.ops import masked_mean, whiten

# Added to a standard deviation. Scores are normalised, so this is small beside any real difference between them.
_EPSILON = 1e-4


def token_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, kl_coef: float
) -> Tensor:
    """Return rewards (B, T): -kl_coef * k1 on every token, plus the score (B,) on the last one; 0 after it.

    Stiennon et al. 2020, section 3.4: R = r - beta * log(policy / reference), spread over the tokens.
    """
    rewards = torch.where(response_mask, -kl_coef * k1(logprobs, ref_logprobs), 0.0)
    last = response_mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores[:, None])


def tail_scores(scores: Tensor, share: float) -> Tensor:
    """Return scores (B,) whose mean is the mean of the lowest `share` of the scores, in (0, 1].

    Rockafellar and Uryasev 2000, "Optimization of conditional value-at-risk": CVaR = v + E[min(score - v, 0)] / share,
    where v is the quantile at `share`. Scores above v all count as v, so the policy gains nothing by raising them.
    Tamar et al. 2015, "Optimizing the CVaR via sampling": the gradient of CVaR is the policy gradient of these scores.
    """
    if share == 1:
        return scores  # To the last bit, which the formula below would round.

    lowest = max(1, round(share * len(scores)))
    quantile = scores.sort().values[lowest - 1]
    return quantile + (scores - quantile).clamp_max(0.0) * (len(scores) / lowest)


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


def leave_one_out(rewards: Tensor, group_size: int) -> Tensor:
    """Return advantages (B,) of responses with rewards (B,): each minus the mean of the others in its group.

    Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!"; Ahmadian et al. 2024, "Back to Basics:
    Revisiting REINFORCE Style Optimization". A response's own reward has no part in its baseline, so the gradient is
    unbiased.
    """
    groups = rewards.view(-1, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten()


def group_relative(rewards: Tensor, group_size: int, std_scaling: bool) -> Tensor:
    """Return advantages (B,) of responses with rewards (B,): each minus the mean of its group, over its std (ddof 1).

    Shao et al. 2024, "DeepSeekMath", section 4.1.2. Without `std_scaling`: Liu et al. 2025, "Understanding
    R1-Zero-Like Training" (Dr. GRPO), section 3.2. A response's own reward is part of the mean, which takes 1 / k of
    the gradient: a KL that is a loss of its own weighs k / (k - 1) as much beside it.
    """
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if std_scaling:
        centred = centred / (groups.std(1, keepdim=True) + _EPSILON)
    return centred.flatten()


def batch_relative(values: Tensor, mask: Tensor, std_scaling: bool) -> Tensor:
    """Return values (B, T) minus their mean over the mask, and over their std (ddof 0) if asked for; 0 outside it.

    Hu 2025, "REINFORCE++": advantages are normalised over all tokens of the batch.
    """
    if std_scaling:
        return whiten(values, mask)
    return torch.where(mask, values - masked_mean(values, mask), 0.0)


def rewards_to_go(rewards: Tensor, response_mask: Tensor, gamma: float) -> Tensor:
    """Return for each token the discounted sum of the rewards (B, T) from it on; 0 outside `response_mask`.

    Sutton and Barto 2018, "Reinforcement Learning", equation 3.8.
    """
    # Generalised advantages with lambda 1 are what follows less what the critic expects, here nothing.
    to_go, _ = gae(rewards, torch.zeros_like(rewards), response_mask, gamma, lam=1.0)
    return to_go


def zero_variance_share(scores: Tensor, group_size: int) -> Tensor:
    """Return the share of groups whose responses all have the same score, a scalar: they teach nothing."""
    groups = scores.view(-1, group_size)
    return (groups.std(1) < _EPSILON).float().mean()
