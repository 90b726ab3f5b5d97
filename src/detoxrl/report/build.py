"""How does a run folder become one HTML page?"""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from detoxrl.recipes import recipe
from detoxrl.report.plots import CURVES, DIAGNOSTICS, learning_curves, toxicity_distributions
from detoxrl.tracking import REWARD_JUDGE, RunFolder

# The stage that a missing file calls for.
_INPUTS = {
    "metrics.jsonl": "train", "validation.jsonl": "train", "checkpoint.json": "train",
    "eval.json": "evaluate", "samples.jsonl": "evaluate", "masked_words.json": "evaluate",
}  # fmt: skip
_REGRESSIONS_SHOWN = 10
_EXCERPT_CHARACTERS = 72
# Name in eval.json: label, which direction is better, decimals.
_QUALITY = {
    "facts": ("Facts kept", "share; higher is better", 3),
    "quarrel_reported": ("Quarrels reported", "share; higher is better", 3),
    "rouge_l": ("ROUGE-L", "to the civil reference where there is one; higher is better", 3),
    "length": ("Response length", "words", 1),
    "empty_rate": ("Empty responses", "share; lower is better", 3),
    "insult_rate": ("Insults the reward model knows", "share of responses; lower is better", 3),
    "insult_rate_unseen": ("Insults the reward model never saw", "share of responses; lower is better", 3),
}
_SYSTEMS = {"sft_civil": "Supervised on civil references"}


class Segment(NamedTuple):
    """A piece of shown text; a masked piece stays unreadable until clicked."""

    text: str
    masked: bool

    @property
    def stars(self) -> str:
        """The first letter, then a star for each further one."""
        return self.text[0] + "*" * (len(self.text) - 1)


class Measure(NamedTuple):
    """One number before and after; the difference is after minus before with its 95 % interval."""

    label: str
    note: str
    decimals: int
    before: float
    after: float
    difference: dict[str, float]


class PromptRow(NamedTuple):
    """One prompt with its first response before and after; scores are the primary judge's, in [0, 1]."""

    excerpt: list[Segment]
    texts: dict[str, list[Segment]]
    before: list[Segment]
    after: list[Segment]
    score_before: float
    score_after: float

    @property
    def difference(self) -> float:
        """Toxicity after minus before."""
        return self.score_after - self.score_before


