"""How are prompts turned into responses?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch

from detoxrl.config.schema import GenerationConfig
from detoxrl.errors import require
from detoxrl.models.plain import PlainSteps
from detoxrl.models.policy import Policy
from detoxrl.models.support import GENERATOR_EXAMPLES
from detoxrl.models.types import Encoded, Prompt, Responses
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


class Distribution(NamedTuple):
    """A policy under the weights of one name, at a temperature: the distribution that its responses are drawn from."""

    policy: Policy
    adapter: str | None
    temperature: float
    encoder: str | None  # The name of the weights that encode the prompts, where there is an encoder.

    def encode(self, prompts: Sequence[Prompt]) -> Encoded:
        """Return the prompts in the form that `draw` and `logprobs` read."""
        return self.policy.with_shared_cross(self.policy.encode([prompt.text for prompt in prompts], self.encoder))

    def encodes_as(self, other: Self) -> bool:
        """Return whether another distribution can read what this one encoded."""
        return self.policy is other.policy and self.encoder == other.encoder

    def read_prompts(self, encoded: Encoded) -> PlainSteps | None:
        """Return what several draws from the same prompts have in common, as `Policy.read_prompts`."""
        return self.policy.read_prompts(encoded, self.adapter)

    def draw(self, encoded: Encoded, uniforms: torch.Tensor, start: PlainSteps | None = None) -> Responses:
        """Return a response to each prompt, drawn from `uniforms` (B, T), behind what `read_prompts` returned."""
        return self.policy.sample(encoded, uniforms, self.temperature, self.adapter, start)

    def logprobs(self, encoded: Encoded, responses: Responses) -> torch.Tensor:
        """Return the log-probs (nats) (B, T) of responses that another distribution may have drawn, teacher-forced."""
        return response_logprobs(self.policy, encoded, responses, self.temperature, self.adapter)


class Likelihood(NamedTuple):
    """How likely the tokens of one response are, in nats, summed over the tokens."""

    tokens: int  # EOS included.
    logprob: float  # Under the distribution that they were drawn from.
    initial_logprob: float  # Under the initial policy.


class Sample(NamedTuple):
    """One response: its text, and how likely its tokens are; None where the initial policy has no such tokens."""

    text: str
    likelihood: Likelihood | None


@torch.no_grad()
def sample_texts(
    policy: Policy,
    prompts: Sequence[Prompt],
    config: GenerationConfig,
    draws: Draws,
    samples: int = 1,
    adapter: str | None = POLICY,
) -> list[list[str]]:
    """Return `samples` response texts for each prompt of one batch. Each prompt is read once."""
    source = Distribution(policy, adapter, config.temperature, encoder=adapter)
    encoded = source.encode(prompts)
    start = source.read_prompts(encoded) if samples > 1 else None
    texts: list[list[str]] = [[] for _ in prompts]
    for sample in range(samples):
        responses = source.draw(encoded, draws.uniforms(policy, prompts, sample, config.max_new_tokens), start)
        for texts_of_prompt, text in zip(texts, policy.decode(responses), strict=True):
            texts_of_prompt.append(text)
    return texts


@torch.no_grad()
def sample_with_likelihoods(
    source: Distribution,
    initial: Distribution | None,
    prompts: Sequence[Prompt],
    draws: Draws,
    samples: int,
    length: int,
) -> list[list[Sample]]:
    """Return `samples` responses of up to `length` tokens for each prompt of one batch, with their likelihoods.

    The responses are drawn from `source`. `initial` reads the token ids that were drawn, in one teacher-forced pass,
    which is left out where it is `source` itself. Without `initial` there are no likelihoods.
    """
    encoded = source.encode(prompts)
    encoded_by_initial = encoded
    if initial is not None and not source.encodes_as(initial):
        encoded_by_initial = initial.encode(prompts)

    start = source.read_prompts(encoded) if samples > 1 else None
    by_prompt: list[list[Sample]] = [[] for _ in prompts]
    for sample in range(samples):
        responses = source.draw(encoded, draws.uniforms(source.policy, prompts, sample, length), start)
        likelihoods: Sequence[Likelihood | None] = [None] * len(prompts)
        if initial == source:
            likelihoods = _likelihoods(responses, responses.logprobs)
        elif initial is not None:
            likelihoods = _likelihoods(responses, initial.logprobs(encoded_by_initial, responses))

        texts = source.policy.decode(responses)
        for of_prompt, text, likelihood in zip(by_prompt, texts, likelihoods, strict=True):
            of_prompt.append(Sample(text, likelihood))
    return by_prompt


def _likelihoods(responses: Responses, initial_logprobs: torch.Tensor) -> list[Likelihood]:
    """Return the likelihood of each response."""
    tokens = responses.response_mask.sum(1).tolist()
    sums = zip(tokens, _summed(responses.logprobs), _summed(initial_logprobs), strict=True)
    return [Likelihood(*numbers) for numbers in sums]


def _summed(logprobs: torch.Tensor) -> list[float]:
    """Return the sum over tokens of log-probs (B, T), in float64 by numpy: not every device has float64."""
    sums: list[float] = logprobs.cpu().numpy().sum(1, dtype=np.float64).tolist()
    return sums


def response_logprobs(
    policy: Policy, encoded: Encoded, responses: Responses, temperature: float, adapter: str | None
) -> torch.Tensor:
    """Return log-probs (nats) (B, T) of sampled tokens under `adapter`, teacher-forced, 0 outside the responses.

    As many rows are read at once as keep the logits small.
    """
    length = int(responses.response_mask.sum(1).max())
    logprobs = torch.zeros(responses.ids.shape, device=policy.device)
    size = policy.rows_at_once(length)
    for start in range(0, len(responses.ids), size):
        rows = slice(start, start + size)
        ids = responses.ids[rows, :length]
        mask = responses.response_mask[rows, :length]
        scored, _, _ = policy.logprobs(encoded.row_slice(rows), ids, temperature, adapter, mask)
        logprobs[rows, :length] = scored
    return logprobs


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
