"""Which mutants does a source have? A mutant is the source with one small bug, made from its syntax tree.

Only function bodies are mutated. Not mutated are docstrings, f-strings and other strings, raised errors, console
output (`log.print`, progress bars), annotations, `strict=` of zip (a guard that never acts in correct code) and
`device=` (tests run on the CPU). benchmarks/mutation/mutant_operators.py lists the kinds of bugs. The id of a mutant
is a hash of its file, function, operator and the unparsed statement before and after, so it does not change with
formatting, comments or changes to other statements.
"""

from __future__ import annotations

import ast
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mutant_operators import OPERATORS
from mutant_syntax import (
    Code,
    Edit,
    Function,
    Signature,
    Signatures,
    TreePath,
    at,
    expressions,
    header,
    name_of,
    statements,
)


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One bug: its location, the statement before and after, and the whole source with the bug."""

    id: str
    file: str
    line: int
    function: str
    operator: str
    before: str
    after: str
    source: str


def mutants(source: str, file: str, known: Signatures | None = None) -> list[Mutant]:
    """Return the mutants of `source`; `known` says which arguments of the package's functions are optional."""
    code = Code(source, known or {})
    made: list[Mutant] = []
    seen: set[tuple[TreePath, str]] = set()
    count: Counter[tuple[str, ...]] = Counter()
    for function, path, statement in statements(code.tree):
        before = header(statement)
        for operator, start, end, text in sorted(edits(statement, code), key=lambda edit: edit[1:]):
            mutated = (code.raw[:start] + text.encode() + code.raw[end:]).decode()
            after = header(at(ast.parse(mutated), path))
            if after == before or (path, after) in seen:
                continue
            seen.add((path, after))
            key = (file, function, operator, before, after)
            name = hashlib.sha256("\0".join([*key, str(count[key])]).encode()).hexdigest()[:10]
            count[key] += 1
            line = 1 + code.raw[:start].count(b"\n")
            mutant = Mutant(
                id=name,
                file=file,
                line=line,
                function=function,
                operator=operator,
                before=before,
                after=after,
                source=mutated,
            )
            made.append(mutant)
    return made


def signatures(sources: Iterable[str]) -> Signatures:
    """Return the signatures of all functions and dataclasses by bare name; if two share one, both apply."""
    by_name: Signatures = {}
    for node in (node for source in sources for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.ClassDef):
            fields = [child for child in node.body if isinstance(child, ast.AnnAssign)]
            new = Signature(required=frozenset(str(name_of(f.target)) for f in fields if f.value is None))
        elif isinstance(node, Function):
            new = _signature(node.args)
        else:
            continue
        old = by_name.get(node.name, Signature(positional=new.positional))
        positional = new.positional if old.positional == new.positional else ()
        by_name[node.name] = Signature(positional, old.required | new.required)
    return by_name


def _signature(args: ast.arguments) -> Signature:
    names = [arg.arg for arg in (*args.posonlyargs, *args.args)]
    needed = names[: len(names) - len(args.defaults)]
    needed += [arg.arg for arg, value in zip(args.kwonlyargs, args.kw_defaults, strict=True) if value is None]
    bound = 1 if names[:1] in (["self"], ["cls"]) else 0
    return Signature(tuple(names[bound:]), frozenset(needed) - {"self", "cls"})


def edits(statement: ast.AST, code: Code) -> Iterator[Edit]:
    for node in (statement, *expressions(statement)):
        for operator in OPERATORS:
            yield from operator(node, code)
