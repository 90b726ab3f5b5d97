"""Do the tests notice a mistake? Each mutant of the source has one; the tests run against it and ought to fail.

A mutant (benchmarks/mutants.py says which there are) is a copy of the package with one small mistake. The tests that
look at its file run against that copy until one fails. What survives is a test that is missing, or a mistake that
changes nothing: the latter stand with their reasons in benchmarks/survivors.json. Exits 1 when others survive.

python benchmarks/mutations.py --results runs/mutations.jsonl --jobs 2     all of them; started again, it goes on
python benchmarks/mutations.py --only 'rl/*' --list                       which there are, nothing is run
python benchmarks/mutations.py --sample 40                                the same forty each time
python benchmarks/mutations.py --ids 3f2a... --verbose                    what the tests say about one
python benchmarks/mutations.py --ids 3f2a... --accept 'the same to the last bit, because ...'

A mutant is shown only to those tests that execute its function (benchmarks/mutation_runs.py), which takes from tenths
of a second, where one fails at once, to a minute, where none does. With nothing mutated all tests have to pass first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mutants import Mutant, mutants, signatures
from mutation_runs import BROKEN, CAUGHT, PACKAGE, ROOT, SETTINGS, SURVIVED, TIMEOUT, Bench

ACCEPTED = ROOT / "benchmarks" / "survivors.json"
# The mathematics, what samples, scores and trains with it, and what makes a run go on exactly. How models and adapters
# are loaded is not among it.
GOING_ON = ("storage.py", "stopping.py", "checkpoint.py", "best.py", "changes.py")
FILES = ("rl/*.py", "policy/*.py", "rollout.py", "train.py", "step_metrics.py", "rewards/shaping.py", *GOING_ON)
NOT = ("*/__init__.py", "policy/adapters.py", "policy/backbone.py")
# Which tests look at a file: the first pattern that fits, the likeliest to fail first. These are the fast ones: bandit
# and command line would find more, but what survives has to run through all of them.
RUNS = ("tests/test_invariants.py", "tests/test_policy.py", "tests/test_golden.py")
TOLD = tuple(
    f"tests/test_failures.py::test_{name}"
    for name in (
        "dropout_in_the_update_shows_as_ratios_off_one",
        "too_large_a_learning_rate_shows_as_ratio_spikes_and_clipping",
    )
)
TESTS = {
    "rl/*": ("tests/test_rl.py", "tests/test_oracle.py", "tests/test_golden.py"),
    "policy/*": ("tests/test_fast.py", *RUNS, "tests/test_oracle.py"),
    "rewards/*": ("tests/test_rewards.py", "tests/test_golden.py"),
    "step_metrics.py": ("tests/test_step_metrics.py", "tests/test_golden.py"),
    "rollout.py": RUNS,
    **dict.fromkeys(GOING_ON, ("tests/test_run_folder.py", "tests/test_checkpoint.py", "tests/test_resume.py")),
    "changes.py": ("tests/test_resume.py",),
    "*": ("tests/test_train.py", *RUNS, *TOLD),
}
console = Console(highlight=False, markup=False, soft_wrap=True)


# Which mutants and which tests


def sources() -> dict[str, str]:
    """Return the sources that are mutated, by their path in the package."""
    paths = sorted({path for pattern in FILES for path in PACKAGE.glob(pattern)})
    names = {path.relative_to(PACKAGE).as_posix(): path for path in paths}
    return {name: path.read_text("utf-8") for name, path in names.items() if not any(fnmatch(name, no) for no in NOT)}


def all_mutants() -> list[Mutant]:
    known = signatures(path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py")))
    return [mutant for name, source in sources().items() for mutant in mutants(source, name, known)]


def chosen(every: list[Mutant], options: argparse.Namespace) -> list[Mutant]:
    some = [m for m in every if not options.only or any(fnmatch(m.file, pattern) for pattern in options.only)]
    some = [m for m in some if not options.ids or m.id in options.ids]
    return random.Random(0).sample(some, min(options.sample, len(some))) if options.sample else some


def tests_of(file: str) -> list[str]:
    """Return the test files, or single tests of one, that look at a source file."""
    patterns = next(tests for pattern, tests in TESTS.items() if fnmatch(file, pattern))
    found = []
    for pattern in patterns:
        path, _, test = pattern.partition("::")
        paths = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(path))
        found += [f"{path}::{test}" if test else path for path in paths] or [f"{path}, which is missing"]
    return found


def read_by(file: str) -> list[Path]:
    """Return the files that decide what the tests of a source file do."""
    named = {ROOT / test.partition("::")[0] for test in tests_of(file)}
    return sorted(path for path in named | set(ROOT.glob("tests/[!t]*.py")) | {ROOT / "tests/twin.py"} if path.exists())


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


# What is known, and what came of it


class Results:
    """Records of mutants, kept in a JSON-lines file where one is given."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        self.sources = {name: digest(source) for name, source in sources().items()}
        self.tests = {name: digest(*(path.read_text("utf-8") for path in read_by(name))) for name in self.sources}
        if path and path.exists():
            for line in path.read_text("utf-8").splitlines():
                record = json.loads(line)
                self.records[record["id"]] = record

    def knows(self, mutant: Mutant) -> bool:
        """Whether a mutant was tried: caught in the same source, or not caught by the same tests either."""
        record = self.records.get(mutant.id, {})
        same = record.get("source") == self.sources[mutant.file]
        return same and (record["outcome"] in (CAUGHT, TIMEOUT) or record["tests"] == self.tests[mutant.file])

    def add(self, mutant: Mutant, record: dict[str, Any]) -> None:
        where = {"id": mutant.id, "file": mutant.file, "line": mutant.line, "function": mutant.function,
                 "operator": mutant.operator, "before": mutant.before, "after": mutant.after}  # fmt: skip
        self.records[mutant.id] = (
            where | record | {"source": self.sources[mutant.file], "tests": self.tests[mutant.file]}
        )
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(self.records[mutant.id], ensure_ascii=False) + "\n")

    def of(self, mutant: Mutant) -> str:
        return str(self.records.get(mutant.id, {}).get("outcome", "not run"))


