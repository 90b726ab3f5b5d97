"""Which settings name data, a model or a file?"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from detoxrl.config.edit import flatten, with_settings
from detoxrl.config.judges import JUDGES, is_named_judge
from detoxrl.config.schema import Config
from detoxrl.config.terms import GUARDED, Term, parse_term

# What separates a source from the label or function name behind it, by setting; "" where the source stands alone.
_SEPARATORS = {
    "data.source": "",
    "data.stress": "",
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
_TERMS = "reward.terms"
ENTAILMENT = "entailment"
"""The label of an NLI model that is read."""
# Values with a meaning of their own, which name no source.
_RESERVED = (*JUDGES, "scratch", "none")


class ReadLabels(NamedTuple):
    """The label of toxic and that of civil text, each by the setting that names it; empty where none is read."""

    toxic: dict[str, str]
    good: dict[str, str]

    @property
    def both(self) -> dict[str, str]:
        """The labels by their settings, the toxic one first."""
        return {**self.toxic, **self.good}


class ClassifierSource(NamedTuple):
    """A classifier that a config names."""

    setting: str
    source: str
    labels: dict[str, str]  # The labels that are read from it, by the settings that name them.


def map_sources(config: Config, change: Callable[[str, str], str]) -> Config:
    """Return the config with each path or hub id replaced by `change(setting, source)`; labels stay.

    Other judges go by "evaluation.other_judges 0", "evaluation.other_judges 1" and so on, terms of a reward by
    "reward.terms" and their names. What the reward does not read is left out.
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

    terms = []
    for text in config.reward.terms:
        if text == GUARDED:  # It names no source.
            terms.append(text)
            continue
        term = parse_term(text)
        separator = ":" if term.kind == "function" else ""
        source = replaced(_term_setting(term), term.source, separator)
        terms.append(text if source == term.source else replace(term, source=source).written())
    changed[_TERMS] = terms
    return with_settings(config, changed)


def _term_setting(term: Term) -> str:
    return f"{_TERMS} {term.name}"


def _unread_settings(config: Config) -> set[str]:
    """Return the settings of the reward that it does not read."""
    reward = config.reward
    unread = set()
    if not reward.reads_function:
        unread.add("reward.function")
    if not reward.reads_classifier:
        unread.add("reward.classifier")
    if not reward.reads_classifier or reward.classifier != "embedded":
        unread.add("reward.encoder")
    return unread


def term_source(config: Config, term: Term) -> tuple[str, str]:
    """Return what a term reads, and the setting that names it."""
    if term.source is not None:
        return term.source, _term_setting(term)
    setting = f"reward.{term.kind}"
    sources_by_kind = {"reward.classifier": config.reward.classifier, "reward.function": config.reward.function}
    return str(sources_by_kind[setting]), setting


def term_labels(config: Config, term: Term) -> ReadLabels:
    """Return the labels of a term's classifier: its own, or those of reward.classifier."""
    if term.source is None:
        reward = config.reward
        return ReadLabels(
            _named("reward.toxic_label", reward.toxic_label), _named("reward.good_label", reward.good_label)
        )

    setting = _term_setting(term)
    toxic = _named(f"{setting}, toxic_label", term.toxic_label)
    return ReadLabels(toxic, _named(f"{setting}, good_label", term.good_label))


def _named(setting: str, label: str | None) -> dict[str, str]:
    return {setting: label} if label else {}


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


def reward_classifiers(config: Config) -> list[ClassifierSource]:
    """Return the classifiers that the reward reads, the embedded one aside."""
    found = []
    for term in config.reward.measured_terms:
        if term.kind == "classifier":
            source, setting = term_source(config, term)
            found.append(ClassifierSource(setting, source, term_labels(config, term).both))
    return [classifier for classifier in found if classifier.source not in _RESERVED]


def judging_classifiers(config: Config) -> list[ClassifierSource]:
    """Return the classifiers that only measure: judges, NLI and fluency."""
    settings = config.evaluation
    primary = "evaluation.primary_judge"
    labels = {"evaluation.judge_label": settings.judge_label}
    found = [ClassifierSource(primary, settings.primary_judge, labels)]
    for judge in settings.other_judges:
        if not is_named_judge(judge):
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
