"""How are prompts turned into responses?"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import chain

import torch
from torch.nn.functional import pad

from detoxrl import processes
from detoxrl.config import Config, GenerationConfig
from detoxrl.errors import require
from detoxrl.policy.policy import Policy
from detoxrl.policy.weights import POLICY
from detoxrl.randomness import permutation, uniforms
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
            chances = draws(policy, seed, stream, 0, batch, sample, config.max_new_tokens)
            found.append(policy.decode(policy.sample(encoded, chances, config.temperature, adapter)))
        texts = dict(zip(rows, map(list, zip(*found, strict=True)), strict=True))
        yield dict(chain(*(part.items() for part in processes.everyone(texts)))) if together else texts


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
    encoded: Encoded | None = None,
) -> Rollout:
    """Return one response per prompt with log-probs and values captured while sampling, and the reference's log-probs.

    Prompts come back sorted by length. With a frozen encoder the reference shares the policy's encoder states, and with
    `keep_cross` the update shares what cross-attention makes of them. Log-probs are those that tokens were drawn by: a
    base in bfloat16 rounds otherwise while it samples than in the update, and the clipped ratio weighs that. `encoded`
    is what an earlier call with the same prompts encoded.
    """
    ordered = sorted(prompts, key=lambda prompt: len(prompt.text))
    encoded = encoded or policy.encode([prompt.text for prompt in ordered])
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


def minibatches(config: Config, step: int, epoch: int, rows: int) -> list[list[int]]:
    """Return the rows of each minibatch of a pass, ascending: rollouts are sorted by length, so little is padded."""
    order, size = permutation(config.seed, f"minibatches {epoch}", step, rows), config.rl.minibatch_size
    return [sorted(order[start : start + size]) for start in range(0, rows, size)]


def deal(minibatches: Sequence[Sequence[int]], number: int) -> list[list[int]]:
    """Return the rows of each of `number` processes, ascending: of each minibatch, and in all, as many or one more."""
    order = [row for minibatch in minibatches for row in minibatch]
    return [sorted(order[rank::number]) for rank in range(number)]


def joined(
    part: Rollout, prompts: list[Prompt], dealt: list[list[int]], config: GenerationConfig, pad_id: int
) -> Rollout:
    """Return the rollout of all prompts (sorted by length) in every process, of which each made its `dealt` part.

    With one process that is all of it. What is encoded stays where it was made: it is by far the most, and no other
    process needs it.
    """
    if len(dealt) == 1:
        return part
    own, device = part.responses, part.ref_logprobs.device
    place = torch.tensor([row for rows in dealt for row in rows]).argsort()

    def whole(x: torch.Tensor) -> torch.Tensor:
        x = pad(x, (0, config.max_new_tokens - x.shape[1])) if x.ndim == 2 else x
        return torch.cat(processes.everyone(x.cpu()))[place].to(device)

    tensors = {f.name: whole(getattr(own, f.name)) for f in fields(Responses)}
    tensors["ids"] = tensors["ids"].where(tensors["response_mask"], pad_id)
    responses, texts = concatenate([Responses(**tensors)]), list(chain(*processes.everyone(part.texts)))
    return Rollout(
        prompts=prompts,
        encoded=part.encoded,
        responses=responses,
        texts=[texts[i] for i in place.tolist()],
        ref_logprobs=whole(part.ref_logprobs)[:, : responses.ids.shape[1]].contiguous(),
        mine=torch.tensor(processes.share(dealt)[0], device=device),
    )
