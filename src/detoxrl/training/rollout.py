"""How does a batch of prompts become a rollout?"""

from collections.abc import Sequence
from dataclasses import fields
from itertools import chain

import torch
from torch.nn.functional import pad

from detoxrl.config.schema import Config, GenerationConfig
from detoxrl.models.policy import Policy
from detoxrl.models.sampling import draw_uniforms
from detoxrl.models.types import Encoded, Prompt, Responses, Rollout, concatenate_responses
from detoxrl.runtime import processes
from detoxrl.runtime.randomness import permutation


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
        found[rows, :length], _, _ = policy.logprobs(encoded.row_slice(rows), ids, temperature, adapter, mask)
    return found


@torch.no_grad()
def collect_rollout(
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
        batch, shared = ordered[rows], encoded.row_slice(rows)
        shared = shared if keep_cross else policy.shared(shared)
        chances = draw_uniforms(policy, seed, stream, step, batch, 0, config.max_new_tokens)
        part = policy.sample(shared, chances, config.temperature)
        parts.append(part)
        if policy.train_encoder:  # the policy's encoder has moved away from the reference's
            shared = policy.encode([prompt.text for prompt in batch], policy.reference)
        ref[rows] = _scored(policy, shared, part, config.temperature, policy.reference)
    responses = concatenate_responses(parts)
    ref, texts = ref[:, : responses.ids.shape[1]].contiguous(), policy.decode(responses)
    return Rollout(prompts=ordered, encoded=encoded, responses=responses, texts=texts, ref_logprobs=ref)


def minibatches(config: Config, step: int, epoch: int, rows: int) -> list[list[int]]:
    """Return the rows of each minibatch of a pass, ascending: rollouts are sorted by length, so little is padded."""
    order, size = permutation(config.seed, f"minibatches {epoch}", step, rows), config.rl.minibatch_size
    return [sorted(order[start : start + size]) for start in range(0, rows, size)]


def deal_rows(minibatches: Sequence[Sequence[int]], number: int) -> list[list[int]]:
    """Return the rows of each of `number` processes, ascending: of each minibatch, and in all, as many or one more."""
    order = [row for minibatch in minibatches for row in minibatch]
    return [sorted(order[rank::number]) for rank in range(number)]


def join_rollouts(
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
    responses, texts = concatenate_responses([Responses(**tensors)]), list(chain(*processes.everyone(part.texts)))
    return Rollout(
        prompts=prompts,
        encoded=part.encoded,
        responses=responses,
        texts=[texts[i] for i in place.tolist()],
        ref_logprobs=whole(part.ref_logprobs)[:, : responses.ids.shape[1]].contiguous(),
        mine=torch.tensor(processes.share(dealt)[0], device=device),
    )
