"""How is the source shaped, in numbers?

    python benchmarks/house/shape.py [SRC ...] [--from MODULE:FUNCTION ...]

prints one Markdown table with one column for each source tree (default: src/detoxrl). It reads the files and imports
none of them. What is counted:

- A **package** is a folder with an `__init__.py`. A **flat module** lies directly in SRC and is neither `__init__` nor
  `__main__`.
- An **import arrow** is a pair of modules of the tree of which the first imports the second, anywhere in its text. An
  arrow **climbs** if it leads to a package that comes later in ORDER. A tree with a package that ORDER does not name
  has no declared order; it shows a dash.
- **Calls that pass the config on** are found by reading the function named by `--from` call by call, in the order of
  the text. A call counts if it calls a function or class of the tree and an argument mentions `config` or
  `something.config`; the called function is then read at that point, once. Such a call **goes back up** if the module
  it leads to is higher than that of the counted call before it. The height of a module is its longest chain of imports
  within the tree.
- **Tokens** are those of Python's `tokenize` without layout, comments and docstrings: names, numbers, strings and
  operators. A **code line** is one that holds a token.
- A **tuple assignment** has a tuple on both sides: `a, b = x, y`.
- A function's lines run from its `def` to its end. Methods and nested functions count as functions; a line inside two
  functions counts once.
- A **parameter list** has every kind of parameter except `self` and `cls`.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

ORDER = (
    "errors",
    "config",
    "runtime",
    "rl",
    "models",
    "data",
    "rewards",
    "evaluation",
    "runs",
    "training",
    "report",
    "commands",
    "arguments",
    "cli",
)
ENTRY_POINTS = ("", "__main__")  # the package's own `__init__` and `python -m`: both may import everything
STARTS = ("commands.run:run", "stages:run")
PARAMETER_LIMIT = 6
LAYOUT = {
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}
NONE = "–"

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Reference = tuple[str, str]  # (module, name of a function or class in it)


@dataclass(frozen=True)
class Module:
    """One file of the tree. `name` is its dotted path below SRC; a package is named like its folder, SRC itself ""."""

    name: str
    path: Path
    text: str
    tree: ast.Module

    @property
    def package(self) -> str:
        return self.name.split(".")[0]

    @property
    def functions(self) -> list[FunctionNode]:
        return [node for node in ast.walk(self.tree) if isinstance(node, FUNCTIONS)]


def read_tree(root: Path) -> dict[str, Module]:
    """Return every module below `root` by its dotted name."""
    modules = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        name = ".".join(parts)
        text = path.read_text()
        modules[name] = Module(name, path, text, ast.parse(text))

    return modules


# Imports


def imported_names(module: Module, modules: dict[str, Module], root: str) -> dict[str, Reference]:
    """Map each name that `module` imports from the tree to what it stands for. A module stands for (its name, "")."""
    names = {}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                target = alias.name.removeprefix(root).removeprefix(".")
                if alias.name.split(".")[0] == root and target in modules:
                    names[alias.asname or alias.name] = (target, "")
        if not isinstance(node, ast.ImportFrom):
            continue

        source = imported_from(node, module, root)
        if source is None:
            continue
        for alias in node.names:
            submodule = f"{source}.{alias.name}".removeprefix(".")
            if submodule in modules:
                names[alias.asname or alias.name] = (submodule, "")
            elif source in modules:
                names[alias.asname or alias.name] = (source, alias.name)

    return names


def imported_from(node: ast.ImportFrom, module: Module, root: str) -> str | None:
    """Return the module below SRC that an import statement reads from, or None if that is not in the tree."""
    source = node.module or ""
    if node.level == 0:
        in_tree = source.split(".")[0] == root
        return source.removeprefix(root).removeprefix(".") if in_tree else None

    folder = module.name.split(".") if module.name else []
    steps_up = node.level - 1 if module.path.name == "__init__.py" else node.level
    folder = folder[: len(folder) - steps_up]
    return ".".join([*folder, source] if source else folder)


def count_climbs(arrows: set[tuple[str, str]]) -> int | None:
    """Count the arrows to a later package, or return None if ORDER does not name every package."""
    ranks = {package: rank for rank, package in enumerate(ORDER)}
    ranks.update(dict.fromkeys(ENTRY_POINTS, len(ORDER)))
    packages = [(source.split(".")[0], target.split(".")[0]) for source, target in arrows]
    if any(package not in ranks for pair in packages for package in pair):
        return None
    return sum(ranks[target] > ranks[source] for source, target in packages)


def import_heights(names: list[str], arrows: set[tuple[str, str]]) -> dict[str, int]:
    """Return the longest chain of imports below each module. Modules that import one another get the same height."""
    below: dict[str, set[str]] = {name: set() for name in names}
    for source, target in arrows:
        below[source].add(target)
    reachable = {name: everything_below(name, below) for name in names}
    heights: dict[str, int] = {}

    # A module reaches more modules than each one strictly below it, so those below come first.
    for name in sorted(names, key=lambda name: len(reachable[name])):
        strictly_below = [target for target in reachable[name] if name not in reachable[target] and target != name]
        heights[name] = max((heights[target] + 1 for target in strictly_below), default=0)

    return heights


def everything_below(name: str, below: dict[str, set[str]]) -> set[str]:
    """Return all modules that can be reached from `name` along arrows."""
    reached: set[str] = set()
    waiting = list(below[name])
    while waiting:
        target = waiting.pop()
        if target not in reached:
            reached.add(target)
            waiting.extend(below[target])

    return reached


# The walk of the config


class ConfigWalk:
    """The calls that pass the config on, in the order in which a reader meets them: `passed` holds what they call."""

    def __init__(self, modules: dict[str, Module], names: dict[str, dict[str, Reference]]) -> None:
        self.names = names
        self.definitions: dict[Reference, ast.AST] = {}
        for module in modules.values():
            for node in module.tree.body:
                if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
                    self.definitions[module.name, node.name] = node
        self.passed: list[Reference] = []
        self.already_read: set[Reference] = set()

    def read(self, reference: Reference) -> None:
        if reference in self.already_read:
            return
        self.already_read.add(reference)

        calls = [node for node in ast.walk(self.definitions[reference]) if isinstance(node, ast.Call)]
        for call in sorted(calls, key=lambda call: (call.lineno, call.col_offset)):
            called = self.called_by(call, reference[0])
            if called in self.definitions and passes_config(call):
                self.passed.append(called)
                self.read(called)

    def called_by(self, call: ast.Call, module: str) -> Reference:
        """Return what a call in `module` calls, as `function(...)` or `module.function(...)`; else ("", "")."""
        function = call.func
        if isinstance(function, ast.Name):
            return self.names[module].get(function.id, (module, function.id))
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            owner, name = self.names[module].get(function.value.id, ("", "no module"))
            if not name:
                return (owner, function.attr)
        return ("", "")


def passes_config(call: ast.Call) -> bool:
    """Return whether an argument of the call mentions `config` or an attribute of that name."""
    for argument in [*call.args, *[keyword.value for keyword in call.keywords]]:
        for node in ast.walk(argument):
            if isinstance(node, ast.Name) and node.id == "config":
                return True
            if isinstance(node, ast.Attribute) and node.attr == "config":
                return True

    return False


def count_turns_up(passed: list[Reference], heights: dict[str, int]) -> int:
    """Count the calls to a module that stands higher than the one called before."""
    levels = [heights[module] for module, _ in passed]
    return sum(later > earlier for earlier, later in pairwise(levels))


# Lines, tokens, functions


def docstring_lines(tree: ast.Module) -> set[int]:
    """Return the numbers of the lines that docstrings stand on."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            lines.update(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))

    return lines


