"""How does a plain Python function become a reward?"""

import importlib
import inspect
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch

from detoxrl.errors import InputError, require
from detoxrl.rewards.shaping import Reward

FIELD = "reward.function"
_IN_PYTHON = "given in Python"


class RewardFunction(Protocol):
    """What a reward of your own looks like: one number for each response, higher is better.

    `prompts` are what the policy read, `responses` what it wrote, both (B,); an empty response is possible.
    """

    def __call__(
        self, prompts: list[str], responses: list[str]
    ) -> Sequence[float] | np.ndarray[Any, Any] | torch.Tensor:
        """Return B finite numbers."""


def load_function(name: str) -> RewardFunction:
    """Return the function `FILE.py:NAME` or `package.module:NAME`. Raises InputError when there is none."""
    where, _, attribute = name.rpartition(":")
    require(where != _IN_PYTHON, FIELD, name, "cannot be found again", "give it as reward= in Python")
    require(bool(where and attribute), FIELD, name, "names no function", "write FILE.py:NAME")
    defined = _names(name, where)
    there = ", ".join(key for key, value in defined.items() if inspect.isfunction(value))
    found, rule = defined.get(attribute), f"{where} defines no function {attribute}"
    require(callable(found), FIELD, name, rule, f"choose from {there}" if there else "define it there")
    return cast(RewardFunction, found)


def function_name(function: RewardFunction) -> str:
    """Return `FILE.py:NAME` for a function that `load_function` can find again, else a name that says it cannot."""
    if inspect.isfunction(function) and function.__qualname__.isidentifier():
        return f"{Path(inspect.getfile(function)).resolve()}:{function.__name__}"
    return f"{_IN_PYTHON}:{type(function).__name__}"


def _names(name: str, where: str) -> dict[str, Any]:
    """Return what a module or a Python file defines."""
    if where.endswith(".py"):
        require(Path(where).is_file(), FIELD, name, f"there is no file {where}", "give the path of a Python file")
        sys.path.append(str(Path(where).resolve().parent))  # its neighbours can be imported, as in a script
        try:
            return runpy.run_path(where, run_name=f"reward_{Path(where).stem}")
        except SyntaxError as error:
            raise InputError(FIELD, name, f"line {error.lineno} is no Python: {error.msg}", "mend it") from None
    try:
        return vars(importlib.import_module(where))
    except (ModuleNotFoundError, TypeError):
        raise InputError(FIELD, name, f"there is no module {where}", "write FILE.py:NAME") from None


def validated_reward(function: RewardFunction, name: str) -> Reward:
    """Return the function as a reward that raises InputError for what is not one finite number for each response."""

    def scores(prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
        returned = function(list(prompts), list(responses))
        size, remedy = len(responses), "return one finite number for each response, an empty one too"
        plain = returned.detach().float().cpu() if isinstance(returned, torch.Tensor) else returned
        try:
            numbers = np.asarray(plain)
        except ValueError:  # lists of unequal length
            numbers = np.asarray(None)
        rule = f"returned {type(returned).__name__}, not numbers"
        require(numbers.dtype.kind in "fiub", FIELD, name, rule, remedy)
        numbers = numbers.astype(np.float32)
        rule = f"returned shape {numbers.shape} for {size} responses"
        require(numbers.shape == (size,), FIELD, name, rule, remedy)
        for i, score in enumerate(numbers, start=1):
            require(bool(np.isfinite(score)), FIELD, name, f"returned {score} for response {i} of {size}", remedy)
        return torch.from_numpy(numbers)

    return scores
