"""Which settings go by a name?"""

from __future__ import annotations

from detoxrl.config import Config, RlConfig
from detoxrl.errors import InputError

_RECIPES = {
    "quickstart": (
        "embedded dialogues, a small T5 from scratch, a small hate classifier: no network, minutes on a CPU",
        Config(
            recipe="quickstart",
            # lam = 1: the verb that decides whether an insult follows stands some 20 tokens before the score.
            rl=RlConfig(steps=60, batch_size=128, minibatch_size=32, microbatch_size=32, lam=1.0, kl_coef=0.2, lr=3e-4),
        ),
    ),
}


def recipe_names() -> dict[str, str]:
    """Return each recipe's name and what it is for."""
    return {name: purpose for name, (purpose, _) in _RECIPES.items()}


def recipe(name: str) -> Config:
    """Return the settings of a recipe. Raises InputError for an unknown name."""
    if name not in _RECIPES:
        raise InputError("recipe", name, "is not a recipe", f"use one of {', '.join(_RECIPES)}")
    return _RECIPES[name][1]
