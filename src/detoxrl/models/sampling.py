"""How are prompts turned into responses?"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import torch

from detoxrl.config.schema import GenerationConfig
from detoxrl.errors import require
from detoxrl.models.policy import Policy
from detoxrl.models.types import Prompt
from detoxrl.models.weights import POLICY
from detoxrl.runtime import processes
from detoxrl.runtime.randomness import uniforms


def draw_uniforms(
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
    together: bool = False,
) -> Iterator[dict[int, list[str]]]:
    """Yield `samples` response texts for each prompt by its row, batch after batch; every prompt is encoded once.

    A batch is of prompts of like length, so that little is padded. The first `skip` prompts of that order are left out.
    `together` all processes sample a part of a batch that is larger by their number, and get the whole.
    """
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row].text))
    size = config.batch_size * (processes.count() if together else 1)
    for start in range(skip, len(order), size):
        rows = order[start : start + size]
        rows = processes.share(rows) if together else rows
        batch = [prompts[row] for row in rows]
        encoded, found = policy.shared(policy.encode([prompt.text for prompt in batch], adapter)), []
        for sample in range(samples):
            chances = draw_uniforms(policy, seed, stream, 0, batch, sample, config.max_new_tokens)
            found.append(policy.decode(policy.sample(encoded, chances, config.temperature, adapter)))
        texts = dict(zip(rows, map(list, zip(*found, strict=True)), strict=True))
        yield dict(chain(*(part.items() for part in processes.everyone(texts)))) if together else texts


def in_row_order(batches: Iterable[dict[int, list[str]]]) -> list[list[str]]:
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
    sampled = policy.sample(policy.encode(texts), draw_uniforms(policy, 0, "agreement", 0, prompts, 0, length=8), 1.0)
    gap = 0.0
    for row, text in enumerate(texts):
        alone, _, _ = policy.logprobs(policy.encode([text]), sampled.ids[row : row + 1], 1.0)
        gap = max(gap, float((alone[0] - sampled.logprobs[row])[sampled.response_mask[row]].abs().max()))
    rule = f"samples with log-probs up to {gap:.1g} nats off what it scores, so it cannot be trained here"
    bound = 0.1 if policy.model.dtype == torch.bfloat16 else 1e-3
    require(gap < bound, "policy.base", base, rule, "give a T5, BART, GPT-2 or Llama, for example")
