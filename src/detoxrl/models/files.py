"""What do the files of a model say about it before any of its weights is read?

This needs no torch: settings are JSON, and the header of a safetensors file names each weight with its shape.
"""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from detoxrl.errors import InputError, StorageError, first_line, require
from detoxrl.runtime.hub import is_hub_id, weight_files

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
GENERATION_CONFIG = "generation_config.json"
# Every tokenizer has a file with one of these in its name: tokenizer.json, vocab.txt, spiece.model, source.spm ...
_TOKENIZER_FILE = re.compile(r"tok|vocab|merges|bpe|spm|\.model$", re.IGNORECASE)


class Architecture(NamedTuple):
    """What is known of a type of model by its name."""

    lora_targets: tuple[str, ...]  # The layers that a new adapter usually changes.
    has_encoder: bool


_T5 = Architecture(("q", "v"), has_encoder=True)
_BART = Architecture(("q_proj", "v_proj"), has_encoder=True)
_GPT2 = Architecture(("c_attn",), has_encoder=False)
_LLAMA = Architecture(("q_proj", "v_proj"), has_encoder=False)
_FUSED = Architecture(("query_key_value",), has_encoder=False)
ARCHITECTURES = {
    **dict.fromkeys(("t5", "mt5", "umt5"), _T5),
    **dict.fromkeys(("bart", "mbart", "pegasus", "marian"), _BART),
    "gpt2": _GPT2,
    **dict.fromkeys(("llama", "mistral", "opt", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), _LLAMA),
    **dict.fromkeys(("falcon", "gpt_neox"), _FUSED),
    "phi": Architecture(("q_proj", "v_proj", "fc1", "fc2"), has_encoder=False),
    "phi3": Architecture(("qkv_proj",), has_encoder=False),
}
"""Types of models whose layers have the names that their weights have in the file."""
_QUERY_AND_VALUE = (
    "arcee", "biogpt", "blenderbot", "blenderbot-small", "cohere", "cohere2", "ernie4_5", "exaone4", "glm4", "gpt_oss",
    "granite", "granitemoe", "helium", "m2m_100", "mvp", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "pegasus_x",
    "phimoe", "plbart", "qwen2_moe", "qwen3_moe", "seed_oss", "smollm3", "starcoder2", "xglm",
)  # fmt: skip
FURTHER_TARGETS = {
    "encoder-decoder": ("query", "value"),
    "longt5": ("q", "v"),
    **dict.fromkeys(_QUERY_AND_VALUE, ("q_proj", "v_proj")),
}
"""The layers that a new adapter usually changes, for further types of models that peft knows nothing of."""
SCRATCH_LAYERS = ("k", "o", "q", "v", "wi_0", "wi_1", "wo")
"""The linear layers of policy.base = 'scratch'."""
# How peft may begin a LoRA without changing the base.
_KEEP_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva")
# Weights of two dimensions that do not belong to linear layers, in these architectures.
_EMBEDDINGS = {
    "shared", "embed_tokens", "embed_positions", "embed_in", "word_embeddings", "wte", "wpe", "relative_attention_bias",
}  # fmt: skip


def read_settings(folder: Path, name: str, field: str, source: str) -> dict[str, Any]:
    """Return the settings in a JSON file of a model's folder.

    Raises InputError, naming `field` and its value `source`, when there is no such file or it is malformed.
    """
    path = folder / name
    require(path.is_file(), field, source, f"holds no {name}", "give the folder or hub id of a model")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:  # Neither UTF-8 nor JSON, or not readable.
        raise InputError(field, source, f"has a malformed {name}: {first_line(error)}", "restore the file") from None

    require(isinstance(settings, dict), field, source, f"has a malformed {name}", "restore the file")
    return dict(settings)


def generation_settings(folder: Path, field: str, source: str) -> dict[str, Any]:
    """Return the settings in a model's generation_config.json, or in its config.json, where older models have them.

    Raises InputError, naming `field` and its value `source`, when the file is malformed.
    """
    name = GENERATION_CONFIG if (folder / GENERATION_CONFIG).is_file() else "config.json"
    settings = read_settings(folder, name, field, source)

    ends = settings.get("eos_token_id")
    rule = f"has eos_token_id = {ends!r} in {name}, which is neither an id nor a list of ids"
    valid = all(map(_is_id, ends)) if isinstance(ends, list) else ends is None or _is_id(ends)
    require(valid, field, source, rule, "restore the file")

    for setting in ("decoder_start_token_id", "forced_bos_token_id"):
        id = settings.get(setting)
        rule = f"has {setting} = {id!r} in {name}, which is no id of a token"
        require(id is None or _is_id(id), field, source, rule, "restore the file")
    return settings


