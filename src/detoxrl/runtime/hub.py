"""How do models and data sets travel between a hub and this machine?

A hub id is `name` or `name@revision`. A run pins it to `name@commit`, so that it reads the same files when it resumes.
A model that an installed package brings is read from there.
"""

import errno
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants, errors, utils
from huggingface_hub.utils.tqdm import disable_progress_bars

from detoxrl.config.packages import packaged_model
from detoxrl.errors import InputError, first_line, require
from detoxrl.runtime.files import meant_path, nearby_paths

# Progress bars and notices of the library would break up the console. Its errors are exceptions and still come through.
huggingface_hub.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
disable_progress_bars()

_NAME = r"\w([\w.-]{0,94}\w)?"
_HUB_ID = re.compile(rf"(?![^@]*(--|\.\.)){_NAME}(/{_NAME})?(@[\w.-]+(/[\w.-]+)*)?", re.ASCII)
_COMMIT = re.compile("[0-9a-f]{40}")
# A tag names a file of the cache: no separators, and not the folder above.
_TAG = re.compile(r'(W/)?"?(?!\.\.?"?$)[\w.:+=-]+"?', re.ASCII)
_NAMES_IN_HEADERS = {"x-repo-commit": _COMMIT, "x-linked-etag": _TAG, "etag": _TAG}
_SHARD = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)
_DATA_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".gz", ".zst", ".parquet", ".arrow")
_FILE_SUFFIXES = (*_DATA_SUFFIXES, ".txt", ".py", ".bin", ".safetensors", ".zip", ".git")
_MODEL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]  # Configuration and tokenizer: everything but the weights.
# Sentence encoders may have weights in subfolders: layers after the transformer, such as 2_Dense.
_SUBFOLDER_FILES = {"evaluation.encoder": ["*/model.safetensors"]}

_answered: set[str] = set()  # The addresses of the hubs that this process has connected to.
# When and why this process last failed to connect to a hub, by its address.
_failures: dict[str, tuple[float, Exception]] = {}
_TRY_AGAIN_AFTER = 60.0  # Seconds.

_DATA_SET = ("dataset", [*(f"*{suffix}" for suffix in _DATA_SUFFIXES), "README.md"])
# Settings whose files are found by pattern, with the type of repository. The weights of a model that a run reads are
# requested by name instead, so that a missing file is an error.
_SNAPSHOTS = {
    "data.source": _DATA_SET,
    "source": _DATA_SET,
    "FROM": ("model", [*_MODEL_FILES, "pytorch_model*.bin", "adapter_model*.bin"]),
}


def is_hub_id(source: str) -> bool:
    """Return whether `source` has the form of a hub id and is not a path, existing or mistyped.

    A name that ends like a file is a path, and so is one in runs/, where run folders are by default.
    """
    name = source.partition("@")[0].lower()
    is_path = name.endswith(_FILE_SUFFIXES) or name.startswith("runs/")
    return _HUB_ID.fullmatch(source) is not None and not is_path and not Path(source).exists()


def require_source(source: str, field: str) -> None:
    """Raise InputError unless `source` is an existing path or has the form of a hub id. Does not ask the hub."""
    is_source = Path(source).exists() or is_hub_id(source)
    remedy = "give a folder, or a hub id such as google/flan-t5-small"
    if field in ("data.source", "source"):
        remedy = "give a file, a folder or a hub id"
    remedy = nearby_paths(Path(source)) or remedy
    require(is_source, field, source, "is neither an existing path nor a hub id", remedy)


def config_folder(source: str, field: str) -> Path:
    """Return the folder with the config of a model; of a hub id only the config is downloaded, unless it is cached.

    Raises InputError as `fetch` does.
    """
    if not is_hub_id(source):
        require_source(source, field)
        return Path(source)
    packaged = packaged_model(source)
    if packaged is not None:
        return packaged
    with _input_errors(source, field):
        return _commit_folder(source, field)


def pin_revision(source: str, field: str) -> str:
    """Return a hub id as `name@commit`, with the commit that its revision points to now. A path is returned unchanged.

    So is a model that an installed package brings. Raises InputError when the commit is neither cached nor available
    from the hub.
    """
    if not is_hub_id(source) or packaged_model(source) is not None:
        return source
    with _input_errors(source, field):
        return _at_commit(source, _commit_folder(source, field))


