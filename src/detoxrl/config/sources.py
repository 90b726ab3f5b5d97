"""Which settings name data, a model or a file?"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from detoxrl.config.edit import flatten, with_settings
from detoxrl.config.schema import Config

# What separates a source from the label or function name behind it, by setting; "" where the source stands alone.
_SEPARATORS = {
    "data.source": "",
    "policy.base": "",
    "policy.adapter": "",
    "reward.classifier": "",
    "reward.encoder": "",
    "evaluation.encoder": "",
    "evaluation.primary_judge": "",
    "evaluation.nli": "",
    "evaluation.perplexity": "",
    "evaluation.fluency": "=",
    "reward.function": ":",
}
_OTHER_JUDGES = "evaluation.other_judges"
ENTAILMENT = "entailment"
"""The label of an NLI model that is read."""
# Values with a meaning of their own, which name no source.
_RESERVED = ("embedded", "scratch", "none", "alt-profanity-check")


class ClassifierSource(NamedTuple):
    """A classifier that a config names."""

    setting: str
    source: str
    labels: dict[str, str]  # The labels that are read from it, by the settings that name them.


def map_sources(config: Config, change: Callable[[str, str], str]) -> Config:
    """Return the config with each path or hub id replaced by `change(setting, source)`; labels stay.

    Other judges go by "evaluation.other_judges 0", "evaluation.other_judges 1" and so on. What a reward function or
    another classifier replaces is left out.
    """

    def replaced(setting: str, value: str | None, separator: str) -> str | None:
        source = _source_of(value, separator)
        if value is None or source is None:
            return value
        return change(setting, source) + value.removeprefix(source)

    settings = flatten(asdict(config))
    changed: dict[str, Any] = {}
    for setting, separator in _SEPARATORS.items():
        if setting in _unread_settings(config):
            continue
        changed[setting] = replaced(setting, settings[setting], separator)

    judges = enumerate(config.evaluation.other_judges)
    changed[_OTHER_JUDGES] = [replaced(f"{_OTHER_JUDGES} {i}", judge, "=") for i, judge in judges]
    return with_settings(config, changed)


def _unread_settings(config: Config) -> set[str]:
    """Return the settings of the reward that another one replaces."""
    if config.reward.function:
        return {"reward.classifier", "reward.encoder"}
    return set() if config.reward.classifier == "embedded" else {"reward.encoder"}


def sources(config: Config) -> dict[str, str]:
    """Return, by setting, each path or hub id of the data, models and files that the run reads."""
    by_setting: dict[str, str] = {}

    def note(setting: str, source: str) -> str:
        by_setting[setting] = source
        return source

    map_sources(config, note)
    return by_setting


def local_sources(config: Config) -> dict[str, Path]:
    """Return, by setting, the path of each source that is on disk."""
    return {setting: Path(source) for setting, source in sources(config).items() if Path(source).exists()}


def with_absolute_paths(config: Config) -> Config:
    """Return the config with every path absolute, so that it means the same from any folder."""

    def absolute(_: str, source: str) -> str:
        path = Path(source)
        return str(path.resolve()) if path.exists() else source

    return map_sources(config, absolute)


def label_settings(config: Config, field: str) -> dict[str, str]:
    """Return the labels of the classifier that the setting `field` names, by their settings, the toxic one first."""
    if field == "evaluation.primary_judge":
        return {"evaluation.judge_label": config.evaluation.judge_label}

    labels = {}
    if config.reward.toxic_label:
        labels["reward.toxic_label"] = config.reward.toxic_label
    if config.reward.good_label:
        labels["reward.good_label"] = config.reward.good_label
    return labels


def judging_classifiers(config: Config) -> list[ClassifierSource]:
    """Return the classifiers that only measure: judges, NLI and fluency."""
    settings = config.evaluation
    primary = "evaluation.primary_judge"
    found = [ClassifierSource(primary, settings.primary_judge, label_settings(config, primary))]
    for judge in settings.other_judges:
        found.append(_labelled(_OTHER_JUDGES, judge))
    if settings.nli:
        found.append(ClassifierSource("evaluation.nli", settings.nli, {"evaluation.nli": ENTAILMENT}))
    if settings.fluency:
        found.append(_labelled("evaluation.fluency", settings.fluency))
    return [classifier for classifier in found if classifier.source not in _RESERVED]


def _labelled(setting: str, value: str) -> ClassifierSource:
    source, label = split_label(value)
    return ClassifierSource(setting, source, {setting: label})


def split_label(value: str) -> tuple[str, str]:
    """Return source and label of SOURCE=LABEL."""
    source, _, label = value.rpartition("=")
    return source, label


def _source_of(value: str | None, separator: str) -> str | None:
    """Return the path or hub id in the value of a setting, without the label or name behind it; None if it has none."""
    if not value:
        return None
    source = value.rpartition(separator)[0] if separator else value

    # `FILE.py:NAME` names a file; a function given in Python has a name without one.
    without_file = separator == ":" and not Path(source).exists()
    if not source or source in _RESERVED or without_file:
        return None
    return source
