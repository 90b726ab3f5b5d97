"""How are prompts turned into responses?"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import numpy as np
import torch

from detoxrl.config.schema import GenerationConfig
from detoxrl.errors import require
from detoxrl.models.groups import split_into_passes
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
    """Which samples of a prompt are drawn, and from which uniforms: these and the prompt's id decide them."""

    seed: int
    stream: str
    step: int = 0
    samples: range = range(1)  # The numbers of the samples of each prompt.

    def uniforms(self, policy: Policy, prompts: Sequence[Prompt], length: int) -> torch.Tensor:
        """Return uniforms in [0, 1), (k * B, length), for k samples of each of B prompts, on the policy's device.

        The samples of a prompt are consecutive rows.
        """
        ids = [prompt.id for prompt in prompts]
        by_sample = [uniforms(self.seed, self.stream, self.step, ids, sample, length) for sample in self.samples]
        rows = np.stack(by_sample, 1).reshape(-1, length)
        return torch.from_numpy(rows).float().to(policy.device)

    def portions(self, prompts: int, most: int) -> Iterator[tuple[slice, Self]]:
        """Yield rows of prompts, and draws of samples of them, so that no portion has more than `most` responses.

        The samples of a prompt stay together, unless they alone are too many.
        """
        at_once = min(len(self.samples), most)
        for first in range(0, len(self.samples), at_once):
            samples = self.samples[first : first + at_once]
            prompts_at_once = most // len(samples)
            for start in range(0, prompts, prompts_at_once):
                yield slice(start, start + prompts_at_once), replace(self, samples=samples)


