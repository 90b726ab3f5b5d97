"""What does the table on screen say at the end of a run?"""

import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from detoxrl.report.words import after_name, beside_baselines, changed_on_its_way, measured, number, signed
from detoxrl.runtime.run_folder import REWARD_JUDGE


def print_result(root: Path) -> None:
    """Print the comparison of a run's eval.json and where its products are."""
    found = json.loads((root / "eval.json").read_text(encoding="utf-8"))
    console = Console(highlight=False)
    console.print(_table(found))
    summary, baselines = beside_baselines(found, after_name(found))
    if baselines:
        columns = "", "toxicity", next(iter(baselines.values()))["quality_by"], "verdict"
        table = Table(*columns, title="beside it, on the same prompts", box=SIMPLE_HEAD)
        for name, one in baselines.items():
            table.add_row(name, number(one["toxicity"]["before"]), number(one["quality"]["before"]), one["verdict"])
        console.print(table, summary, sep="\n")
    for pair, how in found["agreement"].items():
        console.print(f"{pair}: agree on {how['same_side']:.0%} of responses")
    for judge, result in found["toxicity"].items():
        removed = result["share_removed"]
        share = f", {removed:.0%} of what could be removed" if removed is not None else ""
        independent = " (the reward itself: no independent judge)" if judge == REWARD_JUDGE else ""
        console.print(f"{judge}: [bold]{result['verdict']}[/bold]{share}{independent}")
    for line in changed_on_its_way(found):
        console.print(f"changed on its way: {line}")
    seconds = json.loads((root / "seconds.json").read_text(encoding="utf-8"))
    timings = ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
    console.print(f"\n{sum(seconds.values()):.0f} s in all: {timings}")
    # A model that was only evaluated has no adapter of ours.
    adapter = f"adapter: {root / 'adapter'}   " if (root / "adapter").is_dir() else ""
    console.print(f"{adapter}report: {root / 'report.html'}   numbers: {root / 'eval.json'}")
    # Texts that were written elsewhere have no rewards to be compared by.
    sheets = ", ".join(name for name in ("samples.csv", "compared.csv") if (root / name).is_file())
    console.print(f"sheets in {root}: {sheets}   for blind raters: blind_sheet.csv")
    console.print(f"next: open {root / 'report.html'} in a browser")


def print_sweep(root: Path, found: dict[str, Any]) -> None:
    """Print the combinations of a sweep and where its page is."""
    caption = "after training, means over seeds; interval: 95 %, seeds and prompts resampled"
    names = ("runs", "toxicity", "interval", found["measure"], "KL", "frontier")
    columns = Column(overflow="fold"), *(Column(name, justify="right", no_wrap=True) for name in names)
    table = Table(*columns, box=SIMPLE_HEAD, caption=caption, pad_edge=False)
    table.add_row("start", "", number(found["start"][0]), "", number(found["start"][1]))
    for label, one in found["combinations"].items():
        cells = ["failed"]
        if "kl" in one:
            ends, star = " to ".join(map(number, one["interval"])), "yes" if one["frontier"] else ""
            cells = [number(one["toxicity"][1]), ends, number(one["quality"][1]), number(one["kl"], 1), star]
        table.add_row(label, f"{sum('error' not in run for run in one['runs'])}/{len(one['runs'])}", *cells)
    Console(highlight=False).print(table)
    print(f"numbers: {root / 'sweep.json'}\nnext: open {root / 'sweep.html'} in a browser")


def _table(found: dict[str, Any]) -> Table:
    title = f"{found['n_prompts']} held-out prompts, {found['samples_per_prompt']} samples each"
    caption = "change: after minus before, with its 95 % interval, paired by prompt"
    names = (found["names"].get(name, name) for name in ("before", "after", "change", "interval"))
    columns = (Column(name, justify="right", no_wrap=True) for name in names)
    table = Table("", *columns, title=title, caption=caption, box=SIMPLE_HEAD)
    for label, one in measured(found).items():
        mean, low, high = (signed(one.difference[key], one.decimals) for key in ("mean", "low", "high"))
        before, after = (number(value, one.decimals) for value in (one.before, one.after))
        table.add_row(label, before, after, mean, f"{low} to {high}")
    return table
