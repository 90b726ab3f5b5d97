"""How is something written so that a kill or a power cut leaves the old or the new, and never half of it?

It is written under a temporary name beside its own, brought to the disk, and renamed.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from detoxrl.errors import StorageError, first_line

_TEMPORARY = re.compile(r"\.(.+)\.(new|old|gone)\d+")


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}{os.getpid()}")


def is_temporary(path: Path) -> bool:
    """Return whether the name is one under which this room writes."""
    return _TEMPORARY.fullmatch(path.name) is not None


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folder
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path, "new")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `target` once it is complete; on an error it is removed.

    A folder that was there is away for the moment between two renames; what must survive that is in a checkpoint.
    """
    temporary, old = _beside(target, "new"), _beside(target, "old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
        sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def copy_path(source: Path, target: Path) -> None:
    """Copy a text file or a folder, where there is one, so that it is there whole or not at all."""
    if source.is_dir():
        with replace_folder(target) as temporary:
            shutil.copytree(source, temporary, dirs_exist_ok=True)
    elif source.is_file():
        sync(source)  # a log may have been appended to
        write_text(target, source.read_text(encoding="utf-8"))


def remove_path(path: Path) -> None:
    """Delete a file or folder, if it is there, so that it is there whole or not at all."""
    if path.is_dir() and not path.is_symlink():
        gone = _beside(path, "gone")
        os.replace(path, gone)
        shutil.rmtree(gone)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left half written or half deleted; no other may be writing in `folder`.

    What was set aside for its replacement, which did not come, takes its place again.
    """
    for path in sorted(folder.rglob(".*")):
        if (name := _TEMPORARY.fullmatch(path.name)) and path.exists():
            target = path.with_name(name[1])
            if name[2] == "old" and not target.exists():
                os.replace(path, target)
            else:
                remove_path(path)


def file_digests(path: Path) -> dict[str, str]:
    """Return the SHA-256 of a file, or of each file in a folder, by its path there."""
    found = {}
    for part in sorted(part for part in path.rglob("*") if part.is_file()) if path.is_dir() else [path]:
        with part.open("rb") as content:
            found[part.relative_to(path).as_posix()] = hashlib.file_digest(content, "sha256").hexdigest()
    return found


def content_digest(path: Path) -> str:
    """Return one short digest of a file, or of all files in a folder and their names."""
    found = [f"{name} {digest}" for name, digest in file_digests(path).items()]
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]


@contextmanager
def explain_corruption(path: Path, remedy: str) -> Iterator[None]:
    """Turn what goes wrong with a torn or missing file into a StorageError that says what to do."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise StorageError(f"{path} is broken: {first_line(error)}; {remedy}") from error
