"""Which settings go by a name?"""

from __future__ import annotations

from collections.abc import Mapping

from detoxrl.config import Config, PolicyConfig, RewardConfig, RlConfig, SftConfig
from detoxrl.errors import require
from detoxrl.settings import changed, nearest

_RECIPES = {
    "quickstart": (
        "embedded dialogues, a small T5 from scratch, a small hate classifier: no network, minutes on a CPU",
        Config(
            recipe="quickstart",
            # lam = 1: the verb that decides whether an insult follows stands some 20 tokens before the score.
            rl=RlConfig(steps=60, batch_size=128, minibatch_size=32, microbatch_size=32, lam=1.0, kl_coef=0.2, lr=3e-4),
        ),
    ),
    "own": (
        "your dialogues, model and classifier: LoRA on a model that is trained already, no warm start",
        Config(
            recipe="own",
            policy=PolicyConfig(base="google/flan-t5-small"),
            sft=SftConfig(steps=0, baseline_steps=0),
            reward=RewardConfig(classifier="facebook/roberta-hate-speech-dynabench-r4-target"),
            rl=RlConfig(steps=100, lr=1e-4),
        ),
    ),
}


def recipe_names() -> dict[str, str]:
    """Return each recipe's name and what it is for."""
    return {name: purpose for name, (purpose, _) in _RECIPES.items()}


def recipe(name: str, settings: Mapping[str, object] | None = None) -> Config:
    """Return the settings of a recipe, some of them changed by dotted names: `{"rl.steps": 100}`.

    Raises InputError for an unknown name, with the nearest one.
    """
    require(name in _RECIPES, "recipe", name, "is not a recipe", nearest(name, _RECIPES, f"use {', '.join(_RECIPES)}"))
    return changed(_RECIPES[name][1], settings or {})
