"""Slow float64 versions of the mathematics in plain Python loops, written from the papers and not from our code."""

from __future__ import annotations

import math

Matrix = list[list[float]]


def whiten(values: Matrix, mask: list[list[bool]], epsilon: float = 1e-8) -> Matrix:
    kept = [v for row, m in zip(values, mask, strict=True) for v, keep in zip(row, m, strict=True) if keep]
    mean = math.fsum(kept) / len(kept)
    variance = math.fsum((v - mean) ** 2 for v in kept) / len(kept)
    scale = 1 / math.sqrt(variance + epsilon)
    return [
        [(v - mean) * scale if keep else 0.0 for v, keep in zip(row, m, strict=True)]
        for row, m in zip(values, mask, strict=True)
    ]


def gae(rewards: Matrix, values: Matrix, lengths: list[int], gamma: float, lam: float) -> tuple[Matrix, Matrix]:
    """Equation 16 of Schulman et al. 2016 as a double sum, without the backward recursion."""
    advantages, returns = [], []
    for r, v, n in zip(rewards, values, lengths, strict=True):
        deltas = [r[t] + gamma * (v[t + 1] if t + 1 < n else 0.0) - v[t] for t in range(n)]
        a = [math.fsum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, n)) for t in range(n)]
        advantages.append(a + [0.0] * (len(r) - n))
        returns.append([a[t] + v[t] for t in range(n)] + [0.0] * (len(r) - n))
    return advantages, returns


def token_rewards(scores: list[float], logprobs: Matrix, ref: Matrix, lengths: list[int], kl_coef: float) -> Matrix:
    rewards = []
    for score, p, q, n in zip(scores, logprobs, ref, lengths, strict=True):
        row = [-kl_coef * (p[t] - q[t]) for t in range(n)]
        row[n - 1] += score
        rewards.append(row + [0.0] * (len(p) - n))
    return rewards


def groups_of(rewards: list[float], group_size: int) -> list[list[float]]:
    return [rewards[start : start + group_size] for start in range(0, len(rewards), group_size)]


def leave_one_out(rewards: list[float], group_size: int) -> list[float]:
    """Kool et al. 2019 and Ahmadian et al. 2024: r_i - 1/(k-1) sum over j != i of r_j."""
    advantages = []
    for group in groups_of(rewards, group_size):
        for i, reward in enumerate(group):
            others = [other for j, other in enumerate(group) if j != i]
            advantages.append(reward - math.fsum(others) / len(others))
    return advantages


def group_relative(rewards: list[float], group_size: int, std_scaling: bool, epsilon: float = 1e-4) -> list[float]:
    """Shao et al. 2024, section 4.1.2: (r_i - mean(r)) / std(r); Liu et al. 2025, section 3.2: without the division.

    The papers leave open what becomes of equal rewards: `epsilon` is added to the standard deviation (ddof 1).
    """
    advantages = []
    for group in groups_of(rewards, group_size):
        mean = math.fsum(group) / len(group)
        deviation = math.sqrt(math.fsum((reward - mean) ** 2 for reward in group) / (len(group) - 1))
        for reward in group:
            advantages.append((reward - mean) / (deviation + epsilon) if std_scaling else reward - mean)
    return advantages


def rewards_to_go(rewards: Matrix, lengths: list[int], gamma: float) -> Matrix:
    """Sutton and Barto 2018, equation 3.8: G_t = sum over u >= t of gamma^(u - t) r_u."""
    to_go = []
    for r, n in zip(rewards, lengths, strict=True):
        row = [math.fsum(gamma ** (u - t) * r[u] for u in range(t, n)) for t in range(n)]
        to_go.append(row + [0.0] * (len(r) - n))
    return to_go


def batch_relative(values: Matrix, lengths: list[int], std_scaling: bool, epsilon: float = 1e-8) -> Matrix:
    """Hu 2025: (A - mean(A)) / std(A) over all tokens of the batch; `epsilon` is added to the variance."""
    mean, variance = mean_and_variance(values, lengths)
    scale = math.sqrt(variance + epsilon) if std_scaling else 1.0
    return [
        [(v - mean) / scale for v in row[:n]] + [0.0] * (len(row) - n) for row, n in zip(values, lengths, strict=True)
    ]


