"""How are prompts turned into responses?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from detoxrl.config import GenerationConfig
from detoxrl.errors import require
from detoxrl.policy.policy import Policy
from detoxrl.policy.weights import POLICY
from detoxrl.randomness import uniforms
from detoxrl.records import Encoded, Prompt, Responses, Rollout, concatenate

# Most logits of one pass that needs no gradient: 46 MiB in fp32, and some copies of it.
_LOGITS = 12_000_000


def length_sorted_batches(texts: Sequence[str], batch_size: int) -> list[list[int]]:
    """Return index batches of at most `batch_size`, each of texts of like length, so that little is padded."""
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def draws(
    policy: Policy, seed: int, stream: str, step: int, prompts: Sequence[Prompt], sample: int, length: int
) -> torch.Tensor:
    """Return the uniforms (B, length) of one sample per prompt, on the policy's device."""
    ids = [prompt.id for prompt in prompts]
    rows = uniforms(seed, stream, step, ids, [sample] * len(ids), length)
    return torch.from_numpy(rows).float().to(policy.device)


@torch.no_grad()
def sample_batches(
    policy: Policy,
    prompts: Sequence[Prompt],
    config: GenerationConfig,
    *,
    seed: int,
    stream: str,
    samples: int = 1,
    adapter: str | None = POLICY,
    skip: int = 0,
) -> Iterator[dict[int, list[str]]]:
    """Yield `samples` response texts for each prompt by its row, batch after batch; every prompt is encoded once.

    The first `skip` batches are left out.
    """
    for rows in length_sorted_batches([prompt.text for prompt in prompts], config.batch_size)[skip:]:
        batch = [prompts[row] for row in rows]
        encoded = policy.encode([prompt.text for prompt in batch], adapter)
        texts: dict[int, list[str]] = {row: [] for row in rows}
        for sample in range(samples):
            chances = draws(policy, seed, stream, 0, batch, sample, config.max_new_tokens)
            responses = policy.sample(encoded, chances, config.temperature, adapter)
            for row, text in zip(rows, policy.decode(responses), strict=True):
                texts[row].append(text)
        yield texts


def sample_texts(
    policy: Policy,
    prompts: Sequence[Prompt],
    config: GenerationConfig,
    *,
    seed: int,
    stream: str,
    samples: int = 1,
    adapter: str | None = POLICY,
) -> list[list[str]]:
    """Return `samples` response texts for each prompt."""
    texts: dict[int, list[str]] = {}
    for batch in sample_batches(policy, prompts, config, seed=seed, stream=stream, samples=samples, adapter=adapter):
        texts |= batch
    return [texts[row] for row in range(len(prompts))]


@torch.no_grad()
def require_agreement(policy: Policy, base: str) -> None:
    """Raise InputError unless sampling in a padded batch and scoring each text alone give the same log-probs.

    A model without a cache, or with its own way to count positions or look ahead, would learn from another's numbers.
    """
    texts = ["Thank you.", "Thank you, that is very kind of you. I wish you a good day."]
    prompts = [Prompt(id=text, text=text) for text in texts]
    sampled = policy.sample(policy.encode(texts), draws(policy, 0, "agreement", 0, prompts, 0, length=8), 1.0)
    gap = 0.0
    for row, text in enumerate(texts):
        alone, _, _ = policy.logprobs(policy.encode([text]), sampled.ids[row : row + 1], 1.0)
        gap = max(gap, float((alone[0] - sampled.logprobs[row])[sampled.response_mask[row]].abs().max()))
    rule = f"samples with log-probs up to {gap:.1g} nats off what it scores, so it cannot be trained here"
    bound = 0.1 if policy.model.dtype == torch.bfloat16 else 1e-3
    require(gap < bound, "policy.base", base, rule, "give a T5, BART, GPT-2 or Llama, for example")


def _ref_logprobs(
    policy: Policy, encoded: Encoded, prompts: Sequence[Prompt], ids: torch.Tensor, temperature: float
) -> torch.Tensor:
    if policy.train_encoder:  # the policy's encoder has moved away from the reference's
        encoded = policy.encode([prompt.text for prompt in prompts], policy.reference)
    return _scored(policy, encoded, ids, temperature, policy.reference)[0]


def rows_at_once(policy: Policy, length: int) -> int:
    """Return how many responses of `length` tokens one pass without a gradient reads."""
    words: int = policy.model.config.get_text_config().vocab_size
    return max(1, _LOGITS // (length * words))


def _scored(
    policy: Policy, encoded: Encoded, ids: torch.Tensor, temperature: float, adapter: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return teacher-forced log-probs (nats) and values, each (B, T), as many rows at once as keep logits small."""
    chunks = torch.arange(len(ids), device=ids.device).split(rows_at_once(policy, ids.shape[1]))
    parts = [policy.logprobs(encoded.select(rows), ids[rows], temperature, adapter) for rows in chunks]
    return torch.cat([logprobs for logprobs, _, _ in parts]), torch.cat([values for _, _, values in parts])


def _rescored(policy: Policy, encoded: Encoded, responses: Responses, temperature: float) -> Responses:
    logprobs, values = _scored(policy, encoded, responses.ids, temperature, POLICY)
    mask = responses.response_mask
    return replace(responses, logprobs=torch.where(mask, logprobs, 0.0), values=torch.where(mask, values, 0.0))


@torch.no_grad()
def collect(policy: Policy, prompts: list[Prompt], config: GenerationConfig, *, seed: int, step: int) -> Rollout:
    """Return one response per prompt with log-probs and values captured while sampling, and the reference's log-probs.

    Prompts come back sorted by length. With a frozen encoder the reference shares the policy's encoder states. A base
    in bfloat16 rounds otherwise while it samples than in the update, so there log-probs and values are computed again
    as the update will.
    """
    batches = length_sorted_batches([prompt.text for prompt in prompts], config.batch_size)
    ordered = [prompts[row] for rows in batches for row in rows]
    encoded = policy.encode([prompt.text for prompt in ordered])
    parts: list[Responses] = []
    ref_parts: list[torch.Tensor] = []
    for start in range(0, len(ordered), config.batch_size):
        rows = torch.arange(start, min(start + config.batch_size, len(ordered)), device=policy.device)
        shared = encoded.select(rows)
        batch = ordered[start : start + config.batch_size]
        chances = draws(policy, seed, "rollout", step, batch, 0, config.max_new_tokens)
        part = policy.sample(shared, chances, config.temperature)
        part = part.to_length(int(part.response_mask.sum(1).max()), policy.pad)
        if policy.model.dtype == torch.bfloat16:
            part = _rescored(policy, shared, part, config.temperature)
        parts.append(part)
        ref_parts.append(_ref_logprobs(policy, shared, batch, part.ids, config.temperature))
    responses = concatenate(parts, policy.pad)
    length = responses.ids.shape[1]
    ref = torch.cat([torch.nn.functional.pad(part, (0, length - part.shape[1])) for part in ref_parts])
    return Rollout(
        prompts=ordered,
        encoded=encoded,
        responses=responses,
        texts=policy.decode(responses),
        ref_logprobs=torch.where(responses.response_mask, ref, 0.0),
    )