def fetch(source: str, field: str, weights: bool = True) -> str:
    """Return the local folder of a hub id, downloaded unless it is cached. A path is returned unchanged.

    `field` is the setting that names `source`; it decides which files are needed. With `weights` false, a model comes
    without its weights. Raises InputError when a path does not exist or a needed file is not available.
    """
    if not is_hub_id(source):
        require_source(source, field)
        return source
    packaged = packaged_model(source)
    if packaged is not None:
        return str(packaged)

    with _input_errors(source, field):
        folder = _commit_folder(source, field)
        if field in _SNAPSHOTS:
            return str(folder)

        # The branch may move between two requests, so all files after the first come from its commit.
        pinned = _at_commit(source, folder)
        _download_snapshot(pinned, "model", [*_MODEL_FILES, *_SUBFOLDER_FILES.get(field, [])])
        if weights:
            for file in weight_files(folder, source, field):
                _download_file(pinned, file)
    return str(folder)


def fetch_policy(source: str, field: str) -> str:
    """Return the local folder of a model or a LoRA adapter; a hub id with an adapter_config.json is an adapter.

    Raises InputError as `fetch` does.
    """
    if is_hub_id(source) and _is_adapter(source, field):
        return fetch(source, "policy.adapter")
    return fetch(source, field)


def pin_policy(source: str, field: str) -> str:
    """Return a model or LoRA on a hub as `name@commit`, as `pin_revision`; a path becomes absolute."""
    if not is_hub_id(source):
        return str(Path(source).resolve())
    return pin_revision(source, "policy.adapter" if _is_adapter(source, field) else field)


def download_size(source: str, field: str) -> int:
    """Return how many bytes of a model's weights are not cached yet. Raises InputError as `fetch` does."""
    if not is_hub_id(source) or packaged_model(source) is not None:
        return 0
    name, _ = _split(source)
    folder = Path(fetch(source, field, weights=False))

    size = 0
    with _input_errors(source, field):
        for file in weight_files(folder, source, field):
            ask = partial(huggingface_hub.hf_hub_download, name, file, revision=folder.name, dry_run=True)
            plan = _or_cached(ask, folder.name)
            if plan.will_download:
                size += plan.file_size or 0
    return size


def weight_files(folder: Path, source: str, field: str) -> list[str]:
    """Return the names of a model's weight files: one, or the shards that its index lists. Raises InputError."""
    is_adapter = field == "policy.adapter" or adapts_classifier(folder)
    weights = "adapter_model.safetensors" if is_adapter else "model.safetensors"
    index = folder / f"{weights}.index.json"
    if not index.is_file():
        return [weights]
    remedy = "name another revision" if is_hub_id(source) else "restore the file"
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        names = sorted(set(map(str, weight_map.values())))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(field, source, f"has a malformed {index.name}", remedy) from error

    require(len(names) > 0, field, source, f"has an {index.name} without any weights", remedy)
    for name in names:
        # Another format may hold a pickle, which can run code; another folder is not the model's.
        is_own = _SHARD.fullmatch(name) is not None
        rule = f"names {name!r} in {index.name}, and weights are read from safetensors in the same folder alone"
        require(is_own, field, source, rule, "give a model saved as safetensors")
    return names


def adapts_classifier(folder: Path) -> bool:
    """Return whether a folder holds a LoRA of a classifier, as peft saves it, instead of a whole model."""
    settings = folder / "adapter_config.json"
    return settings.is_file() and '"SEQ_CLS"' in settings.read_text(encoding="utf-8", errors="replace")


def push_token(name: str) -> str:
    """Return the token for a push to `name`. Raises InputError without a token, and unless `name` is OWNER/NAME."""
    valid = re.fullmatch(f"{_NAME}/{_NAME}", name, re.ASCII) and not re.search(r"--|\.\.|\.git$", name)
    remedy = "write OWNER/NAME with letters, digits, dots and dashes"
    require(bool(valid), "--push", name, "is not the name of a repository", remedy)

    rule = "needs the hub, and HF_HUB_OFFLINE is set"
    require(not constants.is_offline_mode(), "--push", name, rule, "unset it, or leave --push out")

    token = huggingface_hub.get_token()
    require(bool(token), "--push", name, "needs a token, and there is none", "set HF_TOKEN, or run `hf auth login`")
    return str(token)


