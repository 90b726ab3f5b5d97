"""How do weights that were pickled become safetensors, which is all that a run reads?"""

import json
import pickle
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from detoxrl.errors import InputError, first_line, require
from detoxrl.runtime.files import explain_corruption, replace_folder
from detoxrl.runtime.hub import fetch

_NAMES = {"adapter_model*.bin": "adapter_model.safetensors", "pytorch_model*.bin": "model.safetensors"}
# What peft 0.3 wrote and never used; today's takes it for something of a later version.
_PEFT_0_3 = ("enable_lora", "merge_weights")
# trl keeps its value head beside the weights, and in some versions the model under a name of its own.
_VALUE_HEAD, _INNER = "v_head.", "pretrained_model."


def convert(source: str, target: Path) -> str:
    """Copy a model or LoRA folder, or what a hub id names, to the new folder `target` with safetensors for its `.bin`.

    trl's value head is left out: ours reads scaled states and starts from zero. Returns what was done, in words.
    Raises InputError when there is nothing to convert, or when a file holds more than tensors; no code in it is run.
    """
    require(not target.exists(), "TO", str(target), "exists already", "name a new folder")
    folder = Path(fetch(source, "FROM"))
    done = []
    with replace_folder(target) as temporary:
        for pattern, name in _NAMES.items():
            weights = {k: v for path in sorted(folder.glob(pattern)) for k, v in _tensors(path).items()}
            tensors = {k.removeprefix(_INNER): v for k, v in weights.items() if not k.startswith(_VALUE_HEAD)}
            if tensors:
                save_file(tensors, temporary / name, metadata={"format": "pt"})
                left = len(weights) - len(tensors)
                done.append(f"{name} with {len(tensors)} tensors{f', {left} of a value head left out' if left else ''}")
        require(bool(done), "FROM", source, f"holds no weights in {' or '.join(_NAMES)}", "nothing needs converting")
        for path in folder.iterdir():
            if path.is_file() and path.suffix in (".json", ".txt", ".model", ".jinja") and ".bin." not in path.name:
                shutil.copyfile(path, temporary / path.name)
        if (settings := temporary / "adapter_config.json").is_file():
            with explain_corruption(folder / settings.name, "put it back"):
                found = json.loads(settings.read_text(encoding="utf-8"))
            kept = {name: value for name, value in found.items() if name not in _PEFT_0_3}
            settings.write_text(json.dumps(kept, indent=2), encoding="utf-8")
    return "; ".join(done)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    remedy = "convert it where you trust it, or save it again with safetensors"
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError) as error:
        raise InputError("FROM", str(path), f"holds more or less than tensors: {first_line(error)}", remedy) from error
    named = found.items() if isinstance(found, dict) else [(None, found)]
    plain = all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in named)
    require(plain, "FROM", str(path), "is no table of tensors", remedy)
    # Copies: safetensors holds no tensor twice, and tied ones share their memory.
    return {name: tensor.clone().contiguous() for name, tensor in found.items()}
