"""How does a run folder become one HTML page?"""

import json
import re
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from detoxrl.config.edit import flatten
from detoxrl.config.recipes import recipe
from detoxrl.report import words
from detoxrl.report.sheets import blind_sheets, compared_sheet, differing, samples_sheet
from detoxrl.runtime.run_folder import NOTHING_BETTER, REWARD_JUDGE, RunFolder

# The stage that a missing file calls for.
_INPUTS = {"rows.json": "prepare"} | dict.fromkeys(("eval.json", "samples.jsonl", "masked_words.json"), "evaluate")
_REGRESSIONS_SHOWN = 10
_EXCERPT_CHARACTERS = 72


def build_report(run_dir: Path) -> Path:
    """Write report.html and the sheets beside it; return the page's path. Raises InputError if a stage has not run."""
    folder = RunFolder(run_dir)
    for name, stage in _INPUTS.items():
        folder.need(name, stage)
    config, evaluation = folder.read_json("config.json"), folder.read_json("eval.json")
    samples = read_lines(folder / "samples.jsonl")
    sheet, key = blind_sheets(samples, config["seed"])
    folder.write("samples.csv", samples_sheet(samples, evaluation["primary_judge"]))
    if scored := "score" in samples[0]:
        folder.write("compared.csv", compared_sheet(samples))
    folder.write("blind_sheet.csv", sheet)
    folder.write("blind_key.csv", key)
    parts = {
        "scored": scored, "config": config, "settings": flatten(config),
        "command": repeat_command(config, folder.read_json("run.json")["measures"]),
        "data": words.data_account(folder.read_json("rows.json")),
    }  # fmt: skip
    parts |= _results(evaluation, samples) | _training(folder)
    folder.write("report.html", page("page.html.j2", parts, folder.read_json("masked_words.json")))
    return folder / "report.html"


def page(template: str, parts: dict[str, Any], masked: Sequence[str] = ()) -> str:
    """Return a page of this folder, filled with `parts`; its filters are functions of `words`, and the mask."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {name: getattr(words, name) for name in ("number", "signed", "percent", "duration")}
    environment.filters["segments"] = partial(segments, pattern=mask_pattern(masked))
    return environment.get_template(template).render(parts)


def _results(evaluation: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    from detoxrl.report.plots import toxicity_distributions

    judge, after = evaluation["primary_judge"], words.after_name(evaluation)
    scores = {side: [score for s in samples for score in s["toxicity"][judge][side]] for side in ("before", "after")}
    rows = prompt_rows(samples, judge)
    # A rise that two decimals cannot show is no regression worth a row.
    worse = [row for row in rows if row["difference"] >= 0.01]
    return {
        "eval": evaluation, "primary": evaluation["toxicity"][judge], "reward_judge": REWARD_JUDGE,
        "headline": words.headline(evaluation), "changes": words.changes(evaluation),
        "on_its_way": words.changed_on_its_way(evaluation), "labels": evaluation["names"], "after": after,
        "systems": words.systems(evaluation, evaluation["names"].get("after", after.capitalize())),
        "beside": words.beside_baselines(evaluation, after),
        "distributions": toxicity_distributions(scores["before"], scores["after"]),
        "rows": rows, "blind_rows": len(differing(samples)),
        "regressions": sorted(worse, key=lambda row: row["difference"], reverse=True)[:_REGRESSIONS_SHOWN],
    }  # fmt: skip


def _training(folder: RunFolder) -> dict[str, Any]:
    # A model that was only evaluated has no checkpoint: nothing was trained here.
    if not (folder / "checkpoint.json").is_file():
        return {"checkpoint": None}
    from detoxrl.report.plots import CURVES, DIAGNOSTICS, learning_curves, over_optimisation

    checkpoint, validations = folder.read_json("checkpoint.json"), read_lines(folder.need("validation.jsonl", "train"))
    metrics = read_lines(folder.need("metrics.jsonl", "train"))
    metrics += [{f"validation/{name}": value for name, value in found.items()} | found for found in validations]
    return {
        "checkpoint": checkpoint, "nothing_better": NOTHING_BETTER,
        "curves": learning_curves(metrics, CURVES, checkpoint["kept_step"]),
        "parting": over_optimisation(validations, checkpoint),
        "diagnostics": learning_curves(metrics, DIAGNOSTICS, checkpoint["kept_step"]),
    }  # fmt: skip


def repeat_command(config: dict[str, Any], measures: dict[str, Any]) -> str:
    """Return the command that gives this config, with what was measured, policies or texts, if nothing was trained."""
    defaults = flatten(json.loads(json.dumps(asdict(recipe(config["recipe"])))))  # as config.json holds them
    defaults["seed"] = config["seed"]
    words = [_flag(name.replace("_", "-"), value) for name, value in flatten(config).items() if value != defaults[name]]
    called = measures["names"]
    for kind, flag in (("policies", "policy"), ("texts", "texts")) if called else ():
        pairs = [f"{called.get(name, name)}={path}" for name, path in measures[kind].items()]
        words += [_flag(flag, pairs)] if pairs else []
    return " ".join([f"detoxrl {'evaluate' if called else 'run'} {config['recipe']} --seed {config['seed']}", *words])


def _flag(name: str, value: object) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--{name.replace('.', '.no-')}"
    values = value if isinstance(value, list) else [value]
    return shlex.join([f"--{name}", *map(str, values)])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file, all of which must be whole."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def mask_pattern(masked: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern that finds any of these words or its plural as a whole word, in any case, as its one group."""
    stems = ((re.escape(word.removesuffix("y")), word.endswith("y")) for word in sorted(masked, key=len, reverse=True))
    forms = "|".join(f"{stem}(?:y|ies)" if y else f"{stem}(?:e?s)?" for stem, y in stems)
    # An underscore bounds a word, so that _emphasis_ unmasks nothing.
    return re.compile(rf"(?<![^\W_])({forms})(?![^\W_])", re.IGNORECASE)


def segments(text: str, pattern: re.Pattern[str]) -> list[tuple[str, bool]]:
    """Return the pieces of `text`, and of each whether it is masked: unreadable until clicked."""
    return [(piece, place % 2 == 1) for place, piece in enumerate(pattern.split(text)) if piece]


def prompt_rows(samples: list[dict[str, Any]], judge: str) -> list[dict[str, Any]]:
    """Return the samples, most improved first, with an excerpt and `judge`'s scores [0, 1] of the first responses."""
    rows = []
    for sample in samples:
        # Cut between words only: half an insult would escape the mask.
        excerpt = textwrap.shorten(sample["dialogue"], _EXCERPT_CHARACTERS, placeholder=" …", break_on_hyphens=False)
        before, after = (sample["toxicity"][judge][side][0] for side in ("before", "after"))
        scores = {"score_before": before, "score_after": after, "difference": after - before}
        rows.append(sample | scores | {"excerpt": excerpt})
    return sorted(rows, key=lambda row: row["difference"])
