"""How are policies measured on held-out prompts?"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from detoxrl.config.schema import Config
from detoxrl.data.rows import Row, to_prompts
from detoxrl.errors import require
from detoxrl.evaluation.baselines import Texts, best_of, word_filter
from detoxrl.evaluation.compare import Measured, Readers, evaluation, measure, old_protocol, paired, toxic_words
from detoxrl.evaluation.judges import profanity_judge
from detoxrl.evaluation.policies import TRAINED, policies_of
from detoxrl.evaluation.statistics import Floats, prompts_needed
from detoxrl.models.sampling import sample_batches
from detoxrl.report.page import read_lines
from detoxrl.rewards.function import RewardFunction
from detoxrl.rewards.shaping import is_wordless
from detoxrl.runs import Scorer, base_and_start, judges_of, readers_of, rows_of, run_scorer
from detoxrl.runtime import processes
from detoxrl.runtime.console import progress
from detoxrl.runtime.files import remove_path
from detoxrl.runtime.run_folder import REWARD_JUDGE, RunFolder


def measure_run(
    folder: RunFolder, config: Config, given: RewardFunction | None, seconds: Callable[[], dict[str, float]]
) -> None:
    """Write samples.jsonl, masked_words.json and eval.json, with `seconds()` in it; goes on from responses.jsonl."""
    rows, account = rows_of(folder, "test"), folder.read_json("run.json")
    texts = [row.texts for row in rows if row.texts]
    scorer = None if texts else run_scorer(folder, config, given)
    judges, readers = judges_of(config), readers_of(config, scorer)
    if scorer is not None and scorer.judge is not None:
        judges[REWARD_JUDGE] = scorer.judge
    if scorer is None:
        responses: dict[str, Texts] = {name: [by[name] for by in texts] for name in texts[0]}
        responses |= {"word_filter": word_filter(responses["before"], None)}
    else:
        sampled = _responses(folder, config, rows, account["measures"]["policies"])
        responses = _with_baselines(config, rows, sampled, scorer, readers)
    measured = measure(rows, responses, judges, readers)
    # Word by word a linear model is quick and sees what a classifier of sentences may not know.
    shown = [[row.dialogue for row in rows], *(row for by in responses.values() for row in by)]
    masked = toxic_words(shown, profanity_judge() or judges[measured.primary])
    folder.write_json("masked_words.json", masked)
    _write_samples(folder, rows, responses, measured)
    theirs = REWARD_JUDGE if REWARD_JUDGE in judges else measured.primary
    found = evaluation(config, rows, measured) | {"names": account["measures"]["names"]}
    found["as_older_systems"] = {"judge": theirs} | old_protocol(rows, responses, judges[theirs])
    found |= {"changed_on_its_way": account["changes"], "seconds": seconds()}
    folder.write_json("eval.json", found)
    remove_path(folder / "responses.jsonl")


def _responses(folder: RunFolder, config: Config, rows: list[Row], given: Mapping[str, str]) -> dict[str, Texts]:
    """Sample every policy on the same prompts with the same uniforms, from those on that are there."""
    names = {name for name, place in TRAINED.items() if (folder / place).is_dir()} | {*given}
    require("after" in names, "run folder", str(folder.root), "has no adapter", "train it first")
    found: dict[str, dict[int, list[str]]] = defaultdict(dict)
    for line in folder.read_lines("responses.jsonl"):
        found[line["policy"]] |= dict(line["responses"])
    done = {name: len(texts) for name, texts in found.items()}
    processes.tell("measure", folder, config, rows, given, done)
    with progress("sample", (1 + len(names)) * len(rows)) as reach:
        for name, batch in sampled(folder, config, rows, given, done):
            folder.append("responses.jsonl", {"policy": name, "responses": list(batch.items())})
            found[name] |= batch
            reach(sum(map(len, found.values())), name)
    return {name: [texts[row] for row in range(len(rows))] for name, texts in found.items()}


def sampled(
    folder: RunFolder, config: Config, rows: list[Row], given: Mapping[str, str], done: Mapping[str, int]
) -> Iterator[tuple[str, dict[int, list[str]]]]:
    """Yield each policy's name with batches of responses by row, without those `done`; all processes take part.

    Of the start there are some more, to pick the best of.
    """
    trained = {name: folder / place for name, place in TRAINED.items() if (folder / place).is_dir()}
    prompts, how, seed, count = to_prompts(rows), config.generation, config.seed, config.evaluation.samples_per_prompt
    for name, policy, adapter in policies_of(*base_and_start(folder, config), trained, given, config):
        policy.to(PartialState().device)
        samples = count + (max(config.evaluation.best_of, default=0) if name == "before" else 0)
        part: dict[str, Any] = {"samples": samples, "adapter": adapter, "skip": done.get(name, 0)}
        for batch in sample_batches(policy, prompts, how, seed=seed, stream="evaluation", together=True, **part):
            yield name, batch


def _with_baselines(
    config: Config, rows: list[Row], sampled: dict[str, Texts], scorer: Scorer, readers: Readers
) -> dict[str, Texts]:
    """Return the responses, with those of the start filtered, and the best of its further samples."""
    samples, sizes = config.evaluation.samples_per_prompt, config.evaluation.best_of
    before, pool = ([row[part] for row in sampled["before"]] for part in (slice(samples), slice(samples, None)))
    found: dict[str, Texts] = {"word_filter": word_filter(before, scorer.judge)}
    if sizes and readers.score:
        pairs = paired([row.prompt for row in rows], pool)
        scores = np.where(is_wordless([text for _, text in pairs]), -np.inf, readers.score(pairs)).reshape(
            len(rows), -1
        )
        found |= {f"best_of_{n}": best_of(pool, scores, n) for n in sizes}
    return {"before": before, "after": sampled["after"]} | found | {n: t for n, t in sampled.items() if n != "before"}


def _write_samples(folder: RunFolder, rows: list[Row], responses: dict[str, Texts], measured: Measured) -> None:
    def shown(values: Mapping[str, Floats], i: int) -> dict[str, Any]:
        return {policy: of_one[i].round(4).tolist() for policy, of_one in values.items()}

    kept = [name for name in ("score", "facts") if name in measured.metrics["before"]]
    by_name = {name: {policy: by[name] for policy, by in measured.metrics.items()} for name in kept}
    lines = []
    for i, row in enumerate(rows):
        record: dict[str, Any] = {"id": row.id, "dialogue": row.dialogue, "reference": row.summary}
        record |= {"civil_reference": row.civil_reference, "responses": {name: by[i] for name, by in responses.items()}}
        record["toxicity"] = {judge: shown(by, i) for judge, by in measured.toxicity.items()}
        record |= {name: shown(values, i) for name, values in by_name.items()}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    folder.write("samples.jsonl", "".join(lines))


def needed_prompts(root: Path, drop: float) -> str:
    """Return in words how many prompts would find a relative `drop` in toxicity, by what a measured run's start wrote.

    Raises InputError when the run was not measured, or cannot tell.
    """
    folder, _ = RunFolder.open(root)
    samples = read_lines(folder.need("samples.jsonl", "evaluate"))
    judge = folder.read_json("eval.json")["primary_judge"]
    before = np.array([sample["toxicity"][judge]["before"] for sample in samples])
    return (
        f"to find a drop of {drop:.0%} in mean toxicity ({before.mean():.3f} by {judge}) with 80 % power at 5 %: "
        f"{prompts_needed(before, drop)} prompts with {before.shape[1]} samples each; this run had {len(before)}"
    )
