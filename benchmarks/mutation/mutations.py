"""Do the tests catch a bug? Insert small bugs one at a time; the tests must fail on each.

A mutant is a copy of the package with one small bug (benchmarks/mutation/mutants.py lists the kinds). The tests of its
file run against that copy until one fails. A mutant survives if a test is missing, or if the bug changes no result;
the latter are listed with reasons in benchmarks/mutation/survivors.json. The exit code is 1 if any other survives.

python benchmarks/mutation/mutations.py --results runs/mutations.jsonl --jobs 2     run all; run it again to resume
python benchmarks/mutation/mutations.py --only 'rl/*' --list                       list the mutants, run nothing
python benchmarks/mutation/mutations.py --sample 40                                the same 40 each time
python benchmarks/mutation/mutations.py --ids 3f2a... --verbose                    print the output of the tests
python benchmarks/mutation/mutations.py --ids 3f2a... --accept 'bit-identical, because ...'

Only the tests that execute the mutated function run (benchmarks/mutation/mutation_runs.py). A mutant takes tenths of a
second if a test fails at once, and up to a minute if none fails. First, all tests must pass without a mutant.
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

ACCEPTED = Path(__file__).with_name("survivors.json")
# The mathematics; the code that samples, scores and trains with it; and the code that makes a resumed run exact. The
# loading of models and adapters is not mutated.
RESUMING = ("runtime/files.py", "runtime/signals.py", "runtime/checkpoint.py", "training/best.py", "commands/resume.py")
FILES = ("rl/*.py", "models/*.py", "training/*.py", "rewards/shaping.py", *RESUMING)
NOT_MUTATED = (
    "*/__init__.py", "models/lora.py", "models/loading.py", "models/types.py",
    "training/memory.py", "training/sft.py", "training/validation.py",
)  # fmt: skip
# The tests of a file: the first pattern that matches it; the tests most likely to fail come first. Only fast tests are
# listed, because a survivor runs through all of them.
LOOP_TESTS = ("tests/models/test_invariants.py", "tests/models/test_policy.py", "tests/training/test_golden.py")
FAILURE_TESTS = tuple(
    f"tests/training/test_failures.py::test_{name}"
    for name in (
        "dropout_in_the_update_shows_as_ratios_off_one",
        "too_large_a_learning_rate_shows_as_ratio_spikes_and_clipping",
    )
)
RESUME_TESTS = (
    "tests/runtime/test_run_folder.py",
    "tests/runtime/test_checkpoint.py",
    "tests/commands/test_resume.py",
)
TESTS = {
    "rl/*": (
        "tests/rl/test_rl.py",
        "tests/rl/test_algorithms.py",
        "tests/rl/test_oracle.py",
        "tests/rl/test_group_oracle.py",
        "tests/training/test_golden.py",
    ),
    "models/token_logprobs.py": ("tests/models/test_token_logprobs.py", "tests/models/test_fast.py"),
    "models/*": ("tests/models/test_fast.py", "tests/models/test_groups.py", *LOOP_TESTS, "tests/rl/test_oracle.py"),
    "rewards/*": ("tests/rewards/test_rewards.py", "tests/training/test_golden.py"),
    "training/metrics.py": ("tests/training/test_step_metrics.py", "tests/training/test_golden.py"),
    "training/rollout.py": ("tests/models/test_groups.py", *LOOP_TESTS),
    "training/prompt_choice.py": ("tests/training/test_prompt_choice.py",),
    "training/best.py": ("tests/training/test_best.py", *RESUME_TESTS),
    "training/learner.py": (
        "tests/training/test_train.py",
        "tests/training/test_algorithm_loop.py",
        "tests/training/test_memory.py",
        *LOOP_TESTS,
        *FAILURE_TESTS,
    ),
    "runtime/signals.py": ("tests/runtime/test_signals.py", *RESUME_TESTS),
    "runtime/*": RESUME_TESTS,
    "commands/resume.py": ("tests/commands/test_resume.py",),
    "*": ("tests/training/test_train.py", *LOOP_TESTS, *FAILURE_TESTS),
}
console = Console(highlight=False, markup=False, soft_wrap=True)


# Which mutants and which tests


def sources() -> dict[str, str]:
    """Return the sources that are mutated, by their path in the package."""
    paths = sorted({path for pattern in FILES for path in PACKAGE.glob(pattern)})
    names = {path.relative_to(PACKAGE).as_posix(): path for path in paths}
    for name in list(names):
        if any(fnmatch(name, pattern) for pattern in NOT_MUTATED):
            del names[name]
    return {name: path.read_text("utf-8") for name, path in names.items()}


def all_mutants() -> list[Mutant]:
    known = signatures(path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py")))
    return [mutant for name, source in sources().items() for mutant in mutants(source, name, known)]


def chosen(every: list[Mutant], options: argparse.Namespace) -> list[Mutant]:
    """Return the mutants that the options ask for."""
    selected = [m for m in every if not options.only or any(fnmatch(m.file, pattern) for pattern in options.only)]
    selected = [m for m in selected if not options.ids or m.id in options.ids]
    if options.sample:
        selected = random.Random(0).sample(selected, min(options.sample, len(selected)))
    return selected


def tests_of(file: str) -> list[str]:
    """Return the test files, or single tests of a file, that test a source file."""
    patterns = next(tests for pattern, tests in TESTS.items() if fnmatch(file, pattern))
    names = []
    for pattern in patterns:
        path, _, test = pattern.partition("::")
        paths = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(path))
        names += [f"{path}::{test}" if test else path for path in paths] or [f"{path}, which is missing"]
    return names


def read_by(file: str) -> list[Path]:
    """Return the test files and helpers that determine what the tests of a source file do."""
    named = {ROOT / test.partition("::")[0] for test in tests_of(file)}
    helpers = {ROOT / "tests/conftest.py", *ROOT.glob("tests/helpers/*.py")}
    return sorted(path for path in named | helpers if path.exists())


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


# Outcomes


class Results:
    """The outcome of each mutant, stored in a JSON-lines file if one is given."""

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
        """Return whether the outcome still holds: caught in the same source, or survived the same tests there."""
        record = self.records.get(mutant.id, {})
        same = record.get("source") == self.sources[mutant.file]
        return same and (record["outcome"] in (CAUGHT, TIMEOUT) or record["tests"] == self.tests[mutant.file])

    def add(self, mutant: Mutant, record: dict[str, Any]) -> None:
        """Store the outcome of a mutant."""
        self.records[mutant.id] = {
            "id": mutant.id,
            "file": mutant.file,
            "line": mutant.line,
            "function": mutant.function,
            "operator": mutant.operator,
            "before": mutant.before,
            "after": mutant.after,
            **record,
            "source": self.sources[mutant.file],
            "tests": self.tests[mutant.file],
        }
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(self.records[mutant.id], ensure_ascii=False) + "\n")

    def of(self, mutant: Mutant) -> str:
        """Return the outcome of a mutant."""
        return str(self.records.get(mutant.id, {}).get("outcome", "not run"))


def accepted() -> dict[str, dict[str, str]]:
    """Return the survivors that are accepted, with their reasons, by id."""
    if not ACCEPTED.exists():
        return {}
    return {survivor["id"]: survivor for survivor in json.loads(ACCEPTED.read_text("utf-8"))}


def accept(selected: list[Mutant], reason: str) -> None:
    """Add mutants to the accepted survivors, with a reason."""
    survivors = accepted()
    for m in selected:
        survivors[m.id] = {
            "id": m.id,
            "file": m.file,
            "function": m.function,
            "operator": m.operator,
            "before": m.before,
            "after": m.after,
            "reason": reason,
        }
    ordered = sorted(survivors.values(), key=lambda m: (m["file"], m["function"], m["before"], m["after"]))
    ACCEPTED.write_text(json.dumps(ordered, indent=2, ensure_ascii=False) + "\n", "utf-8")


def common_prefix(first: str, second: str) -> int:
    """Return the length of the prefix that two texts share."""
    differing = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differing, min(len(first), len(second)))


def described(mutant: Mutant) -> str:
    """Return what a mutant changes, with a few characters of context."""
    before, after = mutant.before, mutant.after
    same = common_prefix(before, after)
    tail = common_prefix(before[same:][::-1], after[same:][::-1])
    first = same - 40 if same > 55 else 0

    def part(text: str) -> str:
        last = len(text) - tail + 25
        return ("…" if first else "") + text[first:last] + ("…" if last < len(text) else "")

    location = f"{mutant.id}  {mutant.file}:{mutant.line}  {mutant.function}  [{mutant.operator}]"
    return f"{location}\n    {part(before)}\n    {part(after)}"


def conclude(every: list[Mutant], selected: list[Mutant], results: Results) -> int:
    """Print the outcomes of `selected` and return the exit code."""
    reasons = accepted()
    outcomes = {m.id: results.of(m) for m in selected}
    counts = Counter(outcomes.values())
    console.print(f"\n{len(selected)} mutants: {counts[CAUGHT]} caught, {counts[TIMEOUT]} stopped at a time limit")

    survivors = [m for m in selected if outcomes[m.id] == SURVIVED]
    known = [m for m in survivors if m.id in reasons]
    console.print(f"{len(known)} survivors accepted:" if known else "no survivor accepted")
    for m in known:
        console.print(f"{described(m)}\n    because {reasons[m.id]['reason']}")

    ids = {m.id for m in every}
    for name, survivor in reasons.items():
        label = f"{name}  {survivor['file']}  {survivor['function']}  {survivor['after']}"
        if name not in ids:
            console.print(f"accepted, but no longer a mutant: {label}")
        elif outcomes.get(name) in (CAUGHT, TIMEOUT):
            console.print(f"accepted, but caught now: {label}")

    new = [m for m in survivors if m.id not in reasons]
    failed = [m for m in selected if outcomes[m.id] not in (CAUGHT, TIMEOUT, SURVIVED)]
    for title, listed in (("new survivors", new), ("not run, or pytest itself failed", failed)):
        if listed:
            console.print(f"{len(listed)} {title}:")
        for m in listed:
            console.print(described(m))
    return 1 if new or failed else 0


def run_mutants(selected: list[Mutant], results: Results, options: argparse.Namespace) -> None:
    """Run the tests against the mutants whose outcome is not known yet."""
    remaining = [m for m in selected if not results.knows(m)]
    console.print(f"{len(selected)} mutants, {len(selected) - len(remaining)} already known")
    if not remaining:
        return

    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as scratch:
        bench = Bench(Path(scratch), options.jobs, options.timeout)
        tests = list(dict.fromkeys(test for m in remaining for test in tests_of(m.file)))
        failure = bench.survey(tests)
        if failure:
            sys.exit(f"{failure}; fix the tests first, because they would fail on every mutant")
        seconds = sum(bench.memory.seconds.values())
        console.print(f"without a mutant: {len(bench.memory.seconds)} tests pass in {seconds:.0f} s")

        for record in results.records.values():
            if record["outcome"] == CAUGHT:
                bench.memory.learn(record["file"], record["function"], record["before"], record["test"])
        _run_on(bench, remaining, results, options.verbose)


def _run_on(bench: Bench, remaining: list[Mutant], results: Results, verbose: bool) -> None:
    """Run the tests against each mutant under a progress bar, and print the survivors."""
    columns = [BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}")]
    # No refreshing thread may be running when a child is forked, and no child may write through the bar.
    quiet = {"auto_refresh": False, "redirect_stdout": False, "redirect_stderr": False}
    survived = 0
    with Progress(*columns, console=console, **quiet) as bar:
        task = bar.add_task("", total=len(remaining), note="")
        for mutant, record, output in bench.run([(m, tests_of(m.file)) for m in remaining]):
            results.add(mutant, record)
            outcome = record["outcome"]
            survived += outcome == SURVIVED
            if outcome in (SURVIVED, BROKEN) or verbose:
                console.print(f"{outcome} ({record['test']}, {record['seconds']} s): {described(mutant)}")
            if outcome == BROKEN or verbose:
                console.print(output)
            bar.update(task, advance=1, note=f"{survived} survived", refresh=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", metavar="GLOB", help="files of the package, for example 'rl/*' or training/train.py")
    add("--ids", nargs="+", metavar="ID", help="only these mutants")
    add("--sample", type=int, metavar="N", help="N mutants, drawn with a fixed seed")
    add("--list", action="store_true", help="print the mutants and their number per file; run nothing")
    add("--accept", metavar="REASON", help="add the mutants of --ids to the accepted survivors; run nothing")
    add("--jobs", type=int, default=2, metavar="N", help="child processes at a time, one thread each (%(default)s)")
    limit = "time limit per mutant (default: 10 times the usual time of its tests, plus 20 s)"
    add("--timeout", type=float, metavar="SECONDS", help=limit)
    skips = "append each outcome; skip mutants caught in the same source, or that survived the same tests there"
    add("--results", type=Path, metavar="OUT.jsonl", help=skips)
    add("--verbose", action="store_true", help="print the output of the tests for each mutant")
    options = parser.parse_args()
    if options.accept and not options.ids:
        parser.error("--accept needs --ids")
    return options


def main() -> int:
    options = arguments()
    every = all_mutants()
    selected = chosen(every, options)
    if options.accept:
        accept(selected, options.accept)
        return 0
    if options.list:
        for mutant in selected:
            console.print(described(mutant))
        for file, count in Counter(mutant.file for mutant in selected).items():
            console.print(f"{count:5}  {file}")
        console.print(f"{len(selected):5}  in all")
        return 0
    results = Results(options.results)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the children too
    try:
        run_mutants(selected, results, options)
    except KeyboardInterrupt:
        sys.exit(f"stopped; {options.results or 'no file'} has the outcomes so far")
    return conclude(every, selected, results)


if __name__ == "__main__":
    os.environ |= SETTINGS
    sys.exit(main())
