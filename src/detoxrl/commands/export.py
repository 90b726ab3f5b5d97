"""How does a trained policy become a folder that transformers and peft load without detoxrl?"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from detoxrl.commands.export_check import default_target, require_measured, require_writable
from detoxrl.config.schema import Config
from detoxrl.errors import InputError, require
from detoxrl.models.ends import end_token_ids
from detoxrl.models.loading import load_base, load_shapes, load_tokenizer, save_base
from detoxrl.models.weights import loading_adapter
from detoxrl.report.card import model_card
from detoxrl.runtime.files import replace_folder, write_text
from detoxrl.runtime.hub import is_hub_id, push_folder, push_token
from detoxrl.runtime.run_folder import RunFolder

_SETTINGS = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PROBE = "Thank you, that is very kind of you."
_Pair = tuple[PreTrainedModel, PreTrainedTokenizerBase]


class Export(NamedTuple):
    """What was exported."""

    folder: Path
    what: str  # Content of the folder in words.
    address: str | None  # Page on the hub, if it was pushed.


def export(
    run: Path | str, *, to: Path | str | None = None, merged: bool = False, push: str | None = None,
    private: bool = False, overwrite: bool = False,
) -> Export:  # fmt: skip
    """Write the policy of a measured run, its tokenizer and a model card to the new folder `to`.

    `to` defaults to `RUN-export`. The policy is a LoRA adapter if its base is on a hub. Otherwise, and with `merged`,
    it is a whole model in fp32. `push` uploads the folder as the model repository OWNER/NAME, `private` hides it there,
    `overwrite` replaces an earlier export in both places. Raises InputError before anything is written if the arguments
    or the run do not fit, and afterwards if the hub refuses the folder.
    """
    root = Path(run)
    folder, config = RunFolder.open(root)
    target = Path(to or default_target(root))
    require_writable(target, overwrite)
    require(push is not None or not private, "--private", True, "requires --push", "add --push OWNER/NAME")
    token = push_token(push) if push else ""

    with folder.locked():
        require_measured(folder)
        base = _base(folder, config)
        as_adapter = is_hub_id(base) and not merged and not config.policy.full_weights
        with replace_folder(target) as temporary:
            write_policy = _write_adapter if as_adapter else _write_whole
            model, tokenizer = write_policy(temporary, folder, config, base)
            tokenizer.save_pretrained(temporary)
            _generation_config(model, tokenizer, config).save_pretrained(temporary)

            name = (push or target.resolve().name).rpartition("/")[2]
            adapter_base = base if as_adapter else None
            encoder = model.config.is_encoder_decoder
            card = model_card(folder, config, name, push or ".", adapter_base, encoder)
            write_text(temporary / "README.md", card)

    what = f"LoRA adapter of {base}" if as_adapter else _whole_model(config, base)
    if folder.kept_initial_policy():
        what = f"initial policy, because training found none better; {what}"
    if push is None:
        return Export(target, what, None)

    try:
        address = push_folder(target, push, token, private, overwrite)
    except InputError as error:
        error.add_note(f"the export stays in {target}")
        raise
    return Export(target, what, address)


def _base(folder: RunFolder, config: Config) -> str:
    """Return the base that the policy was trained on: the sft stage's model, or the one that the config names."""
    tuned = folder / "base"
    return str(tuned) if tuned.is_dir() else config.policy.base


def _whole_model(config: Config, base: str) -> str:
    if config.policy.full_weights:
        return "whole model, trained with full weights"

    reason = "as asked" if is_hub_id(base) else "because its base is not on a hub"
    return f"whole model with the LoRA merged into it, {reason}"


def _write_adapter(target: Path, folder: RunFolder, config: Config, base: str) -> _Pair:
    """Write the LoRA with the name of its base on the hub. Return the base without weights, and its tokenizer."""
    name, _, revision = base.partition("@")
    adapter = folder / "adapter"
    with loading_adapter("run folder", adapter):
        settings = json.loads((adapter / _SETTINGS).read_text(encoding="utf-8"))
        settings["base_model_name_or_path"] = name
        settings["revision"] = revision or None
        write_text(target / _SETTINGS, json.dumps(settings, indent=2))
        shutil.copyfile(adapter / _WEIGHTS, target / _WEIGHTS)

    return load_shapes(base, bf16=False), load_tokenizer(base)


def _write_whole(target: Path, folder: RunFolder, config: Config, base: str) -> _Pair:
    """Write the whole model, with the LoRA merged into it if there is one. Return what was written, read again.

    Raises InputError when that is another model: it is told by its logits.
    """
    if config.policy.full_weights:
        model, tokenizer = load_base(str(folder / "adapter"), "run folder")
        expected = _logits(model, tokenizer)
    else:
        model, tokenizer, expected = _merged(folder, config, base)

    save_base(model, tokenizer, target)
    written, tokenizer = load_base(str(target), "run folder")
    same = torch.allclose(_logits(written, tokenizer), expected, rtol=1e-3, atol=1e-3)
    rule = "trains weights that its base uses twice, so a whole model gives other logits once it is read again"
    require(same, "run folder", str(folder.root), rule, "put the base on a hub, and export without --merged")
    return written, tokenizer


def _merged(
    folder: RunFolder, config: Config, base: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, torch.Tensor]:
    """Return the base with the LoRA merged into it, in fp32, its tokenizer, and the logits before merging."""
    # If the run measured a bfloat16 base, that is loaded too. In fp32 its weights are the same, and merging is exact.
    model, tokenizer = load_base(base, bf16=config.policy.bf16)
    adapter = folder / "adapter"
    with loading_adapter("run folder", adapter):
        lora = PeftModel.from_pretrained(model.float(), str(adapter)).eval()

    expected = _logits(lora, tokenizer)
    return lora.merge_and_unload(), tokenizer, expected


def _logits(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Return the logits (1, T, V) of a sentence."""
    ids = tokenizer(_PROBE, return_tensors="pt").input_ids
    answer = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        logits: torch.Tensor = model(ids, **answer).logits
    return logits


def _generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config) -> GenerationConfig:
    """Return how responses were sampled and ended when the policy was measured, without the base's own preferences."""
    generation = model.generation_config
    assert generation is not None  # Every model that was loaded as a base has one.
    forced = generation.forced_bos_token_id
    return GenerationConfig(
        do_sample=True,
        temperature=config.generation.temperature,
        top_k=0,
        top_p=1.0,
        # `generate` counts a forced first token, which is no part of a response here.
        max_new_tokens=config.generation.max_new_tokens + (0 if forced is None else 1),
        bos_token_id=generation.bos_token_id,
        eos_token_id=end_token_ids(model, tokenizer),
        decoder_start_token_id=generation.decoder_start_token_id,
        forced_bos_token_id=forced,
        pad_token_id=tokenizer.pad_token_id,
    )
