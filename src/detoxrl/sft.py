"""How is a policy fine-tuned on reference texts?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from accelerate import PartialState
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from detoxrl.config import Config, SftConfig
from detoxrl.data.rows import Row
from detoxrl.errors import TrainingError
from detoxrl.policy.adapters import load_policy
from detoxrl.policy.backbone import load_base, load_tokenizer, save_base, scratch_base
from detoxrl.randomness import batch_indices, torch_seed
from detoxrl.tracking import progress

_IGNORED = -100


def fine_tune(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    config: SftConfig,
    steps: int,
    lr: float,
    seed: int,
    on_step: Callable[[float], None],
) -> None:
    """Minimise the cross-entropy of the targets in (prompt, target) `pairs` over whatever weights are trainable.

    Linear warm-up to `lr`, then linear decay to 0. `on_step(loss)` gets nats per token after each step.
    Raises TrainingError when the loss is not finite.
    """
    device = next(model.parameters()).device
    prompts = tokenizer([prompt for prompt, _ in pairs]).input_ids
    targets = tokenizer([target for _, target in pairs]).input_ids
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    precision = autocast(device, config.bf16)
    model.train()
    torch.manual_seed(torch_seed(seed, "sft dropout"))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / (config.warmup_steps + 1), 1 - step / steps)
        rows = batch_indices(seed, "sft", step, config.batch_size, len(pairs))
        with precision:
            loss = model(**_batch(tokenizer, device, prompts, targets, rows)).loss
        if not loss.isfinite():
            raise TrainingError(f"sft stopped at step {step}: the loss is {loss.item()}; a lower sft.lr may help")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        on_step(loss.item())
    model.eval()


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager[object]:
    """Return bfloat16 autocast when it is asked for and the hardware has it, else a context that does nothing."""
    if device.type == "cpu":
        capable = torch.cpu.get_capabilities().get("avx512_bf16", False)
    else:
        capable = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16) if bf16 and capable else nullcontext()


def _batch(
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    prompts: Sequence[list[int]],
    targets: Sequence[list[int]],
    rows: Sequence[int],
) -> dict[str, torch.Tensor]:
    ids = [torch.tensor(prompts[row]) for row in rows]
    mask = [torch.ones_like(row) for row in ids]
    labels = [torch.tensor(targets[row]) for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id).to(device),
        "attention_mask": pad_sequence(mask, batch_first=True).to(device),
        "labels": pad_sequence(labels, batch_first=True, padding_value=_IGNORED).to(device),
    }


def warm_start(config: Config, rows: Sequence[Row], folder: Path, scratch_tokenizer: Path) -> None:
    """Fine-tune on the reference summaries and save to `folder`: a whole model with tokenizer, or a LoRA adapter."""
    pairs = [(row.prompt, row.summary) for row in rows if row.summary is not None]
    base = config.policy.base
    if not config.sft.full_weights:
        _train_adapter(config, base, _starting_adapter(config), pairs, "warm start", folder)
        return
    if base == "scratch":
        tokenizer = load_tokenizer(str(scratch_tokenizer))
        model = scratch_base(tokenizer, config.seed)
    else:
        model, tokenizer = load_base(base)
    _fine_tune_showing(model.to(PartialState().device), tokenizer, pairs, config, "warm start")
    save_base(model, tokenizer, folder)


def civil_baseline(config: Config, base: str, start: Path | None, rows: Sequence[Row], folder: Path) -> None:
    """Fine-tune a LoRA adapter from the same start on the civil references alone and save it to `folder`."""
    pairs = [(row.prompt, row.civil_reference) for row in rows if row.civil_reference]
    _train_adapter(config, base, start, pairs, "civil baseline", folder)


def _starting_adapter(config: Config) -> Path | None:
    return Path(config.policy.adapter) if config.policy.adapter else None


def _train_adapter(
    config: Config, base: str, start: Path | None, pairs: Sequence[tuple[str, str]], what: str, folder: Path
) -> None:
    policy = load_policy(base, start, config.policy, config.seed).to(PartialState().device)
    _fine_tune_showing(policy.model, policy.tokenizer, pairs, config, what)
    policy.save_adapter(folder)


def _fine_tune_showing(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    config: Config,
    what: str,
) -> None:
    warm = what == "warm start"
    steps = config.sft.steps if warm else config.sft.baseline_steps
    lr = config.sft.lr if warm else config.sft.baseline_lr
    with progress(what, steps) as advance:
        fine_tune(model, tokenizer, pairs, config.sft, steps, lr, config.seed, lambda loss: advance(f"loss {loss:.3f}"))
