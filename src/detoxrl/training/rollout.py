"""How does a batch of prompts become a rollout, and how is it split into minibatches and over processes?"""

from collections.abc import Sequence
from itertools import chain

import torch
from torch.nn.functional import pad

from detoxrl.config.schema import Config, GenerationConfig
from detoxrl.models.groups import response_rows
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
    """Return the drawn samples of each prompt, with log-probs (and a critic's values) as sampled, and the reference's.

    Prompts come back sorted by length. Each is read once for its samples. With a frozen encoder the reference shares
    the policy's encoder states, and with `keep_cross` the update shares the keys and values of cross-attention.
    Log-probs are those by which the tokens were drawn. A base in bfloat16 rounds differently while it samples than in
    the update; the clipped ratio weighs that.
    `encoded` is what an earlier call with the same prompts encoded.
    """
    ordered = sorted_by_length(prompts)
    if encoded is None:
        encoded = policy.encode([prompt.text for prompt in ordered])
    if keep_cross:
        encoded = policy.with_shared_cross(encoded)

    parts: list[Responses] = []
    ref_parts: list[torch.Tensor] = []
    prompts_at_once = config.batch_size // len(draws.samples)
    for start in range(0, len(ordered), prompts_at_once):
        rows = slice(start, start + prompts_at_once)
        batch = ordered[rows]
        batch_encoded = encoded.row_slice(rows)
        if not keep_cross:
            batch_encoded = policy.with_shared_cross(batch_encoded)

        chances = draws.uniforms(policy, batch, config.max_new_tokens)
        responses = policy.sample(batch_encoded, chances, config.temperature)
        parts.append(responses)

        if policy.train_encoder:  # The policy's encoder differs from the reference's.
            batch_encoded = policy.encode([prompt.text for prompt in batch], policy.reference)
        scored = response_logprobs(policy, batch_encoded, responses, config.temperature, policy.reference)
        ref_parts.append(scored)

    responses = concatenate_responses(parts)
    length = responses.ids.shape[1]
    return Rollout(
        prompts=ordered,
        encoded=encoded,
        responses=responses,
        texts=policy.decode(responses),
        ref_logprobs=torch.cat(ref_parts)[:, :length].contiguous(),
    )


def minibatches(config: Config, step: int, epoch: int, number: int) -> list[list[int]]:
    """Return the prompts of each minibatch of a pass over a rollout of a number of prompts, shuffled by the seed.

    All responses to a prompt are in one minibatch. Within it prompts ascend: a rollout is sorted by length, so a
    microbatch then needs little padding.
    """
    order = permutation(config.seed, f"minibatches {epoch}", step, number)
    size = config.rl.minibatch_size // config.rl.responses_per_prompt
    return [sorted(order[start : start + size]) for start in range(0, number, size)]


def deal_prompts(minibatches: Sequence[Sequence[int]], processes: int) -> list[list[int]]:
    """Return the prompts of each process, ascending: of each minibatch, and in all, shares differ by at most one."""
    order = [prompt for minibatch in minibatches for prompt in minibatch]
    return [sorted(order[rank::processes]) for rank in range(processes)]


def join_rollouts(
    part: Rollout, prompts: list[Prompt], dealt: list[list[int]], world: World, policy: Policy
) -> Rollout:
    """Return the rollout of all prompts (sorted by length) in every process, each of which made its `dealt` prompts.

    What is encoded stays where it was made: it is by far the largest part, and no other process needs it.
    """
    if world.size == 1:
        return part

    device = part.ref_logprobs.device
    group_size = part.group_size
    order = response_rows(torch.tensor([prompt for of_process in dealt for prompt in of_process]), group_size).argsort()
    longest = max(world.gather(part.responses.ids.shape[1]))

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim == 2:
            tensor = pad(tensor, (0, longest - tensor.shape[1]))
        return torch.cat(world.gather(tensor.cpu()))[order].to(device)

    ours = part.responses
    mask = whole(ours.response_mask)
    responses = Responses(
        ids=whole(ours.ids).where(mask, policy.pad_token_id),
        response_mask=mask,
        logprobs=whole(ours.logprobs),
        values=None if ours.values is None else whole(ours.values),
        ended=whole(ours.ended),
    )
    responses = concatenate_responses([responses])
    texts = list(chain(*world.gather(part.texts)))
    length = responses.ids.shape[1]
    return Rollout(
        prompts=prompts,
        encoded=part.encoded,
        responses=responses,
        texts=[texts[index] for index in order.tolist()],
        ref_logprobs=whole(part.ref_logprobs)[:, :length].contiguous(),
        local_prompts=torch.tensor(dealt[world.rank], device=device),
    )