def accepted() -> dict[str, dict[str, str]]:
    """Return the survivors that are accepted, with their reasons, by id."""
    return {one["id"]: one for one in json.loads(ACCEPTED.read_text("utf-8"))} if ACCEPTED.exists() else {}


def accept(some: list[Mutant], reason: str) -> None:
    """Write mutants to the accepted survivors with a reason."""
    kept = accepted()
    for m in some:
        kept[m.id] = {"id": m.id, "file": m.file, "function": m.function, "operator": m.operator, "before": m.before,
                      "after": m.after, "reason": reason}  # fmt: skip
    ordered = sorted(kept.values(), key=lambda one: (one["file"], one["function"], one["before"], one["after"]))
    ACCEPTED.write_text(json.dumps(ordered, indent=2, ensure_ascii=False) + "\n", "utf-8")


def alike(one: str, other: str) -> int:
    """Return how many characters two texts begin with in common."""
    differing = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))


def told(mutant: Mutant) -> str:
    """Return what a mutant changes, with a little of what stands around it."""
    before, after = mutant.before, mutant.after
    same = alike(before, after)
    tail = alike(before[same:][::-1], after[same:][::-1])
    first = same - 40 if same > 55 else 0

    def part(text: str) -> str:
        last = len(text) - tail + 25
        return ("…" if first else "") + text[first:last] + ("…" if last < len(text) else "")

    place = f"{mutant.id}  {mutant.file}:{mutant.line}  {mutant.function}  [{mutant.operator}]"
    return f"{place}\n    {part(before)}\n    {part(after)}"


def conclude(every: list[Mutant], some: list[Mutant], results: Results) -> int:
    """Print what came of `some` and return the exit code."""
    reasons, by = accepted(), {m.id: results.of(m) for m in some}
    counts, mistakes = Counter(by.values()), 0
    survivors = [m for m in some if by[m.id] == SURVIVED]
    console.print(f"\n{len(some)} mutants: {counts[CAUGHT]} caught, {counts[TIMEOUT]} stopped at a time limit")
    agreed = [m for m in survivors if m.id in reasons]
    console.print(f"{len(agreed)} survivors accepted:" if agreed else "no survivor accepted")
    for m in agreed:
        console.print(f"{told(m)}\n    because {reasons[m.id]['reason']}")
    for name, one in reasons.items():
        if name not in {m.id for m in every}:
            console.print(f"accepted, but no mutant any more: {name}  {one['file']}  {one['function']}  {one['after']}")
        elif by.get(name) in (CAUGHT, TIMEOUT):
            console.print(f"accepted, but caught now: {name}  {one['file']}  {one['function']}  {one['after']}")
    new = [m for m in survivors if m.id not in reasons]
    odd = [m for m in some if by[m.id] not in (CAUGHT, TIMEOUT, SURVIVED)]
    for title, those in (("new survivors", new), ("not run, or pytest itself failed", odd)):
        if those:
            mistakes += len(those)
            console.print(f"{len(those)} {title}:")
        for m in those:
            console.print(told(m))
    return 1 if mistakes else 0


