"""What may be set."""

from __future__ import annotations

from dataclasses import replace

import pytest

from detoxrl.config.edit import with_settings
from detoxrl.config.recipes import recipe, recipe_names
from detoxrl.config.schema import Config, DataConfig, RlConfig
from detoxrl.errors import InputError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rl.clip": 0}, r"rl\.clip = 0\.0: must be above 0"),
        ({"rl.lam": 1.1}, r"rl\.lam = 1\.1: must lie in \[0, 1\]"),
        ({"rl.kl_coef": -1}, r"rl\.kl_coef = -1\.0: must be 0 or more"),
        ({"rl.batch_size": 10, "rl.minibatch_size": 4}, r"rl\.minibatch_size = 4: must divide rl\.batch_size"),
        ({"rl.batch_size": 1, "rl.minibatch_size": 1}, r"rl\.batch_size = 1: must be 2 or more"),
        ({"rl.kl_target": 0}, r"rl\.kl_target = 0\.0: must be above 0"),
        ({"rl.validation_prompts": 1}, r"rl\.validation_prompts = 1: must be 2 or more"),
        ({"policy.lora_targets": ()}, r"policy\.lora_targets = \(\): must name a layer"),
        ({"seed": 2**63}, r"seed = 9223372036854775808"),
        ({"data.limit": 9}, r"rl\.batch_size = 64: exceeds data\.limit"),
        ({"policy.base": "b", "policy.adapter": "a"},
         r"policy\.adapter = 'a': does not fit a base whose full weights sft changes; say --sft.no-full-weights"),
        ({"data.limit": 1}, r"data\.limit = 1: must be 2 or more"),
        ({"data.min_length": 9, "data.max_length": 8}, r"data\.max_length = 8: is below data\.min_length"),
        ({"data.max_prompt_tokens": 0}, r"data\.max_prompt_tokens = 0: must be above 0"),
        ({"data.summary_column": None}, r"data\.summary_column = None: leaves sft nothing to learn from"),
        ({"data.length_unit": "tokens"}, r"data\.length_unit = 'tokens': needs a tokenizer"),
        ({"reward.classifier": "c", "evaluation.primary_judge": "c"},
         r"evaluation\.primary_judge = 'c': is the reward's own classifier"),
        ({"data.template": "Hi"}, r"data\.template = 'Hi': must contain \{dialogue\}"),
        ({"evaluation.prompts": 1}, r"evaluation\.prompts = 1"),
        ({"policy.adapter": "x"}, r"policy\.adapter = 'x': needs the base"),
        ({"policy.lora_rank": 0}, r"policy\.lora_rank = 0"),
        ({"sft.lr": 0}, r"sft\.lr = 0"),
        ({"reward.clip": 0}, r"reward\.clip = 0"),
        ({"generation.temperature": 0}, r"generation\.temperature = 0"),
        ({"evaluation.samples_per_prompt": 0}, r"evaluation\.samples_per_prompt = 0"),
        ({"seed": -1}, r"seed = -1"),
        ({"sft.steps": 0}, r"policy\.base = 'scratch' needs full_weights and steps"),
    ],
)  # fmt: skip
def test_a_value_that_is_not_allowed_is_named_in_one_line(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        with_settings(Config(recipe="x"), settings)
    assert "\n" not in str(raised.value)


def test_sections_built_in_python_and_names_of_recipes_keep_the_rules_too() -> None:
    with pytest.raises(InputError, match=r"rl\.clip = 0: must be above 0"):
        RlConfig(clip=0)
    with pytest.raises(InputError, match=r"data\.max_length = 8: is below data\.min_length"):
        DataConfig(min_length=9, max_length=8)
    with pytest.raises(InputError, match=r"recipe = 'quikstart': is not a recipe; did you mean quickstart\?"):
        recipe("quikstart")


def test_every_recipe_is_valid_and_says_what_it_is_for() -> None:
    for name, purpose in recipe_names().items():
        assert recipe(name).recipe == name
        assert len(purpose) > 20
        assert replace(recipe(name), seed=1) != recipe(name)


def test_the_recipes_keep_the_old_systems_hyperparameters_and_long_ones_change_what_moves_a_model() -> None:
    names = ["dialogsum", "dialogsum-lowmem", "samsum-detoxify", "dialogsum-large"]
    assert list(recipe_names()) == ["quickstart", "own", *(f"{name}{end}" for name in names for end in ("", "-long"))]
    notebook = recipe("dialogsum")
    assert (notebook.data.min_length, notebook.data.max_length) == (200, 1000)
    for name, steps, batch in zip(names, (10, 20, 50, 10), (16, 16, 8, 16), strict=True):
        config, long = recipe(name), recipe(f"{name}-long")
        assert (config.rl.steps, config.rl.batch_size, config.rl.lr, config.rl.minibatch_size) == (
            steps, batch, 1.41e-5, 4
        )  # fmt: skip
        assert (config.rl.kl_coef, config.rl.kl_target, config.rl.kl_horizon, config.rl.epochs) == (0.2, 6.0, 10_000, 1)
        assert (config.policy.lora_rank, config.policy.lora_targets) == (32, ("q", "v"))
        assert not config.sft.full_weights
        # The sum of rates over all optimizer steps bounds how far a weight can travel.
        travel = [
            one.rl.steps * one.rl.epochs * one.rl.batch_size / one.rl.minibatch_size * one.rl.lr
            for one in (config, long)
        ]
        assert travel[1] > 50 * travel[0]
        assert long.policy == config.policy
        assert long.reward.normalise_on == 256
    detoxify = recipe("samsum-detoxify")
    assert (detoxify.reward.score, detoxify.reward.good_label, detoxify.sft.steps, detoxify.data.limit) == (
        "not_toxicity", None, 0, 500
    )  # fmt: skip
    assert recipe("dialogsum-lowmem").policy.bf16
    assert recipe("dialogsum-large").policy.base == "google/flan-t5-large"


def test_an_at_in_a_path_is_part_of_the_path_and_one_in_a_hub_id_is_not() -> None:
    paths = {"reward.classifier": "/home/me@here/hate", "evaluation.primary_judge": "/home/me@here/judge"}
    assert recipe("own", paths).evaluation.primary_judge == "/home/me@here/judge"
    with pytest.raises(InputError, match="is the reward's own classifier"):
        recipe("own", {"reward.classifier": "some/hate@1a", "evaluation.primary_judge": "some/hate@2b"})
