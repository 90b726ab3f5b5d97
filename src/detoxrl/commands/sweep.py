"""Which values of the settings give the least toxicity for the quality they leave?"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from detoxrl.commands import run as stages
from detoxrl.commands.preflight import checked_config
from detoxrl.commands.prepare import check
from detoxrl.commands.sweep_plan import STATE, PlannedRun, SweepPlan, planned_sweep
from detoxrl.config.edit import config_to_json
from detoxrl.config.schema import Config
from detoxrl.config.sources import with_absolute_paths
from detoxrl.errors import TrainingError
from detoxrl.evaluation.statistics import two_stage_interval
from detoxrl.models.lora import with_lora_targets
from detoxrl.report.page import page
from detoxrl.report.results import read_lines
from detoxrl.report.terminal import print_sweep
from detoxrl.report.words import main_quality
from detoxrl.runs import Run
from detoxrl.runtime.console import log
from detoxrl.runtime.run_folder import SHARE_WITH_TEXT, IfExists, RunFolder

Outcome = dict[str, Any]
_SIDES = ("before", "after")
_RESAMPLES = 2000


def sweep(root: Path, config: Config, plan: SweepPlan, if_exists: IfExists = "error") -> None:
    """Run every combination of values with every seed in `root`; write sweep.json and sweep.html, print the table.

    A resumed sweep keeps the runs that are finished, and its plan and tracker unless others are given. A run that ends
    in a TrainingError is recorded, and the others follow. Raises InputError before anything is written for arguments
    that do not fit, and TrainingError when no run has a result.
    """
    folder = RunFolder(root)
    resumes = if_exists.startswith("resume") and (root / STATE).is_file()
    plan, runs = planned_sweep(root, config, plan, if_exists)
    if not resumes:
        _check(root, runs.values())

    state: dict[str, Any] = asdict(plan)
    folder.write("base.json", config_to_json(config))
    folder.write_json(STATE, state)

    outcomes: dict[str, list[Outcome]] = defaultdict(list)
    for number, (name, run) in enumerate(runs.items(), start=1):
        log.print(f"run {number} of {len(runs)}: {run.label} seed {run.config.seed}")
        outcome = _run(root / name, run.config, if_exists, plan.track)
        outcomes[run.label].append({"folder": name, "seed": run.config.seed, **outcome})

    state.update(_summary(root, outcomes))
    folder.write_json(STATE, state)
    _write_page(folder, state)
    print_sweep(root, state)


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the (toxicity, quality) points that no other point dominates.

    A point dominates another if it is as good in both and better in one: less toxic, or of higher quality. Ties stay.
    """

    def dominated(point: tuple[float, float]) -> bool:
        return any(other[0] <= point[0] and other[1] >= point[1] and other != point for other in points)

    return [index for index, point in enumerate(points) if not dominated(point)]


def _check(root: Path, runs: Iterable[PlannedRun]) -> None:
    """Raise InputError if a combination cannot run, before the others have taken hours."""
    combinations = {run.label: run.config for run in runs}
    for config in combinations.values():
        stages.require_one_leader(config, trains=True)
        check(Run(RunFolder(root), with_lora_targets(checked_config(with_absolute_paths(config)))))


def _run(root: Path, config: Config, if_exists: IfExists, track: str | None) -> Outcome:
    """Run a config in `root` and return its outcome, or the TrainingError that ended it."""
    try:
        evaluation = stages.run(root, config, if_exists=if_exists, track=track)
    except TrainingError as error:
        log.print(f"{root.name}: {error}")
        return {"error": str(error)}

    return _outcome(RunFolder(root), evaluation)


def _outcome(run: RunFolder, evaluation: dict[str, Any]) -> Outcome:
    """Return toxicity and quality of a finished run, each before and after, and its best checkpoint."""
    judge = evaluation["primary_judge"]
    quality = evaluation["quality"]
    measure = main_quality(evaluation)
    if measure is None:
        measure = SHARE_WITH_TEXT
        qualities = [1 - quality["empty_rate"][side] for side in _SIDES]
    else:
        qualities = [quality[measure][side] for side in _SIDES]

    checkpoint = run.read_json("checkpoint.json")
    return {
        "kept_step": checkpoint["kept_step"],
        "parted_step": checkpoint["parted_step"],
        "stopped_step": checkpoint["stopped_step"],
        "judge": judge,
        "measure": measure,
        "quality": qualities,
        "toxicity": [evaluation["toxicity"][judge][side]["mean"] for side in _SIDES],
        "kl": checkpoint["kept"]["kl"],
    }


def _summary(root: Path, outcomes: Mapping[str, list[Outcome]]) -> dict[str, Any]:
    """Return each combination with its runs, its means and whether it is on the frontier, and the start's means.

    A combination whose runs all failed has no means. Raises TrainingError when none has any.
    """
    finished = [run for runs in outcomes.values() for run in runs if "error" not in run]
    if not finished:
        raise TrainingError(f"no run in {root} has a result; each is named above with the error that ended it")

    combinations = {label: _combination(root, runs) for label, runs in outcomes.items()}
    measured = [combination for combination in combinations.values() if "kl" in combination]
    for index in frontier([(combination["toxicity"][1], combination["quality"][1]) for combination in measured]):
        measured[index]["frontier"] = True

    return {
        "judge": finished[0]["judge"],
        "measure": finished[0]["measure"],
        "start": [float(np.mean([run[key][0] for run in finished])) for key in ("toxicity", "quality")],
        "combinations": combinations,
    }


def _combination(root: Path, runs: list[Outcome]) -> dict[str, Any]:
    """Return the runs of a combination, and the means of those that finished with an interval of their toxicity."""
    combination: dict[str, Any] = {"runs": runs, "frontier": False}
    finished = [run for run in runs if "error" not in run]
    if finished:
        for key in ("toxicity", "quality", "kl"):
            combination[key] = np.mean([run[key] for run in finished], axis=0).tolist()

        toxicities = []
        for run in finished:
            samples = read_lines(root / run["folder"] / "samples.jsonl")
            toxicities.append(np.array([sample["toxicity"][run["judge"]]["after"] for sample in samples]))
        combination["interval"] = two_stage_interval(toxicities, _RESAMPLES, seed=0)

    return combination


def _write_page(folder: RunFolder, state: dict[str, Any]) -> None:
    from detoxrl.report.plots import frontier_plot  # matplotlib takes seconds to import

    parts = {**state, "measured": state["measure"] != SHARE_WITH_TEXT, "plot": frontier_plot(state)}
    folder.write("sweep.html", page("sweep.html.j2", parts))