def zero_variance_share(scores: list[float], group_size: int) -> float:
    groups = groups_of(scores, group_size)
    return sum(max(group) == min(group) for group in groups) / len(groups)


def lowest_of(scores: list[float], share: float) -> list[float]:
    """The lowest `share` of the scores, at least one."""
    return sorted(scores)[: max(1, round(share * len(scores)))]


def tail_scores(scores: list[float], share: float) -> list[float]:
    """Tamar et al. 2015, the weights of CVaR's policy gradient: (score - quantile) 1{score <= quantile} / share.

    The quantile is added, a baseline.
    """
    lowest = lowest_of(scores, share)
    quantile = max(lowest)
    weights = []
    for score in scores:
        below = score - quantile if score <= quantile else 0.0
        weights.append(quantile + below * len(scores) / len(lowest))
    return weights


def cvar(scores: list[float], share: float) -> float:
    """Rockafellar and Uryasev 2000, equation 4, for a lower tail: max over v of v - E[max(v - score, 0)] / share.

    That is concave in v, and linear between scores, so the maximum is at one of them.
    """
    rounded = len(lowest_of(scores, share)) / len(scores)
    return max(v - math.fsum(max(v - score, 0.0) for score in scores) / len(scores) / rounded for v in scores)


def policy_loss(new: Matrix, old: Matrix, advantages: Matrix, lengths: list[int], clip: tuple[float, float]) -> float:
    """Equation 7 of Schulman et al. 2017, minus the sum of min(r A, clip(r) A), with r clipped to
    [1 - epsilon_low, 1 + epsilon_high] (Yu et al. 2025, section 3.1).
    """
    low, high = clip
    total = []
    for n, o, a, length in zip(new, old, advantages, lengths, strict=True):
        for t in range(length):
            ratio = math.exp(n[t] - o[t])
            clipped = min(max(ratio, 1 - low), 1 + high)
            total.append(-min(ratio * a[t], clipped * a[t]))
    return math.fsum(total)


def value_loss(new: Matrix, old: Matrix, returns: Matrix, lengths: list[int], clip: float) -> float:
    total = []
    for n, o, g, length in zip(new, old, returns, lengths, strict=True):
        for t in range(length):
            clipped = min(max(n[t], o[t] - clip), o[t] + clip)
            total.append(0.5 * max((n[t] - g[t]) ** 2, (clipped - g[t]) ** 2))
    return math.fsum(total)


def k1(p: float, q: float) -> float:
    """Schulman 2020: log(p/q), whose mean over p is KL(p, q)."""
    return math.log(math.exp(p) / math.exp(q))


def k2(p: float, q: float) -> float:
    """Schulman 2020: (log r)^2 / 2 with r = q/p."""
    return math.log(math.exp(q) / math.exp(p)) ** 2 / 2


def k3(p: float, q: float) -> float:
    """Schulman 2020: (r - 1) - log r with r = q/p."""
    ratio = math.exp(q - p)
    return ratio - 1 - math.log(ratio)


def kl_loss(new: Matrix, ref: Matrix, lengths: list[int], estimator: str) -> float:
    """Shao et al. 2024, equation 4, with k3, summed over tokens; or k2 in its place."""
    by_name = {"k2": k2, "k3": k3}
    return math.fsum(
        by_name[estimator](p[t], q[t]) for p, q, n in zip(new, ref, lengths, strict=True) for t in range(n)
    )


def entropy(logits: list[float], temperature: float = 1.0) -> float:
    """H = -sum of p log p, in nats, of p = softmax(logits / temperature)."""
    largest = max(logits)
    weights = [math.exp((logit - largest) / temperature) for logit in logits]
    total = math.fsum(weights)
    return -math.fsum(w / total * math.log(w / total) for w in weights)


def mean_and_variance(values: Matrix, lengths: list[int]) -> list[float]:
    kept = [v for row, n in zip(values, lengths, strict=True) for v in row[:n]]
    mean = math.fsum(kept) / len(kept)
    return [mean, math.fsum((v - mean) ** 2 for v in kept) / len(kept)]


