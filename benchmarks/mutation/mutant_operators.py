"""Which small bugs can be inserted at a node? Each operator yields its edits of a node."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

from mutant_syntax import Code, Edit, Function, Signature, name_of, shown

FLIPS = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"),
    ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"),
}  # fmt: skip
COMPARISONS = {
    ast.Lt: ("<", ["<=", ">="]), ast.LtE: ("<=", ["<", ">"]), ast.Gt: (">", [">=", "<="]), ast.GtE: (">=", [">", "<"]),
    ast.Eq: ("==", ["!="]), ast.NotEq: ("!=", ["=="]), ast.Is: ("is", ["is not"]), ast.IsNot: ("is not", ["is"]),
    ast.In: ("in", ["not in"]), ast.NotIn: ("not in", ["in"]),
}  # fmt: skip
EXTREMES = {"max": "min", "min": "max", "maximum": "minimum", "minimum": "maximum", "argmax": "argmin"}
DROPPED = {"clamp", "clamp_min", "clamp_max", "clip", "detach", "abs", "reversed"}
NO_GRAD = {"no_grad", "inference_mode"}
# Calls whose first two arguments can be swapped without effect, or cannot be swapped at all.
ORDERLESS = {"where", *EXTREMES}
UNSEEN = {"strict", "device"}
# Tensors of the same shape that are easily confused.
TWINS = [{"logprobs", "new_logprobs", "ref_logprobs"}, {"values", "new_values"}, {"advantages", "returns"}]


# Operators on expressions


def arithmetic(node: ast.AST, code: Code) -> Iterator[Edit]:
    """Swap + and -, * and /, & and |."""
    if isinstance(node, ast.BinOp) and type(node.op) in FLIPS:
        if not any(isinstance(part, ast.Dict | ast.JoinedStr | ast.List) for part in ast.walk(node)):
            yield code.between("arithmetic", node.left, node.right, *FLIPS[type(node.op)])
    elif isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.Div):
        yield code.between("arithmetic", node.target, node.value, *FLIPS[type(node.op)])


def sign(node: ast.AST, code: Code) -> Iterator[Edit]:
    """-x -> x; change the sign of a computed value that is returned."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and number(node) is None:
        yield code.instead("sign", node, code.atom(node.operand))
    if isinstance(node, ast.Return) and node.value:
        for value in node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]:
            if (isinstance(value, ast.BinOp) and type(value.op) in (ast.Add, ast.Sub, ast.Mult, ast.Div)) or (
                name_of(value) in ("where", "sum", "mean") and isinstance(value, ast.Call)
            ):
                yield code.instead("sign", value, f"-({code.text(value)})")


def comparison(node: ast.AST, code: Code) -> Iterator[Edit]:
    """Shift the bound of a comparison, and reverse it."""
    if isinstance(node, ast.Compare):
        for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
            old, others = COMPARISONS[type(op)]
            for new in others:
                yield code.between("comparison", left, right, old, new)


def condition(node: ast.AST, code: Code) -> Iterator[Edit]:
    """Negate a condition. A single comparison or `not` is left to the operators `comparison` and `negation`."""
    parent = code.parents.get(node)
    asked = isinstance(parent, ast.If | ast.While | ast.IfExp) and parent.test is node
    asked = asked or (isinstance(parent, ast.comprehension) and node in parent.ifs)
    turned = isinstance(node, ast.UnaryOp) or (isinstance(node, ast.Compare) and len(node.ops) == 1)
    if asked and not turned:
        yield code.instead("condition", node, f"not {code.atom(node)}")


def negation(node: ast.AST, code: Code) -> Iterator[Edit]:
    """not x -> x, ~x -> x."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert):
        yield code.instead("negation", node, code.atom(node.operand))


def boolean(node: ast.AST, code: Code) -> Iterator[Edit]:
    """Swap True and False, `and` and `or`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, bool) and not guards(code.parents[node]):
        yield code.instead("boolean", node, str(not node.value))
    if isinstance(node, ast.BoolOp):
        word = " or " if isinstance(node.op, ast.And) else " and "
        yield code.instead("boolean", node, f"({word.join(map(code.atom, node.values))})")