def push_folder(folder: Path, name: str, token: str, private: bool, overwrite: bool) -> str:
    """Upload a folder as the model repository `name` and return its address; `overwrite` replaces an earlier export.

    Raises InputError, which never contains the token, when the hub does not accept the upload.
    """
    api = huggingface_hub.HfApi(token=token)
    try:
        address = api.create_repo(name, private=private or None, exist_ok=overwrite)
        _require_replaceable(api, name, private)
        # Files of an earlier export that this one lacks are deleted; the history of the repository keeps them.
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export", delete_patterns="*")
    except (errors.HTTPError, OSError, RuntimeError, ValueError) as error:  # type: ignore[attr-defined]
        rule, remedy = _push_failure(error)
        # Without the cause: its message may quote a request header, and with it the token.
        raise InputError("--push", name, rule, remedy) from None
    return str(address)


def _require_replaceable(api: huggingface_hub.HfApi, name: str, private: bool) -> None:
    """Raise InputError if the repository holds anything but an export, or is public although `private` is asked for."""
    info = api.model_info(name)
    files = {file.rfilename for file in info.siblings or []}
    is_empty = files <= {".gitattributes"}
    is_export = "detoxrl" in (info.tags or [])
    require(is_empty or is_export, "--push", name, "is not an export of detoxrl", "choose another name")

    remedy = "make it private on the hub, or leave --private out"
    require(bool(info.private) or not private, "--push", name, "exists already and is public", remedy)


def _push_failure(error: Exception) -> tuple[str, str]:
    """Return what went wrong with an upload, and the remedy, without a word of the error's own message."""
    hub = constants.ENDPOINT
    if not isinstance(error, errors.HfHubHTTPError):
        return f"could not be sent to {hub} ({type(error).__name__})", "try again later"

    status = error.response.status_code
    if status == 401:
        return f"was refused by {hub}: the token is not valid", "set HF_TOKEN to a valid one, or run `hf auth login`"
    if status == 403:
        remedy = "set HF_TOKEN to a token with write access, or use your own OWNER"
        return f"was refused by {hub}: the token may not write there", remedy
    if status == 409:
        return f"exists already at {hub}", "choose another name, or add --overwrite to replace an earlier export"
    return f"was answered by {hub} with status {status}", "try again later"


def _split(source: str) -> tuple[str, str | None]:
    """Return the name and the revision of a hub id."""
    name, _, revision = source.partition("@")
    return name, revision or None


def _at_commit(source: str, folder: Path) -> str:
    """Return the hub id with the commit that `folder`, in the cache, belongs to: its folder name."""
    return f"{_split(source)[0]}@{folder.name}"


def _is_adapter(source: str, field: str) -> bool:
    with _input_errors(source, field):
        try:
            _download_file(source, "adapter_config.json")
        except errors.EntryNotFoundError:
            return False
    return True


def _commit_folder(source: str, field: str) -> Path:
    """Return the cached folder of a hub id's commit: with the whole snapshot for a data set, else the config."""
    if field in _SNAPSHOTS:
        repo_type, patterns = _SNAPSHOTS[field]
        return _download_snapshot(source, repo_type, patterns)
    config = "adapter_config.json" if field == "policy.adapter" else "config.json"
    return _download_file(source, config).parent


def _download_file(source: str, file: str) -> Path:
    name, revision = _split(source)
    return Path(_or_cached(partial(huggingface_hub.hf_hub_download, name, file, revision=revision), revision))


def _download_snapshot(source: str, repo_type: str, patterns: list[str]) -> Path:
    name, revision = _split(source)
    download = partial(huggingface_hub.snapshot_download, name, repo_type=repo_type, revision=revision)
    return Path(_or_cached(partial(download, allow_patterns=patterns), revision))


def _or_cached(download: Callable[..., Any], revision: str | None) -> Any:
    """Return the result of a download, taken from the cache alone if the hub cannot be reached."""
    is_commit = revision is not None and _COMMIT.fullmatch(revision)
    _guard_session()
    try:
        if not is_commit:  # What the cache holds of a commit needs no hub.
            _require_answer(constants.ENDPOINT)
        return download()
    except errors.HfHubHTTPError:
        raise
    except errors.HTTPError:  # type: ignore[attr-defined]
        return download(local_files_only=True)


