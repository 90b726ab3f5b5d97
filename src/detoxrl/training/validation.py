"""How does a policy do on the validation prompts, again and again while it trains?"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import torch

from detoxrl.config.schema import Config
from detoxrl.data.rows import Row, to_prompts
from detoxrl.evaluation.judges import Judge
from detoxrl.evaluation.metrics import validation_quality
from detoxrl.models.policy import Policy
from detoxrl.models.types import Encoded
from detoxrl.rewards.shaping import Reward
from detoxrl.rl.kl import k1
from detoxrl.runtime import processes
from detoxrl.training.best import Validation
from detoxrl.training.rollout import collect_rollout


class Validator:
    """Measures a policy on the same rows, one response each; unless the encoder trains it reads each prompt once.

    Several processes share the prompts.
    """

    def __init__(self, policy: Policy, config: Config, rows: Sequence[Row]) -> None:
        self.policy, self.config, self.rows, self.prompts = policy, config, rows, to_prompts(rows)
        size = config.generation.batch_size
        mine = processes.share(sorted(range(len(rows)), key=lambda row: len(self.prompts[row].text)))
        self._batches = [mine[start : start + size] for start in range(0, len(mine), size)]
        self._read: dict[int, Encoded] = {}

    def __call__(self, reward: Reward, judge: Judge, step: int) -> Validation:
        """Return how the policy does now, without a step's effect on the draws.

        Every validation draws the same uniforms, so policies differ and luck does not.
        """
        texts, kl = [""] * len(self.rows), torch.zeros(len(self.rows))
        for row, text, distance in chain(*processes.everyone(self._sampled())):
            texts[row], kl[row] = text, distance
        toxicity = judge(texts)
        return Validation(
            step=step,
            toxicity=float(toxicity.mean()),
            toxicity_error=float(toxicity.std(ddof=1)) / len(texts) ** 0.5,
            quality=validation_quality(self.rows, texts),
            length=sum(len(text.split()) for text in texts) / len(texts),
            score=float(reward([prompt.text for prompt in self.prompts], texts).mean()),
            kl=float(kl.mean()),
        )

    def _sampled(self) -> list[tuple[int, str, float]]:
        """Return row, response and its distance to the reference (nats) of this process's rows."""
        policy, how, seed = self.policy, self.config.generation, self.config.seed
        found = list[tuple[int, str, float]]()
        for i, batch in enumerate(self._batches):
            some = [self.prompts[row] for row in batch]
            rollout = collect_rollout(
                policy, some, how, seed=seed, step=0, stream="validation", encoded=self._read.get(i)
            )
            if not policy.train_encoder:
                self._read[i] = replace(rollout.encoded, cross=None)  # which would be more than its time is worth
            nats = k1(rollout.responses.logprobs, rollout.ref_logprobs).sum(1).tolist()
            found += zip(batch, rollout.texts, nats, strict=True)
        return found
