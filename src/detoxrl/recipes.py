"""Which settings go by a name?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from detoxrl.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    GenerationConfig,
    PolicyConfig,
    RewardConfig,
    RlConfig,
    SftConfig,
)
from detoxrl.errors import require
from detoxrl.settings import changed, nearest

_HATE = "facebook/roberta-hate-speech-dynabench-r4-target"

# The notebook that dialogsum, its relatives and samsum-detoxify descend from, with its mistakes put right (see
# docs/from-the-notebook.md). Its instruct LoRA is gone, so a warm start on the references takes its place.
_DIALOGSUM = Config(
    recipe="dialogsum",
    data=DataConfig(
        source="knkarthick/dialogsum",
        min_length=200,
        max_length=1000,
        template="\nSummarize the following conversation.\n\n{dialogue}\n\nSummary:\n",
    ),
    policy=PolicyConfig(base="google/flan-t5-base"),
    sft=SftConfig(steps=300, batch_size=16, lr=1e-3, full_weights=False, baseline_steps=0),
    reward=RewardConfig(classifier=_HATE, normalise_on=0),
    generation=GenerationConfig(max_new_tokens=64, batch_size=16),
    rl=RlConfig(
        steps=10,
        batch_size=16,
        minibatch_size=4,
        microbatch_size=4,
        epochs=1,
        lr=1.41e-5,
        value_lr=1.41e-5,
        kl_coef=0.2,
        kl_target=6.0,
        kl_horizon=10_000,
        validation_prompts=64,
    ),
    evaluation=EvaluationConfig(
        primary_judge="s-nlp/roberta_toxicity_classifier", judge_label="toxic", prompts=200, samples_per_prompt=2
    ),
)
_SAMSUM = replace(
    _DIALOGSUM,
    recipe="samsum-detoxify",
    data=DataConfig(source="knkarthick/samsum", limit=500),
    sft=replace(_DIALOGSUM.sft, steps=0),
    reward=RewardConfig(
        classifier="unitary/toxic-bert",
        toxic_label="toxic",
        good_label=None,
        score="not_toxicity",
        normalise_on=0,
        missing_eos_penalty=0.1,  # scores lie in [0, 1]
        empty_score=0.0,
    ),
    rl=replace(_DIALOGSUM.rl, steps=50, batch_size=8),
)


def _long(config: Config, limit: int | None = None) -> Config:
    """Return a recipe with what can move a model: a LoRA's learning rate, normalised scores, many more responses."""
    return replace(
        config,
        recipe=f"{config.recipe}-long",
        data=replace(config.data, limit=limit or config.data.limit),
        reward=replace(config.reward, normalise_on=256, missing_eos_penalty=1.0, empty_score=-5.0),
        rl=replace(
            config.rl,
            steps=200,
            batch_size=64,
            minibatch_size=16,
            epochs=2,
            lr=1e-4,
            value_lr=1e-3,
            kl_coef=0.05,
            kl_target=None,
            validate_every=20,
            validation_prompts=128,
        ),
        evaluation=replace(config.evaluation, prompts=500),
    )


_LOWMEM = replace(
    _DIALOGSUM,
    recipe="dialogsum-lowmem",
    policy=replace(_DIALOGSUM.policy, bf16=True),
    generation=replace(_DIALOGSUM.generation, batch_size=8),
    rl=replace(_DIALOGSUM.rl, steps=20, microbatch_size=2),
)
_LARGE = replace(_DIALOGSUM, recipe="dialogsum-large", policy=PolicyConfig(base="google/flan-t5-large"))
_TEN = "ten steps as in the course notebook, its mistakes put right"
_MOVES = "settings meant to move it"

_RECIPES = {
    config.recipe: (purpose, config)
    for purpose, config in (
        (
            "embedded dialogues, a small T5 from scratch, a small hate classifier: no network, minutes on a CPU",
            Config(
                recipe="quickstart",
                # lam = 1: the verb that decides whether an insult follows stands some 20 tokens before the score.
                rl=RlConfig(
                    steps=60, batch_size=128, minibatch_size=32, microbatch_size=32, lam=1.0, kl_coef=0.2, lr=3e-4
                ),
            ),
        ),
        (
            "your dialogues, model and classifier: LoRA on a model that is trained already, no warm start",
            Config(
                recipe="own",
                policy=PolicyConfig(base="google/flan-t5-small"),
                sft=SftConfig(steps=0, baseline_steps=0),
                reward=RewardConfig(classifier=_HATE),
                rl=RlConfig(steps=100, lr=1e-4),
            ),
        ),
        (f"FLAN-T5 base on DialogSum, hate classifier: {_TEN}", _DIALOGSUM),
        (f"the same data and model, {_MOVES}", _long(_DIALOGSUM)),
        ("dialogsum with a bf16 base and small batches, twenty steps: for a laptop", _LOWMEM),
        (f"the same, {_MOVES}", _long(_LOWMEM)),
        ("FLAN-T5 base on 500 dialogues of SAMSum, reward 1 - toxicity by toxic-bert, fifty steps", _SAMSUM),
        (f"all of SAMSum, {_MOVES}", _long(_SAMSUM, limit=24_000)),
        (f"FLAN-T5 large on DialogSum: {_TEN}", _LARGE),
        (f"the same data and model, {_MOVES}", _long(_LARGE)),
    )
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
