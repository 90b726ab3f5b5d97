"""What did runs of one recipe with several seeds come to? Prints the README's table, and that of the baselines.

for seed in 0 1 2; do detoxrl run quickstart --seed $seed --run-dir runs/seed$seed; done
python benchmarks/results_table.py runs/seed0 runs/seed1 runs/seed2
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

BASELINES = {
    "word_filter": "word filter",
    "best_of_4": "best of 4 by the reward",
    "best_of_16": "best of 16 by the reward",
    "sft_civil": "supervised on civil references",
    "sft_best_of_4": "supervised on the best of 4",
}
ROWS = {
    "facts": "facts kept, with roles",
    "quarrel_reported": "quarrel still reported",
    "insult_rate": "with an insult the reward model knew",
    "insult_rate_unseen": "with an insult kept from it",
    "rouge_l": "ROUGE-L to the civil reference",
    "similarity": "similarity (chrF) to another response of the start",
    "distinct_2": "distinct word pairs of a prompt's samples",
    "length": "words per response",
    "empty_rate": "empty responses",
}


def cell(result: dict[str, Any], baseline: float) -> str:
    """Return before, after, the difference with its interval, and the supervised baseline."""
    change, digits = result["difference"], 1 if result["before"] > 2 else 3
    before, after, base, low, high = (
        f"{v:.{digits}f}" for v in (result["before"], result["after"], baseline, change["low"], change["high"])
    )
    return f"{before} → {after} ({low} to {high}); {base}"


def main(folders: list[str]) -> None:
    """Print one column a run."""
    found = [json.loads((Path(folder) / "eval.json").read_text(encoding="utf-8")) for folder in folders]
    print("| | " + " | ".join(f"seed {i}" for i in range(len(found))) + " |")
    print("|---|" + "---|" * len(found))
    for judge in found[0]["toxicity"]:
        cells, removed = [], []
        for one in found:
            result = one["toxicity"][judge]
            flat = result | {side: result[side]["mean"] for side in ("before", "after")}
            cells.append(cell(flat, one["baselines"]["sft_civil"]["toxicity"][judge]["after"]["mean"]))
            removed.append(f"{result['share_removed']:.0%}, floor {result['floor']:.3f}")
        print(f"| mean toxicity, {judge} | " + " | ".join(cells) + " |")
        print("| share removed above the floor | " + " | ".join(removed) + " |")
    for name, label in ROWS.items():
        cells = [cell(one["quality"][name], one["baselines"]["sft_civil"]["quality"][name]["after"]) for one in found]
        print(f"| {label} | " + " | ".join(cells) + " |")
    baselines(found)


def baselines(found: list[dict[str, Any]]) -> None:
    """Print toxicity, facts and the verdict on "after" of each baseline, a column a run."""
    print("\n| | " + " | ".join(f"seed {i}" for i in range(len(found))) + " |")
    print("|---|" + "---|" * len(found))
    judge = found[0]["primary_judge"]
    sides = [(one["toxicity"][judge], one["quality"]["facts"]) for one in found]
    for side in ("before", "after"):
        cells = [f"{toxicity[side]['mean']:.3f}, {facts[side]:.3f}" for toxicity, facts in sides]
        print(f"| {'start' if side == 'before' else 'PPO'} | " + " | ".join(cells) + " |")
    for name, label in BASELINES.items():
        cells = []
        for one in found:
            beside = one["baselines"][name]["after"]
            civil, kept, change = beside["toxicity"], beside["quality"], beside["toxicity"]["difference"]
            interval = f"{change['mean']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})"
            cells.append(f"{civil['before']:.3f}, {kept['before']:.3f}; {interval}, {beside['verdict']}")
        print(f"| {label} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
