"""How the command line is read, and what its help shows."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest

from detoxrl import cli
from detoxrl.arguments import Request, command_help, overview, parse
from detoxrl.cli import COMMANDS, existing_run_policy
from detoxrl.config.edit import config_to_json, flatten, with_settings
from detoxrl.config.recipes import recipe, recipe_names
from detoxrl.errors import InputError
from detoxrl.report.page import repeat_command
from small_runs import detoxrl


def read(*words: str) -> Request:
    return parse(COMMANDS[words[0]], words[1:])


def test_settings_and_options_are_told_apart_and_only_what_was_given_is_there() -> None:
    request = read("run", "own", "--rl.lr", "1e-4", "--rl.steps=7", "--run-dir", "here", "--resume")
    assert request.command is COMMANDS["run"]
    assert request.target == "own"
    assert request.settings == {"rl.lr": "1e-4", "rl.steps": "7"}
    assert request.options == {"run_dir": Path("here"), "resume": True}
    bare = read("run")
    assert (bare.target, bare.settings, bare.options) == ("", {}, {})


def test_a_negative_value_is_no_flag() -> None:
    request = read("run", "own", "--reward.empty-score", "-1e-3", "--data.template", "- {dialogue}", "-h")
    assert request.settings == {"reward.empty_score": "-1e-3", "data.template": "- {dialogue}"}
    assert request.options == {"help": True}


def test_a_boolean_setting_has_a_flag_that_turns_it_off_and_takes_a_value() -> None:
    assert read("run", "own", "--sft.bf16").settings == {"sft.bf16": True}
    assert read("run", "own", "--sft.no-bf16").settings == {"sft.bf16": False}
    assert read("run", "own", "--sft.bf16", "False").settings == {"sft.bf16": "False"}


def test_flags_with_several_values_collect_them() -> None:
    over = ["--over", "rl.lr=1,2", "rl.clip=1", "--over", "rl.lam=1"]
    request = read("sweep", "own", *over, "--seeds", "0,1", "--seeds", "2")
    assert request.options == {"over": ["rl.lr=1,2", "rl.clip=1", "rl.lam=1"], "seeds": ["0", "1", "2"]}
    request = read("run", "own", "--policy.lora-targets", "q", "v", "--evaluation.best-of")
    assert request.settings == {"policy.lora_targets": ["q", "v"], "evaluation.best_of": []}
    request = read("evaluate", "own", "--policy", "a=x", "y", "--power", "0.2")
    assert request.options == {"policy": ["a=x", "y"], "power": 0.2}


def test_convert_takes_two_positionals() -> None:
    assert read("convert", "old", "new").positionals == ("old", "new")


def test_the_word_that_help_shows_for_no_value_is_one_that_the_flag_takes() -> None:
    config = recipe("own")
    shown = " ".join(command_help(COMMANDS["run"], config).split())
    assert "--evaluation.other-judges TEXT ... Further judges" in shown
    flags = {"evaluation.other-judges": "none", "rl.patience": "None", "policy.lora-targets": "None"}
    for flag, default in flags.items():
        assert re.search(rf"--{flag} [^-]*? \(default: {default}\)", shown), flag
        request = read("run", "own", f"--{flag}", default)
        assert with_settings(config, request.settings) == config


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (["a", "b c"], ("a", "b c")),
        (["--show", "a"], ("a",)),
        (["a", "--show", "b", "--column", "x", "c"], ("a", "b", "c")),
        (["a", "-", "--show", "--", "-b", "--judge", "--", "c"], ("a", "-", "-b", "--judge", "--", "c")),
        (["--judge", "x", "y", "--", "--file", "-1"], ("--file", "-1")),
        (["--file", "-"], ()),
        (["--"], ()),
    ],
)
def test_texts_stand_before_between_and_behind_flags(words: list[str], texts: tuple[str, ...]) -> None:
    request = read("score", *words)
    assert request.positionals == texts
    assert request.options.get("file") == ("-" if "-" in words and not texts else None)
    assert request.options.get("judge") == (["x", "y"] if "y" in words else None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["score", "a", "--sho"], "flag = '--sho': is not known to `detoxrl score`; did you mean --show?"),
        (["score", "a", "--show", "-no"], "flag = '-no': is not known to `detoxrl score`; put -- before a TEXT that"),
        (["run", "own", "--overwrit"], "flag = '--overwrit': is not known to `detoxrl run`; did you mean --overwrite?"),
        (["run", "own", "--hepl"], "did you mean --help?"),
        (["run", "own", "--rl.kl_coeff=1"], "is not known to `detoxrl run`; did you mean --rl.kl-coef?"),
        (["run", "own", "--sft.no-bf61"], "did you mean --sft.no-bf16?"),
        (["sft", "runs/own", "--rl.steps", "1"], "is not known to `detoxrl sft`; choose from --help"),
        (["train", "runs/own", "--resume"], "flag = '--resume': is not known to `detoxrl train`"),
        (["recipes", "all"], "argument = 'all': belongs to no flag; put its flag before it, or quote a value"),
        (["evaluate", "own", "--power", "some"], "--power = '': invalid float value: 'some'; see `detoxrl eval"),
        (["run", "own", "--rl.lr"], "--rl.lr = '': expected one argument; see `detoxrl run --help`"),
    ],
)  # fmt: skip
def test_an_unknown_flag_or_stray_word_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(InputError) as raised:
        read(*words)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_existing_run_is_not_measured_with_the_flags_of_a_new_one(capfd: pytest.CaptureFixture[str]) -> None:
    assert detoxrl(["evaluate", "runs/own", "--run-dir", "elsewhere"]) == 2
    message = "flag = '--run-dir': cannot be used with an existing run; use --policy, --power or settings"
    assert message in capfd.readouterr().err
    assert detoxrl(["evaluate", "runs/own", "--power", "0.2", "--track", "wandb"]) == 2
    assert "--track = 'wandb': cannot be combined with --power or --policy; choose one" in capfd.readouterr().err


def test_what_happens_to_an_existing_run_follows_from_the_flags() -> None:
    assert existing_run_policy({}) == "error"
    assert existing_run_policy({"overwrite": True}) == "overwrite"
    assert existing_run_policy({"resume": True}) == "resume"
    assert existing_run_policy({"resume": True, "accept_changes": True}) == "resume with changes"
    with pytest.raises(InputError, match="--resume = True: cannot be combined with --overwrite; choose one of them"):
        existing_run_policy({"overwrite": True, "resume": True})
    with pytest.raises(InputError, match="--accept-changes = True: requires --resume; add --resume"):
        existing_run_policy({"overwrite": True, "accept_changes": True})


def test_the_overview_lists_every_command_and_fits_a_terminal() -> None:
    shown = overview(COMMANDS.values())
    for command in COMMANDS.values():
        assert f"  {command.usage} " in shown
        assert command.summary in shown
    assert max(len(line) for line in shown.splitlines()) <= 120


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_help_shows_every_setting_with_the_recipes_value_and_is_wrapped(
    monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    config = recipe("dialogsum")
    shown = command_help(COMMANDS["run"], config)
    for name in flatten(asdict(config)):
        assert name == "recipe" or f"--{name.replace('_', '-')}" in shown, name
    words = " ".join(shown.split())
    for text in (
        "--rl.steps INT Number of rollouts, each followed by its updates. (default: 10)",
        "--evaluation.best-of INT ... Baselines without training",
        "--policy.bf16, --policy.no-bf16 Keep the frozen base in bfloat16",
        "--data.length-unit characters|tokens Unit of data.min_length",
        "--rl.kl-target FLOAT|None KL to the reference",
        "--policy.lora-targets TEXT ...|None Names of the linear layers",
        "--evaluation.other-judges TEXT ... Further judges",
        r"(default: '\nSummarize the following conversation.\n\n{dialogue}\n\nSummary:\n')",
    ):
        assert text in words, text
    in_columns = [line for line in shown.splitlines() if line.startswith(" " * 34)]
    assert len(in_columns) > 50
    assert max(map(len, in_columns)) <= min(columns, 120)
    assert all(line == line.rstrip() for line in shown.splitlines())


def test_help_without_a_recipe_lists_the_flags_alone() -> None:
    shown = command_help(COMMANDS["run"], None)
    assert "--resume" in shown
    assert "--rl.steps" not in shown
    assert "Settings of recipe" not in command_help(COMMANDS["export"], recipe("own"))


def test_every_command_has_help_and_the_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in COMMANDS.items():
        assert detoxrl([name, "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"Usage: {command.usage} [FLAGS]\n\n{command.summary}.\n")
    assert detoxrl(["recipes"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(recipe_names())
    assert max(map(len, listed)) <= 120
    for words in ([], ["help"], ["-h"], ["--help"]):
        assert detoxrl(words) == 0
        assert capsys.readouterr().out == overview(COMMANDS.values())
    assert detoxrl(["--version"]) == 0
    assert capsys.readouterr().out == f"{cli.__version__}\n"


@pytest.mark.parametrize("others", [("alt-profanity-check",), ()])
def test_the_command_that_a_report_prints_names_judges_whatever_is_installed(
    monkeypatch: pytest.MonkeyPatch, others: tuple[str, ...]
) -> None:
    given = {"policy.base": "b", "evaluation.primary_judge": "perspective-minilm", "evaluation.other_judges": others}
    config = recipe("quickstart", given)
    stored = json.loads(config_to_json(config))
    monkeypatch.setattr("detoxrl.config.schema.default_primary_judge", lambda: "perspective-minilm")
    command = repeat_command(stored, {"names": {}, "policies": {}, "texts": {}})
    assert "--evaluation.primary-judge perspective-minilm" in command
    request = read(*shlex.split(command)[1:])
    assert request.settings["evaluation.primary_judge"] == "perspective-minilm"
    assert "evaluation.other_judges" in request.settings
    assert recipe(request.target, request.settings) == config


@pytest.mark.parametrize("value", [True, False, None])
def test_the_command_that_a_report_prints_gives_the_same_config(value: bool | None) -> None:
    given = {"data.chat_template": value, "policy.bf16": True, "policy.base": "b", "data.task": "chat", "seed": 3}
    system = None if value is False else "Be 'brief'."
    config = recipe("own", given | {"evaluation.sharpened": False, "data.system_prompt": system})
    stored = json.loads(config_to_json(config))
    command = repeat_command(stored, {"names": {}, "policies": {}, "texts": {}})
    program, *words = shlex.split(command)
    request = read(*words)
    assert program == "detoxrl"
    assert recipe(request.target, request.settings) == config
