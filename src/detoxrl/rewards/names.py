"""Do the labels and the function that a reward or a judge names exist?

Neither torch nor the function's own file is imported for the answer.
"""

import ast
import re
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from detoxrl.config.names import did_you_mean
from detoxrl.errors import InputError, require

FUNCTION = "reward.function"
IN_PYTHON = "given in Python"
"""What stands for the module of a function that was passed in Python and that no file holds."""
LABELS = ("nothate", "hate")
"""The labels of the embedded classifier by index: those of facebook/roberta-hate-speech-dynabench-r4-target."""
EMBEDDED_LABELS = {"reward.toxic_label": LABELS[1], "reward.good_label": LABELS[0]}
"""The labels of the embedded classifier, by the settings that have to name them."""


def label_index(id2label: Mapping[Any, str] | None, field: str, label: str) -> int:
    """Return the output index of a label; case is ignored. Raises InputError, which lists the labels."""
    rule = "belongs to a classifier whose id2label is not an object"
    require(isinstance(id2label, Mapping | None), field, label, rule, "correct its config.json")
    indices = {str(name).lower(): index for index, name in (id2label or {}).items()}
    if label.lower() not in indices:
        raise InputError(field, label, "is not a label of the classifier", f"use one of {', '.join(indices)}")
    return int(indices[label.lower()])


def require_labels(id2label: Mapping[Any, str] | None, labels: Mapping[str, str]) -> None:
    """Raise InputError unless a classifier has these labels, given by their settings, and they are different ones."""
    indices: dict[int, str] = {}
    for setting, label in labels.items():
        index = label_index(id2label, setting, label)
        rule = f"is the label of {indices.get(index)} too"
        require(
            index not in indices, setting, label, rule, "name another label, or leave it out (reward.good_label: none)"
        )
        indices[index] = setting


def require_embedded_labels(labels: Mapping[str, str]) -> None:
    """Raise InputError unless labels, given by their settings, are those of the embedded classifier."""
    for setting, label in labels.items():
        expected = EMBEDDED_LABELS[setting]
        rule = "is not a label of the embedded classifier"
        require(label.lower() == expected, setting, label, rule, f"use {expected}")


def split_function_name(name: str) -> tuple[str, str]:
    """Return file or module, and function, of `FILE.py:NAME` or `package.module:NAME`. Raises InputError."""
    module, _, function = name.rpartition(":")
    rule = "was passed in Python, so it cannot be loaded by its name"
    require(module != IN_PYTHON, FUNCTION, name, rule, "pass it again as reward= in Python")
    require(bool(module and function), FUNCTION, name, "does not name a function", "write FILE.py:NAME")
    return module, function


def require_function(name: str) -> None:
    """Raise InputError unless `FILE.py:NAME` is valid Python that mentions NAME, or `package.module:NAME` exists."""
    module, function = split_function_name(name)
    if not module.endswith(".py"):
        package = module.partition(".")[0]
        exists = package in sys.modules or (package != "" and find_spec(package) is not None)
        require(exists, FUNCTION, name, f"there is no module {module}", "write FILE.py:NAME")
        return

    path = Path(module)
    require(path.is_file(), FUNCTION, name, f"there is no file {module}", "give the path of a Python file")
    source = path.read_bytes()
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        rule = f"line {error.lineno} is not valid Python: {error.msg}"
        raise InputError(FUNCTION, name, rule, "fix the file") from None

    # What a file defines is only known once it has run. A name that is not even in its text is a typing mistake,
    # unless the file takes every name of another one.
    mentioned = re.search(rf"\b{re.escape(function)}\b".encode(), source) or re.search(rb"import\s+\*", source)
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    require(mentioned is not None, FUNCTION, name, *missing_function(module, function, functions))


def missing_function(module: str, function: str, functions: list[str]) -> tuple[str, str]:
    """Return rule and remedy for a function that is not among the `functions` of a module."""
    remedy = f"choose from {', '.join(functions)}" if functions else "define it there"
    return f"{module} defines no function {function}", did_you_mean(function, functions, remedy)
