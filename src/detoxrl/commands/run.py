"""What are the stages of a run, each of which needs the run folder alone?"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState

from detoxrl.commands.measure import measure_run
from detoxrl.commands.preflight import check_stage, check_subjects, checked_run, checked_subjects
from detoxrl.commands.prepare import check, write_prepared
from detoxrl.commands.resume import also_measure, new_record, restart_stage, resume_with
from detoxrl.commands.tracker_state import resolve_tracker
from detoxrl.commands.trackers import tracking
from detoxrl.commands.workload import PROPORTIONS, bar_seconds
from detoxrl.config.recipes import recipe
from detoxrl.config.schema import Config
from detoxrl.config.sources import local_sources
from detoxrl.data.rows import SPLITS
from detoxrl.errors import require
from detoxrl.evaluation.policies import MeasuredPolicies, try_policies
from detoxrl.evaluation.subjects import NO_SUBJECTS, Subjects, measuring_config, subjects_of, with_commits
from detoxrl.models.lora import with_lora_targets
from detoxrl.report.page import build_report
from detoxrl.rewards.function import RewardFunctions, is_given
from detoxrl.runs import Run, with_reward_name
from detoxrl.runtime.allocator import keep_freed_memory
from detoxrl.runtime.cache import tidy_cache
from detoxrl.runtime.console import begin_stage, run_progress
from detoxrl.runtime.run_folder import STAGES, IfExists, RunFolder, products_from
from detoxrl.runtime.world import current_world
from detoxrl.training.sft import run_sft
from detoxrl.training.train import train

_MEASURING_STAGES = ("evaluate", "report")


def run(
    root: Path | str,
    config: Config,
    *,
    if_exists: IfExists = "error",
    reward: RewardFunctions | None = None,
    track: str | None = None,
) -> dict[str, Any]:
    """Run every stage in a new folder, or resume the run in an existing one, and return what eval.json holds.

    `if_exists` says what to do with an existing folder; "resume with changes" resumes with other settings or on another
    machine, so that the result differs from an uninterrupted run. `reward` replaces the config's classifier. `track`
    names a tracker that receives the metrics; "none" ends that, and a resumed run keeps its own. Raises InputError for
    what does not fit, before anything is written.
    """
    root = Path(root)
    resumes = if_exists in ("resume", "resume with changes")
    track = resolve_tracker(track, root if resumes else None)
    with (
        run_progress(STAGES) as overall,
        _started(root, config, if_exists, reward) as started,
        tracking(started, track),
    ):
        if "evaluate" not in started.folder.finished():
            rows = {split: started.rows(split) for split in SPLITS}
            overall.expect(bar_seconds(started.config, rows, PROPORTIONS))
        for stage in STAGES[1:]:
            if stage not in started.folder.finished():
                _run_stage(started, stage)
        return dict(started.folder.read_json("eval.json"))


def prepare(root: Path, config: Config, if_exists: IfExists = "error") -> None:
    """Make the run folder: prompts in data/, and the embedded reward model in reward/."""
    with _started(root, config, if_exists):
        pass


def rerun_stage(root: Path, stage: str, reward: RewardFunctions | None = None, track: str | None = None) -> None:
    """Run one stage of a prepared folder from its beginning: sft, train, evaluate or report; `track` as for `run`."""
    folder, config = RunFolder.open(root)
    config = with_reward_name(config, reward)
    check_stage(folder, config, stage, partial(is_given, functions=reward))
    require_one_leader(config, trains=stage == "train")
    track = (
        "none" if stage == "report" else resolve_tracker(track, root)
    )  # A report needs no tracker, installed or not.
    with folder.locked():
        current = Run(folder, config, reward)
        _require_earlier_stages(current, stage)
        folder.reopen(stage)
        folder.forget_parts()
        if stage != "report":
            folder.discard(["responses.jsonl"] if stage == "evaluate" else products_from(stage))
            restart_stage(folder, config, stage)
        with nullcontext() if stage == "report" else tracking(current, track):
            _run_stage(current, stage)


def _require_earlier_stages(run: Run, stage: str) -> None:
    """Raise InputError, before anything is deleted, when a stage that trains lacks rows or the warm start."""
    if stage not in ("sft", "train"):
        return

    for split in SPLITS:
        run.rows(split)
    has_warm_start = stage == "sft" or "sft" in run.folder.finished()
    remedy = f"run `detoxrl sft {run.folder.root}` first, or use --resume"
    require(has_warm_start, "run folder", str(run.folder.root), "has not finished sft", remedy)


def evaluate(
    root: Path | str,
    config: Config | None = None,
    *,
    policies: Mapping[str, Path | str] | None = None,
    texts: Mapping[str, Path | str] | None = None,
    overwrite: bool = False,
    reward: RewardFunctions | None = None,
) -> dict[str, Any]:
    """Measure policies side by side, write the report, and return what eval.json holds.

    With `root` alone a run is measured again, beside it the LoRAs and models in `policies` (by name) if there are any.
    With a config `root` becomes a new folder: "before" is the config's initial policy, "after" the first of `policies`,
    which may come from elsewhere; or they are the responses that files of `texts` hold, and a single file is compared
    with its references. Raises InputError for what does not fit, before anything is written.
    """
    root = Path(root)
    subjects = subjects_of(policies, texts, config)
    if config is None:
        return _evaluate_run(root, subjects, reward)

    subjects = checked_subjects(subjects, with_reward_name(config, reward), partial(is_given, functions=reward))
    if_exists: IfExists = "overwrite" if overwrite else "error"
    config = measuring_config(config, subjects)
    stages = ("prepare", *_MEASURING_STAGES)
    with run_progress(stages), _started(root, config, if_exists, reward, subjects) as started:
        # Training counts as finished, so that --resume does not start it.
        finished = started.folder.finished()
        started.folder.write_json("seconds.json", {**finished, "sft": 0.0, "train": 0.0})
        for stage in _MEASURING_STAGES:
            _run_stage(started, stage)
    return dict(started.folder.read_json("eval.json"))


def _evaluate_run(root: Path, subjects: Subjects, reward: RewardFunctions | None) -> dict[str, Any]:
    folder, config = RunFolder.open(root)
    check_subjects(subjects)
    check_stage(folder, with_reward_name(config, reward), "evaluate", partial(is_given, functions=reward))
    subjects = with_commits(subjects)
    if subjects.policies:
        _try_beside(Run(folder, config), subjects)
        with folder.locked():
            also_measure(folder, config, subjects)
    for stage in _MEASURING_STAGES:
        rerun_stage(root, stage, reward)
    return dict(folder.read_json("eval.json"))


def _try_beside(run: Run, subjects: Subjects) -> None:
    """Raise InputError unless the subjects can be measured beside a run. Nothing stays in memory."""
    run.require_warm_start()
    policies = MeasuredPolicies(run.base, run.adapter, {}, subjects.policies, run.config)
    try_policies(policies, subjects.policies, run.config, run.rows("test"))


@contextmanager
def _started(
    root: Path,
    config: Config,
    if_exists: IfExists,
    reward: RewardFunctions | None = None,
    subjects: Subjects = NO_SUBJECTS,
) -> Iterator[Run]:
    """Yield the run of a prepared, locked folder: a new one, or the one to resume."""
    started_at = time.perf_counter()
    recipe(config.recipe)  # The report repeats a run from its recipe, so that has to exist.
    require_one_leader(config, trains=subjects == NO_SUBJECTS)
    folder = RunFolder(root)
    resumes = if_exists in ("resume", "resume with changes") and (root / "config.json").is_file()
    config = checked_run(root, with_reward_name(config, reward), if_exists, partial(is_given, functions=reward))
    if subjects == NO_SUBJECTS and not resumes:
        config = with_lora_targets(config)
    current = Run(folder, config, reward)
    prepared = None
    if not resumes:
        _require_apart(root, config, subjects)
        prepared = check(current, subjects)

    with folder.locked():
        tidy_cache()
        if resumes:
            resume_with(current, accept_changes=if_exists == "resume with changes")
        else:
            record = new_record(current.config, asdict(subjects))
            folder.begin(current.config, record, if_exists == "overwrite")
        if "prepare" not in folder.finished():
            begin_stage("prepare")
            with folder.timed("prepare", started_at):
                write_prepared(current, prepared or check(current, subjects))
        yield current


def require_one_leader(config: Config, trains: bool) -> None:
    """Raise InputError when processes were started that do not serve the main one, or more than a step has prompts."""
    world = current_world()
    started = PartialState().num_processes
    rule = "were started, and in Python each would make a run of its own"
    require(
        started == world.size, "processes", started, rule, "use `torchrun -m detoxrl run`, with the reward in a file"
    )

    prompts = config.rl.prompts_per_step
    rule = f"gives {prompts} prompts a step, fewer than the {started} processes"
    enough = not trains or started <= prompts
    require(enough, "rl.batch_size", config.rl.batch_size, rule, "start fewer processes, or raise it")


def _require_apart(root: Path, config: Config, subjects: Subjects) -> None:
    """Raise InputError when the new folder would replace something that the run reads."""
    given = [Path(path) for path in (*subjects.policies.values(), *subjects.texts.values())]
    for path in (*local_sources(config).values(), *given):
        resolved = path.resolve()
        is_inside = root.resolve() in (resolved, *resolved.parents)
        require(not is_inside, "--run-dir", str(root), f"holds {path}, which the run needs", "name another folder")


def _run_stage(run: Run, stage: str) -> None:
    keep_freed_memory()
    begin_stage(stage)
    with run.folder.timed(stage) as seconds:
        _STAGES[stage](run, seconds)


_STAGES: dict[str, Callable[[Run, Callable[[], dict[str, float]]], object]] = {
    "sft": lambda run, seconds: run_sft(run),
    "train": lambda run, seconds: train(run),
    "evaluate": measure_run,
    "report": lambda run, seconds: build_report(run.folder.root),
}
