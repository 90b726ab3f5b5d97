"""Which trained models come with the package, are they whole, and do they fit the config of a run?

The quickstart's warm start and reward model take minutes to train on a processor without AVX-512, and what they learn
follows from the config alone. The package holds those of seed 0, in half precision, each with a key of what it was
trained from. `make models` trains them again and compares.
"""

import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from detoxrl.errors import StorageError
from detoxrl.runtime.files import file_digests, replace_folder

MODELS = Path(__file__).parents[1] / "data/embedded/models"


def ingredients_digest(ingredients: Iterable[str]) -> str:
    """Return 24 hexadecimal digits that identify what a model is trained from."""
    digest = hashlib.sha256()
    for part in ingredients:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:24]


def shipped_model(name: str, ingredients: Iterable[str]) -> Path | None:
    """Return the package's folder of a model that was trained from these ingredients, or None if it has no such model.

    Its weights are in float16. Raises StorageError if its files are not those that were packaged.
    """
    entry = manifest().get(name)
    if entry is None or entry["ingredients"] != ingredients_digest(ingredients):
        return None
    folder, _ = shipped_folder(name)
    return folder


def shipped_folder(name: str) -> tuple[Path, dict[str, Any]]:
    """Return the package's folder of a model, and what the manifest says of it.

    Raises StorageError if its files are not those that were packaged.
    """
    entry = manifest()[name]
    folder = MODELS / name
    digests = file_digests(folder)
    if any(digests.get(file) != digest for file, digest in entry["files"].items()):
        raise StorageError(f"{folder} does not hold the files that were packaged; install detoxrl again")
    return folder, entry


def unpack(folder: Path, target: Path) -> None:
    """Copy a shipped model to `target`, with its weights in float32."""
    with replace_folder(target) as unpacked:
        for file in folder.iterdir():
            if file.suffix != ".safetensors":
                (unpacked / file.name).write_bytes(file.read_bytes())
        _convert(folder, unpacked, torch.float32)


def pack(folder: Path, name: str, ingredients: Iterable[str], made: dict[str, Any]) -> None:
    """Replace the package's model `name` with the one in `folder`, in float16; `made` says how it was made."""
    target = MODELS / name
    with replace_folder(target) as packed:
        for file in folder.iterdir():
            if file.suffix != ".safetensors":
                (packed / file.name).write_bytes(file.read_bytes())
        _convert(folder, packed, torch.float16)

    entry = {"ingredients": ingredients_digest(ingredients), "files": file_digests(target), "made": made}
    text = json.dumps({**manifest(), name: entry}, indent=2)
    (MODELS / "manifest.json").write_text(text + "\n", encoding="utf-8")
    manifest.cache_clear()


@lru_cache(maxsize=1)
def manifest() -> dict[str, Any]:
    """Return what the package says of its models, by name: `ingredients`, `files` with their SHA-256, and `made`."""
    entries: dict[str, Any] = json.loads((MODELS / "manifest.json").read_text(encoding="utf-8"))
    return entries


def _convert(source: Path, target: Path, dtype: torch.dtype) -> None:
    for path in source.glob("*.safetensors"):
        weights = load_file(path)
        converted = {name: weight.to(dtype) for name, weight in weights.items()}
        save_file(converted, target / path.name, metadata={"format": "pt"})
