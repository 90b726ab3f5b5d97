"""Which models were trained before with the same ingredients, so that they need not be trained again?"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from filelock import FileLock

from detoxrl.errors import InputError, require
from detoxrl.runtime.console import log
from detoxrl.runtime.files import copy_path, remove_leftovers
from detoxrl.runtime.shipped import shipped_model, unpack

_PACKAGE = Path(__file__).parents[1]
# The code that decides what a cached model learns, relative to the package. A change to any of these files changes the
# key. A folder stands for its Python files.
_SOURCES = (
    "training/sft.py",
    "training/finetune.py",
    "rewards/fit.py",
    "runtime/randomness.py",
    "models",
    "data",
    "data/embedded/phrases.json",
)
# What the models are called in messages.
_TITLES = {"base": "warm start", "reward": "reward model", "baseline": "civil baseline"}
_NAME_CACHE = "set DETOXRL_CACHE to a folder that can be written"
_LIBRARIES = ("torch", "transformers", "peft", "tokenizers")


def cache_dir() -> Path:
    """Return $DETOXRL_CACHE, or by default `detoxrl` in the user's cache folder. Raises InputError without one."""
    named = os.environ.get("DETOXRL_CACHE")
    if named:
        return Path(named)
    named = os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(named) / "detoxrl"
    try:
        return Path.home() / ".cache" / "detoxrl"
    except RuntimeError:  # A container may run under a user that has no entry and no home.
        raise InputError("HOME", None, "is not set, and this user has no home folder", _NAME_CACHE) from None


def require_cacheable(name: str, ingredients: Sequence[str]) -> None:
    """Raise InputError unless the model `name` is there, or can be kept in the cache once it is trained."""
    folder = cache_dir()
    if shipped_model(name, ingredients) is not None or _entry(name, ingredients).is_dir():
        return

    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    is_writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    require(is_writable, "DETOXRL_CACHE", str(folder), f"cannot be written: {existing} is not writable", _NAME_CACHE)


def tidy_cache() -> None:
    """Delete what killed processes left half written; waits until no other process writes to the cache."""
    if cache_dir().is_dir():
        with FileLock(cache_dir() / ".lock"):
            remove_leftovers(cache_dir())


def cached(name: str, ingredients: Sequence[str], destination: Path, build: Callable[[Path], None]) -> None:
    """Copy the model `name` to `destination` from the package or the cache, or build it there and cache the result.

    The key in the cache covers the ingredients, the versions of the libraries, this package's training code, and what
    rounding depends on: the number of threads and bfloat16 support.
    """
    shipped = shipped_model(name, ingredients)
    if shipped is not None:
        unpack(shipped, destination)
        log.print(f"{_TITLES[name]}: trained before, comes with detoxrl")
        return

    entry = _entry(name, ingredients)
    if entry.is_dir():
        copy_path(entry, destination)
        log.print(f"{_TITLES[name]}: trained before, copied from the cache")
        return

    build(destination)

    # Only writers need the lock: an entry appears whole.
    entry.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(entry.with_name(".lock")):
        if not entry.is_dir():
            copy_path(destination, entry)


def _entry(name: str, ingredients: Sequence[str]) -> Path:
    """Return the folder in the cache that a model has or will have."""
    return cache_dir() / f"{name}-{_key(ingredients)}"


def _key(ingredients: Iterable[str]) -> str:
    digest = hashlib.sha256()
    rounding = (torch.get_num_threads(), torch.cpu.get_capabilities().get("avx512_bf16"))
    versions = [version(library) for library in _LIBRARIES]
    for part in (*ingredients, *versions, repr(rounding)):
        digest.update(part.encode() + b"\0")

    for path in _source_files():
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def _source_files() -> list[Path]:
    files = []
    for source in _SOURCES:
        path = _PACKAGE / source
        files += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return files