def run_them(some: list[Mutant], results: Results, options: argparse.Namespace) -> None:
    """Run the tests against those mutants whose outcome is not known yet."""
    left = [m for m in some if not results.knows(m)]
    console.print(f"{len(some)} mutants, {len(some) - len(left)} known already")
    if not left:
        return
    columns = [BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}")]
    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as scratch:
        bench = Bench(Path(scratch), options.jobs, options.timeout)
        if wrong := bench.survey(list(dict.fromkeys(test for m in left for test in tests_of(m.file)))):
            sys.exit(f"{wrong}; mutants would prove nothing")
        seconds = sum(bench.memory.seconds.values())
        console.print(f"nothing mutated: {len(bench.memory.seconds)} tests pass in {seconds:.0f} s")
        for one in results.records.values():
            if one["outcome"] == CAUGHT:
                bench.memory.learn(one["file"], one["function"], one["before"], one["test"])
        # A refreshing thread must not be there when a child is forked, nor may a child write through the bar.
        quiet = {"auto_refresh": False, "redirect_stdout": False, "redirect_stderr": False}
        with Progress(*columns, console=console, **quiet) as bar:
            task, survived = bar.add_task("", total=len(left), note=""), 0
            for mutant, record, output in bench.run([(m, tests_of(m.file)) for m in left]):
                results.add(mutant, record)
                survived += record["outcome"] == SURVIVED
                if record["outcome"] in (SURVIVED, BROKEN) or options.verbose:
                    console.print(f"{record['outcome']} ({record['test']}, {record['seconds']} s): {told(mutant)}")
                if record["outcome"] == BROKEN or options.verbose:
                    console.print(output)
                bar.update(task, advance=1, note=f"{survived} survived", refresh=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", metavar="GLOB", help="files of the package, such as 'rl/*' or train.py")
    add("--ids", nargs="+", metavar="ID", help="these mutants alone")
    add("--sample", type=int, metavar="N", help="N of them, drawn with a fixed seed")
    add("--list", action="store_true", help="print the mutants and how many each file has; run nothing")
    add("--accept", metavar="REASON", help="write the mutants of --ids to benchmarks/survivors.json; run nothing")
    add("--jobs", type=int, default=2, metavar="N", help="children at a time, one thread each (%(default)s)")
    limit = "limit of one mutant (ten times what its tests take usually, and 20 more; the same holds for each test)"
    add("--timeout", type=float, metavar="SECONDS", help=limit)
    skips = "append each outcome, and skip what is in it: caught in the same source, or survived the same tests there"
    add("--results", type=Path, metavar="OUT.jsonl", help=skips)
    add("--verbose", action="store_true", help="print what the tests say about each mutant")
    options = parser.parse_args()
    if options.accept and not options.ids:
        parser.error("--accept needs --ids")
    return options


def main() -> int:
    options, every = arguments(), all_mutants()
    some = chosen(every, options)
    if options.accept:
        accept(some, options.accept)
        return 0
    if options.list:
        for mutant in some:
            console.print(told(mutant))
        for file, count in Counter(mutant.file for mutant in some).items():
            console.print(f"{count:5}  {file}")
        console.print(f"{len(some):5}  in all")
        return 0
    results = Results(options.results)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the children too
    try:
        run_them(some, results, options)
    except KeyboardInterrupt:
        sys.exit(f"stopped; {options.results or 'nothing'} keeps what is known")
    return conclude(every, some, results)


if __name__ == "__main__":
    os.environ |= SETTINGS
    sys.exit(main())
