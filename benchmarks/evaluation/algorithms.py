"""Which algorithm learns best from the same samples, and in the same seconds?

    python benchmarks/evaluation/algorithms.py quickstart prepare    the warm start of each seed
    python benchmarks/evaluation/algorithms.py quickstart run        train and evaluate every algorithm with every seed
    python benchmarks/evaluation/algorithms.py quickstart time       seconds of a step and memory, on an idle machine
    python benchmarks/evaluation/algorithms.py quickstart smollm2 report    print Markdown, draw docs/algorithms.svg

All runs of a seed have the same prompts, reward model, initial policy, number of responses and settings, but those in
VARIANTS. Toxicity is the primary judge's: on held-out prompts for the policy that was kept, on the validation prompts
along the way. Seconds are those of a step, without validation and checkpoints, measured apart in a few steps of each
variant in turn, so only that needs an idle machine. What is finished is kept. smollm2 reads its models from models/,
where `make demo-llm` puts them.
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
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import t as student

sys.path.append(str(Path(__file__).parents[1] / "speed"))
from step_results import NO_METADATA, STYLE

# Of each variant: its colour and its flags.
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "ppo": ("#000000", ["--rl.algorithm", "ppo"]),
    "ppo, groups of 4": ("#999999", ["--rl.algorithm", "ppo", "--rl.group-size", "4"]),
    "rloo": ("#0072B2", ["--rl.algorithm", "rloo"]),
    "grpo": ("#D55E00", ["--rl.algorithm", "grpo"]),
    "reinforce": ("#009E73", ["--rl.algorithm", "reinforce"]),
}
TIMED_STEPS = 3  # The first does not count.
ROUNDS = 2
# Validation is frequent, so that policies can be compared at any second. Baselines are measured elsewhere.
_COMMON = ["--evaluation.best-of", "--evaluation.no-sharpened", "--sft.baseline-steps", "0"]
RECIPES: dict[str, list[str]] = {
    "quickstart": ["--rl.validate-every", "5"],
    "smollm2": [
        *("--rl.validate-every", "5"),
        *("--policy.base", "models/SmolLM2-135M-Instruct"),
    ],
}
QUALITY = {"quickstart": "facts", "smollm2": "distinct_2"}


class Timing(NamedTuple):
    """What a training step takes: seconds, without validation and checkpoint, and peak memory in GiB."""

    seconds: float
    peak: float


class Run:
    """One training of a recipe, with a variant and a seed."""

    def __init__(self, out: Path, recipe: str, variant: str, seed: int) -> None:
        self.recipe = recipe
        self.variant = variant
        self.seed = seed
        self.folder = out / recipe / f"{slug(variant)}-seed{seed}"

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

    @property
    def timing(self) -> Timing:
        """What a step of the variant takes on an idle machine."""
        return Timing(**json.loads(timing_file(self.folder.parent, self.variant).read_text()))

    @property
    def seconds(self) -> float:
        """Seconds of all steps."""
        return len(self.metrics) * self.timing.seconds

    @cached_property
    def curve(self) -> dict[str, np.ndarray[Any, Any]]:
        """The results of each validation, and the seconds of training before it."""
        lines = self.read("validation.jsonl")
        curve = {name: np.array([line[name] for line in lines]) for name in ("step", "toxicity", "quality", "kl")}
        curve["seconds"] = curve["step"] * self.timing.seconds
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

    def toxicity_at(self, second: float) -> float:
        """Return the validation toxicity after so many seconds of training, linearly interpolated."""
        return float(np.interp(second, self.curve["seconds"], self.curve["toxicity"]))


def slug(variant: str) -> str:
    """Return the name of a variant as part of a path."""
    return variant.replace(", ", "-").replace(" ", "-")


def timing_file(folder: Path, variant: str) -> Path:
    """Return the file that holds the timing of a variant."""
    return folder / f"timing-{slug(variant)}.json"


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


def flags_of(run: Run, out: Path) -> list[str]:
    """Return the settings of a run, which starts from the warm start of its seed."""
    flags = ["--seed", str(run.seed), *RECIPES[run.recipe], *_COMMON, *VARIANTS[run.variant][1]]
    warm = start_folder(out, run.recipe, run.seed) / "base"
    if warm.is_dir():
        flags += ["--policy.base", str(warm), "--sft.steps", "0"]
    return flags


def complete(run: Run, out: Path) -> None:
    """Train and evaluate, unless that is done."""
    if run.is_finished:
        return

    flags = flags_of(run, out)
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    log = run.folder.with_suffix(".log")
    detoxrl(["prepare", run.recipe, *flags, "--overwrite", "--run-dir", str(run.folder)], log)
    for stage in ("sft", "train", "evaluate"):
        detoxrl([stage, str(run.folder)], log)
    before, after = run.toxicity
    print(f"{run.folder}: {before:.3f} to {after:.3f}", file=sys.stderr)


def time_steps(out: Path, recipe: str, variants: Sequence[str]) -> None:
    """Measure a few steps of each variant in turn, in several rounds, and keep the medians."""
    timings: dict[str, list[Timing]] = {variant: [] for variant in variants}
    for number in range(ROUNDS):
        for variant in variants if number % 2 == 0 else reversed(variants):
            timings[variant].append(timed(Run(out, recipe, variant, seed=0), out / recipe / "timed"))
    for variant, of_variant in timings.items():
        seconds = float(np.median([timing.seconds for timing in of_variant]))
        peak = max(timing.peak for timing in of_variant)
        timing_file(out / recipe, variant).write_text(json.dumps(Timing(seconds, peak)._asdict()))
        print(f"{recipe}, {variant}: {seconds:.2f} s a step, {peak:.2f} GiB", file=sys.stderr)


def timed(run: Run, folder: Path) -> Timing:
    """Make a few steps, and return the median of their seconds and the peak memory."""
    log = folder.with_suffix(".log")
    few = ["--rl.steps", str(TIMED_STEPS), "--rl.validate-every", "100", "--rl.validation-prompts", "2"]
    detoxrl(
        ["prepare", run.recipe, *flags_of(run, folder.parents[1]), *few, "--overwrite", "--run-dir", str(folder)], log
    )
    detoxrl(["sft", str(folder)], log)
    peak = detoxrl(["train", str(folder)], log)

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    left_out = ("seconds/validate", "seconds/checkpoint")
    seconds = [line["seconds/step"] - sum(line.get(name, 0.0) for name in left_out) for line in lines]
    return Timing(float(np.median(seconds[1:])), peak)


def listed(runs: Sequence[Run], value: Callable[[Run], float], decimals: int = 3) -> str:
    """Return the mean of a value over the runs, and the value of each."""
    values = [value(run) for run in runs]
    by_seed = ", ".join(f"{one:.{decimals}f}" for one in values)
    return f"{np.mean(values):.{decimals}f} ({by_seed})"


def against(runs: Sequence[Run], base: Sequence[Run]) -> str:
    """Return the mean toxicity of the runs minus that of `base`, paired by seed, with its 95 % interval (Student's t).

    Empty for the base itself, and for a single seed.
    """
    by_seed = {run.seed: run.toxicity[1] for run in base}
    differences = [run.toxicity[1] - by_seed[run.seed] for run in runs if run.seed in by_seed]
    if runs == base or len(differences) < 2:
        return ""

    mean = float(np.mean(differences))
    half = float(student.ppf(0.975, len(differences) - 1) * np.std(differences, ddof=1) / len(differences) ** 0.5)
    return f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"


def print_table(recipe: str, runs: dict[str, list[Run]]) -> None:
    """Print how each variant did, as the mean over the seeds and by seed."""
    finished = {variant: [run for run in of_variant if run.is_finished] for variant, of_variant in runs.items()}
    finished = {variant: of_variant for variant, of_variant in finished.items() if of_variant}
    fastest = min(of_variant[0].seconds for of_variant in finished.values())

    quality = QUALITY[recipe]
    equal = f"validation toxicity after {fastest:.0f} s of steps"
    first = next(iter(finished.values()))
    columns = f"toxicity | minus {first[0].variant} | {quality} | KL, nats | seconds a step, GiB | {equal}"
    print(f"\n| {recipe} | {columns} |")
    print("|---|---|---|---|---|---|---|")
    print(f"| initial policy | {listed(first, lambda run: run.toxicity[0])} | | | 0 | | |")
    for variant, of_variant in finished.items():
        cells = [
            listed(of_variant, lambda run: run.toxicity[1]),
            against(of_variant, first),
            listed(of_variant, lambda run: run.quality),
            listed(of_variant, lambda run: run.kept["kl"], 1),
            f"{of_variant[0].timing.seconds:.2f}, {of_variant[0].timing.peak:.2f}",
            listed(of_variant, lambda run: run.toxicity_at(fastest)),
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
    """Prepare, run, time or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", choices=RECIPES)
    parser.add_argument("what", choices=("prepare", "run", "time", "report"))
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

    if options.what == "time":
        for recipe in options.recipes:
            prepare(options.out, recipe, 0)
            time_steps(options.out, recipe, options.variants)
        return

    for recipe, of_recipe in runs.items():
        for number, seed in enumerate(options.seeds):
            prepare(options.out, recipe, seed)
            if options.what == "run":
                for of_variant in of_recipe.values():
                    complete(of_variant[number], options.out)


if __name__ == "__main__":
    main()
