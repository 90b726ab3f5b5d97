"""Which training prompts does a step take?"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from detoxrl.config.schema import Config
from detoxrl.models.types import Prompt
from detoxrl.runtime.randomness import batch_indices, weighted_indices

# The least weight of a prompt, as a share of the mean one: its responses may differ again under a later policy.
_LEAST_WEIGHT = 0.1


class PromptChoice:
    """Takes the training prompts in turn or, with `rl.prompt_sampling` varied, by how much their responses differ.

    The weight of a prompt is the standard deviation of its last group's scores. A prompt that was not taken yet has the
    mean weight of the others. Prompts of validation and evaluation are never chosen so.
    """

    def __init__(self, config: Config, prompts: Sequence[Prompt]) -> None:
        self._config = config
        self._prompts = prompts
        self._deviations: dict[str, float] = {}  # By the id of a prompt.

    def indices(self, step: int) -> list[int]:
        """Return the indices of the prompts of a step, a group of responses to each."""
        rl = self._config.rl
        number = rl.prompts_per_step
        if rl.prompt_sampling == "uniform":
            return batch_indices(self._config.seed, "prompts", step, number, len(self._prompts))
        return weighted_indices(self._config.seed, "varied prompts", step, self._weights(), number)

    def _weights(self) -> npt.NDArray[np.float64]:
        known = [*self._deviations.values()]
        mean = float(np.mean(known)) if any(known) else 1.0
        weights = [self._deviations.get(prompt.id, mean) for prompt in self._prompts]
        return np.clip(weights, _LEAST_WEIGHT * mean, None)

    def observe(self, prompts: Sequence[Prompt], scores: torch.Tensor) -> None:
        """Note how much the scores (B,) of the groups of responses to some prompts differ."""
        if self._config.rl.prompt_sampling == "uniform":
            return
        deviations = scores.view(len(prompts), -1).std(1, correction=0).tolist()
        for prompt, deviation in zip(prompts, deviations, strict=True):
            self._deviations[prompt.id] = deviation

    def state(self) -> dict[str, float]:
        """Return what a checkpoint holds."""
        return dict(self._deviations)

    def restore(self, state: Mapping[str, float]) -> None:
        """Take what a checkpoint held."""
        self._deviations = dict(state)
