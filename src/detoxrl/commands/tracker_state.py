"""Which tracker follows a run?

It is known before anything slow is imported: neither torch nor a tracker is needed for the answer.
"""

from pathlib import Path
from typing import Any

from detoxrl.config.names import did_you_mean
from detoxrl.config.packages import is_installed
from detoxrl.errors import require
from detoxrl.runtime.run_folder import RunFolder

STATE = "tracker.json"
_NAMES = ("none", "tensorboard", "trackio", "wandb")


def resolve_tracker(asked: str | None, root: Path | None = None) -> str:
    """Return the tracker asked for, else the one that the run in `root` has, else "none". Imports no tracker.

    Raises InputError when the name is not a tracker's, or the tracker is not installed.
    """
    if asked:
        name = asked
    elif root:
        name = read_state(RunFolder(root))["tracker"]
    else:
        name = "none"

    remedy = did_you_mean(name, _NAMES, f"choose from {', '.join(_NAMES)}")
    require(name in _NAMES, "--track", name, "is not a tracker", remedy)

    installed = name == "none" or is_installed(name)
    require(installed, "--track", name, "is not installed", "pip install 'detoxrl[track]'")
    return name


def read_state(folder: RunFolder) -> dict[str, Any]:
    """Return the content of tracker.json; without that file, of a run that no tracker follows."""
    if (folder / STATE).is_file():
        return dict(folder.read_json(STATE))
    return {"tracker": "none", "sent": {}}
