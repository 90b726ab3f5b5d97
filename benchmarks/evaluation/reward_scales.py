"""What does the scale of the score do to PPO: logit, log-odds, log-probability, probability, raw or normalised?

    python benchmarks/reward_scales.py --seeds 0     some 30 minutes on 2 idle cores a seed; no network

runs the quickstart once for each score, raw (reward.normalise_on 0) and normalised (as the recipe has it), all else
equal, then all of it again with a lenient reward model: the same weights, with the log-odds of its good label raised
by a constant, so that it says civil of nearly everything and its probabilities lie close to 1. Three more runs of that
model's raw probability part the causes: with a KL coefficient as small as the score, without a critic, with both.
Finished runs are not run again, interrupted ones go on. Draws docs/reward-scales.svg and prints two tables: what came,
and how far the scores spread over responses of the start.
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
from detoxrl.rewards.classifier import class_scores, load_classifier
from detoxrl.runtime.files import replace_folder

# Okabe and Ito's colours, and dashes beside them; `not_toxicity` of two labels is `probability`, so it lies on it.
SCORES: dict[str, tuple[str, Any]] = {
    "logit": ("#0072B2", "-"),
    "log_odds": ("#009E73", (0, (5, 1.5))),
    "log_probability": ("#E69F00", "-"),
    "probability": ("#D55E00", "-"),
    "not_toxicity": ("#000000", (0, (1, 2))),
}
JUDGE, LABELS = "alt-profanity-check", {"reward.toxic_label": "hate", "reward.good_label": "nothate"}
# What makes a raw probability of a lenient model starve: the weight of the KL, the critic's error, or both?
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
    """One training: how much leniency the reward model got (0: none), which score of it, normalised or not, seed."""

    root: Path
    shift: float
    score: str
    normalised: bool
    seed: int
    cause: str = ""

    @property
    def model(self) -> str:
        return f"the same, lenient: log-odds + {self.shift:g}" if self.shift else "the recipe's reward model"

    @property
    def place(self) -> Path:
        return self.root / (f"lenient-{self.shift:g}" if self.shift else "recipe")

    @property
    def classifier(self) -> Path:
        return self.place / f"classifier-seed{self.seed}" if self.shift else self.folder / "reward"

    @property
    def folder(self) -> Path:
        kind = "normalised" if self.normalised else "raw"
        return self.place / "-".join(word for word in (self.score, kind, self.cause, f"seed{self.seed}") if word)

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text(encoding="utf-8").splitlines()]

    def read(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / name).read_text(encoding="utf-8"))
        return found


def make_lenient(classifier: Path, place: Path, shift: float) -> None:
    """Write the classifier with the log-odds of its good label raised, half by either label, so no logit is lost."""
    if place.is_dir():
        return
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    with torch.no_grad():
        model.classifier.out_proj.bias += shift * torch.tensor([0.5, -0.5])  # (nothate, hate)
    with replace_folder(place) as temporary:
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(classifier).save_pretrained(temporary)


def finish(run: Run) -> None:
    """Run the quickstart to its end, or what is left of it."""
    settings = CHEAP | {"seed": run.seed, "reward.score": run.score}
    settings |= {"reward.normalise_on": NORMALISE_ON if run.normalised else 0}
    settings |= {"reward.classifier": str(run.classifier.resolve())} if run.shift else {}
    if run.cause in ("kl", "both"):  # as weak against the score as normalising makes it
        spread = run._replace(cause="").lines("metrics.jsonl")[0]["score/std"]
        settings |= {"rl.kl_coef": float(f"{recipe('quickstart').rl.kl_coef * spread:.2g}")}
    settings |= {"rl.value_lr": 1e-12} if run.cause in ("critic", "both") else {}  # it stays at 0
    known = run.folder / "config.json"
    if known.is_file() and config_from_json(known) != with_settings(recipe("quickstart"), settings):
        sys.exit(f"{run.folder} was run with other settings: remove it, or give another --out")
    if (run.folder / "report.html").is_file():
        return
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    resume = ["--resume"] if known.is_file() else []
    command = ["run", "quickstart", *flags, *resume, "--run-dir", str(run.folder)]
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    began, log = time.perf_counter(), run.folder.with_suffix(".log")
    with log.open("w") as out:
        code = subprocess.run([sys.executable, "-m", "detoxrl", *command], stdout=out, stderr=out).returncode
    if code:
        sys.exit(f"{run.folder} ended with exit code {code}; see {log}")
    print(f"{run.folder}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def result_row(run: Run) -> str:
    """Return what came of a run as a row of the first table."""
    steps, curve, evaluation = run.lines("metrics.jsonl"), run.lines("validation.jsonl"), run.read("eval.json")
    toxicity, insults = evaluation["toxicity"][JUDGE], evaluation["quality"]["insult_rate"]
    difference, spread = toxicity["difference"], steps[0]["score/std"]
    halved = next((str(at["step"]) for at in curve if at["toxicity"] <= curve[0]["toxicity"] / 2), "never")
    weight = steps[0]["kl_coef"] * run.read("normaliser.json")["std"] / spread
    cells = [
        run.score + CAUSES[run.cause],
        "yes" if run.normalised else "no",
        str(run.seed),
        f"{spread:.3g}",
        f"{weight:.2g}",
        halved,
        f"{statistics.fmean(step['kl/reference'] for step in steps[-10:]):.2f}",
        f"{steps[5]['value/explained_variance']:.2g}",
        f"{toxicity['after']['mean']:.3f} ({difference['mean']:+.3f}, {difference['low']:+.3f} to "
        f"{difference['high']:+.3f})",
        f"{insults['before']:.3f} → {insults['after']:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


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
    """Print how far each score spreads over the held-out responses of the start, with and without an insult."""
    has_insult = insult_pattern()
    print("\nHeld-out responses of the start; mean ± std of each score\n")
    print("| reward model | seed | score | all | with an insult | without |\n|---|---|---|---|---|---|")
    for run in {(run.model, run.seed): run for run in runs}.values():
        texts = [text for line in run.lines("samples.jsonl") for text in line["responses"]["before"]]
        insulting = torch.tensor([has_insult.search(text) is not None for text in texts])
        classifier = load_classifier(str(run.classifier), "reward.classifier", LABELS, torch.device("cpu"))
        assert classifier.good is not None
        logits = classifier.logits(texts)
        for score in SCORES:
            values = class_scores(logits, score, classifier.toxic, classifier.good, classifier.several)
            parts = [values, values[insulting], values[~insulting]]
            shown = " | ".join(f"{float(part.mean()):.4g} ± {float(part.std()):.2g}" for part in parts)
            print(f"| {run.model} | {run.seed} | {score} | {shown} |")


def draw(runs: Sequence[Run], target: Path) -> None:
    """Draw validation toxicity by step, raw scores left and normalised ones right, a row for each reward model."""
    models = list(dict.fromkeys(run.model for run in runs))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 0.5 + 2.7 * len(models)), layout="constrained")
        panels = figure.subplots(len(models), 2, sharex=True, sharey=True, squeeze=False)
        for model, row in zip(models, panels, strict=True):
            for normalised, axes in zip((False, True), row, strict=True):
                here = [run for run in runs if (run.model, run.normalised) == (model, normalised)]
                _panel(axes, here)
                kind = "Normalised scores" if normalised else "Raw scores (in brackets: std over the first rollout)"
                axes.set_title(f"{kind}\n{model}")
            row[0].set_ylabel("validation toxicity")
        for axes in panels[-1]:
            axes.set_xlabel("PPO step")
        target.parent.mkdir(parents=True, exist_ok=True)
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(target, facecolor="white", metadata=no_metadata)


def _panel(axes: Axes, runs: Sequence[Run]) -> None:
    """Draw a line for each score, the mean over seeds, and each seed beneath it; name it at its end."""
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
    """Return ascending values so moved that `gap` lies between neighbours, their middle where it was if above 0."""
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
        if not (shift and score == "not_toxicity")  # to the bit what `probability` gives, so once is enough to show it
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
