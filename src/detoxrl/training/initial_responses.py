"""What would the initial policy have answered?"""

from collections.abc import Sequence
from dataclasses import replace

from detoxrl.config.schema import Config
from detoxrl.models.policy import Policy
from detoxrl.models.sampling import Draws, batches_by_length, sample_texts
from detoxrl.models.types import Prompt


class InitialResponses:
    """One response of the initial policy to each prompt, drawn when it is first asked for.

    Its draws are those of no rollout and of no validation: against the same draws, an unchanged policy would look more
    similar to the initial one than two of the initial policy's responses are to each other.
    """

    def __init__(self, policy: Policy, config: Config) -> None:
        self._policy = policy
        self._generation = config.generation
        self._draws = Draws(config.seed, "initial response")
        self._texts: dict[tuple[str, str], str] = {}  # By id and text of the prompt.

    def with_initial_responses(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Return the prompts, each with its response."""
        new = list({_key(prompt): prompt for prompt in prompts if _key(prompt) not in self._texts}.values())
        for batch in batches_by_length(new, self._generation.batch_size):
            batch_prompts = [new[index] for index in batch]
            sampled = sample_texts(
                self._policy, batch_prompts, self._generation, self._draws, adapter=self._policy.reference
            )
            for prompt, (text,) in zip(batch_prompts, sampled, strict=True):
                self._texts[_key(prompt)] = text
        return [replace(prompt, initial_response=self._texts[_key(prompt)]) for prompt in prompts]


def _key(prompt: Prompt) -> tuple[str, str]:
    return prompt.id, prompt.text
