"""Does a LoRA on the decoder alone, which reads each prompt once, learn as well as a LoRA everywhere?

    python benchmarks/decoder_only.py prepare    the warm start of each seed: four minutes each on 2 idle cores
    python benchmarks/decoder_only.py train      PPO from it, both LoRAs in turn: three to four minutes a seed
    python benchmarks/decoder_only.py report     Markdown on stdout, docs/decoder-only.svg

The quickstart with `policy.train_encoder` off (the default) and on, all else the same: dialogues, warm start, reward
model, draws. Toxicity is the primary judge's on the validation prompts, quality the facts kept there. Seconds are those
of training steps, without validation and checkpoints, so nothing else should run meanwhile. Finished folders stay as
they are, others are made anew: no clock runs across a stop. No network.
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
from step_results import STYLE

VARIANTS: dict[str, tuple[str, list[str]]] = {
    "decoder only": ("#0072B2", []), "everywhere": ("#D55E00", ["--policy.train-encoder"]),
}  # fmt: skip
STEPS, MOMENTS, LAST = (0, 5, 10, 15, 20, 30, 40, 60), (10, 20, 30, 60), 60
LAPS = ("sample", "score", "update")
SHARE, MARGIN = 0.2, 0.005
"""As well: not behind by a fifth of what the LoRA everywhere gains (docs/evaluation.md); facts: rl.quality_margin."""
Pair = tuple[list[float], list[float]]  # by seed: decoder only, everywhere


class Run:
    """One training."""

    def __init__(self, out: Path, seed: int, variant: str) -> None:
        self.folder, self.seed, self.variant = out / f"{variant.replace(' ', '-')}-seed{seed}", seed, variant

    def read(self, name: str) -> Any:
        text = (self.folder / name).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()] if name.endswith(".jsonl") else json.loads(text)

    @cached_property
    def seconds(self) -> dict[str, Any]:
        """Seconds of each step by stage; `step` is all but validation and checkpoint."""
        found = [{lap: line.get(f"seconds/{lap}", 0.0) for lap in ("step", "validate", "checkpoint", *LAPS)}
                 for line in self.read("metrics.jsonl")]  # fmt: skip
        laps = {lap: np.array([one[lap] for one in found]) for lap in found[0]}
        return laps | {"step": laps["step"] - laps["validate"] - laps["checkpoint"]}

    @cached_property
    def curve(self) -> dict[str, Any]:
        """What each validation found, and after how many seconds of training."""
        lines = self.read("validation.jsonl")
        found = {name: np.array([line[name] for line in lines]) for name in lines[0]}
        return found | {"seconds": np.append(0.0, self.seconds["step"].cumsum())[found["step"]]}

    def at(self, where: float, name: str = "toxicity", axis: str = "step") -> float:
        """Return what was found at a step or second, by a straight line between validations."""
        return float(np.interp(where, self.curve[axis], self.curve[name]))

    def halved(self, axis: str) -> float:
        """Return the step or second from which on toxicity is at most half the start's (nan: never)."""
        grid = np.linspace(0, self.curve[axis][-1], 1001)
        return next((float(x) for x in grid if self.at(x, axis=axis) <= self.at(0) / 2), float("nan"))


def make(folder: Path, flags: Sequence[str], stages: Sequence[str]) -> None:
    """Prepare a run folder and run stages in it, unless the last of them is finished."""
    done = folder / "seconds.json"
    if done.is_file() and stages[-1] in json.loads(done.read_text()):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    prepare = ["prepare", "quickstart", *flags, "--sft.baseline-steps", "0", "--overwrite", "--run-dir", str(folder)]
    with folder.with_suffix(".log").open("w") as log:
        for command in (prepare, *([stage, str(folder)] for stage in stages)):
            if code := subprocess.run([sys.executable, "-m", "detoxrl", *command], stdout=log, stderr=log).returncode:
                sys.exit(f"`detoxrl {' '.join(command)}` ended with exit code {code}; see {log.name}")
    print(f"{folder}: {json.loads(done.read_text())}", file=sys.stderr, flush=True)


