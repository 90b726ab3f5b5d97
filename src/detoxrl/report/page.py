"""How does a run folder become one HTML page?"""

import json
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from detoxrl.config.edit import flatten, setting_types
from detoxrl.config.recipes import recipe
from detoxrl.config.tasks import TASKS
from detoxrl.report import words
from detoxrl.report.identity import answers, raters, refusals
from detoxrl.report.kept import explain_kept, few_prompts
from detoxrl.report.masking import masking_pattern, segments
from detoxrl.report.results import read_evaluation, read_lines, read_validations
from detoxrl.report.sheets import blind_sheets, compared_sheet, differing, samples_sheet
from detoxrl.runtime.files import remove_path
from detoxrl.runtime.run_folder import REWARD_JUDGE, SHARE_WITH_TEXT, RunFolder

# The files that the page needs, and the stage that writes each.
_REQUIRED = {
    "rows.json": "prepare",
    "eval.json": "evaluate",
    "samples.jsonl": "evaluate",
    "masked_words.json": "evaluate",
}
_REGRESSIONS_SHOWN = 10
_EXCERPT_CHARACTERS = 72
# Settings whose defaults follow from what is installed, so that a command without them differs between machines.
_INSTALLED = ("evaluation.primary_judge", "evaluation.other_judges")
# A smaller rise would show as 0.00 in a table with two decimals.
_SMALLEST_REGRESSION = 0.01


def build_report(run_dir: Path) -> Path:
    """Write report.html and its sheets into the run folder; return the page's path.

    Raises InputError if a stage that the report needs has not run.
    """
    folder = RunFolder(run_dir)
    for name, stage in _REQUIRED.items():
        folder.require_product(name, stage)

    config = folder.read_json("config.json")
    evaluation = read_evaluation(folder)
    samples = read_lines(folder / "samples.jsonl")
    _write_sheets(folder, config, evaluation, samples)

    parts = {
        "config": config,
        "task": TASKS[config["data"]["task"]],
        "settings": flatten(config),
        "command": repeat_command(config, folder.read_json("run.json")["measures"]),
        "data": words.data_account(folder.read_json("rows.json")),
        "scored": "score" in samples[0],
        "kept": explain_kept(folder, evaluation),
        **_results(evaluation, samples),
        **_training(folder),
    }
    folder.write("report.html", page("page.html.j2", parts, folder.read_json("masked_words.json")))
    return folder / "report.html"


def _write_sheets(
    folder: RunFolder, config: dict[str, Any], evaluation: dict[str, Any], samples: list[dict[str, Any]]
) -> None:
    """Write the sheets of a run. Only samples.csv has anything to show where training kept the initial policy."""
    kept = words.kept_initial(evaluation)
    task = TASKS[config["data"]["task"]]
    folder.write("samples.csv", samples_sheet(samples, evaluation["primary_judge"], task, with_after=not kept))
    if kept:
        for name in ("compared.csv", "blind_sheet.csv", "blind_key.csv"):
            remove_path(folder / name)  # from an earlier version, which compared the initial policy with itself
        return

    if "score" in samples[0]:
        folder.write("compared.csv", compared_sheet(samples))
    sheet, key = blind_sheets(samples, config["seed"], task)
    folder.write("blind_sheet.csv", sheet)
    folder.write("blind_key.csv", key)


def page(template: str, parts: dict[str, Any], masked: Sequence[str] = ()) -> str:
    """Render a template of this package with `parts`; its filter `segments` masks the words in `masked`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    environment.filters.update(
        number=words.number,
        signed=words.signed,
        percent=words.percent,
        duration=words.duration,
        quality_name=words.quality_name,
        segments=partial(segments, pattern=masking_pattern(masked)),
    )

    return environment.get_template(template).render(parts)


def _results(evaluation: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the page needs to show toxicity, quality and the responses."""
    judge = evaluation["primary_judge"]
    kept = words.kept_initial(evaluation)
    rows = initial_rows(samples, judge) if kept else prompt_rows(samples, judge)

    return {
        "eval": evaluation,
        "primary": evaluation["toxicity"][judge],
        "reward_judge": REWARD_JUDGE,
        "share_with_text": SHARE_WITH_TEXT,
        "not_independent": words.NOT_INDEPENDENT,
        "headline": words.headline(evaluation),
        "changes": words.changes(evaluation),
        "quality_measured": words.shown_quality(evaluation) is not None,
        "setting_changes": words.setting_changes(evaluation),
        "names": evaluation["names"],
        "after": words.after_name(evaluation),
        "systems": words.systems(evaluation),
        "by_prompt": words.by_prompt(evaluation),
        "with_top_p": words.with_top_p(evaluation),
        "joint_scale": words.joint_scale(evaluation),
        "reward_terms": words.reward_terms(evaluation),
        "perspective": words.perspective_scores(evaluation),
        "raters": raters(evaluation),
        "answers": answers(evaluation),
        "refusals": refusals(evaluation),
        "baselines": words.compare_baselines(evaluation),
        "distributions": _distributions(samples, judge, words.sides(evaluation)),
        "rows": rows,
        "regressions": _regressions(rows),
        "blind_rows": len(differing(samples)),
    }


