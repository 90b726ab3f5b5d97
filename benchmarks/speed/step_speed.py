"""How long does a step of PPO take, against trl's PPOTrainer, against the machine's limit, and against its own sizes?

    python benchmarks/step_speed.py compare --trl-python trl-env/bin/python     some 25 minutes on 2 idle cores
    python benchmarks/step_speed.py cost                                        some 20 minutes
    python benchmarks/step_speed.py table                                       what was measured, in Markdown
    python benchmarks/step_speed.py plot                                        docs/performance-*.svg

The environment of trl is made as benchmarks/oracle/trl-requirements.txt says. No network: models have random weights and
the exact shapes of FLAN-T5 (base), with a LoRA of rank 32 on q and v, and of a RoBERTa-base reward. Prompts have 256
tokens, responses always 64, a step 16 of them in minibatches of 4, once.

`compare`: each contestant is a process that keeps its models and makes a step when told. They take turns, one at a
time, so that what else the machine does meets all of them; where processor time is far below threads times seconds,
others were using it, and the clock tells little. The floor (benchmarks/step_floor.py) takes its turn too.
`cost`: our own step, one size changed at a time, up and down the list of points by turns.
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
    """A process that makes one step whenever it is told."""

    def __init__(self, script: str, task: Task, python: Path, log: Path) -> None:
        numbers = {name: str(task.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        # A thread that waits for work must not spin long, or it takes the processor from the one that works.
        own = {**numbers, "GOMP_SPINCOUNT": "2000", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        ours = python == Path(sys.executable)
        inherited = {name: value for name, value in os.environ.items() if ours or name != "PYTHONPATH"}
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [python, HERE / script, *task.words()], env=inherited | own | {"CUDA_VISIBLE_DEVICES": ""}, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip
        self.warm_up = self._answer()

    def step(self, **changes: Any) -> dict[str, Any]:
        """Let it make a step, some of its sizes changed, and return its row."""
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
    """Return the folder with the models of a size, made if it is not there."""
    folder = out / "models" / size
    if not (folder / "reward" / "tokenizer.json").is_file():  # written last
        subprocess.run([sys.executable, HERE / "step_worker.py", "--make", folder, size], check=True)
    return str(folder)


def machine(threads: int) -> dict[str, Any]:
    """Return what the numbers belong to."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
    return {"processor": names[0] if names else platform.processor(), "cores": os.cpu_count(), "threads": threads,
            "date": time.strftime("%Y-%m-%d")}  # fmt: skip


def tell(row: dict[str, Any]) -> None:
    stages = "  ".join(f"{name} {seconds:.2f}" for name, seconds in row["stages"].items())
    what = row.get("contestant") or {"size": row["size"]} | row["step"]
    took = f"{row['seconds']:.2f} s, {row['processor_seconds']:.2f} s of processor time"
    print(f"{what} {row['dtype']}: {took} ({stages})", file=sys.stderr, flush=True)


def written(rows: Iterable[dict[str, Any]], file: Path) -> None:
    """Write rows as they come."""
    with file.open("w") as lines:
        for row in rows:
            print(json.dumps(row), file=lines, flush=True)
            tell(row)


def compared(options: argparse.Namespace, about: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a row for every step of every contestant; what they run on is added to `about`."""
    place, step = models(options.out, options.size), TINY if options.size == "tiny" else Step()
    for dtype in options.dtypes.split(","):
        task = Task(models=place, dtype=dtype, step=step, threads=options.threads)
        starts = {"detoxrl": ("step_worker.py", task, Path(sys.executable))}
        for way in options.trl.split(",") if options.trl_python else ():
            starts[f"trl {way}"] = ("trl_worker.py", replace(task, generate=way), options.trl_python)
        starts["floor"] = ("step_floor.py", task, Path(sys.executable))
        with ExitStack() as stack:
            workers = {}
            for name, (script, given, python) in starts.items():
                log = options.out / f"{name.replace(' ', '-')}-{dtype}.log"
                workers[name] = stack.enter_context(Worker(script, given, python, log))
                about["versions"][name.split()[0]] = workers[name].warm_up["versions"]
            for turn in range(options.rounds):
                for name, worker in workers.items():
                    yield {"contestant": name, "dtype": dtype, "round": turn} | worker.step()


def points(over: Iterable[str], size: str) -> list[tuple[str, dict[str, Any]]]:
    """Return model size and changed sizes of each point; the usual step is one of them."""
    found: list[tuple[str, dict[str, Any]]] = [(size, {})]
    for axis in over:
        for value in (TINY_GRID if size == "tiny" else GRID)[axis]:
            usual = value == (size if axis == "size" else getattr(TINY if size == "tiny" else Step(), axis))
            if not usual:
                found.append((value, {}) if axis == "size" else (size, {axis: value}))
    return found


def costs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for every step of every point."""
    chosen = points(options.over.split(","), options.size)
    if options.large:
        chosen.append(("large", {}))
    with ExitStack() as stack:
        workers = {}
        for size in dict.fromkeys(size for size, _ in chosen):
            step = TINY if options.size == "tiny" else Step()
            task = Task(models=models(options.out, size), dtype=options.dtype, step=step, threads=options.threads)
            worker = Worker("step_worker.py", task, Path(sys.executable), options.out / f"cost-{size}.log")
            workers[size] = stack.enter_context(worker)
        for turn in range(options.rounds):
            for size, changes in chosen if turn % 2 == 0 else reversed(chosen):
                yield {"dtype": options.dtype, "round": turn, "size": size} | workers[size].step(**changes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("compare", "cost", "table", "plot"))
    parser.add_argument("--out", type=Path, default=Path("runs/speed"))
    parser.add_argument("--size", choices=SIZES, default="base", help="tiny: seconds, to try the benchmark itself")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trl-python", type=Path, help="of trl's environment; without it trl is left out")
    parser.add_argument("--trl", default="per-prompt,batched", help="how trl samples")
    parser.add_argument("--dtypes", default="fp32,bf16", help="of `compare`")
    parser.add_argument("--over", default=",".join(GRID), help="what `cost` changes")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of `cost`")
    parser.add_argument("--large", action="store_true", help="`cost` measures FLAN-T5 large too")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where `plot` draws")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    compare, cost = options.out / "compare.jsonl", options.out / "cost.jsonl"
    if options.what == "compare":
        about: dict[str, Any] = {"machine": machine(options.threads), "versions": {}, "size": options.size}
        written(compared(options, about), compare)
        found = about | summary(read_rows(compare))
        (options.out / "compare.json").write_text(json.dumps(found, indent=1) + "\n")
    elif options.what == "cost":
        written(costs(options), cost)
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