def _guard_session() -> None:
    """Have every answer of a hub checked before huggingface_hub makes names of files from it."""
    session = huggingface_hub.get_session()
    hooks = session.event_hooks
    if _require_safe_names not in hooks["response"]:
        hooks["response"].append(_require_safe_names)
        session.event_hooks = hooks


def _require_safe_names(response: Any) -> None:
    """Raise ValueError for an answer of a hub with a commit, a tag or a file that would be a path out of the cache."""
    for header, pattern in _NAMES_IN_HEADERS.items():
        value = response.headers.get(header)
        if value is not None and pattern.fullmatch(value) is None:
            raise ValueError(f"it answered with {header} = {value!r}, which is no name in its cache")

    is_description = "/api/" in response.url.path and "json" in response.headers.get("content-type", "")
    if not is_description or not response.is_success:
        return
    response.read()
    description = response.json()
    if not isinstance(description, dict):
        return

    commit = description.get("sha")
    if commit is not None and _COMMIT.fullmatch(str(commit)) is None:
        raise ValueError(f"it answered with the commit {commit!r}, which is none")


def _require_answer(endpoint: str) -> None:
    """Raise the error of httpx if a hub cannot be connected to.

    A hub that could be is not tried again, and one that could not only after a minute: each of a model's files asks.
    huggingface_hub tries six times for each file, for half a minute, before it gives up.
    """
    if endpoint in _answered or constants.is_offline_mode():
        return

    failed_at, failure = _failures.get(endpoint, (-_TRY_AGAIN_AFTER, None))
    if failure is not None and time.monotonic() - failed_at < _TRY_AGAIN_AFTER:
        raise failure

    httpx = utils.httpx  # type: ignore[attr-defined]
    try:
        huggingface_hub.get_session().head(endpoint, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        _failures[endpoint] = (time.monotonic(), error)
        raise
    except httpx.HTTPError:
        pass  # It was connected to: what is wrong with it shows at the files.
    _answered.add(endpoint)


@contextmanager
def _input_errors(source: str, field: str) -> Iterator[None]:
    """Turn a failed download into an InputError. A full disk is not bad input, so its OSError passes through."""
    try:
        yield
    except (errors.HTTPError, OSError, RuntimeError, ValueError) as error:  # type: ignore[attr-defined]
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        rule, remedy = _download_failure(error, source, field)
        meant = meant_path(Path(source))
        remedy = f"{meant} If not, {remedy}" if meant else remedy
        raise InputError(field, source, rule, remedy) from error


def _download_failure(error: BaseException, source: str, field: str) -> tuple[str, str]:
    """Return what went wrong with a download, and the remedy."""
    hub = constants.ENDPOINT
    if constants.is_offline_mode():
        return "is not a local path and not fully cached, and HF_HUB_OFFLINE is set", "unset it once to download"

    if isinstance(error, errors.LocalEntryNotFoundError):
        # The cache was only tried because an earlier request failed: that failure is the one to report.
        error = error.__cause__ or error.__context__ or error
    if not isinstance(error, errors.HfHubHTTPError):
        rule = f"is not a local path and not fully cached, and downloading from {hub} failed: {first_line(error)}"
        return rule, "check the network and the cache folder (HF_HOME), then run it again"

    status = error.response.status_code
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return f"is gated or private at {hub}", "accept its terms there, then set HF_TOKEN or run `hf auth login`"
    # The hub answers 401 for a name that does not exist, so that it does not reveal private names.
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        rule = f"is not a local path, and {hub} shows no such repository"
        return rule, "correct the name; if it is private, set HF_TOKEN or run `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"is not a revision known to {hub}", "correct the part after the @"
    if status == 404 and field not in _SNAPSHOTS:
        file = str(error.response.url).rpartition("/")[2]
        remedy = f"name a repository that has it; `detoxrl convert {source} FOLDER` makes safetensors of a .bin"
        return f"has no {file} at {hub}", remedy
    return f"was answered by {hub} with status {status}", "try again later, or set HF_TOKEN for a higher rate limit"
