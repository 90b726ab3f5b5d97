"""How far do judges agree with Perspective's scores, and with each other, on held-out texts of RealToxicityPrompts?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from detoxrl.data.labelled import Example
from detoxrl.evaluation.classifier_metrics import Rated, reliability
from detoxrl.evaluation.judges import Judge, judge_source, load_judges
from detoxrl.evaluation.statistics import Floats, agreement
from detoxrl.report.fit_words import METRIC_NAMES, with_interval
from detoxrl.report.words import number
from judge_measures import Benchmark, Table, intervals
from judged_sets import PERSPECTIVE_SCORES

_METRICS = ("spearman", "auc", "recall_at_precision_0.9", "mae", "ece")
_SCORE_METRICS = ("spearman", "auc", "mae")
# Words of short, usual, long and very long texts.
_LENGTHS = {"1 to 8": (1, 8), "9 to 14": (9, 14), "15 to 25": (15, 25), "26 and more": (26, 10**9)}
_PERSPECTIVE = "Perspective"


def scored_texts(examples: Sequence[Example], label: str = "toxicity") -> tuple[list[Example], Floats]:
    """Return the examples that have this score of Perspective, and the scores, (N,)."""
    position = PERSPECTIVE_SCORES.index(label)
    scored = [example for example in examples if not np.isnan(example.targets[position])]
    return scored, np.array([example.targets[position] for example in scored])


def compared(judge: Judge, examples: Sequence[Example], scores: Floats) -> Rated:
    """Return a judge's ratings of the examples' texts beside Perspective's scores, (N,)."""
    return Rated(judge([example.texts[0] for example in examples]), scores)


def perspective(benchmark: Benchmark) -> Table:
    """Return how each judge's toxicity fits Perspective's."""
    examples, scores = scored_texts(benchmark.perspective)
    rows = []
    for name, judge in benchmark.judges.items():
        cells = _measured(_METRICS, compared(judge, examples, scores), examples, benchmark)
        rows.append([name, *cells])
    return Table(_caption(scores), ["judge", *(METRIC_NAMES[metric] for metric in _METRICS)], rows)


def reliability_bins(benchmark: Benchmark) -> Table:
    """Return, for texts that a judge rates alike, what Perspective gives to them."""
    examples, scores = scored_texts(benchmark.perspective)
    rows = []
    for name, judge in benchmark.judges.items():
        for used_bin in reliability(compared(judge, examples, scores)):
            means = number(used_bin["mean_probability"]), number(used_bin["mean_label"])
            rows.append([name, str(used_bin["examples"]), *means])

    caption = "Texts in ten equal ranges of the judged toxicity; a range without texts is left out."
    return Table(caption, ["judge", "texts", "mean judged", "mean by Perspective"], rows)


def several_scores(benchmark: Benchmark) -> Table:
    """Return how the judge `scores_of` fits each of Perspective's scores that it has too.

    Raises InputError when the judge cannot be loaded, or has no such label.
    """
    remedy = "give the name, folder or hub id of a judge with these scores"
    labels = benchmark.score_labels
    sources = [judge_source(f"{benchmark.scores_of}={label}", "--scores-of", remedy) for label in labels]
    judges = load_judges(sources).values()

    rows = []
    for label, judge in zip(labels, judges, strict=True):
        examples, scores = scored_texts(benchmark.perspective, label)
        ratings = compared(judge, examples, scores)
        positive = f"{int(ratings.positive.sum())} of {len(scores)}"
        rows.append([label, positive, *_measured(_SCORE_METRICS, ratings, examples, benchmark)])

    columns = ["score", "at 0.5 or above", *(METRIC_NAMES[metric] for metric in _SCORE_METRICS)]
    return Table(f"Scores of {benchmark.scores_of} against the same scores of Perspective.", columns, rows)


def lengths(benchmark: Benchmark) -> Table:
    """Return how each judge fits Perspective on short, medium and long texts."""
    examples, scores = scored_texts(benchmark.perspective)
    words = np.array([len(example.texts[0].split()) for example in examples])

    rows = []
    for length, (fewest, most) in _LENGTHS.items():
        inside = np.flatnonzero((words >= fewest) & (words <= most))
        chosen = [examples[i] for i in inside]
        if not chosen:
            continue
        for name, judge in benchmark.judges.items():
            cells = _measured(("spearman", "mae"), compared(judge, chosen, scores[inside]), chosen, benchmark)
            rows.append([length, name, str(len(chosen)), *cells])
    return Table(_caption(scores), ["words", "judge", "texts", "Spearman", "mean absolute error"], rows)


def judge_agreement(benchmark: Benchmark) -> Table:
    """Return the rank correlation and Cohen's kappa of each two judges, of which Perspective is one."""
    examples, scores = scored_texts(benchmark.perspective)
    texts = [example.texts[0] for example in examples]
    toxicity = {_PERSPECTIVE: scores, **{name: judge(texts) for name, judge in benchmark.judges.items()}}
    pairs = agreement(toxicity)

    rows = []
    for name in toxicity:
        cells = []
        for other in toxicity:
            pair = pairs.get(f"{name} and {other}") or pairs.get(f"{other} and {name}")
            cells.append(f"{number(pair['spearman'])}, {number(pair['kappa'])}" if pair else "")
        rows.append([name, *cells])
    caption = f"Spearman, then Cohen's kappa on toxic (0.5 or above) or not. {_caption(scores)}"
    return Table(caption, ["", *toxicity], rows)


def _measured(metrics: Sequence[str], ratings: Rated, examples: Sequence[Example], benchmark: Benchmark) -> list[str]:
    """Return metrics as cells with their intervals; the texts of a row of the source are drawn together."""
    rows = [example.row for example in examples]
    results = intervals(metrics, ratings, rows, benchmark.resamples, benchmark.seed)
    return [with_interval(results[metric]) for metric in metrics]


def _caption(scores: Floats) -> str:
    return f"{len(scores)} held-out texts, {int((scores >= 0.5).sum())} of them at 0.5 or above by Perspective."
