"""Which settings go by a name?"""

from collections.abc import Mapping
from typing import Any

from detoxrl.config.edit import closest_match, with_settings
from detoxrl.config.schema import Config
from detoxrl.errors import require

_HATE = "facebook/roberta-hate-speech-dynabench-r4-target"
_QUICKSTART = {
    # lam = 1: the verb that decides whether an insult follows stands some 20 tokens before the score.
    "rl.steps": 60, "rl.batch_size": 128, "rl.minibatch_size": 32, "rl.lam": 1.0,
    "rl.kl_coef": 0.2, "rl.lr": 3e-4,
}  # fmt: skip
_OWN = {
    "policy.base": "google/flan-t5-small", "sft.steps": 0, "sft.baseline_steps": 0, "reward.classifier": _HATE,
    "rl.steps": 100, "rl.lr": 1e-4,
}  # fmt: skip
# The notebook that these descend from, with its mistakes put right (docs/from-the-notebook.md). Its instruct LoRA is
# gone, so a warm start on the references takes its place.
_DIALOGSUM = {
    "data.source": "knkarthick/dialogsum", "data.min_length": 200, "data.max_length": 1000,
    "data.template": "\nSummarize the following conversation.\n\n{dialogue}\n\nSummary:\n",
    "policy.base": "google/flan-t5-base",
    "sft.steps": 400, "sft.batch_size": 8, "sft.lr": 1e-3, "sft.full_weights": False, "sft.baseline_steps": 0,
    "reward.classifier": _HATE, "reward.normalise_on": 0,
    "generation.max_new_tokens": 64, "generation.batch_size": 16,
    "rl.steps": 10, "rl.batch_size": 16, "rl.minibatch_size": 4, "rl.epochs": 1,
    "rl.lr": 1.41e-5, "rl.value_lr": 1.41e-5, "rl.kl_coef": 0.2, "rl.kl_target": 6.0, "rl.kl_horizon": 10_000,
    "rl.validation_prompts": 64,
    "evaluation.primary_judge": "s-nlp/roberta_toxicity_classifier", "evaluation.judge_label": "toxic",
    "evaluation.prompts": 200, "evaluation.samples_per_prompt": 2, "evaluation.best_of": (4,),
}  # fmt: skip
_LOWMEM = {
    "policy.bf16": True, "reward.bf16": True, "generation.batch_size": 8, "rl.steps": 20, "rl.microbatch_size": 2,
}  # fmt: skip
_SAMSUM = {name: value for name, value in _DIALOGSUM.items() if not name.startswith("data.")} | {
    "data.source": "knkarthick/samsum", "data.limit": 500, "sft.steps": 0,
    "reward.classifier": "unitary/toxic-bert", "reward.toxic_label": "toxic", "reward.good_label": None,
    "reward.score": "not_toxicity", "reward.missing_eos_penalty": 0.1, "reward.empty_score": 0.0,  # of [0, 1]
    "rl.steps": 50, "rl.batch_size": 8,
}  # fmt: skip
# What can move a model: a LoRA's learning rate, normalised scores, many more responses.
_LONG = {
    "reward.normalise_on": 256, "reward.missing_eos_penalty": 1.0, "reward.empty_score": -5.0,
    "rl.steps": 200, "rl.batch_size": 64, "rl.minibatch_size": 16, "rl.epochs": 2, "rl.lr": 1e-4, "rl.value_lr": 1e-3,
    "rl.kl_coef": 0.05, "rl.kl_target": None, "rl.validate_every": 20, "rl.validation_prompts": 128,
    "evaluation.prompts": 500, "evaluation.best_of": (4, 16),
}  # fmt: skip
_LARGE = {"policy.base": "google/flan-t5-large"}
_TEN, _MOVES = "ten steps as in the course notebook, its mistakes put right", "settings meant to move it"

_RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "quickstart": ("embedded dialogues, a small T5 from scratch, a small hate classifier: no network, minutes on a CPU",
                   _QUICKSTART),
    "own": ("your dialogues, model and classifier: LoRA on a model that is trained already, no warm start", _OWN),
    "dialogsum": (f"FLAN-T5 base on DialogSum, hate classifier: {_TEN}", _DIALOGSUM),
    "dialogsum-long": (f"the same data and model, {_MOVES}", _DIALOGSUM | _LONG),
    "dialogsum-lowmem": ("dialogsum with a bf16 base and small batches, twenty steps: for a laptop",
                         _DIALOGSUM | _LOWMEM),
    "dialogsum-lowmem-long": (f"the same, {_MOVES}", _DIALOGSUM | _LOWMEM | _LONG),
    "samsum-detoxify": ("FLAN-T5 base on 500 dialogues of SAMSum, reward 1 - toxicity by toxic-bert, fifty steps",
                        _SAMSUM),
    "samsum-detoxify-long": (f"all of SAMSum, {_MOVES}", _SAMSUM | _LONG | {"data.limit": 24_000}),
    "dialogsum-large": (f"FLAN-T5 large on DialogSum: {_TEN}", _DIALOGSUM | _LARGE),
    "dialogsum-large-long": (f"the same data and model, {_MOVES}", _DIALOGSUM | _LARGE | _LONG),
}  # fmt: skip


def recipe_names() -> dict[str, str]:
    """Return each recipe's name and what it is for."""
    return {name: purpose for name, (purpose, _) in _RECIPES.items()}


def recipe(name: str, settings: Mapping[str, object] | None = None) -> Config:
    """Return the settings of a recipe, some of them changed by dotted names: `{"rl.steps": 100}`.

    Raises InputError for an unknown name, with the nearest one.
    """
    require(
        name in _RECIPES, "recipe", name, "is not a recipe", closest_match(name, _RECIPES, f"use {', '.join(_RECIPES)}")
    )
    return with_settings(Config(recipe=name), _RECIPES[name][1] | dict(settings or {}))
