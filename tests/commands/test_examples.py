"""The examples run from another folder, with their own settings but for fewer and shorter steps."""

from __future__ import annotations

import runpy
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

import detoxrl
from detoxrl.config.edit import flatten, with_settings

EXAMPLES = Path(__file__).parents[2] / "examples"
FEWER = {
    "sft.steps": 10, "sft.baseline_steps": 2, "rl.steps": 2, "rl.validate_every": 1, "generation.max_new_tokens": 16,
    "evaluation.samples_per_prompt": 2, "evaluation.bootstrap": 200, "reward.normalise_on": 16,
}  # fmt: skip


def fewer(config: detoxrl.Config) -> detoxrl.Config:
    set_there = flatten(asdict(config))
    return with_settings(config, {name: min(value, set_there[name]) for name, value in FEWER.items()})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module", autouse=True)
def drawings() -> None:
    """Reports are drawn here."""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_file", "alt-profanity-check: "),
        ("own_reward", "reward -"),
        ("own_model", "reward classifier: "),  # measures what own_file trained
    ],
)
def test_an_example_runs_and_leaves_its_report(
    place: Path, name: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = detoxrl.recipe
    monkeypatch.setattr(detoxrl, "recipe", lambda *given: fewer(recipe(*given)))
    monkeypatch.syspath_prepend(EXAMPLES)  # as Python has it for a script
    monkeypatch.delitem(sys.modules, "own_file", raising=False)
    monkeypatch.chdir(place)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert words in shown
    assert shown.splitlines()[-1] == f"open runs/{name}/report.html"
    assert (place / "runs" / name / "report.html").stat().st_size > 10_000