def code_tokens(module: Module) -> list[tokenize.TokenInfo]:
    """Return the tokens of the module without layout, comments and docstrings."""
    docstrings = docstring_lines(module.tree)
    tokens = tokenize.generate_tokens(io.StringIO(module.text).readline)
    return [
        token
        for token in tokens
        if token.type not in LAYOUT and not (token.type == tokenize.STRING and token.start[0] in docstrings)
    ]


def code_lines(tokens: list[tokenize.TokenInfo]) -> set[int]:
    """Return the numbers of the lines that tokens stand on, every line of a string over several lines included."""
    lines: set[int] = set()
    for token in tokens:
        lines.update(range(token.start[0], token.end[0] + 1))

    return lines


def tuple_targets(module: Module) -> Iterator[ast.Assign]:
    """Yield every assignment to a tuple of targets."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Assign) and any(isinstance(target, ast.Tuple) for target in node.targets):
            yield node


def function_lines(module: Module) -> set[int]:
    """Return the numbers of the lines that lie inside functions."""
    lines: set[int] = set()
    for function in module.functions:
        lines.update(range(function.lineno, (function.end_lineno or function.lineno) + 1))

    return lines


def length(function: FunctionNode) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def parameters(function: FunctionNode) -> list[str]:
    """Return the names of a function's parameters without `self` and `cls`."""
    arguments = function.args
    nodes = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    nodes += [node for node in (arguments.vararg, arguments.kwarg) if node is not None]
    return [node.arg for node in nodes if node.arg not in ("self", "cls")]


# The table


def measure(root: Path, starts: list[str]) -> dict[str, str]:
    """Return the numbers of one source tree by the name of their row."""
    modules = read_tree(root)
    return {**measure_imports(root, modules, starts), **measure_text(list(modules.values()))}


