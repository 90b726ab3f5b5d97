"""Hints for names that do not exist: what was misspelt, or what there is, and never a name of another meaning."""

from __future__ import annotations

import re

import pytest

from detoxrl.arguments import parse
from detoxrl.cli import COMMANDS
from detoxrl.commands.tracker_state import resolve_tracker
from detoxrl.config.edit import setting_types
from detoxrl.config.names import did_you_mean, did_you_mean_setting, misspelt
from detoxrl.config.recipes import recipe
from detoxrl.errors import InputError
from small_runs import detoxrl

RL = "settings of rl: algorithm, group_size, prompt_sampling, std_scaling, tail_share, steps, batch_size, "
EVERYTHING = "choose from seed, data.*, policy.*, sft.*, reward.*, generation.*, rl.*, evaluation.*"


@pytest.mark.parametrize(
    ("typed", "remedy"),
    [
        # Misspelt in its own section.
        ("rl.stpes", "did you mean rl.steps?"),
        ("sft.step", "did you mean sft.steps?"),
        ("rl.gama", "did you mean rl.gamma?"),
        ("data.max_lenght", "did you mean data.max_length?"),
        ("evalution.promts", "did you mean evaluation.prompts?"),
        ("rl.min_batch_size", "did you mean rl.minibatch_size?"),
        ("sfr.lr", "did you mean sft.lr?"),
        ("sead", "did you mean seed?"),
        # Spelt in another way.
        ("rl.kl-coef", "did you mean rl.kl_coef?"),
        ("RL.LR", "did you mean rl.lr?"),
        # The right name in the wrong section, or in none.
        ("rl.temperature", "did you mean generation.temperature?"),
        ("rl.bf16", "did you mean policy.bf16, sft.bf16 or reward.bf16?"),
        ("ppo.epochs", "did you mean rl.epochs?"),
        ("lr", "did you mean sft.lr or rl.lr?"),
        ("temprature", "did you mean generation.temperature?"),
        # Nothing that is meant: what there is instead.
        ("rl.optimizer", RL),
        ("rl.learning_rate", RL),
        ("rl.lambda", RL),
        ("rl.lt", RL),
        ("rl.clip_range", RL),
        ("rl", RL),
        ("generation.max_tokens", "settings of generation: max_new_tokens, temperature, batch_size"),
        ("optimizer", EVERYTHING),
        ("learning_rate", EVERYTHING),
        ("x.y", EVERYTHING),
    ],
)
def test_a_setting_that_does_not_exist_is_answered_with_what_was_meant_or_what_there_is(
    typed: str, remedy: str
) -> None:
    assert did_you_mean_setting(typed, list(setting_types())).startswith(remedy)
    with pytest.raises(InputError, match=rf"^setting = '{re.escape(typed)}': is not a setting; {re.escape(remedy)}"):
        recipe("own", {typed: 1})


@pytest.mark.parametrize(
    ("command", "flag", "remedy"),
    [
        ("run", "--rl.stpes", "did you mean --rl.steps?"),
        ("run", "--rl.kl_coef", "did you mean --rl.kl-coef?"),
        ("run", "--lr", "did you mean --sft.lr or --rl.lr?"),
        ("run", "--sft.no-bf61", "did you mean --sft.no-bf16?"),
        ("run", "--overwrit", "did you mean --overwrite?"),
        ("run", "--rl.optimizer", "settings of rl: algorithm, group-size, "),
        ("run", "--sft.wait", "settings of sft: steps, batch-size, lr, warmup-steps, full-weights, bf16, base"),
        ("run", "--policy", "settings of policy: base, adapter, "),
        ("run", "--dry-run", "choose from --help, --from, --run-dir, --overwrite, --resume, --accept-changes, --tra"),
        ("train", "--resume", "choose from --help, --track"),
    ],
)  # fmt: skip
def test_a_flag_that_does_not_exist_is_answered_likewise(command: str, flag: str, remedy: str) -> None:
    with pytest.raises(InputError) as raised:
        parse(COMMANDS[command], ["own", flag, "1"])
    assert str(raised.value).startswith(f"flag = {flag!r}: is not known to `detoxrl {command}`; {remedy}")


@pytest.mark.parametrize(
    ("typed", "remedy"),
    [
        ("evalute", "did you mean evaluate?"),
        ("trian", "did you mean train?"),
        ("Run", "did you mean run?"),
        ("serve", "choose from score, run, sweep, doctor, "),
        ("tune", "choose from score, run, sweep, "),
    ],
)
def test_a_command_that_does_not_exist_is_answered_likewise(
    capfd: pytest.CaptureFixture[str], typed: str, remedy: str
) -> None:
    assert detoxrl([typed]) == 2
    assert f"command = '{typed}': is not a command; {remedy}" in capfd.readouterr().err


def test_recipes_and_trackers_are_answered_likewise() -> None:
    with pytest.raises(InputError, match=r"recipe = 'quikstart': is not a recipe; did you mean quickstart\?"):
        recipe("quikstart")
    with pytest.raises(InputError, match=r"recipe = 'dialog': is not a recipe; use quickstart, own, smollm2,"):
        recipe("dialog")
    with pytest.raises(InputError, match=r"'mlflow': is not a tracker; choose from none, tensorboard"):
        resolve_tracker("mlflow")


def test_no_setting_is_taken_for_a_misspelling_of_another_of_its_section() -> None:
    names = list(setting_types())
    for name in names:
        assert did_you_mean_setting(name, names) == f"did you mean {name}?"


def test_one_mistake_is_a_misspelling_of_a_short_name_and_two_of_a_long_one() -> None:
    known = ["abcd", "abcdefgh", "xy"]
    assert misspelt("abdc", known) == misspelt("abc", known) == misspelt("abcde", known) == ["abcd"]
    assert misspelt("abdd", known) == ["abcd"]
    assert misspelt("bad", known) == []
    assert misspelt("badcefgh", known) == ["abcdefgh"]
    assert misspelt("badcegfh", known) == []
    assert misspelt("xz", known) == []
    assert misspelt("aa", ["aab", "aac"]) == []
    assert did_you_mean("aaaa", ["aaab", "aaac", "aaad"], "") == "did you mean aaab, aaac or aaad?"
    assert did_you_mean("zzzz", known, "otherwise") == "otherwise"
