"""How is a model fine-tuned on pairs of a prompt and a target?"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from detoxrl.config.schema import Config, SftConfig
from detoxrl.errors import TrainingError
from detoxrl.models.chat import end_of_turn_id, uses_chat_template
from detoxrl.models.kernels import kernels
from detoxrl.models.policy import Policy
from detoxrl.models.types import Encoded
from detoxrl.runtime.checkpoint import Checkpoints, trainable
from detoxrl.runtime.randomness import batch_indices, torch_seed

Pairs = Sequence[tuple[str, str]]
"""A prompt and its target each."""

IGNORED = -100
"""The label that cross-entropy leaves out."""


class Tuned(NamedTuple):
    """What is fine-tuned: a model with its tokenizer, and the policy whose weights these are, if they are one's."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    policy: Policy | None = None

    @classmethod
    def of(cls, policy: Policy) -> Self:
        """Return the weights of a policy as what is fine-tuned."""
        return cls(policy.model, policy.tokenizer, policy)

    @property
    def fast_policy(self) -> Policy | None:
        """The policy, if its fast network can be fine-tuned.

        That of an encoder-decoder cannot: T5 is fine-tuned with dropout, which the network leaves out. It also leaves
        out the dropout of a LoRA, if an adapter has some, as RL does.
        """
        if self.policy is None or self.policy.has_encoder or not self.policy.has_fast_network:
            return None
        return self.policy


