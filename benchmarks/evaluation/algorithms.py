"""Which algorithm learns best from the same samples, and in the same seconds?

    python benchmarks/evaluation/algorithms.py quickstart prepare    the warm start of each seed
    python benchmarks/evaluation/algorithms.py quickstart run        train and evaluate every algorithm with every seed
    python benchmarks/evaluation/algorithms.py quickstart smollm2 report    print Markdown, draw docs/algorithms.svg

All runs of a seed have the same prompts, reward model, initial policy, number of responses and settings, but those in
VARIANTS. Toxicity is the primary judge's: on held-out prompts for the policy that was kept, on the validation prompts
along the way. Seconds are those of training steps, without validation and checkpoints, so the machine should be idle.
Finished stages are kept. smollm2 reads its models from models/, where `make demo-llm` puts them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).parents[1] / "speed"))
from step_results import NO_METADATA, STYLE

# Of each variant: its colour and its flags.
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "ppo": ("#000000", []),
    "ppo, groups of 4": ("#999999", ["--rl.group-size", "4"]),
    "rloo": ("#0072B2", ["--rl.algorithm", "rloo"]),
    "grpo": ("#D55E00", ["--rl.algorithm", "grpo"]),
    "reinforce": ("#009E73", ["--rl.algorithm", "reinforce"]),
}
# Validation is frequent, so that policies can be compared at any second. Baselines are measured elsewhere.
_COMMON = ["--evaluation.best-of", "--evaluation.no-sharpened", "--sft.baseline-steps", "0"]
RECIPES: dict[str, list[str]] = {
    "quickstart": ["--rl.validate-every", "5"],
    "smollm2": [
        *("--rl.validate-every", "5"),
        *("--policy.base", "models/SmolLM2-135M-Instruct", "--reward.encoder", "models/all-MiniLM-L6-v2"),
    ],
}
QUALITY = {"quickstart": "facts", "smollm2": "distinct_2"}


class Run:
    """One training of a recipe, with a variant and a seed."""

    def __init__(self, out: Path, recipe: str, variant: str, seed: int) -> None:
        self.recipe = recipe
        self.variant = variant
        self.seed = seed
        self.folder = out / recipe / f"{variant.replace(', ', '-').replace(' ', '-')}-seed{seed}"

    @property
    def is_finished(self) -> bool:
        """Whether it was trained and evaluated."""
        return (self.folder / "eval.json").is_file()

    def read(self, name: str) -> Any:
        """Return the content of a JSON file, or the lines of a JSON-lines file."""
        text = (self.folder / name).read_text(encoding="utf-8")
        if name.endswith(".jsonl"):
            return [json.loads(line) for line in text.splitlines()]
        return json.loads(text)

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        """What was logged of each training step."""
        lines: list[dict[str, float]] = self.read("metrics.jsonl")
        return lines

    @cached_property
    def seconds(self) -> np.ndarray[Any, Any]:
        """Seconds of each step, without validation and checkpoint."""
        left_out = ("seconds/validate", "seconds/checkpoint")
        return np.array([line["seconds/step"] - sum(line.get(name, 0.0) for name in left_out) for line in self.metrics])

    @cached_property
    def curve(self) -> dict[str, np.ndarray[Any, Any]]:
        """The results of each validation, and the seconds of training before it."""
        lines = self.read("validation.jsonl")
        curve = {name: np.array([line[name] for line in lines]) for name in ("step", "toxicity", "quality", "kl")}
        before_step = np.append(0.0, self.seconds.cumsum())
        curve["seconds"] = before_step[curve["step"]]
        return curve

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """What eval.json holds."""
        evaluation: dict[str, Any] = self.read("eval.json")
        return evaluation

    @property
    def toxicity(self) -> tuple[float, float]:
        """Mean toxicity of the held-out responses before and after, by the primary judge."""
        judged = self.evaluation["toxicity"][self.evaluation["primary_judge"]]
        return judged["before"]["mean"], judged["after"]["mean"]

    @property
    def quality(self) -> float:
        """The recipe's measure of quality of the held-out responses, after."""
        return float(self.evaluation["quality"][QUALITY[self.recipe]]["after"])

    @property
    def kept(self) -> dict[str, float]:
        """The validation of the policy that was kept."""
        kept: dict[str, float] = self.read("checkpoint.json")["kept"]
        return kept

    @property
    def peak(self) -> float:
        """Peak memory of the training stage, in GiB."""
        return float(self.read("peak.json")["train"])

    def toxicity_at(self, second: float) -> float:
        """Return the validation toxicity after so many seconds of training, linearly interpolated."""
        return float(np.interp(second, self.curve["seconds"], self.curve["toxicity"]))


def detoxrl(arguments: Sequence[str], log: Path) -> float:
    """Run a command of detoxrl, and return its peak memory in GiB."""
    with log.open("a") as output:
        process = subprocess.Popen([sys.executable, "-m", "detoxrl", *arguments], stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"`detoxrl {' '.join(arguments)}` ended with exit code {process.returncode}; see {log}")
    return usage.ru_maxrss / 2**20


def start_folder(out: Path, recipe: str, seed: int) -> Path:
    """Return the run folder that holds the warm start of a seed."""
    return out / recipe / f"start{seed}"


def prepare(out: Path, recipe: str, seed: int) -> None:
    """Make the warm start and the reward model of a seed; the runs then find the reward model in the cache."""
    folder = start_folder(out, recipe, seed)
    if not (folder / "seconds.json").is_file() or "sft" not in json.loads((folder / "seconds.json").read_text()):
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.with_suffix(".log")
        flags = ["--seed", str(seed), *RECIPES[recipe], *_COMMON]
        detoxrl(["prepare", recipe, *flags, "--overwrite", "--run-dir", str(folder)], log)
        detoxrl(["sft", str(folder)], log)


