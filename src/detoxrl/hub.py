"""How do models and data come from a hub, at a revision that is known afterwards?

A hub id may say `name@revision`. What is fetched lies in the client library's own cache, so what was fetched once needs
no network.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

from detoxrl.errors import InputError, first_line, require

_NAME = r"\w([\w.-]{0,94}\w)?"
_ID = re.compile(rf"(?![^@]*(--|\.\.)){_NAME}(/{_NAME})?(@[\w.-]+(/[\w.-]+)*)?", re.ASCII)
# What a model's folder may hold beside its config and its weights.
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "spiece.model",
    "tokenizer.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
_DATA = (".csv", ".tsv", ".json", ".jsonl", ".gz", ".zst", ".parquet", ".arrow")
MODEL, ADAPTER = "model", "adapter_model"
"""What the weights of a model, and those of a LoRA, are called, without the ending."""


def is_id(source: str) -> bool:
    """Return whether `source` can only mean a hub id: it has the form of one, and nothing here has that name."""
    # What ends like a data file was meant as one, so whoever mistypes it is told what files there are.
    file = source.partition("@")[0].lower().endswith((*_DATA, ".git"))
    return _ID.fullmatch(source) is not None and not file and not Path(source).exists()


def pinned(source: str, field: str) -> str:
    """Return a hub id as `name@commit`, the commit being that of its revision now. Raises InputError."""
    if not is_id(source):
        return source
    name, _, revision = source.partition("@")
    with _answered(source, field):
        config = "adapter_config.json" if field == "policy.adapter" else "config.json"
        found = _data(name, revision) if field == "data.source" else _file(name, config, revision).parent
    return f"{name}@{found.name}"


def fetched(source: str, field: str, weights: str = MODEL) -> str:
    """Return the folder that holds what a hub id names; what is no hub id comes back as it is.

    `weights` says which are fetched too, "" that none are. Raises InputError when they cannot be had as safetensors.
    """
    if not is_id(source):
        remedy = "give a folder, or a hub id such as google/flan-t5-small"
        require(Path(source).exists(), field, source, "is no folder here, and no hub id", remedy)
        return source
    name, _, revision = pinned(source, field).partition("@")
    config = "adapter_config.json" if weights == ADAPTER else "config.json"
    with _answered(source, field):
        found = _file(name, config, revision)
        for file in () if weights == ADAPTER else _TOKENIZER:
            _optional(name, file, revision)
        for file in _weight_files(name, weights, revision) if weights else ():
            _file(name, file, revision)
    return str(found.parent)


def fetched_pickles(source: str, field: str) -> str:
    """Return the folder with all of a model's `.bin` files and settings; what is no hub id comes back as it is."""
    if not is_id(source):
        return source
    name, _, revision = source.partition("@")
    wanted = ["*.json", "*.txt", "*.model", "*.jinja", "pytorch_model*.bin", "adapter_model*.bin"]
    with _answered(source, field):
        ask = partial(huggingface_hub.snapshot_download, name, allow_patterns=wanted)
        return str(_asked(partial(ask, revision=revision or None)))


def fetched_data(source: str) -> str:
    """Return the folder with the data files of a hub id. Raises InputError."""
    name, _, revision = source.partition("@")
    with _answered(source, "data.source"):
        return str(_data(name, revision))


def bytes_to_fetch(source: str, field: str) -> int:
    """Return how much of a model's weights is not on this machine yet. Raises InputError."""
    if not is_id(source):
        return 0
    name, _, revision = pinned(source, field).partition("@")
    with _answered(source, field):
        files = _weight_files(name, MODEL, revision)
        found = [huggingface_hub.hf_hub_download(name, file, revision=revision, dry_run=True) for file in files]
    return sum(file.file_size or 0 for file in found if file.will_download)


def _weight_files(name: str, weights: str, revision: str) -> list[str]:
    index = _optional(name, f"{weights}.safetensors.index.json", revision)
    found = json.loads(index.read_text(encoding="utf-8")) if index else {"weight_map": {}}
    if not isinstance(found, dict) or not isinstance(found.get("weight_map"), dict):
        raise ValueError(f"{weights}.safetensors.index.json names no weights")
    return sorted(set(found["weight_map"].values())) or [f"{weights}.safetensors"]


