"""detoxrl makes a text generator less toxic with reinforcement learning, keeps what it says, and proves both."""

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detoxrl.commands.export import export
    from detoxrl.commands.fit import fit
    from detoxrl.commands.run import evaluate, run
    from detoxrl.config.recipes import recipe, recipe_names
    from detoxrl.config.schema import Config
    from detoxrl.errors import DetoxrlError, InputError, StorageError, TrainingError
    from detoxrl.rewards.function import RewardFunction

__version__ = "0.1.0"

__all__ = [
    "Config", "DetoxrlError", "InputError", "RewardFunction", "StorageError", "TrainingError", "__version__",
    "evaluate", "export", "fit", "recipe", "recipe_names", "run",
]  # fmt: skip

_ENVIRONMENT = {
    # OpenMP threads spin while they wait. If another job shares the cores, two spinning teams slow each other down a
    # hundredfold (docs/log.md). OpenMP reads this when torch is imported.
    "GOMP_SPINCOUNT": "2000",
    # oneDNN keeps compiled code for each shape that it has met, and padded batches have many shapes. By default it and
    # torch keep 1,024 each: 0.6 GiB in the quickstart, for no gain in time (docs/log.md).
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "LRU_CACHE_CAPACITY": "128",
    "TOKENIZERS_PARALLELISM": "false",
    # Libraries send no telemetry, and wandb does not copy what is printed.
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_CONSOLE": "off",
}
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

# The public names are imported on first use, so that `import detoxrl` does not wait for torch.
_MODULES = {
    "Config": "detoxrl.config.schema",
    "DetoxrlError": "detoxrl.errors",
    "InputError": "detoxrl.errors",
    "RewardFunction": "detoxrl.rewards.function",
    "StorageError": "detoxrl.errors",
    "TrainingError": "detoxrl.errors",
    "evaluate": "detoxrl.commands.run",
    "export": "detoxrl.commands.export",
    "fit": "detoxrl.commands.fit",
    "recipe": "detoxrl.config.recipes",
    "recipe_names": "detoxrl.config.recipes",
    "run": "detoxrl.commands.run",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'detoxrl' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
