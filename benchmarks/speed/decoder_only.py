"""Does a decoder-only LoRA, which reads each prompt once, learn as well as a LoRA everywhere?

    python benchmarks/speed/decoder_only.py prepare    the warm start of each seed: 4 minutes each on 2 idle cores
    python benchmarks/speed/decoder_only.py train      PPO with both LoRAs in turn: 3 to 4 minutes per seed
    python benchmarks/speed/decoder_only.py report     print Markdown, draw docs/decoder-only.svg

It runs the quickstart with `policy.train_encoder` off (the default) and on, and the same dialogues, warm start, reward
model and random draws. Toxicity is the primary judge's on the validation prompts, quality is the facts kept there.
Seconds are those of training steps, without validation and checkpoints, so the machine should be idle. Finished
folders are kept; unfinished ones are started again, because times must not span an interruption. No network is needed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from safetensors.numpy import load_file
from scipy.stats import t as student

from detoxrl.runtime.files import content_digest
from step_results import NO_METADATA, STYLE

# Of each LoRA: its colour and its flags.
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "decoder only": ("#0072B2", []),
    "everywhere": ("#D55E00", ["--policy.train-encoder"]),
}
STEPS = (0, 5, 10, 15, 20, 30, 40, 60)  # Steps of the first table.
MOMENTS = (10, 20, 30, 60)  # Steps whose seconds the last table compares.
LAST = 60
STAGES = ("sample", "score", "update")
SHARE = 0.2  # "As well" means behind by less than this share of the gain.
MARGIN = 0.005  # rl.quality_margin, for the facts.
COMMON = ["--rl.algorithm", "ppo", "--rl.quality-margin", str(MARGIN), "--sft.baseline-steps", "0"]
Pair = tuple[list[float], list[float]]  # By seed: decoder only, everywhere.


class Run:
    """One training."""

    def __init__(self, out: Path, seed: int, variant: str) -> None:
        self.folder = out / f"{variant.replace(' ', '-')}-seed{seed}"
        self.seed = seed
        self.variant = variant

    def read(self, name: str) -> Any:
        """Return the content of a JSON file, or the lines of a JSON-lines file."""
        text = (self.folder / name).read_text(encoding="utf-8")
        if name.endswith(".jsonl"):
            return [json.loads(line) for line in text.splitlines()]
        return json.loads(text)

    @cached_property
    def seconds(self) -> dict[str, Any]:
        """Seconds of each step by stage; `step` excludes validation and checkpoint."""
        lines = self.read("metrics.jsonl")
        seconds = {}
        for stage in ("step", "validate", "checkpoint", *STAGES):
            seconds[stage] = np.array([line.get(f"seconds/{stage}", 0.0) for line in lines])
        seconds["step"] = seconds["step"] - seconds["validate"] - seconds["checkpoint"]
        return seconds

    @cached_property
    def curve(self) -> dict[str, Any]:
        """The results of each validation, and the seconds of training before it."""
        lines = self.read("validation.jsonl")
        curve = {name: np.array([line[name] for line in lines]) for name in lines[0]}
        seconds_before_step = np.append(0.0, self.seconds["step"].cumsum())
        curve["seconds"] = seconds_before_step[curve["step"]]
        return curve

    def at(self, where: float, name: str = "toxicity", axis: str = "step") -> float:
        """Return the value at a step or second, linearly interpolated between validations."""
        return float(np.interp(where, self.curve[axis], self.curve[name]))

    def halved(self, axis: str) -> float:
        """Return the first step or second at which toxicity is at most half its initial value (nan: never)."""
        for where in np.linspace(0, self.curve[axis][-1], 1001):
            if self.at(where, axis=axis) <= self.at(0) / 2:
                return float(where)
        return float("nan")


def make(folder: Path, flags: Sequence[str], stages: Sequence[str]) -> None:
    """Prepare a run folder and run stages in it, unless the last stage is finished."""
    seconds = folder / "seconds.json"
    if seconds.is_file() and stages[-1] in json.loads(seconds.read_text()):
        return

    folder.parent.mkdir(parents=True, exist_ok=True)
    commands = [
        ["prepare", "quickstart", *flags, *COMMON, "--overwrite", "--run-dir", str(folder)],
        *([stage, str(folder)] for stage in stages),
    ]
    with folder.with_suffix(".log").open("w") as log:
        for command in commands:
            code = subprocess.run([sys.executable, "-m", "detoxrl", *command], stdout=log, stderr=log).returncode
            if code:
                sys.exit(f"`detoxrl {' '.join(command)}` ended with exit code {code}; see {log.name}")
    print(f"{folder}: {json.loads(seconds.read_text())}", file=sys.stderr, flush=True)


def require_twins(decoder: Run, everywhere: Run) -> None:
    """Exit if two runs differ in config, prompts, reward model, normaliser or initial policy, train_encoder aside."""
    runs = (decoder, everywhere)
    configs = [run.read("config.json") for run in runs]
    trains_encoder = [config["policy"].pop("train_encoder") for config in configs]
    starts = [{name: values[0] for name, values in run.curve.items() if name != "kl"} for run in runs]

    same_content = []
    for name in ("data", "reward", "normaliser.json"):
        same_content.append(content_digest(decoder.folder / name) == content_digest(everywhere.folder / name))

    are_twins = configs[0] == configs[1] and starts[0] == starts[1] and all(same_content)
    if not are_twins or trains_encoder != [False, True]:
        difference = f"{same_content}, {starts}"
        sys.exit(f"{decoder.folder} and {everywhere.folder} differ in more than policy.train_encoder: {difference}")


def difference(pair: Pair) -> tuple[float, float, list[float]]:
    """Return the mean difference, half the width of Student's 95 % interval (inf for one pair) and all differences."""
    decoder, everywhere = pair
    differences = [first - second for first, second in zip(decoder, everywhere, strict=True)]
    count = len(differences)
    half = float("inf")
    if count > 1:
        half = float(student.ppf(0.975, count - 1) * np.std(differences, ddof=1)) / count**0.5
    return float(np.mean(differences)), half, differences


