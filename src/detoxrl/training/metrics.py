"""What is measured of a step of training?"""

import time
from collections import defaultdict

from torch import Tensor

from detoxrl.errors import TrainingError
from detoxrl.models.types import Rollout
from detoxrl.rl.kl import k1, k3
from detoxrl.rl.ops import masked_mean
from detoxrl.runtime.console import log
from detoxrl.runtime.run_folder import RunFolder

# Logged names of means per token, and what is summed for them.
_MEANS = {"policy/loss": "policy", "value/loss": "value", "clip_fraction": "clipped", "entropy": "entropy",
          "kl/update": "kl", "ratio/mean": "ratio"}  # fmt: skip


class Totals:
    """Sums over the microbatches of one step."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.norms: list[float] = []
        self.ratio_max = 0.0
        self.first_error = 0.0
        self._pass_start = (0.0, 0.0)

    def add(self, parts: list[dict[str, float]]) -> None:
        """Count the microbatches of a minibatch in."""
        for part in parts:
            for name, value in part.items():
                self.sums[name] += value
            self.ratio_max = max(self.ratio_max, part["ratio_max"])
            if not self.norms:  # still in the first minibatch
                self.first_error = max(self.first_error, part["ratio_max"] - 1, 1 - part["ratio_min"])

    def pass_kl(self) -> float:
        """Return the mean k3 per token, in nats, since the last call."""
        kl, tokens = self._pass_start
        self._pass_start = (self.sums["kl"], self.sums["tokens"])
        return (self.sums["kl"] - kl) / (self.sums["tokens"] - tokens)

    def metrics(self, epochs: int) -> dict[str, float]:
        """Return the means per token under their logged names."""
        found = {name: self.sums[of] / self.sums["tokens"] for name, of in _MEANS.items()}
        found |= {"ratio/max": self.ratio_max, "ratio/first_error": self.first_error}
        return found | {"grad_norm": sum(self.norms) / len(self.norms), "epochs": float(epochs)}


def rollout_statistics(rollout: Rollout, raw: Tensor, scores: Tensor, rewards: Tensor) -> dict[str, float]:
    """Return what a rollout says of the policy: scores, KL in nats per response, lengths in tokens, EOS rate."""
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


def require_finite(statistics: dict[str, float], step: int) -> None:
    """Raise TrainingError when a statistic is not finite."""
    for name, value in statistics.items():
        if value != value or abs(value) == float("inf"):
            remedy = "a lower rl.lr may help: --resume --accept-changes --rl.lr VALUE goes on from the last checkpoint"
            raise TrainingError(f"train stopped at step {step}: {name} is {value}; {remedy}")


def warn_of_ratios(statistics: dict[str, float], step: int, bf16: bool) -> None:
    """Tell the user of ratios that no healthy step has, with a base in bfloat16 or in float32."""
    error, highest = statistics["ratio/first_error"], statistics["ratio/max"]
    if error > (0.2 if bf16 else 1e-2):
        log.print(f"step {step}: ratios begin {error:.2g} off 1: sampling and update disagree, see docs/metrics.md")
    elif highest > 10:
        log.print(f"step {step}: a ratio of {highest:.0f}; a lower rl.lr may help")


def log_samples(folder: RunFolder, rollout: Rollout, raw: Tensor, step: int, count: int = 4) -> None:
    """Append the first few responses of a step to rollouts.jsonl."""
    for prompt, text, score in list(zip(rollout.prompts, rollout.texts, raw.tolist(), strict=True))[:count]:
        folder.append("rollouts.jsonl", {"step": step, "id": prompt.id, "response": text, "score": score})


class Watch:
    """Seconds of a step by stage."""

    def __init__(self) -> None:
        self.started = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[f"seconds/{stage}"] = now - self.last
        self.last = now

    def metrics(self, tokens: int) -> dict[str, float]:
        total = time.perf_counter() - self.started
        return self.laps | {"seconds/step": total, "tokens_per_second": tokens / total}
