"""Which runs does a sweep make?

It is known before anything slow is imported: no torch is needed for the answer.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from detoxrl.commands.preflight import check_locally
from detoxrl.commands.tracker_state import resolve_tracker
from detoxrl.config.edit import flatten, with_settings, without_stale_targets
from detoxrl.config.schema import Config
from detoxrl.errors import require
from detoxrl.runtime.run_folder import IfExists, RunFolder

STATE = "sweep.json"


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """What to try and who receives it, as the command line has it."""

    over: Sequence[str] = ()  # Settings with their values, as in `rl.kl-coef=0.05,0.2`.
    seeds: Sequence[str] = ()  # Seeds that every combination is repeated with; none: the config's.
    track: str | None = None  # A tracker that receives the metrics of every run.


class PlannedRun(NamedTuple):
    """One run of a sweep."""

    label: str  # Its combination of values in words.
    config: Config


def planned_sweep(
    root: Path, config: Config, plan: SweepPlan, if_exists: IfExists
) -> tuple[SweepPlan, dict[str, PlannedRun]]:
    """Return the plan of a sweep in `root`, with what a sweep that exists there tried, and its runs by folder name.

    Raises InputError for a folder that cannot be used, a tracker that is not installed, a plan that does not fit, and
    for local files of a run that do not fit unless that run is resumed. Writes nothing.
    """
    exists = (root / STATE).is_file()
    if exists:
        remedy = "add --resume to continue it, --overwrite to start again, or name another folder"
        require(if_exists != "error", "--run-dir", str(root), "already exists", remedy)
        plan = _with_earlier_plan(root, plan, if_exists.startswith("resume"))
    else:
        _require_new(root)

    resolve_tracker(plan.track)
    remedy = "add --over rl.kl-coef=0.05,0.2, or --seeds 0,1"
    require(bool(plan.over or plan.seeds), "--over", "", "is missing", remedy)

    runs = plan_runs(config, plan)
    resumes = if_exists.startswith("resume")
    unstarted = [run for name, run in runs.items() if not (resumes and (root / name).is_dir())]
    for run in {run.label: run for run in unstarted}.values():
        check_locally(run.config)
    return plan, runs


def _with_earlier_plan(root: Path, plan: SweepPlan, resumes: bool) -> SweepPlan:
    """Return the plan with what the existing sweep in `root` tried where the plan leaves it open."""
    previous = RunFolder(root).read_json(STATE)
    if not plan.over and (resumes or not plan.seeds):
        plan = replace(plan, over=previous["over"], seeds=plan.seeds or previous["seeds"])
    if resumes:
        plan = replace(plan, track=plan.track or previous.get("track"))
    return plan


def plan_runs(config: Config, plan: SweepPlan) -> dict[str, PlannedRun]:
    """Return the run of each combination and seed, by the name of its folder.

    Raises InputError for an unknown setting, a value that is not allowed, and duplicates.
    """
    values = _parsed_values(plan.over)
    runs: dict[str, PlannedRun] = {}
    for *combination, seed in itertools.product(*values.values(), plan.seeds or [str(config.seed)]):
        settings = dict(zip(values, combination, strict=True))
        settings["seed"] = seed
        changed = with_settings(config, without_stale_targets(settings))

        flat = flatten(asdict(changed))
        label = " ".join(f"{setting}={flat[setting]}" for setting in values) or "as given"
        name = re.sub(r"[^\w.=+-]+", "_", f"{label} seed={changed.seed}")
        rule = "is a duplicate"
        require(name not in runs, "--over, --seeds", f"{label} seed {seed}", rule, "name each value once")
        runs[name] = PlannedRun(label, changed)
    return runs


def _parsed_values(over: Sequence[str]) -> dict[str, list[str]]:
    """Return the values to try by setting. Raises InputError for what is not FIELD=VALUES, and for duplicates."""
    values: dict[str, list[str]] = {}
    for text in over:
        name, _, several = text.partition("=")
        require(bool(name and several), "--over", text, "must be FIELD=VALUES", "write --over rl.kl-coef=0.05,0.2")

        name = name.replace("-", "_")
        require(name not in values, "--over", name, "is given twice", "give all its values at once")
        values[name] = several.split(",")

    require("seed" not in values, "--over", "seed", "is not a setting to compare", "write --seeds 0,1,2")
    return values


def _require_new(root: Path) -> None:
    """Raise InputError unless `root` is a folder without content, or can be created."""
    empty = not root.is_dir() or not any(root.iterdir())
    require(empty, "--run-dir", str(root), "is not a sweep", "name another folder; nothing was deleted")
    RunFolder.require_usable(root, overwrite=False)
