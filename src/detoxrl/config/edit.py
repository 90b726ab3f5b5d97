"""How are settings changed by name, and how is a config stored?"""

import difflib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from detoxrl.config.schema import Config
from detoxrl.errors import InputError, require

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
    """Return the config stored at `path`. Raises InputError if a setting is unknown, missing or not allowed."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # neither UTF-8 nor JSON
        raise InputError("config", str(path), f"is not valid JSON: {error}", "give a run's config.json") from None

    is_config = isinstance(stored, dict) and "recipe" in stored
    require(is_config, "config", str(path), "is not the config of a run", "give a run's config.json")

    settings = flatten(stored)
    recipe = str(settings.pop("recipe"))
    config = with_settings(Config(recipe=recipe), settings, f"correct it in {path}")

    for name in _setting_names(config):
        require(name in settings, "setting", name, f"is missing in {path}", "add it there")
    return config


def with_settings(
    config: Config, settings: Mapping[str, object], remedy: str = "see `detoxrl run RECIPE --help`"
) -> Config:
    """Return the config with some settings changed, given by dotted name: `{"rl.steps": 100}`.

    Text is parsed as the type of the setting, so that the command line and Python share one way. Raises InputError for
    an unknown name, with the closest known one, and for a value that is not allowed. `remedy` ends the messages that
    have no better advice.
    """
    nested = asdict(config)
    names = _setting_names(config)
    for name, value in settings.items():
        require(name in names, "setting", name, "is not a setting", closest_match(name, names, remedy))
        section, _, field_name = name.rpartition(".")
        target = nested[section] if section else nested
        target[field_name] = _plain(value)

    try:
        return TypeAdapter(Config).validate_python(nested)
    except ValidationError as error:
        raise _input_error(error.errors()[0], remedy) from None


def closest_match(word: str, known: Iterable[str], otherwise: str) -> str:
    """Return the remedy for an unknown name: the closest known one, or `otherwise` if none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else otherwise


def _setting_names(config: Config) -> list[str]:
    return [name for name in flatten(asdict(config)) if name != "recipe"]


def _plain(value: object) -> object:
    """Return a value as pydantic reads it: a path as text, and the text "None" as None."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return None if value == "None" else value


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
