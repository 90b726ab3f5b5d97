"""How does a plain Python function become a reward?"""

import importlib
import inspect
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch

from detoxrl.config.schema import RewardConfig
from detoxrl.config.terms import Term, parse_terms
from detoxrl.errors import InputError, first_line, require
from detoxrl.models.types import Prompt
from detoxrl.rewards.names import FUNCTION, IN_PYTHON, missing_function, require_function, split_function_name
from detoxrl.rewards.terms import Score

# What every function gets: prompts and responses. A column of such a name cannot be given too.
_OWN_PARAMETERS = ("prompts", "responses")
# What a function that was written for trl calls the responses; trl passes everything by name.
_COMPLETIONS = "completions"


class RewardFunction(Protocol):
    """The signature of your own reward: one number per response, higher is better.

    `prompts` are the B texts that the policy read, `responses` the B texts that it wrote. A response may be empty. Each
    further parameter is a list of B values: a column of the data by its name, or `id`, `text` (the row's own text,
    without templates), `references`, `messages` or `toxicity`. `**columns` stands for all of them.
    """

    def __call__(
        self, prompts: list[str], responses: list[str], /, **columns: list[Any]
    ) -> Sequence[float] | np.ndarray[Any, Any] | torch.Tensor:
        """Return B finite numbers."""


RewardFunctions = RewardFunction | Mapping[str, RewardFunction]
"""One function, or several by the names of their terms."""


def load_function(name: str) -> RewardFunction:
    """Return the function `FILE.py:NAME` or `package.module:NAME`. Raises InputError when there is none."""
    require_function(name)
    module, attribute = split_function_name(name)
    defined = _defined_in(module, name)
    functions = [key for key, value in defined.items() if inspect.isfunction(value)]
    function = defined.get(attribute)
    require(callable(function), FUNCTION, name, *missing_function(module, attribute, functions))
    return cast(RewardFunction, function)


def function_name(function: RewardFunction) -> str:
    """Return `FILE.py:NAME` for a function that `load_function` can load, else a name that it refuses."""
    if inspect.isfunction(function) and function.__qualname__.isidentifier():
        return f"{Path(inspect.getfile(function)).resolve()}:{function.__name__}"
    return f"{IN_PYTHON}:{type(function).__name__}"


def function_of(term: Term, functions: RewardFunctions | None) -> RewardFunction | None:
    """Return the function for a term among those that were given in Python; None if none was.

    One function stands for reward.function: it serves the terms without a source, or with its own name as their source.
    """
    if term.kind != "function" or functions is None:
        return None
    if isinstance(functions, Mapping):
        return functions.get(term.name)
    return functions if term.source in (None, function_name(functions)) else None


def is_given(term: Term, functions: RewardFunctions | None) -> bool:
    """Return whether the function for a term is among those that were given in Python."""
    return function_of(term, functions) is not None


def named_functions(reward: RewardConfig, functions: RewardFunctions) -> dict[str, Any]:
    """Return the settings that name functions given in Python.

    One function is reward.function. Of several, each is a term: the one of its name, or a further one of weight 1.
    """
    if not isinstance(functions, Mapping):
        return {"reward.function": function_name(functions)}

    terms = {term.name: term for term in parse_terms(reward.terms)}
    for name, function in functions.items():
        term = terms.get(name, Term(kind="function", name=name))
        rule = f"has the name of a {term.kind}"
        require(term.kind == "function", "reward", name, rule, "give the function another name")
        terms[name] = replace(term, source=function_name(function))
    return {"reward.terms": [term.written() for term in terms.values()]}


def _defined_in(module: str, name: str) -> dict[str, Any]:
    """Return the globals of a Python file or a module. Raises InputError, with `name` as the value, without one."""
    if module.endswith(".py"):
        path = Path(module)
        sys.path.append(str(path.resolve().parent))  # The file can import its neighbours, as a script can.
        try:
            with _own_process(name):
                return runpy.run_path(module, run_name=f"reward_{path.stem}")
        except SyntaxError as error:
            rule = f"line {error.lineno} is not valid Python: {error.msg}"
            raise InputError(FUNCTION, name, rule, "fix the file") from None

    try:
        with _own_process(name):
            return vars(importlib.import_module(module))
    except (ModuleNotFoundError, TypeError):
        raise InputError(FUNCTION, name, f"there is no module {module}", "write FILE.py:NAME") from None


@contextmanager
def _own_process(name: str) -> Iterator[None]:
    """Let a user's code run inside the block without ending the run or moving it to another folder.

    Raises InputError, with `name` as the value, for code that calls `sys.exit`: the run would end as if all were well.
    """
    try:
        with chdir("."):  # Back to the present folder at the end.
            yield
    except SystemExit as error:
        rule = f"ended Python with sys.exit({'' if error.code is None else repr(error.code)})"
        remedy = "raise an exception instead, and put a script's own work below `if __name__ == '__main__':`"
        raise InputError(FUNCTION, name, rule, remedy) from error


