"""Can a run be exported, and where to?

It is known before anything slow is imported: no torch is needed for the answer.
"""

import os
from pathlib import Path

from detoxrl.errors import require
from detoxrl.runtime.run_folder import RunFolder


def default_target(root: Path) -> Path:
    """Return the folder that a run is exported to unless another is named."""
    return root.parent / f"{root.resolve().name}-export"


def require_writable(target: Path, overwrite: bool) -> None:
    """Raise InputError unless `target` can be created, or is an export that may be replaced."""
    if target.exists():
        card = target / "README.md"
        is_export = card.is_file() and "\n- detoxrl\n" in card.read_text(encoding="utf-8", errors="replace")
        remedy = "name a new folder; nothing was deleted"
        require(is_export, "--to", str(target), "already exists and is not an export", remedy)
        require(overwrite, "--to", str(target), "already exists", "add --overwrite, or name another folder")

    parent = next(parent for parent in target.absolute().parents if parent.exists())
    writable = parent.is_dir() and os.access(parent, os.W_OK)
    rule = f"cannot be created: {parent} is not writable"
    require(writable, "--to", str(target), rule, "name another folder")


def require_measured(folder: RunFolder) -> None:
    """Raise InputError unless the run trained a policy and measured it."""
    root = str(folder.root)
    trained = not folder.read_json("run.json")["measures"]["names"]
    rule = "measures policies that it did not train"
    require(trained, "run folder", root, rule, "name a run that trained one")

    folder.require_product("adapter", "train")
    measured = "evaluate" in folder.finished()
    rule = "has no evaluation for the model card"
    require(measured, "run folder", root, rule, f"run `detoxrl evaluate {root}` first")
