"""How do models and data come from a hub, at a revision (`name@revision`) that is known afterwards?"""

import errno
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants, errors

from detoxrl.errors import InputError, first_line, require

_NAME = r"\w([\w.-]{0,94}\w)?"
_ID = re.compile(rf"(?![^@]*(--|\.\.)){_NAME}(/{_NAME})?(@[\w.-]+(/[\w.-]+)*)?", re.ASCII)
_DATA = (".csv", ".tsv", ".json", ".jsonl", ".gz", ".zst", ".parquet", ".arrow")
_SMALL = ["*.json", "*.txt", "*.model", "*.jinja"]  # what a model's folder may hold beside its weights
# What is fetched at once, by the hub's list of files: data, and a model that is to be converted.
_LISTED: dict[str, dict[str, Any]] = {
    "data.source": {"repo_type": "dataset", "allow_patterns": [*(f"*{ending}" for ending in _DATA), "README.md"]},
    "FROM": {"allow_patterns": [*_SMALL, "pytorch_model*.bin", "adapter_model*.bin"]},
}


def is_hub_id(source: str) -> bool:
    """Return whether `source` can only mean a hub id: it has the form of one, and nothing here has that name."""
    # What ends like a data file was meant as one, so whoever mistypes it is told what files there are.
    file = source.partition("@")[0].lower().endswith((*_DATA, ".git"))
    return _ID.fullmatch(source) is not None and not file and not Path(source).exists()


def pin_revision(source: str, field: str) -> str:
    """Return a hub id as `name@commit`, the commit being that of its revision now. Raises InputError."""
    if not is_hub_id(source):
        return source
    with _answered(source, field):
        return f"{source.partition('@')[0]}@{_begun(source, field).name}"


def fetch(source: str, field: str, weights: bool = True) -> str:
    """Return the folder that holds what a hub id names for a setting; what is no hub id comes back as it is.

    Raises InputError when there is no such thing, or when its weights, if wanted, cannot be had as safetensors.
    """
    if not is_hub_id(source):
        remedy = "give a folder, or a hub id such as google/flan-t5-small"
        require(Path(source).exists(), field, source, "is no folder here, and no hub id", remedy)
        return source
    with _answered(source, field):
        folder = _begun(source, field)
        if field not in _LISTED:
            commit = f"{source.partition('@')[0]}@{folder.name}"
            _asked(commit, allow_patterns=_SMALL)
            for file in _weight_files(folder, field) if weights else ():
                _asked(commit, filename=file)
    return str(folder)


def fetch_policy(source: str, field: str) -> str:
    """Return the folder of a model or LoRA; a hub id is a LoRA where it holds such settings. Raises InputError."""
    with _answered(source, field), suppress(errors.EntryNotFoundError):
        if is_hub_id(source):
            _asked(source, filename="adapter_config.json")
            return fetch(source, "policy.adapter")
    return fetch(source, field)


def download_size(source: str, field: str) -> int:
    """Return how much of a model's weights is not on this machine yet. Raises InputError."""
    if not is_hub_id(source):
        return 0
    folder = Path(fetch(source, field, weights=False))
    with _answered(source, field):
        commit = f"{source.partition('@')[0]}@{folder.name}"
        found = [_asked(commit, filename=file, dry_run=True) for file in _weight_files(folder, field)]
    return sum(file.file_size or 0 for file in found if file.will_download)


def push_token(name: str) -> str:
    """Return the token to push `name` with. Raises InputError when there is none, or the name is no OWNER/NAME."""
    fits = re.fullmatch(f"{_NAME}/{_NAME}", name, re.ASCII) and not re.search(r"--|\.\.|\.git$", name)
    require(bool(fits), "--push", name, "is no name on a hub", "say OWNER/NAME in letters, digits, dots and dashes")
    on, token = not constants.is_offline_mode(), huggingface_hub.get_token()
    require(on, "--push", name, "needs the hub, and HF_HUB_OFFLINE is set", "unset it, or leave --push out")
    require(bool(token), "--push", name, "needs a token, and there is none", "set HF_TOKEN, or run `hf auth login`")
    return str(token)