def measure_imports(root: Path, modules: dict[str, Module], starts: list[str]) -> dict[str, str]:
    """Return the rows about packages, imports and the walk of the config."""
    names = {name: imported_names(module, modules, root.name) for name, module in modules.items()}
    arrows = {(name, target) for name in modules for target, _ in names[name].values() if target != name}
    climbs = count_climbs(arrows)
    flat = [name for name, module in modules.items() if is_flat(module)]
    packages = [module for module in modules.values() if module.path.name == "__init__.py" and module.name]
    walk = ConfigWalk(modules, names)
    start = first_start(starts, walk)
    turns = NONE
    if start is not None:
        walk.read(start)
        turns = str(count_turns_up(walk.passed, import_heights(list(modules), arrows)))

    return {
        "packages": str(len(packages)),
        "flat modules beside the packages": str(len(flat)),
        "modules": str(len(modules)),
        "import arrows between modules": f"{len(arrows):,}",
        "arrows that climb": NONE if climbs is None else str(climbs),
        "calls that pass the config on": NONE if start is None else f"{len(walk.passed)} (from {'.'.join(start)})",
        "such calls that go back up": turns,
    }


def is_flat(module: Module) -> bool:
    in_root = "." not in module.name
    return in_root and module.path.name not in ("__init__.py", "__main__.py")


def first_start(starts: list[str], walk: ConfigWalk) -> Reference | None:
    """Return the first of the `starts` that the tree defines."""
    for start in starts:
        module, _, name = start.partition(":")
        if (module, name) in walk.definitions:
            return (module, name)

    return None


def measure_text(modules: list[Module]) -> dict[str, str]:
    """Return the rows about lines, tokens and functions."""
    n_tokens = 0
    n_code_lines = 0
    n_targets = 0
    n_pairs = 0
    n_function_lines = 0
    n_blank = 0
    file_lengths: dict[str, int] = {}
    functions: list[FunctionNode] = []

    for module in modules:
        tokens = code_tokens(module)
        n_tokens += len(tokens)
        n_code_lines += len(code_lines(tokens))

        targets = list(tuple_targets(module))
        n_targets += len(targets)
        n_pairs += sum(isinstance(assignment.value, ast.Tuple) for assignment in targets)

        lines = module.text.splitlines()
        in_functions = function_lines(module)
        n_function_lines += len(in_functions)
        n_blank += sum(not lines[number - 1].strip() for number in in_functions)

        file_lengths[module.name or "__init__"] = len(lines)
        functions += module.functions

    largest_file = max(file_lengths, key=lambda name: file_lengths[name])
    largest_function = max(functions, key=length)
    most_parameters = max(functions, key=lambda function: len(parameters(function)))
    crowded = sum(len(parameters(function)) > PARAMETER_LIMIT for function in functions)
    return {
        "code lines": f"{n_code_lines:,}",
        "tokens": f"{n_tokens:,}",
        "tokens per code line": f"{n_tokens / n_code_lines:.1f}",
        "tuple assignments per 1,000 code lines": f"{1000 * n_pairs / n_code_lines:.1f}",
        "assignments to a tuple, in all": str(n_targets),
        "blank lines inside functions": f"{n_blank / n_function_lines:.1%}",
        "longest parameter list": f"{len(parameters(most_parameters))} (`{most_parameters.name}`)",
        f"functions with more than {PARAMETER_LIMIT} parameters": str(crowded),
        "median file, lines": f"{median(file_lengths.values()):g}",
        "largest file, lines": f"{file_lengths[largest_file]} (`{largest_file}`)",
        "median function, lines": f"{median(map(length, functions)):g}",
        "largest function, lines": f"{length(largest_function)} (`{largest_function.name}`)",
    }


def table(roots: list[Path], starts: list[str]) -> str:
    """Return the Markdown table: one row for each number, one column for each tree."""
    columns = [measure(root, starts) for root in roots]
    lines = [
        "| | " + " | ".join(f"`{root}`" for root in roots) + " |",
        "|---|" + "---:|" * len(roots),
    ]
    for row in columns[0]:
        lines.append(f"| {row} | " + " | ".join(column[row] for column in columns) + " |")

    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="How is the source shaped, in numbers?")
    parser.add_argument("roots", nargs="*", type=Path, metavar="SRC", help="folder of a package; default src/detoxrl")
    parser.add_argument(
        "--from",
        dest="starts",
        nargs="+",
        default=list(STARTS),
        metavar="MODULE:FUNCTION",
        help=f"where the config's walk starts: the first of these that a tree has; default {' '.join(STARTS)}",
    )
    options = parser.parse_args(arguments)
    roots = options.roots or [Path("src/detoxrl")]
    print(table(roots, options.starts))


if __name__ == "__main__":
    main()
