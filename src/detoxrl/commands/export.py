"""How does what a run trained go to others, who load it with transformers and peft alone?"""

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from detoxrl.config.schema import Config
from detoxrl.errors import InputError, require
from detoxrl.models.loading import load_base, load_shapes, load_tokenizer, save_base
from detoxrl.models.weights import loading_adapter
from detoxrl.report.card import model_card
from detoxrl.runtime.files import replace_folder, write_text
from detoxrl.runtime.hub import is_hub_id, push_folder, push_token
from detoxrl.runtime.run_folder import RunFolder

_WEIGHTS = "adapter_model.safetensors"
_Pair = tuple[PreTrainedModel, PreTrainedTokenizerBase]
_CIVIL = "Thank you, that is very kind of you."


class Export(NamedTuple):
    """What was made: the folder, what it holds in words, and its address on the hub where it was pushed."""

    folder: Path
    what: str
    address: str | None


def export(
    run: Path | str, *, to: Path | str | None = None, merged: bool = False, push: str | None = None,
    private: bool = False, overwrite: bool = False,
) -> Export:  # fmt: skip
    """Write a measured run's policy to the new folder `to`, with tokenizer and model card; the default is `RUN-export`.

    It is a LoRA adapter where its base is on the hub, and with `merged`, or where it is not, a whole model in fp32.
    `push` uploads the folder as the model repository OWNER/NAME. `overwrite` replaces an earlier export, here and
    there. Raises InputError for what does not fit, before anything is written, and when the hub does not take it.
    """
    root = Path(run)
    folder, config = RunFolder.open(root)
    target = Path(to or root.parent / f"{root.resolve().name}-export")
    _require_free(target, overwrite)
    require(push is not None or not private, "--private", True, "goes with --push alone", "add --push OWNER/NAME")
    token = push_token(push) if push else ""
    with folder.locked():
        trained, remedy = not folder.read_json("run.json")["measures"]["names"], "name a run that trained"
        require(trained, "run folder", str(root), "measured what was trained elsewhere", remedy)
        folder.need("adapter", "train")
        measured, remedy = "evaluate" in folder.finished(), f"run `detoxrl evaluate {root}` first, for the card"
        require(measured, "run folder", str(root), "has not been measured", remedy)
        base = str(folder / "base") if (folder / "base").is_dir() else config.policy.base
        apart = is_hub_id(base) and not (merged or config.policy.full_weights)
        with replace_folder(target) as place:
            write = _write_adapter if apart else _write_whole
            model, tokenizer = write(place, folder, config, base)
            tokenizer.save_pretrained(place)
            _as_measured(model, tokenizer, config).save_pretrained(place)
            name, encoder = (push or target.resolve().name).rpartition("/")[2], model.config.is_encoder_decoder
            card = model_card(folder, config, name, push or ".", base if apart else None, encoder)
            write_text(place / "README.md", card)
    why = "as asked" if is_hub_id(base) else "as its base is on this machine alone"
    why = "all of whose weights trained" if config.policy.full_weights else f"the LoRA merged into it, {why}"
    what = f"LoRA adapter of {base}" if apart else f"whole model, {why}"
    try:
        return Export(target, what, push_folder(target, push, token, private, overwrite) if push else None)
    except InputError as error:
        error.add_note(f"{target} holds the export")
        raise


def _require_free(target: Path, overwrite: bool) -> None:
    """Raise InputError unless `target` can be made, or holds an export that may be replaced."""
    card, new, remedy = target / "README.md", not target.exists(), "name a new folder; nothing was deleted"
    ours = card.is_file() and "\n- detoxrl\n" in card.read_text(encoding="utf-8", errors="replace")
    require(ours or new, "--to", str(target), "exists already, and is no export", remedy)
    require(overwrite or new, "--to", str(target), "exists already", "add --overwrite, or name another folder")
    place = next(parent for parent in target.absolute().parents if parent.exists())
    writable = place.is_dir() and os.access(place, os.W_OK)
    require(writable, "--to", str(target), f"cannot be made: {place} is not writable", "name another folder")


def _write_adapter(place: Path, folder: RunFolder, config: Config, base: str) -> _Pair:
    """Write the LoRA, which names its base as everybody does; return that without its weights, and the tokenizer."""
    name, _, revision = base.partition("@")
    with loading_adapter("run folder", folder / "adapter"):
        found = json.loads((folder / "adapter/adapter_config.json").read_text(encoding="utf-8"))
        found |= {"base_model_name_or_path": name, "revision": revision or None}
        write_text(place / "adapter_config.json", json.dumps(found, indent=2))
        shutil.copyfile(folder / "adapter" / _WEIGHTS, place / _WEIGHTS)
    return load_shapes(base, bf16=False), load_tokenizer(base)


def _write_whole(place: Path, folder: RunFolder, config: Config, base: str) -> _Pair:
    """Write the whole model, with the LoRA in it; return it and the tokenizer."""
    if config.policy.full_weights:
        model, tokenizer = load_base(str(folder / "adapter"), "run folder")
    else:
        # What was measured stood on bfloat16 weights then; in fp32 they are the same, and no change is rounded away.
        model, tokenizer = load_base(base, bf16=config.policy.bf16)
        with loading_adapter("run folder", folder / "adapter"):
            lora = PeftModel.from_pretrained(model.float(), str(folder / "adapter")).eval()
        apart, model = _logits(lora, tokenizer), lora.merge_and_unload()
        alike = torch.allclose(_logits(model, tokenizer), apart, rtol=1e-3, atol=1e-3)
        rule = "holds a LoRA that changes weights which its base uses twice, so a merged model says something else"
        require(alike, "run folder", str(folder.root), rule, "put the base on a hub, and leave --merged out")
    save_base(model, tokenizer, place)
    return model, tokenizer


def _logits(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Return the logits (1, T, V) of a sentence."""
    ids = tokenizer(_CIVIL, return_tensors="pt").input_ids
    answer = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: torch.Tensor = model(ids, **answer).logits
    return found


def _as_measured(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config) -> GenerationConfig:
    """Return how responses begin, end and are sampled in a run, with none of what the base prefers."""
    known, how = model.config.get_text_config().to_dict(), config.generation
    ids = {name: known.get(name) for name in ("bos_token_id", "eos_token_id", "decoder_start_token_id")}
    ids |= {"pad_token_id": tokenizer.pad_token_id, "max_new_tokens": how.max_new_tokens}
    return GenerationConfig(do_sample=True, temperature=how.temperature, top_k=0, top_p=1.0, **ids)
