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


def policy_loss(new: Matrix, old: Matrix, advantages: Matrix, lengths: list[int], clip: float) -> float:
    """Equation 7 of Schulman et al. 2017: minus the sum of min(r A, clip(r) A)."""
    total = []
    for n, o, a, length in zip(new, old, advantages, lengths, strict=True):
        for t in range(length):
            ratio = math.exp(n[t] - o[t])
            clipped = min(max(ratio, 1 - clip), 1 + clip)
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


def k3(p: float, q: float) -> float:
    """Schulman 2020: (r - 1) - log r with r = q/p."""
    ratio = math.exp(q - p)
    return ratio - 1 - math.log(ratio)


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


def dpo_loss(policy: Matrix, reference: Matrix, lengths: list[int], beta: float) -> float:
    """Equation 7 of Rafailov et al. 2023, summed: log-probs of tokens, rows by turns of the better and the worse."""
    implicit_rewards = []
    for p, q, n in zip(policy, reference, lengths, strict=True):
        implicit_rewards.append(beta * math.fsum(p[t] - q[t] for t in range(n)))

    losses = []
    for better, worse in zip(implicit_rewards[::2], implicit_rewards[1::2], strict=True):
        losses.append(-math.log(1 / (1 + math.exp(-(better - worse)))))
    return math.fsum(losses)
