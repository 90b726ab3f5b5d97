"""How does a base model become a policy with a frozen reference?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

from detoxrl.config import PolicyConfig
from detoxrl.errors import InputError, StorageError, first_line, require
from detoxrl.policy.backbone import load_base
from detoxrl.policy.encoder_decoder import POLICY, EncoderDecoderPolicy
from detoxrl.randomness import torch_seed

REFERENCE = "reference"


def load_policy(base: str, start: Path | None, config: PolicyConfig, seed: int) -> EncoderDecoderPolicy:
    """Return the policy that starts from `base`, and from the LoRA in `start` when there is one.

    The reference is the frozen start: a second adapter, or the bare base under a fresh adapter. Either way there is
    one base model in memory. Raises InputError for a base, folder or target that does not fit.
    """
    model, tokenizer = load_base(base)
    if start is not None:
        return EncoderDecoderPolicy(_loaded(model, start), tokenizer, REFERENCE, config.lora_encoder)
    return EncoderDecoderPolicy(_fresh(model, config, seed), tokenizer, None, config.lora_encoder)


def lora_config(model: PreTrainedModel, config: PolicyConfig) -> LoraConfig:
    """Return a fresh adapter's settings. Raises InputError when a target names no layer."""
    reachable = re.compile(_target_pattern([r"\w+"], config.lora_encoder))
    linear = {
        name.split(".")[-1]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and reachable.fullmatch(name)
    }
    for target in config.lora_targets:
        if target not in linear:
            remedy = f"choose from {', '.join(sorted(linear))}"
            raise InputError("policy.lora_targets", target, "names no linear layer of the base", remedy)
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=_target_pattern(config.lora_targets, config.lora_encoder),
        lora_dropout=0.0,
        task_type="SEQ_2_SEQ_LM",
    )


def _target_pattern(targets: Sequence[str], encoder: bool) -> str:
    return rf"{'.*' if encoder else r'.*decoder'}\..*\b({'|'.join(targets)})"


def _fresh(model: PreTrainedModel, config: PolicyConfig, seed: int) -> PeftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(seed, "lora"))
        return get_peft_model(model, lora_config(model, config), adapter_name=POLICY)


def _loaded(model: PreTrainedModel, folder: Path) -> PeftModel:
    require_adapter(folder, "policy.adapter")
    try:
        peft_model = PeftModel.from_pretrained(model, str(folder), adapter_name=POLICY, is_trainable=True)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:  # sizes or targets of another base
        reason = f"does not load on the base: {' '.join(str(error).split())[:200]}"
        raise InputError("policy.adapter", str(folder), reason, "give an adapter of this base") from error
    ours = set(get_peft_model_state_dict(peft_model, adapter_name=POLICY))
    other = sorted(ours ^ set(load_file(folder / "adapter_model.safetensors")))
    rule = f"belongs to a base with other layers, {other[0]} for one" if other else ""
    require(not other, "policy.adapter", str(folder), rule, "give an adapter of this base")
    peft_model.load_adapter(str(folder), adapter_name=REFERENCE, is_trainable=False)
    return peft_model


def require_adapter(folder: Path, field: str) -> None:
    """Raise InputError unless `folder` holds a LoRA, and StorageError when its weights are torn."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        there = (folder / name).is_file()
        require(there, field, str(folder), f"holds no {name}", "give a LoRA folder as peft saves it")
    weights = folder / "adapter_model.safetensors"
    try:
        with safe_open(weights, framework="pt") as file:
            list(file.keys())
    except (SafetensorError, OSError) as error:
        raise StorageError(f"{weights} is broken: {first_line(error)}; train again or put it back") from error
