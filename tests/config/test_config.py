"""Settings: bounds, conflicts, recipes, help texts and stored configs."""

from __future__ import annotations

from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from annotated_types import Ge, Le
from pydantic import ValidationError

from detoxrl.config.edit import config_from_json, config_to_json, flatten, with_settings
from detoxrl.config.names import RENAMED
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
        ({"policy.lora_targets": ()}, r"policy\.lora_targets = \(\): must not be empty; give at least"),
        ({"seed": 2**63}, r"seed = 9223372036854775808: must be below 9223372036854775808; give a smaller value"),
        ({"data.limit": 9}, r"rl\.batch_size = 64: needs 64 prompts a step, .* exceeds data\.limit = 9"),
        ({"policy.base": "b", "policy.adapter": "a"},
         r"policy\.adapter = 'a': does not fit a base whose full weights sft changes; use --sft.no-full-weights"),
        ({"data.limit": 1}, r"data\.limit = 1: must be 2 or more"),
        ({"data.min_length": 9, "data.max_length": 8}, r"data\.max_length = 8: is below data\.min_length"),
        ({"data.max_prompt_tokens": 0}, r"data\.max_prompt_tokens = 0: must be above 0"),
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
        ({"seed": -1}, r"seed = -1: must be 0 or more"),
        ({"sft.steps": 0},
         r"sft\.steps = 0: must be above 0, because policy\.base = 'scratch' is untrained; set sft\.steps or"),
        ({"sft.full_weights": False}, r"sft\.full_weights = False: must be True, because policy\.base = 'scratch' is"),
        ({"policy.base": "b", "policy.full_weights": True, "sft.full_weights": False},
         r"sft\.full_weights = False: must be True, because policy\.full_weights leaves no place for the adapter"),
        ({"policy.base": "b", "policy.full_weights": True, "policy.bf16": True},
         r"policy\.bf16 = True: cannot be combined with policy\.full_weights"),
        ({"policy.base": "b", "policy.full_weights": True, "policy.adapter": "a"},
         r"policy\.adapter = 'a': cannot be combined with policy\.full_weights; merge the adapter into the base"),
        ({"evaluation.other_judges": ["a=b", "c"]}, r"evaluation\.other_judges = 'c': is neither .* nor SOURCE=LABEL"),
        ({"evaluation.fluency": "c"}, r"evaluation\.fluency = 'c': must be SOURCE=LABEL"),
        ({"evaluation.identity_prompts": 30},
         r"evaluation\.identity_prompts = 30: must be 0 or at least 138: .*; ask for all with 253"),
        ({"evaluation.best_of": "4"}, r"evaluation\.best_of = '4': must be a list of values"),
        ({"evaluation.best_of": ["4", "1"]}, r"evaluation\.best_of = 1: must be 2 or more; give a larger value"),
        ({"data.source": ""}, r"data\.source = '': must not be empty"),
        ({"data.source": None}, r"data\.source = None: must be text"),
        ({"data.length_unit": "words"}, r"data\.length_unit = 'words': must be 'characters' or 'tokens'; see `detoxrl"),
        ({"rl.steps": "many"}, r"rl\.steps = 'many': must be a whole number"),
        ({"rl.steps": 1.5}, r"rl\.steps = 1\.5: must be a whole number"),
        ({"rl.steps": None}, r"rl\.steps = None: must be a whole number"),
        ({"rl.lr": "fast"}, r"rl\.lr = 'fast': must be a number"),
        ({"rl.lr": None}, r"rl\.lr = None: must be a number"),
        ({"rl.lr": "nan"}, r"rl\.lr = 'nan': must be a finite number"),
        ({"reward.empty_score": float("-inf")}, r"reward\.empty_score = -inf: must be a finite number"),
        ({"rl.lr": "-1e-3"}, r"rl\.lr = -0\.001: must be above 0; give a larger value"),
        ({"sft.bf16": "perhaps"}, r"sft\.bf16 = 'perhaps': must be true or false"),
        ({"sft.bf16": None}, r"sft\.bf16 = None: must be true or false"),
        ({"rl.algorithm": "dpo"}, r"rl\.algorithm = 'dpo': must be 'ppo', 'rloo', 'grpo' or 'reinforce'; see `detoxrl"),
        ({"rl.group_size": 0}, r"rl\.group_size = 0: must be above 0; give a larger value"),
        ({"rl.group_size": 3}, r"rl\.group_size = 3: must divide rl\.minibatch_size = 16; change one of them"),
        ({"rl.group_size": 32}, r"rl\.group_size = 32: must divide rl\.minibatch_size = 16"),
        ({"rl.algorithm": "grpo", "rl.batch_size": 12, "rl.minibatch_size": 6},
         r"rl\.group_size = 4: must divide rl\.minibatch_size = 6; change one of them"),
        ({"rl.algorithm": "rloo", "rl.group_size": 1},
         r"rl\.group_size = 1: must be at least 2, because rloo compares .*; raise it, or set rl\.algorithm to ppo or"),
        ({"rl.algorithm": "grpo", "rl.group_size": 1}, r"rl\.group_size = 1: must be at least 2, because grpo comp"),
        ({"rl.group_size": 16, "generation.batch_size": 15},
         r"rl\.group_size = 16: exceeds generation\.batch_size = 15, .*; lower it or raise generation\.batch_size"),
        ({"rl.algorithm": "rloo", "generation.batch_size": 3}, r"rl\.group_size = 4: exceeds generation\.batch_si"),
        ({"rl.prompt_sampling": "varied"},
         r"rl\.prompt_sampling = 'varied': needs several responses to a prompt, .*; set rl\.group_size to 2 or more"),
        ({"rl.prompt_sampling": "often"}, r"rl\.prompt_sampling = 'often': must be 'uniform' or 'varied'; see"),
        ({"rl.kl_in": "both"}, r"rl\.kl_in = 'both': must be 'reward' or 'loss'; see"),
        ({"rl.kl_estimator": "k4"}, r"rl\.kl_estimator = 'k4': must be 'k1', 'k2' or 'k3'; see"),
        ({"rl.algorithm": "grpo", "rl.kl_estimator": "k1"},
         r"rl\.kl_estimator = 'k1': has no gradient in expectation as a loss, .*; set k2 or k3, or set rl\.kl_in to"),
        ({"rl.kl_in": "loss", "rl.kl_estimator": "k1"}, r"rl\.kl_estimator = 'k1': has no gradient in expectation"),
        ({"rl.kl_estimator": "k2"},
         r"rl\.kl_estimator = 'k2': is biased as part of the reward, .*; set k1, or set rl\.kl_in to loss"),
        ({"rl.algorithm": "grpo", "rl.kl_in": "reward"},
         r"rl\.kl_in = 'reward': with grpo is divided by .*; set rl\.std_scaling to"),
        ({"rl.algorithm": "rloo", "rl.kl_estimator": "k3"}, r"rl\.kl_estimator = 'k3': is biased as part of the rewar"),
        ({"rl.algorithm": "grpo", "rl.kl_in": "reward", "rl.kl_estimator": "k3"}, r"rl\.kl_estimator = 'k3': is bia"),
        ({"rl.tail_share": 1.5}, r"rl\.tail_share = 1\.5: must lie in \[0, 1\]; give a smaller value"),
        ({"rl.tail_share": -0.1}, r"rl\.tail_share = -0\.1: must be 0 or more; give a larger value"),
        ({"rl.tail_share": 0}, r"rl\.tail_share = 0\.0: must cover at least 2 of rl\.batch_size = 64 scores; .*; rai"),
        ({"rl.tail_share": 0.02}, r"rl\.tail_share = 0\.02: must cover at least 2 of rl\.batch_size = 64 scores; the "),
        ({"rl.clip_high": 0}, r"rl\.clip_high = 0\.0: must be above 0"),
        ({"rl.entropy_coef": -0.1}, r"rl\.entropy_coef = -0\.1: must be 0 or more"),
        ({"rl.std_scaling": "perhaps"}, r"rl\.std_scaling = 'perhaps': must be true or false"),
    ],
)  # fmt: skip
def test_a_value_that_is_not_allowed_is_named_in_one_line(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        with_settings(Config(recipe="x"), settings)
    assert "\n" not in str(raised.value)


def test_a_section_built_directly_keeps_its_bounds_too() -> None:
    with pytest.raises(ValidationError, match="Input should be greater than 0"):
        RlConfig(clip=0)
    with pytest.raises(ValidationError, match="Unexpected keyword argument"):
        RlConfig(stepz=1)  # type: ignore[call-arg]
    with pytest.raises(InputError, match=r"data\.max_length = 8: is below data\.min_length = 9"):
        DataConfig(min_length=9, max_length=8)
    with pytest.raises(InputError, match=r"rl\.minibatch_size = 5: must divide rl\.batch_size = 64"):
        replace(RlConfig(), minibatch_size=5)


@pytest.mark.parametrize(
    ("algorithm", "group_size", "std_scaling", "kl_place", "kl_by", "has_critic"),
    [
        ("ppo", 1, True, "reward", "k1", True),
        ("rloo", 4, False, "reward", "k1", False),
        ("grpo", 4, True, "loss", "k2", False),
        ("reinforce", 1, True, "reward", "k1", False),
    ],
)
def test_an_algorithm_sets_what_is_left_none_and_nothing_else(
    algorithm: str, group_size: int, std_scaling: bool, kl_place: str, kl_by: str, has_critic: bool
) -> None:
    rl = recipe("own", {"rl.algorithm": algorithm}).rl
    assert (rl.responses_per_prompt, rl.scales_by_std, rl.kl_place, rl.kl_by) == (
        group_size, std_scaling, kl_place, kl_by
    )  # fmt: skip
    assert rl.traits.has_critic == has_critic
    assert rl.clip_range == (rl.clip, rl.clip)
    assert (rl.group_size, rl.std_scaling, rl.kl_in, rl.kl_estimator, rl.clip_high) == (None,) * 5

    elsewhere = "loss" if kl_place == "reward" else "reward"
    given = {"rl.group_size": 8, "rl.std_scaling": not std_scaling, "rl.kl_in": elsewhere}
    rl = recipe("own", {"rl.algorithm": algorithm, **given}).rl
    assert (rl.responses_per_prompt, rl.scales_by_std, rl.kl_place) == (8, not std_scaling, elsewhere)
    assert rl.kl_by == ("k2" if elsewhere == "loss" else "k1")


def test_the_estimator_and_the_clip_range_are_those_that_are_set() -> None:
    assert recipe("own", {"rl.kl_in": "loss", "rl.kl_estimator": "k3"}).rl.kl_by == "k3"
    assert recipe("own", {"rl.kl_in": "reward", "rl.kl_estimator": "k1"}).rl.kl_by == "k1"
    assert recipe("own", {"rl.clip": 0.3, "rl.clip_high": 0.4}).rl.clip_range == (0.3, 0.4)
    assert recipe("own", {"rl.clip": 0.3}).rl.clip_range == (0.3, 0.3)


def test_bounds_of_groups_are_met_exactly() -> None:
    assert recipe("own", {"rl.group_size": 16, "generation.batch_size": 16}).rl.responses_per_prompt == 16
    assert recipe("own", {"rl.group_size": 2, "rl.prompt_sampling": "varied"}).rl.prompt_sampling == "varied"
    assert recipe("own", {"rl.algorithm": "rloo", "rl.group_size": 2}).rl.responses_per_prompt == 2
    assert recipe("own", {"rl.algorithm": "reinforce", "rl.group_size": 1}).rl.responses_per_prompt == 1
    assert recipe("own", {"rl.batch_size": 64, "rl.tail_share": 0.03}).rl.tail_share == 0.03


def test_an_unknown_recipe_or_setting_is_named_with_the_closest_one() -> None:
    with pytest.raises(InputError, match=r"recipe = 'quikstart': is not a recipe; did you mean quickstart\?"):
        recipe("quikstart")
    with pytest.raises(InputError, match=r"setting = 'rl\.stepz': is not a setting; did you mean rl\.steps\?"):
        recipe("own", {"rl.stepz": 1})
    for name in ("recipe", "rl", "policy"):
        with pytest.raises(InputError, match=f"setting = '{name}': is not a setting"):
            recipe("own", {name: "x"})


def sections() -> list[Any]:
    config = Config(recipe="x")
    return [config, *(value for value in vars(config).values() if is_dataclass(value))]


def test_every_setting_has_a_help_text() -> None:
    for section in sections():
        for field in fields(section):
            if field.name != "recipe" and not is_dataclass(getattr(section, field.name)):
                description = type(section).__pydantic_fields__[field.name].description
                assert description.endswith("."), field.name


def test_every_upper_bound_belongs_to_an_interval_from_0() -> None:
    # The message for it says so: must lie in [0, 1].
    bounded = [
        info.metadata
        for section in sections()
        for info in type(section).__pydantic_fields__.values()
        if any(isinstance(limit, Le) for limit in info.metadata)
    ]
    assert len(bounded) == 4
    assert all(Ge(0) in metadata for metadata in bounded)


def test_settings_are_read_from_text_and_keep_their_types() -> None:
    given = {
        "rl.steps": "7",
        "rl.lr": "1e-4",
        "rl.kl_target": "None",
        "sft.bf16": "false",
        "data.source": Path("my/file"),
    }
    config = recipe("own", given | {"policy.lora_targets": ["c_attn"], "evaluation.best_of": ["8"]})
    assert (config.rl.steps, config.rl.lr, config.rl.kl_target, config.sft.bf16) == (7, 1e-4, None, False)
    assert (config.data.source, config.policy.lora_targets, config.evaluation.best_of) == ("my/file", ("c_attn",), (8,))
    assert with_settings(config, flatten({"rl": asdict(config.rl)})) == config


@pytest.mark.parametrize("word", ["none", "None", "NONE"])
def test_none_is_no_value_wherever_a_setting_may_have_none(word: str) -> None:
    without = {
        "data.max_length", "data.text_column", "data.reference_column", "data.id_column", "data.toxicity_column",
        "data.template", "data.chat_template", "data.system_prompt", "policy.adapter", "policy.lora_targets",
        "reward.missing_eos_penalty", "reward.encoder", "reward.function", "reward.good_label", "rl.group_size",
        "data.stress", "rl.std_scaling", "rl.kl_in", "rl.kl_estimator", "rl.kl_target", "rl.clip_high",
        "rl.microbatch_size", "rl.quality_margin", "rl.patience",
        "rl.update_kl_limit", "evaluation.encoder", "evaluation.nli", "evaluation.perplexity", "evaluation.fluency",
        "evaluation.top_p",
    }  # fmt: skip
    lists = {"evaluation.best_of", "evaluation.other_judges", "reward.terms"}
    given = {"policy.lora_targets": ["q"], "evaluation.other_judges": ["a=b"], "rl.patience": 3}
    config = recipe("own", {**given, **dict.fromkeys(without | lists, word)})
    flat = flatten(asdict(config))
    assert {name for name, value in flat.items() if value is None} == without
    assert {name for name, value in flat.items() if value == ()} == lists
    # A flag with several values has a list of one word.
    assert recipe("own", given | {"policy.lora_targets": [word], "evaluation.best_of": [word]}).evaluation.best_of == ()


def test_none_is_a_word_like_any_other_where_a_value_is_required() -> None:
    assert recipe("own", {"evaluation.judge_label": "none"}).evaluation.judge_label == "none"
    assert recipe("own", {"data.template": "None {dialogue}"}).data.template == "None {dialogue}"
    with pytest.raises(InputError, match=r"rl\.lr = 'none': must be a number"):
        recipe("own", {"rl.lr": "none"})
    with pytest.raises(InputError, match=r"evaluation\.other_judges = 'none': is neither .* nor SOURCE=LABEL"):
        recipe("own", {"evaluation.other_judges": ["a=b", "none"]})


def test_a_config_stored_by_an_earlier_version_loads_and_means_what_it_meant(tmp_path: Path) -> None:
    stored = Path(__file__).parent / "stored" / "dialogsum-long-0.1.0.json"
    config = config_from_json(stored)
    # What was a default then, or the only behaviour, may follow from the base or the task today.
    as_then = {
        "policy.lora_targets": ("q", "v"),
        "data.text_column": "dialogue",
        "data.reference_column": "summary",
        "data.chat_template": False,
        "reward.missing_eos_penalty": 1.0,
        "rl.quality_margin": 0.005,
    }
    assert config == recipe("dialogsum-long", as_then)
    (tmp_path / "again.json").write_text(config_to_json(config))
    assert config_from_json(tmp_path / "again.json") == config

    (tmp_path / "config.json").write_text(stored.read_text().replace('"steps": 200', '"steps": "all"'))
    with pytest.raises(InputError, match=r"rl\.steps = 'all': must be a whole number; correct it in .*config\.json"):
        config_from_json(tmp_path / "config.json")
    for text, message in (
        ("{", r"is not valid JSON: .*; give a run's config\.json"),
        ("[]", r"is not the config of a run"),
        ('{"recipe": "own", "data": {"talk": 1}}', r"setting = 'data\.talk': is not a setting"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=message):
            config_from_json(tmp_path / "config.json")


def test_a_setting_that_was_renamed_is_named_in_the_error() -> None:
    for old, new in RENAMED.items():
        with pytest.raises(InputError, match=rf"setting = '{old}': is not a setting; it is called {new} now"):
            recipe("own", {old: "x"})


def test_every_recipe_is_valid_and_says_what_it_is_for() -> None:
    for name, purpose in recipe_names().items():
        assert recipe(name).recipe == name
        assert len(purpose) > 20
        assert replace(recipe(name), seed=1) != recipe(name)


def test_the_recipes_keep_the_old_systems_hyperparameters_and_long_ones_change_what_moves_a_model() -> None:
    names = ["dialogsum", "dialogsum-lowmem", "samsum-detoxify", "dialogsum-large"]
    newer = ["quickstart", "own", "smollm2", "realtoxicity", "paradetox", "dialogsum-chat"]
    assert list(recipe_names()) == [*newer, *(f"{name}{end}" for name in names for end in ("", "-long"))]
    notebook = recipe("dialogsum")
    assert (notebook.data.min_length, notebook.data.max_length) == (200, 1000)
    for name, steps, batch in zip(names, (10, 20, 50, 10), (16, 16, 8, 16), strict=True):
        config, long = recipe(name), recipe(f"{name}-long")
        assert (config.rl.steps, config.rl.batch_size, config.rl.lr, config.rl.minibatch_size) == (
            steps, batch, 1.41e-5, 4
        )  # fmt: skip
        assert (config.rl.kl_coef, config.rl.kl_target, config.rl.kl_horizon, config.rl.epochs) == (0.2, 6.0, 10_000, 1)
        assert (config.policy.lora_rank, config.policy.lora_targets) == (32, None)
        assert not config.sft.full_weights
        # The sum of rates over all optimizer steps bounds how far a weight can travel.
        travel = [rl.steps * rl.epochs * rl.batch_size / rl.minibatch_size * rl.lr for rl in (config.rl, long.rl)]
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
