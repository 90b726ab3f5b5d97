"""What does the table on screen say at the end of a run?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from detoxrl.report.words import changed_on_its_way, measured, number, signed


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
    for line in changed_on_its_way(found):
        console.print(f"changed on its way: {line}")
    seconds = json.loads((root / "seconds.json").read_text(encoding="utf-8"))
    timings = ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
    console.print(f"\n{sum(seconds.values()):.0f} s in all: {timings}")
    # A model that was only evaluated has no adapter of ours.
    adapter = f"adapter: {root / 'adapter'}   " if (root / "adapter").is_dir() else ""
    console.print(f"{adapter}report: {root / 'report.html'}   numbers: {root / 'eval.json'}")
    console.print(f"sheets in {root}: samples.csv, compared.csv   for blind raters: blind_sheet.csv")
    console.print(f"next: open {root / 'report.html'} in a browser")


def _table(found: dict[str, Any]) -> Table:
    title = f"{found['n_prompts']} held-out prompts, {found['samples_per_prompt']} samples each"
    caption = "change: after minus before, with its 95 % paired bootstrap interval"
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD)
    table.add_column("")
    for name in ("before", "after", "change", "interval", *found["baselines"]):
        table.add_column(name, justify="right", no_wrap=True)
    others = [measured(baseline) for baseline in found["baselines"].values()]
    for label, one in measured(found).items():
        mean, low, high = (signed(one.difference[key], one.decimals) for key in ("mean", "low", "high"))
        values = [one.before, one.after, *(other[label].after for other in others)]
        before, after, *rest = (number(value, one.decimals) for value in values)
        table.add_row(label, before, after, mean, f"{low} to {high}", *rest)
    return table
