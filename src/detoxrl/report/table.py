"""What does the table on screen say at the end of a run?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

_NAMES = {
    "score": "reward score",
    "facts": "facts kept, with roles",
    "quarrel_reported": "quarrel still reported",
    "rouge_l": "ROUGE-L to the reference",
    "length": "words per response",
    "empty_rate": "empty responses",
    "insult_rate": "with an insult the reward knew",
    "insult_rate_unseen": "with an insult kept from it",
}


def print_result(root: Path) -> None:
    """Print the comparison of a run's eval.json and where its products are."""
    found = json.loads((root / "eval.json").read_text(encoding="utf-8"))
    console = Console(highlight=False)
    console.print(_table(found))
    for judge, result in found["toxicity"].items():
        removed = result["share_removed"]
        share = f", {removed:.0%} of what could be removed" if removed is not None else ""
        independent = "" if judge == found["primary_judge"] else " (the reward itself: no independent judge)"
        console.print(f"{judge}: [bold]{result['verdict']}[/bold]{share}{independent}")
    seconds = json.loads((root / "seconds.json").read_text(encoding="utf-8"))
    timings = ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
    console.print(f"\n{sum(seconds.values()):.0f} s in all: {timings}")
    # A model that was only evaluated has no adapter of ours.
    adapter = f"adapter: {root / 'adapter'}   " if (root / "adapter").is_dir() else ""
    console.print(f"{adapter}report: {root / 'report.html'}   numbers: {root / 'eval.json'}")
    console.print(f"sheets: {root / 'samples.csv'}   for blind raters: {root / 'blind_sheet.csv'}")
    console.print(f"next: open {root / 'report.html'} in a browser")


def _table(found: dict[str, Any]) -> Table:
    title = f"{found['n_prompts']} held-out prompts, {found['samples_per_prompt']} samples each"
    caption = "change: after minus before, with its 95 % paired bootstrap interval"
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD)
    table.add_column("")
    for name in ("before", "after", "change", "interval", *found["baselines"]):
        table.add_column(name, justify="right", no_wrap=True)
    baselines = list(found["baselines"].values())
    for judge, result in found["toxicity"].items():
        others = [baseline["toxicity"][judge]["after"]["mean"] for baseline in baselines]
        flat = result | {"before": result["before"]["mean"], "after": result["after"]["mean"]}
        table.add_row(f"toxicity: {judge}", *_cells(flat, others))
    for name, result in found["quality"].items():
        others = [baseline["quality"][name]["after"] for baseline in baselines]
        table.add_row(_NAMES[name], *_cells(result, others))
    return table


def _cells(result: dict[str, Any], others: list[float]) -> list[str]:
    change = result["difference"]
    interval = f"{change['low']:+.3f} to {change['high']:+.3f}"
    cells = [f"{result['before']:.3f}", f"{result['after']:.3f}", f"{change['mean']:+.3f}", interval]
    return cells + [f"{value:.3f}" for value in others]
