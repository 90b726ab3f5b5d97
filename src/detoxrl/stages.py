"""What are the stages of a run, and what does each read and write?

Every stage takes the run folder alone, so each can run in its own process.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from detoxrl.cache import cached
from detoxrl.config import Config
from detoxrl.data.corpus import Row, generate_rows
from detoxrl.data.prompts import read_rows, rows_to_jsonl, to_prompts
from detoxrl.data.utterances import generate_utterances
from detoxrl.evaluate.judges import load_judge, once_each
from detoxrl.evaluate.measure import comparison, measure, splits, toxic_words
from detoxrl.policy.adapters import load_policy
from detoxrl.report.build import build_report
from detoxrl.reward_training import train_reward_model
from detoxrl.rewards.classifier import Classifier, load_classifier
from detoxrl.rollout import sample_texts
from detoxrl.sft import civil_baseline, warm_start
from detoxrl.tracking import REWARD_JUDGE, RunFolder, filling, log, progress
from detoxrl.train import train as train_policy

# What train and the stages after it make: gone as soon as something before them is made anew.
_PRODUCTS = (
    "adapter", "checkpoint.json", "normaliser.json", "metrics.jsonl", "validation.jsonl", "rollouts.jsonl",
    "eval.json", "samples.jsonl", "masked_words.json", "report.html",
)  # fmt: skip
SPLITS = ("train", "validation", "test")
UTTERANCES, REWARD_STEPS, REWARD_BATCH, REWARD_LR = 8_000, 150, 64, 1e-3


def run(root: Path, config: Config, overwrite: bool = False) -> dict[str, Any]:
    """Run every stage in a new folder and return the evaluation."""
    folder = RunFolder.create(root, config, overwrite)
    for stage in (_prepare, _sft, _train, _evaluate, _report):
        stage(folder, config)
    evaluation: dict[str, Any] = folder.read_json("eval.json")
    return evaluation


def prepare(root: Path, config: Config, overwrite: bool = False) -> None:
    """Make the run folder: prompts in data/, and the embedded reward model in reward/."""
    _prepare(RunFolder.create(root, config, overwrite), config)


def sft(root: Path) -> None:
    """Warm-start the policy, and fine-tune the baseline on civil references."""
    _sft(*RunFolder.open(root))


def train(root: Path) -> None:
    """Train the policy with PPO; the best checkpoint stands in adapter/."""
    _train(*RunFolder.open(root))


def evaluate(root: Path) -> dict[str, Any]:
    """Measure the policy before and after on held-out prompts; return what eval.json holds."""
    _evaluate(*RunFolder.open(root))
    evaluation: dict[str, Any] = RunFolder(root).read_json("eval.json")
    return evaluation


def report(root: Path) -> Path:
    """Write report.html and return its path."""
    _report(*RunFolder.open(root))
    return root / "report.html"


def _prepare(folder: RunFolder, config: Config) -> None:
    with folder.timed("prepare"):
        sizes = {split: getattr(config.data, f"{split}_rows") for split in SPLITS}
        rows = generate_rows(config.seed, sizes)
        for split in SPLITS:
            folder.write(f"data/{split}.jsonl", rows_to_jsonl(rows[split]))
        if config.reward.classifier == "embedded":
            _train_reward_model(folder, config)
        reward_model(folder, config)
        load_judge(config.evaluation.primary_judge)


def _train_reward_model(folder: RunFolder, config: Config) -> None:
    utterances = generate_utterances(config.seed, UTTERANCES)

    def build(target: Path) -> None:
        with progress("reward model", REWARD_STEPS) as advance:
            train_reward_model(
                utterances,
                target,
                steps=REWARD_STEPS,
                batch_size=REWARD_BATCH,
                lr=REWARD_LR,
                seed=config.seed,
                on_step=lambda loss: advance(f"loss {loss:.3f}"),
            )

    settings = f"{config.seed} {REWARD_STEPS} {REWARD_BATCH} {REWARD_LR}"
    _say_cached("reward model", cached("reward", [settings, json.dumps(utterances)], folder / "reward", build))


def _say_cached(what: str, known: bool) -> None:
    if known:
        log.print(f"{what}: trained before, taken from the cache")


def reward_model(folder: RunFolder, config: Config) -> Classifier:
    """Return the run's classifier, probed. Raises InputError when it does not fit its labels."""
    embedded = config.reward.classifier == "embedded"
    source = str(folder.need("reward", "prepare")) if embedded else config.reward.classifier
    return load_classifier(source, config.reward.good_label, config.reward.toxic_label, PartialState().device)


