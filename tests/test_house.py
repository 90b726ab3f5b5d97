"""The packages: imports go one way, every file says which question it answers, and the public names are these."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import detoxrl

PACKAGE = Path(detoxrl.__file__).parent
# Each imports only what stands before it.
ORDER = [
    "errors", "config", "runtime", "rl", "models", "data", "rewards", "evaluation", "runs", "training", "report",
    "commands", "arguments", "cli", "__init__", "__main__",
]  # fmt: skip
WITHOUT_TORCH = ("errors", "config", "report", "arguments", "cli", "__init__", "__main__")
MODULES = sorted(PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    """Return the package, or the module beside the packages, that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Yield what a file imports, anywhere in it, by its full name: `from detoxrl.rl import kl` is detoxrl.rl.kl."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_packages_import_only_what_stands_before_them() -> None:
    wrong = []
    for path in MODULES:
        for name in imports(path):
            package, _, rest = name.partition(".")
            imported = rest.partition(".")[0]
            if package == "detoxrl" and imported in ORDER and ORDER.index(imported) > ORDER.index(part(path)):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert wrong == []


def test_imports_are_absolute() -> None:
    relative = [path for path in MODULES if "\nfrom ." in path.read_text()]
    assert relative == []


def test_few_modules_stand_beside_the_packages() -> None:
    flat = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "runs"}
    assert flat == {"__main__", "arguments", "cli", "errors"}
    assert {part(path) for path in MODULES} == set(ORDER)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_libraries_are_imported_where_they_belong(path: Path) -> None:
    libraries = {name.partition(".")[0] for name in imports(path)}
    if part(path) in WITHOUT_TORCH:
        assert not libraries & {"torch", "transformers"}
    if part(path) == "rl":
        assert libraries <= {"torch", "detoxrl", "__future__", "collections", "dataclasses", "math", "typing"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_file_says_first_which_question_it_answers(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring
    assert docstring.splitlines()[0].endswith("?") or path.name == "__init__.py"


def test_the_public_names_are_these_and_no_module_hides_one() -> None:
    assert detoxrl.__all__ == [
        "Config", "DetoxrlError", "InputError", "RewardFunction", "StorageError", "TrainingError", "__version__",
        "evaluate", "export", "fit", "recipe", "recipe_names", "run",
    ]  # fmt: skip
    for path in MODULES:
        importlib.import_module(".".join(("detoxrl", *path.relative_to(PACKAGE).with_suffix("").parts)))
    for name in detoxrl.__all__:
        assert not isinstance(getattr(detoxrl, name), ModuleType), f"{name} is hidden by a module"
    with pytest.raises(AttributeError, match="module 'detoxrl' has no attribute 'nothing'"):
        _ = detoxrl.nothing  # type: ignore[attr-defined]