def require_twins(one: Run, other: Run) -> None:
    """Exit where two runs differ in more than what trains: config, prompts, reward model, its scale, the start."""
    configs = [run.read("config.json") for run in (one, other)]
    trains = [config["policy"].pop("train_encoder") for config in configs]
    starts = [{name: value[0] for name, value in run.curve.items() if name != "kl"} for run in (one, other)]
    same = [
        content_digest(one.folder / name) == content_digest(other.folder / name)
        for name in ("data", "reward", "normaliser.json")
    ]
    if configs[0] != configs[1] or trains != [False, True] or starts[0] != starts[1] or not all(same):
        sys.exit(f"{one.folder} and {other.folder} differ in more than policy.train_encoder: {same}, {starts}")


def difference(pair: Pair) -> tuple[float, float, list[float]]:
    """Return the mean difference of pairs, half of Student's 95 % interval (infinity for one pair), and each."""
    found = [a - b for a, b in zip(*pair, strict=True)]
    count, half = len(found), float("inf")
    if count > 1:
        half = float(student.ppf(0.975, count - 1) * np.std(found, ddof=1)) / count**0.5
    return float(np.mean(found)), half, found


def apart(pair: Pair) -> str:
    mean, half, _ = difference(pair)
    return f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"


def statement(what: str, pair: Pair, bound: float) -> str:
    """Say how the decoder alone stands in something that is better the lower it is."""
    mean, half, found = difference(pair)
    within = mean + half < bound
    if abs(mean) > half:
        verdict = "ahead" if mean < 0 else f"behind{f', by less than {bound:.3f}' if within else ''}"
    else:
        verdict = f"as well, within {bound:.3f}" if within else f"no difference found, {bound:.3f} not ruled out"
    seeds, (ours, theirs) = ", ".join(f"{one:+.3f}" for one in found), map(np.mean, pair)
    return f"- {what}: {ours:.3f} against {theirs:.3f}, {apart(pair)}; by seed {seeds}: {verdict}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}", *(f"| {' | '.join(row)} |" for row in rows), sep="\n")


def report(runs: dict[str, list[Run]], seeds: Sequence[int]) -> None:
    """Print the tables and what they come to."""
    every = [run for pair in zip(*runs.values(), strict=True) for run in pair]
    kept = {run: run.read("checkpoint.json")["kept"] for run in every}

    def both(of: Callable[[Run], float]) -> Pair:
        ours, theirs = ([of(run) for run in some] for some in runs.values())
        return ours, theirs

    def at_step(step: int) -> list[str]:
        toxicity, quality = both(lambda run: run.at(step)), both(lambda run: run.at(step, "quality"))
        cells = []
        for values in zip(toxicity, both(lambda run: run.at(step, "toxicity_error")), quality, strict=True):
            cells += [f"{np.mean(values[0]):.3f}, {np.mean(values[2]):.3f}"]
            cells += ["{:.3f} ± {:.3f}, {:.3f}".format(*seed) for seed in zip(*values, strict=True)]
        return [str(step), *cells, apart(toxicity)]

    def of_run(run: Run) -> list[str]:
        weights = sum(one.size for one in load_file(run.folder / "adapter/adapter_model.safetensors").values())
        medians = [f"{np.median(run.seconds[lap]):.3f}" for lap in ("step", *LAPS)]
        halved = [f"{run.halved(axis):.1f}" for axis in ("step", "seconds")]
        best = "{step}: {toxicity:.3f}, {quality:.3f}".format(**kept[run])
        return [str(run.seed), run.variant, f"{weights:,}", *medians, f"{run.at(LAST, 'seconds'):.1f}", *halved, best]

    def at_second(clock: str, step: int) -> list[str]:
        when = {run.seed: run.at(step, "seconds") for run in runs[clock]}
        toxicity = both(lambda run: run.at(when[run.seed], axis="seconds"))
        steps = both(lambda run: run.at(when[run.seed], "step", "seconds"))
        cells = [f"{np.mean(t):.3f} at step {np.mean(s):.1f}" for t, s in zip(toxicity, steps, strict=True)]
        return [f"{clock}, step {step}", f"{np.mean(list(when.values())):.1f}", *cells, apart(toxicity)]

    heads = [f"{variant}, {of}" for variant in runs for of in ("mean", *(f"seed {seed}" for seed in seeds))]
    table(["step: toxicity ± error, quality", *heads, "toxicity, difference"], map(at_step, STEPS))
    heads = ["seed", "LoRA", "weights", "s / step, median", *LAPS, "s in all", "halved at step", "at second", "kept"]
    table(heads, map(of_run, every))
    moments = (at_second(clock, step) for clock in runs for step in MOMENTS)
    table(["the seconds of", "s, mean", *runs, "toxicity, difference"], moments)

    grid, faster = (
        np.linspace(0, 1, 601),
        dict(zip(seeds, map(min, *both(lambda run: run.at(LAST, "seconds"))), strict=True)),
    )
    by_step = both(lambda run: float(np.mean([run.at(x * LAST) for x in grid])))
    by_second = both(lambda run: float(np.mean([run.at(x * faster[run.seed], axis="seconds") for x in grid])))
    bound = SHARE * float(np.mean(both(lambda run: run.at(0) - run.at(LAST))[1]))
    print(f"\n{' less '.join(runs)}, paired by seed, Student's 95 % over {len(seeds)}:\n")
    print(statement(f"toxicity at step {LAST}", both(lambda run: run.at(LAST)), bound))
    print(statement(f"toxicity, mean over steps 0 to {LAST}", by_step, bound))
    print(statement("toxicity, mean over the seconds of the faster", by_second, bound))
    print(statement("toxicity of the kept policy", both(lambda run: kept[run]["toxicity"]), bound))
    print(statement(f"facts lost at step {LAST}", both(lambda run: 1 - run.at(LAST, "quality")), MARGIN))
    print(statement("facts lost by the kept policy", both(lambda run: 1 - kept[run]["quality"]), MARGIN))
    for run in every:
        steps = run.seconds["step"]
        if steps.max() > 2 * np.median(steps):
            print(
                f"- not to be trusted: {run.folder.name} was disturbed, a step took {steps.max():.1f} s",
                file=sys.stderr,
            )
    times = [b / a for a, b in zip(*both(lambda run: run.at(LAST, "seconds")), strict=True)]
    print(f"- everywhere took {', '.join(f'{one:.2f}' for one in times)} times the seconds of the decoder alone")