def _optional(name: str, file: str, commit: str) -> Path | None:
    """Return a file of a model's repository, None where it has none."""
    no_such = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}", ".no_exist", commit, file)
    if no_such.is_file():  # the client notes it, but does not look
        return None
    try:
        return _file(name, file, commit)
    except errors.EntryNotFoundError as error:
        if _why(error)[1] == 404:
            with suppress(OSError):  # nor does the client note it for every hub
                no_such.parent.mkdir(parents=True, exist_ok=True)
                no_such.touch()
        elif not constants.is_offline_mode():  # there others who filled the cache may have left no note
            raise
        return None


def _file(name: str, file: str, revision: str) -> Path:
    return _asked(partial(huggingface_hub.hf_hub_download, name, file, revision=revision or None))


def _data(name: str, revision: str) -> Path:
    patterns = [*(f"*{ending}" for ending in _DATA), "README.md"]
    ask = partial(huggingface_hub.snapshot_download, name, repo_type="dataset", allow_patterns=patterns)
    return _asked(partial(ask, revision=revision or None))


def _asked(ask: Callable[..., str]) -> Path:
    """Return what a hub gives, or where the connection breaks off what the cache holds."""
    try:
        return Path(ask())
    except errors.HTTPError as error:  # type: ignore[attr-defined]
        if isinstance(error, errors.HfHubHTTPError):
            raise
        return Path(ask(local_files_only=True))


@contextmanager
def _answered(source: str, field: str) -> Iterator[None]:
    """Turn what a hub, or the way to it, can answer into one line that says what to do."""
    try:
        yield
    except (errors.HTTPError, OSError, RuntimeError) as error:  # type: ignore[attr-defined]  # hf_xet raises the last
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(field, source, *_trouble(error, source, field)) from error
    except ValueError as error:  # an index that is none
        rule = f"cannot be read as {constants.ENDPOINT} gives it: {first_line(error)}"
        raise InputError(field, source, rule, "name another revision") from error


def _trouble(error: BaseException, source: str, field: str) -> tuple[str, str]:
    """Return what is wrong, and what to do, when a hub gave not what it was asked for."""
    hub, nowhere, (error, status) = constants.ENDPOINT, "is no file or folder here", _why(error)
    if constants.is_offline_mode():
        rule = f"{nowhere}, nor whole in the cache, and HF_HUB_OFFLINE is set"
        return rule, "unset it once to fetch what is missing"
    if getattr(error, "errno", None):
        return f"cannot be kept in the cache: {error}", "make it writable, or set HF_HOME to another folder"
    if isinstance(error, errors.GatedRepoError):
        return f"is gated at {hub}", "accept its terms there, then set HF_TOKEN or run `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"is no revision known to {hub}", "correct what follows the @"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        remedy = "correct the name; a private one needs a valid HF_TOKEN, or `hf auth login`"
        return f"{nowhere}, and no repository that {hub} shows", remedy
    if isinstance(error, errors.HfHubHTTPError) and status == 404 and field != "data.source":
        remedy = f"name one that does; `detoxrl convert {source} FOLDER` makes safetensors of a .bin"
        return f"{nowhere}, and at {hub} holds no {str(error.response.url).rpartition('/')[2]}", remedy
    if status == 403:
        return f"was refused by {hub} with status 403", "set HF_TOKEN to one that may, or run `hf auth login`"
    if status == 429:
        return f"was refused by {hub}: too many requests", "wait some minutes, or set HF_TOKEN for a higher limit"
    if status is not None:
        return f"was answered by {hub} with status {status}", "try again later"
    rule = f"{nowhere}, nor whole in the cache, and could not be fetched from {hub} ({first_line(error)})"
    return rule, "run it again when the network is back: what came whole is kept"


def _why(error: BaseException) -> tuple[BaseException, int | None]:
    """Return what went wrong, not that the cache did not help then, and the status where a hub gave one."""
    if isinstance(error, errors.LocalEntryNotFoundError):
        error = error.__cause__ or error.__context__ or error
    return error, error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
