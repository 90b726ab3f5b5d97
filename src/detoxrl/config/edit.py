"""How are settings changed by name, and how is a config stored?"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from detoxrl.config.fit import FitConfig
from detoxrl.config.names import RENAMED, did_you_mean_setting
from detoxrl.config.schema import Config
from detoxrl.errors import InputError, one_line, require

# What a config means that was stored before these settings existed.
_BEFORE_THEY_WERE_SETTINGS = {"data.chat_template": False}
_BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")
# Rule and remedy for each of pydantic's error types that a config can raise. A rule is filled in from the error's
# context, such as the bound. None: the caller's remedy.
_RULES: dict[str, tuple[str, str | None]] = {
    "greater_than": ("must be above {gt:g}", "give a larger value"),
    "greater_than_equal": ("must be {ge:g} or more", "give a larger value"),
    "less_than": ("must be below {lt}", "give a smaller value"),
    # Every field with an upper bound of this kind is a UnitInterval.
    "less_than_equal": ("must lie in [0, {le:g}]", "give a smaller value"),
    "too_short": ("must not be empty", "give at least one value"),
    "string_too_short": ("must not be empty", "give a value"),
    "literal_error": ("must be {expected}", None),
    "int_type": ("must be a whole number", None),
    "int_parsing": ("must be a whole number", None),
    "int_from_float": ("must be a whole number", None),
    "float_type": ("must be a number", None),
    "float_parsing": ("must be a number", None),
    "finite_number": ("must be a finite number", None),
    "bool_type": ("must be true or false", None),
    "bool_parsing": ("must be true or false", None),
    "string_type": ("must be text", None),
    "tuple_type": ("must be a list of values", None),
}


def without_stale_targets(settings: Mapping[str, object]) -> dict[str, object]:
    """Return changes to a stored config: with another base, its LoRA targets are chosen anew unless they are given.

    A run stores the layers that it chose for its base; another base has other layers.
    """
    changes = dict(settings)
    if "policy.base" in changes:
        changes.setdefault("policy.lora_targets", None)
    return changes


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def config_to_json(config: Config) -> str:
    """Return the config as indented JSON, from which `config_from_json` reads an equal config."""
    return TypeAdapter(Config).dump_json(config, indent=2).decode()


def config_from_json(path: Path) -> Config:
    """Return the config stored at `path`. Raises InputError if a setting is unknown or not allowed."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # Neither UTF-8 nor JSON, or too deep to be a config.
        rule = f"is not valid JSON: {one_line(error)}"
        raise InputError("config", str(path), rule, "give a run's config.json") from None

    is_config = isinstance(stored, dict) and "recipe" in stored
    require(is_config, "config", str(path), "is not the config of a run", "give a run's config.json")

    settings = _as_of_today(flatten(stored))
    recipe = str(settings.pop("recipe"))
    return with_settings(Config(recipe=recipe), settings, f"correct it in {path}")


def _as_of_today(settings: dict[str, Any]) -> dict[str, Any]:
    """Return stored settings under today's names. A setting that is newer than the config has what it stands for.

    That is its default, except where the default does something that no earlier version did.
    """
    renamed = {RENAMED.get(name, name): value for name, value in settings.items()}
    return {**_BEFORE_THEY_WERE_SETTINGS, **renamed}


def with_settings(
    config: Config, settings: Mapping[str, object], remedy: str = "see `detoxrl run RECIPE --help`"
) -> Config:
    """Return the config with some settings changed, given by dotted name: `{"rl.steps": 100}`.

    Text is parsed as the type of the setting, so that the command line and Python share one way. "none", in upper or
    lower case, is None or an empty list where the setting allows that. Raises InputError for an unknown name, with what
    was meant or what there is, and for a value that is not allowed. `remedy` ends the messages that have no better
    advice.
    """
    nested = asdict(config)
    types = setting_types()
    for name, value in settings.items():
        if name not in types:
            raise InputError("setting", name, "is not a setting", did_you_mean_setting(name, list(types)))
        section, _, field_name = name.rpartition(".")
        target = nested[section] if section else nested
        target[field_name] = _plain(value, types[name])

    try:
        return TypeAdapter(Config).validate_python(nested)
    except ValidationError as error:
        raise _input_error(error.errors()[0], remedy) from None


def fit_config(settings: Mapping[str, object], remedy: str = "see `detoxrl fit --help`") -> FitConfig:
    """Return how a classifier is fitted, by settings given by name, `source` among them. Raises as `with_settings`.

    A single value of a setting that takes several may stand alone.
    """
    types = _field_types(FitConfig)
    plain: dict[str, object] = {}
    for name, value in settings.items():
        if name not in types:
            raise InputError("setting", name, "is not a setting", did_you_mean_setting(name, list(types)))
        value = _plain(value, types[name])
        alone = isinstance(value, str) and takes_list(types[name])
        plain[name] = (value,) if alone else value

    try:
        return TypeAdapter(FitConfig).validate_python(plain)
    except ValidationError as error:
        raise _input_error(error.errors()[0], remedy) from None


@cache
def setting_types() -> dict[str, Any]:
    """Return the type of every setting by its dotted name, without its bounds: `int`, `str | None`."""
    types = _field_types(Config)
    del types["recipe"]
    return types


def _field_types(section: type, prefix: str = "") -> dict[str, Any]:
    types: dict[str, Any] = {}
    hints = get_type_hints(section)
    for field in fields(section):
        name = f"{prefix}{field.name}"
        if is_dataclass(hints[field.name]):
            types.update(_field_types(hints[field.name], f"{name}."))
        else:
            types[name] = hints[field.name]
    return types


def takes_list(annotation: Any) -> bool:
    """Return whether a setting of this type holds a list of values, or may hold one."""
    return tuple in (get_origin(annotation), *map(get_origin, get_args(annotation)))


def _plain(value: object, annotation: Any) -> object:
    """Return a value as pydantic reads it: a path as text, and "none" as None or an empty list if that is allowed."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)

    word = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
    says_none = isinstance(word, str) and word.lower() == "none"
    if says_none and NoneType in get_args(annotation):
        return None
    return () if says_none and takes_list(annotation) else value


def _input_error(error: ErrorDetails, remedy: str) -> InputError:
    """Return one of pydantic's errors as ours: `section.field = value: rule; remedy`."""
    # A location is section, field and, for an element of a tuple, its index.
    field = ".".join(part for part in error["loc"] if isinstance(part, str))
    value = error["input"]
    context = error.get("ctx", {})
    rule, better_remedy = _RULES.get(error["type"], (error["msg"].lower(), None))

    if error["type"] in _BOUNDS:
        (bound,) = context.values()
        value = type(bound)(value)  # text from the command line, shown as the number it stands for

    return InputError(field, value, rule.format(**context), better_remedy or remedy)
