"""How are pickled weights converted to safetensors, the only format that a run reads?"""

import json
import pickle
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from detoxrl.commands.preflight import PICKLES, convertible_folder
from detoxrl.errors import InputError, first_line, require
from detoxrl.runtime.files import explain_corruption, replace_folder

# The file that the weights of pickled files are written to.
_FORMATS = dict(zip(PICKLES, ("adapter_model.safetensors", "model.safetensors"), strict=True))
_COPIED = (".json", ".txt", ".model", ".jinja")
# peft 0.3 wrote these settings and never used them. Today's peft takes them for those of a later version.
_UNUSED_SETTINGS = ("enable_lora", "merge_weights")
# trl stores its value head beside the weights, and in some versions adds a prefix to the names of the model's weights.
_VALUE_HEAD = "v_head."
_MODEL_PREFIX = "pretrained_model."


def convert(source: str, target: Path) -> str:
    """Copy a model or LoRA to the new folder `target`, with safetensors in place of its `.bin` files.

    `source` is a folder or a hub id. trl's value head is left out, because a run's own reads other states and starts
    from zero. Returns what was converted, in words. Raises InputError when nothing needs converting, or when a file
    holds more than tensors; no code in it is run.
    """
    folder = convertible_folder(source, target)
    with replace_folder(target) as temporary:
        converted = [_convert_weights(folder, pattern, temporary / name) for pattern, name in _FORMATS.items()]
        done = [text for text in converted if text]
        require(bool(done), "FROM", source, "holds no weights but a value head", "nothing needs converting")

        for path in folder.iterdir():
            if path.is_file() and path.suffix in _COPIED and ".bin." not in path.name:
                shutil.copyfile(path, temporary / path.name)
        _remove_unused_settings(folder, temporary)

    return "; ".join(done)


def _convert_weights(folder: Path, pattern: str, target: Path) -> str:
    """Write the weights of the files that match `pattern` to `target`; return that in words, or "" without weights."""
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob(pattern)):
        weights.update(_load_tensors(path))

    kept = [name for name in weights if not name.startswith(_VALUE_HEAD)]
    if not kept:
        return ""

    save_file({name.removeprefix(_MODEL_PREFIX): weights[name] for name in kept}, target, metadata={"format": "pt"})
    left_out = len(weights) - len(kept)
    note = f" ({left_out} of a value head left out)" if left_out else ""
    return f"{target.name} with {len(kept)} tensors{note}"


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a pickled file by name. Raises InputError when it holds anything else."""
    remedy = "convert it yourself if you trust it, or save the model again with safetensors"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError) as error:
        raise InputError("FROM", str(path), f"cannot be read as tensors alone: {first_line(error)}", remedy) from error

    valid = isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    )
    require(valid, "FROM", str(path), "is not a dictionary of tensors", remedy)
    # safetensors refuses tensors that share memory, as tied weights do.
    return {name: tensor.clone().contiguous() for name, tensor in content.items()}


def _remove_unused_settings(folder: Path, target: Path) -> None:
    """Remove the settings of peft 0.3 from the copy of an adapter's settings, if there is one."""
    path = target / "adapter_config.json"
    if not path.is_file():
        return

    with explain_corruption(folder / path.name, "restore it"):
        settings = json.loads(path.read_text(encoding="utf-8"))

    kept = {name: value for name, value in settings.items() if name not in _UNUSED_SETTINGS}
    path.write_text(json.dumps(kept, indent=2), encoding="utf-8")
