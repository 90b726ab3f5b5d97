"""How long does a step on a causal model take with and without groups, compared with trl 1.16's GRPOTrainer?

    python benchmarks/speed/group_speed.py --trl-python trl-env/bin/python
    python benchmarks/speed/group_speed.py --trl-python trl-env/bin/python --size tiny     tests the benchmark itself

benchmarks/oracle/trl_group-requirements.txt says how to create the environment of trl. No network is needed: the model
has random weights and the exact shapes of SmolLM2-135M, with a LoRA of rank 32 on q and v, in fp32. A step has 16
responses of exactly 48 tokens to prompts of 160, or 32 in groups of 8, the KL to the reference, random scores, and one
update of all responses. `4 x 4` is 4 prompts with 4 responses each. The floor (group_floor.py) is the time of the large
matrix products alone, at this machine's best rate, measured in its turn. Both contestants make the update in backward
passes of one group, or of 4 responses without groups; `--microbatch` changes that for all.

Each contestant is a process that keeps its model in memory and makes a step on request. They run in turn, one at a
time, so that other load on the machine affects all of them. Processor seconds are those of the whole process, user and
system; where they are far below threads times seconds, another program was running.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from group_case import SMOLLM2, TINY, GroupTask
from step_results import Rows, median_and_range
from step_speed import Worker, machine, write_rows

HERE = Path(__file__).parent
SIZES = ("smollm2-135m", "tiny")
CONTESTANTS = {
    "detoxrl ppo 16 x 1": ("group_worker.py", "ppo", 16, 1),
    "detoxrl grpo 4 x 4": ("group_worker.py", "grpo", 16, 4),
    "trl grpo 4 x 4": ("trl_group_worker.py", "grpo", 16, 4),
    "floor 4 x 4": ("group_floor.py", "grpo", 16, 4),
    "detoxrl grpo 4 x 8": ("group_worker.py", "grpo", 32, 8),
    "trl grpo 4 x 8": ("trl_group_worker.py", "grpo", 32, 8),
    "floor 4 x 8": ("group_floor.py", "grpo", 32, 8),
}
"""Script, algorithm, responses and group size."""
RATIOS = (
    ("trl grpo 4 x 4", "detoxrl ppo 16 x 1"),
    ("trl grpo 4 x 4", "detoxrl grpo 4 x 4"),
    ("trl grpo 4 x 8", "detoxrl grpo 4 x 8"),
    ("detoxrl ppo 16 x 1", "detoxrl grpo 4 x 4"),
    ("detoxrl grpo 4 x 4", "floor 4 x 4"),
    ("detoxrl grpo 4 x 8", "floor 4 x 8"),
)
"""Each is how many times as long the first one takes as the second one, in the same round."""


def model_folder(out: Path, size: str) -> str:
    """Return the folder with the model of a size; create it if it is missing."""
    folder = out / "models" / size
    if not (folder / "tokenizer.json").is_file():  # written last
        subprocess.run([sys.executable, HERE / "group_worker.py", "--make", folder, size], check=True)
    return str(folder)


def measure(options: argparse.Namespace, about: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a row for every step of every contestant; add their library versions to `about`."""
    models = model_folder(options.out, options.size)
    with ExitStack() as stack:
        workers = {}
        for name, (script, algorithm, responses, group_size) in CONTESTANTS.items():
            if name not in options.contestants:
                continue
            step = TINY if options.size == "tiny" else SMOLLM2
            task = GroupTask(
                models=models,
                step=replace(step, batch=responses, minibatch=responses),
                threads=options.threads,
                algorithm=algorithm,
                group_size=group_size,
                microbatch=options.microbatch or max(4, group_size),
            )
            python = options.trl_python if name.startswith("trl") else Path(sys.executable)
            log = options.out / f"{name.replace(' ', '-')}.log"
            workers[name] = stack.enter_context(Worker(script, task, python, log))
            about["versions"][name.split()[0]] = workers[name].warm_up["versions"]
        for turn in range(options.rounds):
            for name, worker in workers.items():
                yield {"contestant": name, "dtype": "fp32", "round": turn} | worker.step()


def by_contestant(rows: Rows) -> dict[str, Rows]:
    """Return the rows of each contestant."""
    groups: dict[str, Rows] = {}
    for row in rows:
        groups.setdefault(row["contestant"], []).append(row)
    return groups


def table(rows: Rows, about: dict[str, Any]) -> str:
    """Return medians, and ratios between steps of the same round, in Markdown."""
    groups = by_contestant(rows)
    lines = [
        "| prompts x responses | s / step | processor s | rollout, s | update, s | tokens/s | peak GiB |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, group in groups.items():
        lines.append(f"| {name} | {' | '.join(_cells(group, _is_floor(name)))} |")

    lines += ["", "| ratio | of seconds | range | of processor seconds | range |", "|---|--:|---|--:|---|"]
    for slower, faster in RATIOS:
        if slower in groups and faster in groups:
            keys = ("seconds",) if _is_floor(faster) else ("seconds", "processor_seconds")
            cells = [_ratio(groups[slower], groups[faster], key) for key in keys]
            lines.append(f"| {slower} / {faster} | {' | '.join(cells)} |")

    machine_words = ", ".join(f"{key} {value}" for key, value in about["machine"].items())
    lines += ["", f"{machine_words}; {len(rows) // len(groups)} rounds."]
    for name, packages in about["versions"].items():
        numbers = ", ".join(f"{package} {number}" for package, number in packages.items())
        lines.append(f"{name}: {numbers}.")
    return "\n".join(lines)


def _is_floor(name: str) -> bool:
    """Return whether a contestant computes the time of a step from rates, so that its processor time says nothing."""
    return name.startswith("floor")


def _cells(group: Rows, is_floor: bool) -> list[str]:
    seconds = median_and_range([row["seconds"] for row in group])
    step = group[0]["step"]
    return [
        f"{seconds['median']:.2f} ({seconds['low']:.2f} to {seconds['high']:.2f})",
        "" if is_floor else f"{median(row['processor_seconds'] for row in group):.2f}",
        *(f"{median(row['stages'][stage] for row in group):.2f}" for stage in ("rollout", "update")),
        f"{step['batch'] * step['response'] / seconds['median']:.0f}",
        "" if is_floor else f"{max(row['peak_gib'] for row in group):.2f}",
    ]


def _ratio(slower: Rows, faster: Rows, key: str) -> str:
    ratios = median_and_range([slow[key] / fast[key] for slow, fast in zip(slower, faster, strict=True)])
    return f"{ratios['median']:.2f} | {ratios['low']:.2f} to {ratios['high']:.2f}"


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", type=Path, help="Python of trl's environment; without it trl is left out")
    parser.add_argument("--out", type=Path, default=Path("runs/groups"))
    parser.add_argument("--size", choices=SIZES, default=SIZES[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--microbatch", type=int, help="responses per backward pass")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), metavar="NAME")
    options = parser.parse_args()
    if options.trl_python is None:
        options.contestants = [name for name in options.contestants if not name.startswith("trl")]
    return options


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"machine": machine(options.threads), "versions": {}}
    file = options.out / "groups.jsonl"
    write_rows(measure(options, about), file)
    (options.out / "groups.json").write_text(json.dumps(about, indent=1) + "\n")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    print(table(rows, about))


if __name__ == "__main__":
    main()