def run(run: Run, out: Path) -> None:
    """Train and evaluate, unless that is done."""
    if run.is_finished:
        return

    flags = ["--seed", str(run.seed), *RECIPES[run.recipe], *_COMMON, *VARIANTS[run.variant][1]]
    warm = start_folder(out, run.recipe, run.seed) / "base"
    if warm.is_dir():
        flags += ["--policy.base", str(warm), "--sft.steps", "0"]

    run.folder.parent.mkdir(parents=True, exist_ok=True)
    log = run.folder.with_suffix(".log")
    detoxrl(["prepare", run.recipe, *flags, "--overwrite", "--run-dir", str(run.folder)], log)
    detoxrl(["sft", str(run.folder)], log)
    peak = detoxrl(["train", str(run.folder)], log)
    (run.folder / "peak.json").write_text(json.dumps({"train": peak}))
    detoxrl(["evaluate", str(run.folder)], log)
    before, after = run.toxicity
    print(f"{run.folder}: {before:.3f} to {after:.3f}, {run.seconds.sum():.0f} s, {peak:.2f} GiB", file=sys.stderr)


def listed(runs: Sequence[Run], value: Callable[[Run], float], decimals: int = 3) -> str:
    """Return the mean of a value over the runs, and the value of each."""
    values = [value(run) for run in runs]
    by_seed = ", ".join(f"{one:.{decimals}f}" for one in values)
    return f"{np.mean(values):.{decimals}f} ({by_seed})"


def print_table(recipe: str, runs: dict[str, list[Run]]) -> None:
    """Print how each variant did, as the mean over the seeds and by seed."""
    finished = {variant: [run for run in of_variant if run.is_finished] for variant, of_variant in runs.items()}
    finished = {variant: of_variant for variant, of_variant in finished.items() if of_variant}
    fastest = {}
    for of_variant in finished.values():
        for one in of_variant:
            total = float(one.seconds.sum())
            fastest[one.seed] = min(fastest.get(one.seed, total), total)

    quality = QUALITY[recipe]
    print(
        f"\n| {recipe} | toxicity | {quality} | KL, nats | seconds a step | GiB | validation toxicity, equal seconds |"
    )
    print("|---|---|---|---|---|---|---|")
    first = next(iter(finished.values()))
    print(f"| initial policy | {listed(first, lambda run: run.toxicity[0])} | | 0 | | | |")
    for variant, of_variant in finished.items():
        cells = [
            listed(of_variant, lambda run: run.toxicity[1]),
            listed(of_variant, lambda run: run.quality),
            listed(of_variant, lambda run: run.kept["kl"], 1),
            listed(of_variant, lambda run: float(np.median(run.seconds)), 2),
            listed(of_variant, lambda run: run.peak, 2),
            listed(of_variant, lambda run: run.toxicity_at(fastest[run.seed])),
        ]
        print(f"| {variant} | {' | '.join(cells)} |")


def draw(runs: dict[str, dict[str, list[Run]]], target: Path) -> None:
    """Draw validation toxicity against step and seconds for each recipe: each seed thin, the mean thick."""
    style: Any = STYLE | {"axes.grid": True, "grid.alpha": 0.2, "grid.linewidth": 0.6}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.5, 2.6 * len(runs)), layout="constrained")
        grid = figure.subplots(len(runs), 2, sharey="row", squeeze=False)
        for row, (recipe, of_recipe) in zip(grid, runs.items(), strict=True):
            for panel, axis in zip(row, ("step", "seconds"), strict=True):
                for variant, of_variant in of_recipe.items():
                    draw_variant(panel, axis, variant, [run for run in of_variant if run.is_finished])
                label = "step" if axis == "step" else "seconds of training steps"
                panel.set(xlabel=label, xlim=(0, None), ylim=(0, None))
            row[0].set_ylabel("validation toxicity")
            row[0].set_title(recipe)
        grid[0][0].legend(frameon=False)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, facecolor="white", metadata=NO_METADATA)


def draw_variant(panel: Any, axis: str, variant: str, runs: Sequence[Run]) -> None:
    """Draw the curves of a variant's seeds, and their mean."""
    if not runs:
        return
    color = VARIANTS[variant][0]
    curves = np.array([[run.curve[axis], run.curve["toxicity"]] for run in runs])
    for x, y in curves:
        panel.plot(x, y, color=color, linewidth=0.5, alpha=0.4)
    panel.plot(*curves.mean(0), color=color, linewidth=1.6, label=variant)


def main() -> None:
    """Prepare, run or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", choices=RECIPES)
    parser.add_argument("what", choices=("prepare", "run", "report"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--out", type=Path, default=Path("runs/algorithms"), help="folder for the run folders")
    parser.add_argument("--figure", type=Path, default=Path("docs/algorithms.svg"))
    options = parser.parse_args()

    runs: dict[str, dict[str, list[Run]]] = {}
    for recipe in options.recipes:
        variants = {name: [Run(options.out, recipe, name, seed) for seed in options.seeds] for name in options.variants}
        runs[recipe] = variants

    if options.what == "report":
        for recipe, of_recipe in runs.items():
            print_table(recipe, of_recipe)
        draw(runs, options.figure)
        return

    for recipe, of_recipe in runs.items():
        for number, seed in enumerate(options.seeds):
            prepare(options.out, recipe, seed)
            if options.what == "run":
                for of_variant in of_recipe.values():
                    run(of_variant[number], options.out)


if __name__ == "__main__":
    main()
