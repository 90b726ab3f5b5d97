"""How are policies measured on held-out prompts?"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import chain, compress, cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detoxrl.commands.responses import RESPONSES, Samples, sampled_responses, without_likelihoods
from detoxrl.config.judges import PERSPECTIVE
from detoxrl.config.terms import TERM_KINDS, Term
from detoxrl.data.rows import Row
from detoxrl.evaluation.baselines import Texts, best_of, word_filter
from detoxrl.evaluation.compare import (
    Masks,
    Measured,
    comparison,
    evaluation,
    measure,
    parts_by_prompt,
    scored_pairs,
)
from detoxrl.evaluation.identity import audit_judge, audit_policies, audit_reward
from detoxrl.evaluation.insults import toxic_words
from detoxrl.evaluation.judges import Judge, memoized, profanity_judge
from detoxrl.evaluation.likelihood import likelihood_metrics
from detoxrl.evaluation.perspective import perspective_version
from detoxrl.evaluation.readers import Readers, ScoredPairs
from detoxrl.evaluation.sharpening import SHARPENED, Sharpening
from detoxrl.evaluation.statistics import Floats, prompts_needed
from detoxrl.evaluation.subjects import WITH_TOP_P
from detoxrl.report.results import read_lines
from detoxrl.rewards.overlap import linear_sameness
from detoxrl.rewards.shaping import fit_normaliser, is_wordless, overall
from detoxrl.runs import Run
from detoxrl.runtime.files import remove_path
from detoxrl.runtime.run_folder import REWARD_JUDGE, RunFolder

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

    sharpening = Sharpening(None, "files of texts have no entropy")
    identity_texts: dict[str, dict[str, list[str]]] = {}
    if measures_texts:
        samples = _given_responses(rows)
    else:
        samples, sharpening, identity_texts = sampled_responses(run, record["measures"]["policies"])
    judges = {name: memoized(judge) for name, judge in run.judges.items()}
    readers = run.readers
    if not measures_texts:
        readers = replace(readers, reward=_reward_reader(run, rows, samples["before"]))
        samples = _with_baselines(run, rows, samples, readers.reward)
        if run.scorer.judge is not None:
            judges[REWARD_JUDGE] = run.scorer.judge

    responses: dict[str, Texts] = {name: _texts(of_policy) for name, of_policy in samples.items()}
    likelihoods = {}
    for name, of_policy in samples.items():
        likelihoods[name] = _likelihoods(name, of_policy)
    everything = measure(rows, responses, judges, readers).with_metrics(likelihoods)
    if run.folder.kept_initial_policy():
        everything = everything.with_initial_kept()
        responses = {**responses, "after": responses["before"]}
    measured = everything.of_policies({name: name for name in responses if name not in WITH_TOP_P.values()})
    first_prompt = run.folder.read_json("rows.json").get("first_prompt", "")
    shown = {"first prompt": [[first_prompt]], "rows": [[row.text for row in rows]], **responses}
    run.folder.write_json("masked_words.json", _masked_words(shown, judges[measured.primary]))
    run.folder.write("samples.jsonl", _samples(rows, responses, everything))

    result = evaluation(run.config, rows, measured)
    result["names"] = record["measures"]["names"]
    result["changed_on_its_way"] = record["changes"]
    result["sharpening"] = sharpening._asdict()
    result["by_prompt"] = _by_prompt(run, rows, samples, measured)
    result["top_p"] = _with_top_p(run, rows, samples, everything)
    result["identity"] = {
        "judges": {name: audit_judge(judge) for name, judge in judges.items()},
        "reward": _reward_audit(rows, responses["before"], readers),
        "policy": audit_policies(identity_texts, judges[measured.primary]) if identity_texts else None,
    }
    if readers.perspective:
        result["versions"][PERSPECTIVE] = str(perspective_version())
    result["seconds"] = seconds()
    run.folder.write_json("eval.json", result)
    remove_path(run.folder / RESPONSES)


def _reward_audit(rows: Sequence[Row], before: Texts, readers: Readers) -> dict[str, Any] | None:
    """Return how the reward scores civil mentions of groups as responses to the rows' prompts; None without one."""
    if readers.reward is None:
        return None
    first = [[texts[0]] for texts in before]
    return audit_reward(readers.reward, [prompt for prompt, _ in scored_pairs(rows, first, first)])


def _reward_reader(run: Run, rows: Sequence[Row], before: Samples) -> Callable[[ScoredPairs], dict[str, Floats]]:
    """Return the reward as a reader. Its terms are normalised as in training, or else on responses "before"."""
    values = run.values()
    terms = run.reward.terms
    normaliser = run.stored_normaliser()
    if normaliser is None:
        texts = _texts(before)
        raw = torch.from_numpy(values(scored_pairs(rows, texts, texts)))
        normaliser = fit_normaliser(raw, terms)

    def score(pairs: ScoredPairs) -> dict[str, Floats]:
        raw = torch.from_numpy(values(pairs))
        scores = {"score": overall(raw, terms, normaliser, run.config.reward.clip).numpy()}
        for column, term in enumerate(terms if len(terms) > 1 else ()):
            scores[f"score/{term.name}"] = _with_spread_of_mean(term, raw[:, column], pairs)
        return scores

    return score


