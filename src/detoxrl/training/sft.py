"""How is a policy fine-tuned on reference texts?"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from detoxrl.config.schema import Config, SftConfig
from detoxrl.data.rows import Row, to_prompts
from detoxrl.errors import TrainingError
from detoxrl.models.loading import load_base, load_tokenizer, save_base, scratch_base
from detoxrl.models.lora import initial_adapter, load_policy
from detoxrl.models.policy import Policy
from detoxrl.models.sampling import in_row_order, sample_batches
from detoxrl.rewards.shaping import Reward, is_wordless
from detoxrl.runtime.checkpoint import Checkpoints, trainable
from detoxrl.runtime.console import log, progress
from detoxrl.runtime.randomness import batch_indices, permutation, torch_seed

_IGNORED = -100
OF = 4  # Of so many responses the second baseline learns the best.
Pairs = Sequence[tuple[str, str]]  # A prompt and its target each.


def fine_tune(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    config: SftConfig,
    seed: int,
    place: Path,
    on_step: Callable[[int, float], None],
) -> None:
    """Minimise the cross-entropy of the targets in (prompt, target) `pairs` over whatever weights are trainable.

    Linear warm-up to `config.lr`, then linear decay to 0. `on_step(done, loss)` gets the steps done and nats per token.
    Checkpoints go to `place`, and it goes on from what is there. Raises TrainingError when the loss is not finite.
    """
    device, bf16 = model.device, config.bf16 and bf16_capable(model.device)
    inputs, labels = examples(tokenizer, pairs, model.config.is_encoder_decoder)
    weights = trainable(model)
    optimizer = torch.optim.AdamW(weights.values(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    checkpoints = Checkpoints(place, weights, optimizer)
    model.train()
    with checkpoints.stoppable():
        for step in range((checkpoints.restore() or {"step": 0})["step"], config.steps):
            checkpoints.point(step, {})
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min((step + 1) / (config.warmup_steps + 1), 1 - step / config.steps)
            rows = batch_indices(seed, "sft", step, config.batch_size, len(pairs))
            batch = _batch(tokenizer.pad_token_id, [inputs[i] for i in rows], [labels[i] for i in rows], device)
            torch.manual_seed(torch_seed(seed, f"sft dropout {step}"))
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = model(**batch).loss
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
    tokenizer: PreTrainedTokenizerBase, pairs: Pairs, encoder_decoder: bool
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


def _batch(pad: int, inputs: list[list[int]], labels: list[list[int]], device: torch.device) -> dict[str, torch.Tensor]:
    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value).to(device)

    mask = padded([[1] * len(row) for row in inputs], 0)
    return {"input_ids": padded(inputs, pad), "attention_mask": mask, "labels": padded(labels, _IGNORED)}


def warm_start(config: Config, rows: Sequence[Row], scratch_tokenizer: Path, folder: Path, place: Path) -> None:
    """Fine-tune on the reference summaries and save to `folder`: a whole model with tokenizer, or a LoRA adapter.

    Checkpoints go to `place`.
    """
    pairs = [(row.prompt, row.summary) for row in rows if row.summary is not None]
    base, seed = config.policy.base, config.seed
    if not config.sft.full_weights:
        policy = load_policy(base, initial_adapter(config.policy), config.policy, seed).to(PartialState().device)
        _tune("warm start", policy.model, policy.tokenizer, pairs, config.sft, seed, place)
        policy.save(folder)
        return
    if base == "scratch":
        tokenizer = load_tokenizer(str(scratch_tokenizer))
        model = scratch_base(tokenizer, seed)
    else:
        model, tokenizer = load_base(base)
    _tune("warm start", model.to(PartialState().device), tokenizer, pairs, config.sft, seed, place)
    save_base(model, tokenizer, folder)


def baseline(
    config: Config, rows: Sequence[Row], reward: Reward | None, base: str, start: Path | None, folder: Path, place: Path
) -> None:
    """Fine-tune the policy's weights from the same start and save them to `folder`; checkpoints go to `place`.

    Without a reward that is on the civil references alone. With one it is on the best by it of the start's own 4
    responses to a prompt, each prompt some four times: one round of expert iteration (Anthony et al. 2017).
    """
    policy = load_policy(base, start, config.policy, config.seed).to(PartialState().device)
    civil: Pairs = [(row.prompt, row.civil_reference) for row in rows if row.civil_reference]
    what, pairs = ("best-of-4 baseline", _best(policy, config, rows, reward)) if reward else ("civil baseline", civil)
    sft = replace(config.sft, steps=config.sft.baseline_steps, lr=config.sft.baseline_lr)
    _tune(what, policy.model, policy.tokenizer, pairs, sft, config.seed, place)
    policy.save(folder)


def _best(policy: Policy, config: Config, rows: Sequence[Row], reward: Reward) -> Pairs:
    count = max(1, config.sft.baseline_steps * config.sft.batch_size // OF)
    some = [rows[i] for i in permutation(config.seed, "expert rows", 0, len(rows))[:count]]
    prompts, how, seed, frozen = to_prompts(some), config.generation, config.seed, policy.reference
    with log.status(f"sampling {OF} responses to each of {count} prompts"):
        texts = in_row_order(
            sample_batches(policy, prompts, how, seed=seed, stream="expert", samples=OF, adapter=frozen)
        )
        said = [text for row in texts for text in row]
        scores = reward([row.prompt for row in some for _ in range(OF)], said)
    scores[is_wordless(said)] = -torch.inf  # saying nothing is no way to be civil here either
    best = scores.reshape(-1, OF).argmax(1).tolist()
    return [(row.prompt, samples[pick]) for row, samples, pick in zip(some, texts, best, strict=True)]


def _tune(
    what: str, model: Any, tokenizer: PreTrainedTokenizerBase, pairs: Pairs, sft: SftConfig, seed: int, place: Path
) -> None:
    with progress(what, sft.steps) as reach:
        fine_tune(model, tokenizer, pairs, sft, seed, place, lambda done, loss: reach(done, f"loss {loss:.3f}"))
