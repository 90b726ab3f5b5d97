"""How are prompts turned into responses?"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from detoxrl.config.schema import GenerationConfig
from detoxrl.errors import require
from detoxrl.models.policy import Policy
from detoxrl.models.support import GENERATOR_EXAMPLES
from detoxrl.models.types import Prompt
from detoxrl.models.weights import POLICY
from detoxrl.runtime.randomness import uniforms

# The most that sampling and scoring may differ, in nats a token. Sampling in bfloat16 rounds differently from scoring.
_AGREEMENT_FP32 = 1e-3
_AGREEMENT_BF16 = 0.1


@dataclass(frozen=True)
class Draws:
    """Where a response's uniforms come from: they are a function of these, the prompt's id and the sample's number."""

    seed: int
    stream: str
    step: int = 0

    def uniforms(self, policy: Policy, prompts: Sequence[Prompt], sample: int, length: int) -> torch.Tensor:
        """Return uniforms in [0, 1), (B, length), of sample number `sample` of each prompt, on the policy's device."""
        ids = [prompt.id for prompt in prompts]
        rows = uniforms(self.seed, self.stream, self.step, ids, sample, length)
        return torch.from_numpy(rows).float().to(policy.device)


def batches_by_length(prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """Return the indices of the prompts in batches of `size`, in order of length, so that little is padded."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].text))
    return [order[start : start + size] for start in range(0, len(order), size)]


@torch.no_grad()
def sample_texts(
    policy: Policy,
    prompts: Sequence[Prompt],
    config: GenerationConfig,
    draws: Draws,
    samples: int = 1,
    adapter: str | None = POLICY,
) -> list[list[str]]:
    """Return `samples` response texts for each prompt of one batch. Each prompt is encoded once."""
    encoded = policy.with_shared_cross(policy.encode([prompt.text for prompt in prompts], adapter))
    texts: list[list[str]] = [[] for _ in prompts]
    for sample in range(samples):
        chances = draws.uniforms(policy, prompts, sample, config.max_new_tokens)
        responses = policy.sample(encoded, chances, config.temperature, adapter)
        for texts_of_prompt, text in zip(texts, policy.decode(responses), strict=True):
            texts_of_prompt.append(text)
    return texts


def sample_all(
    policy: Policy,
    prompts: Sequence[Prompt],
    config: GenerationConfig,
    draws: Draws,
    samples: int = 1,
    adapter: str | None = POLICY,
) -> list[list[str]]:
    """Return `samples` response texts for each prompt, in the order of the prompts."""
    texts: dict[int, list[str]] = {}
    for indices in batches_by_length(prompts, config.batch_size):
        batch = [prompts[index] for index in indices]
        sampled = sample_texts(policy, batch, config, draws, samples, adapter)
        texts.update(zip(indices, sampled, strict=True))
    return [texts[index] for index in range(len(prompts))]


@torch.no_grad()
def require_agreement(policy: Policy, base: str) -> None:
    """Raise InputError unless sampling in a padded batch and scoring each text alone give the same log-probs.

    A model without a cache, or one that counts positions or looks ahead in a way of its own, would be trained on wrong
    log-probs.
    """
    texts = ["Thank you.", "Thank you, that is very kind of you. I wish you a good day."]
    prompts = [Prompt(id=text, text=text) for text in texts]
    chances = Draws(0, "agreement").uniforms(policy, prompts, sample=0, length=8)
    sampled = policy.sample(policy.encode(texts), chances, 1.0)

    largest = 0.0
    for row, text in enumerate(texts):
        scored, _, _ = policy.logprobs(policy.encode([text]), sampled.ids[row : row + 1], 1.0)
        difference = (scored[0] - sampled.logprobs[row])[sampled.response_mask[row]]
        largest = max(largest, float(difference.abs().max()))

    rule = f"samples with log-probs up to {largest:.1g} nats off what it scores, so it cannot be trained here"
    bound = _AGREEMENT_BF16 if policy.model.dtype == torch.bfloat16 else _AGREEMENT_FP32
    require(largest < bound, "policy.base", base, rule, GENERATOR_EXAMPLES)
