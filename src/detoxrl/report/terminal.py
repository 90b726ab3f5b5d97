"""What does the terminal show at the end of a run?"""

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from detoxrl.report import words
from detoxrl.report.ending import Ending, ending
from detoxrl.report.identity import audit_warnings
from detoxrl.report.kept import explain_kept
from detoxrl.report.results import read_evaluation
from detoxrl.report.words import number
from detoxrl.runtime.console import duration
from detoxrl.runtime.run_folder import INITIAL_KEPT, REWARD_JUDGE, SHARE_WITH_TEXT, RunFolder

# How a baseline compares with "after"; the names of eval.json's verdicts are about "after".
_BASELINE_VERDICTS = {
    "ahead": "worse",
    "behind": "better",
    "level": "as good",
    "a trade": "better and worse",
}
# The names of policies and texts may be paths; a table with longer ones has no room for its numbers.
_LONGEST_HEADING = 16
# What a run leaves for the user, beside its report, in the order in which it is listed.
_FILES = ("adapter", "eval.json", "samples.csv", "compared.csv", "blind_sheet.csv")


def print_result(root: Path) -> None:
    """Print the essential numbers of a run's eval.json, where its files are, and at the end the result in three lines.

    The report has all numbers.
    """
    folder = RunFolder(root)
    evaluation = read_evaluation(folder)
    console = Console(highlight=False, markup=False)

    console.print(_measure_table(evaluation))
    if words.toxicity_by_prompt(evaluation):
        console.print()
        console.print(_part_table(evaluation))
    baselines = words.compare_baselines(evaluation)
    if baselines.by_name:
        console.print()
        console.print(_baseline_table(evaluation, baselines))
    for line in audit_warnings(evaluation):
        console.print(f"warning: {line}", soft_wrap=True)
    for line in words.setting_changes(evaluation):
        console.print(f"settings changed during the run: {line}", soft_wrap=True)

    # Plain print: a console would wrap paths, and read brackets in them as markup.
    seconds = folder.finished()
    timings = ", ".join(f"{stage} {duration(value)}" for stage, value in seconds.items() if round(value) > 0)
    print(f"{duration(sum(seconds.values()))} in total: {timings}")
    files = [name for name in _FILES if (root / name).exists()]
    print(f"files in {root}: {', '.join(files)}")

    print()
    kept = explain_kept(folder, evaluation)
    _print_ending(console, ending(root, folder.read_json("config.json"), evaluation, kept))


def _print_ending(console: Console, lines: Ending) -> None:
    """Print the last three lines, wrapped between words on a terminal, and whole in a file or pipe."""
    for line in (lines.toxicity, lines.price):
        console.print(line, style="bold" if line == lines.toxicity else None, soft_wrap=not console.is_terminal)

    # The path and the command stay whole, so that they can be copied.
    last = f"{lines.report}; {lines.next}"
    if console.is_terminal and len(last) > console.width:
        last = f"{lines.report}\n{lines.next[0].upper()}{lines.next[1:]}"
    print(last)


def _measure_table(evaluation: dict[str, Any]) -> Table:
    headings = [_heading(evaluation, "before"), _heading(evaluation, "after"), "change", "95 % interval"]
    if words.kept_initial(evaluation):
        headings = ["initial policy"]

    table = Table(
        "",
        *(Column(heading, justify="right", no_wrap=True) for heading in headings),
        title=words.prompts_and_samples(evaluation, "held-out prompts"),
        caption=_caption(evaluation),
        box=SIMPLE_HEAD,
        show_edge=False,
    )

    for label, measure in words.essential(evaluation).items():
        cells = measure.cells if measure.difference is not None else measure.cells[:1]
        table.add_row(label, *cells)

    if words.shown_quality(evaluation) is None:
        no_numbers = [""] * (len(headings) - 1)
        table.add_row("Quality", *no_numbers, words.NOT_MEASURED)
    return table


def _part_table(evaluation: dict[str, Any]) -> Table:
    """Return toxicity by the primary judge on toxic, stressed and other prompts."""
    headings = [_heading(evaluation, "before"), _heading(evaluation, "after"), "change", "95 % interval"]
    if words.kept_initial(evaluation):
        headings = ["initial policy"]
    columns = (Column(heading, justify="right", no_wrap=True) for heading in headings)
    table = Table("", *columns, title="toxicity by kind of prompt", box=SIMPLE_HEAD, show_edge=False)
    for title, measure in words.toxicity_by_prompt(evaluation).items():
        table.add_row(title, *measure.cells[: len(headings)])
    return table


