"""How does a policy learn from pairs of a better and a worse response to a prompt?"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from detoxrl.config.schema import Config, SftConfig
from detoxrl.errors import TrainingError
from detoxrl.models.policy import Policy
from detoxrl.models.sampling import Response
from detoxrl.rl.losses import dpo_loss
from detoxrl.runtime.checkpoint import Checkpoints, trainable
from detoxrl.runtime.randomness import batch_indices
from detoxrl.training.own_samples import OwnSamples

BETA = 0.1
"""How strongly the reference holds the policy back; the value of Rafailov et al. 2023, appendix B."""
# The learning rate, as a share of that of the supervised baselines: their own breaks the quickstart's policy, and less
# than half hardly moves it (docs/log.md).
LR_SHARE = 0.5


class PreferencePair(NamedTuple):
    """The best and the worst of the initial policy's responses to a prompt."""

    prompt: str
    best: Response
    worst: Response


def preference_pairs(samples: Sequence[OwnSamples]) -> list[PreferencePair]:
    """Return the best and the worst sample of each prompt whose samples differ in score and in text."""
    pairs = []
    for own in samples:
        best = own.best.response
        worst = own.worst.response
        # Where all scores are equal, both are the first sample.
        if best.text != worst.text:
            pairs.append(PreferencePair(own.prompt, best, worst))
    return pairs


def pairs_per_step(sft: SftConfig) -> int:
    """Return the number of pairs of an optimizer step: as many responses as the other baselines read targets."""
    return max(1, sft.batch_size // 2)


def learn_preferences(
    policy: Policy, pairs: Sequence[PreferencePair], config: Config, checkpoint_folder: Path
) -> Iterator[tuple[int, float]]:
    """Minimise the DPO loss of the pairs over the policy's trainable weights; yield steps done and the loss of a pair.

    The learning rate falls linearly from half of `sft.baseline_lr` to 0. Resumes from `checkpoint_folder`. Raises
    TrainingError when the loss is not finite.
    """
    rl = config.rl
    steps = config.sft.baseline_steps
    weights = trainable(policy.model)
    peak = LR_SHARE * config.sft.baseline_lr
    optimizer = torch.optim.AdamW(weights.values(), lr=peak, eps=1e-5, weight_decay=0.0)
    checkpoints = Checkpoints(checkpoint_folder, weights, optimizer)

    with checkpoints.stoppable():
        restored = checkpoints.restore() or {"step": 0}
        for step in range(restored["step"], steps):
            checkpoints.point(step, {})
            for group in optimizer.param_groups:
                group["lr"] = peak * (1 - step / steps)

            rows = batch_indices(config.seed, "dpo", step, pairs_per_step(config.sft), len(pairs))
            loss = _backward(policy, [pairs[row] for row in rows], config)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"sft stopped at step {step} of DPO: the loss is {loss}; a lower sft.baseline_lr may help"
                )

            torch.nn.utils.clip_grad_norm_(weights.values(), rl.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            yield step + 1, loss
        checkpoints.point(steps, {})  # So that a stop in the last step keeps its end too.


def _backward(policy: Policy, pairs: Sequence[PreferencePair], config: Config) -> float:
    """Add the gradient of the mean loss of the pairs, and return that loss.

    A pass reads no more responses than one of an update in RL, but at least a pair.
    """
    at_once = max(1, (config.rl.microbatch_size or config.rl.minibatch_size) // 2)
    ordered = sorted(pairs, key=lambda pair: len(pair.prompt))  # A pass over neighbours needs little padding.

    total = 0.0
    for start in range(0, len(ordered), at_once):
        part = ordered[start : start + at_once]
        loss = preference_loss(policy, part, config.generation.temperature) / len(pairs)
        loss.backward()
        total += loss.item()
    return total


def preference_loss(policy: Policy, pairs: Sequence[PreferencePair], temperature: float) -> torch.Tensor:
    """Return the DPO loss summed over pairs, a scalar.

    The policy reads the token ids that were sampled. The reference is the initial policy, under which they were drawn.
    """
    responses = [response for pair in pairs for response in (pair.best, pair.worst)]
    rows = [torch.tensor(response.ids) for response in responses]
    ids = pad_sequence(rows, batch_first=True, padding_value=policy.pad_token_id).to(policy.device)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).bool().to(policy.device)
    initial = torch.tensor([response.logprob for response in responses], device=policy.device)

    encoded = policy.with_shared_cross(policy.encode([pair.prompt for pair in pairs]))
    logprobs = policy.logprobs(encoded, ids, temperature, mask=mask).logprobs.sum(1)
    best, worst = (logprobs - initial).view(-1, 2).unbind(1)
    return dpo_loss(best, worst, BETA)
