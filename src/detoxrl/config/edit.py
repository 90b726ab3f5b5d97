"""How is a config changed by names, and stored?"""

import difflib
import inspect
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from detoxrl.config.schema import Config
from detoxrl.errors import InputError, require


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def help_texts(section: object) -> dict[str, tuple[str, str]]:
    """Return, by setting of a section, its type and what the comment above or behind it says."""
    found = re.findall(r"(?m)^(?:    # (.+)\n)?    (\w+): .*?(?:  # (.+))?$", inspect.getsource(type(section)))
    told = {name: above or behind for above, name, behind in found}
    types = {name: kind for name, kind in get_type_hints(type(section)).items() if not is_dataclass(kind)}
    return {name: (inspect.formatannotation(kind), told[name]) for name, kind in types.items() if name != "recipe"}


def config_to_json(config: Config) -> str:
    """Return the config as indented JSON that `config_from_json` reads back to an equal config."""
    return TypeAdapter(Config).dump_json(config, indent=2).decode()


def config_from_json(path: Path) -> Config:
    """Return the config stored at `path`. Raises InputError when a field is unknown, missing or not allowed."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no UTF-8, or no JSON
        raise InputError("config", str(path), f"is no JSON: {error}", "give a run's config.json") from None
    known = isinstance(settings, dict) and "recipe" in settings
    require(known, "config", str(path), "is not the config of a run", "give a run's config.json")
    given = flatten(settings)
    config = with_settings(Config(recipe=str(given.pop("recipe"))), given, f"correct it in {path}")
    for name in flatten(asdict(config)):
        require(name in given or name == "recipe", "setting", name, f"is missing in {path}", "add it there")
    return config


def with_settings(
    config: Config, settings: Mapping[str, object], remedy: str = "see `detoxrl run RECIPE --help`"
) -> Config:
    """Return the config with some settings changed, given as dotted names: `{"rl.steps": 100}`.

    Text is read as the setting's type, so that flags and Python share one way. Raises InputError for a name that is
    none, with the nearest one, and for a value that is not allowed.
    """
    nested = asdict(config)
    names = [name for name in flatten(nested) if name != "recipe"]
    for name, value in settings.items():
        require(name in names, "setting", name, "is not a setting", closest_match(name, names, remedy))
        section, _, field_name = name.rpartition(".")
        target = nested[section] if section else nested
        plain = os.fspath(value) if isinstance(value, os.PathLike) else value
        target[field_name] = None if plain == "None" else plain
    try:
        return TypeAdapter(Config).validate_python(nested)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "config"
        raise InputError(where, first.get("input"), first["msg"].lower(), remedy) from None


def closest_match(word: str, known: Iterable[str], otherwise: str) -> str:
    """Return the remedy for a name that is none: the nearest of those that are, or what to do without one."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else otherwise
