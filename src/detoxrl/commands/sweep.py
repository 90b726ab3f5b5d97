"""Which values of the settings give the least toxicity for the quality they leave?"""

import itertools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from detoxrl.commands import run as stages
from detoxrl.commands.prepare import check
from detoxrl.commands.trackers import chosen
from detoxrl.config.edit import config_to_json, flatten, with_settings
from detoxrl.config.schema import Config
from detoxrl.errors import TrainingError, require
from detoxrl.evaluation.statistics import two_stage_interval
from detoxrl.report.page import page, read_lines
from detoxrl.report.terminal import print_sweep
from detoxrl.runs import with_absolute_paths, with_revisions
from detoxrl.runtime import processes
from detoxrl.runtime.console import log
from detoxrl.runtime.run_folder import RunFolder

_SIDES, _RESAMPLES = ("before", "after"), 2000


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the places of the (toxicity, quality) that no other beats: as good in both, better in one. Ties stay."""

    return [
        place
        for place, (toxicity, quality) in enumerate(points)
        if not any(t <= toxicity and q >= quality and (t, q) != (toxicity, quality) for t, q in points)
    ]


def planned(config: Config, over: Sequence[str], seeds: Sequence[str]) -> dict[str, tuple[str, Config]]:
    """Return each combination in words and its config, with each seed, by the name of its folder.

    `over` are settings with their values, as in `rl.kl-coef=0.05,0.2`. Raises InputError for a setting that is none, a
    value that is not allowed, and what is there twice.
    """
    values: dict[str, list[str]] = {}
    for text in over:
        name, _, several = text.partition("=")
        require(bool(name and several), "--over", text, "must be FIELD=VALUES", "say --over rl.kl-coef=0.05,0.2")
        name = name.replace("-", "_")
        require(name not in values, "--over", name, "comes a second time", "give all its values at once")
        values[name] = several.split(",")
    require("seed" not in values, "--over", "seed", "is what combinations are repeated with", "say --seeds 0,1,2")
    runs: dict[str, tuple[str, Config]] = {}
    for *some, seed in itertools.product(*values.values(), seeds or [str(config.seed)]):
        given = with_settings(config, dict(zip(values, some, strict=True)) | {"seed": seed})
        label = " ".join(f"{name}={flatten(asdict(given))[name]}" for name in values) or "as given"
        name = re.sub(r"[^\w.=+-]+", "_", f"{label} seed={given.seed}")
        require(name not in runs, "--over, --seeds", f"{label} seed {seed}", "is there twice", "name each value once")
        runs[name] = (label, given)
    return runs


def sweep(root: Path, config: Config, over: Sequence[str], seeds: Sequence[str], **how: Any) -> None:
    """Run every combination of values with every seed in `root`; write sweep.json and sweep.html, print the table.

    `how` is overwrite, resume, accept_changes, track of `stages.run`. With `resume` what is finished stays, and without
    `over` and `seeds` those of before are meant. A run that ends in a TrainingError is recorded, and the others go on.
    Raises InputError before anything is written for what does not fit, TrainingError when no run has a result.
    """
    folder, begun = RunFolder(root), (root / "sweep.json").is_file()
    if begun:
        remedy = "add --resume to go on, --overwrite to begin anew, or name another folder"
        require(how["resume"] or how["overwrite"], "--run-dir", str(root), "exists already", remedy)
        if not over and (how["resume"] or not seeds):
            before = folder.read_json("sweep.json")
            over, seeds = before["over"], seeds or before["seeds"]
    else:
        new = not root.is_dir() or not any(root.iterdir())
        require(new, "--run-dir", str(root), "is no folder of a sweep", "name another folder; nothing was deleted")
        RunFolder.refuse_unfit(root, overwrite=False)
    if begun and how["resume"]:
        how["track"] = how["track"] or folder.read_json("sweep.json").get("track")
    chosen(how["track"])
    require(bool(over or seeds), "--over", "", "is missing", "say --over rl.kl-coef=0.05,0.2, or --seeds 0,1")
    runs, found = planned(config, over, seeds), {"over": over, "seeds": seeds, "track": how["track"]}
    for one in () if begun else dict(runs.values()).values():  # what does not fit is found before hours have passed
        processes.require_led(one, trains=True)
        check(with_revisions(with_absolute_paths(one), None))
    folder.write("base.json", config_to_json(config))
    folder.write_json("sweep.json", found)
    results: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for count, (name, (label, one)) in enumerate(runs.items(), start=1):
        log.print(f"run {count} of {len(runs)}: {label} seed {one.seed}")
        try:
            outcome = _outcome(RunFolder(root / name), stages.run(root / name, one, **how))
        except TrainingError as error:
            log.print(f"{name}: {error}")
            outcome = {"error": str(error)}
        results[label].append({"folder": name, "seed": one.seed} | outcome)
    whole = found | _summary(root, results)
    folder.write_json("sweep.json", whole)
    from detoxrl.report.plots import frontier_plot

    folder.write("sweep.html", page("sweep.html.j2", whole | {"plot": frontier_plot(whole)}))
    print_sweep(root, whole)


def _outcome(run: RunFolder, evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return what a finished run is worth: toxicity and quality, each before and after, and its kept checkpoint."""
    judge, quality, checkpoint = evaluation["primary_judge"], evaluation["quality"], run.read_json("checkpoint.json")
    measure = next(name for name in ("facts", "rouge_l", "empty_rate") if name in quality)
    sides = [1 - quality[measure][side] if measure == "empty_rate" else quality[measure][side] for side in _SIDES]
    return {name: checkpoint[name] for name in ("kept_step", "parted_step", "stopped_step")} | {
        "judge": judge, "measure": measure.replace("empty_rate", "share with text"), "quality": sides,
        "toxicity": [evaluation["toxicity"][judge][side]["mean"] for side in _SIDES], "kl": checkpoint["kept"]["kl"],
    }  # fmt: skip


def _summary(root: Path, results: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return by combination its runs, their means with an interval, and whether it is on the frontier; and the start.

    A combination of which every run failed has no means. Raises TrainingError when none has any.
    """
    combinations, finished = dict[str, dict[str, Any]](), list[dict[str, Any]]()
    for label, runs in results.items():
        combinations[label] = {"runs": runs, "frontier": False}
        if done := [run for run in runs if "error" not in run]:
            for key in ("toxicity", "quality", "kl"):
                combinations[label][key] = np.mean([run[key] for run in done], axis=0).tolist()
            samples = [(read_lines(root / run["folder"] / "samples.jsonl"), run["judge"]) for run in done]
            after = [np.array([one["toxicity"][judge]["after"] for one in ones]) for ones, judge in samples]
            combinations[label]["interval"] = two_stage_interval(after, _RESAMPLES, seed=0)
            finished += done
    if not finished:
        raise TrainingError(f"no run in {root} has a result; each is named above with what ended it")
    means = [one for one in combinations.values() if "kl" in one]
    for place in frontier([(one["toxicity"][1], one["quality"][1]) for one in means]):
        means[place]["frontier"] = True
    start = [float(np.mean([run[key][0] for run in finished])) for key in ("toxicity", "quality")]
    about = {"judge": finished[0]["judge"], "measure": finished[0]["measure"]}
    return about | {"start": start, "combinations": combinations}
