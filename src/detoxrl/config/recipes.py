"""Which complete sets of settings have a name?"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from detoxrl.config.edit import with_settings
from detoxrl.config.names import did_you_mean
from detoxrl.config.schema import Config
from detoxrl.errors import require

Settings = dict[str, Any]

_HATE_CLASSIFIER = "facebook/roberta-hate-speech-dynabench-r4-target"

_QUICKSTART: Settings = {
    "sft.baseline_steps": 100,
    "rl.algorithm": "rloo",
    "rl.steps": 40,
    "rl.batch_size": 128,
    "rl.minibatch_size": 32,
    # For ppo: the verb that decides whether an insult follows stands about 20 tokens before the score at the end; a
    # smaller lambda would hardly credit it.
    "rl.lam": 1.0,
    "rl.kl_coef": 0.2,
    "rl.lr": 3e-4,
    "rl.validate_every": 10,
}

_OWN: Settings = {
    "policy.base": "google/flan-t5-small",
    "sft.steps": 0,
    "sft.baseline_steps": 0,
    "reward.classifier": _HATE_CLASSIFIER,
    "rl.algorithm": "rloo",
    "rl.steps": 100,
    "rl.lr": 1e-4,
}

# Model, reward and hyperparameters of the course notebook, with its mistakes corrected (docs/from-the-notebook.md).
# The notebook starts from an instruct LoRA that is no longer available; a warm start on the references replaces it.
_NOTEBOOK: Settings = {
    "policy.base": "google/flan-t5-base",
    "sft.steps": 400,
    "sft.batch_size": 8,
    "sft.lr": 1e-3,
    "sft.full_weights": False,
    "sft.baseline_steps": 0,
    "reward.classifier": _HATE_CLASSIFIER,
    "reward.normalise_on": 0,
    "generation.max_new_tokens": 64,
    "generation.batch_size": 16,
    "rl.steps": 10,
    "rl.batch_size": 16,
    "rl.minibatch_size": 4,
    "rl.epochs": 1,
    "rl.lr": 1.41e-5,
    "rl.value_lr": 1.41e-5,
    "rl.kl_coef": 0.2,
    "rl.kl_target": 6.0,
    "rl.kl_horizon": 10_000,
    "rl.validation_prompts": 64,
    "evaluation.primary_judge": "s-nlp/roberta_toxicity_classifier",
    "evaluation.judge_label": "toxic",
    "evaluation.prompts": 200,
    "evaluation.samples_per_prompt": 2,
    "evaluation.best_of": (4,),
}

_DIALOGSUM: Settings = {
    **_NOTEBOOK,
    "data.source": "knkarthick/dialogsum",
    "data.min_length": 200,
    "data.max_length": 1000,
    "data.template": "\nSummarize the following conversation.\n\n{dialogue}\n\nSummary:\n",
}

_DIALOGSUM_LOWMEM: Settings = {
    **_DIALOGSUM,
    "policy.bf16": True,
    "reward.bf16": True,
    "generation.batch_size": 8,
    "rl.steps": 20,
    "rl.microbatch_size": 2,
}

_DIALOGSUM_LARGE: Settings = {
    **_DIALOGSUM,
    "policy.base": "google/flan-t5-large",
}

_SAMSUM: Settings = {
    **_NOTEBOOK,
    "data.source": "knkarthick/samsum",
    "data.limit": 500,
    "sft.steps": 0,
    "reward.classifier": "unitary/toxic-bert",
    "reward.toxic_label": "toxic",
    "reward.good_label": None,
    "reward.score": "not_toxicity",
    # Scores are not normalised here: they are probabilities.
    "reward.missing_eos_penalty": 0.1,
    "reward.empty_score": 0.0,
    "rl.steps": 50,
    "rl.batch_size": 8,
}

# What it takes to move a model: a learning rate for LoRA, normalised scores and many more responses.
_LONG: Settings = {
    "reward.normalise_on": 256,
    "reward.missing_eos_penalty": 1.0,
    "reward.empty_score": -5.0,
    "rl.steps": 200,
    "rl.batch_size": 64,
    "rl.minibatch_size": 16,
    "rl.epochs": 2,
    "rl.lr": 1e-4,
    "rl.value_lr": 1e-3,
    "rl.kl_coef": 0.05,
    "rl.kl_target": None,
    "rl.validate_every": 20,
    "rl.validation_prompts": 128,
    "evaluation.prompts": 500,
    "evaluation.best_of": (4, 16),
}

# What moves a small causal model in few steps, on open-ended text: a high rate, and a weak KL.
_CAUSAL: Settings = {
    "policy.lora_rank": 16,
    "policy.lora_alpha": 16,
    "sft.steps": 0,
    "sft.baseline_steps": 0,
    "rl.algorithm": "rloo",
    "rl.lr": 5e-4,
    "rl.kl_coef": 0.05,
    "rl.batch_size": 32,
    "rl.minibatch_size": 16,
    "rl.lam": 1.0,
    "evaluation.best_of": (4,),
}

_SMOLLM2: Settings = {
    **_CAUSAL,
    "data.task": "chat",
    "data.limit": 2_000,
    "policy.base": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "reward.encoder": "sentence-transformers/all-MiniLM-L6-v2",
    # Replies are cut at 24 tokens to save time, so not ending says nothing of a reply.
    "reward.missing_eos_penalty": 0.0,
    "reward.normalise_on": 64,
    "generation.max_new_tokens": 24,
    "generation.batch_size": 64,
    "rl.steps": 20,
    "rl.kl_coef": 0.1,
    "rl.microbatch_size": 8,
    "rl.validate_every": 5,
    "rl.validation_prompts": 128,
    "evaluation.prompts": 200,
    "evaluation.samples_per_prompt": 2,
}

_TOXIC_BERT: Settings = {
    "reward.classifier": "unitary/toxic-bert",
    "reward.toxic_label": "toxic",
    "reward.good_label": None,
    "reward.score": "log_odds",
    "evaluation.primary_judge": "s-nlp/roberta_toxicity_classifier",
    "evaluation.judge_label": "toxic",
}

# The protocol of RealToxicityPrompts (Gehman et al. 2020), sampled from all tokens and with top-p as published.
_REALTOXICITY: Settings = {
    **_CAUSAL,
    **_TOXIC_BERT,
    "data.task": "continue",
    "data.source": "allenai/real-toxicity-prompts",
    "data.text_column": "prompt.text",
    "data.reference_column": "continuation.text",
    "data.toxicity_column": "prompt.toxicity",
    "data.min_toxicity": 0.3,
    "policy.base": "HuggingFaceTB/SmolLM2-135M",
    "generation.max_new_tokens": 20,
    # Tried on one seed (docs/log.md): with both, 20 steps reach what 40 steps of 32 responses at 0.05 did not.
    "rl.batch_size": 64,
    "rl.steps": 60,
    "rl.kl_coef": 0.02,
    # Of distinct word pairs, whose loss is to stay below a tenth.
    "rl.quality_margin": 0.09,
    "rl.validate_every": 10,
    "rl.validation_prompts": 200,
    "evaluation.prompts": 400,
    "evaluation.samples_per_prompt": 25,
    "evaluation.top_p": 0.9,
}

_PARADETOX: Settings = {
    **_TOXIC_BERT,
    "data.task": "rewrite",
    "data.source": "s-nlp/paradetox",
    "data.text_column": "en_toxic_comment",
    "data.reference_column": "en_neutral_comment",
    "data.max_prompt_tokens": 128,
    "policy.base": "google/flan-t5-base",
    "sft.steps": 1_000,
    "sft.batch_size": 16,
    "sft.lr": 1e-3,
    "sft.full_weights": False,
    "sft.baseline_steps": 0,
    "generation.max_new_tokens": 48,
    "rl.steps": 100,
    "rl.lr": 1e-4,
    "rl.value_lr": 1e-3,
    "rl.kl_coef": 0.1,
    "evaluation.encoder": "sentence-transformers/all-MiniLM-L6-v2",
    "evaluation.fluency": "textattack/roberta-base-CoLA=LABEL_1",
    "evaluation.best_of": (4,),
}

_DIALOGSUM_CHAT: Settings = {
    **_DIALOGSUM,
    **_LONG,
    "data.template": None,
    "policy.base": "Qwen/Qwen2.5-0.5B-Instruct",
    # Meant for a GPU of 16 GB; not measured on one.
    "policy.checkpointing": True,
    "sft.steps": 0,
    "rl.steps": 100,
}


class _Recipe(NamedTuple):
    purpose: str
    settings: Settings


_RECIPES = {
    "quickstart": _Recipe(
        "synthetic dialogues, a small T5 from scratch, a small hate classifier; offline, minutes on a CPU",
        _QUICKSTART,
    ),
    "own": _Recipe(
        "your prompts, model and classifier; trains a LoRA on a pretrained model, without a warm start",
        _OWN,
    ),
    "smollm2": _Recipe(
        "a chat model of 135 M parameters answers rude messages; minutes on a CPU (`make demo-llm`)",
        _SMOLLM2,
    ),
    "realtoxicity": _Recipe(
        "a base model of 135 M continues RealToxicityPrompts, by its protocol of 25 samples",
        _REALTOXICITY,
    ),
    "paradetox": _Recipe(
        "FLAN-T5 base rewrites ParaDetox; J between copying and what people wrote",
        _PARADETOX,
    ),
    "dialogsum-chat": _Recipe(
        "a chat model of 0.5 B parameters summarizes DialogSum in its chat template; 100 steps",
        _DIALOGSUM_CHAT,
    ),
    "dialogsum": _Recipe(
        "FLAN-T5 base on DialogSum with a hate classifier; 10 steps as in the course notebook, corrected",
        _DIALOGSUM,
    ),
    "dialogsum-long": _Recipe(
        "dialogsum with settings that are meant to move the model; 200 steps",
        {**_DIALOGSUM, **_LONG},
    ),
    "dialogsum-lowmem": _Recipe(
        "dialogsum with a bf16 base and small batches, for a laptop; 20 steps",
        _DIALOGSUM_LOWMEM,
    ),
    "dialogsum-lowmem-long": _Recipe(
        "dialogsum-lowmem with settings that are meant to move the model; 200 steps",
        {**_DIALOGSUM_LOWMEM, **_LONG},
    ),
    "samsum-detoxify": _Recipe(
        "FLAN-T5 base on 500 dialogues of SAMSum, reward 1 - toxicity by toxic-bert; 50 steps",
        _SAMSUM,
    ),
    "samsum-detoxify-long": _Recipe(
        "samsum-detoxify on all of SAMSum with settings that are meant to move the model; 200 steps",
        {**_SAMSUM, **_LONG, "data.limit": 24_000},
    ),
    "dialogsum-large": _Recipe(
        "FLAN-T5 large on DialogSum with a hate classifier; 10 steps as in the course notebook, corrected",
        _DIALOGSUM_LARGE,
    ),
    "dialogsum-large-long": _Recipe(
        "dialogsum-large with settings that are meant to move the model; 200 steps",
        {**_DIALOGSUM_LARGE, **_LONG},
    ),
}


def recipe_names() -> dict[str, str]:
    """Return each recipe's name and its purpose."""
    return {name: entry.purpose for name, entry in _RECIPES.items()}


def recipe(name: str, settings: Mapping[str, object] | None = None) -> Config:
    """Return the config of a recipe, with some settings changed by dotted name: `{"rl.steps": 100}`.

    Raises InputError for an unknown recipe, with the one that was meant or all of them, and for settings as
    `with_settings` does.
    """
    remedy = did_you_mean(name, _RECIPES, f"use {', '.join(_RECIPES)}")
    require(name in _RECIPES, "recipe", name, "is not a recipe", remedy)

    changed = {**_RECIPES[name].settings, **(settings or {})}
    return with_settings(Config(recipe=name), changed)