def validated_reward(function: RewardFunction, name: str) -> Score:
    """Return the function as a term of a reward.

    It raises InputError when the rows lack a column that the function asks for, and unless the function returns one
    finite number for each response.
    """
    asked, asks_for_all = _asked_columns(function)
    signature = _signature(function)
    is_of_trl = signature is not None and _COMPLETIONS in signature.parameters

    def reward(prompts: Sequence[Prompt], responses: Sequence[str]) -> torch.Tensor:
        texts = [prompt.text for prompt in prompts]
        columns = _columns(prompts, asked, asks_for_all, name)
        positional: tuple[list[str], ...] = (texts, list(responses))
        if is_of_trl:
            columns = _named_as_in_trl(signature, texts, responses, columns)
            positional = ()

        _require_callable(signature, positional, columns, name)
        with _own_process(name):
            returned = function(*positional, **columns)
        return _validated_scores(returned, len(responses), name)

    return reward


def _signature(function: RewardFunction) -> inspect.Signature | None:
    """Return the signature of a function; some builtins have none."""
    try:
        return inspect.signature(function)
    except (ValueError, TypeError):
        return None


def _named_as_in_trl(
    signature: inspect.Signature | None, prompts: list[str], responses: Sequence[str], columns: dict[str, list[Any]]
) -> dict[str, list[Any]]:
    """Return the arguments by name for a function written for trl, which calls the responses completions."""
    assert signature is not None
    parameters = signature.parameters
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    arguments = {**columns, _COMPLETIONS: list(responses)}
    if takes_all or "prompts" in parameters:
        arguments["prompts"] = prompts
    return arguments


def _require_callable(
    signature: inspect.Signature | None, positional: Sequence[Any], columns: Mapping[str, Any], name: str
) -> None:
    """Raise InputError unless a function can be called with these arguments."""
    if signature is None:
        return
    try:
        signature.bind(*positional, **columns)
    except TypeError as error:
        rule = f"has the parameters {signature}, and is called with prompts and responses: {first_line(error)}"
        raise InputError(FUNCTION, name, rule, "write `def score(prompts, responses):`") from None


def _asked_columns(function: RewardFunction) -> tuple[list[inspect.Parameter], bool]:
    """Return the parameters of a function behind prompts and responses, and whether it takes any other column.

    A function that names neither prompts nor responses, such as a wrapper with `*args, **kwargs`, gets no columns.
    """
    signature = _signature(function)
    if signature is None:
        return [], False

    parameters = signature.parameters.values()
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters)
    if _COMPLETIONS in signature.parameters:
        by_name = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
        return [each for each in by_name if each.name not in (*_OWN_PARAMETERS, _COMPLETIONS)], takes_any

    positional = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    given = len(_OWN_PARAMETERS)
    asked = [each for each in positional[given:] if each.kind is each.POSITIONAL_OR_KEYWORD]
    asked += [each for each in parameters if each.kind is each.KEYWORD_ONLY]
    return asked, takes_any and len(positional) >= given


def _columns(
    prompts: Sequence[Prompt], asked: Sequence[inspect.Parameter], asks_for_all: bool, name: str
) -> dict[str, list[Any]]:
    """Return the values that a function takes of each prompt, by column; a column that no row has keeps its default."""
    known: dict[str, None] = {}
    for prompt in prompts:
        known.update(dict.fromkeys(prompt.columns))

    names = [parameter.name for parameter in asked if parameter.name in known]
    for parameter in asked:
        is_there = parameter.name in known or parameter.default is not parameter.empty
        remedy = f"choose from {', '.join(known)}, or give the parameter a default"
        require(is_there, FUNCTION, name, f"asks for {parameter.name}, and the rows have no such column", remedy)

    if asks_for_all:
        names += [column for column in known if column not in (*names, *_OWN_PARAMETERS)]
    return {column: [prompt.columns.get(column) for prompt in prompts] for column in names}


def _validated_scores(returned: Any, size: int, name: str) -> torch.Tensor:
    """Return what a function returned for `size` responses as scores (size,) in fp32. Raises InputError."""
    remedy = "return one finite number for each response, also for an empty one"
    numbers = _as_array(returned)
    numeric = numbers.dtype.kind in "fiub"
    require(numeric, FUNCTION, name, f"returned {type(returned).__name__}, not numbers", remedy)

    numbers = numbers.astype(np.float32)
    require(numbers.shape == (size,), FUNCTION, name, f"returned shape {numbers.shape} for {size} responses", remedy)
    for i, score in enumerate(numbers, start=1):
        require(bool(np.isfinite(score)), FUNCTION, name, f"returned {score} for response {i} of {size}", remedy)
    return torch.from_numpy(numbers)


def _as_array(returned: Any) -> np.ndarray[Any, Any]:
    """Return what a function returned as an array, which has dtype object if it does not hold numbers."""
    if isinstance(returned, torch.Tensor):
        if returned.is_complex() or returned.is_meta or returned.layout != torch.strided:
            return np.asarray(None)
        returned = returned.detach().float().cpu()
    try:
        return np.asarray(returned)
    except (ValueError, TypeError, RuntimeError):  # Nested lists of unequal length, for example.
        return np.asarray(None)