def _is_id(value: Any) -> bool:
    return type(value) is int  # True and False are ints too.


def require_model_files(folder: Path, field: str, source: str) -> None:
    """Raise InputError unless a local folder holds weights in safetensors and a tokenizer."""
    for name in weight_files(folder, source, field):
        remedy = f"give a folder that has it; `detoxrl convert {source} FOLDER` makes safetensors of a .bin"
        require((folder / name).is_file(), field, source, f"holds no {name}", remedy)

    require(has_tokenizer(folder), field, source, "holds no tokenizer", "give a folder with its tokenizer files")


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer. A LoRA may leave it to its base."""
    return any(_TOKENIZER_FILE.search(path.name) for path in folder.iterdir())


def require_adapter_files(folder: Path, field: str, source: str) -> None:
    """Raise InputError unless a local folder holds a LoRA as peft saves it."""
    remedy = "give a LoRA folder as peft saves it; `detoxrl convert` makes safetensors of a .bin"
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        require((folder / name).is_file(), field, source, f"holds no {name}", remedy)

    settings = read_settings(folder, ADAPTER_CONFIG, field, source)
    start = settings.get("init_lora_weights", True)
    rule = f"was begun with init_lora_weights = {start!r}, which changes the base whenever the adapter is loaded"
    remedy = "save it as a plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...) of peft"
    require(start in _KEEP_THE_BASE, field, source, rule, remedy)

    bias = settings.get("bias", "none")
    is_alone = settings.get("task_type") == "SEQ_CLS"  # A classifier's LoRA is merged into its base.
    rule = f"changes biases too (bias = {bias!r}), and peft cannot hold two such adapters beside each other"
    require(bias == "none" or is_alone, field, source, rule, "train it with bias = 'none'")


def adapter_base(folder: Path, field: str, source: str) -> str:
    """Return the folder or hub id, with its revision, of the model that an adapter belongs to. Raises InputError."""
    settings = read_settings(folder, ADAPTER_CONFIG, field, source)
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    valid = isinstance(name, str) and name != "" and isinstance(revision, str | None)
    rule = f"names no model in base_model_name_or_path of its {ADAPTER_CONFIG}"
    require(valid, field, source, rule, "name the model that it was trained on")
    return f"{name}@{revision}" if revision and is_hub_id(str(name)) else str(name)


def require_targets(targets: Collection[str], layers: Collection[str]) -> None:
    """Raise InputError, which lists the layers, unless each target is the name of one."""
    remedy = f"choose from {', '.join(sorted(layers))}"
    for target in targets:
        require(target in layers, "policy.lora_targets", target, "names no linear layer of the base", remedy)


def adapted_part(has_encoder: bool, train_encoder: bool) -> str:
    """Return a pattern for the beginning of the names of the layers that a new adapter may change."""
    return ".*" if train_encoder or not has_encoder else ".*decoder"


def layers_in_files(folder: Path, source: str, part: str) -> set[str]:
    """Return the names of the linear layers in a part of a model, by the weights that its local folder holds.

    Raises StorageError when they are corrupted.
    """
    path = re.compile(rf"{part}\..*\b(\w+)\.weight")
    matches = [path.fullmatch(name) for name, shape in _shapes(folder, source).items() if len(shape) == 2]
    return {match[1] for match in matches if match} - _EMBEDDINGS


def _shapes(folder: Path, source: str) -> dict[str, list[int]]:
    """Return the shape of each weight in the files of a model, by its name."""
    shapes: dict[str, list[int]] = {}
    for name in weight_files(folder, source, "policy.base"):
        try:
            with safe_open(folder / name, framework="numpy") as weights:
                for weight in list(weights.keys()):
                    shapes[weight] = weights.get_slice(weight).get_shape()
        except SafetensorError as error:
            raise StorageError(f"the weights of {source} are corrupted: {first_line(error)}") from error
    return shapes
