"""How do the tests run against a changed copy of the package in tenths of a second?

One process imports torch and the other libraries once, but not detoxrl, and forks a child for each mutant. The child
imports detoxrl from its own copy. Only the tests that execute the mutated function run. Tests that caught mutants of
the same statement, function or file come first, quick ones before slow ones.
"""

from __future__ import annotations

import ast
import builtins
import compileall
import gc
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import pytest

from mutant_syntax import Function, statements
from mutants import Mutant

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "detoxrl"
CAUGHT, SURVIVED, TIMEOUT, BROKEN = "caught", "survived", "timeout", "broken"
UNMUTATED = Mutant(id="unmutated", file="", line=0, function="", operator="", before="", after="", source="")
# One thread per child, no GPU, no pytest plugins. These must be set before torch is imported.
SETTINGS = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "2000", "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # fmt: skip
MEMORY = 8 * 2**30
# A test, or all tests of a mutant, may take SLOWER times its usual time plus GRACE seconds; then it counts as hanging.
SLOWER = 10
GRACE = 20


# In a child


class Order:
    """Tells pytest which tests to run in which order, stops a test that hangs, records which test failed."""

    def __init__(self, tests: list[str], usual: dict[str, float]) -> None:
        self.tests = tests
        self.usual = usual
        self.failed = ""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        import torch

        torch.set_num_threads(1)
        items = {item.nodeid: item for item in session.items}
        session.items[:] = [items[test] for test in self.tests if test in items]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        # This signal has no handler, so it ends the process wherever it is.
        signal.setitimer(signal.ITIMER_REAL, GRACE + SLOWER * self.usual[nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed = self.failed or (report.nodeid if report.failed else "")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.failed = self.failed or (f"the import of {report.nodeid}" if report.failed else "")

    def report(self) -> dict[str, Any]:
        return {"failed": self.failed}


class Survey(Order):
    """Runs all tests; records how long each takes and which functions of the package it executes."""

    def __init__(self) -> None:
        super().__init__([], {})
        self.seconds: dict[str, float] = defaultdict(float)
        self.reached: dict[str, set[str]] = {}
        self.fixtures: dict[str, set[str]] = defaultdict(set)
        self.used: dict[str, list[str]] = {}
        self.imports: set[str] = set()
        self.now = self.imports

    def note(self, function: str) -> None:
        """Record that a function was executed. `surveyed` adds this call to each function."""
        self.now.add(function)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.tests = [item.nodeid for item in session.items]
        super().pytest_collection_finish(session)
        self.used = {item.nodeid: item.fixturenames for item in session.items}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.now = self.reached.setdefault(nodeid, set())

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        """Record what a shared fixture executes: every test that uses the fixture reaches it."""
        if fixturedef.scope == "function":
            return (yield)
        before = self.now
        self.now = self.fixtures[fixturedef.argname]
        try:
            return (yield)
        finally:
            self.now = before

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        super().pytest_runtest_logreport(report)
        self.seconds[report.nodeid] += report.duration

    def report(self) -> dict[str, Any]:
        for test, names in self.used.items():
            self.reached.setdefault(test, set()).update(self.imports, *(self.fixtures[name] for name in names))
        return {"failed": self.failed, "seconds": self.seconds,
                "reached": {test: sorted(functions) for test, functions in self.reached.items()}}  # fmt: skip


def child(folder: Path, files: list[str], order: Order) -> None:
    """Run tests against the package in `folder`/src; write their output to `folder`/output."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    with (folder / "output").open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ |= {"PYTHONPATH": str(folder / "src"), "DETOXRL_CACHE": str(folder / "cache")}
    sys.path.insert(0, str(folder / "src"))
    import detoxrl

    assert Path(detoxrl.__file__).is_relative_to(folder), detoxrl.__file__
    words = ["-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "--tb=short", f"--basetemp={folder / 'tmp'}"]
    if isinstance(order, Survey):
        builtins.reached = order.note
    code = int(pytest.main([*words, *files], plugins=[order]))
    (folder / "report.json").write_text(json.dumps(order.report()))
    sys.stdout.flush()
    os._exit(code)


# In the parent


def surveyed(source: str, file: str) -> str:
    """Return the source with a call in each function that records its file and name."""
    tree = ast.parse(source)
    for name, _, node in list(statements(tree)):
        if isinstance(node, Function):
            recorder = ast.parse(f"reached({f'{file} {name}'!r})").body
            node.body[:] = (
                [*node.body[:1], *recorder, *node.body[1:]] if ast.get_docstring(node) else [*recorder, *node.body]
            )
    return ast.unparse(tree)


def imported_libraries() -> Iterator[tuple[str, list[str]]]:
    """Yield each module that a file of the package or of its tests imports at its top, with the names it takes."""
    for path in (*PACKAGE.rglob("*.py"), *ROOT.glob("tests/**/*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield alias.name, []
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module, [alias.name for alias in node.names]


def preload(scratch: Path) -> None:
    """Import the libraries of the package and its tests, but neither of the two; create no tensor before the fork."""
    import hypothesis

    own_modules = {"detoxrl"}
    own_modules.update(path.stem for path in ROOT.glob("tests/**/*.py"))
    own_modules.update(path.stem for path in ROOT.glob("benchmarks/**/*.py"))
    for name, attributes in imported_libraries():
        package = name.split(".")[0]
        if package in own_modules or find_spec(package) is None:  # Optional dependencies may be missing.
            continue
        module = import_module(name)
        for attribute in attributes:
            getattr(module, attribute, None)  # transformers imports a name on first access

    hypothesis.configuration.set_hypothesis_home_dir(scratch / "hypothesis")
    hypothesis.settings.register_profile(
        "mutants", derandomize=True, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    )  # fmt: skip
    hypothesis.settings.load_profile("mutants")
    assert not {"detoxrl", "conftest"} & set(sys.modules)
    gc.freeze()  # pytest collects garbage at its end; this excludes the objects that all children share


@dataclass
class Memory:
    """What is known about each test: its time, the functions it executes, the mutants it caught."""

    seconds: dict[str, float] = field(default_factory=dict)
    reached: dict[str, set[str]] = field(default_factory=dict)
    kills: Counter[tuple[str, str]] = field(default_factory=Counter)

    def learn(self, file: str, function: str, statement: str, test: str) -> None:
        """Remember which test caught a mutant reaching."""
        for location in ("", file, f"{file} {function}", f"{file} {statement}"):
            self.kills[location, test] += 1

    def promising(self, mutant: Mutant, files: list[str]) -> list[str]:
        """Return the tests in `files` that reach the mutated function, the most promising per second first."""

        def promise(test: str) -> float:
            tier = next(i for i, file in enumerate(files) if test.startswith(file))
            weights = {
                "": 0.3,
                mutant.file: 1,
                f"{mutant.file} {mutant.function}": 5,
                f"{mutant.file} {mutant.before}": 50,
            }
            kills = sum(weight * self.kills[location, test] for location, weight in weights.items())
            return (0.5 ** (tier + 1) + kills) / (0.1 + self.seconds[test])

        reaching = [test for test, names in self.reached.items() if f"{mutant.file} {mutant.function}" in names]
        return sorted((test for test in reaching if test.startswith(tuple(files))), key=promise, reverse=True)


@dataclass
class Run:
    """A child process that tests a mutant."""

    mutant: Mutant
    folder: Path
    process: Any
    limit: float
    started: float = field(default_factory=time.perf_counter)

    def left(self) -> float:
        """Return the seconds until its time limit."""
        return self.started + self.limit - time.perf_counter()

    def stop(self, number: int) -> None:
        """Send a signal to the child and to every process that its tests started."""
        try:
            os.killpg(self.process.pid, number)
        except (ProcessLookupError, PermissionError):
            self.process.kill()


class Bench:
    """Starts children on copies of the package and returns their outcomes."""

    def __init__(self, scratch: Path, jobs: int, timeout: float | None) -> None:
        self.scratch = scratch
        self.jobs = jobs
        self.timeout = timeout
        self.memory = Memory()
        self.running: list[Run] = []
        preload(scratch)
        shutil.copytree(ROOT / "src", scratch / "src", ignore=shutil.ignore_patterns("__pycache__"))
        compileall.compile_dir(scratch / "src", quiet=1)

    def start(self, mutant: Mutant, files: list[str], order: Order | None = None) -> None:
        """Copy the package, put the mutant into the copy, and fork a child that runs tests against it."""
        folder = self.scratch / mutant.id
        shutil.copytree(self.scratch / "src", folder / "src")
        package = folder / "src" / "detoxrl"
        for path in (package / mutant.file,) if mutant.file else package.rglob("*.py"):
            name = path.relative_to(package).as_posix()
            path.write_text(mutant.source or surveyed(path.read_text("utf-8"), name), "utf-8")
            for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
                compiled.unlink()
        if order is None:
            order = Order(self.memory.promising(mutant, files), self.memory.seconds)
            files = [file for file in files if any(test.startswith(file) for test in order.tests)]
        process = get_context("fork").Process(target=child, args=(folder, files, order))
        process.start()
        usual = sum(self.memory.seconds.get(test, 0.0) for test in order.tests)
        self.running.append(Run(mutant, folder, process, self.timeout or GRACE + SLOWER * usual))

    def ended(self) -> list[Run]:
        """Wait until a child ends by itself or reaches its time limit."""
        patience = min(run.left() for run in self.running)
        connection.wait([run.process.sentinel for run in self.running], max(patience, 0))
        late = [run for run in self.running if run.left() < 0 and run.process.is_alive()]
        for run in late:
            run.stop(signal.SIGALRM)
        ended = [run for run in self.running if run in late or not run.process.is_alive()]
        for run in ended:
            run.process.join()
            run.stop(signal.SIGKILL)  # processes that its tests started
            self.running.remove(run)
        return ended

    def survey(self, files: list[str]) -> str:
        """Run all tests without a mutant and record what they execute; return their output if one fails."""
        folder = self.scratch / UNMUTATED.id
        self.start(UNMUTATED, files, Survey())
        try:
            self.running[0].process.join()
        finally:
            self.running[0].stop(signal.SIGKILL)
        if self.running[0].process.exitcode == 0:
            report = json.loads((folder / "report.json").read_text())
            self.memory.seconds = report["seconds"]
            self.memory.reached = {test: set(names) for test, names in report["reached"].items()}
        record, output = self.outcome(self.running.pop())
        return "" if record["outcome"] == SURVIVED else f"{output}\n{record['test']} fails without a mutant"

    def run(self, mutants: list[tuple[Mutant, list[str]]]) -> Iterator[tuple[Mutant, dict[str, Any], str]]:
        """Yield each mutant, its record and the output of its tests, in the order in which they end."""
        waiting = mutants[::-1]
        try:
            while waiting or self.running:
                while waiting and len(self.running) < self.jobs:
                    mutant, files = waiting.pop()
                    if self.memory.promising(mutant, files):
                        self.start(mutant, files)
                    else:
                        yield mutant, {"outcome": SURVIVED, "test": "no test reaches it", "seconds": 0.0}, ""
                for run in self.ended() if self.running else []:
                    yield run.mutant, *self.outcome(run)
        finally:
            for run in self.running:
                run.stop(signal.SIGKILL)

    def outcome(self, run: Run) -> tuple[dict[str, Any], str]:
        """Return a run's record and its output, and remove its folder."""
        code = run.process.exitcode
        report = run.folder / "report.json"
        output = run.folder / "output"
        text = output.read_text("utf-8", "replace") if output.exists() else ""
        if report.exists():  # 4: not even conftest could be imported
            failed = json.loads(report.read_text())["failed"]
            outcome = {0: SURVIVED, 1: CAUGHT, 2: CAUGHT, 4: CAUGHT}.get(code, BROKEN)
        else:  # a time limit or the mutant itself ended the process
            failed = f"exit code {code}"
            outcome = BROKEN
            if code == -signal.SIGALRM:
                outcome = TIMEOUT
            elif code < 0:
                outcome = CAUGHT
        shutil.rmtree(run.folder, ignore_errors=True)
        if outcome == CAUGHT:
            self.memory.learn(run.mutant.file, run.mutant.function, run.mutant.before, failed)
        return {"outcome": outcome, "test": failed, "seconds": round(time.perf_counter() - run.started, 2)}, text
