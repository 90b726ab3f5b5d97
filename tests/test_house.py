"""The rooms: imports go down the floors only, every file says what it answers, nothing grows too large."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from types import ModuleType

import detoxrl

PACKAGE = Path(detoxrl.__file__).parent
FLOORS = [
    ("errors", "config", "settings", "recipes"),
    ("hub", "processes", "randomness", "records", "storage", "rl"),
    ("data", "policy", "rewards"),
    ("stopping", "launching", "cache", "tracking", "rollout", "memory"),
    ("evaluation", "best", "checkpoint"),
    ("sft", "validation", "train", "reward_training", "step_metrics"),
    ("report",),
    ("subjects", "parts", "changes", "prepare", "forecast", "doctor", "convert", "measuring", "stages", "sweep", "card",
     "sharing", "helping", "trackers"),
    ("arguments", "cli", "__init__", "__main__"),
]  # fmt: skip
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.Module) -> list[str]:
    found = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    found += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return found


def test_rooms_import_from_their_own_floor_or_below() -> None:
    wrong = []
    for path in MODULES:
        for name in imports(ast.parse(path.read_text())):
            parts = name.split(".")
            if parts[0] == "detoxrl" and len(parts) > 1 and FLOOR[parts[1]] > FLOOR[room(path)]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert wrong == []


def test_the_ground_floor_knows_no_torch_and_the_mathematics_nothing_else() -> None:
    for path in MODULES:
        heads = {name.split(".")[0] for name in imports(ast.parse(path.read_text()))}
        if FLOOR[room(path)] == 0 or room(path) in ("report", "cli", "__init__"):
            assert "torch" not in heads, path
            assert "transformers" not in heads or room(path) == "cli", path
        if room(path) == "rl":
            assert heads <= {"torch", "detoxrl", "__future__"}, path


def test_every_file_says_first_what_it_answers_and_stays_small() -> None:
    for path in MODULES:
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring, path
        assert docstring.splitlines()[0].endswith(("?", ".", "both", ":")), path
        assert len(path.read_text().splitlines()) <= 310, path
    assert sum(len(path.read_text().splitlines()) for path in MODULES) < 8700  # the plan was 6,500: docs/design.md


def test_the_public_names_are_these_and_no_module_hides_one() -> None:
    assert detoxrl.__all__ == [
        "Config", "DetoxrlError", "InputError", "RewardFunction", "StorageError", "TrainingError", "__version__",
        "evaluate", "export", "recipe", "recipe_names", "run",
    ]  # fmt: skip
    for path in MODULES:
        importlib.import_module(".".join(("detoxrl", *path.relative_to(PACKAGE).with_suffix("").parts)))
    for name in detoxrl.__all__:
        assert not isinstance(getattr(detoxrl, name), ModuleType), f"{name} is hidden by a module"
