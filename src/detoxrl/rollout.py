"""How are prompts turned into responses?"""

from collections.abc import Iterable, Iterator, Sequence

import torch

from detoxrl.config import GenerationConfig
from detoxrl.errors import require
from detoxrl.policy.policy import Policy
from detoxrl.policy.weights import POLICY
from detoxrl.randomness import uniforms
from detoxrl.records import Encoded, Prompt, Responses, Rollout, concatenate


def draws(
    policy: Policy, seed: int, stream: str, step: int, prompts: Sequence[Prompt], sample: int, length: int
) -> torch.Tensor:
    """Return the uniforms (B, length) of one sample per prompt, on the policy's device."""
    rows = uniforms(seed, stream, step, [prompt.id for prompt in prompts], sample, length)
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

    A batch is of prompts of like length, so that little is padded. The first `skip` batches are left out.
    """
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row].text))
    for start in range(skip * config.batch_size, len(order), config.batch_size):
        rows = order[start : start + config.batch_size]
        batch = [prompts[row] for row in rows]
        encoded, found = policy.shared(policy.encode([prompt.text for prompt in batch], adapter)), []
        for sample in range(samples):
            chances = draws(policy, seed, stream, 0, batch, sample, config.max_new_tokens)
            found.append(policy.decode(policy.sample(encoded, chances, config.temperature, adapter)))
        yield {row: list(texts) for row, texts in zip(rows, zip(*found, strict=True), strict=True)}


def by_row(batches: Iterable[dict[int, list[str]]]) -> list[list[str]]:
    """Return what `sample_batches` yields in the order of the prompts."""
    texts = {row: found for batch in batches for row, found in batch.items()}
    return [texts[row] for row in range(len(texts))]


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


def _scored(
    policy: Policy, encoded: Encoded, responses: Responses, temperature: float, adapter: str | None
) -> torch.Tensor:
    """Return teacher-forced log-probs (nats) (B, T), as many rows at once as keep logits small."""
    length = int(responses.response_mask.sum(1).max())
    found = torch.zeros(responses.ids.shape, device=policy.device)
    size = policy.rows_at_once(length)
    for start in range(0, len(responses.ids), size):
        rows = slice(start, start + size)
        ids, mask = responses.ids[rows, :length], responses.response_mask[rows, :length]
        found[rows, :length], _, _ = policy.logprobs(encoded.between(rows), ids, temperature, adapter, mask)
    return found


@torch.no_grad()
def collect(
    policy: Policy,
    prompts: list[Prompt],
    config: GenerationConfig,
    *,
    seed: int,
    step: int,
    stream: str = "rollout",
    keep_cross: bool = True,
) -> Rollout:
    """Return one response per prompt with log-probs and values captured while sampling, and the reference's log-probs.

    Prompts come back sorted by length. With a frozen encoder the reference shares the policy's encoder states, and with
    `keep_cross` the update shares what cross-attention makes of them. Log-probs are those that tokens were drawn by: a
    base in bfloat16 rounds otherwise while it samples than in the update, and the clipped ratio weighs that.
    """
    ordered = sorted(prompts, key=lambda prompt: len(prompt.text))
    encoded = policy.encode([prompt.text for prompt in ordered])
    encoded = policy.shared(encoded) if keep_cross else encoded
    parts: list[Responses] = []
    ref = torch.zeros(len(ordered), config.max_new_tokens, device=policy.device)
    for start in range(0, len(ordered), config.batch_size):
        rows = slice(start, start + config.batch_size)
        batch, shared = ordered[rows], encoded.between(rows)
        shared = shared if keep_cross else policy.shared(shared)
        chances = draws(policy, seed, stream, step, batch, 0, config.max_new_tokens)
        part = policy.sample(shared, chances, config.temperature)
        parts.append(part)
        if policy.train_encoder:  # the policy's encoder has moved away from the reference's
            shared = policy.encode([prompt.text for prompt in batch], policy.reference)
        ref[rows] = _scored(policy, shared, part, config.temperature, policy.reference)
    responses = concatenate(parts)
    ref, texts = ref[:, : responses.ids.shape[1]].contiguous(), policy.decode(responses)
    return Rollout(prompts=ordered, encoded=encoded, responses=responses, texts=texts, ref_logprobs=ref)
