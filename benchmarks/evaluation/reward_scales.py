"""How does the scale of the score affect PPO: logit, log-odds, log-probability or probability, raw or normalised?

    python benchmarks/evaluation/reward_scales.py --seeds 0     about 30 minutes per seed on 2 idle cores; no network

It runs the quickstart once for each score, raw (reward.normalise_on = 0) and normalised (as in the recipe), with all
else equal. Then it does so again with a lenient reward model: the same weights with a constant added to the log-odds of
the good label, so that it calls nearly everything civil and its probabilities are close to 1. Three further runs with
the raw probability of that model separate the causes: a KL coefficient as small as the score, no critic, and both.
Finished runs are kept and interrupted ones are resumed. It draws docs/reward-scales.svg and prints two tables: the
results, and the spread of each score over responses of the initial policy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from detoxrl.config.edit import config_from_json, with_settings
from detoxrl.config.recipes import recipe
from detoxrl.data.embedded.phrases import insult_pattern
from detoxrl.rewards.classifier import class_scores, is_multi_label, load_classifier
from detoxrl.runtime.files import replace_folder

# Colours of Okabe and Ito, and dashes. With two labels `not_toxicity` equals `probability`, so its line covers that.
SCORES: dict[str, tuple[str, Any]] = {
    "logit": ("#0072B2", "-"),
    "log_odds": ("#009E73", (0, (5, 1.5))),
    "log_probability": ("#E69F00", "-"),
    "probability": ("#D55E00", "-"),
    "not_toxicity": ("#000000", (0, (1, 2))),
}
JUDGE = "alt-profanity-check"
TOXIC = {"reward.toxic_label": "hate"}
GOOD = {"reward.good_label": "nothate"}
# Why the raw probability of a lenient model does not learn: the weight of the KL, the error of the critic, or both.
CAUSES = {"": "", "kl": ", KL coefficient x std", "critic": ", no critic", "both": ", KL coefficient x std, no critic"}
CHEAP = {"evaluation.prompts": 200, "evaluation.samples_per_prompt": 2, "sft.baseline_steps": 0}
NORMALISE_ON = recipe("quickstart").reward.normalise_on
STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "detoxrl", "font.family": "sans-serif", "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "axes.titlesize": 9,
    "axes.titlelocation": "left", "axes.grid": True, "grid.alpha": 0.2, "grid.linewidth": 0.6, "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}  # fmt: skip


class Run(NamedTuple):
    """One run: the leniency of its reward model (0: none), the score, normalised or not, the seed, and a cause."""

    root: Path
    shift: float
    score: str
    normalised: bool
    seed: int
    cause: str = ""

    @property
    def model(self) -> str:
        """What the tables call the reward model."""
        return f"the same, lenient: log-odds + {self.shift:g}" if self.shift else "the recipe's reward model"

    @property
    def parent(self) -> Path:
        """The folder of all runs with this reward model."""
        return self.root / (f"lenient-{self.shift:g}" if self.shift else "recipe")

    @property
    def classifier(self) -> Path:
        """The folder of the reward model."""
        return self.parent / f"classifier-seed{self.seed}" if self.shift else self.folder / "reward"

    @property
    def folder(self) -> Path:
        """The run folder."""
        kind = "normalised" if self.normalised else "raw"
        parts = [self.score, kind, self.cause, f"seed{self.seed}"]
        return self.parent / "-".join(part for part in parts if part)

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text(encoding="utf-8").splitlines()]

    def read(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / name).read_text(encoding="utf-8"))
        return content


def make_lenient(classifier: Path, target: Path, shift: float) -> None:
    """Write a copy of the classifier whose log-odds of the good label are higher by `shift`, half of it per label."""
    if target.is_dir():
        return
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    with torch.no_grad():
        model.classifier.out_proj.bias += shift * torch.tensor([0.5, -0.5])  # (nothate, hate)
    with replace_folder(target) as temporary:
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(classifier).save_pretrained(temporary)


def settings_of(run: Run) -> dict[str, Any]:
    """Return the settings in which the run differs from the quickstart."""
    settings: dict[str, Any] = {
        **CHEAP,
        "seed": run.seed,
        "rl.algorithm": "ppo",  # One of the questions is what an offset does to a critic.
        "reward.score": run.score,
        "reward.normalise_on": NORMALISE_ON if run.normalised else 0,
    }
    if run.shift:
        settings["reward.classifier"] = str(run.classifier.resolve())
    if run.cause in ("kl", "both"):
        # As weak against the score as normalising makes it.
        spread = run._replace(cause="").lines("metrics.jsonl")[0]["score/std"]
        settings["rl.kl_coef"] = float(f"{recipe('quickstart').rl.kl_coef * spread:.2g}")
    if run.cause in ("critic", "both"):
        # The value head stays at 0.
        settings["rl.value_lr"] = 1e-12
    return settings


def finish(run: Run) -> None:
    """Run the quickstart with the settings of the run, or resume it, unless it is finished."""
    settings = settings_of(run)
    config = run.folder / "config.json"
    if config.is_file() and config_from_json(config) != with_settings(recipe("quickstart"), settings):
        sys.exit(f"{run.folder} was run with other settings: remove it, or choose another --out")
    if (run.folder / "report.html").is_file():
        return

    command = ["run", "quickstart", "--run-dir", str(run.folder)]
    for name, value in settings.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    if config.is_file():
        command.append("--resume")

    run.folder.parent.mkdir(parents=True, exist_ok=True)
    log = run.folder.with_suffix(".log")
    began = time.perf_counter()
    with log.open("w") as out:
        code = subprocess.run([sys.executable, "-m", "detoxrl", *command], stdout=out, stderr=out).returncode
    if code:
        sys.exit(f"{run.folder} ended with exit code {code}; see {log}")
    print(f"{run.folder}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def result_row(run: Run) -> str:
    """Return the result of a run as a row of the first table."""
    steps = run.lines("metrics.jsonl")
    evaluation = run.read("eval.json")
    toxicity = evaluation["toxicity"][JUDGE]
    insults = evaluation["quality"]["insult_rate"]
    difference = toxicity["difference"]
    interval = "initial policy kept"
    if difference is not None:
        interval = f"{difference['mean']:+.3f}, {difference['low']:+.3f} to {difference['high']:+.3f}"

    spread = steps[0]["score/std"]
    weight = steps[0]["kl_coef"] * run.read("normaliser.json")["classifier"]["std"] / spread
    cells = [
        run.score + CAUSES[run.cause],
        "yes" if run.normalised else "no",
        str(run.seed),
        f"{spread:.3g}",
        f"{weight:.2g}",
        halved_at(run),
        f"{statistics.fmean(step['kl/reference'] for step in steps[-10:]):.2f}",
        f"{steps[5]['value/explained_variance']:.2g}",
        f"{toxicity['after']['mean']:.3f} ({interval})",
        f"{insults['before']:.3f} → {insults['after']:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def halved_at(run: Run) -> str:
    """Return the first validated step at which toxicity is at most half of that at step 0, or `never`."""
    validations = run.lines("validation.jsonl")
    for validation in validations:
        if validation["toxicity"] <= validations[0]["toxicity"] / 2:
            return str(validation["step"])
    return "never"


def print_results(runs: Sequence[Run]) -> None:
    """Print the first table, a part for each reward model."""
    heads = ["score", "normalised", "seed", "std over the first rollout", "`kl_coef` / std that PPO sees",
             "step by which validation toxicity had halved", "KL, last 10 steps", "explained variance, step 5",
             "toxicity after (difference, 95 % interval)", "insult rate"]  # fmt: skip
    for model in dict.fromkeys(run.model for run in runs):
        print(f"\nReward model: {model}\n\n| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
        for run in runs:
            if run.model == model:
                print(result_row(run))


def print_spreads(runs: Sequence[Run]) -> None:
    """Print the spread of each score over held-out responses of the initial policy, with and without an insult."""
    has_insult = insult_pattern()
    print("\nHeld-out responses of the initial policy; mean ± std of each score\n")
    print("| reward model | seed | score | all | with an insult | without |\n|---|---|---|---|---|---|")
    for run in {(run.model, run.seed): run for run in runs}.values():
        texts = [text for line in run.lines("samples.jsonl") for text in line["responses"]["before"]]
        insulting = torch.tensor([has_insult.search(text) is not None for text in texts])
        classifier = load_classifier(str(run.classifier), "reward.classifier", TOXIC, torch.device("cpu"), GOOD)
        assert classifier.good is not None
        logits = classifier.logits(texts)
        multi_label = is_multi_label(classifier.model.config)
        for score in SCORES:
            values = class_scores(logits, score, classifier.toxic, classifier.good, multi_label)
            parts = [values, values[insulting], values[~insulting]]
            shown = " | ".join(f"{float(part.mean()):.4g} ± {float(part.std()):.2g}" for part in parts)
            print(f"| {run.model} | {run.seed} | {score} | {shown} |")


def draw(runs: Sequence[Run], target: Path) -> None:
    """Draw validation toxicity by step: raw scores left, normalised ones right, one row for each reward model."""
    models = list(dict.fromkeys(run.model for run in runs))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 0.5 + 2.7 * len(models)), layout="constrained")
        panels = figure.subplots(len(models), 2, sharex=True, sharey=True, squeeze=False)
        for model, row in zip(models, panels, strict=True):
            for normalised, axes in zip((False, True), row, strict=True):
                _panel(axes, [run for run in runs if (run.model, run.normalised) == (model, normalised)])
                kind = "Normalised scores" if normalised else "Raw scores (in brackets: std over the first rollout)"
                axes.set_title(f"{kind}\n{model}")
            row[0].set_ylabel("validation toxicity")
        for axes in panels[-1]:
            axes.set_xlabel("PPO step")
        target.parent.mkdir(parents=True, exist_ok=True)
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(target, facecolor="white", metadata=no_metadata)


def _panel(axes: Axes, runs: Sequence[Run]) -> None:
    """Draw the mean over seeds of each score with its name at the end, and a thin line for each seed."""
    ends = {}
    for score, (color, dashes) in SCORES.items():
        curves = [run.lines("validation.jsonl") for run in runs if run.score == score]
        if not curves:
            continue
        steps = [at["step"] for at in curves[0]]
        values = np.array([[at["toxicity"] for at in curve] for curve in curves])
        for seed in values if len(curves) > 1 else ():
            axes.plot(steps, seed, color=color, linewidth=0.6, alpha=0.4)
        axes.plot(steps, values.mean(0), color=color, linestyle=dashes, linewidth=1.7)
        ends[score] = float(values.mean(0)[-1])
    axes.set_ylim(0, 0.3)
    last = axes.get_lines()[0].get_xdata()[-1]
    axes.set_xlim(-1, last * 1.75)
    axes.set_xticks(range(0, last + 1, 10))
    axes.spines["bottom"].set_bounds(-1, last)
    order = sorted(ends, key=lambda score: ends[score])
    heights = _apart([ends[score] for score in order], 0.024)
    for score, height in zip(order, heights, strict=True):
        spread = statistics.fmean(run.lines("metrics.jsonl")[0]["score/std"] for run in runs if run.score == score)
        label = score + ("" if runs[0].normalised else f" ({spread:.3g})")
        axes.plot([last, last * 1.08], [ends[score], height], color=SCORES[score][0], linewidth=0.8)
        axes.text(last * 1.1, height, label, va="center", fontsize=8)


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """Return ascending values moved at least `gap` apart, around the same mean unless that would leave the axis."""
    moved = [values[0]]
    for value in values[1:]:
        moved.append(max(value, moved[-1] + gap))
    down = min(statistics.fmean(moved) - statistics.fmean(values), moved[0] - gap / 2)
    return [value - down for value in moved]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED")
    parser.add_argument("--scores", nargs="+", choices=SCORES, default=list(SCORES), metavar="SCORE")
    parser.add_argument("--lenient", type=float, default=8.0, metavar="NATS", help="0: the recipe's reward model only")
    parser.add_argument("--out", type=Path, default=Path("runs/scales"), help="where the run folders go")
    parser.add_argument("--figure", type=Path, default=Path("docs/reward-scales.svg"))
    options = parser.parse_args()
    runs = [
        Run(options.out, shift, score, normalised, seed)
        for shift in dict.fromkeys((0.0, options.lenient))
        for seed in options.seeds
        for score in options.scores
        for normalised in (False, True)
        if not (shift and score == "not_toxicity")  # bit-identical with `probability`; one model is enough to show it
    ]
    starving = [run for run in runs if run.shift and run.score == "probability" and not run.normalised]
    causes = [run._replace(cause=cause) for run in starving for cause in CAUSES if cause]
    for run in (*runs, *causes):
        if run.shift:
            embedded = run._replace(shift=0.0, score=options.scores[0], normalised=False, cause="")
            make_lenient(embedded.classifier, run.classifier, run.shift)
        finish(run)
    draw(runs, options.figure)
    print_results([*runs, *causes])
    print_spreads(runs)


if __name__ == "__main__":
    main()
