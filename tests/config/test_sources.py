"""Which settings name data, a model or a file, and how their sources are replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from detoxrl.config.recipes import recipe
from detoxrl.config.sources import local_sources, map_sources, sources, with_absolute_paths

SETTINGS = {
    "data.source": "me/talks",
    "policy.base": "me/base",
    "policy.adapter": "lora",
    "reward.classifier": "me/hate",
    "evaluation.primary_judge": "me/judge",
    "evaluation.encoder": "me/encoder",
    "evaluation.nli": "me/nli",
    "evaluation.fluency": "me/fluent=good",
    "evaluation.other_judges": ["me/first=toxic", "second=rude"],
}


def test_sources_are_named_by_their_setting_without_labels() -> None:
    found = sources(recipe("own", SETTINGS))
    assert found == {
        "data.source": "me/talks",
        "policy.base": "me/base",
        "policy.adapter": "lora",
        "reward.classifier": "me/hate",
        "evaluation.encoder": "me/encoder",
        "evaluation.primary_judge": "me/judge",
        "evaluation.nli": "me/nli",
        "evaluation.fluency": "me/fluent",
        "evaluation.other_judges 0": "me/first",
        "evaluation.other_judges 1": "second",
    }
    assert list(found)[:2] == ["data.source", "policy.base"]


def test_reserved_words_name_no_source() -> None:
    assert sources(recipe("quickstart")) == {}


def test_a_source_is_replaced_and_its_label_stays() -> None:
    config = recipe("own", SETTINGS)
    replaced = map_sources(config, lambda setting, source: f"{source}@1a")
    assert replaced.policy.base == "me/base@1a"
    assert replaced.evaluation.fluency == "me/fluent@1a=good"
    assert replaced.evaluation.other_judges == ("me/first@1a=toxic", "second@1a=rude")
    assert map_sources(config, lambda setting, source: source) == config


def test_a_reward_function_replaces_the_classifier_and_its_file_is_a_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = recipe("own", SETTINGS | {"reward.function": "mine.py:score"})
    assert "reward.classifier" not in sources(config)
    assert "reward.function" not in sources(config)  # there is no such file: the name of a function given in Python
    Path("mine.py").touch()
    assert sources(config)["reward.function"] == "mine.py"


def test_paths_become_absolute_and_hub_ids_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("lora", "second"):
        Path(name).mkdir()
    Path("mine.py").touch()
    config = recipe("own", SETTINGS | {"reward.function": "mine.py:score"})
    assert local_sources(config) == {
        "policy.adapter": Path("lora"),
        "reward.function": Path("mine.py"),
        "evaluation.other_judges 1": Path("second"),
    }
    absolute = with_absolute_paths(config)
    assert absolute.policy.adapter == str(tmp_path / "lora")
    assert absolute.reward.function == f"{tmp_path / 'mine.py'}:score"
    assert absolute.evaluation.other_judges == ("me/first=toxic", f"{tmp_path / 'second'}=rude")
    assert absolute.policy.base == "me/base"
    assert with_absolute_paths(absolute) == absolute
