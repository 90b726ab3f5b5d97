"""Which tables do the results that are kept of real data make? Writes them into docs/real-data.md.

    python benchmarks/real_data/tables.py

A table stands behind `<!-- table: NAME -->` in the page, and ends at `<!-- end of table -->`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detoxrl.report.results import read_lines
from kept_results import RESULTS, read_json

PAGE = RESULTS.parent / "real-data.md"
_BLOCK = re.compile(r"(<!-- table: (?P<name>.+?) -->\n).*?(\n<!-- end of table -->)", re.DOTALL)

Result = dict[str, Any]


class Row(NamedTuple):
    """A measure of eval.json: what it is called here, its name there, and how many decimals it has."""

    label: str
    name: str
    decimals: int = 3


JUDGE = "perspective-minilm"
OTHER_JUDGE = "alt-profanity-check"
EXTREMES = (
    Row(f"expected maximum toxicity, {JUDGE}", "expected_max_toxicity"),
    Row(f"toxicity probability, {JUDGE}", "toxicity_probability"),
    Row(f"expected maximum toxicity, {OTHER_JUDGE}", f"expected_max_toxicity/{OTHER_JUDGE}"),
    Row(f"toxicity probability, {OTHER_JUDGE}", f"toxicity_probability/{OTHER_JUDGE}"),
)
DISTINCT_PAIRS = Row("distinct-2", "distinct_2")
VARIETY = (
    Row("distinct-1", "distinct_1"),
    DISTINCT_PAIRS,
    Row("distinct-3", "distinct_3"),
    Row("entropy, nats per token", "entropy", 2),
    Row("words per response", "length", 1),
)
PERPLEXITY = "perplexity under the initial policy"
REWRITING = (
    Row("J", "joint"),
    Row("similarity to the source", "source_similarity"),
    Row("fluency", "fluency"),
    Row("chrF to what people wrote", "chrf"),
    Row("words per response", "length", 1),
)
SUMMARIZING = (
    Row("ROUGE-L to the human summary", "rouge_l"),
    Row("similarity to another summary by the initial policy", "similarity"),
    Row("entailment by the dialogue", "entailment"),
    Row("word 4-grams copied from the dialogue", "copied"),
    Row("distinct-2", "distinct_2"),
    Row("words per response", "length", 1),
    Row("empty responses", "empty_rate"),
)
REWRITERS = {
    "copy": "the source, unchanged",
    "word_filter": "the source without the words of a list",
    "sharpened": "SFT at the temperature of equal entropy",
    "best_of_4": "SFT, best of 4 by the reward",
    "human": "people",
}
PURPOSES = {
    "realtoxicity": "continue web text",
    "paradetox": "rewrite, after fine-tuning on pairs",
    "quarrels": "summarize quarrels",
}
BASELINES = {
    "word_filter": "word filter",
    "sharpened": "initial policy at the temperature of equal entropy",
    "best_of_4": "best of 4 by the reward",
    "sft_best_of_4": "SFT on the best of 4",
    "dpo_best_and_worst": "DPO on the best and worst of 4",
}


def tables() -> dict[str, str]:
    """Return every table in Markdown, by name."""
    by_name: dict[str, str] = {}
    widest: dict[str, Result] = {}
    for name, make in (("realtoxicity", realtoxicity), ("paradetox", paradetox), ("quarrels", quarrels)):
        runs = evaluations_of(name)
        if runs:
            by_name |= make(runs)
            by_name[f"{name} cost"] = cost_table(runs)
            widest[name] = max(runs.values(), key=lambda evaluation: len(evaluation["baselines"]))

    by_name["what RL is for"] = purpose_table(widest)
    by_name["realtoxicity, KL coefficients"] = sweep_table(read_json(RESULTS / "realtoxicity/sweep/sweep.json"))
    return by_name


def purpose_table(results: Mapping[str, Result]) -> str:
    """Return the mean toxicity of each system in one run of each result, and whether RL is ahead of it there.

    The verdicts are those of eval.json: toxicity by the first judge and quality, both paired by prompt. A rewrite has J
    instead, which holds civility and quality.
    """
    lines = [["before RL"], ["after RL"]]
    for evaluation in results.values():
        for line, side in zip(lines, ("before", "after"), strict=True):
            line.append(f"{_mean_toxicity(evaluation, evaluation, side)}{_joint(evaluation, side)}")

    for name, label in BASELINES.items():
        cells = [label]
        for evaluation in results.values():
            cells.append(_against_rl(evaluation, name) if name in evaluation["baselines"] else "—")
        lines.append(cells)

    minutes = [f"{evaluation['seconds']['train'] / 60:.0f}" for evaluation in results.values()]
    lines.append(["minutes of RL", *minutes])
    return markdown(["", *(PURPOSES[name] for name in results)], lines)


def _against_rl(evaluation: Result, name: str) -> str:
    """Return the mean toxicity of a baseline, and how RL compares with it."""
    baseline = evaluation["baselines"][name]
    mean = _mean_toxicity(evaluation, baseline, "after")
    joint = _joint(baseline, "after")
    if joint or "after" not in baseline:  # Where training kept the initial policy, there is nothing to compare with.
        return f"{mean}{joint}"
    return f"{mean}, RL: {baseline['after']['verdict']}"


def _mean_toxicity(evaluation: Result, system: Result, side: str) -> str:
    """Return the mean toxicity of a system of a run by its first judge."""
    return f"{system['toxicity'][evaluation['primary_judge']][side]['mean']:.3f}"


def _joint(system: Result, side: str) -> str:
    """Return J of a system behind a comma; nothing where it was not measured."""
    joint = system["quality"].get("joint")
    return "" if joint is None else f", J {joint[side]:.3f}"


def realtoxicity(runs: Mapping[int, Result]) -> dict[str, str]:
    """Return the tables of continued prompts: toxic and other ones, sampled plainly and with top-p, and baselines."""
    by_name = {}
    for part in ("toxic prompts", "other prompts"):
        plain = {seed: evaluation["by_prompt"][part] for seed, evaluation in runs.items()}
        also_with_top_p = {seed: evaluation for seed, evaluation in runs.items() if evaluation["top_p"] is not None}
        nucleus = {seed: evaluation["top_p"]["by_prompt"][part] for seed, evaluation in also_with_top_p.items()}
        by_name[f"realtoxicity, {part}"] = seeds_table(plain, (*EXTREMES, *VARIETY))
        by_name[f"realtoxicity, {part}, top-p"] = seeds_table(nucleus, (*EXTREMES, DISTINCT_PAIRS))

    (with_baselines,) = (evaluation for evaluation in runs.values() if "best_of_4" in evaluation["baselines"])
    for name, part in with_baselines["by_prompt"].items():
        by_name[f"realtoxicity, baselines on {name}"] = baselines_table(part)
    return by_name


def paradetox(runs: Mapping[int, Result]) -> dict[str, str]:
    """Return the tables of rewritten sentences: RL against its start by seed, and every system of one run."""
    return {
        "paradetox": seeds_table(runs, REWRITING, judges=(JUDGE, OTHER_JUDGE)),
        "paradetox, systems": rewriters_table(next(iter(runs.values()))),
    }


def quarrels(runs: Mapping[int, Result]) -> dict[str, str]:
    """Return the tables of summarized quarrels: RL against its start by seed, and the baselines of one run."""
    evaluation = next(iter(runs.values()))
    rows = tuple(row for row in SUMMARIZING if row.name in evaluation["quality"])
    return {
        "quarrels": seeds_table(runs, rows, judges=(JUDGE, OTHER_JUDGE)),
        "quarrels, systems": summarizers_table(evaluation),
    }


def evaluations_of(name: str) -> dict[int, Result]:
    """Return the eval.json of each run of a result, by its seed."""
    paths = {int(path.parent.name.removeprefix("seed")): path for path in (RESULTS / name).glob("seed*/eval.json")}
    evaluations = {seed: read_json(paths[seed]) for seed in sorted(paths)}
    for seed, evaluation in evaluations.items():
        # Of a stage that was stopped, eval.json counts the last part alone.
        steps = read_lines(paths[seed].parent / "metrics.jsonl")
        evaluation["seconds"]["train"] = sum(step["seconds/step"] for step in steps)
    return evaluations


def seeds_table(parts: Mapping[int, Result], rows: Sequence[Row], judges: Sequence[str] = ()) -> str:
    """Return before → after and the interval of the difference of some prompts, with a column for each seed.

    The mean toxicity by each of `judges` comes first, and how much of what lies above the floor is gone.
    """
    lines = []
    for judge in judges:
        toxicities = [part["toxicity"][judge] for part in parts.values()]
        lines.append([f"mean toxicity, {judge}", *map(mean_change, toxicities)])
        lines.append([f"removed above the floor, {judge}", *map(share_removed, toxicities)])

    for row in rows:
        lines.append([row.label, *(change(part["quality"][row.name], row.decimals) for part in parts.values())])
    lines.append([PERPLEXITY, *(perplexity(part["perplexity"]) for part in parts.values())])
    return markdown(["", *(f"seed {seed}" for seed in parts)], lines)


def rewriters_table(evaluation: Result) -> str:
    """Return what J is made of, and J between copying and people, of each system of a run."""
    systems = [("SFT", "before", evaluation)]
    if evaluation["quality"]["joint"]["difference"] is not None:  # Else training kept the initial policy.
        systems.append(("RL after SFT", "after", evaluation))
    for name, label in REWRITERS.items():
        if name in evaluation["baselines"]:
            systems.append((label, "after", evaluation["baselines"][name]))

    scale = evaluation["joint_scale"]
    lines = []
    for label, side, measured in systems:
        civil = 1 - measured["toxicity"][JUDGE][side]["toxic_ratio"]
        similar, fluent, joint = (measured["quality"][name][side] for name in ("source_similarity", "fluency", "joint"))
        placed = (joint - scale["copy"]) / (scale["human"] - scale["copy"])
        lines.append([label, *(f"{number:.3f}" for number in (civil, similar, fluent, joint, placed))])
    head = ["", "civil (STA)", "similar to the source (SIM)", "fluent (FL)", "J", "(J - copy) / (people - copy)"]
    return markdown(head, lines)


def summarizers_table(evaluation: Result) -> str:
    """Return toxicity, and what was kept, of each system of a run; below them the floor, which people reach."""
    systems = [("initial policy", "before", evaluation)]
    if evaluation["quality"]["rouge_l"]["difference"] is not None:  # Else training kept the initial policy.
        systems.append(("trained policy", "after", evaluation))
    for name, label in BASELINES.items():
        if name in evaluation["baselines"]:
            systems.append((label, "after", evaluation["baselines"][name]))

    lines = []
    for label, side, measured in systems:
        toxicities = [measured["toxicity"][judge][side]["mean"] for judge in (JUDGE, OTHER_JUDGE)]
        kept = [measured["quality"][name][side] for name in ("rouge_l", "similarity")]
        words = measured["quality"]["length"][side]
        lines.append([label, *(f"{number:.3f}" for number in (*toxicities, *kept)), f"{words:.1f}"])

    floors = [f"{evaluation['toxicity'][judge]['floor']:.3f}" for judge in (JUDGE, OTHER_JUDGE)]
    lines.append(["people (the floor)", *floors, "—", "—", "—"])
    head = ["", f"mean toxicity, {JUDGE}", OTHER_JUDGE, "ROUGE-L", "similarity to the initial policy", "words"]
    return markdown(head, lines)


def baselines_table(part: Result) -> str:
    """Return the initial policy, the trained one and each baseline on some prompts."""
    systems = [("initial policy", "before", part)]
    if part["quality"]["distinct_2"]["difference"] is not None:  # Else training kept the initial policy.
        systems.append(("trained policy", "after", part))
    for name, label in BASELINES.items():
        if name in part["baselines"]:
            systems.append((label, "after", part["baselines"][name]))

    lines = []
    for label, side, measured in systems:
        cells = [label]
        for row in (*EXTREMES[:2], DISTINCT_PAIRS):
            cells.append(f"{measured['quality'][row.name][side]:.3f}" if row.name in measured["quality"] else "—")
        cells.append(f"{measured['perplexity'][side]:.1f}" if "perplexity" in measured else "—")
        lines.append(cells)
    return markdown(["", "expected maximum toxicity", "toxicity probability", "distinct-2", "perplexity"], lines)


def sweep_table(sweep: Result) -> str:
    """Return toxicity and variety of the initial policy and of each value of a sweep's setting."""
    toxicity, variety = sweep["start"]
    lines = [["initial policy", f"{toxicity:.3f}", f"{variety:.3f}", "0"]]
    for label, combination in sweep["combinations"].items():
        low, high = combination["interval"]
        after = f"{combination['toxicity'][1]:.3f} ({low:.3f} to {high:.3f})"
        value = label.partition("=")[2]
        lines.append([value, after, f"{combination['quality'][1]:.3f}", f"{combination['kl']:.1f}"])
    return markdown(["KL coefficient", f"mean toxicity, {sweep['judge']}", "distinct-2", "KL, nats"], lines)


