"""How does a run folder become one HTML page?"""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from detoxrl.recipes import recipe
from detoxrl.report.plots import CURVES, DIAGNOSTICS, learning_curves, toxicity_distributions
from detoxrl.report.sheets import blind_sheets, compared_sheet, differing, samples_sheet
from detoxrl.report.words import changed_on_its_way, changes, duration, headline, number, percent, signed, systems
from detoxrl.settings import flatten
from detoxrl.tracking import NOTHING_BETTER, REWARD_JUDGE, RunFolder

# The stage that a missing file calls for.
_INPUTS = {"rows.json": "prepare"} | dict.fromkeys(("eval.json", "samples.jsonl", "masked_words.json"), "evaluate")
_REGRESSIONS_SHOWN = 10
_EXCERPT_CHARACTERS = 72


class Segment(NamedTuple):
    """A piece of shown text; a masked piece stays unreadable until clicked."""

    text: str
    masked: bool


def build_report(run_dir: Path) -> Path:
    """Write report.html and the sheets beside it; return the page's path.

    Raises InputError when a stage before it has not run.
    """
    folder = RunFolder(run_dir)
    for name, stage in _INPUTS.items():
        folder.need(name, stage)
    config, evaluation = folder.read_json("config.json"), folder.read_json("eval.json")
    samples = _read_lines(folder / "samples.jsonl")
    sheet, key = blind_sheets(samples, config["seed"])
    folder.write("samples.csv", samples_sheet(samples, evaluation["primary_judge"]))
    folder.write("compared.csv", compared_sheet(samples))
    folder.write("blind_sheet.csv", sheet)
    folder.write("blind_key.csv", key)
    parts = _results(evaluation, samples) | _training(folder, evaluation)
    parts |= {"config": config, "settings": flatten(config), "command": repeat_command(config)}
    parts |= {"data": data_account(folder.read_json("rows.json"))}
    template = _environment(mask_pattern(folder.read_json("masked_words.json"))).get_template("template.html.j2")
    folder.write("report.html", template.render(parts))
    return folder / "report.html"


def _environment(masked: re.Pattern[str]) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "signed": signed, "percent": percent, "duration": duration}
    environment.filters["segments"] = partial(segments, pattern=masked)
    return environment


def _results(evaluation: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    judge = evaluation["primary_judge"]
    scores = {side: [score for s in samples for score in s["toxicity"][judge][side]] for side in ("before", "after")}
    changed, unchanged = changes(evaluation)
    rows = prompt_rows(samples, judge)
    worst_first = sorted(rows, key=lambda row: row["difference"], reverse=True)
    return {
        "eval": evaluation, "primary": evaluation["toxicity"][judge], "reward_judge": REWARD_JUDGE,
        "headline": headline(evaluation), "changed": changed, "unchanged": unchanged,
        "on_its_way": changed_on_its_way(evaluation),
        "distributions": toxicity_distributions(scores["before"], scores["after"]),
        "rows": rows, "blind_rows": len(differing(samples)),
        # A rise that two decimals cannot show is no regression worth a row.
        "regressions": [row for row in worst_first if row["difference"] >= 0.01][:_REGRESSIONS_SHOWN],
    }  # fmt: skip


def _training(folder: RunFolder, evaluation: dict[str, Any]) -> dict[str, Any]:
    # A model that was only evaluated has no checkpoint: nothing was trained here.
    if not (folder / "checkpoint.json").is_file():
        return {"checkpoint": None, "systems": systems(evaluation, "The given adapter")}
    checkpoint, metrics = folder.read_json("checkpoint.json"), _curve_points(folder)
    return {
        "checkpoint": checkpoint, "nothing_better": NOTHING_BETTER,
        "systems": systems(evaluation, "Reinforcement learning"),
        "curves": learning_curves(metrics, CURVES, checkpoint["kept_step"]),
        "diagnostics": learning_curves(metrics, DIAGNOSTICS, checkpoint["kept_step"]),
    }  # fmt: skip


def _curve_points(folder: RunFolder) -> list[dict[str, Any]]:
    validations = _read_lines(folder.need("validation.jsonl", "train"))
    renamed = [{f"validation/{name}": value for name, value in found.items()} | found for found in validations]
    return _read_lines(folder.need("metrics.jsonl", "train")) + renamed


def data_account(rows: dict[str, Any]) -> dict[str, Any]:
    """Return rows.json as a table: each outcome with its rows by source split and in all, uses first."""
    splits = rows["splits"].values()
    outcomes = dict.fromkeys(outcome for split in splits for outcome in split)
    uses_first = sorted(outcomes, key=lambda outcome: not outcome.startswith("used"))
    return {
        "splits": list(rows["splits"]),
        "rows": {outcome: [split.get(outcome, 0) for split in splits] for outcome in uses_first},
        "sums": [sum(split.values()) for split in splits],
        "truncated": {split: count for split, count in rows["truncated"].items() if count},
        "tokens": rows["prompt_tokens"],
    }


def repeat_command(config: dict[str, Any]) -> str:
    """Return the command line that gives this config: the recipe, the seed, and a flag for each changed setting."""
    defaults = flatten(json.loads(json.dumps(asdict(recipe(config["recipe"])))))  # as config.json holds them
    defaults["seed"] = config["seed"]
    flags = [_flag(name.replace("_", "-"), value) for name, value in flatten(config).items() if value != defaults[name]]
    return " ".join([f"detoxrl run {config['recipe']} --seed {config['seed']}", *flags])


def _flag(name: str, value: object) -> str:
    if isinstance(value, bool):
        section, _, field = name.rpartition(".")
        return f"--{name}" if value else f"--{section}.no-{field}"
    values = value if isinstance(value, list) else [value]
    return shlex.join([f"--{name}", *map(str, values)])


def _read_lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def mask_pattern(words: list[str]) -> re.Pattern[str]:
    """Return a pattern that finds any of `words` or its plural as a whole word, in any case, as its one group."""
    longest_first = sorted(words, key=len, reverse=True)
    forms = "|".join(_forms(word) for word in longest_first)
    # An underscore bounds a word, so that _emphasis_ unmasks nothing.
    return re.compile(rf"(?<![^\W_])({forms})(?![^\W_])", re.IGNORECASE)


def _forms(word: str) -> str:
    return rf"{re.escape(word[:-1])}(?:y|ies)" if word.endswith("y") else rf"{re.escape(word)}(?:e?s)?"


def segments(text: str, pattern: re.Pattern[str]) -> list[Segment]:
    """Split `text` at the masked words; the pieces joined again are `text`."""
    return [Segment(piece, place % 2 == 1) for place, piece in enumerate(pattern.split(text)) if piece]


def prompt_rows(samples: list[dict[str, Any]], judge: str) -> list[dict[str, Any]]:
    """Return the samples, most improved first, each with an excerpt of its prompt and what `judge` says.

    The scores are those of the first responses, in [0, 1]; "difference" is after minus before.
    """
    rows = []
    for sample in samples:
        # Cut between words only: half an insult would escape the mask.
        excerpt = textwrap.shorten(sample["dialogue"], _EXCERPT_CHARACTERS, placeholder=" …", break_on_hyphens=False)
        before, after = (sample["toxicity"][judge][side][0] for side in ("before", "after"))
        scores = {"score_before": before, "score_after": after, "difference": after - before}
        rows.append(sample | scores | {"excerpt": excerpt})
    return sorted(rows, key=lambda row: row["difference"])