def explained_variance(values: Matrix, returns: Matrix, lengths: list[int]) -> float:
    errors = [[g - v for g, v in zip(*rows, strict=True)] for rows in zip(returns, values, strict=True)]
    return 1 - mean_and_variance(errors, lengths)[1] / mean_and_variance(returns, lengths)[1]


def adapt_kl_coef(kl_coef: float, kl: float, target: float, horizon: int, batch_size: int) -> float:
    """Ziegler et al. 2019, section 2.2: e = clip((KL - target) / target, -0.2, 0.2), beta <- beta (1 + K e)."""
    error = (kl - target) / target
    if error > 0.2:
        error = 0.2
    if error < -0.2:
        error = -0.2
    return kl_coef + kl_coef * error * batch_size / horizon


# Whole algorithms, from scores (B,) and log-probs (B, T) to advantages (B, T)


def sequence_rewards(
    scores: list[float], logprobs: Matrix, ref: Matrix, lengths: list[int], kl_coef: float
) -> list[float]:
    """Ahmadian et al. 2024: r(x, y) - beta log(policy(y|x) / reference(y|x)), of whole responses."""
    rewards = []
    for score, p, q, n in zip(scores, logprobs, ref, lengths, strict=True):
        rewards.append(score - kl_coef * (math.fsum(p[:n]) - math.fsum(q[:n])))
    return rewards


def on_each_token(advantages: list[float], lengths: list[int], width: int) -> Matrix:
    return [[a] * n + [0.0] * (width - n) for a, n in zip(advantages, lengths, strict=True)]


def rloo(rewards: list[float], lengths: list[int], width: int, group_size: int, std_scaling: bool) -> Matrix:
    """Ahmadian et al. 2024: a response is one action. With `std_scaling`, whitened over the responses of the batch."""
    advantages = leave_one_out(rewards, group_size)
    if std_scaling:
        (advantages,) = whiten([advantages], [[True] * len(advantages)])
    return on_each_token(advantages, lengths, width)


def grpo(rewards: list[float], lengths: list[int], width: int, group_size: int, std_scaling: bool) -> Matrix:
    """Shao et al. 2024, section 4.1.2, outcome supervision: each token has the advantage of its response."""
    return on_each_token(group_relative(rewards, group_size, std_scaling), lengths, width)


def rewards_less_kl_to_go(
    scores: list[float], logprobs: Matrix, ref: Matrix, lengths: list[int], kl_coef: float, gamma: float
) -> Matrix:
    """Hu 2025: r - beta sum over u >= t of log(policy_u / reference_u), the advantages before they are normalised.

    With a discount, what comes u - t tokens later counts gamma^(u - t) as much.
    """
    to_go = []
    for score, p, q, n in zip(scores, logprobs, ref, lengths, strict=True):
        row = []
        for t in range(n):
            penalty = math.fsum(gamma ** (u - t) * (p[u] - q[u]) for u in range(t, n))
            row.append(gamma ** (n - 1 - t) * score - kl_coef * penalty)
        to_go.append(row + [0.0] * (len(p) - n))
    return to_go


def ppo(
    rewards: Matrix, values: Matrix, lengths: list[int], gamma: float, lam: float, std_scaling: bool
) -> tuple[Matrix, Matrix]:
    """Advantages and returns of Schulman et al. 2016, the advantages whitened as in Huang et al. 2024."""
    advantages, returns = gae(rewards, values, lengths, gamma, lam)
    if std_scaling:
        mask = [[t < n for t in range(len(row))] for row, n in zip(rewards, lengths, strict=True)]
        advantages = whiten(advantages, mask)
    return advantages, returns


def dpo_loss(policy: Matrix, reference: Matrix, lengths: list[int], beta: float) -> float:
    """Equation 7 of Rafailov et al. 2023, summed: log-probs of tokens, rows by turns of the better and the worse."""
    implicit_rewards = []
    for p, q, n in zip(policy, reference, lengths, strict=True):
        implicit_rewards.append(beta * math.fsum(p[t] - q[t] for t in range(n)))

    losses = []
    for better, worse in zip(implicit_rewards[::2], implicit_rewards[1::2], strict=True):
        losses.append(-math.log(1 / (1 + math.exp(-(better - worse)))))
    return math.fsum(losses)
