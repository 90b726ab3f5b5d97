"""How is a policy fine-tuned on reference texts?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from detoxrl.checkpoint import Checkpoints, trainable
from detoxrl.config import Config, SftConfig
from detoxrl.data.rows import Row
from detoxrl.errors import TrainingError
from detoxrl.policy.adapters import load_policy, start_of
from detoxrl.policy.backbone import load_base, load_tokenizer, save_base, scratch_base
from detoxrl.randomness import batch_indices, torch_seed
from detoxrl.tracking import progress

_IGNORED = -100


def fine_tune(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    config: SftConfig,
    seed: int,
    place: Path,
    on_step: Callable[[int, float], None],
) -> None:
    """Minimise the cross-entropy of the targets in (prompt, target) `pairs` over whatever weights are trainable.

    Linear warm-up to `config.lr`, then linear decay to 0. `on_step(done, loss)` gets the steps done and nats per token.
    Checkpoints go to `place`, and it goes on from what is there. Raises TrainingError when the loss is not finite.
    """
    device = model.device
    inputs, labels = examples(tokenizer, pairs, model.config.is_encoder_decoder)
    weights = trainable(model)
    optimizer = torch.optim.AdamW(weights.values(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    precision = autocast(device, config.bf16)
    checkpoints = Checkpoints(place, weights, optimizer)
    model.train()
    with checkpoints.stoppable():
        for step in range((checkpoints.restore() or {"step": 0})["step"], config.steps):
            checkpoints.point(step, {})
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min((step + 1) / (config.warmup_steps + 1), 1 - step / config.steps)
            rows = batch_indices(seed, "sft", step, config.batch_size, len(pairs))
            torch.manual_seed(torch_seed(seed, f"sft dropout {step}"))
            with precision:
                loss = model(**_batch(tokenizer, device, inputs, labels, rows)).loss
            if not loss.isfinite():
                raise TrainingError(f"sft stopped at step {step}: the loss is {loss.item()}; a lower sft.lr may help")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            on_step(step + 1, loss.item())
        checkpoints.point(config.steps, {})  # a stop in the last step finds its end kept too
    model.eval()


def examples(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], encoder_decoder: bool
) -> tuple[list[list[int]], list[list[int]]]:
    """Return input ids and labels of (prompt, target) pairs: apart for an encoder-decoder, in a row for a causal model.

    In a row the target is set off by a space, ends with EOS, and the prompt's labels do not count.
    """
    prompts = tokenizer([prompt for prompt, _ in pairs]).input_ids
    if encoder_decoder:
        return prompts, tokenizer([target for _, target in pairs]).input_ids
    spaced = [target if prompt[-1:].isspace() else f" {target}" for prompt, target in pairs]
    apart = tokenizer(spaced, add_special_tokens=False).input_ids
    joint = tokenizer([prompt + target for (prompt, _), target in zip(pairs, spaced, strict=True)]).input_ids
    # Tokenized alone some begin with a space of their own; what follows the very tokens of the prompt has none.
    targets = [j[len(p) :] if j[: len(p)] == p else a for p, j, a in zip(prompts, joint, apart, strict=True)]
    both = [(p, [*t, tokenizer.eos_token_id]) for p, t in zip(prompts, targets, strict=True)]
    return [p + t for p, t in both], [[_IGNORED] * len(p) + t for p, t in both]


def bf16_capable(device: torch.device) -> bool:
    """Return whether the hardware computes in bfloat16."""
    if device.type == "cpu":
        return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager[object]:
    """Return bfloat16 autocast when it is asked for and the hardware has it, else a context that does nothing."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 and bf16_capable(device) else nullcontext()


def _batch(
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    inputs: Sequence[list[int]],
    labels: Sequence[list[int]],
    rows: Sequence[int],
) -> dict[str, torch.Tensor]:
    ids = [torch.tensor(inputs[row]) for row in rows]
    mask = [torch.ones_like(row) for row in ids]
    wanted = [torch.tensor(labels[row]) for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id).to(device),
        "attention_mask": pad_sequence(mask, batch_first=True).to(device),
        "labels": pad_sequence(wanted, batch_first=True, padding_value=_IGNORED).to(device),
    }


def warm_start(config: Config, rows: Sequence[Row], folder: Path, place: Path, scratch_tokenizer: Path) -> None:
    """Fine-tune on the reference summaries and save to `folder`: a whole model with tokenizer, or a LoRA adapter.

    Checkpoints go to `place`.
    """
    pairs = [(row.prompt, row.summary) for row in rows if row.summary is not None]
    base = config.policy.base
    if not config.sft.full_weights:
        _tune_policy("warm start", config, config.sft, base, start_of(config.policy), pairs, folder, place)
        return
    if base == "scratch":
        tokenizer = load_tokenizer(str(scratch_tokenizer))
        model = scratch_base(tokenizer, config.seed)
    else:
        model, tokenizer = load_base(base)
    _tune("warm start", model.to(PartialState().device), tokenizer, pairs, config.sft, config.seed, place)
    save_base(model, tokenizer, folder)


def civil_baseline(
    config: Config, base: str, start: Path | None, rows: Sequence[Row], folder: Path, place: Path
) -> None:
    """Fine-tune the policy's weights from the same start on the civil references alone and save them to `folder`.

    Checkpoints go to `place`.
    """
    pairs = [(row.prompt, row.civil_reference) for row in rows if row.civil_reference]
    sft = replace(config.sft, steps=config.sft.baseline_steps, lr=config.sft.baseline_lr)
    _tune_policy("civil baseline", config, sft, base, start, pairs, folder, place)


def _tune_policy(
    what: str,
    config: Config,
    sft: SftConfig,
    base: str,
    start: Path | None,
    pairs: Sequence[tuple[str, str]],
    folder: Path,
    place: Path,
) -> None:
    policy = load_policy(base, start, config.policy, config.seed).to(PartialState().device)
    _tune(what, policy.model, policy.tokenizer, pairs, sft, config.seed, place)
    policy.save(folder)


def _tune(
    what: str,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    sft: SftConfig,
    seed: int,
    place: Path,
) -> None:
    with progress(what, sft.steps) as reach:
        fine_tune(model, tokenizer, pairs, sft, seed, place, lambda done, loss: reach(done, f"loss {loss:.3f}"))
