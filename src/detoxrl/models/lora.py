"""How does a base model become a policy with a frozen reference?"""

import re
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from detoxrl.config.schema import PolicyConfig
from detoxrl.errors import InputError, first_line, require
from detoxrl.models.loading import load_base
from detoxrl.models.policy import Policy
from detoxrl.models.weights import POLICY, REFERENCE, FullWeights, LoraWeights, Weights, loading_adapter, require_layers
from detoxrl.runtime.hub import fetch
from detoxrl.runtime.randomness import torch_seed


def load_policy(base: str, start: Path | None, config: PolicyConfig, seed: int) -> Policy:
    """Return the policy that starts from `base`, and from the LoRA in `start` when there is one.

    The reference is the frozen start: a second adapter, the bare base under a fresh adapter, or, where full weights
    train, a copy of those that do. Raises InputError for a base, folder or target that does not fit.
    """
    return make_policy(*load_base(base, bf16=config.bf16), start, config, seed)


def make_policy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, start: Path | None, config: PolicyConfig, seed: int
) -> Policy:
    """Return the policy that a loaded base becomes, as `load_policy`."""
    reads = model.config.is_encoder_decoder or not config.train_encoder
    require(reads, "policy.train_encoder", True, "needs an encoder, and the base has none", "leave it out")
    weights: Weights
    if config.full_weights:
        weights = FullWeights(model, tokenizer, config.train_encoder)
    else:
        lora = _loaded(model, start) if start else _fresh(model, config, seed)
        weights = LoraWeights(lora, REFERENCE if start else None, config.train_encoder)
    policy = Policy(weights, tokenizer, config.train_encoder)
    rule = "has parts in the encoder alone, which does not train"
    require(len(policy.parameters()) > 0, "policy.adapter", str(start), rule, "say --policy.train-encoder")
    return policy


def frozen_policy(base: str, field: str = "policy.base") -> Policy:
    """Return a model that only samples and scores, all of it frozen. Raises InputError as `load_base`."""
    model, tokenizer = load_base(base, field)
    model.requires_grad_(False)
    return Policy(FullWeights(model, tokenizer, train_encoder=False), tokenizer, False)


def initial_adapter(config: PolicyConfig) -> Path | None:
    """Return the folder of the LoRA that the config names to start from. Raises InputError when it cannot be had."""
    return Path(fetch(config.adapter, "policy.adapter")) if config.adapter else None


def lora_config(model: PreTrainedModel, config: PolicyConfig) -> LoraConfig:
    """Return the settings of the adapter to start from, else a fresh one's. Raises InputError for an unknown target."""
    if folder := initial_adapter(config):
        with loading_adapter("policy.adapter", folder):
            found: LoraConfig = LoraConfig.from_pretrained(str(folder), inference_mode=False)
            return found
    where = r".*" if config.train_encoder or not model.config.is_encoder_decoder else r".*decoder"
    reachable = re.compile(rf"{where}\..*\b(\w+)")
    linear = {
        name.split(".")[-1]: type(module)
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and reachable.fullmatch(name)
    }
    rule, remedy = "names no linear layer of the base", f"choose from {', '.join(sorted(linear))}"
    for target in config.lora_targets:
        require(target in linear, "policy.lora_targets", target, rule, remedy)
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=rf"{where}\..*\b({'|'.join(config.lora_targets)})",
        lora_dropout=0.0,
        fan_in_fan_out=linear[config.lora_targets[0]] is Conv1D,  # GPT-2 keeps its weights transposed
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
    )


def _fresh(model: PreTrainedModel, config: PolicyConfig, seed: int) -> PeftModel:
    lora = lora_config(model, config)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(seed, "lora"))
            return get_peft_model(model, lora, adapter_name=POLICY)
    except ValueError as error:  # peft knows no LoRA for some layers of some models
        targets = " ".join(config.lora_targets)
        raise InputError("policy.lora_targets", targets, first_line(error), "choose other layers") from error


def _loaded(model: PreTrainedModel, folder: Path) -> PeftModel:
    with loading_adapter("policy.adapter", folder):
        peft_model = PeftModel.from_pretrained(model, str(folder), adapter_name=POLICY, is_trainable=True)
    require_layers(peft_model, POLICY, "policy.adapter", folder)
    peft_model.load_adapter(str(folder), adapter_name=REFERENCE, is_trainable=False)
    return peft_model
