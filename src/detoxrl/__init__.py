"""detoxrl makes a text generator less toxic with reinforcement learning, keeps what it says, and proves both."""

import os
from importlib import import_module
from typing import TYPE_CHECKING

# OpenMP threads spin while they wait; where cores are shared with another job, two spinning teams slow each other
# down a hundredfold (docs/log.md). It must be said before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No library reports of itself, and wandb copies nothing that is printed, unless the environment says otherwise.
os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "WANDB_ERROR_REPORTING": "false", "WANDB_CONSOLE": "off"} | os.environ

if TYPE_CHECKING:
    from detoxrl.commands.export import export
    from detoxrl.commands.run import evaluate, run
    from detoxrl.config.recipes import recipe, recipe_names
    from detoxrl.config.schema import Config
    from detoxrl.errors import DetoxrlError, InputError, StorageError, TrainingError
    from detoxrl.rewards.function import RewardFunction

__version__ = "0.1.0"

# Looked up on first use, so that `import detoxrl` does not import torch; an error's home is errors.
_HOMES = {
    "Config": "config.schema",
    "RewardFunction": "rewards.function",
    "evaluate": "commands.run",
    "run": "commands.run",
}
_HOMES |= {"recipe": "config.recipes", "recipe_names": "config.recipes", "export": "commands.export"}

__all__ = [
    "Config", "DetoxrlError", "InputError", "RewardFunction", "StorageError", "TrainingError", "__version__",
    "evaluate", "export", "recipe", "recipe_names", "run",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'detoxrl' has no attribute {name!r}")
    return getattr(import_module(f"detoxrl.{_HOMES.get(name, 'errors')}"), name)