def number(node: ast.AST) -> float | None:
    """Return the value of a literal number or negative integer; None for any other node."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = number(node.operand)
        return -value if isinstance(value, int) else None
    fits = isinstance(node, ast.Constant) and type(node.value) in (int, float)
    return node.value if fits else None


def constant(node: ast.AST, code: Code) -> Iterator[Edit]:
    """0 -> 1, 1 -> 0 and 2, n -> n + 1, -n -> -n + 1 and -n - 1, x -> 2x, a small epsilon -> 1000 epsilon."""
    value, parent = number(node), code.parents.get(node)
    if value is None or indexes(node, code) or (isinstance(value, int) and number(parent) is not None):
        return
    for new in others(value):
        yield code.instead("constant", node, repr(new))


def others(value: float) -> list[float]:
    if value in (0, 1):
        return [type(value)(new) for new in ((1,) if value == 0 else (0, 2))]
    if isinstance(value, int):
        return [value + 1] if value > 0 else [value + 1, value - 1]
    return [float(f"{value * 1000:.12g}")] if abs(value) <= 1e-4 else [2 * value]


def indexes(node: ast.AST, code: Code) -> bool:
    """Return whether a node is an index, or a bound of a slice or of `range`."""
    parent = code.parents.get(node)
    if isinstance(parent, ast.Call):
        return isinstance(parent.func, ast.Name) and parent.func.id == "range" and node in parent.args
    if isinstance(parent, ast.Tuple | ast.Slice):
        return indexes(parent, code)
    return isinstance(parent, ast.Subscript) and parent.slice is node


def index(node: ast.AST, code: Code) -> Iterator[Edit]:
    """Shift constant indices, counters used as indices, and bounds of slices and of `range` by one, both ways."""
    if not isinstance(node, ast.expr) or isinstance(node, ast.Slice | ast.Tuple) or not indexes(node, code):
        return
    value = number(node)
    if value is not None:
        for shift in (1, -1):
            yield code.instead("index", node, str(value + shift))
    elif isinstance(code.parents[node], ast.Slice | ast.Call) or (isinstance(node, ast.Name) and counts(node, code)):
        for shift in ("+ 1", "- 1"):
            yield code.instead("index", node, f"{code.atom(node)} {shift}")


def counts(node: ast.Name, code: Code) -> bool:
    loops = [other for other in ast.walk(code.above(node, Function)) if isinstance(other, ast.For)]
    return any(name_of(loop.target) == node.id and "range(" in code.text(loop.iter) for loop in loops)


def mask(node: ast.AST, code: Code) -> Iterator[Edit]:
    """torch.where(m, a, b) -> a, x[mask] -> x; invert each mask that is read, and replace it by ones."""
    if isinstance(node, ast.Call) and name_of(node) == "where" and len(node.args) == 3:
        yield code.instead("mask dropped", node, code.atom(node.args[1]))
        yield code.instead("mask inverted", node.args[0], f"~{code.atom(node.args[0])}")
    if isinstance(node, ast.Subscript) and name_of(node.slice).endswith("mask") and code.reads(node.slice):
        yield code.instead("mask dropped", node, code.text(node.value))
    if not (code.reads(node) and name_of(node).endswith("mask")):
        return
    parent, text = code.parents[node], code.text(node)
    if not isinstance(parent, ast.UnaryOp):
        received = isinstance(parent, ast.Attribute) or (isinstance(parent, ast.Subscript) and parent.value is node)
        yield code.instead("mask inverted", node, f"(~{text})" if received else f"~{text}")
    if not (name_of(parent) == "where" or (isinstance(parent, ast.Subscript) and parent.slice is node)):
        yield code.instead("mask of ones", node, f"torch.ones_like({text})")


def extreme(node: ast.AST, code: Code) -> Iterator[Edit]:
    """Swap maximum and minimum; max(a, b) -> a and b."""
    if isinstance(node, ast.Call) and name_of(node) in EXTREMES:
        end, name = code.span(node.func)[1], name_of(node)
        yield "extreme", end - len(name), end, EXTREMES[name]
        if len(node.args) > 1 and (isinstance(node.func, ast.Name) or name_of(node.func.value) == "torch"):
            for argument in node.args:
                yield code.instead("extreme", node, code.atom(argument))


def dropped(node: ast.AST, code: Code) -> Iterator[Edit]:
    """x.clamp(...) -> x, x.detach() -> x, abs(x) -> x, reversed(x) -> x."""
    if isinstance(node, ast.Call) and name_of(node) in DROPPED:
        method = isinstance(node.func, ast.Attribute) and name_of(node.func.value) != "torch"
        kept = node.func.value if method else node.args[0]
        yield code.instead(f"{name_of(node)} dropped", node, code.atom(kept))


def twin_names(node: ast.AST, code: Code) -> Iterator[Edit]:
    """Read another of the old, new and reference log-probs, values, advantages and returns."""
    family = next((family for family in TWINS if name_of(node) in family), set())
    if not family or not code.reads(node):
        return
    function = code.above(node, Function)
    texts = {code.text(other) for other in ast.walk(function) if name_of(other) in family and code.reads(other)}
    texts |= {name for name in family if code.bound_before(name, node)}
    for text in sorted(texts):
        if text.split(".")[-1] != name_of(node) and code.bound_before(text.split(".")[0], node):
            yield code.instead("twin names", node, text)


def arguments(node: ast.AST, code: Code) -> Iterator[Edit]:
    """f(a, b) -> f(b, a) if both are plain names; whiten before masking instead of after."""
    if not isinstance(node, ast.Call) or len(node.args) < 2:
        return
    first, second = node.args[:2]
    if name_of(node) not in ORDERLESS and all(
        isinstance(argument, ast.Name | ast.Attribute) for argument in (first, second)
    ):
        (start, middle), (right, end) = code.span(first), code.span(second)
        between = code.raw[middle:right].decode()
        yield "arguments swapped", start, end, code.text(second) + between + code.text(first)
    if name_of(node) == "whiten":
        kept = code.text(second)
        text = f"torch.where({kept}, {code.text(node.func)}({code.text(first)}, torch.ones_like({kept})), 0.0)"
        yield code.instead("whitened before masking", node, text)


def default(node: ast.AST, code: Code) -> Iterator[Edit]:
    """Leave out arguments that have defaults: keywords, and the last positional one of the package's functions."""
    if not isinstance(node, ast.Call):
        return
    known = code.known.get(name_of(node), Signature())
    for keyword in node.keywords:
        if keyword.arg and keyword.arg not in known.required and not guards(keyword):
            kept = [*node.args, *(other for other in node.keywords if other is not keyword)]
            yield code.instead("default", node, code.call(node, kept))
    last = len(node.args) - 1
    if 0 <= last < len(known.positional) and known.positional[last] not in known.required:
        yield code.instead("default", node, code.call(node, [*node.args[:-1], *node.keywords]))