def _with_spread_of_mean(term: Term, values: torch.Tensor, pairs: ScoredPairs) -> Floats:
    """Return values (N,) of a term with the same mean, whose spread over prompts is that of the mean."""
    if not TERM_KINDS[term.kind].is_shared:
        return values.numpy()
    return np.array(linear_sameness([prompt.text for prompt, _ in pairs], [text for _, text in pairs]))


def _by_prompt(
    run: Run, rows: Sequence[Row], samples: Mapping[str, Samples], measured: Measured
) -> dict[str, dict[str, Any]]:
    """Return the comparison of "after" with "before" for parts of the prompts: toxic ones, stressed ones, the others.

    Each part has that of every baseline too.
    """
    settings = run.config.evaluation
    terms = run.config.reward.measured_terms
    shared = {f"score/{term.name}" for term in terms if TERM_KINDS[term.kind].is_shared}
    parts = {}
    for name, mask in parts_by_prompt(rows).items():
        part = _part(samples, measured, mask, shared)
        baselines = [policy for policy in part.metrics if policy not in ("before", "after")]
        parts[name] = {
            "n": int(mask.sum()),
            **comparison(part, "after", settings, run.config.seed),
            "baselines": {policy: comparison(part, policy, settings, run.config.seed) for policy in baselines},
        }
    return parts


def _part(samples: Mapping[str, Samples], measured: Measured, mask: Masks, shared: Collection[str]) -> Measured:
    """Return what was measured of some prompts, and the extremes of their samples.

    Likelihoods are per token, so they are taken anew over the tokens of the part. Left out is what compares the
    responses of all parts with each other.
    """
    part = measured.of_rows(mask).without_metrics(shared).with_extremes()
    likelihoods = {}
    for policy in part.metrics:
        # Where training kept the initial policy, there are no samples of "after".
        of_policy = samples.get(policy, samples["before"])
        likelihoods[policy] = _likelihoods(policy, list(compress(of_policy, mask)))
    return part.with_metrics(likelihoods)


def _likelihoods(policy: str, samples: Samples) -> dict[str, Floats]:
    return likelihood_metrics(samples, are_draws=not policy.startswith("best_of_"))


def _with_top_p(
    run: Run, rows: Sequence[Row], samples: Mapping[str, Samples], everything: Measured
) -> dict[str, Any] | None:
    """Return the comparison of the two policies where they sample with evaluation.top_p; None without it."""
    settings = run.config.evaluation
    names = {name: with_top_p for name, with_top_p in WITH_TOP_P.items() if with_top_p in samples}
    if not names:
        return None

    measured = everything.of_policies(names)
    if "after" not in names:
        measured = measured.with_initial_kept()
    of_names = {name: samples[policy] for name, policy in names.items()}
    return {
        "p": settings.top_p,
        **comparison(measured.with_extremes(), "after", settings, run.config.seed),
        "by_prompt": _by_prompt(run, rows, of_names, measured),
    }


def _given_responses(rows: Sequence[Row]) -> dict[str, Samples]:
    """Return the responses that files gave, by policy, and those of "before" without insults."""
    texts = [row.texts for row in rows if row.texts]
    responses: dict[str, Texts] = {name: [by_policy[name] for by_policy in texts] for name in texts[0]}
    responses["word_filter"] = word_filter(responses["before"], None)
    return {name: without_likelihoods(by_row) for name, by_row in responses.items()}


def _with_baselines(
    run: Run,
    rows: Sequence[Row],
    sampled: dict[str, Samples],
    score: Callable[[ScoredPairs], Mapping[str, Floats]] | None,
) -> dict[str, Samples]:
    """Return the samples, those of the initial policy filtered by words, and the best of its further samples."""
    settings = run.config.evaluation
    count = settings.samples_per_prompt
    before = [samples[:count] for samples in sampled["before"]]
    pool = [samples[count:] for samples in sampled["before"]]
    filtered = word_filter(_texts(before), run.scorer.judge)
    baselines: dict[str, Samples] = {"word_filter": without_likelihoods(filtered)}
    if settings.best_of and score:
        pairs = scored_pairs(rows, _texts(pool), _texts(before))
        empty = is_wordless([text for _, text in pairs])
        scores = np.where(empty, -np.inf, score(pairs)["score"]).reshape(len(rows), -1)
        for size in settings.best_of:
            baselines[f"best_of_{size}"] = best_of(pool, scores, size)

    baselines.update(_floor_and_ceiling(rows, count))
    if SHARPENED in sampled:
        baselines[SHARPENED] = sampled[SHARPENED]

    after = {name: samples for name, samples in sampled.items() if name == "after"}
    trained = {name: samples for name, samples in sampled.items() if name not in ("before", "after", SHARPENED)}
    return {"before": before, **after, **baselines, **trained}


def _floor_and_ceiling(rows: Sequence[Row], count: int) -> dict[str, Samples]:
    """Return, for sources to rewrite, the sources themselves, and what people wrote if every row has that."""
    if any(row.task != "rewrite" for row in rows):
        return {}

    ends: dict[str, Texts] = {"copy": [[row.text] * count for row in rows]}
    if all(row.references for row in rows):
        ends["human"] = [list(islice(cycle(row.references), count)) for row in rows]
    return {name: without_likelihoods(texts) for name, texts in ends.items()}


def _texts(samples: Samples) -> list[list[str]]:
    return [[sample.text for sample in of_prompt] for of_prompt in samples]


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
            "stressed": row.stressed,
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
