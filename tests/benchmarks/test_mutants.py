"""Does each operator make exactly its mutants, do they all compile, and are their ids stable?"""

from __future__ import annotations

import pytest

from mutants import Mutant, mutants, signatures
from mutation_runs import surveyed
from mutations import sources

LIBRARY = """
@dataclass
class Rollout:
    ids: int
    kept: int = 0

def encode(self, texts, adapter=None): ...
"""


def mutants_of(*lines: str) -> list[Mutant]:
    """Return the mutants of a function with these lines, whose parameters have the names of policy gradients."""
    names = "a, b, mask, logprobs, ref_logprobs, new_logprobs, values, new_values, advantages, returns"
    source = "\n    ".join([f"def f({names}):", *lines]) + "\n"
    return mutants(source, "toy.py", signatures([LIBRARY]))


def after(operator: str, *lines: str) -> list[str]:
    return [mutant.after for mutant in mutants_of(*lines) if mutant.operator == operator]


@pytest.mark.parametrize(
    ("operator", "line", "expected"),
    [
        ("arithmetic", "x = a + b", ["x = a - b"]),
        ("arithmetic", "x = (a - b) * 3", ["x = (a + b) * 3", "x = (a - b) / 3"]),
        ("arithmetic", "x = a / b", ["x = a * b"]),
        ("arithmetic", "x = mask & b", ["x = mask | b"]),
        ("arithmetic", "a += b", ["a -= b"]),
        ("arithmetic", "x = {1: a} | b", []),
        ("arithmetic", "x: int | None = a", []),
        ("sign", "x = -a * b", ["x = a * b"]),
        ("sign", "x = -0.2", ["x = 0.2"]),
        ("sign", "return a - b", ["return -(a - b)"]),
        ("sign", "return a, b.sum()", ["return (a, -b.sum())"]),
        ("sign", "return a", []),
        ("comparison", "x = a < b", ["x = a <= b", "x = a >= b"]),
        ("comparison", "x = a >= b", ["x = a < b", "x = a > b"]),
        ("comparison", "x = a == b", ["x = a != b"]),
        ("comparison", "x = a is not None", ["x = a is None"]),
        ("comparison", "x = a in b", ["x = a not in b"]),
        ("condition", "if a: b()", ["if not a:"]),
        ("condition", "x = a if b and a else 0", ["x = a if not (b and a) else 0"]),
        ("condition", "x = [i for i in a if b(i)]", ["x = [i for i in a if not b(i)]"]),
        ("condition", "if a == b: a()", []),
        ("negation", "if not a: b()", ["if a:"]),
        ("negation", "x = ~a", ["x = a"]),
        ("boolean", "x = f(True)", ["x = f(False)"]),
        ("boolean", "x = a and b or a", ["x = (a and b) and a", "x = (a or b) or a"]),
        ("boolean", "x = list(zip(a, b, strict=True))", []),
        ("constant", "x = 0", ["x = 1"]),
        ("constant", "x = f(1)", ["x = f(0)", "x = f(2)"]),
        ("constant", "x = f(-1)", ["x = f(-2)", "x = f(0)"]),
        ("constant", "x = f(7, 0.5, 1.0)", ["x = f(8, 0.5, 1.0)", "x = f(7, 1.0, 1.0)", "x = f(7, 0.5, 0.0)",
                                            "x = f(7, 0.5, 2.0)"]),
        ("constant", "x = a + 1e-08", ["x = a + 1e-05"]),
        ("constant", "raise ValueError(f'at most {a + 1}', 3)", []),
        ("constant", "x = f'{a + 1}'", []),
        ("constant", "x: Literal[3] = a", []),
        ("index", "x = a[:, -1]", ["x = a[:, -2]", "x = a[:, 0]"]),
        ("index", "x = a[b : b + 2]", ["x = a[b + 1:b + 2]", "x = a[b - 1:b + 2]", "x = a[b:b + 2 + 1]",
                                       "x = a[b:b + 2 - 1]"]),
        ("index", "x = a['key'], a[b]", []),
        ("index", "for t in range(a): b[:, t]()", ["for t in range(a + 1):", "for t in range(a - 1):", "b[:, t + 1]()",
                                                   "b[:, t - 1]()"]),
        ("mask dropped", "x = torch.where(a, b + 1, 0)", ["x = b + 1"]),
        ("mask dropped", "x = a[mask].sum()", ["x = a.sum()"]),
        ("mask inverted", "x = torch.where(a, b, 0)", ["x = torch.where(~a, b, 0)"]),
        ("mask inverted", "x = f(a, mask).y(mask=a.mask)", ["x = f(a, ~mask).y(mask=a.mask)",
                                                            "x = f(a, mask).y(mask=~a.mask)"]),
        ("mask inverted", "x = a[mask] + mask.sum()", ["x = a[~mask] + mask.sum()", "x = a[mask] + (~mask).sum()"]),
        ("mask inverted", "a.mask[0] = True", []),
        ("mask of ones", "x = f(a, mask)", ["x = f(a, torch.ones_like(mask))"]),
        ("mask of ones", "x = torch.where(mask, a, b)", []),
        ("extreme", "x = torch.maximum(a, b)", ["x = a", "x = b", "x = torch.minimum(a, b)"]),
        ("extreme", "x = max(a, b)", ["x = a", "x = b", "x = min(a, b)"]),
        ("extreme", "x = a.max()", ["x = a.min()"]),
        ("clamp dropped", "x = (a + b).clamp(0, 1)", ["x = a + b"]),
        ("clamp_min dropped", "x = torch.clamp_min(a, 0)", ["x = a"]),
        ("detach dropped", "x = a.detach()", ["x = a"]),
        ("abs dropped", "x = abs(a)", ["x = a"]),
        ("twin names", "x = values", ["x = new_values"]),
        ("twin names", "x = returns", ["x = advantages"]),
        ("twin names", "x = a.logprobs - b.ref_logprobs",
         ["x = b.ref_logprobs - b.ref_logprobs", "x = new_logprobs - b.ref_logprobs",
          "x = ref_logprobs - b.ref_logprobs", "x = a.logprobs - a.logprobs", "x = a.logprobs - logprobs",
          "x = a.logprobs - new_logprobs"]),
        ("twin names", "x = a.logprobs(b)", []),
        ("arguments swapped", "x = f(a, b.c, 1)", ["x = f(b.c, a, 1)"]),
        ("arguments swapped", "x = f(a, 1), torch.where(a, b, 1), torch.maximum(a, b)", []),
        ("whitened before masking", "x = whiten(a, mask)",
         ["x = torch.where(mask, whiten(a, torch.ones_like(mask)), 0.0)"]),
        ("default", "x = a.var(0, keepdim=True)", ["x = a.var(0)"]),
        ("default", "x = Rollout(ids=a, kept=b)", ["x = Rollout(ids=a)"]),
        ("default", "x = a.encode(a, b), a.encode(a)", ["x = (a.encode(a), a.encode(a))"]),
        ("default", "x = torch.zeros(a, device=b)", []),
        ("removed", "a.backward()", ["pass"]),
        ("removed", "a, b.c = b, a", ["pass"]),
        ("removed", "a[0] += b", ["pass"]),
        ("removed", "raise", ["pass"]),
        ("removed", "x = a", []),
        ("removed", "'a docstring'", []),
        ("removed", "log.print('shown')", []),
        ("context", "with torch.no_grad(): a()", ["if True:"]),
        ("context", "with a(), b() as c: a()", ["with b() as c:"]),
    ],
)  # fmt: skip
def test_an_operator_makes_exactly_these_mutants(operator: str, line: str, expected: list[str]) -> None:
    assert sorted(after(operator, line)) == sorted(expected)


