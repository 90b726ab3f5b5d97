"""Which settings name data, a model or a file?"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from detoxrl.config.edit import flatten, with_settings
from detoxrl.config.schema import Config

# What separates a source from the label or function name behind it, by setting; "" where the source stands alone.
_SEPARATORS = {
    "data.source": "",
    "policy.base": "",
    "policy.adapter": "",
    "reward.classifier": "",
    "evaluation.encoder": "",
    "evaluation.primary_judge": "",
    "evaluation.nli": "",
    "evaluation.fluency": "=",
    "reward.function": ":",
}
_OTHER_JUDGES = "evaluation.other_judges"
# Values with a meaning of their own, which name no source.
_RESERVED = ("embedded", "scratch", "none", "alt-profanity-check")


def map_sources(config: Config, change: Callable[[str, str], str]) -> Config:
    """Return the config with each path or hub id replaced by `change(setting, source)`; labels stay.

    Other judges go by "evaluation.other_judges 0", "evaluation.other_judges 1" and so on. The classifier is left out if
    a reward function replaces it.
    """

    def replaced(setting: str, value: str | None, separator: str) -> str | None:
        source = _source_of(value, separator)
        if value is None or source is None:
            return value
        return change(setting, source) + value.removeprefix(source)

    settings = flatten(asdict(config))
    changed: dict[str, Any] = {}
    for setting, separator in _SEPARATORS.items():
        if setting == "reward.classifier" and config.reward.function:
            continue
        changed[setting] = replaced(setting, settings[setting], separator)

    judges = enumerate(config.evaluation.other_judges)
    changed[_OTHER_JUDGES] = [replaced(f"{_OTHER_JUDGES} {i}", judge, "=") for i, judge in judges]
    return with_settings(config, changed)


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
