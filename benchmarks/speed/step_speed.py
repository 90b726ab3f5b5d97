"""How long does a step of PPO take, compared with trl's PPOTrainer, with the machine's limit, and for each size?

    python benchmarks/speed/step_speed.py compare --trl-python trl-env/bin/python     about 25 minutes on 2 idle cores
    python benchmarks/speed/step_speed.py cost                                        about 20 minutes
    python benchmarks/speed/step_speed.py table                                       print the results as Markdown
    python benchmarks/speed/step_speed.py plot                                        draw docs/performance-*.svg

benchmarks/oracle/trl-requirements.txt says how to create the environment of trl. No network is needed: the models have
random weights and the exact shapes of FLAN-T5 (base), with a LoRA of rank 32 on q and v, and of a RoBERTa-base reward.
A step has 16 prompts of 256 tokens and responses of exactly 64, in minibatches of 4, for one epoch.

`compare`: each contestant is a process that keeps its models in memory and makes a step on request. They run in turn,
one at a time, so that other load on the machine affects all of them. If processor time is far below threads times
seconds, another program was running and the times are not reliable. The floor (step_floor.py) takes its turn too.
`cost`: detoxrl's step, with one size changed at a time; every other round goes through the sizes in reverse.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

from step_case import TINY, Step, Task
from step_results import check_lines, compare_table, cost_table, draw_compare, draw_cost, read_rows, summary

HERE = Path(__file__).parent
SIZES = ("tiny", "small", "base", "large")
GRID: dict[str, tuple[Any, ...]] = {
    "batch": (4, 8, 16, 32), "prompt": (64, 128, 256, 512), "response": (16, 32, 64, 128), "size": ("small", "base"),
    "epochs": (1, 2, 3), "prompts": (1024, 16_384, 131_072),
}  # fmt: skip
TINY_GRID: dict[str, tuple[Any, ...]] = {
    "batch": (2, 4, 8), "prompt": (8, 16), "response": (4, 8), "size": ("tiny",), "epochs": (1, 2), "prompts": (64, 256)
}  # fmt: skip


class Worker:
    """A process that makes one step on request."""

    def __init__(self, script: str, task: Task, python: Path, log: Path) -> None:
        environment = dict(os.environ)
        if python != Path(sys.executable):
            environment.pop("PYTHONPATH", None)
        environment.update(
            OMP_NUM_THREADS=str(task.threads),
            MKL_NUM_THREADS=str(task.threads),
            GOMP_SPINCOUNT="2000",  # A waiting thread that spins takes the processor from a working one.
            HF_HUB_OFFLINE="1",
            TOKENIZERS_PARALLELISM="false",
            CUDA_VISIBLE_DEVICES="",
        )
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [python, HERE / script, *task.arguments()],
                env=environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        self.warm_up = self._answer()

    def step(self, **changes: Any) -> dict[str, Any]:
        """Make a step with some sizes changed and return its row."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(changes) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.communicate()
            tail = "\n".join(self._log.read_text().splitlines()[-15:])
            raise SystemExit(f"{self._log.stem} ended with {self._process.returncode}:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def models(out: Path, size: str) -> str:
    """Return the folder with the models of a size; create it if it is missing."""
    folder = out / "models" / size
    if not (folder / "reward" / "tokenizer.json").is_file():  # written last
        subprocess.run([sys.executable, HERE / "step_worker.py", "--make", folder, size], check=True)
    return str(folder)


def machine(threads: int) -> dict[str, Any]:
    """Describe the machine and the date of the measurement."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "date": time.strftime("%Y-%m-%d"),
    }


def show(row: dict[str, Any]) -> None:
    """Print a row to stderr."""
    stages = "  ".join(f"{name} {seconds:.2f}" for name, seconds in row["stages"].items())
    subject = row.get("contestant") or {"size": row["size"], **row["step"]}
    seconds = f"{row['seconds']:.2f} s, {row['processor_seconds']:.2f} s of processor time"
    print(f"{subject} {row['dtype']}: {seconds} ({stages})", file=sys.stderr, flush=True)


def write_rows(rows: Iterable[dict[str, Any]], file: Path) -> None:
    """Write each row as soon as it is measured."""
    with file.open("w") as lines:
        for row in rows:
            print(json.dumps(row), file=lines, flush=True)
            show(row)


def usual_step(size: str) -> Step:
    """Return the step that nothing is changed of."""
    return TINY if size == "tiny" else Step()


def measure_contestants(options: argparse.Namespace, about: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a row for every step of every contestant; add their library versions to `about`."""
    folder = models(options.out, options.size)
    for dtype in options.dtypes.split(","):
        task = Task(models=folder, dtype=dtype, step=usual_step(options.size), threads=options.threads)
        contestants = {"detoxrl": ("step_worker.py", task, Path(sys.executable))}
        if options.trl_python:
            for method in options.trl.split(","):
                contestants[f"trl {method}"] = ("trl_worker.py", replace(task, generate=method), options.trl_python)
        contestants["floor"] = ("step_floor.py", task, Path(sys.executable))

        with ExitStack() as stack:
            workers = {}
            for name, (script, contestant_task, python) in contestants.items():
                log = options.out / f"{name.replace(' ', '-')}-{dtype}.log"
                workers[name] = stack.enter_context(Worker(script, contestant_task, python, log))
                about["versions"][name.split()[0]] = workers[name].warm_up["versions"]
            for turn in range(options.rounds):
                for name, worker in workers.items():
                    yield {"contestant": name, "dtype": dtype, "round": turn} | worker.step()


def points(over: Iterable[str], size: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the model size and the changed sizes of each point; the default step comes first."""
    grid = TINY_GRID if size == "tiny" else GRID
    changed: list[tuple[str, dict[str, Any]]] = [(size, {})]
    for axis in over:
        usual = size if axis == "size" else getattr(usual_step(size), axis)
        for value in grid[axis]:
            if value == usual:
                continue
            changed.append((value, {}) if axis == "size" else (size, {axis: value}))
    return changed


def measure_sizes(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for every step of every point."""
    chosen = points(options.over.split(","), options.size)
    if options.large:
        chosen.append(("large", {}))
    with ExitStack() as stack:
        workers = {}
        for size in dict.fromkeys(size for size, _ in chosen):
            task = Task(
                models=models(options.out, size),
                dtype=options.dtype,
                step=usual_step(options.size),
                threads=options.threads,
            )
            worker = Worker("step_worker.py", task, Path(sys.executable), options.out / f"cost-{size}.log")
            workers[size] = stack.enter_context(worker)
        for turn in range(options.rounds):
            for size, changes in chosen if turn % 2 == 0 else reversed(chosen):
                yield {"dtype": options.dtype, "round": turn, "size": size} | workers[size].step(**changes)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("compare", "cost", "table", "plot"))
    parser.add_argument("--out", type=Path, default=Path("runs/speed"))
    parser.add_argument(
        "--size", choices=SIZES, default="base", help="tiny takes seconds and tests the benchmark itself"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trl-python", type=Path, help="Python of trl's environment; without it trl is left out")
    parser.add_argument("--trl", default="per-prompt,batched", help="how trl samples")
    parser.add_argument("--dtypes", default="fp32,bf16", help="precisions that `compare` measures")
    parser.add_argument("--over", default=",".join(GRID), help="sizes that `cost` changes")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="precision that `cost` measures")
    parser.add_argument("--large", action="store_true", help="`cost` also measures FLAN-T5 large")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder for the figures of `plot`")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    compare = options.out / "compare.jsonl"
    cost = options.out / "cost.jsonl"

    if options.what == "compare":
        about: dict[str, Any] = {"machine": machine(options.threads), "versions": {}, "size": options.size}
        write_rows(measure_contestants(options, about), compare)
        compared = about | summary(read_rows(compare))
        (options.out / "compare.json").write_text(json.dumps(compared, indent=1) + "\n")
    elif options.what == "cost":
        write_rows(measure_sizes(options), cost)
        about = {"machine": machine(options.threads), "size": options.size, "step": asdict(Step())}
        (options.out / "cost.json").write_text(json.dumps(about, indent=1) + "\n")

    if options.what in ("compare", "table") and compare.is_file():
        print(compare_table(json.loads((options.out / "compare.json").read_text())))
    if options.what in ("cost", "table") and cost.is_file():
        print(cost_table(read_rows(cost)))
        print("\n".join(check_lines(read_rows(cost))))

    if options.what == "plot" and compare.is_file():
        draw_compare(json.loads((options.out / "compare.json").read_text()), options.docs / "performance-compare.svg")
    if options.what == "plot" and cost.is_file():
        draw_cost(read_rows(cost), options.docs / "performance-cost.svg")


if __name__ == "__main__":
    main()