def push_folder(folder: Path, name: str, token: str, private: bool, overwrite: bool) -> str:
    """Upload a folder as the model repository `name` and return its address; `overwrite` replaces an earlier export.

    Raises InputError, which never holds the token, when the hub does not take it.
    """
    api = huggingface_hub.HfApi(token=token)
    try:
        address = str(api.create_repo(name, private=private or None, exist_ok=overwrite))
        there = api.model_info(name)
        files, tags = {file.rfilename for file in there.siblings or []}, there.tags or []
        ours = files <= {".gitattributes"} or "detoxrl" in tags
        require(ours, "--push", name, "holds something else than an export of detoxrl", "choose another name")
        rule, remedy = "is there already, and everybody can see it", "make it private there, or leave --private out"
        require(bool(there.private) or not private, "--push", name, rule, remedy)
        # Deleted is what an earlier export had and this one has not; the hub's history keeps it.
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export", delete_patterns="*")
        return address
    # Their messages may quote a header, and with it the token.
    except (errors.HTTPError, OSError, RuntimeError, ValueError) as error:  # type: ignore[attr-defined]
        status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
        by, better = f"was refused by {constants.ENDPOINT}:", "set HF_TOKEN to one that may write there"
        rule, remedy = {
            0: (f"could not be sent to {constants.ENDPOINT} ({type(error).__name__})", "try again later"),
            401: (f"{by} the token is not valid", f"{better}, or run `hf auth login`"),
            403: (f"{by} the token may not write there", f"{better}, or name an OWNER that is you"),
            409: (f"{by} it exists already", "choose another name, or add --overwrite to replace an earlier export"),
        }.get(status, (f"was answered by {constants.ENDPOINT} with status {status}", "try again later"))
        raise InputError("--push", name, rule, remedy) from None


def _begun(source: str, field: str) -> Path:
    """Return the folder of the commit that a hub id means now, with its settings or, of what is listed, whole."""
    if field in _LISTED:
        return Path(_asked(source, **_LISTED[field]))
    return Path(_asked(source, filename="adapter_config.json" if field == "policy.adapter" else "config.json")).parent


def _weight_files(folder: Path, field: str) -> list[str]:
    whole = "adapter_model.safetensors" if field == "policy.adapter" else "model.safetensors"
    index = folder / f"{whole}.index.json"
    if not index.is_file():
        return [whole]
    found = json.loads(index.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not isinstance(found.get("weight_map"), dict):
        raise ValueError(f"{whole}.index.json names no weights")
    return sorted(set(found["weight_map"].values()))


def _asked(source: str, **wanted: Any) -> Any:
    """Return what a hub gives of `name@revision`, or where the connection breaks off what the cache holds."""
    name, _, revision = source.partition("@")
    get = huggingface_hub.hf_hub_download if "filename" in wanted else huggingface_hub.snapshot_download
    ask = partial[Any](get, name, revision=revision or None, **wanted)
    try:
        return ask()
    except errors.HfHubHTTPError:
        raise
    except errors.HTTPError:  # type: ignore[attr-defined]
        return ask(local_files_only=True)


@contextmanager
def _answered(source: str, field: str) -> Iterator[None]:
    """Turn what a hub, or the way to it, can answer into one line that says what to do."""
    try:
        yield
    # hf_xet raises RuntimeError, an index that is none ValueError.
    except (errors.HTTPError, OSError, RuntimeError, ValueError) as error:  # type: ignore[attr-defined]
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(field, source, *_trouble(error, source, field)) from error


def _trouble(error: BaseException, source: str, field: str) -> tuple[str, str]:
    """Return what is wrong, and what to do, when a hub gave not what it was asked for."""
    if isinstance(error, errors.LocalEntryNotFoundError):  # what went wrong, not that the cache did not help then
        error = error.__cause__ or error.__context__ or error
    answer = error.response if isinstance(error, errors.HfHubHTTPError) else None
    status, file = (None, "") if answer is None else (answer.status_code, str(answer.url).rpartition("/")[2])
    kind, nowhere, login = partial(isinstance, error), "is no file or folder here", "or run `hf auth login`"
    hub, uncached = constants.ENDPOINT, f"{nowhere}, nor whole in the cache, and"
    convert = f"name one that does; `detoxrl convert {source} FOLDER` makes safetensors of a .bin"
    return next((rule, remedy) for holds, rule, remedy in (
        (kind(ValueError) and status is None, f"cannot be read as {hub} gives it: {first_line(error)}",
         "name another revision"),
        (constants.is_offline_mode(), f"{uncached} HF_HUB_OFFLINE is set", "unset it once to fetch what is missing"),
        (getattr(error, "errno", None), f"cannot be kept in the cache: {error}",
         "make it writable, or set HF_HOME to another folder"),
        (kind(errors.GatedRepoError), f"is gated at {hub}", f"accept its terms there, then set HF_TOKEN {login}"),
        (kind(errors.RevisionNotFoundError), f"is no revision known to {hub}", "correct what follows the @"),
        (kind(errors.RepositoryNotFoundError) or status == 401, f"{nowhere}, and no repository that {hub} shows",
         f"correct the name; a private one needs a valid HF_TOKEN, {login}"),
        (status == 404 and field != "data.source", f"{nowhere}, and at {hub} holds no {file}", convert),
        (status == 403, f"was refused by {hub} with status 403", f"set HF_TOKEN to one that may, {login}"),
        (status == 429, f"was refused by {hub}: too many requests",
         "wait some minutes, or set HF_TOKEN for a higher limit"),
        (status, f"was answered by {hub} with status {status}", "try again later"),
        (True, f"{uncached} could not be fetched from {hub} ({first_line(error)})",
         "run it again when the network is back: what came whole is kept"),
    ) if holds)  # fmt: skip