def _heading(evaluation: dict[str, Any], side: str) -> str:
    """Return the name of a side of the comparison, or just the side where a long name would leave no room."""
    name = str(evaluation["names"].get(side, side))
    return name if len(name) <= _LONGEST_HEADING else side


def _caption(evaluation: dict[str, Any]) -> str:
    """Return what has to be known to read the table of measures."""
    sentences = []
    for side, name in evaluation["names"].items():
        if _heading(evaluation, side) == side:
            sentences.append(f"{side}: {name}")
    if not words.kept_initial(evaluation):
        sentences.append("change: after minus before, paired by prompt")
    if REWARD_JUDGE in evaluation["toxicity"]:
        sentences.append(f"{REWARD_JUDGE} is {words.NOT_INDEPENDENT}")
    sentences.append(f"all {len(words.measured(evaluation))} measures are in the report")
    return "; ".join(sentences)


def _baseline_table(evaluation: dict[str, Any], baselines: words.Baselines) -> Table:
    quality_by = next(iter(baselines.by_name.values()))["quality_by"]
    measured = quality_by != SHARE_WITH_TEXT
    # "Similarity to the initial policy" would take half of the line.
    heading = words.quality_name(quality_by).partition(" to ")[0] if measured else "quality"
    kept = words.kept_initial(evaluation)
    after = "initial policy" if kept else "RL"
    if evaluation["names"]:
        after = _heading(evaluation, "after")
    undecided = "no detectable difference" if kept else "too few prompts to tell"
    headings = ["", "toxicity", heading, f"compared with {after}"]
    table = Table(*headings, title="baselines on the same prompts", box=SIMPLE_HEAD, show_edge=False)
    for name, baseline in baselines.by_name.items():
        toxicity = number(baseline["toxicity"]["before"])
        quality = number(baseline["quality"]["before"]) if measured else words.NOT_MEASURED
        table.add_row(name, toxicity, quality, _BASELINE_VERDICTS.get(baseline["outcome"], undecided))

    return table


def print_sweep(root: Path, sweep: dict[str, Any]) -> None:
    """Print the combinations of a sweep, where its files are, and what to do next."""
    # Short headings leave the combinations' names room on one line.
    headings = ["runs", "toxicity", "interval", "quality", "KL", "frontier"]
    measured = sweep["measure"] != SHARE_WITH_TEXT
    quality = words.quality_name(sweep["measure"])
    table = Table(
        Column(overflow="fold"),
        *(Column(heading, justify="right", no_wrap=True) for heading in headings),
        caption=f"means over seeds after training; 95% interval of toxicity; quality: {quality}; KL: nats per response",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )

    start_quality = sweep["start"][1] if measured else None
    table.add_row("initial policy", "", number(sweep["start"][0]), "", number(start_quality))
    for label, combination in sweep["combinations"].items():
        finished = sum("error" not in run for run in combination["runs"])
        table.add_row(label, f"{finished}/{len(combination['runs'])}", *_means(combination, measured))
    console = Console(highlight=False)
    console.print(table)

    for label, combination in sweep["combinations"].items():
        kept = sum(run.get("kept_step") == 0 for run in combination["runs"])
        if kept:
            runs = len(combination["runs"])
            line = f"{label}: {INITIAL_KEPT} in {kept} of {runs} runs, because no checkpoint was better"
            console.print(line, markup=False, soft_wrap=True)
    print(f"numbers: {root / 'sweep.json'}")
    print(f"next: open {root / 'sweep.html'} in a browser")


def _means(combination: dict[str, Any], measured: bool) -> list[str]:
    """Return the cells with a combination's means; all its runs may have failed. `measured`: whether quality was."""
    if "kl" not in combination:
        return ["failed"]

    low, high = combination["interval"]
    return [
        number(combination["toxicity"][1]),
        f"{number(low)} to {number(high)}",
        number(combination["quality"][1] if measured else None),
        number(combination["kl"], 1),
        "yes" if combination["frontier"] else "",
    ]
