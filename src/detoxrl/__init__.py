"""detoxrl makes a text generator less toxic with reinforcement learning, keeps what it says, and proves both."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detoxrl.config import Config
    from detoxrl.errors import DetoxrlError, InputError, TrainingError
    from detoxrl.recipes import recipe, recipe_names
    from detoxrl.stages import run

__version__ = "0.1.0"

# Looked up on first use, so that `import detoxrl` does not import torch.
_HOMES = {
    "Config": "detoxrl.config",
    "DetoxrlError": "detoxrl.errors",
    "InputError": "detoxrl.errors",
    "TrainingError": "detoxrl.errors",
    "recipe": "detoxrl.recipes",
    "recipe_names": "detoxrl.recipes",
    "run": "detoxrl.stages",
}

__all__ = [
    "Config",
    "DetoxrlError",
    "InputError",
    "TrainingError",
    "__version__",
    "recipe",
    "recipe_names",
    "run",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'detoxrl' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
