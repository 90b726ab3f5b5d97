"""What did runs of one recipe with several seeds reach? Prints a table of results, and one of the baselines.

for seed in 0 1 2; do detoxrl run quickstart --seed $seed --run-dir runs/seed$seed; done
python benchmarks/evaluation/results_table.py runs/seed0 runs/seed1 runs/seed2
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Evaluation = dict[str, Any]  # an eval.json

BASELINES = {
    "word_filter": "word filter",
    "sharpened": "initial policy at the temperature of equal entropy",
    "best_of_4": "best of 4 by the reward",
    "best_of_16": "best of 16 by the reward",
    "sft_civil": "supervised on civil references",
    "sft_best_of_4": "supervised on the best of 4",
    "dpo_best_and_worst": "DPO on the best and worst of 4",
}
METRICS = {
    "facts": "facts kept, with roles",
    "quarrel_reported": "quarrel still reported",
    "insult_rate": "with an insult the reward model knew",
    "insult_rate_unseen": "with an insult kept from it",
    "rouge_l": "ROUGE-L to the civil reference",
    "similarity": "similarity (chrF) to another response of the initial policy",
    "distinct_2": "distinct word pairs of a prompt's samples",
    "nll": "nats per token under the initial policy",
    "entropy": "entropy, nats per token",
    "length": "words per response",
    "empty_rate": "empty responses",
}


def print_row(label: str, cells: Sequence[str]) -> None:
    print(f"| {label} | " + " | ".join(cells) + " |")


def print_head(columns: int) -> None:
    print("| | " + " | ".join(f"seed {seed}" for seed in range(columns)) + " |")
    print("|---|" + "---|" * columns)


def cell(result: dict[str, Any], supervised: float | None) -> str:
    """Return before and after, the interval of their difference, and the value of the supervised baseline, if any."""
    digits = 1 if result["before"] > 5 else 3
    behind = "" if supervised is None else f"; {supervised:.{digits}f}"
    difference = result["difference"]
    if difference is None:
        return f"{result['before']:.{digits}f}, initial policy kept{behind}"

    values = (result["before"], result["after"], difference["low"], difference["high"])
    before, after, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{before} → {after} ({low} to {high}){behind}"


def supervised_baseline(evaluation: Evaluation) -> dict[str, Any] | None:
    """Return the baseline that was fine-tuned on civil references, None in a recipe without one."""
    baseline: dict[str, Any] | None = evaluation["baselines"].get("sft_civil")
    return baseline


def print_results(evaluations: Sequence[Evaluation]) -> None:
    """Print toxicity by each judge and quality, one column for each run."""
    print_head(len(evaluations))
    for judge in evaluations[0]["toxicity"]:
        toxicity_cells = []
        removed_cells = []
        for evaluation in evaluations:
            result = evaluation["toxicity"][judge]
            means = {
                "before": result["before"]["mean"],
                "after": result["after"]["mean"],
                "difference": result["difference"],
            }
            baseline = supervised_baseline(evaluation)
            supervised = None if baseline is None else baseline["toxicity"][judge]["after"]["mean"]
            toxicity_cells.append(cell(means, supervised))
            removed = "–" if result["share_removed"] is None else f"{result['share_removed']:.0%}"
            removed_cells.append(f"{removed}, floor {result['floor']:.3f}")
        print_row(f"mean toxicity, {judge}", toxicity_cells)
        print_row("share removed above the floor", removed_cells)

    for name, label in METRICS.items():
        cells = []
        for evaluation in evaluations:
            if name in evaluation["quality"]:
                baseline = supervised_baseline(evaluation)
                known = {} if baseline is None else baseline["quality"].get(name, {})
                cells.append(cell(evaluation["quality"][name], known.get("after")))
        if len(cells) == len(evaluations):
            print_row(label, cells)


def print_baselines(evaluations: Sequence[Evaluation]) -> None:
    """Print toxicity, quality and the verdict on "after" for each baseline, one column for each run."""
    print()
    print_head(len(evaluations))
    for side, label in (("before", "initial policy"), ("after", "trained policy")):
        cells = []
        for evaluation in evaluations:
            toxicity = evaluation["toxicity"][evaluation["primary_judge"]]
            compared = next(iter(evaluation["baselines"].values()))["after"]["quality_by"]
            quality = evaluation["quality"][compared]
            cells.append(f"{toxicity[side]['mean']:.3f}, {quality[side]:.3f}")
        print_row(label, cells)

    for name, label in BASELINES.items():
        if any(name not in evaluation["baselines"] for evaluation in evaluations):
            continue
        print_row(label, [baseline_cell(evaluation["baselines"][name]["after"]) for evaluation in evaluations])


def baseline_cell(comparison: dict[str, Any]) -> str:
    """Return a baseline's toxicity and quality, then how much less toxic "after" is, and the verdict on it."""
    toxicity = comparison["toxicity"]
    quality = comparison["quality"]
    change = toxicity["difference"]
    interval = f"{change['mean']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})"
    return f"{toxicity['before']:.3f}, {quality['before']:.3f}; {interval}, {comparison['verdict']}"


def main(folders: Sequence[str]) -> None:
    evaluations = [json.loads((Path(folder) / "eval.json").read_text(encoding="utf-8")) for folder in folders]
    print_results(evaluations)
    print_baselines(evaluations)


if __name__ == "__main__":
    main(sys.argv[1:])
