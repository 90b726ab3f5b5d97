"""How is a file written so that a kill or a power cut leaves the old one or the new one, and never half of it?

It is written under a temporary name in the same folder, flushed to the disk, and renamed.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from detoxrl.config.names import misspelt, question
from detoxrl.errors import StorageError, first_line

# .NAME.new123 is being written by process 123, .NAME.old123 was moved aside by it, .NAME.gone123 is being deleted.
_TEMPORARY = re.compile(r"\.(?P<target>.+)\.(?P<kind>new|old|gone)\d+")
# How many names of a folder's content an error shows.
_MAX_SHOWN = 10


def _temporary_path(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}{os.getpid()}")


def is_temporary(path: Path) -> bool:
    """Return whether the name is one that this module gives to files and folders while it writes or deletes them."""
    return _TEMPORARY.fullmatch(path.name) is not None


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    windows = os.name == "nt"
    if windows and path.is_dir():  # Windows cannot open a folder
        return

    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; missing parent folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_path(path, "new")

    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces `target` when the block ends; if the block raises, it is deleted.

    Folders cannot be swapped atomically: between two renames there is no `target`. A kill at that moment is repaired by
    `remove_leftovers`.
    """
    temporary = _temporary_path(target, "new")
    old = _temporary_path(target, "old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)

    try:
        yield temporary

        for path in temporary.rglob("*"):
            sync(path)
        sync(temporary)

        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
        sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def copy_path(source: Path, target: Path) -> None:
    """Copy a text file or a folder atomically; without a `source` nothing happens."""
    if source.is_dir():
        with replace_folder(target) as temporary:
            shutil.copytree(source, temporary, dirs_exist_ok=True)
    elif source.is_file():
        sync(source)  # lines appended to a log may not be on the disk yet
        write_text(target, source.read_text(encoding="utf-8"))


def remove_path(path: Path) -> None:
    """Delete a file or folder, if it exists. A folder is renamed first, so that a kill never leaves a part of it."""
    if path.is_dir() and not path.is_symlink():
        gone = _temporary_path(path, "gone")
        os.replace(path, gone)
        shutil.rmtree(gone)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left half written or half deleted. The caller holds the lock of `folder`.

    A folder that was moved aside for a replacement that never came is moved back.
    """
    for path in sorted(folder.rglob(".*")):
        match = _TEMPORARY.fullmatch(path.name)
        if match is not None and path.exists():  # It may have been deleted together with a folder above it.
            _remove_leftover(path, match)


def remove_leftovers_of(target: Path) -> None:
    """Delete what killed processes left beside `target` while they replaced it, as `remove_leftovers` does.

    The caller holds a lock without which nobody writes `target`.
    """
    for path in sorted(target.absolute().parent.glob(".*")):
        match = _TEMPORARY.fullmatch(path.name)
        if match is not None and match["target"] == target.name:
            _remove_leftover(path, match)


def _remove_leftover(path: Path, match: re.Match[str]) -> None:
    target = path.with_name(match["target"])
    if match["kind"] == "old" and not target.exists():
        os.replace(path, target)
    else:
        remove_path(path)


def file_digests(path: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in a folder by its relative path; a single file has the path "."."""
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())

    digests = {}
    for file in files:
        with file.open("rb") as content:
            digests[file.relative_to(path).as_posix()] = hashlib.file_digest(content, "sha256").hexdigest()
    return digests


def content_digest(path: Path) -> str:
    """Return 16 hexadecimal digits that identify the content of a file, or the names and contents in a folder."""
    lines = [f"{name} {digest}" for name, digest in file_digests(path).items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@contextmanager
def explain_corruption(path: Path, remedy: str) -> Iterator[None]:
    """Turn errors about a corrupted or missing file inside the block into a StorageError with the remedy."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, RecursionError) as error:
        raise StorageError(f"{path} cannot be read: {first_line(error)}; {remedy}") from error


def nearby_paths(path: Path) -> str:
    """Return the remedy for a path that does not exist: the one that was meant, or what its folder contains.

    "" if that folder does not exist or is empty.
    """
    names = _neighbours(path)
    shown = ", ".join(names[:_MAX_SHOWN]) + (" ..." if len(names) > _MAX_SHOWN else "")
    return meant_path(path) or (f"{path.parent} contains {shown}" if names else "")


def meant_path(path: Path) -> str:
    """Return the question whether another path was meant; "" if `path` is a misspelling of none that exists."""
    return question([str(path.parent / name) for name in misspelt(path.name, _neighbours(path))])


def _neighbours(path: Path) -> list[str]:
    """Return the names in the folder of a path, hidden ones aside; none if there is no such folder."""
    if not path.parent.is_dir():
        return []
    return sorted(other.name for other in path.parent.iterdir() if not other.name.startswith("."))
