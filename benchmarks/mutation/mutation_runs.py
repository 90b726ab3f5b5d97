"""How are the tests run against a changed copy of the package, in tenths of a second?

One process imports torch and the other libraries once, but nothing of ours, and forks a child for each mutant: the
child imports the package from its own copy. A mutant is shown only to the tests that execute its function when nothing
is mutated; those that caught mutants of the same statement, function or file begin, quick ones before slow ones.
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
# One thread a child, no GPU, no plugin that was not asked for. Each has to be said before torch is imported.
SETTINGS = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "2000", "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # fmt: skip
MEMORY = 8 * 2**30
# So much longer than with nothing mutated may a test take, or all of them; what takes longer is taken for a hang.
SLOWER, GRACE = 10, 20


# In a child


class Order:
    """Tells pytest which tests to run in which order, stops one that hangs, notes which failed."""

    def __init__(self, tests: list[str], usual: dict[str, float]) -> None:
        self.tests, self.usual, self.failed = tests, usual, ""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        import torch

        torch.set_num_threads(1)
        items = {item.nodeid: item for item in session.items}
        session.items[:] = [items[test] for test in self.tests if test in items]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        # Without a handler this signal ends the process, wherever it is.
        signal.setitimer(signal.ITIMER_REAL, GRACE + SLOWER * self.usual[nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed = self.failed or (report.nodeid if report.failed else "")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.failed = self.failed or (f"the import of {report.nodeid}" if report.failed else "")

    def report(self) -> dict[str, Any]:
        return {"failed": self.failed}


class Survey(Order):
    """Notes how long each test takes, and which functions of the package it executes; all tests run."""

    def __init__(self) -> None:
        super().__init__([], {})
        self.seconds: dict[str, float] = defaultdict(float)
        self.reached: dict[str, set[str]] = {}
        self.fixtures: dict[str, set[str]] = defaultdict(set)
        self.used: dict[str, list[str]] = {}
        self.imports: set[str] = set()
        self.now = self.imports

    def note(self, function: str) -> None:
        """Add a function to what is executed now; each function calls this, `surveyed` sees to it."""
        self.now.add(function)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.tests = [item.nodeid for item in session.items]
        super().pytest_collection_finish(session)
        self.used = {item.nodeid: item.fixturenames for item in session.items}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.now = self.reached.setdefault(nodeid, set())

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        """What is made once serves other tests too, which therefore reach what made it."""
        if fixturedef.scope == "function":
            return (yield)
        before, self.now = self.now, self.fixtures[fixturedef.argname]
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
    """Run tests against the package in `folder`/src; what they say goes to `folder`/output."""
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
    """Return a source in which each function says that it was reached, under its file and name."""
    tree = ast.parse(source)
    for name, _, node in list(statements(tree)):
        if isinstance(node, Function):
            told = ast.parse(f"reached({f'{file} {name}'!r})").body
            node.body[:] = [*node.body[:1], *told, *node.body[1:]] if ast.get_docstring(node) else [*told, *node.body]
    return ast.unparse(tree)


def preload(scratch: Path) -> None:
    """Import what the package and its tests import, but neither of the two; no tensor is touched before the fork."""
    import hypothesis

    ours = {
        "detoxrl",
        *(path.stem for path in ROOT.glob("tests/*.py")),
        *(p.stem for p in ROOT.glob("benchmarks/*.py")),
    }
    trees = [ast.parse(path.read_text("utf-8")) for path in (*PACKAGE.rglob("*.py"), *ROOT.glob("tests/*.py"))]
    for node in (node for tree in trees for node in tree.body):
        for name in [alias.name for alias in node.names] if isinstance(node, ast.Import) else []:
            if name.split(".")[0] not in ours:
                import_module(name)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] not in ours:
            module = import_module(node.module)
            for alias in node.names:
                getattr(module, alias.name, None)  # transformers imports a name when it is asked for
    hypothesis.configuration.set_hypothesis_home_dir(scratch / "hypothesis")
    hypothesis.settings.register_profile(
        "mutants", derandomize=True, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    )  # fmt: skip
    hypothesis.settings.load_profile("mutants")
    assert not {"detoxrl", "conftest"} & set(sys.modules)
    gc.freeze()  # pytest collects garbage as it ends; what all children share need not be looked through each time


@dataclass
class Memory:
    """What is known of the tests: how long each takes, what it executes, what it caught."""

    seconds: dict[str, float] = field(default_factory=dict)
    reached: dict[str, set[str]] = field(default_factory=dict)
    kills: Counter[tuple[str, str]] = field(default_factory=Counter)

    def learn(self, file: str, function: str, statement: str, test: str) -> None:
        """Remember which test caught a mutant there."""
        for place in ("", file, f"{file} {function}", f"{file} {statement}"):
            self.kills[place, test] += 1

    def promising(self, mutant: Mutant, files: list[str]) -> list[str]:
        """Return the tests in `files` that reach the mutated function, those first that promise most per second."""

        def promise(test: str) -> float:
            tier = next(i for i, file in enumerate(files) if test.startswith(file))
            places = {
                "": 0.3,
                mutant.file: 1,
                f"{mutant.file} {mutant.function}": 5,
                f"{mutant.file} {mutant.before}": 50,
            }
            hope = 0.5 ** (tier + 1) + sum(weight * self.kills[place, test] for place, weight in places.items())
            return hope / (0.1 + self.seconds[test])

        there = [test for test, names in self.reached.items() if f"{mutant.file} {mutant.function}" in names]
        return sorted((test for test in there if test.startswith(tuple(files))), key=promise, reverse=True)


@dataclass
class Run:
    """A child at work on a mutant."""

    mutant: Mutant
    folder: Path
    process: Any
    limit: float
    started: float = field(default_factory=time.perf_counter)

    def left(self) -> float:
        """Return the seconds until its time limit."""
        return self.started + self.limit - time.perf_counter()

    def stop(self, number: int) -> None:
        """Send a signal to the child and to all that its tests started."""
        try:
            os.killpg(self.process.pid, number)
        except (ProcessLookupError, PermissionError):
            self.process.kill()


class Bench:
    """Starts children on copies of the package and says what came of them."""

    def __init__(self, scratch: Path, jobs: int, timeout: float | None) -> None:
        self.scratch, self.jobs, self.timeout, self.memory = scratch, jobs, timeout, Memory()
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
        """Wait until a child has ended, by itself or at its time limit."""
        patience = min(run.left() for run in self.running)
        connection.wait([run.process.sentinel for run in self.running], max(patience, 0))
        late = [run for run in self.running if run.left() < 0 and run.process.is_alive()]
        for run in late:
            run.stop(signal.SIGALRM)
        ended = [run for run in self.running if run in late or not run.process.is_alive()]
        for run in ended:
            run.process.join()
            run.stop(signal.SIGKILL)  # what its tests had started
            self.running.remove(run)
        return ended

    def survey(self, files: list[str]) -> str:
        """Run all tests with nothing mutated and remember what they do; return what they say where they fail."""
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
        return "" if record["outcome"] == SURVIVED else f"{output}\n{record['test']} fails with nothing mutated"

    def run(self, some: list[tuple[Mutant, list[str]]]) -> Iterator[tuple[Mutant, dict[str, Any], str]]:
        """Yield each mutant, its record, and what the tests said, as they end."""
        waiting = some[::-1]
        try:
            while waiting or self.running:
                while waiting and len(self.running) < self.jobs:
                    mutant, files = waiting.pop()
                    if self.memory.promising(mutant, files):
                        self.start(mutant, files)
                    else:
                        yield mutant, {"outcome": SURVIVED, "test": "no test comes here", "seconds": 0.0}, ""
                for run in self.ended() if self.running else []:
                    yield run.mutant, *self.outcome(run)
        finally:
            for run in self.running:
                run.stop(signal.SIGKILL)

    def outcome(self, run: Run) -> tuple[dict[str, Any], str]:
        """Return a run's record and its output, and remove its folder."""
        code, report, output = run.process.exitcode, run.folder / "report.json", run.folder / "output"
        said = output.read_text("utf-8", "replace") if output.exists() else ""
        if report.exists():  # 4: not even conftest could be imported
            failed = json.loads(report.read_text())["failed"]
            outcome = {0: SURVIVED, 1: CAUGHT, 2: CAUGHT, 4: CAUGHT}.get(code, BROKEN)
        else:  # the process was ended, by our time limits or by what the mutant did
            failed, outcome = (
                f"exit code {code}",
                TIMEOUT if code == -signal.SIGALRM else CAUGHT if code < 0 else BROKEN,
            )
        shutil.rmtree(run.folder, ignore_errors=True)
        if outcome == CAUGHT:
            self.memory.learn(run.mutant.file, run.mutant.function, run.mutant.before, failed)
        return {"outcome": outcome, "test": failed, "seconds": round(time.perf_counter() - run.started, 2)}, said
