"""Where in a source is a statement or an expression, and what is its text?"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

Edit = tuple[str, int, int, str]
"""(operator, first byte, byte after the last, new text)"""
Function = ast.FunctionDef | ast.AsyncFunctionDef
TreePath = tuple[tuple[str, int], ...]
"""The path from a tree to a statement: (field, index), ..."""

BLOCKS = ("body", "orelse", "handlers", "finalbody", "cases")
# Functions that only show something.
SHOWN = {"print", "advance", "progress"}


@dataclass(frozen=True)
class Signature:
    """The names of the positional parameters, and of all parameters without a default."""

    positional: tuple[str, ...] = ()
    required: frozenset[str] = frozenset()


Signatures = dict[str, Signature]


class Code:
    """A source, its syntax tree with the parent of each node, and the text of each node."""

    def __init__(self, source: str, known: Signatures) -> None:
        self.raw, self.tree, self.known = source.encode(), ast.parse(source), known
        self.starts = [0, *accumulate(len(line) for line in self.raw.splitlines(keepends=True))]
        pairs = ((child, parent) for parent in ast.walk(self.tree) for child in ast.iter_child_nodes(parent))
        self.parents: dict[ast.AST, ast.AST] = dict(pairs)

    def span(self, node: ast.AST) -> tuple[int, int]:
        first, last = self.starts[node.lineno - 1], self.starts[node.end_lineno - 1]
        return first + node.col_offset, last + node.end_col_offset

    def text(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.raw[start:end].decode()

    def atom(self, node: ast.AST) -> str:
        """Return a node's text, in parentheses unless it is an atom."""
        whole = isinstance(node, ast.Name | ast.Attribute | ast.Call | ast.Subscript | ast.Constant)
        return self.text(node) if whole else f"({self.text(node)})"

    def instead(self, operator: str, node: ast.AST, text: str) -> Edit:
        return (operator, *self.span(node), text)

    def between(self, operator: str, left: ast.AST, right: ast.AST, old: str, new: str) -> Edit:
        start, end = self.span(left)[1], self.span(right)[0]
        return operator, start, end, self.raw[start:end].decode().replace(old, new, 1)

    def call(self, node: ast.Call, arguments: list[ast.AST]) -> str:
        return f"{self.text(node.func)}({', '.join(map(self.text, arguments))})"

    def above(self, node: ast.AST, kind: type[ast.AST] | tuple[type[ast.AST], ...]) -> ast.AST:
        while not isinstance(node, kind):
            node = self.parents[node]
        return node

    def reads(self, node: ast.AST) -> bool:
        """Return whether a name or attribute is read here, and neither assigned to nor called."""
        if not isinstance(node, ast.Name | ast.Attribute) or not isinstance(node.ctx, ast.Load):
            return False
        parent = self.parents[node]
        written = isinstance(parent, ast.Subscript) and parent.value is node and not isinstance(parent.ctx, ast.Load)
        return not written and not (isinstance(parent, ast.Call) and parent.func is node)

    def bound_before(self, name: str, node: ast.AST) -> bool:
        """Return whether a local name has a value before the statement of `node`."""
        function, line = self.above(node, Function), self.above(node, ast.stmt).lineno
        return any(
            (isinstance(other, ast.arg) and other.arg == name)
            or (isinstance(other, ast.Name) and other.id == name and isinstance(other.ctx, ast.Store)
                and other.lineno < line)
            for other in ast.walk(function)
        )  # fmt: skip


def statements(
    node: ast.AST, path: TreePath = (), name: str = "", inside: bool = False
) -> Iterator[tuple[str, TreePath, Any]]:
    """Yield (function, path in the tree, statement) for each function and each statement in one."""
    for block in BLOCKS:
        children = getattr(node, block, [])
        for i, child in enumerate(children if isinstance(children, list) else []):
            here, function = (*path, (block, i)), isinstance(child, Function)
            named = isinstance(child, Function | ast.ClassDef)
            inner = ".".join(filter(None, (name, child.name))) if named else name
            if inside or function:
                yield inner, here, child
            yield from statements(child, here, inner, inside or function)


def at(tree: ast.AST, path: TreePath) -> ast.AST:
    for block, i in path:
        tree = getattr(tree, block)[i]
    return tree


def header(statement: ast.AST) -> str:
    """Return a statement on one line, without the statements inside it."""
    bare = copy.copy(statement)
    for block in BLOCKS:
        if isinstance(getattr(bare, block, None), list):
            setattr(bare, block, [ast.Pass()] if block == "body" else [])
    lines = ast.unparse(bare).split("\n")
    return " ".join(" ".join(lines[:-1] if hasattr(bare, "body") else lines).split())


def expressions(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the expressions in a statement that may be mutated, without those in nested statements."""
    if isinstance(node, Function | ast.ClassDef | ast.ExceptHandler | ast.Raise | ast.Assert):
        return
    for field, value in ast.iter_fields(node):
        if field == "annotation":
            continue
        for child in value if isinstance(value, list) else [value]:
            hidden = isinstance(child, ast.stmt | ast.excepthandler | ast.match_case | ast.arguments | ast.JoinedStr)
            if isinstance(child, ast.AST) and not hidden and not shown(child):
                yield child
                yield from expressions(child)


def name_of(node: ast.AST) -> str:
    """Return the last name of `x`, `a.x` or a call of either; '' if there is none."""
    if isinstance(node, ast.Call):
        return name_of(node.func)
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def shown(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and name_of(node) in SHOWN