def _distributions(samples: list[dict[str, Any]], judge: str, sides: dict[str, str]) -> list[Any]:
    """Draw the distributions of `judge`'s toxicity over all responses of each side; `sides` has their labels."""
    from detoxrl.report.plots import toxicity_distributions  # here, because matplotlib is slow to import

    scores = {}
    for side, label in sides.items():
        scores[label] = [score for sample in samples for score in sample["toxicity"][judge][side]]
    return toxicity_distributions(scores)


def _regressions(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the prompt rows whose toxicity rose most, largest rise first."""
    risen = [row for row in rows if row["difference"] >= _SMALLEST_REGRESSION]
    return sorted(risen, key=lambda row: row["difference"], reverse=True)[:_REGRESSIONS_SHOWN]


def _training(folder: RunFolder) -> dict[str, Any]:
    """Return what the page needs to show training; `checkpoint` is None where nothing was trained."""
    if not (folder / "checkpoint.json").is_file():
        return {"checkpoint": None}

    from detoxrl.report.plots import DIAGNOSTICS, learning_curves, over_optimisation, training_curves

    checkpoint = folder.read_json("checkpoint.json")
    best_step = checkpoint["kept_step"]
    # Earlier versions did not record the measure.
    quality = words.validation_quality_name(checkpoint.get("quality_by"))

    validations = read_validations(folder)
    metrics = read_lines(folder.require_product("metrics.jsonl", "train"))
    for validation in validations:
        named = {f"validation/{name}": value for name, value in validation.items()}
        metrics.append({"step": validation["step"], **named})

    return {
        "checkpoint": checkpoint,
        "quality_name": quality,
        "few_prompts": few_prompts(folder),
        "curves": learning_curves(metrics, training_curves(quality), best_step),
        "diagnostics": learning_curves(metrics, DIAGNOSTICS, best_step),
        "over_optimisation": over_optimisation(validations, checkpoint, quality),
    }


def repeat_command(config: dict[str, Any], measures: dict[str, Any]) -> str:
    """Return the command that repeats a run: `run`, or `evaluate` with what it measured if nothing was trained."""
    as_json = json.dumps(asdict(recipe(config["recipe"])))  # so that tuples are lists, as in config.json
    defaults = flatten(json.loads(as_json))
    defaults["seed"] = config["seed"]
    settings = flatten(config).items()
    flags = [_setting_flag(name, value) for name, value in settings if value != defaults[name] or name in _INSTALLED]

    names = measures["names"]
    if names:
        for kind, flag in (("policies", "policy"), ("texts", "texts")):
            if measures[kind]:
                flags.append(_flag(flag, _named(measures[kind], names)))

    command = "evaluate" if names else "run"
    return " ".join([f"detoxrl {command} {config['recipe']} --seed {config['seed']}", *flags])


def _setting_flag(name: str, value: object) -> str:
    """Return a setting as a flag; one that is either on or off stands alone."""
    flag = name.replace("_", "-")
    if setting_types()[name] is bool:
        return f"--{flag}" if value else f"--{flag.replace('.', '.no-')}"
    return _flag(flag, value)


def _flag(name: str, value: object) -> str:
    values = (value or ["none"]) if isinstance(value, list) else [value]
    return shlex.join([f"--{name}", *map(str, values)])


def _named(paths: dict[str, str], names: dict[str, str]) -> list[str]:
    """Return NAME=PATH for each path; `names` has the names of "before" and "after"."""
    return [f"{names.get(role, role)}={path}" for role, path in paths.items()]


def prompt_rows(samples: list[dict[str, Any]], judge: str) -> list[dict[str, Any]]:
    """Return the samples, most improved first, with an excerpt and `judge`'s scores [0, 1] of the first responses."""
    rows = []
    for sample in samples:
        # Cut between words only: the mask would not match half an insult.
        excerpt = textwrap.shorten(sample["text"], _EXCERPT_CHARACTERS, placeholder=" …", break_on_hyphens=False)

        before = sample["toxicity"][judge]["before"][0]
        after = sample["toxicity"][judge]["after"][0]
        scores = {"score_before": before, "score_after": after, "difference": after - before}
        rows.append({**sample, **scores, "excerpt": excerpt})

    return sorted(rows, key=lambda row: row["difference"])


def initial_rows(samples: list[dict[str, Any]], judge: str) -> list[dict[str, Any]]:
    """Return the samples of the initial policy alone, most toxic first, in the shape of `prompt_rows`."""
    return sorted(prompt_rows(samples, judge), key=lambda row: row["score_before"], reverse=True)