def batches_by_length(prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """Return the indices of the prompts in batches of `size`, in order of length, so that little is padded."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].text))
    return [order[start : start + size] for start in range(0, len(order), size)]


class Distribution(NamedTuple):
    """A policy under the weights of one name, at a temperature and top-p: what its responses are drawn from."""

    policy: Policy
    adapter: str | None
    temperature: float
    encoder: str | None  # The name of the weights that encode the prompts, where there is an encoder.
    top_p: float = 1.0  # The share of probability that tokens are drawn from: the likeliest ones.

    def encode(self, prompts: Sequence[Prompt]) -> Encoded:
        """Return the prompts in the form that `draw` and `logprobs` read."""
        return self.policy.with_shared_cross(self.policy.encode([prompt.text for prompt in prompts], self.encoder))

    def encodes_as(self, other: Self) -> bool:
        """Return whether another distribution can read what this one encoded."""
        return self.policy is other.policy and self.encoder == other.encoder

    def draw(self, encoded: Encoded, uniforms: torch.Tensor) -> Responses:
        """Return k responses to each of B prompts, drawn from `uniforms` (k * B, T), as `Policy.sample` does."""
        return self.policy.sample(encoded, uniforms, self.temperature, self.adapter, self.top_p)

    def logprobs(self, encoded: Encoded, responses: Responses) -> torch.Tensor:
        """Return the log-probs (nats) (B, T) of responses that another distribution may have drawn, teacher-forced.

        They are those of all tokens, whatever `top_p` is.
        """
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


class Response(NamedTuple):
    """One response: its text, the ids of its tokens with EOS, and the log-prob (nats) of these when they were drawn."""

    text: str
    ids: list[int]
    logprob: float  # Summed over the tokens.


@torch.no_grad()
def sample_texts(
    policy: Policy, prompts: Sequence[Prompt], config: GenerationConfig, draws: Draws, adapter: str | None = POLICY
) -> list[list[str]]:
    """Return the texts of the drawn samples of each prompt of one batch."""
    source = Distribution(policy, adapter, config.temperature, encoder=adapter)
    samples = sample_with_likelihoods(source, None, prompts, draws, config)
    return [[sample.text for sample in of_prompt] for of_prompt in samples]


@torch.no_grad()
def sample_with_likelihoods(
    source: Distribution,
    initial: Distribution | None,
    prompts: Sequence[Prompt],
    draws: Draws,
    config: GenerationConfig,
) -> list[list[Sample]]:
    """Return the drawn samples of each prompt of one batch, with their likelihoods.

    The responses are drawn from `source`. `initial` reads the token ids that were drawn, in one teacher-forced pass,
    which is left out where it is `source` itself. Without `initial` there are no likelihoods.
    """
    by_prompt: list[list[Sample]] = [[] for _ in prompts]
    for rows, portion in draws.portions(len(prompts), config.batch_size):
        samples = _sample_portion(source, initial, prompts[rows], portion, config.max_new_tokens)
        for row, of_prompt in zip(by_prompt[rows], samples, strict=True):
            row.extend(of_prompt)
    return by_prompt


def _sample_portion(
    source: Distribution, initial: Distribution | None, prompts: Sequence[Prompt], draws: Draws, length: int
) -> list[list[Sample]]:
    """Return the drawn samples of each prompt, which is read once for all of them."""
    encoded = source.encode(prompts)
    responses = source.draw(encoded, draws.uniforms(source.policy, prompts, length))

    likelihoods: Sequence[Likelihood | None] = [None] * len(responses.ids)
    if initial == source:
        likelihoods = _likelihoods(responses, responses.logprobs)
    elif initial is not None:
        encoded_by_initial = encoded if source.encodes_as(initial) else initial.encode(prompts)
        likelihoods = _likelihoods(responses, initial.logprobs(encoded_by_initial, responses))

    texts = source.policy.decode(responses)
    samples = [Sample(text, likelihood) for text, likelihood in zip(texts, likelihoods, strict=True)]
    size = len(draws.samples)
    return [samples[start : start + size] for start in range(0, len(samples), size)]


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
    prompts = torch.arange(len(encoded.mask))
    group_size = len(responses.ids) // len(prompts)
    for part, rows in split_into_passes(prompts, group_size, policy.rows_at_once(length)):
        consecutive = slice(int(part[0]), int(part[-1]) + 1)
        ids = responses.ids[rows, :length]
        mask = responses.response_mask[rows, :length]
        scored = policy.logprobs(encoded.row_slice(consecutive), ids, temperature, adapter, mask=mask)
        logprobs[rows, :length] = scored.logprobs
    return logprobs


@torch.no_grad()
def sample_all(
    policy: Policy,
    prompts: Sequence[Prompt],
    config: GenerationConfig,
    draws: Draws,
    adapter: str | None = POLICY,
) -> list[list[Response]]:
    """Return the drawn samples of each prompt, in the order of the prompts."""
    source = Distribution(policy, adapter, config.temperature, encoder=adapter)
    by_prompt: list[list[Response]] = [[] for _ in prompts]
    for indices in batches_by_length(prompts, config.batch_size):
        for rows, portion in draws.portions(len(indices), config.batch_size):
            batch = [prompts[index] for index in indices[rows]]
            uniforms = portion.uniforms(policy, batch, config.max_new_tokens)
            responses = _responses(policy, source.draw(source.encode(batch), uniforms))

            size = len(portion.samples)
            for number, index in enumerate(indices[rows]):
                by_prompt[index] += responses[number * size : (number + 1) * size]
    return by_prompt


def _responses(policy: Policy, drawn: Responses) -> list[Response]:
    """Return each of the responses of a batch."""
    lengths: list[int] = drawn.response_mask.sum(1).tolist()
    ids: list[list[int]] = drawn.ids.tolist()
    rows = zip(policy.decode(drawn), ids, lengths, _summed(drawn.logprobs), strict=True)
    return [Response(text, row_ids[:length], logprob) for text, row_ids, length, logprob in rows]


@torch.no_grad()
def require_agreement(policy: Policy, base: str) -> None:
    """Raise InputError unless sampling in a padded batch and scoring each text alone give the same log-probs.

    They are scored one by one, as a group whose prompt is read once, and by the model's own forward pass, which a fast
    network stands for. A model without a cache, or one that counts positions or looks ahead in a way of its own, would
    be trained on wrong log-probs.
    """
    texts = ["Thank you.", "Thank you, that is very kind of you. I wish you a good day."]
    prompts = [Prompt(id=text, text=text) for text in texts]
    chances = Draws(0, "agreement", samples=range(2)).uniforms(policy, prompts, length=8)
    sampled = policy.sample(policy.encode(texts), chances, 1.0)

    bound = _AGREEMENT_BF16 if policy.model.dtype == torch.bfloat16 else _AGREEMENT_FP32
    plain = policy.through_plain_network()
    for responses, network in ((1, nullcontext()), (2, nullcontext()), (1, plain)):  # Two to a prompt are a group.
        with network:
            largest = max(_disagreement(policy, text, sampled, 2 * row, responses) for row, text in enumerate(texts))
        rule = f"samples with log-probs up to {largest:.1g} nats off what it scores, so it cannot be trained here"
        require(largest < bound, "policy.base", base, rule, GENERATOR_EXAMPLES)


@torch.no_grad()
def require_own_reference(policy: Policy, field: str, source: str) -> None:
    """Raise InputError unless the policy and its reference give a text the same log-probs, so that KL begins at 0."""
    text = "Thank you, that is very kind of you."
    ids = torch.tensor([policy.tokenizer(text, add_special_tokens=False).input_ids], device=policy.device)
    own = policy.logprobs(policy.encode([text]), ids, 1.0).logprobs
    by_reference = policy.logprobs(policy.encode([text], policy.reference), ids, 1.0, policy.reference).logprobs
    distance = float((own - by_reference).abs().max())
    rule = f"starts {distance:.1g} nats a token away from its own reference, so the KL would not begin at 0"
    remedy = "give a plain LoRA, without modules_to_save on weights that the base ties"
    require(distance < _AGREEMENT_FP32, field, source, rule, remedy)


def _disagreement(policy: Policy, text: str, sampled: Responses, first: int, responses: int) -> float:
    """Return the largest difference (nats) between sampled and scored log-probs of responses to a text."""
    rows = slice(first, first + responses)
    scored = policy.logprobs(policy.encode([text]), sampled.ids[rows], 1.0)
    difference = (scored.logprobs - sampled.logprobs[rows])[sampled.response_mask[rows]]
    return float(difference.abs().max())