def cost_table(runs: Mapping[int, Result]) -> str:
    """Return the minutes of the stages that train, with a column for each seed."""
    lines = []
    for stage in ("sft", "train"):
        lines.append([stage, *(f"{evaluation['seconds'][stage] / 60:.0f}" for evaluation in runs.values())])
    return markdown(["minutes", *(f"seed {seed}" for seed in runs)], lines)


def change(result: Result, decimals: int) -> str:
    """Return before and after, and the 95 % interval of the difference."""
    difference = result["difference"]
    before, after = (f"{result[side]:.{decimals}f}" for side in ("before", "after"))
    if difference is None:
        return f"{before}, initial policy kept"
    return f"{before} → {after} ({difference['low']:.{decimals}f} to {difference['high']:.{decimals}f})"


def mean_change(toxicity: Result) -> str:
    """Return mean toxicity before and after, and the 95 % interval of the difference."""
    means = {side: toxicity[side]["mean"] for side in ("before", "after")}
    return change({**means, "difference": toxicity["difference"]}, 3)


def share_removed(toxicity: Result) -> str:
    """Return the share of what lies above the floor that is gone, and the floor."""
    share = toxicity["share_removed"]
    if share is None:
        removed = "nothing was above it"
    elif share > 1:
        removed = "all"
    else:
        removed = f"{share:.0%}"
    return f"{removed}; floor {toxicity['floor']:.3f}"


def perplexity(result: Result) -> str:
    """Return perplexity before and after, and the 95 % interval of their ratio."""
    ratio = result["ratio"]
    if ratio is None:
        return f"{result['before']:.1f}, initial policy kept"
    return f"{result['before']:.1f} → {result['after']:.1f} (×{ratio['low']:.2f} to ×{ratio['high']:.2f})"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    rule = "|".join(["---"] * len(head))
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(line)} |" for line in lines)])


def with_tables(page: str, by_name: Mapping[str, str]) -> str:
    """Return a page with each table in its place. Raises KeyError for a place whose table is unknown."""
    return _BLOCK.sub(lambda block: f"{block[1]}{by_name[block['name']]}{block[3]}", page)


def main() -> None:
    page = Path(PAGE)
    page.write_text(with_tables(page.read_text(encoding="utf-8"), tables()), encoding="utf-8")
    print(f"wrote the tables of {page.name}")


if __name__ == "__main__":
    main()
