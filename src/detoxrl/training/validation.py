"""How does a policy do on the validation prompts while it trains?"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from detoxrl.config.schema import Config
from detoxrl.data.rows import Row, to_prompts
from detoxrl.evaluation.metrics import validation_quality
from detoxrl.evaluation.statistics import Floats
from detoxrl.models.policy import Policy
from detoxrl.models.sampling import Draws
from detoxrl.models.types import Encoded
from detoxrl.rl.kl import k1
from detoxrl.runtime.world import World
from detoxrl.training.rollout import collect_rollout


@dataclass(frozen=True, kw_only=True)
class Validation:
    """How a policy did on the validation prompts before step `step`."""

    step: int
    toxicity: float  # Mean by the primary judge, [0, 1].
    toxicity_error: float  # Standard error of that mean.
    quality: float  # By `evaluation.metrics.quality_measure`, [0, 1].
    length: float  # Mean words per response.
    score: float  # Mean raw score by the reward.
    kl: float  # Distance to the reference, nats per response: the mean sum of k1.


@dataclass(frozen=True, kw_only=True)
class ValidationResponse:
    """One validation response: the index of its row, its text, its distance to the reference in nats."""

    index: int
    text: str
    kl: float


class ValidationSampler:
    """Samples one response for each of this process's validation rows.

    Every validation draws the same uniforms, so policies differ and luck does not. Unless the encoder trains, each
    prompt is encoded once.
    """

    def __init__(self, policy: Policy, config: Config, rows: Sequence[Row], world: World) -> None:
        self._policy = policy
        self._generation = config.generation
        self._draws = Draws(config.seed, "validation")
        self._prompts = to_prompts(rows)

        by_length = sorted(range(len(rows)), key=lambda index: len(self._prompts[index].text))
        mine = world.share(by_length)
        size = config.generation.batch_size
        self._batches = [mine[start : start + size] for start in range(0, len(mine), size)]
        self._encoded: dict[int, Encoded] = {}

    def sample(self) -> list[ValidationResponse]:
        """Return the responses of this process's rows."""
        responses = []
        for number, indices in enumerate(self._batches):
            prompts = [self._prompts[index] for index in indices]
            encoded = self._encoded.get(number)
            rollout = collect_rollout(self._policy, prompts, self._generation, self._draws, encoded=encoded)
            if not self._policy.train_encoder:
                # Keys and values of cross-attention are left out: their memory is worth more than their time.
                self._encoded[number] = replace(rollout.encoded, cross=None)

            distances = k1(rollout.responses.logprobs, rollout.ref_logprobs).sum(1).tolist()
            for index, text, kl in zip(indices, rollout.texts, distances, strict=True):
                responses.append(ValidationResponse(index=index, text=text, kl=kl))
        return responses


def summarise(
    step: int, rows: Sequence[Row], texts: Sequence[str], toxicity: Floats, score: float, kl: float
) -> Validation:
    """Return how a policy did whose responses to the rows are `texts`, with `toxicity` (N,) by the primary judge."""
    return Validation(
        step=step,
        toxicity=float(toxicity.mean()),
        toxicity_error=float(toxicity.std(ddof=1)) / len(texts) ** 0.5,
        quality=validation_quality(rows, texts),
        length=sum(len(text.split()) for text in texts) / len(texts),
        score=score,
        kl=kl,
    )
