"""How likely are responses, under the policy that wrote them and under the initial one?"""

import math
from collections.abc import Sequence

import numpy as np

from detoxrl.evaluation.statistics import Floats, Json
from detoxrl.models.sampling import Sample


def likelihood_metrics(samples: Sequence[Sequence[Sample]], are_draws: bool) -> dict[str, Floats]:
    """Return by name, for samples (N, k), the metrics of their likelihoods, (N, k) each, in nats per token.

    The mean of `nll` is the negative log-likelihood per token under the initial policy, and that of `entropy` the one
    under the distribution that the tokens were drawn from. The expectation of a response's own -log p is the entropy of
    responses, so no further pass is needed. Samples that were picked among draws are not `are_draws`, and have no
    entropy. Empty if any sample has no likelihood.
    """
    likelihoods = [[sample.likelihood for sample in of_prompt] for of_prompt in samples]
    if any(likelihood is None for of_prompt in likelihoods for likelihood in of_prompt):
        return {}

    tokens, logprobs, initial_logprobs = np.moveaxis(np.array(likelihoods, dtype=np.float64), 2, 0)
    metrics = {"nll": per_token(-initial_logprobs, tokens)}
    if are_draws:
        metrics["entropy"] = per_token(-logprobs, tokens)
    return metrics


def mean_entropy(samples: Sequence[Sequence[Sample]]) -> float | None:
    """Return the entropy of draws (N, k) in nats per token; None if any has no likelihood."""
    metrics = likelihood_metrics(samples, are_draws=True)
    return float(metrics["entropy"].mean()) if metrics else None


def per_token(nats: Floats, tokens: Floats) -> Floats:
    """Return values (N, k) whose mean is the sum of `nats` (N, k) over the sum of `tokens` (N, k).

    They are the linear terms of that ratio: r + (nats - r tokens) / mean(tokens). So the mean is the ratio itself, and
    the spread of the values over prompts is the spread of the ratio, lengths that vary included (the delta method;
    Cochran 1977, Sampling Techniques, chapter 6). A paired difference of such values is one of ratios.
    """
    ratio = nats.sum() / tokens.sum()
    values: Floats = ratio + (nats - ratio * tokens) / tokens.mean()
    return values


def perplexity(nll: Json) -> Json:
    """Return perplexities for eval.json: exp of `nll` as `compare` returns it. The difference becomes a ratio."""
    difference = nll["difference"]
    ratio = None
    if difference is not None:
        ratio = {name: math.exp(difference[name]) for name in ("mean", "low", "high")}
    return {"before": math.exp(nll["before"]), "after": math.exp(nll["after"]), "ratio": ratio}