def draw(runs: dict[str, list[Run]], target: Path) -> None:
    """Draw validation toxicity against step and seconds: seeds thin, their mean thick."""
    style: Any = STYLE | {"axes.grid": True, "grid.alpha": 0.2, "grid.linewidth": 0.6}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.5, 2.8), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for panel, axis in zip(axes, ("step", "seconds"), strict=True):
            for variant, some in runs.items():
                color = VARIANTS[variant][0]
                curves = np.array([[run.curve[axis], run.curve["toxicity"]] for run in some])
                for x, y in curves:
                    panel.plot(x, y, color=color, linewidth=0.6, alpha=0.5)
                panel.plot(*curves.mean(0), color=color, linewidth=1.8, label=variant)
            panel.set(
                xlabel="PPO step" if axis == "step" else "seconds of training steps", xlim=(0, None), ylim=(0, None)
            )
        axes[0].set_ylabel("validation toxicity")
        axes[0].legend(frameon=False, title="LoRA", alignment="left")
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, facecolor="white", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "train", "report"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--out", type=Path, default=Path("runs/decoder-only"), help="where the run folders go")
    parser.add_argument("--figure", type=Path, default=Path("docs/decoder-only.svg"))
    options = parser.parse_args()
    runs = {variant: [Run(options.out, seed, variant) for seed in options.seeds] for variant in VARIANTS}
    for at, seed in enumerate(options.seeds):
        start = options.out / f"start{seed}"
        if options.what == "prepare":
            make(start, ["--seed", str(seed)], ["sft"])
        elif options.what == "train":
            for variant in list(VARIANTS)[:: -1 if at % 2 else 1]:  # every other seed the other way round
                flags = ["--seed", str(seed), "--policy.base", str(start / "base"), "--sft.steps", "0"]
                make(runs[variant][at].folder, [*flags, *VARIANTS[variant][1]], ["sft", "train"])
        else:
            require_twins(*(some[at] for some in runs.values()))
    if options.what == "report":
        report(runs, options.seeds)
        draw(runs, options.figure)


if __name__ == "__main__":
    main()