def base_and_start(folder: RunFolder, config: Config) -> tuple[str, Path | None]:
    """Return the policy's base and the adapter it starts from: what sft made, else what the config names."""
    own_base, own_start = folder / "base", folder / "start"
    if config.sft.steps > 0:
        folder.need("base" if config.sft.full_weights else "start", "sft")
    base = str(own_base.resolve()) if own_base.is_dir() else config.policy.base
    if own_start.is_dir():
        return base, own_start
    return base, Path(config.policy.adapter) if config.policy.adapter else None


def _rows(folder: RunFolder, split: str) -> list[Row]:
    return read_rows(folder.need(f"data/{split}.jsonl", "prepare"))


def _sft(folder: RunFolder, config: Config) -> None:
    with folder.timed("sft"):
        folder.discard(*_PRODUCTS)
        rows = _rows(folder, "train")
        if config.sft.steps > 0:
            where = "base" if config.sft.full_weights else "start"
            _fine_tuned(folder, config, where, lambda target: warm_start(config, config.policy.base, rows, target))
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
    _say_cached(name, cached(name, ingredients, folder / name, build))


def _train(folder: RunFolder, config: Config) -> None:
    with folder.timed("train"):
        folder.discard(*_PRODUCTS)
        base, start = base_and_start(folder, config)
        policy = load_policy(base, start, config.policy, config.seed)
        reward, judge = reward_model(folder, config), load_judge(config.evaluation.primary_judge)
        train_policy(folder, config, policy, reward.score, judge, _rows(folder, "train"), _rows(folder, "validation"))


def _evaluate(folder: RunFolder, config: Config) -> None:
    with folder.timed("evaluate"):
        rows = _rows(folder, "test")
        responses = _responses(folder, config, rows)
        reward, judge = reward_model(folder, config), load_judge(config.evaluation.primary_judge)
        by_reward = once_each(lambda texts: reward.toxicity(texts).double().numpy())
        judges = {config.evaluation.primary_judge: judge, REWARD_JUDGE: by_reward}
        measured = measure(rows, responses, judges)
        texts = [row.dialogue for row in rows] + [t for by in responses.values() for row in by for t in row]
        folder.write_json("masked_words.json", toxic_words(texts, judge))
        _write_samples(folder, rows, responses, measured)
        evaluation = _evaluation(config, rows, responses, measured)
    folder.write_json("eval.json", evaluation | {"seconds": folder.read_json("seconds.json")})


def _responses(folder: RunFolder, config: Config, rows: list[Row]) -> dict[str, list[list[str]]]:
    """Sample the start, the trained policy and the baseline on the same prompts with the same uniforms."""
    trained = folder.need("adapter", "train")
    base, start = base_and_start(folder, config)
    policy = load_policy(base, start, config.policy, config.seed).to(PartialState().device)
    policy.add_adapter("after", trained)
    adapters = {"before": policy.reference, "after": "after"}
    if (folder / "baseline").is_dir():
        policy.add_adapter("sft_civil", folder / "baseline")
        adapters["sft_civil"] = "sft_civil"
    prompts = to_prompts(config.data.template, rows)
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
    return {
        "n_prompts": len(rows),
        "samples_per_prompt": config.evaluation.samples_per_prompt,
        "primary_judge": config.evaluation.primary_judge,
        **comparison(measured, "after", config.evaluation, config.seed),
        "splits": splits(rows, measured, config.evaluation, config.seed),
        "baselines": {name: comparison(measured, name, config.evaluation, config.seed) for name in baselines},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {platform.system()}",
    }


def _report(folder: RunFolder, config: Config) -> None:
    with folder.timed("report"):
        build_report(folder.root)