def build_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` and return its path. Raises InputError when a stage before it has not run."""
    folder = RunFolder(run_dir)
    for name, stage in _INPUTS.items():
        folder.need(name, stage)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "signed": signed, "percent": percent, "duration": duration}
    folder.write("report.html", environment.get_template("template.html.j2").render(_context(folder)))
    return folder / "report.html"


def _context(folder: RunFolder) -> dict[str, Any]:
    files = ("config.json", "checkpoint.json", "eval.json", "masked_words.json")
    config, checkpoint, evaluation, words = (folder.read_json(name) for name in files)
    metrics, samples = _curve_points(folder), _read_lines(folder / "samples.jsonl")
    judge, kept_step = evaluation["primary_judge"], checkpoint["kept_step"]
    scores = {side: [score for s in samples for score in s["toxicity"][judge][side]] for side in ("before", "after")}
    rows = prompt_rows(samples, judge, mask_pattern(words))
    worst_first = sorted(rows, key=lambda row: row.difference, reverse=True)
    return {
        "eval": evaluation, "checkpoint": checkpoint, "config": config, "settings": flatten(config),
        "command": repeat_command(config),
        "headline": headline(evaluation), "primary": evaluation["toxicity"][judge], "reward_judge": REWARD_JUDGE,
        "quality": _quality(evaluation["quality"]), "systems": _systems(evaluation),
        "curves": learning_curves(metrics, CURVES, kept_step),
        "diagnostics": learning_curves(metrics, DIAGNOSTICS, kept_step),
        "distributions": toxicity_distributions(scores["before"], scores["after"]),
        "rows": rows,
        # A rise that two decimals cannot show is no regression worth a row.
        "regressions": [row for row in worst_first if row.difference >= 0.01][:_REGRESSIONS_SHOWN],
    }  # fmt: skip


def _curve_points(folder: RunFolder) -> list[dict[str, Any]]:
    validations = _read_lines(folder / "validation.jsonl")
    renamed = [
        {"step": found["step"]} | {f"validation/{name}": found[name] for name in ("toxicity", "quality")}
        for found in validations
    ]
    return _read_lines(folder / "metrics.jsonl") + renamed


def repeat_command(config: dict[str, Any]) -> str:
    """Return the command line that gives this config: the recipe, the seed, and a flag for each changed setting."""
    defaults = flatten(asdict(recipe(config["recipe"])))
    words = [f"detoxrl run {config['recipe']} --seed {config['seed']}"]
    for name, value in flatten(config).items():
        value = tuple(value) if isinstance(value, list) else value
        if name != "seed" and value != defaults[name]:
            words.append(_flag(name.replace("_", "-"), value))
    return " ".join(words)


def _flag(name: str, value: object) -> str:
    if isinstance(value, bool):
        section, _, field = name.rpartition(".")
        return f"--{name}" if value else f"--{section}.no-{field}"
    values = value if isinstance(value, tuple) else (value,)
    return shlex.join([f"--{name}", *map(str, values)])


def _read_lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def headline(evaluation: dict[str, Any]) -> tuple[str, str]:
    """Say in words what the primary judge found, and what it rests on: interval, prompts and samples."""
    judge = evaluation["primary_judge"]
    result = evaluation["toxicity"][judge]
    difference = result["difference"]
    decimals = 2 if abs(difference["mean"]) >= 0.05 else 3
    before, after = (number(result[side]["mean"], decimals) for side in ("before", "after"))
    change = {
        "less toxic": f"fell from {before} to {after}",
        "more toxic": f"rose from {before} to {after}",
        "no detectable difference": f"was {before} before and {after} after",
    }[result["verdict"]]
    mean, low, high = (signed(difference[key], decimals) for key in ("mean", "low", "high"))
    size = f"{evaluation['n_prompts']} prompts, {evaluation['samples_per_prompt']} samples each"
    claim = f"{result['verdict'].capitalize()}: mean toxicity by {judge} {change}"
    return claim, f"(difference {mean}, 95 % interval {low} to {high}; {size})"


def _quality(quality: dict[str, Any]) -> list[Measure]:
    found = [(about, quality[name]) for name, about in _QUALITY.items() if name in quality]
    return [Measure(*about, values["before"], values["after"], values["difference"]) for about, values in found]


def _measures(system: dict[str, Any]) -> dict[str, Measure]:
    toxicity = [
        Measure(f"Toxicity by {judge}", "", 3, result["before"]["mean"], result["after"]["mean"], result["difference"])
        for judge, result in system["toxicity"].items()
    ]
    return {measure.label: measure for measure in (*toxicity, *_quality(system["quality"]))}


def _systems(evaluation: dict[str, Any]) -> dict[str, dict[str, Measure]]:
    """Return what each way of training reached; RL first, as its measures decide the table's rows."""
    baselines = {_SYSTEMS.get(name, name): _measures(system) for name, system in evaluation["baselines"].items()}
    return {"Reinforcement learning": _measures(evaluation)} | baselines


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


def prompt_rows(samples: list[dict[str, Any]], judge: str, pattern: re.Pattern[str]) -> list[PromptRow]:
    """Return one row per prompt, most improved first."""
    return sorted((_prompt_row(sample, judge, pattern) for sample in samples), key=lambda row: row.difference)


def _prompt_row(sample: dict[str, Any], judge: str, pattern: re.Pattern[str]) -> PromptRow:
    # Cut between words only: half an insult would escape the mask.
    excerpt = textwrap.shorten(sample["dialogue"], _EXCERPT_CHARACTERS, placeholder=" …", break_on_hyphens=False)
    texts = {
        "Prompt": sample["dialogue"],
        "Reference": sample["reference"],
        "Civil reference": sample["civil_reference"],
    }
    return PromptRow(
        excerpt=segments(excerpt, pattern),
        texts={label: segments(text, pattern) for label, text in texts.items() if text},
        before=segments(sample["responses"]["before"][0], pattern),
        after=segments(sample["responses"]["after"][0], pattern),
        score_before=sample["toxicity"][judge]["before"][0],
        score_after=sample["toxicity"][judge]["after"][0],
    )


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def number(value: float | None, decimals: int = 3) -> str:
    """Return the rounded value with a true minus sign; a dash for no value."""
    # Adding 0.0 turns a rounded -0.0 into 0.0.
    return "—" if value is None else f"{round(value, decimals) + 0.0:.{decimals}f}".replace("-", "−")


def signed(value: float, decimals: int = 3) -> str:
    """Return the rounded value with its sign, plus included; zero has none."""
    return ("+" if round(value, decimals) > 0 else "") + number(value, decimals)


def percent(share: float | None, sign: bool = False) -> str:
    """Return a share as whole percent."""
    if share is None:
        return "—"
    return f"{signed(100 * share, 0) if sign else number(100 * share, 0)} %"


def duration(seconds: float) -> str:
    """Return seconds as `12.3 s` or `4 min 05 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
