"""How does a pretrained encoder become a classifier: under a new head, or under a LoRA that was fitted before?"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from detoxrl.errors import require
from detoxrl.models.files import ADAPTER_CONFIG, adapter_base
from detoxrl.models.loading import load_pretrained, name_padding, require_vocabulary
from detoxrl.models.weights import POLICY, loading_adapter, require_layers
from detoxrl.runtime.files import write_text
from detoxrl.runtime.hub import fetch

_REMEDY = "give the folder or hub id of an encoder such as sentence-transformers/all-MiniLM-L6-v2"
# An encoder that was trained without a head may lack it: it reads the first position for the head.
_POOLER = "pooler"


def load_under_new_head(
    source: str, field: str, labels: Sequence[str], seed: int, problem: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the encoder of a folder or hub id in fp32 with a head for `labels`, and its tokenizer.

    Where the head is new, its weights are drawn by `seed`, one of torch's. `problem` is transformers' problem_type.
    Raises InputError, naming `field`, for what is no encoder, and when the tokenizer does not fit.
    """
    folder = fetch(source, field)
    tokenizer: PreTrainedTokenizerBase = load_pretrained(AutoTokenizer, folder, source, field, _REMEDY)
    require(tokenizer.pad_token is not None, field, source, "has a tokenizer without a padding token", _REMEDY)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, info = load_pretrained(
            AutoModelForSequenceClassification,
            folder,
            source,
            field,
            _REMEDY,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # Its head may be for other labels.
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            **({"problem_type": problem} if problem else {}),
        )
    _require_body(model, info["missing_keys"], source, field)
    require_vocabulary(field, source, tokenizer, model)
    name_padding(model, tokenizer)
    return model, tokenizer


def with_lora(model: PreTrainedModel, rank: int, base: str, seed: int) -> PeftModel:
    """Return the classifier under a new LoRA on every linear layer of its encoder; head and pooler train whole.

    The LoRA's output is not scaled. `base` is the folder or hub id that its files will name, `seed` one of torch's.
    Raises InputError when the encoder has no linear layers.
    """
    saved = [*_head(model), *([_POOLER] if _has_pooler(model) else [])]
    layers = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and saved_part(name, saved) is None
    }
    require(bool(layers), "encoder", base, "has no linear layers for a LoRA", "set --lora-rank none")

    name, _, revision = base.partition("@") if not Path(base).exists() else (base, "", "")
    settings = LoraConfig(
        r=rank,
        lora_alpha=rank,
        # A pattern, because peft stores a list of names as a set, in an order of its own.
        target_modules=rf".*\.({'|'.join(sorted(map(re.escape, layers)))})",
        modules_to_save=saved,
        lora_dropout=0.0,
        task_type="SEQ_CLS",
        revision=revision or None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, settings, adapter_name=POLICY)
    adapted.peft_config[POLICY].base_model_name_or_path = name
    return adapted


def load_adapted(folder: Path, source: str, field: str, remedy: str) -> PreTrainedModel:
    """Return the classifier that the LoRA in `folder` makes of its base, merged, in fp32; it names its labels itself.

    Raises InputError, naming `field` and `source`, when base and LoRA do not fit, StorageError for corrupted weights.
    """
    base = adapter_base(folder, field, source)
    base_folder = fetch(base, field)
    config = load_pretrained(AutoConfig, str(folder), source, field, remedy)

    with torch.random.fork_rng(devices=[]):  # Weights that the files replace are drawn first.
        model, info = load_pretrained(
            AutoModelForSequenceClassification,
            base_folder,
            base,
            field,
            remedy,
            config=config,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        _require_body(model, info["missing_keys"], base, field)
        with loading_adapter(field, folder):
            adapted = PeftModel.from_pretrained(model, str(folder), adapter_name=POLICY)
    require_layers(adapted, POLICY, field, folder)
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged


def save_classifier(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a classifier that transformers loads, or its LoRA and head that peft loads on its base, to a folder."""
    tokenizer.save_pretrained(str(folder))
    if not isinstance(model, PeftModel):
        model.save_pretrained(str(folder))
    else:
        # No embedding is ever resized; peft would ask a hub whether one was.
        model.save_pretrained(str(folder), save_embedding_layers=False)
        classifier: Any = model.get_base_model()
        classifier.config.architectures = [type(classifier).__name__]
        classifier.config.save_pretrained(str(folder))  # It names the labels.
        _write_in_order(folder / ADAPTER_CONFIG)


def output_layer(model: PreTrainedModel | PeftModel) -> torch.nn.Linear | None:
    """Return the linear layer whose outputs are the logits, or None where it has no bias or is of another kind."""
    count = model.config.num_labels
    layers = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module.out_features == count and module.weight.requires_grad
    ]
    return layers[-1] if layers and layers[-1].bias is not None else None


def saved_part(name: str, parts: Iterable[str]) -> str | None:
    """Return the part, such as "pooler", that a module of this dotted name lies in; None if it lies in none."""
    return next((part for part in parts if part in name.split(".")), None)


def _write_in_order(path: Path) -> None:
    """Sort the lists in an adapter's settings: peft keeps sets, so their order would change from run to run."""
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if isinstance(value, list):
            settings[name] = sorted(set(value))
    write_text(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _head(model: PreTrainedModel) -> list[str]:
    """Return the names of the modules behind the encoder that have weights."""
    children = model.named_children()
    return [
        name for name, child in children if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]


def _has_pooler(model: PreTrainedModel) -> bool:
    return any(name.rpartition(".")[2] == _POOLER for name, _ in model.named_modules())


def _require_body(model: PreTrainedModel, missing: Iterable[str], source: str, field: str) -> None:
    """Raise InputError when other weights than those of the head are missing."""
    head = [*_head(model), _POOLER]
    of_body = sorted(name for name in missing if saved_part(name, head) is None)
    require(not of_body, field, source, f"lacks weights such as {''.join(of_body[:1])}", _REMEDY)
