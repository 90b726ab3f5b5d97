"""How does a base model become a policy with a frozen reference?"""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from detoxrl.config.schema import Config, PolicyConfig
from detoxrl.errors import InputError, first_line, require
from detoxrl.models.files import ARCHITECTURES, FURTHER_TARGETS, adapted_part, read_settings, require_targets
from detoxrl.models.loading import load_base, require_finite
from detoxrl.models.policy import Policy
from detoxrl.models.recompute import layers_to_recompute
from detoxrl.models.weights import POLICY, REFERENCE, FullWeights, LoraWeights, Weights, loading_adapter, require_layers
from detoxrl.runtime.hub import config_folder, fetch
from detoxrl.runtime.randomness import torch_seed


def load_policy(base: str, adapter: Path | None, config: PolicyConfig, seed: int) -> Policy:
    """Return the policy that starts from `base`, and from the LoRA in `adapter` if there is one.

    The reference is the frozen initial policy: a second adapter after a LoRA start, the base without an adapter under a
    fresh LoRA, the model before training with full weights. Raises InputError for a base, folder or target that does
    not fit.
    """
    return make_policy(*load_base(base, bf16=config.bf16), adapter, config, seed)


def make_policy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapter: Path | None, config: PolicyConfig, seed: int
) -> Policy:
    """Return the policy that a loaded base becomes, as `load_policy`."""
    has_encoder = model.config.is_encoder_decoder
    rule = "needs an encoder, and the base has none"
    require(has_encoder or not config.train_encoder, "policy.train_encoder", True, rule, "leave it out")

    can_recompute = len(layers_to_recompute(model)) > 0
    rule = f"knows no layers of a {model.config.model_type} that could be recomputed"
    require(can_recompute or not config.checkpointing, "policy.checkpointing", True, rule, "leave it out")

    weights: Weights
    if config.full_weights:
        weights = FullWeights(model, tokenizer, config.train_encoder)
    elif adapter is None:
        weights = LoraWeights(_add_fresh_lora(model, config, seed), None, config.train_encoder)
    else:
        weights = LoraWeights(_load_lora(model, adapter), REFERENCE, config.train_encoder)

    policy = Policy(weights, tokenizer, config.train_encoder, config.checkpointing)
    rule = "has parts in the encoder only, which does not train"
    require(len(policy.parameters()) > 0, "policy.adapter", str(adapter), rule, "set --policy.train-encoder")
    return policy


def frozen_policy(base: str, field: str = "policy.base") -> Policy:
    """Return a policy that only samples and scores. Raises InputError as `load_base`."""
    return make_frozen_policy(*load_base(base, field))


def make_frozen_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Policy:
    """Return the policy that a loaded model is when none of its weights train."""
    model.requires_grad_(False)
    return Policy(FullWeights(model, tokenizer, train_encoder=False), tokenizer, train_encoder=False)


def initial_adapter(config: PolicyConfig) -> Path | None:
    """Return the folder of the LoRA that the config starts from. Raises InputError when it cannot be fetched."""
    return Path(fetch(config.adapter, "policy.adapter")) if config.adapter else None


def lora_config(model: PreTrainedModel, config: PolicyConfig) -> LoraConfig:
    """Return the settings of the adapter to start from, or of a fresh one. Raises InputError for an unknown target."""
    folder = initial_adapter(config)
    if folder is not None:
        with loading_adapter("policy.adapter", folder):
            stored: LoraConfig = LoraConfig.from_pretrained(str(folder), inference_mode=False)
            return stored

    part = adapted_part(model.config.is_encoder_decoder, config.train_encoder)
    linear_layers = _linear_layers(model, part)
    targets = config.lora_targets or _usual_targets(model.config.model_type, linear_layers)
    require_targets(targets, linear_layers)

    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=rf"{part}\..*\b({'|'.join(targets)})",
        lora_dropout=0.0,
        fan_in_fan_out=linear_layers[targets[0]] is Conv1D,  # GPT-2 stores its weights transposed.
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
    )


def usual_targets(model_type: str) -> tuple[str, ...] | None:
    """Return the layers that a new adapter usually changes in a type of model, or None if nothing is known of it."""
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type].lora_targets

    if model_type in FURTHER_TARGETS:
        return FURTHER_TARGETS[model_type]

    targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
    return tuple(targets) if isinstance(targets, list) else None  # Some are patterns, not names.


def with_lora_targets(config: Config) -> Config:
    """Return the config with the layers that a new adapter changes, where they follow from a base that is given.

    A run then trains the same layers when it is repeated, whatever a later version takes for usual.
    """
    policy = config.policy
    needs_none = policy.adapter is not None or policy.full_weights
    if policy.base == "scratch" or policy.lora_targets or needs_none:
        return config

    settings = read_settings(config_folder(policy.base, "policy.base"), "config.json", "policy.base", policy.base)
    targets = usual_targets(str(settings.get("model_type")))
    return replace(config, policy=replace(policy, lora_targets=targets))


def _usual_targets(model_type: str, layers: Iterable[str]) -> tuple[str, ...]:
    """Return `usual_targets`. Raises InputError, which lists the layers, if nothing is known of the type of model."""
    targets = usual_targets(model_type)
    rule = f"has no default for a model of type {model_type}"
    remedy = f"choose from {', '.join(sorted(layers))}"
    require(targets is not None, "policy.lora_targets", None, rule, remedy)
    assert targets is not None
    return targets


def _linear_layers(model: PreTrainedModel, part: str) -> dict[str, type]:
    """Return the last part of the name of each linear layer in a part of the model, with its type.

    The language-model head is left out: it is no target of an adapter.
    """
    path = re.compile(rf"{part}\..*\b(\w+)")
    head = model.get_output_embeddings()
    return {
        name.split(".")[-1]: type(module)
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head and path.fullmatch(name)
    }


def _add_fresh_lora(model: PreTrainedModel, config: PolicyConfig, seed: int) -> PeftModel:
    settings = lora_config(model, config)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(seed, "lora"))
            return get_peft_model(model, settings, adapter_name=POLICY)
    except ValueError as error:  # peft supports no LoRA on some layers of some models.
        targets = config.lora_targets
        raise InputError("policy.lora_targets", targets, first_line(error), "choose other layers") from error


def _load_lora(model: PreTrainedModel, folder: Path) -> PeftModel:
    with loading_adapter("policy.adapter", folder):
        peft_model = PeftModel.from_pretrained(model, str(folder), adapter_name=POLICY, is_trainable=True)
    require_layers(peft_model, POLICY, "policy.adapter", folder)
    require_finite(peft_model, "policy.adapter", str(folder))
    peft_model.load_adapter(str(folder), adapter_name=REFERENCE, is_trainable=False)
    return peft_model