def fine_tune(tuned: Tuned, pairs: Pairs, config: Config, checkpoint_folder: Path) -> Iterator[tuple[int, float]]:
    """Minimise the cross-entropy of the targets over the trainable weights; yield steps done and loss (nats a token).

    The learning rate rises linearly to `sft.lr`, then falls linearly to 0. Resumes from `checkpoint_folder`. Raises
    TrainingError when the loss is not finite.
    """
    model, tokenizer, _ = tuned
    device = model.device
    sft = config.sft
    use_bf16 = sft.bf16 and bf16_capable(device)
    in_chat = uses_chat_template(config.data, tokenizer)
    inputs, labels = examples(tokenizer, pairs, model.config.is_encoder_decoder, in_chat)
    weights = trainable(model)
    optimizer = torch.optim.AdamW(weights.values(), lr=sft.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    checkpoints = Checkpoints(checkpoint_folder, weights, optimizer)

    model.train()
    with checkpoints.stoppable():
        restored = checkpoints.restore() or {"step": 0}
        for step in range(restored["step"], sft.steps):
            checkpoints.point(step, {})
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(sft, step)

            rows = batch_indices(config.seed, "sft", step, sft.batch_size, len(pairs))
            batch_inputs = [inputs[row] for row in rows]
            batch_labels = [labels[row] for row in rows]

            torch.manual_seed(torch_seed(config.seed, f"sft dropout {step}"))
            loss = loss_of(tuned, batch_inputs, batch_labels, use_bf16)
            if not loss.isfinite():
                raise TrainingError(f"sft stopped at step {step}: the loss is {loss.item()}; a lower sft.lr may help")

            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield step + 1, loss.item()
        checkpoints.point(sft.steps, {})  # So that a stop in the last step keeps its end too.
    model.eval()


def _learning_rate(config: SftConfig, step: int) -> float:
    warmup = (step + 1) / (config.warmup_steps + 1)
    decay = 1 - step / config.steps
    return config.lr * min(warmup, decay)


def examples(
    tokenizer: PreTrainedTokenizerBase, pairs: Pairs, encoder_decoder: bool, in_chat: bool = False
) -> tuple[list[list[int]], list[list[int]]]:
    """Return input ids and labels of (prompt, target) pairs.

    A target ends with EOS, whether the tokenizer adds it or not: a response that never ends cannot be learnt from. An
    encoder-decoder reads the prompt and writes the target. A causal model reads both in one sequence: the target
    follows a space, and the labels of the prompt are ignored. `in_chat` says that prompts went through a
    chat template, so they hold their special tokens; a target then ends as a turn of the assistant does.
    """
    special = not in_chat
    prompts = tokenizer([prompt for prompt, _ in pairs], add_special_tokens=special).input_ids
    if encoder_decoder:
        # Some tokenizers write another language than they read: a Marian has two vocabularies, an mBART two languages.
        targets = tokenizer(text_target=[target for _, target in pairs]).input_ids
        eos = tokenizer.eos_token_id
        return prompts, [ids if eos in ids else [*ids, eos] for ids in targets]

    spaced = [target if prompt[-1:].isspace() else f" {target}" for prompt, target in pairs]
    alone = tokenizer(spaced, add_special_tokens=False).input_ids
    whole = [prompt + target for (prompt, _), target in zip(pairs, spaced, strict=True)]
    together = tokenizer(whole, add_special_tokens=special).input_ids
    end_of_turn = end_of_turn_id(tokenizer) if in_chat else None
    end = tokenizer.eos_token_id if end_of_turn is None else end_of_turn

    inputs = []
    labels = []
    for prompt_ids, ids, target_ids in zip(prompts, together, alone, strict=True):
        # Some tokenizers put a space of their own before a text that is tokenized alone. What follows the prompt's own
        # tokens has none.
        if ids[: len(prompt_ids)] == prompt_ids:
            target_ids = ids[len(prompt_ids) :]
        response = [*target_ids, end]
        inputs.append(prompt_ids + response)
        labels.append([IGNORED] * len(prompt_ids) + response)
    return inputs, labels


def loss_of(tuned: Tuned, inputs: list[list[int]], labels: list[list[int]], bf16: bool) -> torch.Tensor:
    """Return the mean cross-entropy (nats) of the labels of a batch, as `examples` makes them."""
    device = tuned.model.device
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        fast = tuned.fast_policy
        if fast is not None:
            return _loss_through_network(fast, inputs, labels)

        batch = pad_batch(tuned.tokenizer.pad_token_id, inputs, labels, device)
        return _loss_of_model(tuned.model, batch)


def _loss_through_network(policy: Policy, inputs: list[list[int]], labels: list[list[int]]) -> torch.Tensor:
    """Return the loss by the policy's fast network, which has no row for padding and no logits of a prompt."""
    prompts = []
    targets = []
    for row, row_labels in zip(inputs, labels, strict=True):
        start = row_labels.count(IGNORED)
        prompts.append(row[:start])
        targets.append(row[start:])

    ids = _padded(prompts, policy.pad_token_id, "left").to(policy.device)
    prompt_mask = _padded([[1] * len(row) for row in prompts], 0, "left").to(policy.device)
    target_ids = _padded(targets, policy.pad_token_id).to(policy.device)
    mask = _padded([[1] * len(row) for row in targets], 0).bool().to(policy.device)
    scored = policy.logprobs(Encoded(states=ids, mask=prompt_mask), target_ids, temperature=1.0, mask=mask)
    return -scored.logprobs.sum() / mask.sum()


def pad_batch(
    pad_id: int, inputs: list[list[int]], labels: list[list[int]], device: torch.device
) -> dict[str, torch.Tensor]:
    """Return the arguments of a model's forward pass, each (B, T), padded on the right."""
    return {
        "input_ids": _padded(inputs, pad_id).to(device),
        "attention_mask": _padded([[1] * len(row) for row in inputs], 0).to(device),
        "labels": _padded(labels, IGNORED).to(device),
    }


def _padded(rows: list[list[int]], value: int, side: str = "right") -> torch.Tensor:
    tensors = [torch.tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


def _loss_of_model(model: PreTrainedModel | PeftModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the loss by the model's own forward pass on a batch that `pad_batch` made.

    A causal model computes no logits before the first label of the batch: prompts are longer than targets, and logits
    are the largest tensors.
    """
    arguments: dict[str, Any] = {**batch, "use_cache": False}
    if not model.config.is_encoder_decoder:
        has_label = (batch["labels"] != IGNORED).any(0)
        first = int(has_label.nonzero()[0])
        # The token before it predicts it.
        predicting = batch["labels"].shape[1] - first + 1
        arguments["logits_to_keep"] = predicting
        arguments["labels"] = batch["labels"][:, -predicting:]

    loss: torch.Tensor = model(**arguments).loss
    return loss


def bf16_capable(device: torch.device) -> bool:
    """Return whether the hardware computes in bfloat16."""
    if device.type == "cpu":
        return kernels().bf16
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
