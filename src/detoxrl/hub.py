"""How do models and data come from a hub, at a revision that is known afterwards?

A hub id may say `name@revision`. What is fetched lies in the client library's own cache, so what was fetched once needs
no network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

from detoxrl.errors import InputError, first_line, require

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w./-]+)?", re.ASCII)
# What a model's folder may hold beside its config and its weights.
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "spiece.model",
    "tokenizer.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
_DATA = ["*.csv", "*.tsv", "*.json", "*.jsonl", "*.gz", "*.zst", "*.parquet", "*.arrow", "README.md"]
MODEL, ADAPTER = "model", "adapter_model"
"""What the weights of a model, and those of a LoRA, are called, without the ending."""


def is_id(source: str) -> bool:
    """Return whether `source` can only mean a hub id: it has the form of one, and nothing here has that name."""
    return _ID.fullmatch(source) is not None and not Path(source).exists()


def pinned(source: str, field: str) -> str:
    """Return a hub id as `name@commit`, the commit being that of its revision now. Raises InputError."""
    if not is_id(source):
        return source
    name, _, revision = source.partition("@")
    with _answered(source, field):
        if field == "data.source":
            return f"{name}@{_data(name, revision).name}"
        config = "adapter_config.json" if field == "policy.adapter" else "config.json"
        found = _file(name, config, revision)
    if found is None:
        raise InputError(field, source, f"is a repository without {config}", "name one that holds such a model")
    return f"{name}@{found.parent.name}"


def fetched(source: str, field: str, weights: str = MODEL) -> str:
    """Return the folder that holds what a hub id names; what is no hub id comes back as it is.

    `weights` says which are fetched too, "" that none are. Raises InputError when they cannot be had as safetensors.
    """
    if not is_id(source):
        return source
    name, _, revision = pinned(source, field).partition("@")
    config = "adapter_config.json" if weights == ADAPTER else "config.json"
    with _answered(source, field):
        found = _file(name, config, revision)
        assert found is not None  # else it had not been pinned
        for file in () if weights == ADAPTER else _TOKENIZER:
            _file(name, file, revision)
        for file in _weight_files(name, weights, revision) if weights else ():
            remedy = f"make safetensors of its .bin by `detoxrl convert {source} FOLDER`, and name that folder"
            require(_file(name, file, revision) is not None, field, source, f"holds no {file}", remedy)
    return str(found.parent)


def fetched_pickles(source: str, field: str) -> str:
    """Return the folder with all of a model's `.bin` files and settings; what is no hub id comes back as it is."""
    if not is_id(source):
        return source
    name, _, revision = source.partition("@")
    wanted = ["*.json", "*.txt", "*.model", "pytorch_model*.bin", "adapter_model*.bin"]
    with _answered(source, field):
        return huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=wanted)


def fetched_data(source: str) -> str:
    """Return the folder with the data files of a hub id. Raises InputError."""
    name, _, revision = source.partition("@")
    with _answered(source, "data.source"):
        return str(_data(name, revision))


def bytes_to_fetch(source: str, field: str) -> int:
    """Return how much of a model's weights is not on this machine yet. Raises InputError."""
    if not is_id(source):
        return 0
    name, _, revision = source.partition("@")
    with _answered(source, field):
        files = _weight_files(name, MODEL, revision)
        found = [huggingface_hub.hf_hub_download(name, file, revision=revision or None, dry_run=True) for file in files]
    return sum(file.file_size or 0 for file in found if file.will_download)


def _weight_files(name: str, weights: str, revision: str) -> list[str]:
    index = _file(name, f"{weights}.safetensors.index.json", revision)
    if index is None:
        return [f"{weights}.safetensors"]
    return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))


def _file(name: str, file: str, revision: str) -> Path | None:
    """Return a file of a model's repository, None where it has none."""
    try:
        return Path(huggingface_hub.hf_hub_download(name, file, revision=revision or None))
    except errors.LocalEntryNotFoundError:
        # Offline on purpose: others who filled the cache left no word on what there is not.
        if constants.is_offline_mode() and file in _TOKENIZER:
            return None
        raise
    except errors.EntryNotFoundError:
        return None


def _data(name: str, revision: str) -> Path:
    found = huggingface_hub.snapshot_download(
        name, repo_type="dataset", revision=revision or None, allow_patterns=_DATA
    )
    return Path(found)


@contextmanager
def _answered(source: str, field: str) -> Iterator[None]:
    """Turn what a hub, or the way to it, can answer into one line that says what to do."""
    hub = constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError as error:
        remedy = "accept its terms there, then set HF_TOKEN or run `hf auth login`"
        raise InputError(field, source, f"is gated at {hub}", remedy) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(field, source, f"is no revision known to {hub}", "correct what follows the @") from error
    except errors.RepositoryNotFoundError as error:
        rule = f"is no file or folder here, and no repository that {hub} shows"
        remedy = "correct the name; a private one needs HF_TOKEN or `hf auth login`"
        raise InputError(field, source, rule, remedy) from error
    except (errors.HTTPError, errors.OfflineModeIsEnabled, OSError) as error:  # type: ignore[attr-defined]
        raise InputError(field, source, *_trouble(error.__cause__ or error)) from error


def _trouble(error: BaseException) -> tuple[str, str]:
    """Return what is wrong, and what to do, when a hub gave no proper answer."""
    hub = constants.ENDPOINT
    if constants.is_offline_mode():
        return "is not in the cache whole, and HF_HUB_OFFLINE is set", "unset it once to fetch what is missing"
    if not isinstance(error, errors.HfHubHTTPError):
        rule = f"could not be fetched from {hub} ({first_line(error)}), and is not in the cache whole"
        return rule, "run it again when the network is back: what came is kept"
    code = error.response.status_code
    if code == 429:
        return f"was refused by {hub}: too many requests", "wait some minutes, or set HF_TOKEN for a higher limit"
    if code in (401, 403):
        return f"was refused by {hub} with status {code}", "set HF_TOKEN or run `hf auth login`"
    return f"was answered by {hub} with status {code}", "try again later"
