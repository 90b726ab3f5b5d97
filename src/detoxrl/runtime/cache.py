"""What was trained on the spot before and can be used again?"""

import hashlib
import os
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import torch
from filelock import FileLock

from detoxrl.runtime.console import log
from detoxrl.runtime.files import copy_path, remove_leftovers

# A change to any of these files changes what they train, so it changes the key.
_SOURCES = (
    "training/sft.py",
    "rewards/fit.py",
    "runtime/randomness.py",
    "models",
    "data",
    "data/embedded/phrases.json",
)


def cache_dir() -> Path:
    """Return $DETOXRL_CACHE, or detoxrl's folder in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DETOXRL_CACHE") or Path(home) / "detoxrl")


def tidy_cache() -> None:
    """Delete what killed processes left half filled, once nobody is filling the cache."""
    if cache_dir().is_dir():
        with FileLock(cache_dir() / ".lock"):
            remove_leftovers(cache_dir())


def cached(what: str, ingredients: Iterable[str], destination: Path, build: Callable[[Path], None]) -> None:
    """Fill `destination` from the cache, and say so, or by `build(destination)`, which is kept.

    The key covers the ingredients, versions of libraries, the machine's threads and bf16, and our own training code.
    """
    stored = cache_dir() / f"{what.replace(' ', '-')}-{_key(ingredients)}"
    if stored.is_dir():
        copy_path(stored, destination)
        log.print(f"{what}: trained before, taken from the cache")
        return
    build(destination)
    stored.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(stored.with_name(".lock")):  # others fill the cache too, and what is there is read without it
        if not stored.is_dir():
            copy_path(destination, stored)


def _key(ingredients: Iterable[str]) -> str:
    digest = hashlib.sha256()
    machine = (torch.get_num_threads(), torch.cpu.get_capabilities().get("avx512_bf16"))  # what rounding depends on
    for part in (*ingredients, *map(version, ("torch", "transformers", "peft")), repr(machine)):
        digest.update(part.encode() + b"\0")
    package = Path(__file__).parents[1]
    for source in _SOURCES:
        for path in sorted((package / source).rglob("*.py")) or [package / source]:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:24]
