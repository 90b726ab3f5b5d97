"""What are the stages of a run, and what does each read and write?

Every stage takes the run folder alone, so each can run in its own process.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from accelerate import PartialState

from detoxrl.cache import cached
from detoxrl.config import Config
from detoxrl.data.rows import Row, read_rows, to_prompts
from detoxrl.errors import require
from detoxrl.evaluation.judges import Judge, profanity_judge
from detoxrl.evaluation.measure import comparison, measure, splits, toxic_words, two_by_two
from detoxrl.parts import absolute, base_and_start, judge_name, judge_of, places, run_scorer, with_function
from detoxrl.policy.adapters import load_policy
from detoxrl.prepare import check, say_cached
from detoxrl.prepare import write as write_prepared
from detoxrl.recipes import recipe
from detoxrl.report.build import build_report
from detoxrl.rewards.function import RewardFunction
from detoxrl.rollout import sample_texts
from detoxrl.settings import changed, flatten
from detoxrl.sft import civil_baseline, warm_start
from detoxrl.tracking import REWARD_JUDGE, STAGES, RunFolder, filling, progress, reading
from detoxrl.train import train as train_policy

# What train and the stages after it make: gone as soon as something before them is made anew.
_PRODUCTS = (
    "adapter", "state", "checkpoint.json", "normaliser.json", "metrics.jsonl", "validation.jsonl", "rollouts.jsonl",
    "eval.json", "samples.jsonl", "masked_words.json", "report.html", "samples.csv", "blind_sheet.csv",
    "blind_key.csv",
)  # fmt: skip


def _quieten_libraries() -> None:
    # Progress bars and notices of others would tear ours apart; their errors still come through.
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
    huggingface_hub.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


_quieten_libraries()


def run(
    root: Path | str,
    config: Config,
    *,
    overwrite: bool = False,
    resume: bool = False,
    reward: RewardFunction | None = None,
) -> dict[str, Any]:
    """Run every stage in a new folder, or with `resume` those that are not done, and return what eval.json holds.

    `reward` takes the place of the config's classifier. Raises InputError for what does not fit, before anything is
    written.
    """
    folder, config = _begun(Path(root), config, overwrite, resume, reward)
    for name, stage in _REMAINING.items():
        if name not in folder.finished():
            stage(folder, config, reward)
    evaluation: dict[str, Any] = folder.read_json("eval.json")
    return evaluation


def prepare(root: Path, config: Config, overwrite: bool = False) -> None:
    """Make the run folder: prompts in data/, and the embedded reward model in reward/."""
    _begun(root, config, overwrite, False, None)


def again(root: Path, name: str) -> None:
    """Run one stage of a prepared folder, from its beginning: sft, train, evaluate or report."""
    folder, config = RunFolder.open(root)
    if name == "train":
        folder.discard("state")
    _REMAINING[name](folder, config, None)


def evaluate(
    root: Path | str,
    config: Config | None = None,
    *,
    adapter: Path | str | None = None,
    overwrite: bool = False,
    reward: RewardFunction | None = None,
) -> dict[str, Any]:
    """Measure a policy before and after on held-out prompts, write the report, and return what eval.json holds.

    With `root` alone a trained run is measured again. With a config and a folder `adapter`, which detoxrl need not have
    made, `root` becomes a new folder: before is the config's base, after the base with that LoRA, or with full weights
    the model that is there.
    """
    if config is None:
        require(adapter is None, "adapter", str(adapter), "needs the config of its base", "give config too")
        folder, config = RunFolder.open(Path(root))
    else:
        require(adapter is not None, "adapter", None, "is missing", "give the folder to measure")
        config = changed(config, {"sft.steps": 0, "sft.baseline_steps": 0})
        folder, config = _begun(Path(root), config, overwrite, False, reward, str(adapter))
        with folder.timed("sft"):
            shutil.copytree(str(adapter), folder / "adapter")
        with folder.timed("train"):
            pass  # done, so that --resume does not begin to train
    _evaluate(folder, config, reward)
    _report(folder, config, reward)
    evaluation: dict[str, Any] = folder.read_json("eval.json")
    return evaluation


def _begun(
    root: Path,
    config: Config,
    overwrite: bool,
    resume: bool,
    reward: RewardFunction | None,
    adapter: str | None = None,
) -> tuple[RunFolder, Config]:
    """Return a prepared folder and its config: a new one, or the one to go on with."""
    started = time.perf_counter()
    recipe(config.recipe)  # the report repeats a run from its recipe, so it must be one
    config = absolute(with_function(config, reward))
    prepared = None
    if resume and (root / "config.json").is_file():
        folder, stored = RunFolder.open(root)
        _refuse_changes(flatten(asdict(stored)), flatten(asdict(config)))
    else:
        RunFolder.refuse_unfit(root, overwrite)
        _refuse_own_parts(root, [*map(str, places(config).values()), *filter(None, [adapter])])
        prepared = check(config, reward, adapter)
        folder = RunFolder.create(root, config, overwrite)
    if "prepare" not in folder.finished():
        with folder.timed("prepare", started):
            write_prepared(folder, config, prepared or check(config, reward))
    return folder, config


def _refuse_own_parts(root: Path, parts: list[str]) -> None:
    """Raise InputError when a new run would delete what it is built from."""
    for part in parts:
        inside = root.resolve() in (Path(part).resolve(), *Path(part).resolve().parents)
        require(not inside, "--run-dir", str(root), f"holds {part}, which the run needs", "name another folder")


def _refuse_changes(stored: dict[str, Any], asked: dict[str, Any]) -> None:
    for name, value in asked.items():
        rule = f"differs from the run's {stored[name]!r}"
        remedy = "go on without recipe and settings (--resume --run-dir DIR), or begin anew with --overwrite"
        require(value == stored[name], name, value, rule, remedy)


def _rows(folder: RunFolder, split: str) -> list[Row]:
    path = folder.need(f"data/{split}.jsonl", "prepare")
    with reading(path):
        return read_rows(path)


def _sft(folder: RunFolder, config: Config, given: RewardFunction | None) -> None:
    with folder.timed("sft"):
        folder.discard(*_PRODUCTS)
        rows = _rows(folder, "train")
        if config.sft.steps > 0:
            where = "base" if config.sft.full_weights else "start"
            _fine_tuned(folder, config, where, lambda target: warm_start(config, rows, target, folder / "tokenizer"))
        if config.sft.baseline_steps > 0 and any(row.civil_reference for row in rows):
            base, start = base_and_start(folder, config)
            _fine_tuned(folder, config, "baseline", lambda target: civil_baseline(config, base, start, rows, target))


def _fine_tuned(folder: RunFolder, config: Config, name: str, build: Callable[[Path], None]) -> None:
    # Only what starts from nothing but the config is cached: a user's base may change behind its name.
    if config.policy.base != "scratch":
        with filling(folder / name) as target:
            build(target)
        return
    rows = hashlib.sha256((folder / "data/train.jsonl").read_bytes()).hexdigest()
    ingredients = [repr(config.sft), repr(config.policy), repr(config.data), str(config.seed), rows]
    say_cached(name, cached(name, ingredients, folder / name, build))


def _train(folder: RunFolder, config: Config, given: RewardFunction | None) -> None:
    with folder.timed("train"):
        going_on = (folder / "state").is_dir()
        if not going_on:
            folder.discard(*_PRODUCTS)
        base, start = base_and_start(folder, config)
        policy = load_policy(base, start, config.policy, config.seed)
        reward, judge = run_scorer(folder, config, given).reward, judge_of(config)
        train_policy(folder, config, policy, reward, judge, _rows(folder, "train"), _rows(folder, "validation"))
        shutil.rmtree(folder / "state", ignore_errors=True)


def _evaluate(folder: RunFolder, config: Config, given: RewardFunction | None) -> None:
    with folder.timed("evaluate"):
        rows = _rows(folder, "test")
        responses = _responses(folder, config, rows)
        scorer, name = run_scorer(folder, config, given), judge_name(config)
        judges: dict[str, Judge] = {name: judge_of(config)}
        if scorer.judge is not None:
            judges[REWARD_JUDGE] = scorer.judge
        measured = measure(rows, responses, judges, scorer.reward)
        texts = [row.dialogue for row in rows] + [t for by in responses.values() for row in by for t in row]
        # Word by word a linear model is quick and sees what a classifier of sentences may not know.
        folder.write_json("masked_words.json", toxic_words(texts, profanity_judge() or judges[name]))
        _write_samples(folder, rows, responses, measured)
        evaluation = _evaluation(config, rows, responses, measured)
    folder.write_json("eval.json", evaluation | {"seconds": folder.finished()})


def _responses(folder: RunFolder, config: Config, rows: list[Row]) -> dict[str, list[list[str]]]:
    """Sample the start, the trained policy and the baseline on the same prompts with the same uniforms."""
    trained = folder.need("adapter", "train")
    base, start = base_and_start(folder, config)
    # Without an adapter to start from, before is the bare base, and no fresh adapter is needed to ask it.
    begin = None if config.policy.full_weights else start or trained
    policy = load_policy(base, begin, config.policy, config.seed).to(PartialState().device)
    adapters = {"before": policy.reference if start else None}
    found = {"after": trained, "sft_civil": folder / "baseline"}
    for name, place in found.items():
        if place.is_dir():
            policy.weights.add(name, place)
            adapters[name] = name
    prompts = to_prompts(rows)
    samples = config.evaluation.samples_per_prompt
    responses = {}
    with progress("evaluate", len(adapters) * len(prompts)) as advance:
        for name, adapter in adapters.items():
            responses[name] = sample_texts(
                policy,
                prompts,
                config.generation,
                seed=config.seed,
                stream="evaluation",
                samples=samples,
                adapter=adapter,
                on_prompts=partial(advance, name),
            )
    return responses


def _write_samples(
    folder: RunFolder, rows: list[Row], responses: dict[str, list[list[str]]], measured: dict[str, Any]
) -> None:
    lines = []
    for i, row in enumerate(rows):
        record = {
            "id": row.id,
            "dialogue": row.dialogue,
            "reference": row.summary,
            "civil_reference": row.civil_reference,
            "responses": {policy: texts[i] for policy, texts in responses.items()},
            "toxicity": {
                judge: {policy: values[i].round(4).tolist() for policy, values in by.items()}
                for judge, by in measured["toxicity"].items()
            },
        }
        if row.facts is not None:
            record["facts"] = {policy: by["facts"][i].tolist() for policy, by in measured["metrics"].items()}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    folder.write("samples.jsonl", "".join(lines))


def _evaluation(
    config: Config,
    rows: list[Row],
    responses: dict[str, list[list[str]]],
    measured: dict[str, Any],
) -> dict[str, Any]:
    baselines = [name for name in responses if name not in ("before", "after")]
    judge = judge_name(config)
    primary = measured["toxicity"][judge]
    return {
        "n_prompts": len(rows),
        "samples_per_prompt": config.evaluation.samples_per_prompt,
        "primary_judge": judge,
        **comparison(measured, "after", config.evaluation, config.seed),
        "two_by_two": two_by_two(primary["before"], primary["after"]),
        "splits": splits(rows, measured, judge, config.evaluation, config.seed),
        "baselines": {name: comparison(measured, name, config.evaluation, config.seed) for name in baselines},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {platform.system()}",
    }


def _report(folder: RunFolder, config: Config, given: RewardFunction | None) -> None:
    with folder.timed("report"):
        build_report(folder.root)


_REMAINING = dict(zip(STAGES[1:], (_sft, _train, _evaluate, _report), strict=True))
