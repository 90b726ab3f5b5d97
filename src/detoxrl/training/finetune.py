"""How is a model fine-tuned on pairs of a prompt and a target?"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from detoxrl.config.schema import Config, SftConfig
from detoxrl.errors import TrainingError
from detoxrl.models.chat import end_of_turn_id, uses_chat_template
from detoxrl.runtime.checkpoint import Checkpoints, trainable
from detoxrl.runtime.randomness import batch_indices, torch_seed

Pairs = Sequence[tuple[str, str]]
"""A prompt and its target each."""

# The label that cross-entropy leaves out.
_IGNORED = -100


def fine_tune(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    config: Config,
    checkpoint_folder: Path,
) -> Iterator[tuple[int, float]]:
    """Minimise the cross-entropy of the targets over the trainable weights; yield steps done and loss (nats a token).

    The learning rate rises linearly to `sft.lr`, then falls linearly to 0. Resumes from `checkpoint_folder`. Raises
    TrainingError when the loss is not finite.
    """
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
            batch = pad_batch(tokenizer.pad_token_id, batch_inputs, batch_labels, device)

            torch.manual_seed(torch_seed(config.seed, f"sft dropout {step}"))
            loss = loss_of(model, batch, use_bf16)
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

    An encoder-decoder reads the prompt and writes the target. A causal model reads both in one sequence: the target
    follows a space, ends with EOS, and the labels of the prompt are ignored. `in_chat` says that prompts went through a
    chat template, so they hold their special tokens; a target then ends as a turn of the assistant does.
    """
    special = not in_chat
    prompts = tokenizer([prompt for prompt, _ in pairs], add_special_tokens=special).input_ids
    if encoder_decoder:
        # Some tokenizers write another language than they read: a Marian has two vocabularies, an mBART two languages.
        return prompts, tokenizer(text_target=[target for _, target in pairs]).input_ids

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
        labels.append([_IGNORED] * len(prompt_ids) + response)
    return inputs, labels


def pad_batch(
    pad_id: int, inputs: list[list[int]], labels: list[list[int]], device: torch.device
) -> dict[str, torch.Tensor]:
    """Return the arguments of a model's forward pass, each (B, T), padded on the right."""

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        tensors = [torch.tensor(row) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=value).to(device)

    mask = padded([[1] * len(row) for row in inputs], 0)
    return {"input_ids": padded(inputs, pad_id), "attention_mask": mask, "labels": padded(labels, _IGNORED)}


def loss_of(model: PreTrainedModel | PeftModel, batch: dict[str, torch.Tensor], bf16: bool) -> torch.Tensor:
    """Return the mean cross-entropy (nats) of the labels of a batch that `pad_batch` made.

    A causal model computes no logits before the first label of the batch: prompts are longer than targets, and logits
    are the largest tensors.
    """
    arguments: dict[str, Any] = {**batch, "use_cache": False}
    if not model.config.is_encoder_decoder:
        has_label = (batch["labels"] != _IGNORED).any(0)
        first = int(has_label.nonzero()[0])
        # The token before it predicts it.
        predicting = batch["labels"].shape[1] - first + 1
        arguments["logits_to_keep"] = predicting
        arguments["labels"] = batch["labels"][:, -predicting:]

    device = batch["labels"].device
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        loss: torch.Tensor = model(**arguments).loss
    return loss


def bf16_capable(device: torch.device) -> bool:
    """Return whether the hardware computes in bfloat16."""
    if device.type == "cpu":
        return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