def test_break_is_replaced_and_reversed_is_removed() -> None:
    lines = ["for t in reversed(a):", "    if b:", "        break"]
    assert after("jump", *lines) == ["continue", "pass"]
    assert after("reversed dropped", *lines) == ["for t in a:"]


def test_an_assignment_is_removed_and_a_twin_read_only_where_the_name_has_a_value() -> None:
    assert after("removed", "x = a", "x = b") == ["pass"]
    assert mutants("def f(values):\n    x = values\n    new_values = x\n", "toy.py") == []


def test_only_a_no_grad_decorator_is_removed() -> None:
    source = "class A:\n    @property\n    @torch.no_grad()\n    def b(self):\n        return self.c\n"
    (mutant,) = mutants(source, "toy.py")
    assert (mutant.operator, mutant.function, mutant.line) == ("context", "A.b", 3)
    assert mutant.source == source.replace("    @torch.no_grad()\n", "")


def test_a_mutant_changes_only_its_own_bytes() -> None:
    source = 'def f(a):\n    """Say “±1”."""\n    # one more\n    return (a  + 1,   # ü\n            a)\n'
    changed = {mutant.operator: mutant.source for mutant in mutants(source, "toy.py")}
    assert changed["arithmetic"] == source.replace("a  + 1", "a  - 1")


def test_code_outside_functions_is_not_mutated() -> None:
    assert mutants("x = 1 + 1\n\nclass A:\n    y: int = 0\n    def b(self, z=1) -> None: ...\n", "toy.py") == []


def test_ids_are_unique_and_ignore_comments_and_layout() -> None:
    source = "def f(a, b):\n    if a:\n        return a + b\n    return a + b\n\n\ndef g(a, b):\n    return a + b\n"
    made_mutants = mutants(source, "toy.py")
    moved = "# A comment.\n" + source.replace("a + b", "(a\n        + b)").replace("    if", "    # Why.\n    if")
    assert [mutant.id for mutant in mutants(moved, "toy.py")] == [mutant.id for mutant in made_mutants]
    assert [m.line for m in made_mutants] == [2, 3, 3, 4, 4, 8, 8]
    assert len({m.id for m in [*made_mutants, *mutants(source, "other.py")]}) == 14


def test_a_surveyed_function_records_that_it_was_reached_and_keeps_its_docstring() -> None:
    source = "class A:\n    def b(self):\n        'Why.'\n        def c(): return 1\n        return c\n"
    reached: list[str] = []
    names = {"reached": reached.append}
    exec(surveyed(source, "toy.py"), names)
    inner = names["A"]().b()  # type: ignore[operator]
    assert reached == ["toy.py A.b"]
    assert inner() == 1
    assert reached == ["toy.py A.b", "toy.py A.b.c"]
    assert names["A"].b.__doc__ == "Why."  # type: ignore[attr-defined]
    assert {mutant.function for mutant in mutants(source, "toy.py")} == {"A.b.c"}


def test_the_mutants_of_every_sixth_module_compile_and_are_distinct() -> None:
    modules = sorted(sources().items())
    for name, source in modules[::6]:
        made_mutants = mutants(source, name)
        assert made_mutants, name
        assert (
            len({mutant.source for mutant in made_mutants} | {source})
            == len({m.id for m in made_mutants}) + 1
            == len(made_mutants) + 1
        )
        for mutant in made_mutants:
            compile(mutant.source, name, "exec")