def guards(node: ast.AST) -> bool:
    return isinstance(node, ast.keyword) and node.arg in UNSEEN


# Operators on statements


def removed(node: ast.AST, code: Code) -> Iterator[Edit]:
    """Remove a call, a raise, an augmented assignment, or an assignment to a name that already has a value."""
    call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call | ast.Await) and not shown(node.value)
    again = isinstance(node, ast.Assign) and all(has_value(target, code) for target in node.targets)
    if call or again or isinstance(node, ast.AugAssign | ast.Raise):
        yield code.instead("removed", node, "pass")


def has_value(target: ast.AST, code: Code) -> bool:
    if isinstance(target, ast.Tuple):
        return all(has_value(part, code) for part in target.elts)
    if isinstance(target, ast.Name):
        return code.bound_before(target.id, target)
    starts = code.above(target, Function).name == "__init__"
    return isinstance(target, ast.Subscript) or (isinstance(target, ast.Attribute) and not starts)


def jump(node: ast.AST, code: Code) -> Iterator[Edit]:
    """break -> continue and pass, continue -> break and pass."""
    if isinstance(node, ast.Break | ast.Continue):
        for word in ("continue" if isinstance(node, ast.Break) else "break", "pass"):
            yield code.instead("jump", node, word)


def context(node: ast.AST, code: Code) -> Iterator[Edit]:
    """Remove a context without `as` and keep its body; remove @torch.no_grad()."""
    if isinstance(node, ast.With):
        last = node.items[-1].optional_vars or node.items[-1].context_expr
        start, end = code.span(node)[0], code.raw.index(b":", code.span(last)[1]) + 1
        for item in node.items:
            if item.optional_vars is None:
                kept = ", ".join(ast.unparse(other) for other in node.items if other is not item)
                yield "context", start, end, f"with {kept}:" if kept else "if True:"
    for decorator in node.decorator_list if isinstance(node, Function) else []:
        if name_of(decorator) in NO_GRAD:
            start, end = code.span(decorator)
            after = code.raw[end:]
            yield "context", code.raw.rindex(b"@", 0, start), end + len(after) - len(after.lstrip()), ""


OPERATORS: list[Callable[[ast.AST, Code], Iterator[Edit]]] = [
    arithmetic, sign, comparison, condition, negation, boolean, constant, index, mask, extreme, dropped, twin_names,
    arguments, default, removed, jump, context,
]  # fmt: skip