def interval(pair: Pair) -> str:
    """Return the mean difference and its interval in words."""
    mean, half, _ = difference(pair)
    return f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"


def verdict(mean: float, half: float, bound: float) -> str:
    """Return what a mean difference and half its interval's width say; less is better."""
    is_within = mean + half < bound
    if abs(mean) <= half:
        return f"as well, within {bound:.3f}" if is_within else f"no difference found, {bound:.3f} not ruled out"
    if mean < 0:
        return "ahead"
    return f"behind, by less than {bound:.3f}" if is_within else "behind"


def statement(what: str, pair: Pair, bound: float) -> str:
    """Compare the decoder-only LoRA in a quantity of which less is better."""
    mean, half, differences = difference(pair)
    by_seed = ", ".join(f"{value:+.3f}" for value in differences)
    decoder, everywhere = (np.mean(values) for values in pair)
    values = f"{decoder:.3f} against {everywhere:.3f}, {interval(pair)}; by seed {by_seed}"
    return f"- {what}: {values}: {verdict(mean, half, bound)}"


def print_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table in Markdown."""
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


class Comparison:
    """The runs of both LoRAs, in the order of the seeds."""

    def __init__(self, runs: dict[str, list[Run]]) -> None:
        self.runs = runs
        self.seeds = [run.seed for run in next(iter(runs.values()))]
        self.all_runs = [run for pair in zip(*runs.values(), strict=True) for run in pair]
        self.kept = {run: run.read("checkpoint.json")["kept"] for run in self.all_runs}

    def both(self, value: Callable[[Run], float]) -> Pair:
        """Return a value of every run."""
        decoder, everywhere = ([value(run) for run in runs] for runs in self.runs.values())
        return decoder, everywhere

    def step_row(self, step: int) -> list[str]:
        """Return toxicity, its error, and quality at a step."""
        toxicity = self.both(lambda run: run.at(step))
        errors = self.both(lambda run: run.at(step, "toxicity_error"))
        quality = self.both(lambda run: run.at(step, "quality"))

        cells = [str(step)]
        for by_seed in zip(toxicity, errors, quality, strict=True):
            cells.append(f"{np.mean(by_seed[0]):.3f}, {np.mean(by_seed[2]):.3f}")
            for seed_toxicity, error, seed_quality in zip(*by_seed, strict=True):
                cells.append(f"{seed_toxicity:.3f} ± {error:.3f}, {seed_quality:.3f}")
        return [*cells, interval(toxicity)]

    def run_row(self, run: Run) -> list[str]:
        """Return the size, the seconds and the best policy of a run."""
        adapter = load_file(run.folder / "adapter/adapter_model.safetensors")
        weights = sum(tensor.size for tensor in adapter.values())
        medians = [f"{np.median(run.seconds[stage]):.3f}" for stage in ("step", *STAGES)]
        halved = [f"{run.halved(axis):.1f}" for axis in ("step", "seconds")]
        best = "{step}: {toxicity:.3f}, {quality:.3f}".format(**self.kept[run])
        return [str(run.seed), run.variant, f"{weights:,}", *medians, f"{run.at(LAST, 'seconds'):.1f}", *halved, best]

    def moment_row(self, clock: str, step: int) -> list[str]:
        """Return the toxicity of both LoRAs after the seconds that one of them, `clock`, took to a step."""
        moments = {run.seed: run.at(step, "seconds") for run in self.runs[clock]}
        toxicity = self.both(lambda run: run.at(moments[run.seed], axis="seconds"))
        steps = self.both(lambda run: run.at(moments[run.seed], "step", "seconds"))

        cells = [f"{clock}, step {step}", f"{np.mean(list(moments.values())):.1f}"]
        for toxicity_by_seed, steps_by_seed in zip(toxicity, steps, strict=True):
            cells.append(f"{np.mean(toxicity_by_seed):.3f} at step {np.mean(steps_by_seed):.1f}")
        return [*cells, interval(toxicity)]

    def print_tables(self) -> None:
        """Print the tables: by step, by run, by second."""
        heads = ["step: toxicity ± error, quality"]
        for variant in self.runs:
            heads += [f"{variant}, {column}" for column in ("mean", *(f"seed {seed}" for seed in self.seeds))]
        print_table([*heads, "toxicity, difference"], [self.step_row(step) for step in STEPS])

        heads = ["seed", "LoRA", "weights", "s / step, median", *STAGES, "s in all", "halved at step", "at second"]
        print_table([*heads, "kept"], [self.run_row(run) for run in self.all_runs])

        heads = ["the seconds of", "s, mean", *self.runs, "toxicity, difference"]
        print_table(heads, [self.moment_row(clock, step) for clock in self.runs for step in MOMENTS])

    def print_conclusions(self) -> None:
        """Print how the decoder-only LoRA compares in each quantity."""
        initial_and_last = self.both(lambda run: run.at(0) - run.at(LAST))
        bound = SHARE * float(np.mean(initial_and_last[1]))
        seconds = self.both(lambda run: run.at(LAST, "seconds"))
        faster = dict(zip(self.seeds, map(min, *seconds), strict=True))
        grid = np.linspace(0, 1, 601)

        def mean_by_step(run: Run) -> float:
            return float(np.mean([run.at(part * LAST) for part in grid]))

        def mean_by_second(run: Run) -> float:
            return float(np.mean([run.at(part * faster[run.seed], axis="seconds") for part in grid]))

        print(f"\n{' less '.join(self.runs)}, paired by seed, Student's 95 % over {len(self.seeds)}:\n")
        print(statement(f"toxicity at step {LAST}", self.both(lambda run: run.at(LAST)), bound))
        print(statement(f"toxicity, mean over steps 0 to {LAST}", self.both(mean_by_step), bound))
        print(statement("toxicity, mean over the seconds of the faster", self.both(mean_by_second), bound))
        print(statement("toxicity of the kept policy", self.both(lambda run: self.kept[run]["toxicity"]), bound))
        print(statement(f"facts lost at step {LAST}", self.both(lambda run: 1 - run.at(LAST, "quality")), MARGIN))
        kept_losses = self.both(lambda run: 1 - self.kept[run]["quality"])
        print(statement("facts lost by the kept policy", kept_losses, MARGIN))

        ratios = [everywhere / decoder for decoder, everywhere in zip(*seconds, strict=True)]
        times = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"- everywhere took {times} times the seconds of the decoder-only LoRA")

    def warn_of_disturbances(self) -> None:
        """Name on stderr the runs whose steps took very different times."""
        for run in self.all_runs:
            steps = run.seconds["step"]
            if steps.max() > 2 * np.median(steps):
                disturbed = f"{run.folder.name} was disturbed, a step took {steps.max():.1f} s"
                print(f"- not reliable: {disturbed}", file=sys.stderr)


def draw(runs: dict[str, list[Run]], target: Path) -> None:
    """Draw validation toxicity against step and seconds: each seed thin, the mean thick."""
    style: Any = STYLE | {"axes.grid": True, "grid.alpha": 0.2, "grid.linewidth": 0.6}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.5, 2.8), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for panel, axis in zip(axes, ("step", "seconds"), strict=True):
            for variant, variant_runs in runs.items():
                color = VARIANTS[variant][0]
                curves = np.array([[run.curve[axis], run.curve["toxicity"]] for run in variant_runs])
                for x, y in curves:
                    panel.plot(x, y, color=color, linewidth=0.6, alpha=0.5)
                panel.plot(*curves.mean(0), color=color, linewidth=1.8, label=variant)
            panel.set(
                xlabel="PPO step" if axis == "step" else "seconds of training steps", xlim=(0, None), ylim=(0, None)
            )
        axes[0].set_ylabel("validation toxicity")
        axes[0].legend(frameon=False, title="LoRA", alignment="left")
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, facecolor="white", metadata=NO_METADATA)


def warm_start(out: Path, seed: int) -> Path:
    """Return the run folder that makes the warm start of a seed."""
    return out / f"start{seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "train", "report"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--out", type=Path, default=Path("runs/decoder-only"), help="folder for the run folders")
    parser.add_argument("--figure", type=Path, default=Path("docs/decoder-only.svg"))
    options = parser.parse_args()
    runs = {variant: [Run(options.out, seed, variant) for seed in options.seeds] for variant in VARIANTS}

    if options.what == "prepare":
        for seed in options.seeds:
            make(warm_start(options.out, seed), ["--seed", str(seed)], ["sft"])
    elif options.what == "train":
        for number, seed in enumerate(options.seeds):
            flags = ["--seed", str(seed), "--policy.base", str(warm_start(options.out, seed) / "base")]
            flags += ["--sft.steps", "0"]
            variants = list(VARIANTS)
            for variant in variants if number % 2 == 0 else reversed(variants):
                _, own_flags = VARIANTS[variant]
                make(runs[variant][number].folder, [*flags, *own_flags], ["sft", "train"])
    else:
        for decoder, everywhere in zip(*runs.values(), strict=True):
            require_twins(decoder, everywhere)
        comparison = Comparison(runs)
        comparison.print_tables()
        comparison.print_conclusions()
        comparison.warn_of_disturbances()
        draw(runs, options.figure)


if __name__ == "__main__":
    main()
