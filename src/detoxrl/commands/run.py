"""What are the stages of a run, each of which takes the run folder alone?"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from detoxrl.commands.measure import measure_run
from detoxrl.commands.prepare import check
from detoxrl.commands.prepare import write as write_prepared
from detoxrl.commands.resume import also_measure, new_record, restart_stage, resume_with
from detoxrl.commands.trackers import chosen, followed
from detoxrl.config.edit import with_settings
from detoxrl.config.recipes import recipe
from detoxrl.config.schema import Config
from detoxrl.data.rows import SPLITS
from detoxrl.errors import require
from detoxrl.evaluation.policies import NO_MODEL, NOTHING, UNTRAINED, Subjects, subjects_of, try_policies
from detoxrl.models.lora import load_policy
from detoxrl.report.page import build_report
from detoxrl.rewards.function import RewardFunction
from detoxrl.runs import (
    base_and_start,
    judges_of,
    local_sources,
    rows_of,
    run_scorer,
    with_absolute_paths,
    with_revisions,
)
from detoxrl.runtime import processes
from detoxrl.runtime.cache import cached, tidy_cache
from detoxrl.runtime.files import content_digest, remove_path, replace_folder
from detoxrl.runtime.run_folder import STAGES, RunFolder, products_from
from detoxrl.training.memory import keep_freed_memory
from detoxrl.training.sft import baseline, warm_start
from detoxrl.training.train import train as train_policy

_MEASURED = ("evaluate", "report")


def run(
    root: Path | str,
    config: Config,
    *,
    overwrite: bool = False,
    resume: bool = False,
    reward: RewardFunction | None = None,
    accept_changes: bool = False,
    track: str | None = None,
) -> dict[str, Any]:
    """Run every stage in a new folder, or with `resume` go on where it stopped, and return what eval.json holds.

    `reward` takes the place of the config's classifier. `accept_changes` goes on with a config or a machine by which
    the run does not end as if never stopped. `track` names a tracker that gets the metrics, "none" ends that; a run
    that goes on keeps its own. Raises InputError for what does not fit, before anything is written.
    """
    root, track = Path(root), chosen(track, Path(root) if resume else None)
    with _begun(root, config, overwrite, resume, reward, accept_changes=accept_changes) as (folder, config):
        with followed(folder, config, track):
            for name in (name for name in _REMAINING if name not in folder.finished()):
                _make(name, folder, config, reward)
        return dict(folder.read_json("eval.json"))


def prepare(root: Path, config: Config, overwrite: bool = False) -> None:
    """Make the run folder: prompts in data/, and the embedded reward model in reward/."""
    with _begun(root, config, overwrite):
        pass


def rerun_stage(root: Path, name: str, reward: RewardFunction | None = None, track: str | None = None) -> None:
    """Run one stage of a prepared folder, from its beginning: sft, train, evaluate or report; `track` as for `run`."""
    folder, config = RunFolder.open(root)
    processes.require_led(config, name == "train")
    track = "none" if name == "report" else chosen(track, root)  # a report needs no tracker, installed or not
    with folder.locked():
        if name in ("sft", "train"):
            for split in SPLITS:  # before anything is deleted
                rows_of(folder, split)
            done = name == "sft" or "sft" in folder.finished()
            remedy = f"run `detoxrl sft {root}` first, or go on with --resume"
            require(done, "run folder", str(root), "has not finished sft", remedy)
        folder.reopen(name)
        if name != "report":
            folder.discard(["responses.jsonl"] if name == "evaluate" else products_from(name))
            restart_stage(folder, config, name)
        with nullcontext() if name == "report" else followed(folder, config, track):
            _make(name, folder, config, reward)


def evaluate(
    root: Path | str,
    config: Config | None = None,
    *,
    policies: Mapping[str, Path | str] | None = None,
    texts: Mapping[str, Path | str] | None = None,
    overwrite: bool = False,
    reward: RewardFunction | None = None,
) -> dict[str, Any]:
    """Measure policies side by side, write the report, and return what eval.json holds.

    With `root` alone a run is measured again, beside it the LoRAs and models in `policies` (by name) if there are any.
    With a config `root` becomes a new folder: before is the config's start, after the first of `policies`, which
    detoxrl need not have made; or before and after are what files of `texts` hold, and a single one is compared with
    its summaries. Raises InputError for what does not fit, before anything is written.
    """
    root, subjects = Path(root), subjects_of(policies, texts, config)
    if config is None:
        folder, config = RunFolder.open(root)
        if subjects.policies:
            try_policies(*base_and_start(folder, config), subjects.policies, config)
            with folder.locked():
                also_measure(folder, config, subjects)
        for stage in _MEASURED:
            rerun_stage(root, stage, reward)
        return dict(folder.read_json("eval.json"))
    config = with_settings(config, NO_MODEL if subjects.texts else UNTRAINED)
    with _begun(root, config, overwrite, subjects=subjects, reward=reward) as (folder, config):
        # Done, so that --resume does not begin to train.
        folder.write_json("seconds.json", folder.finished() | {"sft": 0.0, "train": 0.0})
        for stage in _MEASURED:
            _make(stage, folder, config, reward)
    return dict(folder.read_json("eval.json"))


@contextmanager
def _begun(
    root: Path,
    config: Config,
    overwrite: bool,
    resume: bool = False,
    reward: RewardFunction | None = None,
    subjects: Subjects = NOTHING,
    accept_changes: bool = False,
) -> Iterator[tuple[RunFolder, Config]]:
    """Yield a prepared folder, held, and its config: a new one, or the one to go on with."""
    started = time.perf_counter()
    recipe(config.recipe)  # the report repeats a run from its recipe, so it must be one
    processes.require_led(config, subjects == NOTHING)
    config = with_absolute_paths(config, reward)
    folder, prepared = RunFolder(root), None
    going_on = resume and (root / "config.json").is_file()
    if going_on:
        config = with_revisions(config, RunFolder.open(root)[1])
    else:
        config = _new(root, config, overwrite, subjects)
        prepared = check(config, reward, subjects)
    with folder.locked():
        tidy_cache()
        if going_on:
            resume_with(folder, config, reward, accept_changes)
        else:
            folder.begin(config, new_record(config, asdict(subjects)), overwrite)
        if "prepare" not in folder.finished():
            with folder.timed("prepare", started):
                write_prepared(folder, config, prepared or check(config, reward, subjects))
        yield folder, config


def _new(root: Path, config: Config, overwrite: bool, subjects: Subjects) -> Config:
    """Return the config of a new folder with its revisions. Raises InputError where it would replace what is needed."""
    RunFolder.refuse_unfit(root, overwrite)
    config = with_revisions(config, None)
    for part in (*local_sources(config).values(), *map(Path, (*subjects.policies.values(), *subjects.texts.values()))):
        inside = root.resolve() in (part.resolve(), *part.resolve().parents)
        require(not inside, "--run-dir", str(root), f"holds {part}, which the run needs", "name another folder")
    return config


def _make(name: str, folder: RunFolder, config: Config, given: RewardFunction | None) -> None:
    keep_freed_memory()
    with folder.timed(name) as seconds:
        _REMAINING[name](folder, config, given, seconds)


def _sft(folder: RunFolder, config: Config, given: RewardFunction | None, *_: Any) -> None:
    rows = rows_of(folder, "train")
    if config.sft.steps > 0:
        where, words = "base" if config.sft.full_weights else "start", folder / "tokenizer"
        _tuned(folder, config, where, partial(warm_start, config, rows, words))
    if config.sft.baseline_steps > 0:
        start = base_and_start(folder, config)
        if any(row.civil_reference for row in rows):
            _tuned(folder, config, "baseline", partial(baseline, config, rows, None, *start))
        reward = run_scorer(folder, config, given).reward
        _tuned(folder, config, "expert", partial(baseline, config, rows, reward, *start), keep=False)
    remove_path(folder / "checkpoints/sft")


def _tuned(folder: RunFolder, config: Config, name: str, tune: Callable[[Path, Path], None], keep: bool = True) -> None:
    def build(target: Path) -> None:
        place = folder / "checkpoints/sft" / name
        with replace_folder(target) as temporary:
            tune(temporary, place)
        remove_path(place)

    if (folder / name).is_dir():  # made before the run was stopped
        return
    # Only what starts from nothing but the config is cached: a user's base, or reward, may change behind its name.
    if keep and config.policy.base == "scratch":
        rows = content_digest(folder / "data/train.jsonl")
        ingredients = [repr(config.sft), repr(config.policy), repr(config.data), str(config.seed), rows]
        cached(name, ingredients, folder / name, build)
    else:
        build(folder / name)


def _train(folder: RunFolder, config: Config, given: RewardFunction | None, *_: Any) -> None:
    processes.tell("train", folder, config)
    base, start = base_and_start(folder, config)
    policy = load_policy(base, start, config.policy, config.seed)
    processes.gather(lambda: None)  # the others have loaded theirs, or what hinders one is raised here
    reward, judge = run_scorer(folder, config, given).reward, next(iter(judges_of(config).values()))
    train_policy(folder, config, policy, reward, judge, rows_of(folder, "train"), rows_of(folder, "validation"))


_MAKERS: tuple[Callable[..., object], ...] = (_sft, _train, measure_run, lambda folder, *_: build_report(folder.root))
_REMAINING = dict(zip(STAGES[1:], _MAKERS, strict=True))
