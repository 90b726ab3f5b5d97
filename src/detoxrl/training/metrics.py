"""What is measured of a training step?"""

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from detoxrl.config.schema import RlConfig
from detoxrl.config.terms import Term
from detoxrl.errors import TrainingError
from detoxrl.models.types import Rollout
from detoxrl.rl.advantages import zero_variance_share
from detoxrl.rl.kl import k1, k3
from detoxrl.rl.ops import masked_mean
from detoxrl.runtime.console import log
from detoxrl.runtime.run_folder import RunFolder

Metrics = dict[str, float]

# The logged name of each mean per token, and the sum that it is the mean of. Some algorithms lack some.
_MEANS = {
    "policy/loss": "policy",
    "value/loss": "value",
    "kl/loss": "kl_loss",
    "clip_fraction": "clipped",
    "entropy": "entropy",
    "kl/update": "kl",
    "ratio/mean": "ratio",
}
# How far the first ratios of a step may be off 1, and how large a ratio may grow, before the user is warned.
_FIRST_RATIO_BOUND = 1e-2
_FIRST_RATIO_BOUND_BF16 = 0.2
_LARGEST_RATIO = 10
# Responses of each step that go to rollouts.jsonl.
_LOGGED_SAMPLES = 4


class Totals:
    """Sums over the microbatches of one training step."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.gradient_norms: list[float] = []
        self.ratio_max = 0.0
        self.first_error = 0.0
        self._at_pass_start = (0.0, 0.0)

    def add(self, microbatches: list[Metrics], gradient_norm: float) -> None:
        """Add the microbatches of one minibatch, and the norm of its gradient before clipping."""
        is_first_minibatch = not self.gradient_norms
        for sums in microbatches:
            for name, value in sums.items():
                self.sums[name] += value
            self.ratio_max = max(self.ratio_max, sums["ratio_max"])
            if is_first_minibatch:
                self.first_error = max(self.first_error, sums["ratio_max"] - 1, 1 - sums["ratio_min"])
        self.gradient_norms.append(gradient_norm)

    def pass_kl(self) -> float:
        """Return the mean k3 between policy and rollout per token (nats) since the last call."""
        kl, tokens = self._at_pass_start
        self._at_pass_start = (self.sums["kl"], self.sums["tokens"])
        return (self.sums["kl"] - kl) / (self.sums["tokens"] - tokens)

    def metrics(self, epochs: int) -> Metrics:
        """Return the means per token under their logged names."""
        tokens = self.sums["tokens"]
        metrics = {name: self.sums[summed] / tokens for name, summed in _MEANS.items() if summed in self.sums}
        metrics["ratio/max"] = self.ratio_max
        metrics["ratio/first_error"] = self.first_error
        metrics["grad_norm"] = sum(self.gradient_norms) / len(self.gradient_norms)
        metrics["epochs"] = float(epochs)
        return metrics


def rollout_metrics(rollout: Rollout, raw: Tensor, scores: Tensor, rewards: Tensor) -> Metrics:
    """Return what a rollout says about the policy.

    `raw` and `scores` are (B,), before and after shaping; `rewards` is (B, T). KL is in nats per response, lengths are
    in tokens, rates in [0, 1].
    """
    responses = rollout.responses
    mask = responses.response_mask
    lengths = mask.sum(1).float()
    return {
        "score/mean": float(raw.mean()),
        "score/std": float(raw.std()),
        "score/shaped": float(scores.mean()),
        "reward/mean": float(rewards.sum(1).mean()),
        "kl/reference": float(k1(responses.logprobs, rollout.ref_logprobs).sum(1).mean()),
        "kl/k3": float(masked_mean(k3(responses.logprobs, rollout.ref_logprobs), mask)),
        "eos_rate": float(responses.ended.float().mean()),
        "empty_rate": sum(not text for text in rollout.texts) / len(rollout.texts),
        "response_length/mean": float(lengths.mean()),
        "response_length/max": float(lengths.max()),
    }


def term_metrics(raw: Tensor, terms: Sequence[Term]) -> Metrics:
    """Return the mean raw value of each term, from values (B, terms); nothing of an only term, which is the score."""
    if len(terms) == 1:
        return {}
    return {f"score/{term.name}": float(values.mean()) for term, values in zip(terms, raw.unbind(1), strict=True)}


def objective_metrics(maximised: Tensor, rl: RlConfig) -> Metrics:
    """Return what the scores (B,) that training maximises say: of the tail, and of the groups, where there are some."""
    metrics: Metrics = {}
    if rl.tail_share < 1:
        metrics["score/tail"] = float(maximised.mean())
    group_size = rl.responses_per_prompt
    if group_size > 1:
        metrics["groups/score_std"] = float(maximised.view(-1, group_size).std(1).mean())
        metrics["groups/zero_variance"] = float(zero_variance_share(maximised, group_size))
    return metrics


def require_finite(metrics: Metrics, step: int) -> None:
    """Raise TrainingError when a metric is NaN or infinite."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            remedy = "a lower rl.lr may help: --resume --accept-changes --rl.lr VALUE resumes from the last checkpoint"
            raise TrainingError(f"train stopped at step {step}: {name} is {value}; {remedy}")


def warn_of_ratios(metrics: Metrics, step: int, bf16: bool) -> None:
    """Warn of probability ratios that no healthy step has; `bf16` says whether the base is in bfloat16."""
    bound = _FIRST_RATIO_BOUND_BF16 if bf16 else _FIRST_RATIO_BOUND
    first_error = metrics["ratio/first_error"]
    largest = metrics["ratio/max"]
    if first_error > bound:
        log.print(
            f"step {step}: first ratios are {first_error:.2g} off 1: sampling and update disagree, see docs/metrics.md"
        )
    elif largest > _LARGEST_RATIO:
        log.print(f"step {step}: the largest ratio is {largest:.0f}; a lower rl.lr may help")


def log_samples(folder: RunFolder, rollout: Rollout, raw: Tensor, step: int) -> None:
    """Append the first responses of a step to rollouts.jsonl."""
    samples = list(zip(rollout.prompts_of_responses, rollout.texts, raw.tolist(), strict=True))
    for prompt, text, score in samples[:_LOGGED_SAMPLES]:
        folder.append("rollouts.jsonl", {"step": step, "id": prompt.id, "response": text, "score": score})


class StepTimer:
    """Seconds of one training step, in all and by stage."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._seconds: Metrics = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the block as a stage of the step."""
        started = time.perf_counter()
        yield
        self._seconds[f"seconds/{name}"] = time.perf_counter() - started

    def metrics(self, tokens: int) -> Metrics:
        """Return the seconds by stage and in all, and the response `tokens` per second."""
        total = time.perf_counter() - self._started
        return {**self._seconds, "seconds/step": total, "tokens_per_second": tokens / total}
