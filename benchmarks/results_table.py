"""What did runs of one recipe with several seeds come to? Prints the README's table.

for seed in 0 1 2; do detoxrl run quickstart --seed $seed --run-dir runs/seed$seed; done
python benchmarks/results_table.py runs/seed0 runs/seed1 runs/seed2
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROWS = {
    "facts": "facts kept, with roles",
    "quarrel_reported": "quarrel still reported",
    "insult_rate": "with an insult the reward model knew",
    "insult_rate_unseen": "with an insult kept from it",
    "rouge_l": "ROUGE-L to the civil reference",
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


if __name__ == "__main__":
    main(sys.argv[1:])
