"""What does the terminal show at the end of a run?"""

import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from detoxrl.report import words
from detoxrl.report.words import number, signed
from detoxrl.runtime.run_folder import REWARD_JUDGE


def print_result(root: Path) -> None:
    """Print the comparison in a run's eval.json, where the run's files are, and what to do next."""
    evaluation = json.loads((root / "eval.json").read_text(encoding="utf-8"))
    seconds = json.loads((root / "seconds.json").read_text(encoding="utf-8"))

    console = Console(highlight=False)
    console.print(_measure_table(evaluation))

    baselines = words.compare_baselines(evaluation)
    if baselines.by_name:
        console.print(_baseline_table(baselines), baselines.summary, sep="\n")

    for pair, agreement in evaluation["agreement"].items():
        console.print(f"{pair} agree for {agreement['same_side']:.0%} of responses on whether they are toxic")
    for judge, result in evaluation["toxicity"].items():
        console.print(_verdict(judge, result))
    for line in words.setting_changes(evaluation):
        console.print(f"settings changed during the run: {line}")

    # Plain print: a console would wrap paths, and read brackets in them as markup.
    timings = ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
    print(f"\n{sum(seconds.values()):.0f} s in total: {timings}")
    _print_files(root)
    print(f"next: open {root / 'report.html'} in a browser")


def _verdict(judge: str, result: dict[str, Any]) -> str:
    """Return the verdict of a judge in one line, with rich's markup."""
    line = f"{judge}: [bold]{result['verdict']}[/bold]"
    if result["share_removed"] is not None:
        line += f", {result['share_removed']:.0%} of the toxicity above that of civil references removed"
    if judge == REWARD_JUDGE:
        line += f" ({words.NOT_INDEPENDENT})"

    return line


def _print_files(root: Path) -> None:
    print(f"report: {root / 'report.html'}")
    print(f"numbers: {root / 'eval.json'}")

    # Where nothing was trained there is no adapter.
    if (root / "adapter").is_dir():
        print(f"adapter: {root / 'adapter'}")

    # Texts that were written elsewhere have no rewards, so no compared.csv.
    sheets = [name for name in ("samples.csv", "compared.csv") if (root / name).is_file()]
    print(f"sheets in {root}: {', '.join([*sheets, 'blind_sheet.csv (for blind raters)'])}")


def _measure_table(evaluation: dict[str, Any]) -> Table:
    names = evaluation["names"]
    headings = [names.get("before", "before"), names.get("after", "after"), "change", "95% interval"]
    table = Table(
        "",
        *(Column(heading, justify="right", no_wrap=True) for heading in headings),
        title=f"{evaluation['n_prompts']} held-out prompts, {evaluation['samples_per_prompt']} samples each",
        caption="change: after minus before, paired by prompt",
        box=SIMPLE_HEAD,
    )

    for label, measure in words.measured(evaluation).items():
        before, after = number(measure.before, measure.decimals), number(measure.after, measure.decimals)
        mean, low, high = (signed(measure.difference[key], measure.decimals) for key in ("mean", "low", "high"))
        table.add_row(label, before, after, mean, f"{low} to {high}")

    return table


def _baseline_table(baselines: words.Baselines) -> Table:
    quality_by = next(iter(baselines.by_name.values()))["quality_by"]
    headings = ["", "toxicity", words.quality_name(quality_by), "verdict"]
    table = Table(*headings, title="baselines on the same prompts", box=SIMPLE_HEAD)

    for name, baseline in baselines.by_name.items():
        toxicity = number(baseline["toxicity"]["before"])
        quality = number(baseline["quality"]["before"])
        table.add_row(name, toxicity, quality, baseline["verdict"])

    return table


def print_sweep(root: Path, sweep: dict[str, Any]) -> None:
    """Print the combinations of a sweep, where its files are, and what to do next."""
    # Short headings leave the combinations' names room on one line.
    headings = ["runs", "toxicity", "interval", "quality", "KL", "frontier"]
    quality = words.quality_name(sweep["measure"])
    table = Table(
        Column(overflow="fold"),
        *(Column(heading, justify="right", no_wrap=True) for heading in headings),
        caption=f"means over seeds after training; 95% interval of toxicity; quality: {quality}; KL: nats per response",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )

    table.add_row("initial policy", "", number(sweep["start"][0]), "", number(sweep["start"][1]))
    for label, combination in sweep["combinations"].items():
        finished = sum("error" not in run for run in combination["runs"])
        table.add_row(label, f"{finished}/{len(combination['runs'])}", *_means(combination))
    Console(highlight=False).print(table)

    print(f"numbers: {root / 'sweep.json'}")
    print(f"next: open {root / 'sweep.html'} in a browser")


def _means(combination: dict[str, Any]) -> list[str]:
    """Return the cells with a combination's means; all its runs may have failed."""
    if "kl" not in combination:
        return ["failed"]

    low, high = combination["interval"]
    return [
        number(combination["toxicity"][1]),
        f"{number(low)} to {number(high)}",
        number(combination["quality"][1]),
        number(combination["kl"], 1),
        "yes" if combination["frontier"] else "",
    ]
