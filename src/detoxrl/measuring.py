"""How is a run measured on its held-out prompts?"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from itertools import chain
from typing import Any

import torch
from accelerate import PartialState

from detoxrl.config import Config
from detoxrl.data.rows import Row, to_prompts
from detoxrl.evaluation.judges import Judge, profanity_judge
from detoxrl.evaluation.measure import comparison, measure, old_protocol, splits, toxic_words, two_by_two
from detoxrl.parts import base_and_start, judge_name, judge_of, rows_of, run_scorer
from detoxrl.policy.adapters import load_policy
from detoxrl.rewards.function import RewardFunction
from detoxrl.rollout import sample_batches
from detoxrl.storage import remove
from detoxrl.tracking import REWARD_JUDGE, RunFolder, progress


def measure_run(
    folder: RunFolder, config: Config, given: RewardFunction | None, seconds: Callable[[], dict[str, float]]
) -> None:
    """Write samples.jsonl, masked_words.json and eval.json of a held folder; goes on from responses.jsonl.

    `seconds` returns what eval.json is to say of the stages.
    """
    rows = rows_of(folder, "test")
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
    theirs = REWARD_JUDGE if scorer.judge else name
    evaluation["as_older_systems"] = {"judge": theirs} | old_protocol(rows, responses, judges[theirs])
    evaluation |= {"changed_on_its_way": folder.read_json("run.json")["changes"], "seconds": seconds()}
    folder.write_json("eval.json", evaluation)
    remove(folder / "responses.jsonl")


def _responses(folder: RunFolder, config: Config, rows: list[Row]) -> dict[str, list[list[str]]]:
    """Sample the start, the trained policy and the baseline on the same prompts with the same uniforms."""
    trained = folder.need("adapter", "train")
    base, start = base_and_start(folder, config)
    # Without an adapter to start from, before is the bare base, and no fresh adapter is needed to ask it.
    begin = None if config.policy.full_weights else start or trained
    policy = load_policy(base, begin, config.policy, config.seed).to(PartialState().device)
    adapters = {"before": policy.reference if start else None}
    for name, place in {"after": trained, "sft_civil": folder / "baseline"}.items():
        if place.is_dir():
            policy.weights.add(name, place)
            adapters[name] = name
    prompts = to_prompts(rows)
    known = folder.whole_lines("responses.jsonl")
    found: dict[str, dict[int, list[str]]] = {name: {} for name in adapters}
    with progress("evaluate", len(adapters) * len(prompts)) as reach:
        for name, adapter in adapters.items():
            before = [dict(line["responses"]) for line in known if line["policy"] == name]
            batches = sample_batches(
                policy,
                prompts,
                config.generation,
                seed=config.seed,
                stream="evaluation",
                samples=config.evaluation.samples_per_prompt,
                adapter=adapter,
                skip=len(before),
            )
            for number, batch in enumerate(chain(before, batches)):
                if number >= len(before):
                    folder.append("responses.jsonl", {"policy": name, "responses": list(batch.items())})
                found[name] |= batch
                reach(sum(map(len, found.values())), name)
    return {name: [texts[row] for row in range(len(prompts))] for name, texts in found.items()}


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
            "score": {policy: by["score"][i].round(4).tolist() for policy, by in measured["metrics"].items()},
        }
        if row.facts is not None:
            record["facts"] = {policy: by["facts"][i].tolist() for policy, by in measured["metrics"].items()}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    folder.write("samples.jsonl", "".join(lines))


def _evaluation(
    config: Config, rows: list[Row], responses: dict[str, list[list[str]]], measured: dict[str, Any]
) -> dict[str, Any]:
    baselines = [name for name in responses if name not in ("before", "after")]
    judge = judge_name(config)
    return {
        "n_prompts": len(rows),
        "samples_per_prompt": config.evaluation.samples_per_prompt,
        "primary_judge": judge,
        **comparison(measured, "after", config.evaluation, config.seed),
        "two_by_two": two_by_two(*(measured["toxicity"][judge][side] for side in ("before", "after"))),
        "splits": splits(rows, measured, judge, config.evaluation, config.seed),
        "baselines": {name: comparison(measured, name, config.evaluation, config.seed) for name in baselines},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {platform.system()}",
    }
