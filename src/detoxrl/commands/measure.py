"""How are policies measured on held-out prompts?"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from detoxrl.data.rows import Row, to_prompts
from detoxrl.errors import require
from detoxrl.evaluation.baselines import Texts, best_of, word_filter
from detoxrl.evaluation.compare import Measured, evaluation, measure
from detoxrl.evaluation.insults import toxic_words
from detoxrl.evaluation.judges import Judge, memoized, profanity_judge
from detoxrl.evaluation.policies import MeasuredPolicies
from detoxrl.evaluation.readers import paired
from detoxrl.evaluation.statistics import Floats, prompts_needed
from detoxrl.evaluation.subjects import TRAINED
from detoxrl.models.policy import Policy
from detoxrl.models.sampling import Draws, batches_by_length, sample_texts
from detoxrl.report.results import read_lines
from detoxrl.rewards.shaping import is_wordless
from detoxrl.runs import Run
from detoxrl.runtime.console import progress
from detoxrl.runtime.files import remove_path
from detoxrl.runtime.run_folder import REWARD_JUDGE, RunFolder
from detoxrl.runtime.world import together

_RESPONSES = "responses.jsonl"
# Metrics of single responses that samples.jsonl holds.
_SHOWN_METRICS = ("score", "facts")


def measure_run(run: Run, seconds: Callable[[], dict[str, float]]) -> None:
    """Write samples.jsonl, masked_words.json and eval.json, with `seconds()` in it. Resumes from responses.jsonl.

    Where training kept the initial policy, that is sampled and measured once, and is "after" as it is "before".
    """
    rows = run.rows("test")
    record = run.folder.read_json("run.json")
    measures_texts = bool(rows[0].texts)
    run.load_measures()
    if not measures_texts:
        run.load_reward()

    responses = _given_responses(rows) if measures_texts else _policy_responses(run, record["measures"]["policies"])
    judges = {name: memoized(judge) for name, judge in run.judges.items()}
    readers = run.readers
    if not measures_texts:
        readers = replace(readers, score=run.scores())
        responses = _with_baselines(run, rows, responses, readers.score)
        if run.scorer.judge is not None:
            judges[REWARD_JUDGE] = run.scorer.judge

    measured = measure(rows, responses, judges, readers)
    if run.folder.kept_initial_policy():
        measured = measured.with_initial_kept()
        responses = {**responses, "after": responses["before"]}
    first_prompt = run.folder.read_json("rows.json").get("first_prompt", "")
    shown = {"first prompt": [[first_prompt]], "rows": [[row.text for row in rows]], **responses}
    run.folder.write_json("masked_words.json", _masked_words(shown, judges[measured.primary]))
    run.folder.write("samples.jsonl", _samples(rows, responses, measured))

    result = evaluation(run.config, rows, measured)
    result["names"] = record["measures"]["names"]
    result["changed_on_its_way"] = record["changes"]
    result["seconds"] = seconds()
    run.folder.write_json("eval.json", result)
    remove_path(run.folder / _RESPONSES)


def _given_responses(rows: Sequence[Row]) -> dict[str, Texts]:
    """Return the responses that files gave, by policy, and those of "before" without insults."""
    texts = [row.texts for row in rows if row.texts]
    responses: dict[str, Texts] = {name: [by_policy[name] for by_policy in texts] for name in texts[0]}
    responses["word_filter"] = word_filter(responses["before"], None)
    return responses


def _policy_responses(run: Run, given: Mapping[str, str]) -> dict[str, Texts]:
    """Sample every policy on the same prompts with the same uniforms; batches in responses.jsonl are not repeated.

    There is no "after" where training kept the initial policy.
    """
    folder = run.folder
    run.require_warm_start()
    has_after = "after" in given or (folder / TRAINED["after"]).is_dir()
    require(has_after, "run folder", str(folder.root), "has no adapter", "train it first")
    sampler = run.world.build(ResponseSampler, run, dict(given))

    texts: dict[str, dict[int, list[str]]] = {name: {} for name in sampler.names}
    for line in folder.read_lines(_RESPONSES):
        if line["policy"] in texts:
            texts[line["policy"]].update(line["responses"])

    rows = len(run.rows("test"))
    counts = {name: sampler.samples_per_prompt(name) for name in sampler.names}
    with progress("sample", rows * sum(counts.values())) as report:
        for name in sampler.names:
            for batch in sampler.batches(skip=len(texts[name])):
                sampled = sampler.sample(name, batch)
                folder.append(_RESPONSES, {"policy": name, "responses": list(sampled.items())})
                texts[name].update(sampled)
                report(sum(len(texts[name]) * count for name, count in counts.items()), name)
    return {name: [by_row[row] for row in range(rows)] for name, by_row in texts.items()}


class ResponseSampler:
    """Samples responses of the policies that are measured; all processes of the run share each batch."""

    def __init__(self, run: Run, given: Mapping[str, str]) -> None:
        self.world = run.world
        self._config = run.config
        self._prompts = to_prompts(run.rows("test"))
        self._draws = Draws(run.config.seed, "evaluation")
        trained = {name: run.folder / part for name, part in TRAINED.items() if (run.folder / part).is_dir()}
        self._policies = MeasuredPolicies(run.base, run.adapter, trained, given, run.config)
        self._on_device: Policy | None = None
        self.names = list(self._policies.names)
        if run.folder.kept_initial_policy():
            self.names.remove("after")

    def batches(self, skip: int) -> list[list[int]]:
        """Return the rows of each batch, in order of length, without the first `skip` rows of that order."""
        size = self._config.generation.batch_size * self.world.size
        (order,) = batches_by_length(self._prompts, len(self._prompts))
        left = order[skip:]
        return [left[start : start + size] for start in range(0, len(left), size)]

    def samples_per_prompt(self, name: str) -> int:
        """Return how many responses a policy gives to a prompt; the initial one more, from which best-of-n picks."""
        settings = self._config.evaluation
        extra = max(settings.best_of, default=0) if name == "before" else 0
        return settings.samples_per_prompt + extra

    @together
    def sample(self, name: str, batch: list[int]) -> dict[int, list[str]]:
        """Return the responses of one policy to some rows, by row."""
        policy, adapter = self._policies.get(name)
        if policy is not self._on_device:
            self._on_device = policy.to(self.world.device)
        mine = self.world.share(batch)
        prompts = [self._prompts[row] for row in mine]
        samples = self.samples_per_prompt(name)
        texts = sample_texts(policy, prompts, self._config.generation, self._draws, samples, adapter)
        responses: dict[int, list[str]] = {}
        for part in self.world.gather(dict(zip(mine, texts, strict=True))):
            responses.update(part)
        return responses


def _with_baselines(
    run: Run, rows: Sequence[Row], sampled: dict[str, Texts], score: Callable[[Any], Floats] | None
) -> dict[str, Texts]:
    """Return the responses, those of the initial policy filtered by words, and the best of its further samples."""
    settings = run.config.evaluation
    count = settings.samples_per_prompt
    before = [samples[:count] for samples in sampled["before"]]
    pool = [samples[count:] for samples in sampled["before"]]
    baselines: dict[str, Texts] = {"word_filter": word_filter(before, run.scorer.judge)}
    if settings.best_of and score:
        pairs = paired(to_prompts(rows), pool)
        empty = is_wordless([text for _, text in pairs])
        scores = np.where(empty, -np.inf, score(pairs)).reshape(len(rows), -1)
        for size in settings.best_of:
            baselines[f"best_of_{size}"] = best_of(pool, scores, size)

    after = {name: texts for name, texts in sampled.items() if name == "after"}
    others = {name: texts for name, texts in sampled.items() if name not in ("before", "after")}
    return {"before": before, **after, **baselines, **others}


def _masked_words(shown: Mapping[str, Texts], primary: Judge) -> list[str]:
    """Return the words to mask in all texts that the report shows."""
    texts = list(chain.from_iterable(shown.values()))
    # Word by word a linear model is fast, and sees what a classifier of sentences may not know.
    return toxic_words(texts, profanity_judge() or primary)


def _samples(rows: Sequence[Row], responses: Mapping[str, Texts], measured: Measured) -> str:
    """Return a JSON object a line: each row with the responses of every policy, and what was measured of them."""
    shown = [name for name in _SHOWN_METRICS if name in measured.metrics["before"]]
    lines = []
    for number, row in enumerate(rows):
        record: dict[str, Any] = {
            "id": row.id,
            "text": row.text,
            "references": row.references,
            "civil_references": row.civil_references,
            "columns": row.columns,
            "responses": {policy: by_prompt[number] for policy, by_prompt in responses.items()},
            "toxicity": {judge: _rounded(by_policy, number) for judge, by_policy in measured.toxicity.items()},
        }
        for name in shown:
            by_policy = {policy: metrics[name] for policy, metrics in measured.metrics.items()}
            record[name] = _rounded(by_policy, number)
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines)


def _rounded(by_policy: Mapping[str, Floats], row: int) -> dict[str, Any]:
    return {policy: values[row].round(4).tolist() for policy, values in by_policy.items()}


def needed_prompts(root: Path, drop: float) -> str:
    """Return in words how many prompts would detect a relative `drop` in toxicity, given a measured run's samples.

    Raises InputError when the run was not measured, or when its samples cannot tell.
    """
    folder, _ = RunFolder.open(root)
    samples = read_lines(folder.require_product("samples.jsonl", "evaluate"))
    judge = folder.read_json("eval.json")["primary_judge"]
    before = np.array([sample["toxicity"][judge]["before"] for sample in samples])
    needed = prompts_needed(before, drop)
    return (
        f"to detect a drop of {drop:.0%} in mean toxicity ({before.mean():.3f} by {judge}) with 80 % power at the 5 % "
        f"level: {needed} prompts with {before.shape[1]} samples each; this run had {len(before)}"
    )
