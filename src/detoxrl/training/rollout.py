"""How does a batch of prompts become a rollout, and how is it split into minibatches and over processes?"""

from collections.abc import Sequence
from dataclasses import fields
from itertools import chain

import torch
from torch.nn.functional import pad

from detoxrl.config.schema import Config, GenerationConfig
from detoxrl.models.policy import Policy
from detoxrl.models.sampling import Draws, response_logprobs
from detoxrl.models.types import Encoded, Prompt, Responses, Rollout, concatenate_responses
from detoxrl.runtime.randomness import permutation
from detoxrl.runtime.world import World


def sorted_by_length(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts from the shortest text to the longest, so that a batch of neighbours needs little padding."""
    return sorted(prompts, key=lambda prompt: len(prompt.text))


@torch.no_grad()
def collect_rollout(
    policy: Policy,
    prompts: Sequence[Prompt],
    config: GenerationConfig,
    draws: Draws,
    keep_cross: bool = True,
    encoded: Encoded | None = None,
) -> Rollout:
    """Return one response per prompt with log-probs and values captured while sampling, and the reference's log-probs.

    Prompts come back sorted by length. With a frozen encoder the reference shares the policy's encoder states, and with
    `keep_cross` the update shares the keys and values of cross-attention. Log-probs are those by which the tokens were
    drawn. A base in bfloat16 rounds differently while it samples than in the update; the clipped ratio weighs that.
    `encoded` is what an earlier call with the same prompts encoded.
    """
    ordered = sorted_by_length(prompts)
    if encoded is None:
        encoded = policy.encode([prompt.text for prompt in ordered])
    if keep_cross:
        encoded = policy.with_shared_cross(encoded)

    parts: list[Responses] = []
    ref_logprobs = torch.zeros(len(ordered), config.max_new_tokens, device=policy.device)
    for start in range(0, len(ordered), config.batch_size):
        rows = slice(start, start + config.batch_size)
        batch = ordered[rows]
        batch_encoded = encoded.row_slice(rows)
        if not keep_cross:
            batch_encoded = policy.with_shared_cross(batch_encoded)

        chances = draws.uniforms(policy, batch, sample=0, length=config.max_new_tokens)
        responses = policy.sample(batch_encoded, chances, config.temperature)
        parts.append(responses)

        if policy.train_encoder:  # The policy's encoder differs from the reference's.
            batch_encoded = policy.encode([prompt.text for prompt in batch], policy.reference)
        ref_logprobs[rows] = response_logprobs(policy, batch_encoded, responses, config.temperature, policy.reference)

    responses = concatenate_responses(parts)
    length = responses.ids.shape[1]
    return Rollout(
        prompts=ordered,
        encoded=encoded,
        responses=responses,
        texts=policy.decode(responses),
        ref_logprobs=ref_logprobs[:, :length].contiguous(),
    )


def minibatches(config: Config, step: int, epoch: int, rows: int) -> list[list[int]]:
    """Return the rows of each minibatch of a pass over a rollout, shuffled by the seed.

    Within a minibatch rows ascend: a rollout is sorted by length, so a microbatch then needs little padding.
    """
    order = permutation(config.seed, f"minibatches {epoch}", step, rows)
    size = config.rl.minibatch_size
    return [sorted(order[start : start + size]) for start in range(0, rows, size)]


def deal_rows(minibatches: Sequence[Sequence[int]], processes: int) -> list[list[int]]:
    """Return the rows of each process, ascending: of each minibatch, and in all, shares differ by at most one row."""
    order = [row for minibatch in minibatches for row in minibatch]
    return [sorted(order[rank::processes]) for rank in range(processes)]


def join_rollouts(
    part: Rollout, prompts: list[Prompt], dealt: list[list[int]], world: World, policy: Policy
) -> Rollout:
    """Return the rollout of all prompts (sorted by length) in every process, each of which made its `dealt` part.

    What is encoded stays where it was made: it is by far the largest part, and no other process needs it.
    """
    if world.size == 1:
        return part

    device = part.ref_logprobs.device
    order = torch.tensor([row for rows in dealt for row in rows]).argsort()
    longest = max(world.gather(part.responses.ids.shape[1]))

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim == 2:
            tensor = pad(tensor, (0, longest - tensor.shape[1]))
        return torch.cat(world.gather(tensor.cpu()))[order].to(device)

    tensors = {field.name: whole(getattr(part.responses, field.name)) for field in fields(Responses)}
    tensors["ids"] = tensors["ids"].where(tensors["response_mask"], policy.pad_token_id)
    texts = list(chain(*world.gather(part.texts)))
    responses = concatenate_responses([Responses(**tensors)])
    length = responses.ids.shape[1]
    return Rollout(
        prompts=prompts,
        encoded=part.encoded,
        responses=responses,
        texts=[texts[index] for index in order.tolist()],
        ref_logprobs=whole(part.ref_logprobs)[:, :length].contiguous(),
        local_rows=torch.tensor(dealt[world.rank], device=device),
    )
